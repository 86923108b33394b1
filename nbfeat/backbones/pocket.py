"""Pocket: a small convolutional network whose weights are in the package, so that it needs no download.

Twenty plain convolutions with ReLU, in five blocks around a shortcut, each narrow in its middle (He et al. 2016, "Deep
residual learning"). It was trained with batch norms, which are folded into the convolutions here.

**Model card.** Data: 54,000 photographs of Tiny ImageNet (64 × 64 pixels, 200 classes), 6,000 more held out. Terms:
these are for non-commercial research and education, and so are the weights; see ``POCKET-LICENSE``. Recipe: the
program in the project's history, with seed 0; Pocket learned the classes and, mostly, the features that MobileNetV2 and
MobileNet 0.75 give of the photographs, 44 epochs in 81 minutes on one core of a machine that was busy with other work.
Weights: float16. Figures: with a linear classifier on its features, 51 % of the held-out photographs (at 64 pixels) are
given their class, of 200, and 76 % within five guesses; of 300 photographs of five flowers, in five-fold
cross-validation of ``make_pipeline(StandardScaler(), SVC(C=10))``, 0.767, where random weights have 0.40, raw pixels
0.43, MobileNet 0.25 has 0.81 and MobileNetV2 0.82. Eight shuffles of those photographs give 0.73 to 0.773, 0.753 in
the mean; at 96 pixels 0.765 in the mean, for half as much work again.

Good for: trying things out, teaching, tests, a first look at photographs of things, animals and places. Not good for:
fine differences, small things in large pictures, text, faces, medical or satellite images; results that are published,
for which take a larger backbone; any decision about people. It has seen 200 kinds of things, as photographs on the
web show them, and inherits what is uneven in those.
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
    """A convolution and its ReLU; what the convolution called `shortcut` gave is added between the two."""

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
    """Build Pocket for square images of `size` pixels scaled as `torch`; weights are as Keras initializes them."""
    import keras
    from keras import layers

    x = pixels = keras.Input((size, size, 3))
    given: dict[str, Any] = {}
    for each in CONVOLUTIONS:
        if each.stride > 1:
            # Even padding on all sides, as PyTorch has it: Keras' "same" pads unevenly where a kernel takes steps.
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
    """Return each layer's kernel (rows, columns, inputs, outputs) and bias, from the file here of that SHA-256."""
    advice = "Install nbfeat again: `pip install --force-reinstall --no-deps nbfeat`."
    try:
        content = WEIGHTS.read_bytes()
    except OSError as error:
        raise WeightsError(f"The weights of Pocket cannot be read ({error}). {advice}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise WeightsError(
            f"The weights of Pocket in {WEIGHTS} are not those of this release: their SHA-256 begins with {found[:8]}, "
            f"not with {sha256[:8]}. {advice}"
        )
    weights: dict[str, list[NDArray[np.float32]]] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for key in arrays:  # the kernel of each layer first
            weights.setdefault(key.partition("/")[0], []).append(arrays[key].astype(np.float32))
    return weights
