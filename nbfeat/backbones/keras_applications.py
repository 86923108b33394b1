"""Build a network without its classifier, from keras.applications or from this package."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from nbfeat.backbones.backbone import Backbone
from nbfeat.errors import RequestError, listing


def build(backbone: Backbone, *, size: int, alpha: float | None = None, weights: str | None = None) -> Any:
    """Build `backbone` with ``include_top=False`` for square images of `size` pixels, possibly past the default cut."""
    check(backbone, size=size, alpha=alpha, weights=weights)
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


def check(backbone: Backbone, *, size: int, alpha: float | None, weights: str | None = None) -> None:
    """Raise RequestError if the catalog shows that `backbone` cannot be built with these options."""
    if weights == "bundled" and not backbone.bundled:
        raise RequestError(f"{backbone.name} has no bundled weights, only Pocket does: drop `weights`.")
    if weights == "imagenet" and backbone.bundled:
        raise RequestError(f"{backbone.name} has no ImageNet weights: drop `weights` to use its bundled ones.")
    if weights == "imagenet" and alpha is not None and backbone.alphas and alpha not in backbone.alphas:
        published = listing(map(str, backbone.alphas), "or")
        raise RequestError(f"{backbone.name} has no published weights for `alpha={alpha}`. Choose {published}.")
    if size < backbone.smallest:
        raise RequestError(f"`size` must be at least {backbone.smallest} for {backbone.name}, not {size}.")
    if alpha is not None and not backbone.alphas:
        raise RequestError(f"{backbone.name} has no width multiplier: drop `alpha`.")
