"""Describe a network as plain data: NetworkSpec, which determines its features, its cuts and their outputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nbfeat.backbones import user_models, weights
from nbfeat.backbones.backbone import Backbone, Scaling
from nbfeat.backbones.catalog import find
from nbfeat.errors import RequestError

NUMERICS = 2  # increased whenever a change in this package changes the features
Pooling = Literal["avg", "max", "gem", "flatten"]


@dataclass(frozen=True, slots=True, order=True)
class Cut:
    """One output of a network: the layer and, for a feature map, the pooling ("" for the default)."""

    layer: str = ""
    pooling: Pooling | str = ""

    @property
    def key(self) -> str:
        """The name of the output in the built model."""
        return f"{self.layer or 'end'}:{self.pooling or 'default'}"


@dataclass(frozen=True, slots=True)
class Output:
    """The output of a cut, known once the network is built."""

    width: int
    pooling: Pooling | None
    shape: tuple[int, ...]  # of the layer, channels last, without the batch
    negative: bool  # whether values can be below zero, which GeM would clip


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """Everything that determines a network's features; `weights` may be the path of a file, which the key hashes."""

    backbone: str
    alpha: float | None
    weights: str
    scaling: Scaling
    size: int
    cuts: tuple[Cut, ...]

    @property
    def network(self) -> Backbone:
        """The backbone to build."""
        return find(self.weights if self.backbone == user_models.NAME else self.backbone)

    def key(self, **versions: str) -> str:
        """Hash this network and the `versions` of the libraries that build it, to 40 hexadecimal digits."""
        content = self.weights
        if content not in weights.NAMED:
            content = weights.digest(weights.weights_file(content))
        parts = {**asdict(self), "weights": content, "numerics": NUMERICS, **versions}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]

    @classmethod
    def from_json(cls, text: str) -> NetworkSpec:
        """Read the JSON of ``json.dumps(asdict(spec))``."""
        parts = json.loads(text)
        return cls(**{**parts, "cuts": tuple(Cut(**cut) for cut in parts["cuts"])})


def whole(what: str, most: int | None = None) -> Callable[[Any], int]:
    """Return a function that reads a whole number from 1 to `most`, for the option `what`."""

    def check(value: Any) -> int:
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = 0
        if number < 1 or number != float(value) or (most and number > most) or isinstance(value, bool):
            limit = f"from 1 to {most:,}" if most else "of at least 1"
            raise RequestError(f"`{what}` must be a whole number {limit}, not {value!r}.")
        return number

    return check


def alpha_of(value: Any) -> float:
    """Read a width multiplier."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number <= 4:
        raise RequestError(f"`alpha` must be a width multiplier such as 0.25, 0.5 or 1.0, not {value!r}.")
    return number
