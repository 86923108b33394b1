"""The engine for GPUs, and for a CPU without OpenVINO: the same model on whatever backend Keras has here.

Each device has a replica of the network, and batches go to them in turn; the next ones are dispatched before the oldest
is fetched. Pixels go to the device as they are, vectors come back. The last, partial batch is padded. Where memory does
not do, a batch is run in smaller parts, and no image is lost.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nbfeat.errors import NetworkError, listing
from nbfeat.inference import mixed
from nbfeat.inference.engines import Pixels, Precision, Vectors, Work, exact, gpus, sizing
from nbfeat.inference.engines.devices import Replica, fetch, replicate
from nbfeat.inference.engines.session import in_a_fresh_session
from nbfeat.inference.model import Base, Built, NetworkSpec, build, load_base

BATCH = 32
FASTER_ON_GPUS: tuple[Precision, ...] = ("bfloat16", "float16")  # than float32; numbers in the first cannot overflow
WINDOW = 2  # batches in flight on each device
_SHOWN = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch", "openvino": "OpenVINO backend"}


@dataclass(slots=True)
class Flight:
    """A batch on its way: the images in it, and what became of its parts."""

    buffer: Pixels
    count: int
    replica: Replica
    started: float = field(default_factory=time.perf_counter)
    size: int = 0  # images in each part
    parts: list[Any] = field(default_factory=list)

    def start(self, size: int) -> None:
        """Dispatch the batch in parts of `size` images."""
        self.size = size
        self.parts = [self.replica.run(part) for part in _parts(self.buffer, self.count, size)]

    def fetch(self, keys: list[str]) -> Vectors:
        """Wait for every part, and put them together."""
        left = range(self.count, 0, -self.size)
        rows = [fetch(part, keys, min(rest, self.size)) for part, rest in zip(self.parts, left, strict=True)]
        return {key: np.concatenate([part[key] for part in rows]) for key in keys}


def _parts(buffer: Pixels, count: int, size: int) -> Iterator[Pixels]:
    """Cut `count` images into parts of one size; what is missing at the end of the buffer is black."""
    for start in range(0, count, size):
        part = buffer[start : start + size]
        yield part if len(part) == size else np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))


class KerasEngine:
    """Run the network of `spec` on `devices` (``cpu`` or ``gpu:N``); what comes up is given to `tell` as sentences."""

    def __init__(
        self,
        spec: NetworkSpec,
        *,
        devices: tuple[str, ...],
        precision: Precision,
        batch_size: int | None,
        base: Base | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        keras: Any = importlib.import_module("keras")
        backend, where = keras.backend.backend(), listing(device.upper() for device in devices)
        self.library = f"Keras {keras.__version__} on {_SHOWN.get(backend, backend)}"
        self.name = f"{self.library}, {where}"
        self.kind = f"{self.library}, {gpus.kinds(devices)}"  # all of the name that decides numbers
        self.backend = f"{backend} {importlib.import_module(backend).__version__}"
        self._precision, self.work = precision, Work()

        def work() -> tuple[Built, list[Replica]]:
            with exact.float32():
                whole = mixed.in_precision(spec, base or load_base(spec, lambda _: None), precision)
                built = build(spec, lambda _: None, base=whole)
                return built, replicate(built.model, devices)

        built, self._replicas = in_a_fresh_session(work, devices[0])
        self.outputs, self.weights = built.outputs, built.weights
        self._room = sizing.Room(batch_size or BATCH, tell)
        shape = (spec.size, spec.size, 3)
        if batch_size is None and devices[0].startswith("gpu"):
            self._find_size(shape)
        for replica in self._replicas:
            self._prepare(replica)
        self.batch_size = batch_size or self._room.size
        self._buffers: list[Pixels] = [
            np.zeros((self.batch_size, *shape), np.uint8) for _ in range(WINDOW * len(devices) + 1)
        ]
        self._free = list(self._buffers)
        self._busy: deque[Flight] = deque()
        self._next = 0  # the replica whose turn it is

    def _find_size(self, shape: tuple[int, ...]) -> None:
        """Measure how many images should run at once; all devices are taken for equal."""

        def run(pixels: Pixels) -> None:
            with exact.float32():
                fetch(self._replicas[0].run(pixels), list(self.outputs), len(pixels))

        device, seconds = self._replicas[0].device, sizing.stopwatch(run, shape)
        sizing.find(self._room, device, seconds, sizing.largest_for(shape))

    def _prepare(self, replica: Replica) -> None:
        """Compile for the size that is used, which takes memory, too."""
        while True:
            size = self._room.size
            try:
                return replica.prepare(size)
            except Exception as error:  # raised again unless it is about memory
                self._room.shrink(size, replica.device, error)

    @property
    def is_full(self) -> bool:
        """Whether the window of batches in flight is full."""
        return len(self._busy) >= WINDOW * len(self._replicas)

    @property
    def in_flight(self) -> int:
        """How many batches were submitted and not yet collected."""
        return len(self._busy)

    def buffer(self) -> Pixels:
        """Lend a buffer of a whole batch."""
        return self._free.pop()

    def submit(self, buffer: Pixels, count: int) -> None:
        """Dispatch the batch to the device whose turn it is."""
        flight = Flight(buffer, count, self._replicas[self._next])
        self._next = (self._next + 1) % len(self._replicas)
        self._fitting(flight, lambda: None)
        self._busy.append(flight)

    def collect(self) -> Vectors:
        """Fetch the oldest batch's vectors."""
        flight = self._busy.popleft()
        try:
            vectors: Vectors = self._fitting(flight, lambda: flight.fetch(list(self.outputs)))
        finally:
            self._free.append(flight.buffer)
            self.work.add(flight.started, time.perf_counter())
        if self._precision == "float16" and not all(np.isfinite(rows).all() for rows in vectors.values()):
            raise NetworkError(
                "In float16 the network's numbers grow too large for some images. "
                "Use --precision bfloat16, or --precision float32."
            )
        return vectors

    def _fitting(self, flight: Flight, then: Callable[[], Any]) -> Any:
        """Start a batch unless that was done, and do `then`; whenever memory does not do, again in smaller parts."""
        while True:
            try:
                with exact.float32():
                    if not flight.parts:
                        flight.start(self._room.size)
                    return then()
            except Exception as error:  # raised again unless it is about memory
                flight.parts = []
                self._room.shrink(flight.size, flight.replica.device, error)

    def close(self) -> None:
        """Wait for what is in flight, drop it, and take back every buffer; the engine can be used again."""
        while self._busy:
            flight = self._busy.popleft()
            with contextlib.suppress(Exception), exact.float32():  # what is dropped may have failed
                flight.fetch(list(self.outputs))
        self._free = list(self._buffers)
