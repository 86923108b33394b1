"""Pocket: a small convolutional network whose weights ship with the package.

Twenty plain convolutions with ReLU in five residual bottleneck blocks (He et al. 2016, "Deep residual learning"). The
batch norms used in training are folded into the convolutions.

**Model card.** Trained on 54,000 photographs of Tiny ImageNet (64 × 64 pixels, 200 classes), on the class labels and
mostly on the features of MobileNetV2 and MobileNet 0.75, for 44 epochs; weights in float16. License: non-commercial
research and education, see ``POCKET-LICENSE``. Accuracy, and what it isn't suited to: ``notebooks/guide/networks.md``.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import WeightsError

WEIGHTS = Path(__file__).with_suffix(".npz")


class Convolution(NamedTuple):
    """A convolution and its ReLU; the output of the convolution `shortcut` is added in between."""

    name: str
    before: int  # channels
    after: int
    side: int = 3  # of the kernel, in pixels
    stride: int = 1
    shortcut: str = ""


CONVOLUTIONS = (
    Convolution("conv1", 3, 24, stride=2),
    Convolution("block1_conv1", 24, 64, stride=2),
    Convolution("block1_conv2", 64, 32, side=1),
    Convolution("block1_conv3", 32, 32),
    Convolution("block1_conv4", 32, 64, side=1, shortcut="block1_conv1"),
    Convolution("block2_conv1", 64, 128, stride=2),
    Convolution("block2_conv2", 128, 64, side=1),
    Convolution("block2_conv3", 64, 64),
    Convolution("block2_conv4", 64, 128, side=1, shortcut="block2_conv1"),
    Convolution("block3_conv1", 128, 64, side=1),
    Convolution("block3_conv2", 64, 64),
    Convolution("block3_conv3", 64, 128, side=1, shortcut="block2_conv4"),
    Convolution("block4_conv1", 128, 256, stride=2),
    Convolution("block4_conv2", 256, 128, side=1),
    Convolution("block4_conv3", 128, 128),
    Convolution("block4_conv4", 128, 256, side=1, shortcut="block4_conv1"),
    Convolution("block5_conv1", 256, 128, side=1),
    Convolution("block5_conv2", 128, 128),
    Convolution("block5_conv3", 128, 256, side=1, shortcut="block4_conv4"),
    Convolution("top_conv", 256, 512, side=1),
)


def build(size: int) -> Any:
    """Build Pocket, without its weights, for square images of `size` pixels with `torch` scaling."""
    import keras
    from keras import layers

    x = pixels = keras.Input((size, size, 3))
    given: dict[str, Any] = {}
    for each in CONVOLUTIONS:
        if each.stride > 1:
            # Pads evenly on all sides as PyTorch does; Keras' "same" does not with a stride.
            x = layers.ZeroPadding2D(each.side // 2, name=f"{each.name}_pad")(x)
        how = {"padding": "valid" if each.stride > 1 else "same", "activation": None if each.shortcut else "relu"}
        x = layers.Conv2D(each.after, each.side, strides=each.stride, name=each.name, **how)(x)
        if each.shortcut:
            block = each.name.partition("_")[0]
            x = layers.Add(name=f"{block}_add")([x, given[each.shortcut]])
            x = layers.ReLU(name=f"{block}_out")(x)
        given[each.name] = x
    return keras.Model(pixels, x, name="Pocket")


def read(sha256: str) -> dict[str, list[NDArray[np.float32]]]:
    """Return each layer's kernel (rows, columns, inputs, outputs) and bias, from the weights file with that SHA-256."""
    advice = "Reinstall nbfeat: `pip install --force-reinstall --no-deps nbfeat`."
    try:
        content = WEIGHTS.read_bytes()
    except OSError as error:
        raise WeightsError(f"The weights of Pocket cannot be read ({error}). {advice}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise WeightsError(
            f"The weights of Pocket in {WEIGHTS} don't belong to this release: their SHA-256 starts with {found[:8]}, "
            f"not {sha256[:8]}. {advice}"
        )
    weights: dict[str, list[NDArray[np.float32]]] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for key in arrays:  # the kernel of each layer first
            weights.setdefault(key.partition("/")[0], []).append(arrays[key].astype(np.float32))
    return weights
