"""Decode images in threads a little ahead of the networks, batch them and run the networks, in bounded memory."""

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from nbfeat import isolation
from nbfeat.cache.database import Cache
from nbfeat.errors import ImageError
from nbfeat.extraction.network_state import Batch, NetworkState
from nbfeat.extraction.profile import Timings
from nbfeat.extraction.run import Run
from nbfeat.images import fingerprint
from nbfeat.images.decode import Source, is_permanent, pixels_of
from nbfeat.images.remote import Access, Fetcher
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import Fetch, address_of, load_image, spread
from nbfeat.inference.engines.base import Engine, Pixels, Vectors
from nbfeat.inference.engines.cpu_count import available_cores
from nbfeat.inference.engines.devices import timed
from nbfeat.inference.precision import readable_sample

BATCHES_AHEAD = 3  # decoded and waiting; more only costs memory
FIRST_IMAGES, ROUNDS, SECONDS = 8, 3, 0.3  # to measure speed: images to warm up, rounds, seconds of a round
SETTLED_AT_ONCE = 64  # rows without a network, reported together
QUIET = 1_000  # rows without a network, after which a partial batch runs


@dataclass(slots=True)
class Item:
    """The findings of a decoder thread about one row."""

    row: int
    image: bytes = b""  # content hash
    state: bytes | None = None  # of its file
    reason: str = ""  # why it has no pixels
    is_lasting: bool = False  # whether the reason lies in the content and won't change
    equal_to: int | None = None  # a row with the same content
    cached: dict[int, Vectors] = field(default_factory=dict)  # index of a network → its cached features
    pixels: dict[PixelSpec, Pixels] = field(default_factory=dict)
    reading: float = 0.0  # seconds
    decoding: float = 0.0  # seconds, including resizing

    def settle(self, batch: Batch) -> None:
        """Record in `batch` everything known without a network."""
        if self.equal_to is not None:
            batch.equal[self.row] = self.equal_to
        elif self.reason:
            batch.failures[self.row] = self.reason
        if self.state is not None:
            batch.files[self.state] = self.image
        if self.is_lasting:
            batch.undecodable[self.image] = self.reason


class BatchQueue:
    """The batches of one network: the one being filled, those in flight, and cached features."""

    def __init__(self, network: NetworkState, timings: Timings) -> None:
        self.network, self.timings = network, timings
        self.engine: Engine | None = None
        self._flight: deque[Batch] = deque()
        self._batch = Batch(network)
        self._buffer: Pixels | None = None
        self._found: dict[int, Vectors] = {}

    def take(self, item: Item, cached: Vectors | None) -> Iterator[Batch]:
        """Take an image that the network lacks, or its cached features; yield finished batches."""
        if cached is not None:
            self._found[item.row] = cached
            if len(self._found) == SETTLED_AT_ONCE:
                yield self._recalled()
        elif self.network.pixels in item.pixels and not self.network.done[item.row]:
            if self.engine is None:
                with self.timings.adding("preparing"):
                    self.engine = self.network.start()
            if self._buffer is None:
                self._buffer = self.engine.buffer()
            self._buffer[len(self._batch.rows)] = item.pixels[self.network.pixels]
            self._batch.rows.append(item.row)
            self._batch.images.append(item.image)
            if len(self._batch.rows) == self.engine.batch_size:
                self.submit()
            if self.engine.is_full:
                yield self._collect()

    def submit(self) -> None:
        """Start the network on the current batch."""
        if self.engine is not None and self._buffer is not None:
            self.engine.submit(self._buffer, len(self._batch.rows))
            self._flight.append(self._batch)
            self._batch, self._buffer = Batch(self.network), None

    def rest(self) -> Iterator[Batch]:
        """Yield the remaining batches."""
        while self._flight:
            yield self._collect()
        if self._found:
            yield self._recalled()

    def _collect(self) -> Batch:
        assert self.engine is not None
        start, worked = time.perf_counter(), self.engine.work.seconds
        batch = self._flight.popleft()
        batch.vectors = self.engine.collect()
        self.timings.network += self.engine.work.seconds - worked
        self.timings.waiting_for_network += time.perf_counter() - start
        return batch

    def _recalled(self) -> Batch:
        found, self._found = self._found, {}
        vectors = {key: np.stack([vectors[key] for vectors in found.values()]) for key in next(iter(found.values()))}
        return Batch(self.network, list(found), vectors=vectors, cached=True)


class LocalExecutor(nullcontext[None]):
    """Computes rows in this process."""

    starts_workers = False

    def run(self, run: Run, rows: Sequence[int]) -> Generator[Batch, None, None]:
        """Yield batches until every row has its features, failed, or is a duplicate of another."""
        pipeline = Pipeline(run.images, run.networks, run.root, run.timings, run.cache, run.seen, remote=run.remote)
        return pipeline.run(rows)


