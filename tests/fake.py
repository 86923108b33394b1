"""A network that needs no Keras: its features are means of the pixels, so that tests can say what they should be."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from nbfeat.backbones.weights import Loaded
from nbfeat.inference.engines.base import Pixels, Precision, Vectors, Work
from nbfeat.inference.prepared import PreparedNetwork
from nbfeat.inference.spec import Cut, NetworkSpec, Output

GRID = 4
Result = TypeVar("Result")


class FakeEngine:
    """Run a pretended network: `GRID` × `GRID` means of each color for the end, means of colors for any other layer."""

    opened = 0
    computed = 0  # images, in all engines
    batches: list[int]  # how many images each batch had

    def __init__(self, spec: NetworkSpec, batch_size: int) -> None:
        type(self).opened += 1
        self.name = "Fake engine"
        self.spec, self.batch_size = spec, batch_size
        self.outputs = outputs(spec)
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()
        self.closed, self.work = 0, Work()
        self._busy: deque[tuple[Pixels, int]] = deque()
        self._lent = 0

    @property
    def is_full(self) -> bool:
        return len(self._busy) >= 2

    @property
    def in_flight(self) -> int:
        return len(self._busy)

    def buffer(self) -> Pixels:
        self._lent += 1
        assert self._lent <= 4, "more buffers lent than an engine has"
        return np.zeros((self.batch_size, self.spec.size, self.spec.size, 3), np.uint8)

    def submit(self, buffer: Pixels, count: int) -> None:
        assert not self.is_full
        self.batches.append(count)
        type(self).computed += count
        self._busy.append((buffer, count))

    def collect(self) -> Vectors:
        self.gate.wait(10)
        buffer, count = self._busy.popleft()
        self._lent -= 1
        return {cut.key: features(buffer[:count], cut) for cut in self.spec.cuts}

    def close(self) -> None:
        self.closed += 1
        self._busy.clear()
        self._lent = 0


def outputs(spec: NetworkSpec) -> dict[str, Output]:
    """Return what a pretended network gives."""
    return {cut.key: Output(width(cut), "avg", (2, 2, width(cut)), negative=False) for cut in spec.cuts}


def width(cut: Cut) -> int:
    """Return how many features a cut of the pretended network gives."""
    return 3 if cut.layer else 3 * GRID * GRID


def features(pixels: Pixels, cut: Cut) -> NDArray[np.float32]:
    """Compute what the pretended network computes."""
    count, size = len(pixels), pixels.shape[1]
    if cut.layer:
        return np.asarray(pixels.astype(np.float32).mean(axis=(1, 2)))
    cells = pixels[:, : size // GRID * GRID, : size // GRID * GRID].astype(np.float32)
    cells = cells.reshape(count, GRID, size // GRID, GRID, size // GRID, 3).mean(axis=(2, 4))
    return np.asarray(cells.reshape(count, -1))


class FakeNetwork:
    """Stand in for `PreparedNetwork`."""

    note = ""
    faster: tuple[Precision, ...] = ()

    def __init__(self, spec: NetworkSpec, *, devices: tuple[str, ...], batch_size: int | None) -> None:
        assert devices == ("cpu",)
        self.spec, self.device, self.batch_size = spec, devices[0], batch_size or 8
        self.name, self.weights, self.outputs = "Fake engine", Loaded("random", "0" * 64), outputs(spec)
        self.numbers: dict[str, object] = {"engine": "fake"}

    def __iter__(self) -> Iterator[str]:
        yield f"opening a pretended {self.spec.backbone}"

    key_fields = PreparedNetwork.key_fields

    def start(self, precision: Precision, only: str | None = None) -> FakeEngine:
        assert precision in {"float32", "bfloat16", "float16"}
        cuts = tuple(cut for cut in self.spec.cuts if only in {None, cut.key})
        return FakeEngine(replace(self.spec, cuts=cuts), self.batch_size)


class Gate:
    """Hold every batch of the pretended network until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._passes = threading.Semaphore(0)
        collect = FakeEngine.collect

        def held(engine: FakeEngine) -> Vectors:
            assert self._passes.acquire(timeout=30), "nobody opened the gate"
            return collect(engine)

        monkeypatch.setattr(FakeEngine, "collect", held)

    def let(self, batches: int) -> None:
        """Let so many batches through."""
        self._passes.release(batches)

    def open(self) -> None:
        """Let all through from now on."""
        self.let(100_000)


def to_its_end(work: Generator[str, None, Result]) -> tuple[list[str], Result]:
    """Run what tells on the way what it does; return what it told, and its result."""
    said: list[str] = []
    while True:
        try:
            said.append(next(work))
        except StopIteration as end:
            return said, end.value
