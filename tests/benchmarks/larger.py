"""``python -m tests.benchmarks.larger [ROWS]``: the memory that a result larger than memory takes, in all.

A pretended network gives 1,280 features for each of 200,000 images, which are written to files in a temporary folder; a
process of its own for each kind of normalization says how much memory it had at most, frame and libraries included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time

from tests.conftest import ROOT
from tests.parquet.parts_child import WIDTH


def main() -> None:
    """Measure, and print a line for each normalization."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="?", default=200_000)
    rows = parser.parse_args().rows
    print(f"{rows:,} rows × {WIDTH:,} features: {4 * rows * WIDTH / 1e6:,.0f} MB")
    for normalize in ("none", "l2", "standard", "minmax"):
        with tempfile.TemporaryDirectory() as folder:
            block = f"MobileNet --size 32 --normalize {normalize}"
            child = "tests.parquet.parts_child"
            command = [sys.executable, "-m", child, "peak", f"{folder}/features", str(rows), block]
            start = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
            seconds, found = time.perf_counter() - start, json.loads(done.stdout.splitlines()[-1])
        before, peak = (f"{found[name] / 1e6:,.0f} MB" for name in ("before", "peak"))
        print(f"  {normalize:<9} {peak} at most ({before} before the run), {found['files']} files, {seconds:,.0f} s")


if __name__ == "__main__":
    main()
