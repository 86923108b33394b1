"""NetworkState: one network of a run and its features; Batch: features and failures of some images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from nbfeat import isolation
from nbfeat.cache.database import Cache, CacheEntries
from nbfeat.cache.keys import CacheKey
from nbfeat.images import resize
from nbfeat.inference.engines.base import Engine, Precision, Vectors
from nbfeat.inference.prepared import PreparedNetwork
from nbfeat.inference.spec import NUMERICS, NetworkSpec


@dataclass(slots=True, eq=False)
class NetworkState:
    """A network of a run, loaded by iterating over `prepared` and started when the first image needs it."""

    spec: NetworkSpec
    pixels: resize.PixelSpec
    prepared: PreparedNetwork
    done: NDArray[np.bool_]  # which images of the run have their features
    features: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # by output, one row per image
    slots: NDArray[np.int32] | None = None  # row of each image in `features`; None if they are in order
    carried: dict[int, Vectors] = field(default_factory=dict)  # by image of an earlier window
    cache_keys: dict[str, CacheKey] = field(default_factory=dict)  # by output
    engine: Engine | None = None
    cached: int = 0  # number of images with cached features
    precision: Precision = "float32"

    def set_precision(self, precision: Precision, engine: Engine | None = None) -> None:
        """Compute in `precision` from now on, with a running `engine` or one that is started later."""
        self.precision, self.engine = precision, engine
        for cut in self.spec.cuts:
            output, weights = self.prepared.outputs[cut.key], self.prepared.weights
            self.cache_keys[cut.key] = CacheKey(
                backbone=self.spec.backbone, alpha=self.spec.alpha, weights=weights.sha256, layer=cut.layer,
                pooling=output.pooling, scaling=self.spec.scaling, size=self.pixels.size, resize=self.pixels.resize,
                interpolation=self.pixels.interpolation, least_reduced=resize.LEAST_REDUCED, decoders=decoders(),
                keras=isolation.version_of("keras"), engine=self.prepared.key_fields(precision), numerics=NUMERICS,
                width=output.width, weights_name=weights.name,
            )  # fmt: skip

    def start(self) -> Engine:
        """Return the engine; start it on the first call."""
        if self.engine is None:
            self.engine = self.prepared.start(self.precision)
        return self.engine

    def take(self, rows: Sequence[int], vectors: Vectors, *, cached: bool) -> None:
        """Store the features of some images."""
        for key, features in vectors.items():
            self.features[key][self._at(rows)] = features
        self.done[rows] = True
        self.cached += len(rows) if cached else 0

    def share(self, row: int, first: int) -> None:
        """Copy the features of image `first` to image `row`, which has the same content."""
        for key, vector in self.vectors_at(first).items():
            self.features[key][self._at(row)] = vector
        self.done[row] = True  # last, as an interrupt may come before

    def vectors_at(self, row: int) -> Vectors:
        """Return a copy of the features of a finished image of this window, or of one that was carried over."""
        return self.carried.get(row) or {key: rows[self._at(row)].copy() for key, rows in self.features.items()}

    def forget(self, row: int) -> None:
        """Clear the features of an image that failed."""
        for features in self.features.values():
            features[self._at(row)] = np.nan

    def _at(self, rows: Any) -> Any:
        return rows if self.slots is None else self.slots[rows]

    def recalled(self, image: bytes, cache: Cache) -> Vectors | None:
        """Return the cached features of one image, or None unless every output is cached."""
        vectors = {key: cache.vectors(kept, [image]).get(image) for key, kept in self.cache_keys.items()}
        return None if any(vector is None for vector in vectors.values()) else cast("Vectors", vectors)


def decoders() -> str:
    """Return the decoders with versions, since others may give different pixels or read other files."""
    return ", ".join(f"{name} {isolation.version_of(name)}" for name in ("pillow", "simplejpeg"))


@dataclass(slots=True)
class Batch:
    """Images with their features from one network, and other findings since the previous batch."""

    network: NetworkState | None = None
    rows: list[int] = field(default_factory=list)  # images of the run
    images: list[bytes] = field(default_factory=list)  # their content hashes, unless the features come from the cache
    vectors: Vectors = field(default_factory=dict)
    cached: bool = False  # whether the features come from the cache
    computed_elsewhere: bool = False  # whether a different engine computed them, so they can't be cached
    failures: dict[int, str] = field(default_factory=dict)
    equal: dict[int, int] = field(default_factory=dict)  # image → one with the same content, whose features it shares
    files: dict[bytes, bytes] = field(default_factory=dict)  # new to the cache: file state → content hash
    undecodable: dict[bytes, str] = field(default_factory=dict)  # new to the cache: content hash → reason

    def __bool__(self) -> bool:
        return bool(self.rows or self.failures or self.equal or self.files or self.undecodable)

    def beside(self, settled: Batch) -> Batch:
        """Return this batch with the findings in `settled`, which it empties."""
        self.failures, self.equal, settled.failures, settled.equal = settled.failures, settled.equal, {}, {}
        self.files, self.undecodable, settled.files, settled.undecodable = settled.files, settled.undecodable, {}, {}
        return self

    @property
    def news(self) -> CacheEntries:
        """New entries for the cache."""
        news = CacheEntries(files=self.files, failures=self.undecodable)
        if self.network is not None and not (self.cached or self.computed_elsewhere):
            news.vectors = [(kept, self.images, self.vectors[key]) for key, kept in self.network.cache_keys.items()]
        return news
