"""The catalog of backbones: published ones from ``catalog.csv``, registered ones, and lookup by name.

The table is written by hand so that help, completion and checks never wait for Keras; a test builds every network and
compares. Scaling is what the published weights expect, or "none" if the network scales its own input.

Layers cover every stage and stride, as far as Keras names them: it numbers the others by a counter that depends on what
was built before. This leaves out the stems of Inception and the final activations of MobileNetV3 and NASNet. ResNet V2
strides in the last block of a stage and its blocks end before the activation. A ConvNeXt stage ends in a nameless
addition, so its cuts are where the next stage begins; its default cut is the last stage, pooled and then normalized.
NASNet needs an input size to build the right network: Keras compares the sizes of feature maps.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbfeat.backbones.backbone import SCALINGS, Backbone, Layer, Scaling
from nbfeat.backbones.user_models import LARGEST, SUFFIXES, backbone_at
from nbfeat.errors import RequestError, listing, near, sentences

if TYPE_CHECKING:
    import keras
    import pandas as pd


def find(name: str) -> Backbone:
    """Return the backbone called `name`, ignoring case, or the one in the ``.keras`` file at that path."""
    if name.endswith(SUFFIXES):
        return backbone_at(name)
    if known := _known(name):
        return CATALOG[known]
    hint = near(name, CATALOG)
    raise RequestError(sentences(f"Backbone {name!r} not found.", hint, "`nbfeat.backbones()` lists all."))


def _known(name: str) -> str:
    """Return the catalog's spelling of `name`, or "" if it is not listed."""
    return next((known for known in CATALOG if known.casefold() == name.casefold()), "")


def backbones(pattern: str = "*") -> pd.DataFrame:
    """List the backbones whose names match a pattern.

    Parameters
    ----------
    pattern : str, default "*"
        Shell wildcards (``*``, ``?``, ``[…]``); case is ignored.

    Returns
    -------
    pandas.DataFrame
        One row per backbone, indexed by name: family, input size (side in pixels), width (features per image),
        parameters (without the classifier), scaling, alphas (published width multipliers), layers to cut at, and
        default weights. Width and parameters are missing for registered networks, which are built later.

    Raises
    ------
    RequestError
        If no name matches.

    Examples
    --------
    >>> nbfeat.backbones("vgg*")["width"].to_dict()
    {'VGG16': 512, 'VGG19': 512}
    """
    import pandas as pd

    chosen = [each for name, each in CATALOG.items() if fnmatchcase(name.casefold(), pattern.casefold())]
    if not chosen:
        hint = near(pattern.strip("*?"), CATALOG)
        raise RequestError(sentences(f"No backbone matches {pattern!r}.", hint, "`nbfeat.backbones()` lists all."))
    columns = {
        "family": [each.family for each in chosen],
        "input size": [each.size for each in chosen],
        "width": pd.array([each.width or None for each in chosen], "Int64"),
        "parameters": pd.array([each.parameters or None for each in chosen], "Int64"),
        "scaling": [each.scaling for each in chosen],
        "alphas": [", ".join(map(str, each.alphas)) for each in chosen],
        "layers": [", ".join(layer.name for layer in each.layers) for each in chosen],
        "weights": [each.default_weights for each in chosen],
    }
    return pd.DataFrame(columns, index=pd.Index([each.name for each in chosen], name="backbone"))


def register_backbone(
    name: str, build: Callable[[int], keras.Model], *, input_size: int, scaling: Scaling, layers: Iterable[str] = ()
) -> None:
    """Register your own network as a backbone for this session.

    Parameters
    ----------
    name : str
        A Python identifier. Registering a name again replaces it; published names are refused.
    build : callable
        Takes the image side in pixels and returns a functional or Sequential Keras model without a classifier, with
        input ``(size, size, 3)`` and its weights set. It is called for every extraction; cached features are identified
        by the weights, not by the name.
    input_size : int
        Default side of the input images in pixels.
    scaling : {"tf", "torch", "caffe", "none"}
        How pixels are scaled, as in ``keras.applications``; ``"none"`` passes 0 … 255.
    layers : iterable of str, optional
        Layer names that completion suggests to cut at.

    Raises
    ------
    RequestError
        If a value is invalid or the name belongs to a published backbone.

    Examples
    --------
    >>> import keras
    >>> def build(size):
    ...     image = keras.Input((size, size, 3))
    ...     return keras.Model(image, keras.layers.Conv2D(32, 3, name="conv")(image))
    >>> nbfeat.register_backbone("MyNet", build, input_size=96, scaling="tf", layers=["conv"])
    """
    names = (None,) if isinstance(layers, str) else tuple(layers)
    if not isinstance(name, str) or not name.isidentifier():
        raise RequestError(f"`name` must be a Python identifier, not {name!r}. Choose one such as 'MyNet'.")
    if (known := _known(name)) and CATALOG[known].package != "registered":
        raise RequestError(f"{known} is a published backbone. Choose another name, such as 'My{known}'.")
    if not callable(build):
        kind = type(build).__name__
        raise RequestError(f"`build` must be a function that takes the size and returns a model, not {kind}.")
    if scaling not in SCALINGS:
        raise RequestError(f"`scaling` must be {listing(SCALINGS, 'or')}, not {scaling!r}.")
    if isinstance(input_size, bool) or not isinstance(input_size, int) or not 1 <= input_size <= LARGEST:
        raise RequestError(f"`input_size` must be an integer from 1 to {LARGEST:,} pixels, not {input_size!r}.")
    if not all(isinstance(layer, str) for layer in names):
        raise RequestError(f"`layers` must be a list of layer names such as ['conv5'], not {layers!r}.")
    CATALOG.pop(known, None)
    cuts = tuple(Layer(str(layer), 0, 0) for layer in names)
    CATALOG[name] = Backbone(
        name=name, size=input_size, scaling=scaling, layers=cuts, package="registered", function=build
    )


def _published() -> Iterator[Backbone]:
    """Read the table; its layers are name:stride:channels."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            fields: dict[str, Any] = {name: int(value) if value.isdigit() else value for name, value in row.items()}
            layers = (layer.split(":") for layer in row["layers"].split())
            fields["layers"] = tuple(Layer(name, int(stride), int(channels)) for name, stride, channels in layers)
            fields["alphas"] = tuple(map(float, row["alphas"].split()))
            yield Backbone(**fields, default_weights="imagenet")


CATALOG: dict[str, Backbone] = {backbone.name: backbone for backbone in _published()}
