"""A process that runs on a Ray cluster of its own, and tells what that left: ``cluster_child.py HOW FOLDER``.

HOW is ``through``, ``close`` or, where an interrupt comes, ``interrupt``, ``starting`` or ``stopping``.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

import nbfeat

LISTENS = "0A"  # a state of a socket, as the system writes it


def listening(processes: set[int]) -> list[str]:
    """Return the addresses that sockets of `processes` listen at, in hexadecimal, as in /proc."""
    own = set()
    for process in processes:
        with suppress(OSError):
            for file in Path(f"/proc/{process}/fd").iterdir():
                with suppress(OSError):
                    own.add(str(file.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENS and f"socket:[{words[9]}]" in own:
                found.add(words[1].partition(":")[0])
    return sorted(found)


def descendants() -> dict[int, str]:
    """Return the processes that this one started, and those that they started, with their command lines."""
    parents, told = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            status = (folder / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if status[0] != "Z":
                parents[int(folder.name)], told[int(folder.name)] = int(status[1]), command
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: told[pid] for pid in found - {os.getpid()}}


def statistics(processes: dict[int, str]) -> list[str]:
    """Return what each of `processes` of Ray was told about usage statistics."""
    told = set()
    for process in processes:
        with suppress(OSError):
            words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            told |= {word.decode() for word in words if word.startswith(b"RAY_USAGE_STATS_ENABLED=")} or {"nothing"}
    return sorted(told)


def interrupt_during(name: str) -> None:
    """Let an interrupt come while Ray does what its function `name` does, in the middle of it."""
    ray: Any = importlib.import_module("ray")
    do = getattr(ray, name)

    def interrupted(**options: Any) -> Any:
        thread = threading.Thread(target=wait_and_interrupt)
        thread.start()
        try:
            return do(**options)
        finally:
            thread.join()

    def wait_and_interrupt() -> None:
        while name == "init" and not descendants():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    setattr(ray, name, interrupted)


def main(how: str, folder: Path) -> dict[str, Any]:
    """Run, and tell."""
    warnings.simplefilter("ignore")
    if how in {"starting", "stopping"}:
        interrupt_during("init" if how == "starting" else "shutdown")
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    paths = sorted(map(str, folder.glob("*.png")))
    frame = pd.DataFrame({"path": paths * 100})
    extraction = nbfeat.Extraction(frame, "Pocket", precision="float32", on="ray", cache=False)
    told: dict[str, Any] = {"folders": []}
    steps = extraction.steps()
    try:
        for step in steps:
            if step.done and not told["folders"]:
                running = descendants()
                told |= {"listening": listening({os.getpid(), *running}), "statistics": statistics(running)}
                told["folders"] = sorted(set(re.findall(r"/\w+/nbfeat-\w+", " ".join(running.values()))))
                told["running"] = len(running)
                told["collecting"] = [command for command in running.values() if "UsageCollection" in command]
                told["collecting"] += [one.name for one in threading.enumerate() if "usage" in one.name]
                if how == "close":
                    break
                if how == "interrupt":
                    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    except KeyboardInterrupt:
        told["interrupted"] = True
    steps.close()
    told |= {"state": extraction.state, "done": extraction.done, "notes": extraction.notes}
    deadline = time.monotonic() + 20
    while descendants() and time.monotonic() < deadline:
        time.sleep(0.1)
    told["left"] = list(descendants().values())
    told["folders_left"] = [path for path in told["folders"] if Path(path).exists()]
    told["changed"] = sorted(f"{name}={value}" for name, value in {*os.environ.items()} ^ {*before.items()})
    told["restored"] = signal.getsignal(signal.SIGTERM) == handler
    if how == "through":
        here = nbfeat.extract(frame, "Pocket", precision="float32", cache=False)
        told["same"] = extraction.frame.equals(here.frame)
    return told


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