class Pipeline:
    """Runs `images` through all `networks`; reads and decodes each image once. `seen` maps contents to first rows."""

    def __init__(
        self, images: Sequence[object], networks: Sequence[NetworkState], root: Path, timings: Timings, cache: Cache,
        seen: dict[bytes, int], *, remote: Access | None = None,
    ) -> None:  # fmt: skip
        self.images, self.networks, self.root, self.timings = images, networks, root, timings
        self.cache, self.seen = cache, seen
        self._decoders = available_cores()  # more threads may wait for remote images, but no more decode at a time
        self._turns = threading.Semaphore(self._decoders)
        self._fetch = Fetcher(root, remote) if remote else None

    def run(self, rows: Sequence[int]) -> Generator[Batch, None, None]:
        """Yield batches until every row has its features, failed, or is a duplicate; close it to stop and clean up."""
        threads = self._decoders + (self._fetch.limits.at_once if self._fetch else 0)
        ahead = threads + BATCHES_AHEAD * max(network.prepared.batch_size for network in self.networks)
        executor = ThreadPoolExecutor(threads, thread_name_prefix="nbfeat-decode")
        queues = [BatchQueue(network, self.timings) for network in self.networks]
        settled = Batch()
        try:
            for batch in self._batches(self._items(executor, rows, ahead), queues, settled):
                yield batch.beside(settled)
        finally:
            if self._fetch:
                self._fetch.close()  # so that no thread keeps waiting for a server
            executor.shutdown(wait=True, cancel_futures=True)
            for queue in queues:
                if queue.engine is not None:
                    queue.engine.close()

    def _batches(self, items: Iterator[Item], queues: Sequence[BatchQueue], settled: Batch) -> Iterator[Batch]:
        quiet = 0  # images since the last one that a network got
        for item in items:
            item.settle(settled)
            for number, queue in enumerate(queues):
                yield from queue.take(item, item.cached.get(number))
            quiet = 0 if item.pixels else quiet + 1
            if quiet == QUIET:  # equal images may wait for a batch that nothing fills
                yield from self._rest(queues)
            if len(settled.failures) + len(settled.equal) >= SETTLED_AT_ONCE:
                yield Batch()
        yield from self._rest(queues)
        if settled:
            yield Batch()

    def _rest(self, queues: Sequence[BatchQueue]) -> Iterator[Batch]:
        for queue in queues:
            queue.submit()
        for queue in queues:
            yield from queue.rest()

    def _items(self, executor: ThreadPoolExecutor, rows: Sequence[int], ahead: int) -> Iterator[Item]:
        waiting: deque[Future[Item]] = deque()
        coming = iter(rows)
        waiting.extend(executor.submit(self._look, row) for row in islice(coming, ahead))
        while waiting:
            with self.timings.adding("waiting_for_images"):
                item = waiting.popleft().result()
            self.timings.reading += item.reading
            self.timings.decoding += item.decoding
            waiting.extend(executor.submit(self._look, row) for row in islice(coming, 1))
            yield item

    def _look(self, row: int) -> Item:
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
        specs: dict[PixelSpec, None] = {}  # of the networks that lack its features
        for number, network in enumerate(self.networks):
            if item.reason or network.done[item.row]:
                continue
            if vectors := network.recalled(item.image, self.cache):
                item.cached[number] = vectors
            else:
                specs[network.pixels] = None
        if not specs:
            return
        start = time.perf_counter()
        try:
            item.pixels = dict(zip(specs, pixels_of(source, list(specs)), strict=True))
        except ImageError as error:
            item.reason = str(error)
            item.is_lasting = is_permanent(source, item.reason)
        item.decoding = time.perf_counter() - start


def images_per_second(
    network: NetworkState, key: str, images: Sequence[object], root: Path, *, remote: Access | None = None
) -> float:
    """Measure the output `key` of `network` on up to 64 evenly sampled images, read beforehand; NaN if none is read."""

    def read(image: object, fetch: Fetch | None) -> object:
        """Read the image; return the fetched content in place of a URL."""
        source, _ = load_image(image, root, fetch)
        return image if address_of(image) is None else source

    some = readable_sample(images, read, root, remote)
    if not some:
        return float("nan")
    engine = network.prepared.start(network.precision, key)

    def rate(chosen: Sequence[object]) -> float:
        alone = NetworkState(network.spec, network.pixels, network.prepared, np.zeros(len(chosen), bool), engine=engine)
        with closing(Pipeline(chosen, [alone], root, Timings(), Cache(None), {}).run(range(len(chosen)))) as batches:
            ran, seconds = timed(lambda: sum(len(batch.rows) for batch in batches))
        return ran / seconds

    with isolation.pillow_defaults():
        guess = rate([some[at] for at in spread(len(some), FIRST_IMAGES)])
        affordable = [some[at] for at in spread(len(some), max(FIRST_IMAGES, int(guess * SECONDS)))]
        return max(rate(affordable) for _ in range(ROUNDS))
