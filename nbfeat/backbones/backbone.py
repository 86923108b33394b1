"""Backbone: what one network is called, takes and gives, and where it is built."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nbfeat.errors import RequestError

Scaling = Literal["caffe", "tf", "torch", "none"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)


@dataclass(frozen=True, slots=True)
class Layer:
    """A customary cut point: `channels` (at alpha 1) for every `stride` pixels; 0 is a vector, or is not known yet."""

    name: str
    stride: int
    channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A network without its classifier, built by `module` of `package`.

    A network of the user's own has no width, parameters and layers' channels, not being known before it is built.
    """

    name: str  # of one in a file, the path
    family: str = "own"
    module: str = ""
    size: int  # side of its input in pixels: of a file, the one that it takes, or 0 for any
    smallest: int = 1
    width: int = 0  # of the default cut, at alpha 1
    scaling: Scaling
    parameters: int = 0  # at alpha 1
    layers: tuple[Layer, ...]
    package: Literal["keras.applications", "nbfeat.backbones", "file", "registered"] = "keras.applications"
    end: str = ""  # the layer of the default cut where it is not the last, which may have no name of its own
    published: str = ""  # the file of its weights where PyTorch publishes them
    bundled: str = ""  # the SHA-256 of its weights where they are in this package
    alphas: tuple[float, ...] = ()  # width multipliers with published weights
    default_weights: str = "own"
    function: Callable[[int], Any] | None = None  # that builds one that is registered

    @property
    def is_user_model(self) -> bool:
        """Whether it is a network of the user's own."""
        return self.package in {"file", "registered"}

    @property
    def title(self) -> str:
        """What it is called where people read it: a file without its folders."""
        return Path(self.name).name if self.package == "file" else self.name

    @property
    def column(self) -> str:
        """The first part of its columns' names: letters and digits of its own, in lower case, without a suffix."""
        if self.package != "file":
            return self.name.lower()
        # Composed: some file systems take letters and their accents apart.
        words = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", Path(self.name).stem).lower()).strip("_")
        return words if words.isidentifier() else f"model_{words}".rstrip("_")

    def width_at(self, alpha: float | None) -> int:
        """Return the width of the default cut when the network is built with `alpha`."""
        if alpha is None:
            return self.width
        if not self.alphas:
            raise RequestError(f"{self.name} has no width multiplier: leave --alpha away.")
        if not 0 < alpha < float("inf"):
            way = "take a number above 0, such as 0.5"
            raise RequestError(f"--alpha {alpha} is no width multiplier for {self.name}: {way}.")
        if self.family == "MobileNetV2":
            # Its last convolution never gets narrower (Sandler et al. 2018), and wider in eights only.
            return max(self.width, int(self.width * alpha + 4) // 8 * 8)
        return int(self.width * alpha)
