"""What happened to some rows of a run: they have features of one network, failed, or are equal to others."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbfeat.cache.keys import News
from nbfeat.extraction.lane import NetworkState
from nbfeat.inference.engines.base import Vectors


@dataclass(slots=True)
class Batch:
    """Rows with their features from one lane, and whatever else was settled since the batch before."""

    lane: NetworkState | None = None
    rows: list[int] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)  # what each row holds, unless it comes from the cache
    vectors: Vectors = field(default_factory=dict)
    cached: bool = False  # whether the features come from the cache
    computed_elsewhere: bool = (
        False  # whether something that is another here computed them, so that the cache has no use for them
    )
    failures: dict[int, str] = field(default_factory=dict)
    equal: dict[int, int] = field(default_factory=dict)  # a row → one of the same content, whose features it shares
    files: dict[bytes, bytes] = field(default_factory=dict)  # new to the cache: the state of a file → what it holds
    undecodable: dict[bytes, str] = field(default_factory=dict)  # new to the cache: an image → the reason

    def __bool__(self) -> bool:
        return bool(self.rows or self.failures or self.equal or self.files or self.undecodable)

    def beside(self, settled: Batch) -> Batch:
        """Return this batch, with what was settled meanwhile."""
        self.failures, self.equal = settled.failures, settled.equal
        self.files, self.undecodable = settled.files, settled.undecodable
        return self

    @property
    def news(self) -> News:
        """What the cache should keep of it."""
        news = News(files=self.files, failures=self.undecodable)
        if self.lane is not None and not (self.cached or self.computed_elsewhere):
            news.vectors = [(kept, self.images, self.vectors[key]) for key, kept in self.lane.kept.items()]
        return news
