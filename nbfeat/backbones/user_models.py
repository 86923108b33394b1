"""User models: inspect and load ``.keras`` files and build registered networks.

A file's configuration is checked without Keras first, and only stock layers are accepted: no code in the file runs.
"""

import functools
import importlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbfeat.backbones.backbone import Backbone, Layer, Scaling
from nbfeat.backbones.keras_weights import check_archive, cloned, description
from nbfeat.errors import NetworkError, RequestError, WeightsError, first_line, near, quote, sentences
from nbfeat.paths import existing_file

NAME = "Keras model"  # the name of any file's network when its path must not matter
SUFFIXES = (".keras", ".h5", ".hdf5")  # the others are refused with advice
REGISTER = "Register the function that builds it instead: nbfeat.register_backbone('MyNet', build, …)."
LARGEST = 4096  # pixels

_MODULES = re.compile(
    r"keras(\.(src\.)?(models|layers|ops|activations|initializers|regularizers|constraints|random|dtype_policies)(\..+)?)?"
)
# Stock layers that run code from the file or read other files.
_RUN_CODE = {"Lambda", "__lambda__", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "TFSMLayer"}
_READ_FILES = {"StringLookup", "IntegerLookup", "TextVectorization"}


def backbone_at(name: str) -> Backbone:
    """Return the backbone in the file `name`, after checking its configuration but building nothing."""
    path = existing_file(name, "*.keras")
    if path.suffix != ".keras":
        holds_weights = path.name.endswith(".weights.h5")
        what = "only weights" if holds_weights else "a model in the older format, which can run code"
        raise RequestError(f"{path.name} holds {what}. Save it as .keras with model.save('model.keras').")
    state = path.stat()
    return _read(path, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=32)
