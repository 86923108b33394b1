"""Count the cores that this process may use: its CPU affinity, its cgroup quotas and its share as a worker."""

import math
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.dummy import DummyProcess
from pathlib import Path

ROOT, GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """Count the cores that this process may use, at least one; a fraction of a core counts as one."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    limits = [cores, *map(math.ceil, quotas()), *_taken]
    # Joblib sets it to cores ÷ workers in its workers; in other processes the variable is meant for other libraries.
    share = os.environ.get("OMP_NUM_THREADS", "")
    if type(multiprocessing.current_process()).__name__ == "LokyProcess" and share.isdigit() and int(share):
        limits.append(int(share))
    # Joblib's threading backend has a pool of such threads, which ends with its work.
    pool = [thread for thread in threading.enumerate() if isinstance(thread, DummyProcess)]
    return max(1, min(limits) // (len(pool) if threading.current_thread() in pool else 1))


_taken: list[int] = []


def take(share: int) -> None:
    """Limit this process to its `share` of the cores, because other workers use the rest."""
    _taken[:] = [share]


def quotas(root: Path = ROOT, groups: Path = GROUPS) -> Iterator[float]:
    """Yield the core quotas of this process's control groups and of their parents, for cgroup v1 and v2."""
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
    lines: list[list[str]] = []
    with suppress(OSError):
        lines = [line.split(":", 2) for line in groups.read_text(encoding="utf-8").splitlines()]
    paths = {kind: path for _, kinds, path in lines for kind in kinds.split(",")}
    top = root / kind
    inner = top / paths.get(kind, "/").lstrip("/")
    return [folder for folder in (inner, *inner.parents) if folder.is_relative_to(top)]
