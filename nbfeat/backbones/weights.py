"""Weights for a network: published ones through Keras' own code, a file, or drawn from a seed.

Published weights come from the address and with the check that Keras gives them, into Keras' own folder. Random weights
are for tests and demonstrations: as Keras initializes them, features have norms from 1e-18 (MobileNet) to 1e10
(EfficientNetV2L), so they are drawn here (He et al. 2015, by fan-in) and every batch norm takes its statistics from one
batch of smooth noise. NumPy draws them, so that they are the same on every Keras backend.
"""

from __future__ import annotations

import hashlib
import importlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.catalog import Scaling
from nbfeat.errors import RequestError, WeightsError

if TYPE_CHECKING:
    import keras

Tell = Callable[[str], None]
SEED = 20_150_206  # the day He et al.'s "Delving deep into rectifiers" appeared
CALIBRATION_IMAGES = 8
# The middle and half the range of scaled pixels; a network without scaling takes 0 … 255 and scales inside itself.
_RANGES: dict[Scaling, tuple[float, float]] = {
    "tf": (0, 1),
    "torch": (0, 2),
    "caffe": (0, 127.5),
    "none": (127.5, 127.5),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded: ``imagenet``, ``random`` or a file name, and the SHA-256 of the file or of the drawn arrays."""

    name: str
    sha256: str


def load(
    make: Callable[[str | None], keras.Model], weights: str, tell: Tell, *, scaling: Scaling
) -> tuple[keras.Model, Loaded]:
    """Build a network by `make` and give it `weights`; `tell` hears of a download before it begins.

    `scaling` says in which range the network expects its pixels.
    """
    if weights == "random":
        network = make(None)
        draw(network, scaling)
        return network, Loaded("random", _digest_of_arrays(network.get_weights()))
    if weights == "imagenet":
        with _files_told(tell) as files:
            network = make("imagenet")
        return network, Loaded("imagenet", digest(Path(files[-1])))
    path = weights_file(weights)
    network = make(None)
    try:
        network.load_weights(path)
    except (ValueError, OSError, KeyError) as error:
        message = f"The weights in {path} do not fit {network.name}: {str(error).splitlines()[0]}"
        raise WeightsError(message) from error
    return network, Loaded(path.name, digest(path))


def weights_file(weights: str) -> Path:
    """Return the path of a weights file, or say what `weights` may be."""
    path = Path(weights).expanduser()
    if not path.is_file():
        message = f"--weights takes imagenet, random or a file of Keras weights; there is no file {weights!r}."
        raise RequestError(message)
    if path.suffix not in {".h5", ".keras"}:
        message = f"{path.name} is not a file of Keras weights: its name should end in .weights.h5, .h5 or .keras."
        raise RequestError(message)
    return path.absolute()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_arrays(arrays: list[NDArray[np.float32]]) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


@contextmanager
def _files_told(tell: Tell) -> Iterator[list[str]]:
    """Watch Keras' `get_file`: tell of downloads, and turn a failed one into a sentence that helps."""
    file_utils: Any = importlib.import_module("keras.src.utils.file_utils")
    home = importlib.import_module("keras.src.backend.config").keras_home()
    original, files = file_utils.get_file, list[str]()

    def get_file(fname: str, origin: str, *args: Any, **kwargs: Any) -> str:  # noqa: ANN401 - passed on as they come
        place = Path(home, "models", fname)
        if not place.exists():
            tell(f"downloading {fname} (once; it stays in {place.parent})")
        try:
            path: str = original(fname, origin, *args, **kwargs)
        except Exception as error:
            reason = str(error).rpartition(" -- ")[2] or type(error).__name__
            message = (
                f"The weights {fname} are not on this machine and could not be downloaded ({reason}). "
                f"Download {origin} and put it at {place}, or use --weights random to try things out."
            )
            raise WeightsError(message) from error
        files.append(path)
        return path

    file_utils.get_file = get_file
    try:
        yield files
    finally:
        file_utils.get_file = original


def draw(network: keras.Model, scaling: Scaling) -> None:
    """Give `network` seeded random weights whose features have a sane scale, the same on every backend."""
    layers = importlib.import_module("keras").layers
    for layer in _leaves(network):
        for variable in layer.weights:
            if "kernel" not in variable.name:
                continue
            shape = variable.shape
            depthwise = isinstance(layer, layers.DepthwiseConv2D) or variable.name == "depthwise_kernel"
            fan_in = int(np.prod(shape[:2] if depthwise else shape[:-1]))
            generator = np.random.default_rng([SEED, zlib.crc32(f"{layer.name}/{variable.name}".encode())])
            variable.assign(generator.normal(0, np.sqrt(2 / fan_in), shape).astype("float32"))
    _calibrate(network, scaling)


def _leaves(network: Any) -> Iterator[Any]:  # noqa: ANN401 - Keras layers are not typed
    for layer in network.layers:
        yield from _leaves(layer) if hasattr(layer, "layers") else [layer]


def _calibrate(network: keras.Model, scaling: Scaling) -> None:
    """Set the statistics of every batch norm from one pass over smooth noise."""
    keras: Any = importlib.import_module("keras")
    kind = keras.layers.BatchNormalization
    if not any(isinstance(layer, kind) for layer in network.layers):
        return

    def moments(x: Any) -> tuple[Any, Any]:  # noqa: ANN401 - tensors of whichever backend
        mean = keras.ops.mean(x, axis=(0, 1, 2), keepdims=True)
        return mean, keras.ops.mean(keras.ops.square(x - mean), axis=(0, 1, 2), keepdims=True)

    class OfThisBatch(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any, mask: Any = None) -> Any:  # noqa: ANN401, ARG002 - tensors; the graph passes a mask
            mean, variance = moments(x)
            return (x - mean) / keras.ops.sqrt(variance + 1e-3)

    def swap(layer: Any) -> Any:  # noqa: ANN401 - Keras layers are not typed
        return OfThisBatch(name=layer.name) if isinstance(layer, kind) else type(layer).from_config(layer.get_config())

    twin = keras.models.clone_model(network, clone_function=swap)
    norms = [layer for layer in network.layers if isinstance(layer, kind)]
    for layer in network.layers:
        if layer.weights and not isinstance(layer, kind):
            twin.get_layer(layer.name).set_weights(layer.get_weights())
    wanted = [moments(twin.get_layer(norm.name).input) for norm in norms]
    noise = _smooth_noise(network.input_shape[1], scaling)
    measure = keras.Model(twin.inputs, wanted)
    # On OpenVINO a tensor is a graph of its own: `predict` computes all of them at once.
    all_at_once = keras.backend.backend() == "openvino"
    measured = measure.predict(noise, verbose=0) if all_at_once else measure(noise, training=False)
    for norm, (mean, variance) in zip(norms, measured, strict=True):
        norm.moving_mean.assign(keras.ops.convert_to_numpy(mean).ravel())
        norm.moving_variance.assign(keras.ops.convert_to_numpy(variance).ravel())


def _smooth_noise(size: int, scaling: Scaling) -> NDArray[np.float32]:
    """Draw images in the range of `scaling` whose neighboring pixels are alike, as in photographs."""
    middle, spread = _RANGES[scaling]
    coarse = np.random.default_rng(SEED).normal(middle, 0.6 * spread, (CALIBRATION_IMAGES, 9, 9, 3))
    at = np.linspace(0, 8, size)
    left, share = np.minimum(at.astype(int), 7), at - np.minimum(at.astype(int), 7)
    across = coarse[:, :, left] * (1 - share)[:, None] + coarse[:, :, left + 1] * share[:, None]
    share = share[:, None, None]
    return np.asarray(across[:, left] * (1 - share) + across[:, left + 1] * share, np.float32)
