"""Networks that a function of the user's builds: registered by name, listed and completed like the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from nbfeat.backbones.backbone import SCALINGS, Backbone, Layer, Scaling
from nbfeat.backbones.catalog import CATALOG
from nbfeat.backbones.model_file import LARGEST
from nbfeat.backbones.user_models import fitted
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
        raise RequestError(
            f"A backbone's name is letters, digits and underscores, not {name!r}. Choose one such as 'MyNet'."
        )
    if known and CATALOG[known].package != "registered":
        raise RequestError(f"{known} is a published backbone. Choose another name, such as 'My{known}'.")
    if not callable(build):
        raise RequestError(f"build must be a function of the size that returns a model, not {type(build).__name__}.")
    if scaling not in SCALINGS:
        raise RequestError(f"scaling cannot be {scaling!r}. Choose {listing(SCALINGS, 'or')}.")
    if isinstance(input_size, bool) or not isinstance(input_size, int) or not 1 <= input_size <= LARGEST:
        raise RequestError(f"input_size takes a whole number of pixels from 1 to {LARGEST:,}, not {input_size!r}.")
    names = (None,) if isinstance(layers, str) else tuple(layers)
    if not all(isinstance(layer, str) for layer in names):
        raise RequestError(f"layers takes names of layers, such as ['conv5'], not {layers!r}.")
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
    state = np.random.get_state()
    try:
        network = _builds[backbone.name](size)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise NetworkError(
            f"The function that builds {backbone.name} failed: {reason}. Call it with {size} to see where."
        ) from error
    finally:
        np.random.set_state(state)
    if not isinstance(network, importlib.import_module("keras").Model):
        raise RequestError(
            f"The function that builds {backbone.name} must return a Keras model, not {type(network).__name__}."
        )
    return fitted(network, size, backbone.name)
