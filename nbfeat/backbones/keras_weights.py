"""Check Keras weights files (``.weights.h5``, ``.h5``, ``.keras``) and load them into a network.

An HDF5 file can refer to other files (external links or storage, virtual datasets) and declare more numbers than it has
bytes; a zip can hold foreign parts or expand. All of this is checked before any data is read. Weights saved with a
classifier also load into the network without it.
"""

import importlib
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from nbfeat import isolation
from nbfeat.errors import Refused, WeightsError, damaged, quote, refusing

MOST_LINKS = 100_000  # a network of a thousand layers has 5,000
MOST_LEVELS = 64
MOST_RATIO = 16  # weights compress to half at best, pruned ones to a tenth
SLACK = 1 << 20  # bytes; a small file may hold little but zeros
# Deflate, shuffle, Fletcher32 and LZF ship with h5py; HDF5 would search this machine for plugins for any other.
_FILTERS = frozenset({1, 2, 3, 32_000})
_WEIGHTS = "model.weights.h5"


def check_hdf5(path: Path) -> None:
    """Raise WeightsError if a file is not HDF5, refers to other files, holds more than plain numbers, or expands."""
    import h5py

    advice = "Save the weights again with model.save_weights(), or download them again."
    with refusing(path, "weights in HDF5", advice), h5py.File(path, "r") as file:
        names = set[bytes]()

        def refusal(name: bytes, link: Any) -> Refused | None:
            if len(names) >= MOST_LINKS or name.count(b"/") > MOST_LEVELS:
                return Refused(f"it has more than {MOST_LINKS:,} links, or more than {MOST_LEVELS} levels of groups")
            group, _, own = name.rpartition(b"/")
            if group and group not in names:  # HDF5 would resolve it and follow links on the way
                return Refused(f"the name of its link {quote(own)} is a path")
            if link.type not in {h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT}:
                return Refused(f"its link {quote(own)} points to another file")
            if link.type == h5py.h5l.TYPE_HARD:  # the target of a soft link has one too
                names.add(name)
            return None

        # Visits hard links, each group once, so nothing is opened before every link was checked.
        if refused := file.id.links.visit(refusal, info=True):
            raise refused
        things, size = (h5py.h5o.open(file.id, name) for name in names), path.stat().st_size
        declared = sum(_bytes_declared(one) for one in things if isinstance(one, h5py.h5d.DatasetID))
        if declared > MOST_RATIO * size + SLACK:
            raise Refused(f"its {size:,} bytes would expand more than {MOST_RATIO} times")


def _bytes_declared(dataset: Any) -> int:
    """Return the bytes needed to read a dataset or one of its chunks; refuse one that isn't plain numbers."""
    import h5py

    stored, kind = dataset.get_create_plist(), dataset.get_type()
    name = quote(h5py.h5i.get_name(dataset) or b"")
    if stored.get_layout() == h5py.h5d.VIRTUAL or stored.get_external_count():
        raise Refused(f"the data of its dataset {name} is in another file")
    if kind.get_class() not in {h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM}:
        raise Refused(f"its dataset {name} is not numeric")
    for number in range(stored.get_nfilters()):
        if (known := stored.get_filter(number)[0]) not in _FILTERS:
            raise Refused(f"its dataset {name} uses filter {known}, which is not supported")
    lengths = [dataset.shape or (), stored.get_chunk() if stored.get_layout() == h5py.h5d.CHUNKED else ()]
    return max(map(math.prod, lengths)) * int(kind.get_size())


def check_archive(path: Path) -> None:
    """Raise WeightsError if a ``.keras`` file has foreign parts, refers to other files, or expands."""
    with _opened(path) as archive, tempfile.TemporaryDirectory(prefix="nbfeat-") as folder:
        whole = Path(folder, _WEIGHTS)
        with archive.open(_WEIGHTS) as packed, whole.open("wb") as out:
            shutil.copyfileobj(packed, out)
        check_hdf5(whole)


