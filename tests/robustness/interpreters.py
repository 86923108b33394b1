"""A run in an interpreter or a process that is unlike others: ``interpreters.py OUT FAKE|BLOCK IMAGE …``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pandas as pd

import nbfeat
from nbfeat.inference import prepared
from tests.fake import FakeNetwork


def main() -> None:
    """Extract features of the images with both sinks, and write them and what was said to a file."""
    out, block, *paths = sys.argv[1:]
    if block == "FAKE":
        prepared.PreparedNetwork = FakeNetwork  # type: ignore[misc,assignment]
        block = "MobileNet --size 32"
    frame = pd.DataFrame({"path": paths})
    said: dict[str, object] = {}
    try:
        result = nbfeat.extract(frame, block, images="path")
        files = nbfeat.extract(frame, block, images="path", parquet=f"{out}.files", cache=True)
        back = nbfeat.read(f"{out}.files").features
        said["features"] = result.features.to_numpy().tolist()
        said["same"] = back.to_numpy().tolist() == said["features"]
        said["notes"] = [*result.notes, *files.notes]
    except nbfeat.NbfeatError as error:
        said["error"] = str(error)
    said["files"] = len(os.listdir("/proc/self/fd"))
    Path(out).write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main()
