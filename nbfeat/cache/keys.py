"""What the cache is given: a block by all that decides its numbers, and what a run has found out."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_SUM = 4  # bytes


@dataclass(frozen=True, eq=False)
class CacheKey:
    """A block as the cache knows it: all that decides its numbers, more to show, and its width."""

    key_fields: Mapping[str, object]
    shown: Mapping[str, object]
    width: int

    @cached_property
    def key(self) -> str:
        """The name of these numbers, in 40 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.key_fields, sort_keys=True).encode()).hexdigest()[:40]

    @property
    def recipe(self) -> str:
        """What the numbers are, as JSON."""
        return json.dumps({**self.key_fields, **self.shown})

    @cached_property
    def _seed(self) -> int:
        return zlib.crc32(self.key.encode())

    def sum(self, image: bytes, vector: bytes) -> int:
        """Return the checksum of a row: SQLite does not notice a page that was overwritten."""
        return zlib.crc32(vector, zlib.crc32(image, self._seed))


def summed(told: bytes, about: bytes) -> bytes:
    """Return what is told `about` something after its checksum, since that may come to stand beside something else."""
    return zlib.crc32(told, zlib.crc32(about)).to_bytes(_SUM, "big") + told


def checked(kept: object, about: bytes) -> bytes | None:
    """Return what was told `about` something; None where it is not what was kept."""
    told = kept[_SUM:] if isinstance(kept, bytes) else b""
    return told if kept == summed(told, about) else None


@dataclass(slots=True)
class News:
    """What a run has found out, to be kept in one transaction."""

    vectors: list[tuple[CacheKey, Sequence[bytes], NDArray[np.float32]]] = field(
        default_factory=list
    )  # block, images, a row for each
    files: dict[bytes, bytes] = field(default_factory=dict)  # state of a file → what it holds
    failures: dict[bytes, str] = field(default_factory=dict)  # an image that cannot be decoded → the reason

    def __bool__(self) -> bool:
        return bool(self.vectors or self.files or self.failures)
