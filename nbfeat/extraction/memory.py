"""Matrices that fit: refuse what would fill the machine, before it does."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import RequestError, format_bytes

SHARE = 0.5  # of the free memory; the rest is for the frame that is made of it, and for whatever else runs


def matrix(rows: int, width: int, block: str) -> NDArray[np.float32]:
    """Return a matrix of NaN for `rows` × `width` features, or say why that is too much."""
    size, free = 4 * rows * width, free_bytes()
    if free is not None and size > SHARE * free:
        raise RequestError(
            f"`{block}` gives {width:,} features per image: {rows:,} rows of them take {format_bytes(size)}, more "
            f"than half of the {format_bytes(free)} of free memory. Pool the map with --pooling avg or max, cut at a "
            "later layer, or take fewer rows."
        )
    return np.full((rows, width), np.nan, np.float32)


def free_bytes() -> int | None:
    """Return the memory that can be had without swapping, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # macOS: half of what is built in
    except (AttributeError, ValueError, OSError):
        return None
