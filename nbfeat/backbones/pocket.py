"""Pocket: a small convolutional network whose weights ship with the package.

Twenty convolutions with ReLU in five residual bottleneck blocks (He et al. 2016); batch norms are folded into them.
Trained on 54,000 photographs of Tiny ImageNet (64 × 64 pixels, 200 classes), on the labels and mostly on the features
of MobileNetV2 and MobileNet 0.75, for 44 epochs. License: non-commercial research and education (``POCKET-LICENSE``).
Accuracy, and what it isn't suited to: ``notebooks/guide/networks.md``.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.backbone import Backbone
from nbfeat.errors import WeightsError

WEIGHTS = Path(__file__).with_suffix(".npz")
_BLOCKS = (64, 128, 128, 256, 256)  # channels; where they grow, a convolution halves the map first


def build(backbone: Backbone, size: int) -> Any:
    """Build Pocket, without its weights, for square images of `size` pixels with `torch` scaling."""
    import keras
    from keras import layers

    def convolve(x: Any, name: str, channels: int, side: int = 3, stride: int = 1, activation: Any = "relu") -> Any:
        if stride > 1:  # pads evenly on all sides as PyTorch does; Keras' "same" does not with a stride
            x = layers.ZeroPadding2D(side // 2, name=f"{name}_pad")(x)
        padding = "valid" if stride > 1 else "same"
        return layers.Conv2D(channels, side, stride, padding, activation=activation, name=name)(x)

    pixels = keras.Input((size, size, 3))
    x = convolve(pixels, "conv1", 24, stride=2)
    for block, channels in enumerate(_BLOCKS, start=1):
        names = (f"block{block}_conv{number}" for number in range(1, 5))
        shortcut = x if x.shape[-1] == channels else convolve(x, next(names), channels, stride=2)
        x = convolve(convolve(shortcut, next(names), channels // 2, side=1), next(names), channels // 2)
        x = convolve(x, next(names), channels, side=1, activation=None)
        x = layers.ReLU(name=f"block{block}_out")(layers.Add(name=f"block{block}_add")([x, shortcut]))
    return keras.Model(pixels, convolve(x, "top_conv", 512, side=1), name="Pocket")


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
