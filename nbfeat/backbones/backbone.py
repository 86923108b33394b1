"""Backbone: the name, input, layers and origin of one network."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nbfeat.errors import RequestError, listing

Scaling = Literal["caffe", "tf", "torch", "none"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)


@dataclass(frozen=True, slots=True)
class Layer:
    """A common cut point: `channels` (at alpha 1) per `stride` pixels; 0 means a vector or not known yet."""

    name: str
    stride: int
    channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A network without its classifier; width, parameters and channels of a user model are unknown until built."""

    name: str  # the path if it is a file
    family: str = "own"
    module: str = ""
    size: int  # side of its input in pixels; 0 for a file that takes any
    smallest: int = 1
    width: int = 0  # of the default cut, at alpha 1
    scaling: Scaling
    parameters: int = 0  # at alpha 1
    layers: tuple[Layer, ...]
    package: Literal["keras.applications", "nbfeat.backbones", "file", "registered"] = "keras.applications"
    end: str = ""  # the layer of the default cut if it is not the last
    published: str = ""  # the name of the published weights file, if Keras doesn't download it
    sha256: str = ""  # of that file, or its first digits
    requirement: str = ""  # the registry package that holds the file; without one, PyTorch's server does
    alphas: tuple[float, ...] = ()  # width multipliers with published weights
    default_weights: str = "own"
    function: Callable[[int], Any] | None = None  # builds a registered network

    @property
    def is_user_model(self) -> bool:
        """Whether the user supplied the network."""
        return self.package in {"file", "registered"}

    @property
    def title(self) -> str:
        """The display name: for a file, its name without folders."""
        return Path(self.name).name if self.package == "file" else self.name

    @property
    def column(self) -> str:
        """The prefix of its column names: lower-case letters, digits and underscores, without a file suffix."""
        if self.package != "file":
            return self.name.lower()
        # Some file systems decompose accented letters.
        words = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", Path(self.name).stem).lower()).strip("_")
        return words if words.isidentifier() else f"model_{words}".rstrip("_")

    def check(self, *, size: int, alpha: float | None, weights: str | None = None) -> None:
        """Raise RequestError if it cannot be built with these options."""
        if weights == "imagenet" and alpha is not None and self.alphas and alpha not in self.alphas:
            published = listing(map(str, self.alphas), "or")
            raise RequestError(f"{self.name} has no published weights for `alpha={alpha}`. Choose {published}.")
        if size < self.smallest:
            raise RequestError(f"`size` must be at least {self.smallest} for {self.name}, not {size}.")
        self.width_at(alpha)

    def width_at(self, alpha: float | None) -> int:
        """Return the width of the default cut at `alpha`."""
        if alpha is None:
            return self.width
        if not self.alphas:
            raise RequestError(f"{self.name} has no width multiplier: drop `alpha`.")
        if not 0 < alpha < float("inf"):
            raise RequestError(f"`alpha` must be a positive number for {self.name}, not {alpha}. Try `alpha=0.5`.")
        if self.family == "MobileNetV2":
            # Its last convolution never gets narrower and grows in multiples of 8 (Sandler et al. 2018).
            return max(self.width, int(self.width * alpha + 4) // 8 * 8)
        return int(self.width * alpha)
