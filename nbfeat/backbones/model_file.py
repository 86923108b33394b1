"""A network of the user's own in a ``.keras`` file: what its description says of it, without Keras.

Only what Keras itself can build is taken. Anything else would need code that is not in the file, or run code that is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbfeat.backbones.backbone import Backbone, Layer
from nbfeat.backbones.refusal import quote
from nbfeat.errors import RequestError, WeightsError, near

NAME = "Keras model"  # what the network of any file is called where its path must not matter
SUFFIXES = (".keras", ".h5", ".hdf5")  # the others are refused, with the way to a .keras file
REGISTER = "Register the function that builds it instead: nbfeat.register_backbone('MyNet', build, …)."

_MODULES = re.compile(
    r"keras(\.(src\.)?(models|layers|ops|activations|initializers|regularizers|constraints|random|dtype_policies)(\..+)?)?"
)
# Stock layers that run code from the file, or read other files.
_RUN_CODE = {"Lambda", "__lambda__", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "TFSMLayer"}
_READ_FILES = {"StringLookup", "IntegerLookup", "TextVectorization"}
_RGB = 3
LARGEST = 4096  # pixels, as --size


def backbone_at(name: str) -> Backbone:
    """Return the backbone in the file `name`, whose name is its absolute path; nothing of it is built.

    Raises
    ------
    RequestError
        Where there is no such file, or its network does not take square RGB images, or is not of Keras' own layers.
    WeightsError
        Where the file is damaged, or not what Keras writes.
    """
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        siblings = [one.name for one in path.parent.glob("*.keras")] if path.parent.is_dir() else []
        way = near(path.name, siblings) or f"Relative paths start at {Path.cwd()}; check this one."
        raise RequestError(f"There is no file {name!r}. {way}")
    if path.suffix != ".keras":
        older = "a model in the older format, which may run code"
        what = "weights alone" if path.name.endswith(".weights.h5") else older
        raise RequestError(f"{path.name} holds {what}. Save it as .keras with model.save('model.keras').")
    state = path.stat()
    return _read(path, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=32)
def _read(path: Path, *_state: int) -> Backbone:
    from nbfeat.backbones.archive import description

    told = description(path)
    told.pop("compile_config", None)  # how it was trained; it is not loaded
    try:
        _refuse_what_is_not_keras(path.name, told)
        shape = _input_shape(path.name, told)
        names = [layer["config"]["name"] for layer in told["config"]["layers"] if layer["class_name"] != "InputLayer"]
        size = _side(path.name, shape)
    except (LookupError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise WeightsError(
            f"{path.name} describes no model that could be read. Save it anew with model.save('model.keras')."
        ) from error
    layers = tuple(Layer(str(name), 0, 0) for name in names)
    return Backbone(
        name=str(path), family="own", module="", size=size, smallest=1, width=0, scaling="none", parameters=0,
        layers=layers, package="file", default_weights="own", is_fixed=bool(size),
    )  # fmt: skip


def _refuse_what_is_not_keras(title: str, told: dict[str, Any]) -> None:
    if told["class_name"] not in {"Functional", "Model", "Sequential"}:
        raise RequestError(
            f"{title} is a {quote(str(told['class_name']))}, not a functional or Sequential model. {REGISTER}"
        )
    for thing, layer in _objects(told):
        kind = str(thing["class_name"])
        if kind in _RUN_CODE:
            what = "Lambda" if "ambda" in kind else kind
            raise RequestError(
                f"{title} has a {what} layer, whose code would run unseen: replace the {what} layer {quote(layer)} by "
                "a layer of Keras."
            )
        if kind in _READ_FILES:
            raise RequestError(
                f"{title} has the layer {quote(layer)} ({kind}), which is none for images: save it without."
            )
        if foreign := _foreign(thing):
            raise RequestError(
                f"{title} has, in its layer {quote(layer)}, {quote(foreign)}, whose code is not in the file. {REGISTER}"
            )


def _foreign(thing: dict[str, Any]) -> str:
    """Return what an object, or a function that it uses, is called where it is not Keras' own; else ""."""
    kind, module, config = str(thing["class_name"]), thing.get("module"), thing.get("config")
    # Keras writes its own functions by name, those of the user's as code that even Keras cannot read again.
    if isinstance(config, dict):
        for name, value in config.items():
            if name.endswith("activation") and isinstance(value, dict) and "class_name" not in value:
                return f"an {name} of your own"
    if (kind.startswith("__") and module is None) or (kind, module) == ("function", "builtins"):
        return ""  # Keras' own way to write tuples, slices and tensors, and the functions that it has itself
    if isinstance(module, str) and _MODULES.fullmatch(module) and ">" not in str(thing.get("registered_name")):
        return ""
    return f"{module}.{kind}" if module else kind


def _objects(told: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Give everything in a description that Keras would make an object of, with the layer it is in."""
    left: list[tuple[Any, str]] = [(told, "")]
    while left:
        thing, layer = left.pop()
        if isinstance(thing, dict):
            config = thing.get("config")
            if "module" in thing and isinstance(config, dict) and "name" in config:
                layer = str(config["name"])
            if "class_name" in thing:
                yield thing, layer
            left += [(value, layer) for value in thing.values()]
        elif isinstance(thing, list):
            left += [(value, layer) for value in thing]


def _input_shape(title: str, told: dict[str, Any]) -> list[Any]:
    """Return the shape of the one input, with the batch."""
    config = told["config"]
    if told["class_name"] == "Sequential":
        first = config["layers"][0]["config"]
        shape = first.get("batch_shape") or config.get("build_input_shape")
        if shape is None:
            raise RequestError(
                f"{title} has no input yet. Begin it with keras.Input((224, 224, 3)), and save it again."
            )
        return list(shape)
    inputs = list(_ends(config["input_layers"]))
    if len(inputs) != 1:
        raise RequestError(f"{title} has {len(inputs)} inputs. Save a model with one input, of images.")
    return next(list(each["config"]["batch_shape"]) for each in config["layers"] if each["config"]["name"] == inputs[0])


def _ends(told: Any) -> Iterator[str]:
    """Give the names of the layers in what Keras writes of inputs: [name, 0, 0], in lists or a dict or alone."""
    if isinstance(told, list) and told and isinstance(told[0], str):
        yield told[0]
        return
    for one in told.values() if isinstance(told, dict) else told:
        yield from _ends(one)


def _side(title: str, shape: list[Any]) -> int:
    """Return the side of the images that an input of `shape` takes; 0 where it takes any."""
    rows, columns, channels = shape[1:] if len(shape) == _RGB + 1 else (1, 2, 0)
    if channels != _RGB or rows != columns or not (rows is None or rows in range(1, LARGEST + 1)):
        sides = " × ".join("any" if side is None else str(side) for side in shape[1:])
        raise RequestError(
            f"{title} takes inputs of {sides}, not square RGB images with channels last. Save a model whose input is "
            "keras.Input((224, 224, 3)), of any size."
        )
    return int(rows or 0)
