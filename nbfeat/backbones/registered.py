"""Networks that a function of the user's builds: registered by name, listed and completed like the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from nbfeat.backbones.backbone import SCALINGS, Backbone, Layer, Scaling
from nbfeat.backbones.catalog import CATALOG
from nbfeat.backbones.model_file import LARGEST
from nbfeat.backbones.own_model import fitted
from nbfeat.errors import NetworkError, RequestError, listing

if TYPE_CHECKING:
    import keras

_builds: dict[str, Callable[[int], Any]] = {}


def register_backbone(
    name: str,
    build: Callable[[int], keras.Model],
    *,
    input_size: int,
    scaling: Scaling,
    layers: Iterable[str] = (),
) -> None:
    """Add a network of your own to the backbones, for this session.

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

    Raises
    ------
    RequestError
        Where a value cannot be.

    Examples
    --------
    >>> def build(size):
    ...     image = keras.Input((size, size, 3))
    ...     return keras.Model(image, keras.layers.Conv2D(32, 3, name="conv")(image))
    >>> nbfeat.register_backbone("MyNet", build, input_size=96, scaling="tf", layers=["conv"])  # doctest: +SKIP
    """
    known = next((one for one in CATALOG if one.casefold() == str(name).casefold()), None)
    if not isinstance(name, str) or not name.isidentifier():
        message = f"A backbone's name is letters, digits and underscores, not {name!r}. Choose one such as 'MyNet'."
        raise RequestError(message)
    if known and CATALOG[known].package != "registered":
        message = f"{known} is a published backbone. Choose another name, such as 'My{known}'."
        raise RequestError(message)
    if not callable(build):
        message = f"build must be a function of the size that returns a model, not {type(build).__name__}."
        raise RequestError(message)
    if scaling not in SCALINGS:
        message = f"scaling cannot be {scaling!r}. Choose {listing(SCALINGS, 'or')}."
        raise RequestError(message)
    if isinstance(input_size, bool) or not isinstance(input_size, int) or not 1 <= input_size <= LARGEST:
        message = f"input_size takes a whole number of pixels from 1 to {LARGEST:,}, not {input_size!r}."
        raise RequestError(message)
    names = (None,) if isinstance(layers, str) else tuple(layers)
    if not all(isinstance(layer, str) for layer in names):
        message = f"layers takes names of layers, such as ['conv5'], not {layers!r}."
        raise RequestError(message)
    if known:
        del CATALOG[known], _builds[known]
    _builds[name] = build
    CATALOG[name] = Backbone(
        name=name, family="own", module="", size=input_size, smallest=1, width=0, scaling=scaling, parameters=0,
        layers=tuple(Layer(str(layer), 0, 0) for layer in names), package="registered", default_weights="own",
    )  # fmt: skip


def build(backbone: Backbone, size: int) -> keras.Model:
    """Build a registered network for images of `size` pixels, as the function gives it.

    Raises RequestError where it gives something else than a model for such images, NetworkError where it fails.
    """
    state = np.random.get_state()  # noqa: NPY002 - the user's own, which is put back
    try:
        network = _builds[backbone.name](size)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        message = f"The function that builds {backbone.name} failed: {reason}. Call it with {size} to see where."
        raise NetworkError(message) from error
    finally:
        np.random.set_state(state)  # noqa: NPY002 - as above
    if not isinstance(network, importlib.import_module("keras").Model):
        message = f"The function that builds {backbone.name} must return a Keras model, not {type(network).__name__}."
        raise RequestError(message)
    return fitted(network, size, backbone.name)
