"""Decode ahead, batch, run, collect: bounded memory, whatever the number of images.

A pool of threads reads and decodes a little ahead of the networks. What is equal to an image before, or has its
features in the cache, is not decoded; what cannot be read is dropped before batching, so that batches stay full; and
each network gets only the images whose features it lacks. Everything else happens in the calling thread, in order.

Images by address are waited for in more threads, which take turns to decode: no more do at once than there are cores.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from nbfeat.cache.database import Cache
from nbfeat.errors import ImageError
from nbfeat.extraction.batch import Batch
from nbfeat.extraction.lane import NetworkState
from nbfeat.extraction.profile import Timings
from nbfeat.images import fingerprint
from nbfeat.images.decode import load_image, pixels_of
from nbfeat.images.formats import OUT_OF_MEMORY
from nbfeat.images.remote import Access, Fetcher
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import Source
from nbfeat.inference.engines.base import Engine, Pixels, Vectors
from nbfeat.inference.engines.cpu_count import available_cores

BATCHES_AHEAD = 3  # decoded and waiting; more only costs memory
SETTLED_AT_ONCE = 64  # rows that need no network, told of together


@dataclass(slots=True)
class Item:
    """What a decoder thread found out about one row."""

    row: int
    image: bytes = b""  # its content
    state: bytes | None = None  # of its file
    reason: str = ""  # why there are no pixels
    is_lasting: bool = False  # whether the reason is one of the content, and will be the same tomorrow
    equal_to: int | None = None  # a row of the same content
    cached: dict[int, Vectors] = field(default_factory=dict)  # features that a lane, by its place, need not compute
    pixels: dict[PixelSpec, Pixels] = field(default_factory=dict)
    reading: float = 0.0  # seconds
    decoding: float = 0.0  # and resizing


class Line:
    """A lane at work: the batch that is being filled, and those in flight."""

    def __init__(self, lane: NetworkState, timings: Timings) -> None:
        self.lane, self.timings = lane, timings
        self.engine: Engine | None = None
        self.flight: deque[Batch] = deque()
        self.batch, self.cached = Batch(lane), Batch(lane, cached=True)
        self._buffer: Pixels | None = None
        self._found: list[Vectors] = []

    @property
    def is_full(self) -> bool:
        """Whether `collect` must be called before the next batch is full."""
        return self.engine is not None and self.engine.is_full

    def lacks(self, item: Item) -> bool:
        """Tell whether the network has to run over this image."""
        return self.lane.pixels in item.pixels and not self.lane.done[item.row]

    def add(self, item: Item) -> None:
        """Put an image into the batch, and start the batch when it is full."""
        if self.engine is None:
            start = time.perf_counter()
            self.engine = self.lane.start()
            self.timings.preparing += time.perf_counter() - start
        if self._buffer is None:
            self._buffer = self.engine.buffer()
        self._buffer[len(self.batch.rows)] = item.pixels[self.lane.pixels]
        self.batch.rows.append(item.row)
        self.batch.images.append(item.image)
        if len(self.batch.rows) == self.engine.batch_size:
            self.submit()

    def submit(self) -> None:
        """Start the network on what is in the batch."""
        if self.engine is not None and self._buffer is not None:
            self.engine.submit(self._buffer, len(self.batch.rows))
            self.flight.append(self.batch)
            self.batch, self._buffer = Batch(self.lane), None

    def collect(self) -> Batch:
        """Wait for the oldest batch."""
        assert self.engine is not None
        start, worked = time.perf_counter(), self.engine.work.seconds
        batch = self.flight.popleft()
        batch.vectors = self.engine.collect()
        self.timings.network += self.engine.work.seconds - worked
        self.timings.waiting_for_network += time.perf_counter() - start
        return batch

    def recall(self, item: Item, vectors: Vectors) -> None:
        """Add an image whose features were found in the cache."""
        self.cached.rows.append(item.row)
        self._found.append(vectors)

    def recalled(self) -> Batch:
        """Return the images whose features were found, and begin another batch of them."""
        batch, found = self.cached, self._found
        batch.vectors = {key: np.stack([vectors[key] for vectors in found]) for key in found[0]}
        self.cached, self._found = Batch(self.lane, cached=True), []
        return batch


class Pipeline:
    """Run `images` through all `lanes`; each image is read once, and decoded once for all of them.

    `seen` remembers from run to run which row had a content first; `remote` images are fetched.
    """

    def __init__(
        self,
        images: Sequence[object],
        lanes: Sequence[NetworkState],
        root: Path,
        timings: Timings,
        cache: Cache,
        seen: dict[bytes, int],
        *,
        remote: Access | None = None,
    ) -> None:
        self.images, self.lanes, self.root, self.timings = images, lanes, root, timings
        self.cache, self.seen = cache, seen
        self._decoders = available_cores()
        self._turns = threading.Semaphore(self._decoders)
        self._fetch = Fetcher(root, remote) if remote else None

    def run(self, rows: Sequence[int]) -> Generator[Batch, None, None]:
        """Yield batches until every row was in one for each lane that lacks it, or has failed, or equals another.

        Close it to stop and clean up. It can be run once.
        """
        threads = self._decoders + (self._fetch.access.limits.at_once if self._fetch else 0)
        ahead = threads + BATCHES_AHEAD * max(lane.batch_size for lane in self.lanes)
        executor = ThreadPoolExecutor(threads, thread_name_prefix="nbfeat-decode")
        lines = [Line(lane, self.timings) for lane in self.lanes]
        settled = Batch()
        try:
            for item in self._items(executor, rows, ahead):
                _settle(item, settled)
                for batch in _placed(item, lines):
                    yield batch.beside(settled)
                    settled = Batch()
                if len(settled.failures) + len(settled.equal) >= SETTLED_AT_ONCE:
                    yield settled
                    settled = Batch()
            for batch in _rest(lines):
                yield batch.beside(settled)
                settled = Batch()
            if settled:
                yield settled
        finally:
            if self._fetch:
                self._fetch.close()  # no thread waits for an answer any more
            executor.shutdown(wait=True, cancel_futures=True)
            for line in lines:
                if line.engine is not None:
                    line.engine.close()

    def _items(self, executor: ThreadPoolExecutor, rows: Sequence[int], ahead: int) -> Iterator[Item]:
        waiting: deque[Future[Item]] = deque()
        coming = iter(rows)
        waiting.extend(executor.submit(self._look, row) for row in islice(coming, ahead))
        while waiting:
            start = time.perf_counter()
            item = waiting.popleft().result()
            self.timings.waiting_for_images += time.perf_counter() - start
            self.timings.reading += item.reading
            self.timings.decoding += item.decoding
            waiting.extend(executor.submit(self._look, row) for row in islice(coming, 1))
            yield item

    def _look(self, row: int) -> Item:
        """Read a row, and decode it if need be; in a thread."""
        start, item = time.perf_counter(), Item(row)
        try:
            source, item.state = load_image(self.images[row], self.root, self._fetch)
            item.image = fingerprint.digest(source)
            item.reading = time.perf_counter() - start
            with self._turns:
                self._decode(item, source)
        except ImageError as error:
            item.reason = str(error)  # the exception would keep the file's bytes alive
        return item

    def _decode(self, item: Item, source: Source) -> None:
        first = self.seen.setdefault(item.image, item.row)
        if first != item.row:
            item.equal_to = first
            return
        item.reason = self.cache.failures([item.image]).get(item.image, "")
        if item.reason:
            return
        specs = self._lacking(item)
        if not specs:
            return
        start = time.perf_counter()
        try:
            item.pixels = dict(zip(specs, pixels_of(source, specs), strict=True))
        except ImageError as error:
            item.reason = str(error)
            item.is_lasting = isinstance(source, bytes) and item.reason != OUT_OF_MEMORY
        item.decoding = time.perf_counter() - start

    def _lacking(self, item: Item) -> list[PixelSpec]:
        """Return the pixels that are needed, after taking what the cache has."""
        specs = []
        for number, lane in enumerate(self.lanes):
            if lane.done[item.row]:
                continue
            if vectors := lane.recalled(item.image, self.cache):
                item.cached[number] = vectors
            else:
                specs.append(lane.pixels)
        return list(dict.fromkeys(specs))


def _placed(item: Item, lines: Sequence[Line]) -> Iterator[Batch]:
    """Give an image to the networks that lack it; yield the batches that are finished by then."""
    for number, line in enumerate(lines):
        if number in item.cached:
            line.recall(item, item.cached[number])
            if len(line.cached.rows) == SETTLED_AT_ONCE:
                yield line.recalled()
        elif line.lacks(item):
            line.add(item)
            if line.is_full:
                yield line.collect()


def _rest(lines: Sequence[Line]) -> Iterator[Batch]:
    """Yield what is still in the lines when there are no more images."""
    for line in lines:
        line.submit()
    for line in lines:
        while line.flight:
            yield line.collect()
        if line.cached.rows:
            yield line.recalled()


def _settle(item: Item, settled: Batch) -> None:
    """Take down what is known of a row without any network."""
    if item.equal_to is not None:
        settled.equal[item.row] = item.equal_to
    elif item.reason:
        settled.failures[item.row] = item.reason
    if item.state is not None:
        settled.files[item.state] = item.image
    if item.is_lasting:
        settled.undecodable[item.image] = item.reason
