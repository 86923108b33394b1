"""The memory of a process, on Linux."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def bytes_of(entry: str, process: int | str = "self", file: str = "status") -> int:
    """Return an entry, such as ``VmRSS``, of a file that tells about a process; 0 where it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/{file}").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{entry}:"):
                return int(line.split()[1]) * 1024
    return 0


def peak() -> int:
    """Return the most bytes of memory that this process had, since it last asked to have that forgotten.

    Not ``ru_maxrss``, which begins with what the parent had when it forked.
    """
    return bytes_of("VmHWM")


# A folder that is in memory, where there is one: a thousand databases on a disk take minutes.
IN_MEMORY = next((folder for folder in ["/dev/shm"] if os.path.isdir(folder)), None)  # noqa: S108 - it is for this
