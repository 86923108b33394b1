"""Run: load the networks, read cached features, compute the other ones and save them."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Hashable, Iterator, Mapping, Sequence
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
from nbfeat.images.decode import codecs
from nbfeat.images.public_hosts import NOT_ALLOWED
from nbfeat.images.remote import Access
from nbfeat.images.sources import name_of, state_of
from nbfeat.inference import prepared
from nbfeat.inference.engines import devices as hardware
from nbfeat.inference.engines.base import Precision
from nbfeat.inference.precision import choose_precision

ROWS_AT_ONCE = 500
FIRST_REASONS = 3
CARRIED = 16_000_000  # bytes of features that images of several windows may share


class Executor(AbstractContextManager[Any], Protocol):
    """Reads images and runs networks over them, in this process or on a cluster; frees its resources as it exits."""

    starts_workers: bool  # for each window of a run, so windows should be larger

    def run(self, run: Run, rows: Sequence[int]) -> Generator[Batch, None, None]:
        """Yield batches until every row has its features, failed, or is a duplicate of another."""


class Run:
    """Computes the features of the images of a request: all at once, or the window that `look_at` sets."""

    def __init__(self, request: Request, executor: Executor, *, cache: bool) -> None:
        self.images, self.root, self.specs = request.images, request.root, request.specs
        self.device, self.precision, self.batch_size = request.device, request.precision, request.batch_size
        self.remote, self.executor = Access.here() if request.remote else None, executor
        self.progress = Progress(len(self.images), len(self.specs))
        self.notes: list[str] = []
        self.networks: list[NetworkState] = []
        self.keeps = False  # whether finished features are in the cache
        self.timings, self.cache, self.uses_cache = Timings(), Cache(None), cache and bool(self.images)
        self.seen: dict[bytes, int] = {}  # content → first image that has it, whose features are still in memory
        self._sources: set[int] = set()  # images that share their features with others
        self.computed_elsewhere = False  # whether some features can't be cached
        self._window: NDArray[np.int64] | None = None
        self._slots: NDArray[np.int32] | None = None  # position of each image in the window
        self._repeated = {part.network_index: part.repeats.precision for part in request.parts if part.repeats}

    @contextmanager
    def caching(self) -> Iterator[None]:
        """Open the cache, if it is used, and close it on exit."""
        if self.uses_cache:
            self.cache = Cache.at_home(f"{decoders()}, {codecs()}")
        try:
            yield
        finally:
            self.keeps = self.cache.writes and not self.computed_elsewhere
            self.note(self.cache.note)
            self.cache.close()

    def open(self) -> Iterator[str]:
        """Load the networks, yielding sentences about the progress."""
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
        """Use the precisions of an earlier run, by index of the network, without comparing."""
        self._repeated = dict(precisions)

    def look_at(self, window: NDArray[np.int64]) -> None:
        """Work on these images from now on; the caller allocates memory for their features."""
        self._window = window
        self.close_window(set(window.tolist()))
        if self._slots is None:  # reused by all windows
            self._slots = np.empty(len(self.images), np.int32)
        self._slots[window] = np.arange(len(window))
        for network in self.networks:
            network.slots = self._slots

    def close_window(self, coming: Collection[int] = ()) -> None:
        """Free the features, except a few, shared ones first, because images of the `coming` window may share them."""
        each = sum(4 * output.width for network in self.networks for output in network.prepared.outputs.values())
        rows = [row for row in self.seen.values() if row not in coming and not self.progress._lacking[row]]
        rows.sort(key=lambda row: (row in self._sources, row), reverse=True)
        kept = set(rows[: CARRIED // max(1, each)])
        seen = {image: row for image, row in self.seen.items() if row in kept}
        carried = [{row: network.vectors_at(row) for row in kept} for network in self.networks]
        self.seen = {}  # an interrupt here loses only what could have been shared
        for network, vectors in zip(self.networks, carried, strict=True):
            network.carried = vectors
            network.features.clear()
        self.seen = seen

    def finished_before(self, images: NDArray[np.int64], reasons: dict[int, str]) -> None:
        """Mark images as finished whose features or failures (`reasons`) an earlier run saved."""
        for network in self.networks:
            network.done[images] = True
        self.progress.reasons.update(reasons)
        self.progress.recount([network.done for network in self.networks])

    def batches(self) -> Generator[Batch, None, None]:
        """Yield cached features, then computed ones; each batch has been stored."""
        if not self.images:
            return
        self.cache.use(kept for network in self.networks for kept in network.cache_keys.values())
        self.progress.recount([network.done for network in self.networks])
        left = self.progress.left(self._window)
        if self.seen:  # the files of unfinished images may have changed since they were read
            unfinished = set(left)
            for image in [image for image, row in self.seen.items() if row in unfinished]:
                del self.seen[image]
        start = time.perf_counter()
        for batch in cache_lookup(self.images, left, self.networks, self.root, self.cache):
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
        if batch.network is not None:
            batch.network.take(batch.rows, batch.vectors, cached=batch.cached)
            self.note(batch.network.prepared.note)
        self.computed_elsewhere |= batch.computed_elsewhere
        for row in batch.failures:
            for network in self.networks:  # it may have cached features
                network.forget(row)
        for row, first in self.progress.take(batch):
            self._sources.add(first)
            for network in self.networks:
                network.share(row, first)
        with self.timings.adding("keeping"):
            self.cache.keep(batch.news)

    def check_some_succeeded(self, columns: Sequence[Hashable]) -> None:
        """Raise ExtractionError if all images, those of `columns`, failed."""
        reasons = self.progress.reasons
        if not self.images or len(reasons) < len(self.images):
            return
        first = list(reasons.items())[:FIRST_REASONS]
        shown = "; ".join(f"{name_of(self.images[row])}: {reason}" for row, reason in first)
        way = f"Check the values of column {listing(map(repr, columns))}."
        if all(reason.startswith("no such file") for reason in reasons.values()):
            way = f"Relative paths start at {self.root}: set a different folder with `root`."
        if set(reasons.values()) == {NOT_ALLOWED}:
            way = "Pass `allow_remote=True` if you trust these URLs."
        raise ExtractionError(sentences(f"None of the {len(self.images):,} images could be read. {shown}.", way))

    def forget(self) -> None:
        """Mark all images as unfinished, so that the next batches compute them again or read them from the cache."""
        for network in self.networks:
            network.done[:] = False
        self.progress.equal = 0

    def note(self, text: str) -> None:
        """Add a sentence to the report, once."""
        if text and text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True, slots=True)
class Step:
    """Progress of a run after a batch of images."""

    done: int  # finished images, including failed and cached ones
    total: int
    failed: int
    cached: int  # images whose features came from the cache or were already in files
    seconds: float  # of work so far
    images_per_second: float
    seconds_left: float | None
    bottleneck: Bottleneck | None
    note: str = ""  # what is being prepared, before the first batch
    kept: str = "from the cache"  # where the cached features came from


class Progress:
    """Counts the finished images of a run; each image needs the features of all `networks`."""

    def __init__(self, images: int, networks: int) -> None:
        self.done = 0  # including failed ones
        self.cached = 0  # all features from the cache or from files of an earlier run
        self.equal = 0  # duplicates, which share features
        self.reasons: dict[int, str] = {}  # failed image → reason
        self._lacking: NDArray[np.int32] = np.full(images, networks, np.int32)  # number of networks still to run
        self._computed = np.zeros(images, bool)
        self._waiting: dict[int, list[int]] = {}  # unfinished image → images with the same content, which wait for it

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Which images did not fail."""
        good = np.ones(len(self._lacking), bool)
        good[list(self.reasons)] = False
        return good

    def recount(self, done: Sequence[NDArray[np.bool_]]) -> None:
        """Count again from `done`, in case an interrupt came between storing and counting."""
        lacking = np.zeros(len(self._lacking), np.int32)
        for mask in done:
            lacking += ~mask
        lacking[list(self.reasons)] = 0
        cached = (lacking == 0) & ~self._computed
        cached[list(self.reasons)] = False
        self._lacking, self._waiting = lacking, {}
        self.done, self.cached = int(np.count_nonzero(lacking == 0)), int(np.count_nonzero(cached))

    def left(self, window: NDArray[np.int64] | None = None) -> list[int]:
        """Return the unfinished images, or those of a `window`, in order."""
        left = np.flatnonzero(self._lacking) if window is None else window[self._lacking[window] > 0]
        return list(left.tolist())

    def take(self, batch: Batch) -> list[tuple[int, int]]:
        """Count a batch; return pairs of images where the first now shares the features of the second."""
        for row, reason in batch.failures.items():
            self._fail(row, reason)
        if batch.rows:
            rows = np.array(batch.rows)
            self._lacking[rows] -= 1
            self._computed[rows] |= not batch.cached
            self._finish(rows[self._lacking[rows] == 0])
        for row, first in batch.equal.items():
            self._waiting.setdefault(first, []).append(row)
        shared = []
        for first in dict.fromkeys([*batch.rows, *batch.failures, *batch.equal.values()]):
            if self._lacking[first] or not (waiting := self._waiting.pop(first, [])):
                continue
            if first in self.reasons:
                for row in waiting:
                    self._fail(row, self.reasons[first])
                continue
            self._lacking[waiting], self._computed[waiting] = 0, self._computed[first]
            self._finish(np.array(waiting))
            shared += [(row, first) for row in waiting]
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
    """Yield cached features and failures of `rows` whose file state is unchanged, without reading the files."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        states = {row: state for row in rows[start : start + ROWS_AT_ONCE] if (state := state_of(images[row], root))}
        holds = cache.images(set(states.values()))
        known = {row: holds[state] for row, state in states.items() if state in holds}
        if not known:
            continue
        reasons = cache.failures(set(known.values()))
        if failures := {row: reasons[image] for row, image in known.items() if image in reasons}:
            yield Batch(failures=failures)
        for network in networks:
            left = {row: image for row, image in known.items() if not (row in failures or network.done[row])}
            wanted = set(left.values())
            found = {key: cache.vectors(kept, wanted) for key, kept in network.cache_keys.items()}
            whole = {image for image in wanted if all(image in vectors for vectors in found.values())}
            if cached := [row for row, image in left.items() if image in whole]:
                stacks = {key: np.stack([vectors[left[row]] for row in cached]) for key, vectors in found.items()}
                yield Batch(network, cached, vectors=stacks, cached=True)
