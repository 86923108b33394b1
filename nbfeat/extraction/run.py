"""The work of an extraction: open the networks, take what the cache has, compute the rest, keep what is new.

It knows images and rows of features; what they are columns of, and how they are normalized, is not its business.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nbfeat.cache.database import Cache
from nbfeat.cache.recall import recall
from nbfeat.extraction.batch import Batch
from nbfeat.extraction.lane import NetworkState, decoders
from nbfeat.extraction.pipeline import Pipeline
from nbfeat.extraction.profile import Timings
from nbfeat.extraction.progress import Progress
from nbfeat.extraction.ray_session import Stay
from nbfeat.images.remote import Access
from nbfeat.images.resize import PixelSpec
from nbfeat.inference import prepared
from nbfeat.inference.engines import devices as hardware
from nbfeat.inference.engines.base import Asked, Precision
from nbfeat.inference.precision import choose_precision
from nbfeat.inference.spec import NetworkSpec

if TYPE_CHECKING:
    from nbfeat.extraction.ray_workers import Cluster


class Run:
    """The features of `images` from several networks; relative paths start at `root`, and `remote` ones are fetched."""

    def __init__(
        self,
        images: Sequence[object],
        root: Path,
        networks: Sequence[tuple[NetworkSpec, PixelSpec]],
        *,
        device: str,
        precision: Asked,
        batch_size: int | None,
        cache: bool,
        remote: Access | None = None,
        on: str | None = None,
    ) -> None:
        self.images, self.root, self.networks = images, root, networks
        self.device, self.precision, self.batch_size = device, precision, batch_size
        self.remote, self.on = remote, on
        self.progress = Progress(len(images), len(networks))
        self.timings = Timings()
        self.notes: list[str] = []
        self.lanes: list[NetworkState] = []
        self.keeps = False  # whether what is finished is in the cache
        self.stay = Stay()  # on a cluster, where it runs on one
        self.uses_cache = cache and bool(images)
        self._cache = Cache(None)
        self._seen: dict[bytes, int] = {}
        self.computed_elsewhere = False  # whether some of it has no use for the cache
        self._settled: Sequence[Precision] = ()

    @contextmanager
    def caching(self) -> Iterator[None]:
        """Open the cache for the block, and let it go after it."""
        if not self.uses_cache:
            yield
            return
        self._cache = Cache.at_home(decoders())
        try:
            yield
        finally:
            self.keeps = self._cache.writes and not self.computed_elsewhere
            self.note(self._cache.note)
            self._cache.close()

    def open(self) -> Iterator[str]:
        """Make the networks ready, yielding sentences to show meanwhile."""
        start = time.perf_counter()
        devices, lanes = hardware.choose_devices(self.device), []
        for number, (spec, pixels) in enumerate(self.networks):
            opening = prepared.PreparedNetwork(spec, devices=devices, batch_size=self.batch_size)
            lanes.append(NetworkState(spec, pixels, opening, np.zeros(len(self.images), bool)))
            yield from opening
            self.note(opening.note)
            if self._settled:
                lanes[-1].set_precision(self._settled[number])
            else:
                choice = yield from choose_precision(
                    opening, pixels, self.precision, self.images, self.root, remote=self.remote
                )
                lanes[-1].set_precision(choice.precision, choice.engine)
                self.note(choice.message)
        self.lanes = lanes
        self.timings.preparing += time.perf_counter() - start

    def repeat(self, precisions: Sequence[Precision]) -> None:
        """Compute in what an earlier run computed in, one for each network; nothing is compared."""
        self._settled = precisions

    def over(self, images: Sequence[object]) -> Run:
        """Return the work on some of the images, to be counted apart; `join` it before each of its `batches`."""
        return Run(
            images,
            self.root,
            self.networks,
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
            cache=self.uses_cache,
            remote=self.remote,
            on=self.on,
        )

    def join(self, whole: Run) -> None:
        """Run the networks of `whole`, of whose images these are some; its features, cache and notes are theirs.

        So is its stay on a cluster, where it runs on one.
        """
        self.timings, self.notes, self._cache, self.stay = whole.timings, whole.notes, whole._cache, whole.stay
        if not self.lanes:
            self.lanes = [replace(lane, done=np.zeros(len(self.images), bool), cached=0) for lane in whole.lanes]

    def batches(self) -> Generator[Batch, None, None]:
        """Yield what is in the cache already, then what has to be read; each batch was taken in before."""
        if not self.images:
            return
        self._cache.use(kept for lane in self.lanes for kept in lane.kept.values())
        self.progress.recount([lane.done for lane in self.lanes])
        start = time.perf_counter()
        for batch in recall(self.images, self.progress.left(), self.lanes, self.root, self._cache):
            self._take(batch)
            self.timings.recalling += time.perf_counter() - start
            yield batch
            start = time.perf_counter()
        self.timings.recalling += time.perf_counter() - start
        if left := self.progress.left():
            with closing(self._place().run(left)) as batches:
                for batch in batches:
                    self._take(batch)
                    yield batch

    def _place(self) -> Pipeline | Cluster:
        """Return where the work is done: in this process, or by workers on a cluster."""
        if self.on is None:
            return Pipeline(
                self.images, self.lanes, self.root, self.timings, self._cache, self._seen, remote=self.remote
            )
        from nbfeat.extraction.ray_workers import Cluster

        return Cluster(self, self._seen)

    def apart(self, images: Sequence[object]) -> Run:
        """Return a run over other images by the networks that are open here, with room for what they give."""
        run = self.over(images)
        for lane in self.lanes:
            lane.start()
            room = {
                key: np.full((len(images), output.width), np.nan, np.float32) for key, output in lane.outputs.items()
            }
            run.lanes.append(replace(lane, done=np.zeros(len(images), bool), cached=0, features=room))
        return run

    def _take(self, batch: Batch) -> None:
        """Put the features of a batch where they belong, and into the cache what is new."""
        if batch.lane is not None:
            batch.lane.take(batch.rows, batch.vectors, cached=batch.cached)
            self.note(batch.lane.opening.note)
        self.computed_elsewhere |= batch.computed_elsewhere
        for row in batch.failures:
            for lane in self.lanes:  # which may have had its features from the cache
                lane.forget(row)
        for row, first in self.progress.take(batch):
            for lane in self.lanes:
                lane.share(row, first)
        start = time.perf_counter()
        self._cache.keep(batch.news)
        self.timings.keeping += time.perf_counter() - start

    def forget(self) -> None:
        """Take no features for finished any more; the next batches bring them again, from the cache where they can."""
        for lane in self.lanes:
            lane.done[:] = False
        self.progress.equal = 0

    def note(self, text: str) -> None:
        """Take down what the report should say, once."""
        if text and text not in self.notes:
            self.notes.append(text)
