"""CacheKey: what is in the cache key, which is all that decides the numbers of an image's features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheKey:
    """One output of one network. Every field but the last two is in the key: other values are other features."""

    backbone: str
    alpha: float | None
    weights: str  # their SHA-256
    layer: str  # that the network is cut at; "" for its end
    pooling: str | None
    scaling: str  # of pixels
    size: int
    resize: str
    interpolation: str
    least_reduced: int  # how many times the size an image is decoded at, at least
    decoders: str  # names with versions
    keras: str  # its version
    numerics: int  # raised whenever nbfeat itself comes to give other numbers
    engine: Mapping[str, object]  # fields of its own: kind, precision, CPU …
    width: int  # features of an image, which follow from the rest
    weights_name: str  # for people

    @cached_property
    def key_fields(self) -> Mapping[str, object]:
        """All that decides the numbers, as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)[:-3]} | dict(self.engine)

    @cached_property
    def key(self) -> str:
        """The hash of all that, in 40 hexadecimal digits."""
        return hashlib.sha256(json.dumps(dict(self.key_fields), sort_keys=True).encode()).hexdigest()[:40]

    @property
    def description(self) -> str:
        """What the features are, as JSON for people."""
        return json.dumps({**self.key_fields, "width": self.width, "weights_name": self.weights_name})
