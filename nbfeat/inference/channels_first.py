"""A network turned channels-first, in which OpenVINO is two to five times faster; where it may be, and is the same."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from nbfeat.backbones import keras_weights
from nbfeat.errors import NetworkError

MAP_RANK = 4
_LARGEST_DIFFERENCE = 0.005  # of what outputs vary by between images; float32 gives 1e-3 in the deepest networks
_IMAGES = 4
_SEED = 8


def turn_channels_first(base: Any) -> Any | None:
    """Clone the model `base` with channels before rows and columns; None where that cannot be (ConvNeXt's parts)."""
    keras: Any = importlib.import_module("keras")
    layers = keras.layers
    if any(hasattr(layer, "layers") for layer in base.layers):
        return None

    def turn(layer: Any, config: dict[str, Any]) -> None:
        if "data_format" in config:
            config["data_format"] = "channels_first"
        if isinstance(layer, layers.BatchNormalization | layers.Concatenate | layers.Normalization):
            config["axis"] = 1
        if isinstance(layer, layers.Reshape) and len(config["target_shape"]) == MAP_RANK - 1:
            rows, columns, channels = config["target_shape"]
            config["target_shape"] = (channels, rows, columns)
        if isinstance(layer, layers.Rescaling) and isinstance(config["scale"], list | tuple):
            config["scale"] = [[[value]] for value in config["scale"]]

    rows, columns, channels = base.input_shape[1:]
    turned = keras_weights.cloned(base, turn, inputs=keras.Input((channels, rows, columns)))
    if turned.output_shape[1] != base.output_shape[-1]:
        raise NetworkError(
            f"{base.name} could not be turned channels-first: {turned.output_shape} from {base.output_shape}."
        )
    return turned


def gives_the_same(one: Any, other: Any) -> bool:
    """Tell whether two models give the same for seeded random pixels, in every output.

    The difference is measured against what an output varies by between images: one that hardly does, such as a
    saturated softmax, proves nothing.
    """
    pixels = _pixels(other.input_shape[1])
    left, right = (model.predict_on_batch(pixels) for model in (one, other))
    for key, values in right.items():
        ours, theirs = np.asarray(left[key], float), np.asarray(values, float)
        if ours.shape != theirs.shape or not np.isfinite(ours).all():
            return False
        varies = np.linalg.norm(theirs - theirs.mean(axis=0))
        if not np.linalg.norm(ours - theirs) <= _LARGEST_DIFFERENCE * varies or not varies:
            return False
    return True


def _pixels(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Draw images with and without structure, no two of one brightness, and no two sides of one alike."""
    generator = np.random.default_rng(_SEED)
    noise = generator.integers(0, 256, (_IMAGES, size, size, 3))
    coarse = generator.integers(0, 256, (_IMAGES, 4, 4, 3))
    at = np.arange(size) * 4 // size
    mixed = np.where(np.arange(_IMAGES)[:, None, None, None] % 2, noise, coarse[:, at][:, :, at])
    return np.asarray(mixed * np.linspace(0.4, 1, _IMAGES)[:, None, None, None], np.uint8)
