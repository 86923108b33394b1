"""What decides a network's numbers, as plain data: NetworkSpec with its cuts, and what each cut turned out to give."""

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

NUMERICS = 2  # raised whenever a change in this package changes the numbers that come out
Pooling = Literal["avg", "max", "gem", "flatten"]


@dataclass(frozen=True, slots=True, order=True)
class Cut:
    """One output of a network: where it is cut, and how a map there is pooled ("" for the default)."""

    layer: str = ""
    pooling: Pooling | str = ""

    @property
    def key(self) -> str:
        """The name of the output in the built model."""
        return f"{self.layer or 'end'}:{self.pooling or 'default'}"


@dataclass(frozen=True, slots=True)
class Output:
    """What a cut turned out to be once the network was built."""

    width: int
    pooling: Pooling | None
    shape: tuple[int, ...]  # of the layer, channels last, without the batch
    negative: bool  # whether values below zero can occur, which GeM would lose


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """Everything that decides a network's numbers; of a user's file `weights` is the path, and in the key its hash."""

    backbone: str
    alpha: float | None
    weights: str
    scaling: Scaling
    size: int
    cuts: tuple[Cut, ...]

    @property
    def network(self) -> Backbone:
        """The backbone that is built."""
        return find(self.weights if self.backbone == user_models.NAME else self.backbone)

    def key(self, **versions: str) -> str:
        """Name this network, as `versions` of the libraries would build it, in 40 hexadecimal digits."""
        content = self.weights
        if content == "bundled":
            content = find(self.backbone).bundled  # another release may bring others
        elif content not in weights.NAMED:
            content = weights.digest(weights.weights_file(content))
        parts = {**asdict(self), "weights": content, "numerics": NUMERICS, **versions}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]

    @classmethod
    def from_json(cls, text: str) -> NetworkSpec:
        """Read what ``json.dumps(asdict(spec))`` wrote."""
        parts = json.loads(text)
        return cls(**{**parts, "cuts": tuple(Cut(**cut) for cut in parts["cuts"])})


def whole(what: str, most: int | None = None) -> Callable[[Any], int]:
    """Return a check that a value is a whole number of at least 1."""

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
