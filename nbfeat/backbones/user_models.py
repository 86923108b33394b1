"""A network of the user's own in Keras: loaded without running code from its file, and made to fit the images."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbfeat.backbones import keras_weights, model_file
from nbfeat.backbones.backbone import Backbone, Scaling
from nbfeat.errors import RequestError, WeightsError, near, sentences

if TYPE_CHECKING:
    import keras


def check(
    backbone: Backbone, *, size: int | None, alpha: float | None, weights: str | None, scaling: Scaling | None
) -> int:
    """Return the side of the images; raise RequestError where a network of the user's own cannot be had so."""
    title = backbone.title
    if alpha is not None:
        raise RequestError(f"{title} has no width multiplier: leave --alpha away.")
    if weights is not None:
        raise RequestError(f"{title} has weights of its own: leave --weights {weights} away.")
    if scaling is None and backbone.package == "file":
        raise RequestError(
            f"{title} does not say how its pixels are prepared: add --scaling tf (-1 … 1), torch or caffe (as "
            "keras.applications does), or none (0 … 255, as where the model scales them itself)."
        )
    if backbone.is_fixed and size not in {None, backbone.size}:
        raise RequestError(f"{title} takes images of {backbone.size} pixels: leave --size {size} away.")
    if not (size or backbone.size):
        raise RequestError(f"{title} takes images of any size: say which, such as --size 224.")
    return size or backbone.size


def load(path: Path, size: int) -> keras.Model:
    """Load the network in a ``.keras`` file, for images of `size` pixels; WeightsError where Keras cannot."""
    from nbfeat.backbones.archive import check_archive

    check_archive(path)
    model_file.backbone_at(str(path))  # the file may be another one by now
    keras: Any = importlib.import_module("keras")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = keras.models.load_model(path, safe_mode=True, compile=False)
    except Exception as error:  # whatever a description makes Keras raise is about the file
        told = str(error).strip()
        missing = re.search(r"Could not locate \w+ '[^']*'", told)
        reason = missing[0] if missing else (told.splitlines() or [type(error).__name__])[0].rstrip(".")
        raise WeightsError(
            f"Keras {keras.__version__} cannot load {path.name}: {reason[:200]}. Save it anew with model.save, with "
            "layers and functions of Keras alone."
        ) from error
    return fitted(network, size, path.name)


def fitted(network: Any, size: int, title: str) -> keras.Model:
    """Return `network` as a functional model of one input (None, size, size, 3), with the same weights."""
    keras: Any = importlib.import_module("keras")
    inputs = getattr(network, "inputs", None) or []
    if len(inputs) != 1 or not getattr(network, "outputs", None):
        raise RequestError(f"{title} is not a functional or Sequential model of one input. Build one with keras.Model.")
    wanted, shape = (size, size, 3), tuple(inputs[0].shape[1:])
    if len(shape) != len(wanted) or any(side not in {None, one} for side, one in zip(shape, wanted, strict=True)):
        raise RequestError(f"{title} takes inputs of shape {shape}, not {wanted}. Build it with keras.Input({wanted}).")
    if tuple(inputs[0].shape) != (None, *wanted):
        # A size or a batch that was left open, or fixed, would be so in every layer.
        twin = keras.models.clone_model(network, input_tensors=keras.Input(wanted, dtype=inputs[0].dtype))
        keras_weights.copy(network, twin)
        network = twin
    outputs = network.outputs if len(network.outputs) > 1 else network.outputs[0]
    return keras.Model(network.inputs[0], outputs, name=network.name)


def check_pixels(network: Any, scaling: Scaling, title: str) -> None:
    """Raise RequestError where scaled pixels would be cut to whole numbers again."""
    if "int" in str(network.inputs[0].dtype) and scaling != "none":
        raise RequestError(f"{title} takes whole pixels 0 … 255 ({network.inputs[0].dtype}): use --scaling none.")


def output_of(network: Any, name: str, title: str) -> Any:
    """Return the tensor that layer `name` gives in `network`; "" is the model's own output.

    A layer that is itself a model has tensors of its own inside, so the one in this network is looked for.
    """
    if not name:
        if len(network.outputs) > 1:
            raise RequestError(f"{title} has {len(network.outputs)} outputs: choose where to cut it with --layer.")
        return network.outputs[0]
    nodes = [node for depth in network._nodes_by_depth.values() for node in depth]  # Keras has no other way
    found = [node for node in nodes if node.operation.name == name and not node.is_input]
    if not found:
        names = [layer.name for layer in network.layers[1:]]
        hint = near(name, names) or f"Its last ones: {', '.join(names[-5:])}."
        raise RequestError(sentences(f"{title} has no layer {name!r}.", hint, "`nbfeat.layers` lists all."))
    if len(found) > 1 or len(found[0].output_tensors) > 1:
        raise RequestError(f"The layer {name!r} of {title} gives several tensors. Cut at a layer before or after it.")
    return found[0].output_tensors[0]