def _read(path: Path, *_state: int) -> Backbone:
    model = description(path)
    try:
        model.pop("compile_config", None)  # the training setup isn't loaded
        _refuse_what_is_not_keras(path.name, model)
        size = _side(path.name, model)
        names = [layer["config"]["name"] for layer in model["config"]["layers"] if layer["class_name"] != "InputLayer"]
    except (LookupError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        way = "Save it again with model.save('model.keras')."
        raise WeightsError(f"The model description in {path.name} cannot be read. {way}") from error
    layers = tuple(Layer(str(name), 0, 0) for name in names)
    return Backbone(name=str(path), size=size, scaling="none", layers=layers, package="file")


def _refuse_what_is_not_keras(title: str, model: dict[str, Any]) -> None:
    if model["class_name"] not in {"Functional", "Model", "Sequential"}:
        kind = quote(str(model["class_name"]))
        raise RequestError(f"{title} is a {kind}, not a functional or Sequential model. {REGISTER}")
    for thing, layer in _objects(model):
        kind, where = str(thing["class_name"]), quote(layer)
        if kind in _RUN_CODE:
            what = f"{title} has a {'Lambda' if 'ambda' in kind else kind} layer {where}"
            raise RequestError(f"{what}, which would run code: replace it with a stock Keras layer.")
        if kind in _READ_FILES:
            raise RequestError(f"{title} has the layer {where} ({kind}), which isn't for images: save it without.")
        if foreign := _foreign(thing):
            what = f"The layer {where} of {title} uses {quote(foreign)}"
            raise RequestError(f"{what}, whose code is not in the file. {REGISTER}")


def _foreign(thing: dict[str, Any]) -> str:
    """Return the name of an object, or of a function it uses, that isn't part of Keras; else ""."""
    kind, module, config = str(thing["class_name"]), thing.get("module"), thing.get("config")
    # Keras saves its own functions by name and custom ones as code that it cannot load.
    for name, value in config.items() if isinstance(config, dict) else ():
        if name.endswith("activation") and isinstance(value, dict) and "class_name" not in value:
            return f"a custom {name}"
    if (kind.startswith("__") and module is None) or (kind, module) == ("function", "builtins"):
        return ""  # how Keras saves tuples, slices, tensors and its own functions
    if isinstance(module, str) and _MODULES.fullmatch(module) and ">" not in str(thing.get("registered_name")):
        return ""
    return f"{module}.{kind}" if module else kind


def _objects(model: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield everything in a description that Keras would instantiate, with its layer."""
    left: list[tuple[Any, str]] = [(model, "")]
    while left:
        thing, layer = left.pop()
        if isinstance(thing, dict):
            config = thing.get("config")
            if "module" in thing and isinstance(config, dict) and "name" in config:
                layer = str(config["name"])
            if "class_name" in thing:
                yield thing, layer
            thing = list(thing.values())
        if isinstance(thing, list):
            left += [(value, layer) for value in thing]


def _side(title: str, model: dict[str, Any]) -> int:
    """Return the image side that a model takes; 0 for any."""
    config = model["config"]
    inputs = [each["config"]["batch_shape"] for each in config["layers"] if each["class_name"] == "InputLayer"]
    if model["class_name"] == "Sequential" and not inputs:
        inputs = [config.get("build_input_shape")]
        if inputs == [None]:
            raise RequestError(f"{title} has no input. Start it with keras.Input((224, 224, 3)) and save it again.")
    if len(inputs) != 1:
        raise RequestError(f"{title} has {len(inputs)} inputs. Save a model with one image input.")
    match shape := list(inputs[0]):
        case [_, None, None, 3]:
            return 0
        case [_, int(rows), columns, 3] if rows == columns and 1 <= rows <= LARGEST:
            return rows
    sides = " × ".join("any" if side is None else str(side) for side in shape[1:])
    problem = f"{title} takes {sides} inputs, not square RGB images with channels last"
    raise RequestError(f"{problem}. Save a model with an input such as keras.Input((224, 224, 3)).")


def check(
    backbone: Backbone, *, size: int | None, alpha: float | None, weights: str | None, scaling: Scaling | None
) -> int:
    """Return the image side; raise RequestError if a user model doesn't support these options."""
    title = backbone.title
    if alpha is not None:
        raise RequestError(f"{title} has no width multiplier: drop `alpha`.")
    if weights is not None:
        raise RequestError(f"{title} has its own weights: drop `weights={weights!r}`.")
    if scaling is None and backbone.package == "file":
        raise RequestError(
            f"{title} doesn't say how to scale pixels: set `scaling` to tf (-1 … 1), torch or caffe (as in "
            "keras.applications), or none (0 … 255, if the model scales them itself)."
        )
    if backbone.package == "file" and backbone.size and size not in {None, backbone.size}:
        raise RequestError(f"{title} takes images of {backbone.size} pixels: drop `size={size}`.")
    if not (size or backbone.size):
        raise RequestError(f"{title} takes images of any size: set one, such as `size=224`.")
    return size or backbone.size


def load(path: Path, size: int) -> Any:
    """Load the network in a ``.keras`` file for images of `size` pixels."""
    check_archive(path)
    backbone_at(str(path))  # the file may have changed
    keras: Any = importlib.import_module("keras")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = keras.models.load_model(path, safe_mode=True, compile=False)
    except Exception as error:  # any error from Keras is about the file
        missing = re.search(r"Could not locate \w+ '[^']*'", str(error))
        reason = missing[0] if missing else first_line(error)
        raise WeightsError(
            f"Keras {keras.__version__} cannot load {path.name}: {reason[:200]}. "
            "Save it again with model.save(), using only stock Keras layers and functions."
        ) from error
    return _functional(network, size, path.name)


def build(backbone: Backbone, size: int) -> Any:
    """Build a registered network for images of `size` pixels."""
    import numpy as np

    state, what = np.random.get_state(), f"The function that builds {backbone.name}"
    try:
        assert backbone.function is not None
        network = backbone.function(size)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise NetworkError(f"{what} failed: {reason}. Call it with {size} to see where.") from error
    finally:
        np.random.set_state(state)
    if not isinstance(network, importlib.import_module("keras").Model):
        raise RequestError(f"{what} must return a Keras model, not {type(network).__name__}.")
    return _functional(network, size, backbone.name)


def _functional(network: Any, size: int, title: str) -> Any:
    """Return `network` as a functional model with one input (None, size, size, 3) and the same weights."""
    keras: Any = importlib.import_module("keras")
    inputs = getattr(network, "inputs", None) or []
    if len(inputs) != 1 or not getattr(network, "outputs", None):
        raise RequestError(
            f"{title} is not a functional or Sequential model with one input. Build one with keras.Model."
        )
    wanted, shape = (size, size, 3), tuple(inputs[0].shape[1:])
    if len(shape) != len(wanted) or any(side not in {None, one} for side, one in zip(shape, wanted, strict=True)):
        raise RequestError(f"{title} takes inputs of shape {shape}, not {wanted}. Build it with keras.Input({wanted}).")
    if tuple(inputs[0].shape) != (None, *wanted):
        # Otherwise every layer would inherit an open size or a fixed batch.
        pixels = keras.Input(wanted, dtype=inputs[0].dtype)
        network = cloned(network, lambda *_: None, inputs=pixels)
    outputs = network.outputs if len(network.outputs) > 1 else network.outputs[0]
    return keras.Model(network.inputs[0], outputs, name=network.name)


def check_pixels(network: Any, scaling: Scaling, title: str) -> None:
    """Raise RequestError if scaled pixels would be truncated to integers."""
    if "int" in str(network.inputs[0].dtype) and scaling != "none":
        raise RequestError(f"{title} takes integer pixels 0 … 255 ({network.inputs[0].dtype}): use `scaling='none'`.")


def output_of(network: Any, name: str, title: str) -> Any:
    """Return the output tensor of layer `name` (or nested model) in `network`; "" means the network's own output."""
    if not name:
        if len(network.outputs) > 1:
            raise RequestError(f"{title} has {len(network.outputs)} outputs: set `layer` to choose where to cut it.")
        return network.outputs[0]
    nodes = [node for depth in network._nodes_by_depth.values() for node in depth]  # Keras has no public name for it
    found = [node for node in nodes if node.operation.name == name and not node.is_input]
    if not found:
        names = [layer.name for layer in network.layers[1:]]
        hint = near(name, names) or f"Its last layers: {', '.join(names[-5:])}."
        raise RequestError(sentences(f"{title} has no layer {name!r}.", hint, "`nbfeat.layers()` lists all."))
    if len(found) > 1 or len(found[0].output_tensors) > 1:
        raise RequestError(f"The layer {name!r} of {title} has several outputs. Cut at a layer before or after it.")
    return found[0].output_tensors[0]
