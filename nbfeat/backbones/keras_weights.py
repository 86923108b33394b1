"""Weights in a file of Keras' (``.weights.h5``, ``.h5``, ``.keras``), or of a network, given to one that they fit.

Files of a network with its classifier serve the network without it. A misfit is told by the first layer that differs.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py

from nbfeat.backbones.hdf5 import check_archive, check_hdf5, refusing
from nbfeat.errors import WeightsError


def load(network: Any, path: Path) -> None:
    """Give `network` the weights in the file at `path`; raise WeightsError where they are not its own."""
    (check_archive if path.suffix == ".keras" else check_hdf5)(path)
    by_name = {"by_name": True} if path.suffix != ".keras" and _is_by_name(network, path) else {}
    try:
        network.load_weights(path, **by_name)
    except (ValueError, OSError, KeyError) as error:
        raise _do_not_fit(network, path, _first_difference(str(error))) from error


def cloned(network: Any, edit: Callable[[Any, dict[str, Any]], object], *, inputs: Any = None) -> Any:
    """Clone `network` with its weights for `inputs`, each layer by its configuration after `edit` was given both."""

    def clone(layer: Any) -> Any:
        config = layer.get_config()
        edit(layer, config)
        return type(layer).from_config(config)

    keras: Any = importlib.import_module("keras")
    twin = keras.models.clone_model(network, input_tensors=inputs, clone_function=clone, recursive=True)
    twin.set_weights(network.get_weights())
    for layer in leaves(twin):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with what it made of its weights when it was built
    return twin


def leaves(layer: Any) -> Iterator[Any]:
    """Walk the layers that hold no others; those inside a layer of the user's own are found like any other."""
    keras: Any = importlib.import_module("keras")
    inner = [part for part in layer._layers if isinstance(part, keras.layers.Layer)]  # no public way
    for part in inner:
        yield from leaves(part)
    if not inner and isinstance(layer, keras.layers.Layer) and not isinstance(layer, keras.layers.InputLayer):
        yield layer


def _is_by_name(network: Any, path: Path) -> bool:
    """Tell whether a file is of the older kind; such a one is compared here, since Keras passes over gaps."""
    with refusing(path, "weights in HDF5"), h5py.File(path, "r") as file:
        group = file.get("model_weights", file)
        if "layer_names" not in group.attrs:
            return False
        saved = {name: group[name] for name in map(os.fsdecode, group.attrs["layer_names"])}  # text or bytes
        for layer in network.layers:
            if not layer.weights:
                continue
            if layer.name not in saved:
                raise _do_not_fit(network, path, f"{layer.name}, which the file has not")
            arrays, here = saved[layer.name], [tuple(weight.shape) for weight in layer.weights]
            there = [tuple(arrays[name].shape) for name in map(os.fsdecode, arrays.attrs["weight_names"])]
            if here != there:
                ours, theirs = (
                    " and ".join(_sides(str(one)) for one in shapes) or "nothing" for shapes in (here, there)
                )
                raise _do_not_fit(network, path, f"{layer.name}: {ours} here, {theirs} in the file")
    return True


def _first_difference(text: str) -> str:
    """Find the first layer that differs, and how, in what Keras says at length."""
    name = re.search(r"<\w+ name=([^,>]+)", text)
    shapes = re.search(r"variable\.shape=(\([^)]*\)), Received: value\.shape=(\([^)]*\))", text)
    count = re.search(r"expected (\d+) variables?, but received (\d+)", text)
    if name is None:
        return text.splitlines()[0] if text else "of which Keras does not say"
    if shapes:
        return f"{name[1]}: {_sides(shapes[1])} here, {_sides(shapes[2])} in the file"
    return f"{name[1]}: {count[1]} arrays here, {count[2]} in the file" if count else name[1]


def _do_not_fit(network: Any, path: Path, first: str) -> WeightsError:
    return WeightsError(
        f"The weights in {path.name} do not fit {network.name}: the first layer that differs is {first}. Name the "
        "backbone they were saved from, with its --alpha."
    )


def _sides(shape: str) -> str:
    return " × ".join(re.findall(r"\d+", shape)) or "a number"
