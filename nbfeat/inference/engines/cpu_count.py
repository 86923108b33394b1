"""How many cores this process may use: those it is bound to, the quota of its control groups, its share as a worker.

The number of cores of the machine is none of these: a container of two cores has as many decoders and streams as two.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT, GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """Count the cores that this process may use, one at least; a part of a core counts as one."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, quotas()), *_share_of_worker(), *_taken]))


_taken: list[int] = []


def take(share: int) -> None:
    """Let this process use no more than its `share` of the cores: it is a worker, and others have the rest."""
    _taken[:] = [share]


def quotas(root: Path = ROOT, groups: Path = GROUPS) -> Iterator[float]:
    """Yield the cores that the control groups of this process allow: its own and all around it, of either version."""
    for folder in control_groups("", root, groups):
        with suppress(OSError, ValueError):  # no such group here, or "max": no quota
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            yield int(quota) / int(period)
    for folder in control_groups("cpu", root, groups):
        with suppress(OSError, ValueError):
            files = (folder / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
            allowed, of = (int(file.read_text(encoding="ascii")) for file in files)
            if allowed > 0:  # -1: no quota
                yield allowed / of


def control_groups(kind: str, root: Path = ROOT, groups: Path = GROUPS) -> list[Path]:
    """Return the folders of this process's control groups, inner first: of a version 1 `kind`, or "" for version 2."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    paths = {kind: path for _, kinds, path in lines for kind in kinds.split(",")}
    top = root / kind
    inner = top / paths.get(kind, "/").lstrip("/")
    return [folder for folder in (inner, *inner.parents) if folder.is_relative_to(top)]


def _share_of_worker() -> list[int]:
    # Joblib tells its workers cores ÷ workers by the variables that thread pools read ("Avoiding over-subscription of
    # CPU resources" in its documentation); elsewhere those speak of other libraries.
    share = os.environ.get("OMP_NUM_THREADS", "")
    is_joblib = type(multiprocessing.current_process()).__name__ == "LokyProcess"
    return [int(share)] if is_joblib and share.isdigit() and int(share) else []