def description(path: Path) -> dict[str, Any]:
    """Return the model configuration in a ``.keras`` file, read without Keras."""
    with _opened(path) as archive:
        return cast("dict[str, Any]", json.loads(archive.read("config.json")))


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    advice = "Save it again with model.save('model.keras')."
    with refusing(path, "a Keras model", advice), zipfile.ZipFile(path) as archive:
        names, size = archive.namelist(), path.stat().st_size
        if unknown := [name for name in names if name not in {"metadata.json", "config.json", _WEIGHTS}]:
            raise Refused(f"its part {quote(unknown[0])} doesn't belong in a model of stock layers")
        if len(set(names)) != len(names) or not {"config.json", _WEIGHTS} <= set(names):
            raise damaged("it doesn't have the parts of a model")
        if sum(part.file_size for part in archive.infolist()) > MOST_RATIO * size + SLACK:
            raise Refused(f"its {size:,} bytes would expand more than {MOST_RATIO} times")
        yield archive


def load(network: Any, path: Path) -> None:
    """Load the weights at `path` into `network`; raise WeightsError if they don't fit."""
    with isolation.reading_in_time():
        (check_archive if path.suffix == ".keras" else check_hdf5)(path)
        by_name = {"by_name": True} if path.suffix != ".keras" and _is_by_name(network, path) else {}
    try:
        network.load_weights(path, **by_name)
    except Exception as error:  # any error from Keras or h5py is about the file
        raise _do_not_fit(network, path, _first_difference(str(error))) from error


def cloned(network: Any, edit: Callable[[Any, dict[str, Any]], object], *, inputs: Any = None) -> Any:
    """Clone `network` with its weights for `inputs`; `edit` may change each layer's configuration."""

    def clone(layer: Any) -> Any:
        config = layer.get_config()
        edit(layer, config)
        return type(layer).from_config(config)

    keras: Any = importlib.import_module("keras")
    twin = keras.models.clone_model(network, input_tensors=inputs, clone_function=clone, recursive=True)
    twin.set_weights(network.get_weights())
    for layer in leaves(twin):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with values derived from its weights
    return twin


def leaves(layer: Any) -> Iterator[Any]:
    """Walk the layers that contain no other layers, including those inside custom layers."""
    keras: Any = importlib.import_module("keras")
    inner = [part for part in layer._layers if isinstance(part, keras.layers.Layer)]  # Keras has no public name for it
    for part in inner:
        yield from leaves(part)
    if not inner and isinstance(layer, keras.layers.Layer) and not isinstance(layer, keras.layers.InputLayer):
        yield layer


def _is_by_name(network: Any, path: Path) -> bool:
    """Tell whether a file is in the older format, and compare its shapes, since Keras skips gaps."""
    import h5py

    with refusing(path, "weights in HDF5"), h5py.File(path, "r") as file:
        group = file.get("model_weights", file)
        if "layer_names" not in group.attrs:
            return False
        saved = {name: group[name] for name in map(os.fsdecode, group.attrs["layer_names"])}  # text or bytes
        for layer in network.layers:
            if not layer.weights:
                continue
            if layer.name not in saved:
                raise _do_not_fit(network, path, f"{layer.name}, which is missing from the file")
            arrays, here = saved[layer.name], [tuple(weight.shape) for weight in layer.weights]
            there = [tuple(arrays[name].shape) for name in map(os.fsdecode, arrays.attrs["weight_names"])]
            if here != there:
                ours, theirs = (" and ".join(_sides(str(one)) for one in each) or "nothing" for each in (here, there))
                raise _do_not_fit(network, path, f"{layer.name}: {ours} here, {theirs} in the file")
    return True


def _first_difference(text: str) -> str:
    """Extract the first layer that differs, and how, from Keras' long message."""
    name = re.search(r"<\w+ name=([^,>]+)", text)
    shapes = re.search(r"variable\.shape=(\([^)]*\)), Received: value\.shape=(\([^)]*\))", text)
    count = re.search(r"expected (\d+) variables?, but received (\d+)", text)
    if name is None:
        return text.splitlines()[0] if text else "not named by Keras"
    if shapes:
        return f"{name[1]}: {_sides(shapes[1])} here, {_sides(shapes[2])} in the file"
    return f"{name[1]}: {count[1]} arrays here, {count[2]} in the file" if count else name[1]


def _do_not_fit(network: Any, path: Path, first: str) -> WeightsError:
    return WeightsError(
        f"The weights in {path.name} do not fit {network.name}: the first layer that differs is {first}. "
        "Use the backbone and `alpha` they were saved from."
    )


def _sides(shape: str) -> str:
    return " × ".join(re.findall(r"\d+", shape)) or "a number"
