"""Seeded random weights, for tests and experiments.

Keras' initializers give feature norms from 1e-18 (MobileNet) to 1e10 (EfficientNetV2L). Here NumPy draws the weights
(He et al. 2015, by fan-in), the same on every backend, and one batch of smooth noise sets the batch norm statistics.
"""

import importlib
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nbfeat.backbones.backbone import Scaling
from nbfeat.backbones.keras_weights import leaves

SEED = 20_150_206  # the day He et al.'s "Delving deep into rectifiers" appeared
CALIBRATION_IMAGES = 8
# The middle and half the range of scaled pixels; with "none" they are 0 … 255.
_RANGES = {"tf": (0, 1), "torch": (0, 2), "caffe": (0, 127.5), "none": (127.5, 127.5)}


def draw(network: Any, scaling: Scaling) -> None:
    """Give `network` seeded random weights that keep its features at a sensible scale."""
    layers = importlib.import_module("keras").layers
    for layer in leaves(network):
        for variable in layer.weights:
            shape, is_norm = variable.shape, isinstance(layer, layers.BatchNormalization)
            if variable.name == "bias" or (is_norm and variable.name in {"gamma", "beta"}):
                # Keras' own values, but on OpenVINO those would be graphs, compiled at every access.
                variable.assign(np.full(shape, variable.name == "gamma", "float32"))
            if "kernel" not in variable.name:
                continue
            depthwise = isinstance(layer, layers.DepthwiseConv2D) or variable.name == "depthwise_kernel"
            fan_in = int(np.prod(shape[:2] if depthwise else shape[:-1]))
            generator = np.random.default_rng([SEED, zlib.crc32(f"{layer.name}/{variable.name}".encode())])
            variable.assign(generator.normal(0, np.sqrt(2 / fan_in), shape).astype("float32"))
    _calibrate(network, scaling)


def _calibrate(network: Any, scaling: Scaling) -> None:
    """Set all batch norm statistics from one pass over smooth noise."""
    keras: Any = importlib.import_module("keras")
    kind = keras.layers.BatchNormalization
    if not (norms := [layer for layer in network.layers if isinstance(layer, kind)]):
        return

    def moments(x: Any) -> tuple[Any, Any]:
        mean = keras.ops.mean(x, axis=(0, 1, 2), keepdims=True)
        return mean, keras.ops.mean(keras.ops.square(x - mean), axis=(0, 1, 2), keepdims=True)

    class OfThisBatch(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any, mask: Any = None) -> Any:  # tensors; the graph passes a mask
            mean, variance = moments(x)
            return (x - mean) / keras.ops.sqrt(variance + 1e-3)

    def swap(layer: Any) -> Any:
        return OfThisBatch(name=layer.name) if isinstance(layer, kind) else type(layer).from_config(layer.get_config())

    twin = keras.models.clone_model(network, clone_function=swap)
    for layer in network.layers:
        if layer.weights and not isinstance(layer, kind):
            twin.get_layer(layer.name).set_weights(layer.get_weights())
    noise = _smooth_noise(network.input_shape[1], scaling)
    measure = keras.Model(twin.inputs, [moments(twin.get_layer(norm.name).input) for norm in norms])
    # On OpenVINO each tensor is a separate graph; `predict` computes all of them at once.
    all_at_once = keras.backend.backend() == "openvino"
    measured = measure.predict(noise, verbose=0) if all_at_once else measure(noise, training=False)
    for norm, (mean, variance) in zip(norms, measured, strict=True):
        norm.moving_mean.assign(keras.ops.convert_to_numpy(mean).ravel())
        norm.moving_variance.assign(keras.ops.convert_to_numpy(variance).ravel())


def _smooth_noise(size: int, scaling: Scaling) -> NDArray[np.float32]:
    """Draw images in the range of `scaling` that are smooth like photographs."""
    middle, spread = _RANGES[scaling]
    coarse = np.random.default_rng(SEED).normal(middle, 0.6 * spread, (CALIBRATION_IMAGES, 9, 9, 3))
    return np.asarray(ndimage.zoom(coarse, (1, size / 9, size / 9, 1), order=1), np.float32)
