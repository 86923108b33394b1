"""NetworkState: one network of a run, which images have its features, and where; Batch: what was found out of some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from nbfeat import isolation
from nbfeat.backbones.weights import Loaded
from nbfeat.cache.database import Cache, CacheEntries
from nbfeat.cache.keys import CacheKey
from nbfeat.images import resize
from nbfeat.inference.engines.base import Engine, Precision, Vectors
from nbfeat.inference.prepared import PreparedNetwork
from nbfeat.inference.spec import NUMERICS, Cut, NetworkSpec, Output


@dataclass(slots=True, eq=False)
class NetworkState:
    """A network, ready once `prepared` was iterated, and started when the first image needs it."""

    spec: NetworkSpec
    pixels: resize.PixelSpec
    prepared: PreparedNetwork
    done: NDArray[np.bool_]  # which images of the run have their features
    features: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # of each output, a row for each image
    slots: NDArray[np.int32] | None = None  # in which row those of an image are; None where all have one, in order
    cache_keys: dict[str, CacheKey] = field(default_factory=dict)  # of each output
    engine: Engine | None = None
    cached: int = 0  # how many images had their features from the cache
    precision: Precision = "float32"  # that it computes in

    def set_precision(self, precision: Precision, engine: Engine | None = None) -> None:
        """Compute in `precision` from now on, by an `engine` that was started before, or by one that will be."""
        self.precision, self.engine = precision, engine
        self.cache_keys = {cut.key: self._cache_key(cut) for cut in self.spec.cuts}

    def start(self) -> Engine:
        """Return the engine, started if it was not."""
        if self.engine is None:
            self.engine = self.prepared.start(self.precision)
        return self.engine

    def take(self, rows: Sequence[int], vectors: Vectors, *, cached: bool) -> None:
        """Put the features of some images where they belong."""
        for key, features in vectors.items():
            self.features[key][self._at(rows)] = features
        self.done[rows] = True
        self.cached += len(rows) if cached else 0

    def share(self, row: int, first: int) -> None:
        """Give image `row` the features of image `first`, which has the same content."""
        self.done[row] = True
        for features in self.features.values():
            features[self._at(row)] = features[self._at(first)]

    def forget(self, row: int) -> None:
        """Take back what is there of an image that failed."""
        for features in self.features.values():
            features[self._at(row)] = np.nan

    def _at(self, rows: Any) -> Any:
        return rows if self.slots is None else self.slots[rows]

    def recalled(self, image: bytes, cache: Cache) -> Vectors | None:
        """Return the features that the cache has of one image; None unless it has them of every output."""
        vectors = {key: cache.vectors(kept, [image]).get(image) for key, kept in self.cache_keys.items()}
        return None if any(vector is None for vector in vectors.values()) else cast("Vectors", vectors)

    @property
    def outputs(self) -> dict[str, Output]:
        """What each cut gives."""
        return self.prepared.outputs

    @property
    def weights(self) -> Loaded:
        """The weights that were loaded."""
        return self.prepared.weights

    def _cache_key(self, cut: Cut) -> CacheKey:
        output = self.outputs[cut.key]
        return CacheKey(
            backbone=self.spec.backbone,
            alpha=self.spec.alpha,
            weights=self.weights.sha256,
            layer=cut.layer,
            pooling=output.pooling,
            scaling=self.spec.scaling,
            size=self.pixels.size,
            resize=self.pixels.resize,
            interpolation=self.pixels.interpolation,
            least_reduced=resize.LEAST_REDUCED,
            decoders=decoders(),
            keras=isolation.version_of("keras"),
            engine=self.prepared.key_fields(self.precision),
            numerics=NUMERICS,
            width=output.width,
            weights_name=self.weights.name,
        )


def decoders() -> str:
    """Name what decodes images, with versions: others may give other pixels, or read what these cannot."""
    return ", ".join(f"{name} {isolation.version_of(name)}" for name in ("pillow", "simplejpeg"))


@dataclass(slots=True)
class Batch:
    """Images with their features from one network, and whatever else was found out since the batch before."""

    network: NetworkState | None = None
    rows: list[int] = field(default_factory=list)  # which images of the run
    images: list[bytes] = field(default_factory=list)  # what each holds, unless its features come from the cache
    vectors: Vectors = field(default_factory=dict)
    cached: bool = False  # whether the features come from the cache
    computed_elsewhere: bool = False  # whether a different engine computed them, so that the cache has no use for them
    failures: dict[int, str] = field(default_factory=dict)
    equal: dict[int, int] = field(default_factory=dict)  # an image → one of the same content, whose features it shares
    files: dict[bytes, bytes] = field(default_factory=dict)  # new to the cache: the state of a file → what it holds
    undecodable: dict[bytes, str] = field(default_factory=dict)  # new to the cache: an image → the reason

    def __bool__(self) -> bool:
        return bool(self.rows or self.failures or self.equal or self.files or self.undecodable)

    def beside(self, settled: Batch) -> Batch:
        """Return this batch, with what was settled meanwhile."""
        self.failures, self.equal = settled.failures, settled.equal
        self.files, self.undecodable = settled.files, settled.undecodable
        return self

    def clear(self) -> None:
        """Begin to take down anew."""
        self.failures, self.equal, self.files, self.undecodable = {}, {}, {}, {}

    @property
    def news(self) -> CacheEntries:
        """What the cache should keep of it."""
        news = CacheEntries(files=self.files, failures=self.undecodable)
        if self.network is not None and not (self.cached or self.computed_elsewhere):
            news.vectors = [(kept, self.images, self.vectors[key]) for key, kept in self.network.cache_keys.items()]
        return news
