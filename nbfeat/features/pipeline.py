"""Decode ahead, batch, run, collect: bounded memory, whatever the number of images.

A pool of threads decodes a little ahead of the network. Images that cannot be read are dropped before batching, so
that batches stay full. Everything else happens in the calling thread, in order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from nbfeat.errors import ImageError
from nbfeat.features.engines import Engine, Pixels, Vectors, available_cores
from nbfeat.features.images import PixelSpec, read_pixels

Decoded = list[Pixels] | str  # one array for each size, or the reason why not
BATCHES_AHEAD = 3  # decoded and waiting; more only costs memory


@dataclass(slots=True)
class Timings:
    """Where the time of a run went, in seconds."""

    preparing: float = 0.0  # building or loading networks
    decoding: float = 0.0  # reading, decoding and resizing: of processor time, summed over threads
    waiting_for_images: float = 0.0  # the network had nothing to do
    waiting_for_network: float = 0.0  # decoded images had to wait
    attaching: float = 0.0  # normalizing, and attaching the columns

    def seconds(self) -> dict[str, float]:
        """Return the times by name."""
        return asdict(self)

    @property
    def bottleneck(self) -> Literal["decoding", "network"]:
        """What more of would make the run faster."""
        return "decoding" if self.waiting_for_images > self.waiting_for_network else "network"


@dataclass(slots=True)
class Batch:
    """Rows that are finished, with their vectors from each engine, and rows that failed on the way."""

    rows: list[int] = field(default_factory=list)
    vectors: list[Vectors] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lane:
    """One network and the pixels it takes."""

    engine: Engine
    pixels: PixelSpec


class Pipeline:
    """Run `images` through all `lanes`; each image is read once, and decoded once for all of them."""

    def __init__(self, images: Sequence[object], lanes: Sequence[Lane], root: Path, timings: Timings) -> None:
        self.images, self.lanes, self.root, self.timings = images, lanes, root, timings
        self.specs = list(dict.fromkeys(lane.pixels for lane in lanes))
        self.batch_size = lanes[0].engine.batch_size
        self.in_flight: deque[Batch] = deque()

    def run(self, rows: Sequence[int]) -> Generator[Batch, None, None]:
        """Yield batches in the order of `rows`, every row in exactly one of them. Close it to stop and clean up."""
        decoders = available_cores()
        executor = ThreadPoolExecutor(decoders, thread_name_prefix="nbfeat-decode")
        try:
            batch, buffers = Batch(), self._buffers()
            for row, pixels in self._decoded(executor, rows, decoders + BATCHES_AHEAD * self.batch_size):
                if isinstance(pixels, str):
                    batch.failures[row] = pixels
                    continue
                for lane, buffer in zip(self.lanes, buffers, strict=True):
                    buffer[len(batch.rows)] = pixels[self.specs.index(lane.pixels)]
                batch.rows.append(row)
                if len(batch.rows) == self.batch_size:
                    self._submit(batch, buffers)
                    if self.lanes[0].engine.is_full:
                        yield self._collect()
                    batch, buffers = Batch(), self._buffers()
            if batch.rows:
                self._submit(batch, buffers)
            while self.in_flight:
                yield self._collect()
            if batch.failures and not batch.rows:
                yield batch
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
            for lane in self.lanes:
                lane.engine.close()

    def _decoded(self, executor: ThreadPoolExecutor, rows: Sequence[int], ahead: int) -> Iterator[tuple[int, Decoded]]:
        waiting: deque[tuple[int, Future[tuple[Decoded, float]]]] = deque()
        coming = iter(rows)
        waiting.extend((row, executor.submit(self._decode, row)) for row in islice(coming, ahead))
        while waiting:
            row, future = waiting.popleft()
            start = time.perf_counter()
            pixels, took = future.result()
            self.timings.waiting_for_images += time.perf_counter() - start
            self.timings.decoding += took
            waiting.extend((row, executor.submit(self._decode, row)) for row in islice(coming, 1))
            yield row, pixels

    def _decode(self, row: int) -> tuple[Decoded, float]:
        start = time.thread_time()
        result: Decoded
        try:
            result = read_pixels(self.images[row], self.specs, self.root)
        except ImageError as error:
            result = str(error)  # the exception would keep the file's bytes alive
        return result, time.thread_time() - start

    def _buffers(self) -> list[Pixels]:
        return [lane.engine.buffer() for lane in self.lanes]

    def _submit(self, batch: Batch, buffers: Sequence[Pixels]) -> None:
        for lane, buffer in zip(self.lanes, buffers, strict=True):
            lane.engine.submit(buffer, len(batch.rows))
        self.in_flight.append(batch)

    def _collect(self) -> Batch:
        start = time.perf_counter()
        batch = self.in_flight.popleft()
        batch.vectors = [lane.engine.collect() for lane in self.lanes]
        self.timings.waiting_for_network += time.perf_counter() - start
        return batch
