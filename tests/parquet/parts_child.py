"""Programs that write features to files with a fake network: ``python -m tests.parquet.parts_child NAME …``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import nbfeat
from nbfeat.extraction import sink
from nbfeat.inference import prepared
from nbfeat.inference.engines.base import Pixels, Vectors
from nbfeat.inference.spec import Cut, NetworkSpec, Output
from tests import fake, memory

WIDTH = 1280


class WideEngine(fake.FakeEngine):
    """Give `WIDTH` features that identify the image: sines of its mean color at different frequencies."""

    def collect(self) -> Vectors:
        buffer, count = self._busy.popleft()
        self._lent -= 1
        return {cut.key: wide(buffer[:count]) for cut in self.spec.cuts}


class WideOpening(fake.FakeNetwork):
    """Stand in for `prepared.PreparedNetwork`."""

    def __init__(self, spec: NetworkSpec, *, devices: tuple[str, ...], batch_size: int | None) -> None:
        super().__init__(spec, devices=devices, batch_size=batch_size)
        self.outputs = {cut.key: Output(WIDTH, "avg", (2, 2, WIDTH), negative=False) for cut in spec.cuts}

    def start(self, precision: str, only: str | None = None) -> WideEngine:  # same signature as the real one
        return WideEngine(self.spec, self.batch_size)


def wide(pixels: Pixels) -> NDArray[np.float32]:
    """Compute the features of the fake network."""
    colors = fake.features(pixels, Cut(layer="any"))
    return np.asarray(np.sin(colors.mean(axis=1, keepdims=True) * np.linspace(0.1, 3, WIDTH, dtype=np.float32)))


def write(frame: str, folder: str, block: str, rows: str) -> dict[str, object]:
    """Write features of a frame, and print the progress after each step."""
    prepared.PreparedNetwork = fake.FakeNetwork  # type: ignore[misc,assignment]
    sink.MOST_ROWS = int(rows)
    extraction = nbfeat.Extraction(pd.read_pickle(frame), block, images="path", parquet=folder)  # noqa: S301 - the test's
    for step in extraction.steps():
        print(step.done, step.cached, flush=True)
    return {"done": extraction.done, "cached": extraction.cached}


def peak(folder: str, rows: str, block: str) -> dict[str, object]:
    """Write this many rows of `WIDTH` features, and return the peak memory before and after."""
    prepared.PreparedNetwork = WideOpening  # type: ignore[misc,assignment]
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(int(rows))]
    frame = pd.DataFrame({"image": images, "label": [f"row {number}" for number in range(len(images))]})
    extraction = nbfeat.Extraction(frame, block, images="image", batch_size=64, parquet=folder)
    before = memory.peak()
    extraction.run()
    written = extraction.written
    assert written is not None
    return {"before": before, "peak": memory.peak(), "files": written.files, "bytes": written.bytes}


if __name__ == "__main__":
    programs: dict[str, Callable[..., dict[str, object]]] = {"write": write, "peak": peak}
    print(json.dumps(programs[sys.argv[1]](*sys.argv[2:])))
