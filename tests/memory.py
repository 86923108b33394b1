"""The memory of this process, on Linux."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")


def peak() -> int:
    """Return the most bytes of memory that this process had, since it last asked to have that forgotten.

    Not ``ru_maxrss``, which begins with what the parent had when it forked.
    """
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
