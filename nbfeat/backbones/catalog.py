"""Which backbones there are: the table of published ones, those that were registered, and finding one by its name.

The table is ``catalog.csv``, written by hand, so that help, completion and checks never wait for Keras; a test builds
every network and compares. Scaling is what the published weights expect; "none" where the network itself does it.

Layers are chosen so that every stage has its end and every stride its layer, as far as Keras names them: the others are
numbered by a counter that depends on what was built before. So the stems of Inception are missing, as are the
activations at the end of MobileNetV3 and NASNet. Version 2 of ResNet strides in the last block of a stage, not in the
first, and its blocks end before the activation. Where a stage of ConvNeXt ends Keras has a nameless addition, and the
``…_identity`` before it is one block's branch alone, so its cuts are where the next stage begins; the default cut is
the last stage, pooled and only then normalized. Built without an input size, the NASNets come out as other networks:
Keras compares the sizes of feature maps.
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
    """Return the backbone called `name`, whatever its case, or the one in the ``.keras`` file of that path."""
    if name.endswith(SUFFIXES):
        return backbone_at(name)
    if known := _known(name):
        return CATALOG[known]
    raise RequestError(sentences(f"There is no backbone {name!r}.", near(name, CATALOG), "`%backbones` lists all."))


def _known(name: str) -> str:
    """Return how the catalog spells `name`; "" where it has no such backbone."""
    return next((known for known in CATALOG if known.casefold() == name.casefold()), "")


def backbones(pattern: str = "*") -> pd.DataFrame:
    """List the backbones whose name matches `pattern`; RequestError where none does.

    Parameters
    ----------
    pattern
        Shell wildcards (``*``, ``?``, ``[…]``), in any case.

    Returns
    -------
    pandas.DataFrame
        One row per backbone, by name: its family, the side of its input in pixels, its width (features per image), its
        parameters without the classifier, how its pixels are scaled, the alphas and the layers one can name, and the
        weights it has by default. Width and parameters of registered networks are not known before they are built.

    Examples
    --------
    >>> nbfeat.backbones("vgg*")["width"].to_dict()
    {'VGG16': 512, 'VGG19': 512}
    """
    import pandas as pd

    chosen = [each for name, each in CATALOG.items() if fnmatchcase(name.casefold(), pattern.casefold())]
    if not chosen:
        hint = near(pattern.strip("*?"), CATALOG)
        raise RequestError(sentences(f"No backbone's name matches {pattern!r}.", hint, "`%backbones` lists all."))
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
    """Add a network of your own to the backbones, for this session; RequestError where a value cannot be.

    Parameters
    ----------
    name
        What to call it; the name of a published backbone is refused, one that was registered before is replaced.
    build
        Takes the side of the images in pixels and returns a functional or Sequential Keras model without classifier
        whose input is ``(size, size, 3)``, with the weights it is to have. It is called each time that features are
        extracted, so that what is kept is told by its weights and never by its name.
    input_size
        The side of its images in pixels, where ``--size`` does not say otherwise.
    scaling
        How pixels are prepared: ``"tf"``, ``"torch"``, ``"caffe"``, or ``"none"`` for 0 … 255.
    layers
        Names of the layers that completion offers to cut at.

    Examples
    --------
    >>> def build(size):
    ...     image = keras.Input((size, size, 3))
    ...     return keras.Model(image, keras.layers.Conv2D(32, 3, name="conv")(image))
    >>> nbfeat.register_backbone("MyNet", build, input_size=96, scaling="tf", layers=["conv"])  # doctest: +SKIP
    """
    names = (None,) if isinstance(layers, str) else tuple(layers)
    _check(name, build, input_size, scaling)
    if not all(isinstance(layer, str) for layer in names):
        raise RequestError(f"layers takes names of layers, such as ['conv5'], not {layers!r}.")
    CATALOG.pop(_known(name), None)
    cuts = tuple(Layer(str(layer), 0, 0) for layer in names)
    CATALOG[name] = Backbone(
        name=name, size=input_size, scaling=scaling, layers=cuts, package="registered", function=build
    )


def _check(name: object, build: object, input_size: object, scaling: object) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        way = "Choose one such as 'MyNet'."
        raise RequestError(f"A backbone's name is letters, digits and underscores, not {name!r}. {way}")
    if (known := _known(name)) and CATALOG[known].package != "registered":
        raise RequestError(f"{known} is a published backbone. Choose another name, such as 'My{known}'.")
    if not callable(build):
        raise RequestError(f"build must be a function of the size that returns a model, not {type(build).__name__}.")
    if scaling not in SCALINGS:
        raise RequestError(f"scaling cannot be {scaling!r}. Choose {listing(SCALINGS, 'or')}.")
    if isinstance(input_size, bool) or not isinstance(input_size, int) or not 1 <= input_size <= LARGEST:
        raise RequestError(f"input_size takes a whole number of pixels from 1 to {LARGEST:,}, not {input_size!r}.")


def _published() -> Iterator[Backbone]:
    """Read the table; each layer in it is a name, its stride and its channels."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            fields: dict[str, Any] = {name: int(value) if value.isdigit() else value for name, value in row.items()}
            layers = (layer.split(":") for layer in row["layers"].split())
            fields["layers"] = tuple(Layer(name, int(stride), int(channels)) for name, stride, channels in layers)
            fields["alphas"] = tuple(map(float, row["alphas"].split()))
            yield Backbone(**fields, default_weights="bundled" if row["bundled"] else "imagenet")


CATALOG: dict[str, Backbone] = {backbone.name: backbone for backbone in _published()}
