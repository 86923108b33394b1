"""Build a network without its classifier: one of keras.applications, or one that is written here."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from nbfeat.backbones.backbone import Backbone
from nbfeat.errors import RequestError, listing


def build(backbone: Backbone, *, size: int, alpha: float | None = None, weights: str | None = None) -> Any:
    """Build `backbone` with ``include_top=False`` for square images of `size` pixels.

    A network written here may go on after the default cut. Layers have the names of a fresh session only if this
    process (or thread) has built nothing before.
    """
    check(backbone, size=size, alpha=alpha, weights=weights)
    if backbone.package == "nbfeat.backbones":
        return importlib.import_module(f"{backbone.package}.{backbone.module}").build(size)
    application = getattr(importlib.import_module("keras").applications, backbone.name)
    width = {} if alpha is None else {"alpha": alpha}
    with warnings.catch_warnings():
        # MobileNet says which input size its weights come from when the size is none of its four.
        warnings.filterwarnings("ignore", message=".*Weights for input shape")
        try:
            return application(include_top=False, weights=weights, input_shape=(size, size, 3), **width)
        except ValueError as error:
            raise RequestError(f"Keras cannot build {backbone.name}: {str(error).splitlines()[0]}") from error


def check(backbone: Backbone, *, size: int, alpha: float | None, weights: str | None = None) -> None:
    """Raise RequestError where the catalog already knows that it cannot be built so."""
    if weights == "bundled" and not backbone.bundled:
        raise RequestError(f"The weights of {backbone.name} are not bundled, only Pocket's: leave --weights away.")
    if weights == "imagenet" and backbone.bundled:
        raise RequestError(
            f"{backbone.name} has no ImageNet weights: leave --weights away for its own, which are bundled."
        )
    if weights == "imagenet" and alpha is not None and backbone.alphas and alpha not in backbone.alphas:
        published = listing(map(str, backbone.alphas))
        raise RequestError(f"{backbone.name} has published weights for --alpha {published}, not for {alpha}.")
    if size < backbone.smallest:
        raise RequestError(f"{backbone.name} takes images of at least {backbone.smallest} pixels, not --size {size}.")
    if alpha is not None and not backbone.alphas:
        raise RequestError(f"{backbone.name} has no width multiplier: leave --alpha away.")
