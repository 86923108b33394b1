"""Weights for a network: published ones, bundled ones, a file, or drawn from a seed.

Published weights of Keras' own networks come from the address and with the check that Keras gives them, into Keras' own
folder; those of the networks written here from where PyTorch publishes them. Files are looked at before they are
loaded: none may run code, or lead its reader to another file.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.backbone import Backbone
from nbfeat.errors import RequestError, WeightsError

if TYPE_CHECKING:
    import keras

    from nbfeat.backbones.state_dict import LayerWeights

Tell = Callable[[str], None]
CHECKPOINTS = (".pth", ".pt")
NAMED = ("imagenet", "bundled", "random")  # what --weights takes beside files
SUFFIXES = (".h5", ".keras", *CHECKPOINTS)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded: one of NAMED or a file name, and the SHA-256 of the file or of the drawn arrays."""

    name: str
    sha256: str


def load(
    backbone: Backbone, make: Callable[[str | None], keras.Model], weights: str, tell: Tell
) -> tuple[keras.Model, Loaded]:
    """Build the network of `backbone` by `make` and give it `weights`; `tell` hears of a download before it begins."""
    if weights == "imagenet" and backbone.package == "keras.applications":
        with _files_told(tell) as files:
            network = make("imagenet")
        return network, Loaded("imagenet", digest(Path(files[-1])))
    # Reading files takes more imports than a notebook needs.
    from nbfeat.backbones import bundled, keras_weights, published, random_weights

    network = make(None)
    if weights == "bundled":
        _set(network, bundled.read(backbone))
        return network, Loaded("bundled", backbone.bundled)
    if weights == "random":
        random_weights.draw(network, backbone.scaling)
        return network, Loaded("random", digest_of_arrays(network.get_weights()))
    path = published.found(backbone) if weights == "imagenet" else weights_file(weights)
    if path.suffix in CHECKPOINTS:
        _load_checkpoint(backbone, network, path)
    else:
        keras_weights.load(network, path)
    found = digest(path)
    return network, Loaded("imagenet" if published.is_published(backbone, path.name, found) else path.name, found)


def weights_file(weights: str) -> Path:
    """Return the path of a weights file, or say what `weights` may be."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise RequestError(
            f"--weights takes imagenet, bundled, random or a file of weights; there is no file {weights!r}."
        )
    if path.suffix not in SUFFIXES:
        raise RequestError(
            f"{path.name} is not a file of weights: its name should end in .weights.h5, .h5, .keras or .pth."
        )
    return path.absolute()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_arrays(arrays: list[NDArray[np.float32]]) -> str:
    """Return the SHA-256 of the bytes of arrays, in order."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def _load_checkpoint(backbone: Backbone, network: Any, path: Path) -> None:
    """Give a network written here the weights of torchvision's."""
    if not backbone.published:
        raise WeightsError(
            f"{path.name} is a checkpoint of PyTorch's, which is read for AlexNet and GoogLeNet alone: give "
            f"{backbone.name} a file of Keras weights."
        )
    from nbfeat.backbones import torch_weights

    module: Any = importlib.import_module(f"{backbone.package}.{backbone.module}")
    _set(network, module.weights_from(torch_weights.read(path)))


def _set(network: Any, weights: LayerWeights) -> None:
    for layer, arrays in weights.items():
        network.get_layer(layer).set_weights(arrays)


@contextmanager
def _files_told(tell: Tell) -> Iterator[list[str]]:
    """Watch Keras' `get_file`: tell of downloads, and turn a failed one into a sentence that helps."""
    file_utils: Any = importlib.import_module("keras.src.utils.file_utils")
    home = importlib.import_module("keras.src.backend.config").keras_home()
    original, files = file_utils.get_file, list[str]()

    def get_file(fname: str, origin: str, *args: Any, **kwargs: Any) -> str:
        place = Path(home, "models", fname)
        if not place.exists():
            tell(f"downloading {fname} (once; it stays in {place.parent})")
        try:
            path: str = original(fname, origin, *args, **kwargs)
        except Exception as error:
            reason = str(error).rpartition(" -- ")[2] or type(error).__name__
            raise WeightsError(
                f"The weights {fname} are not on this machine and could not be downloaded ({reason}). "
                f"Download {origin} and put it at {place}, or use --weights random to try things out."
            ) from error
        files.append(path)
        return path

    file_utils.get_file = get_file
    try:
        yield files
    finally:
        file_utils.get_file = original
