"""The work of an extraction: open the networks, take what the cache has, compute the rest, keep what is new.

It knows images and rows of features; what they are columns of, and how they are normalized, is not its business. It is
given an executor, which computes what the cache lacks: in this process, or by workers on a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nbfeat.cache.database import Cache
from nbfeat.errors import ExtractionError, listing, sentences
from nbfeat.extraction.network_state import Batch, NetworkState, decoders
from nbfeat.extraction.profile import Bottleneck, Timings
from nbfeat.extraction.request import Request
from nbfeat.images.public_hosts import NOT_ALLOWED
from nbfeat.images.remote import Access
from nbfeat.images.sources import name_of, state_of
from nbfeat.inference import prepared
from nbfeat.inference.engines import devices as hardware
from nbfeat.inference.engines.base import Precision
from nbfeat.inference.precision import choose_precision

ROWS_AT_ONCE = 500
FIRST_REASONS = 3


class Executor(AbstractContextManager[Any], Protocol):
    """What reads images and runs networks over them; what it holds meanwhile ends with its block."""

    starts_workers: bool  # for each window of a run, so that windows should be larger

    def run(self, run: Run, rows: Sequence[int]) -> Generator[Batch, None, None]:
        """Yield batches until every row was in one for each network that lacks it, or has failed, or equals another."""


class Run:
    """The features of the images of a request, from the networks that it needs.

    It works on a window of the images at a time: on all of them, unless `look_at` says which.
    """

    def __init__(self, request: Request, executor: Executor, *, cache: bool) -> None:
        self.images, self.root, self.specs = request.images, request.root, request.specs
        self.device, self.precision, self.batch_size = request.device, request.precision, request.batch_size
        self.remote, self.executor = Access.here() if request.remote else None, executor
        self.progress = Progress(len(self.images), len(self.specs))
        self.timings = Timings()
        self.notes: list[str] = []
        self.networks: list[NetworkState] = []
        self.keeps = False  # whether what is finished is in the cache
        self.uses_cache = cache and bool(self.images)
        self.cache = Cache(None)
        self.seen: dict[bytes, int] = {}  # which image of the window had a content first
        self.computed_elsewhere = False  # whether some of it has no use for the cache
        self._window: NDArray[np.int64] | None = None
        self._slots: NDArray[np.int32] | None = None  # of the images of the window, in it
        self._repeated = {part.network_index: part.repeats.precision for part in request.parts if part.repeats}

    @contextmanager
    def caching(self) -> Iterator[None]:
        """Open the cache for the block, and let it go after it."""
        if not self.uses_cache:
            yield
            return
        self.cache = Cache.at_home(decoders())
        try:
            yield
        finally:
            self.keeps = self.cache.writes and not self.computed_elsewhere
            self.note(self.cache.note)
            self.cache.close()

    def open(self) -> Iterator[str]:
        """Make the networks ready, yielding sentences to show meanwhile."""
        start = time.perf_counter()
        devices, networks = hardware.choose_devices(self.device), []
        for number, (spec, pixels) in enumerate(self.specs):
            ready = prepared.PreparedNetwork(spec, devices=devices, batch_size=self.batch_size)
            networks.append(network := NetworkState(spec, pixels, ready, np.zeros(len(self.images), bool)))
            yield from ready
            self.note(ready.note)
            if self._repeated:
                network.set_precision(self._repeated[number])
            else:
                precision, engine, message = yield from choose_precision(
                    ready, pixels, self.precision, self.images, self.root, remote=self.remote
                )
                network.set_precision(precision, engine)
                self.note(message)
        self.networks = networks
        self.timings.preparing += time.perf_counter() - start

    def repeat(self, precisions: Mapping[int, Precision]) -> None:
        """Compute in what an earlier run computed in, for each network by its number; nothing is compared."""
        self._repeated = dict(precisions)

    def look_at(self, window: NDArray[np.int64]) -> None:
        """Work on these images from now on; room for the features of so many is made by the caller."""
        self._window = window
        self.seen.clear()  # features of the images before are not here any more
        if self._slots is None:  # one for all windows: of other images nobody asks
            self._slots = np.empty(len(self.images), np.int32)
        self._slots[window] = np.arange(len(window))
        for network in self.networks:
            network.slots = self._slots
            network.features.clear()

    def finished_before(self, images: NDArray[np.int64], reasons: dict[int, str]) -> None:
        """Take these images for finished: an earlier run kept their features, or the `reasons` why there are none."""
        for network in self.networks:
            network.done[images] = True
        self.progress.reasons.update(reasons)
        self.progress.recount([network.done for network in self.networks])

    def batches(self) -> Generator[Batch, None, None]:
        """Yield what is in the cache already, then what has to be read; each batch was taken in before."""
        if not self.images:
            return
        self.cache.use(kept for network in self.networks for kept in network.cache_keys.values())
        self.progress.recount([network.done for network in self.networks])
        unfinished = set(self.progress.left(self._window))  # whose files may have changed since they were read
        for image in [image for image, row in self.seen.items() if row in unfinished]:
            del self.seen[image]
        start = time.perf_counter()
        for batch in cache_lookup(self.images, self.progress.left(self._window), self.networks, self.root, self.cache):
            self._take(batch)
            self.timings.recalling += time.perf_counter() - start
            yield batch
            start = time.perf_counter()
        self.timings.recalling += time.perf_counter() - start
        if left := self.progress.left(self._window):
            with closing(self.executor.run(self, left)) as batches:
                for batch in batches:
                    self._take(batch)
                    yield batch

    def _take(self, batch: Batch) -> None:
        """Put the features of a batch where they belong, and into the cache what is new."""
        if batch.network is not None:
            batch.network.take(batch.rows, batch.vectors, cached=batch.cached)
            self.note(batch.network.prepared.note)
        self.computed_elsewhere |= batch.computed_elsewhere
        for row in batch.failures:
            for network in self.networks:  # which may have had its features from the cache
                network.forget(row)
        for row, first in self.progress.take(batch):
            for network in self.networks:
                network.share(row, first)
        start = time.perf_counter()
        self.cache.keep(batch.news)
        self.timings.keeping += time.perf_counter() - start

    def check_some_succeeded(self, columns: Sequence[Hashable]) -> None:
        """Raise ExtractionError where all images failed, which are those of these `columns`."""
        reasons = self.progress.reasons
        if not self.images or len(reasons) < len(self.images):
            return
        first = list(reasons.items())[:FIRST_REASONS]
        shown = "; ".join(f"{name_of(self.images[row])}: {reason}" for row, reason in first)
        way = f"Check the values of column {listing(map(repr, columns))}."
        if all(reason.startswith("no such file") for reason in reasons.values()):
            way = f"Relative paths start at {self.root}: set another folder with --root."
        if set(reasons.values()) == {NOT_ALLOWED}:
            way = "Say so where they are addresses that you trust."
        raise ExtractionError(sentences(f"None of the {len(self.images):,} images could be read. {shown}.", way))

    def forget(self) -> None:
        """Take no features for finished any more; the next batches bring them again, from the cache where they can."""
        for network in self.networks:
            network.done[:] = False
        self.progress.equal = 0

    def note(self, text: str) -> None:
        """Take down what the report should say, once."""
        if text and text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True, slots=True)
class Step:
    """How far a run is, after one batch of images."""

    done: int  # images finished, failed ones and those from the cache too
    total: int
    failed: int
    cached: int  # images whose features came from the cache, or were in files already
    seconds: float  # of work so far
    images_per_second: float
    seconds_left: float | None
    bottleneck: Bottleneck | None
    note: str = ""  # what is being prepared, before the first batch
    kept: str = "from the cache"  # where the cached ones were


class Progress:
    """The count of a run over `images` images, each of which needs the features of several `networks`."""

    def __init__(self, images: int, networks: int) -> None:
        self.done = 0  # finished, failed ones too
        self.cached = 0  # have all their features from the cache, or from files of an earlier run
        self.equal = 0  # share the features of another of the same content
        self.reasons: dict[int, str] = {}  # an image that failed → why
        # How many networks' features are still to come.
        self._lacking: NDArray[np.int32] = np.full(images, networks, np.int32)
        self._computed = np.zeros(images, bool)
        self._waiting: dict[int, int] = {}  # an image → the one of the same content that it waits for

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Which images did not fail."""
        good = np.ones(len(self._lacking), bool)
        good[list(self.reasons)] = False
        return good

    def recount(self, done: Sequence[NDArray[np.bool_]]) -> None:
        """Count again from what each network has `done`: an interrupt may have come between placing and counting."""
        lacking = np.zeros(len(self._lacking), np.int32)
        for mask in done:
            lacking += ~mask
        lacking[list(self.reasons)] = 0
        cached = (lacking == 0) & ~self._computed
        cached[list(self.reasons)] = False
        self._lacking, self._waiting = lacking, {}
        self.done, self.cached = int(np.count_nonzero(lacking == 0)), int(np.count_nonzero(cached))

    def left(self, window: NDArray[np.int64] | None = None) -> list[int]:
        """Return the images, of a `window` or of all, that are not finished, in order."""
        left = np.flatnonzero(self._lacking) if window is None else window[self._lacking[window] > 0]
        return list(left.tolist())

    def take(self, batch: Batch) -> list[tuple[int, int]]:
        """Count a batch; return pairs of images, of which the first now shares the features of the second."""
        for row, reason in batch.failures.items():
            self._fail(row, reason)
        if batch.rows:
            rows = np.array(batch.rows)
            self._lacking[rows] -= 1
            self._computed[rows] |= not batch.cached
            self._finish(rows[self._lacking[rows] == 0])
        self._waiting |= batch.equal
        return self._shared()

    def _shared(self) -> list[tuple[int, int]]:
        ready = [(row, first) for row, first in self._waiting.items() if not self._lacking[first]]
        shared = [pair for pair in ready if pair[1] not in self.reasons]
        for row, first in ready:
            del self._waiting[row]
            if first in self.reasons:
                self._fail(row, self.reasons[first])
        for row, first in shared:
            self._lacking[row], self._computed[row] = 0, self._computed[first]
            self._finish(np.array([row]))
        self.equal += len(shared)
        return shared

    def _finish(self, rows: NDArray[np.int_]) -> None:
        self.done += len(rows)
        self.cached += int(np.count_nonzero(~self._computed[rows]))

    def _fail(self, row: int, reason: str) -> None:
        self.reasons[row], self._lacking[row] = reason, 0
        self.done += 1


