"""``python -m tests.benchmarks.cluster``: many rows on a Ray cluster of this machine, and what memory they take.

Memory is what each process has at its peak; of all together it is the sum of their shares of pages (PSS), polled.
With ``--parquet`` a pretended network gives 1,280 features of each image, which are written to files.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

import nbfeat
from nbfeat.errors import format_bytes
from nbfeat.extraction import ray_workers
from nbfeat.inference import prepared
from tests.extraction.ray_child import descendants
from tests.memory import bytes_of
from tests.parquet.parts_child import WIDTH, WideOpening


class Memory(threading.Thread):
    """Watch this process and those that it started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.all = 0
        self.peaks: dict[str, int] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        """Look every second."""
        while not self.ended.wait(1):
            processes = {os.getpid(): "driver", **descendants()}
            self.all = max(self.all, sum(bytes_of("Pss", pid, "smaps_rollup") for pid in processes))
            for pid, command in processes.items():
                kind = (
                    "worker"
                    if "MapWorker" in command
                    else command
                    if command == "driver"
                    else "Ray itself, the largest"
                )
                self.peaks[kind] = max(self.peaks.get(kind, 0), bytes_of("VmHWM", pid))


class WideWorker(ray_workers.Worker):
    """A worker with the pretended network."""

    def __init__(self, *order: Any, **options: Any) -> None:
        prepared.PreparedNetwork = WideOpening  # type: ignore[misc,assignment]
        super().__init__(*order, **options)


def main() -> None:
    """Draw images, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--parquet", metavar="NORMALIZE", help="write to files: none, l2, standard or minmax")
    asked = parser.parse_args()
    rows, block, width = asked.rows, "EfficientNetLite0", 1280
    if asked.parquet:
        prepared.PreparedNetwork, ray_workers.Worker = WideOpening, WideWorker  # type: ignore[misc,assignment]
        block, width = f"MobileNet --size 32 --normalize {asked.parquet}", WIDTH
    os.environ["RAY_ADDRESS"] = "local"
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        for number in range(rows):
            pixels = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{number:06d}.png", compress_level=1)
        frame = pd.DataFrame({"path": [f"{folder}/{number:06d}.png" for number in range(rows)]})
        watched = Memory()
        watched.start()
        start, first = time.perf_counter(), 0.0
        where = f"{folder}/features" if asked.parquet else None
        extraction = nbfeat.Extraction(frame, block, precision="float32", on="ray", parquet=where, cache=False)
        for step in extraction.steps():
            first = first or (time.perf_counter() - start if step.done else 0.0)
        seconds = time.perf_counter() - start
        watched.ended.set()
        watched.join()
    failed = len(extraction.failures)
    files = f", {extraction.written.files} files" if extraction.written else ""
    print(f"{extraction.done:,} rows in {seconds:,.0f} s, the first after {first:,.1f} s; failed: {failed}{files}")
    for kind, peak in sorted(watched.peaks.items()):
        print(f"{kind}: {peak / 1e6:,.0f} MB at its peak")
    features, store = format_bytes(4 * rows * width), format_bytes(ray_workers.STORE)
    print(f"all processes together: {watched.all / 1e6:,.0f} MB; features: {features}; the cluster's store: {store}")


if __name__ == "__main__":
    main()
