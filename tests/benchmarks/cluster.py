"""``python -m tests.benchmarks.cluster``: many rows on a Ray cluster of this machine, and what memory they take.

Memory is what each process has at its peak; of all together it is the sum of their shares of pages (PSS), polled.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import nbfeat
from tests.cluster_child import descendants


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
            self.all = max(self.all, sum(_kilobytes(pid, "smaps_rollup", "Pss:") for pid in processes))
            for pid, command in processes.items():
                kind = (
                    "worker"
                    if "MapWorker" in command
                    else command
                    if command == "driver"
                    else "Ray itself, the largest"
                )
                self.peaks[kind] = max(self.peaks.get(kind, 0), _kilobytes(pid, "status", "VmHWM:"))


def _kilobytes(process: int, file: str, name: str) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{process}/{file}").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(name):
                return int(line.split()[1])
    return 0


def main() -> None:
    """Draw images, run, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    rows = parser.parse_args().rows
    os.environ["RAY_ADDRESS"] = "local"
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        for number in range(rows):
            pixels = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{number:06d}.png", compress_level=1)
        frame = pd.DataFrame({"path": [f"{folder}/{number:06d}.png" for number in range(rows)]})
        memory = Memory()
        memory.start()
        start, first = time.perf_counter(), 0.0
        extraction = nbfeat.Extraction(frame, "Pocket", precision="float32", on="ray", cache=False)
        for step in extraction.steps():
            first = first or (time.perf_counter() - start if step.done else 0.0)
        seconds = time.perf_counter() - start
        memory.ended.set()
        memory.join()
    matrix = 4 * rows * len(extraction.columns) / 1e6
    failed = len(extraction.failures)
    print(f"{extraction.done:,} rows in {seconds:,.0f} s, the first after {first:,.1f} s; failed: {failed}")
    for kind, peak in sorted(memory.peaks.items()):
        print(f"{kind}: {peak / 1000:,.0f} MB at its peak")
    print(f"all processes together: {memory.all / 1000:,.0f} MB, of which {matrix:,.0f} MB are the features")


if __name__ == "__main__":
    main()