def cache_lookup(
    images: Sequence[object], rows: Sequence[int], networks: Sequence[NetworkState], root: Path, cache: Cache
) -> Iterator[Batch]:
    """Yield what `cache` has of those `rows` whose files have not changed: by their state, without reading them."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        states = {row: state for row in some if (state := state_of(images[row], root))}
        holds = cache.images(set(states.values()))
        known = {row: holds[state] for row, state in states.items() if state in holds}
        if not known:
            continue
        reasons = cache.failures(set(known.values()))
        failures = {row: reasons[image] for row, image in known.items() if image in reasons}
        if failures:
            yield Batch(failures=failures)
        for network in networks:
            left = {row: image for row, image in known.items() if not (row in failures or network.done[row])}
            if (batch := _found(network, left, cache)).rows:
                yield batch


def _found(network: NetworkState, images: dict[int, bytes], cache: Cache) -> Batch:
    """Return the features that all outputs of `network` have of `images`."""
    wanted = set(images.values())
    found = {key: cache.vectors(kept, wanted) for key, kept in network.cache_keys.items()}
    whole = {image for image in wanted if all(image in vectors for vectors in found.values())}
    rows = [row for row, image in images.items() if image in whole]
    if not rows:
        return Batch(network)
    vectors = {key: np.stack([vectors[images[row]] for row in rows]) for key, vectors in found.items()}
    return Batch(network, rows, vectors=vectors, cached=True)
