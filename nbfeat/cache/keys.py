"""CacheKey: everything that determines an image's features, and so identifies them in the cache."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheKey:
    """One output of one network. The key includes every field that affects the features: all but the last two."""

    backbone: str
    alpha: float | None
    weights: str  # SHA-256
    layer: str  # the cut point; "" for the end
    pooling: str | None
    scaling: str  # of pixels
    size: int
    resize: str
    interpolation: str
    least_reduced: int  # images are decoded at this many times the size, at least
    decoders: str  # names with versions
    keras: str  # version
    numerics: int  # increased whenever a change in nbfeat changes the features
    engine: Mapping[str, object]  # its own fields: kind, precision, CPU …
    width: int  # features per image, which follows from the rest
    weights_name: str  # for display

    @cached_property
    def key_fields(self) -> Mapping[str, object]:
        """All fields that affect the features, as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)[:-3]} | dict(self.engine)

    @cached_property
    def key(self) -> str:
        """The hash of the key fields, in 40 hexadecimal digits."""
        return hashlib.sha256(json.dumps(dict(self.key_fields), sort_keys=True).encode()).hexdigest()[:40]

    @property
    def description(self) -> str:
        """A readable description of the features, as JSON."""
        return json.dumps({**self.key_fields, "width": self.width, "weights_name": self.weights_name})
