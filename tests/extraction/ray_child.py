"""A process that runs on its own Ray clusters, and reports what each left behind: ``ray_child.py FOLDER``.

The first run is interrupted while its cluster starts, the second one while its cluster stops, and the third one at
work.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

import nbfeat
from nbfeat import isolation

LISTENS = "0A"  # the state of a listening socket in /proc
NOBODY = 65534  # a user without rights
REACH = """
import os, socket, sys
os.setgroups([])
os.setgid(OTHER)
os.setuid(OTHER)  # now, because that user may not run this Python
ways = {
    "list": os.listdir,
    "read": lambda path: os.open(path, os.O_RDONLY | os.O_NONBLOCK),
    "create in": lambda path: os.mkdir(os.path.join(path, "mine")),
    "remove": os.unlink,
    "connect to": lambda path: socket.socket(socket.AF_UNIX).connect(path),
}
for path in sys.stdin.read().split(chr(0)):
    for name, way in ways.items():
        try:
            way(path)
        except OSError:
            continue
        print("can", name, path)
print("as", os.getuid())
""".replace("OTHER", str(NOBODY))  # the paths that this user can do something with


def listening(processes: set[int]) -> list[str]:
    """Return the addresses that sockets of `processes` listen on, in hexadecimal, as in /proc."""
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
    """Return all descendants of this process, with their command lines."""
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
    """Return the usage-statistics setting of each Ray process, and the processes that collect them."""
    told = {command for command in processes.values() if "UsageCollection" in command}
    told |= {one.name for one in threading.enumerate() if "usage" in one.name}
    for process in processes:
        with suppress(OSError):
            words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            told |= {word.decode() for word in words if word.startswith(b"RAY_USAGE_STATS_ENABLED=")} or {"nothing"}
    return sorted(told)


def reached(folders: list[str]) -> list[str]:
    """Return what another user can do with anything in `folders`; only root can ask as another."""
    if os.getuid():
        return []
    paths = [*folders, *(str(path) for folder in folders for path in Path(folder).rglob("*"))]
    asked = subprocess.run(
        [sys.executable, "-I", "-S", "-c", REACH], input="\0".join(paths), capture_output=True, text=True, check=True
    )
    return asked.stdout.splitlines()


def interrupted(name: str, ready: Callable[[], Any]) -> None:
    """Interrupt once while Ray is in its function `name`, as soon as it is `ready`."""
    ray: Any = importlib.import_module("ray")
    do = getattr(ray, name)

    def interrupt() -> None:
        while not ready():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    def done(**options: Any) -> Any:
        setattr(ray, name, do)
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            return do(**options)
        finally:
            thread.join()

    setattr(ray, name, done)


def run(extraction: nbfeat.Extraction, at_work: Callable[[], None]) -> dict[str, Any]:
    """Run, look at the cluster `at_work`, and report what existed and what is left."""
    told: dict[str, Any] = {"folders": [], "interrupted": False}
    before, handlers = dict(os.environ), [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    steps = extraction.steps()
    try:
        for step in steps:
            if step.done and not told["folders"]:
                running = descendants()
                told |= {"listening": listening({os.getpid(), *running}), "statistics": statistics(running)}
                told["folders"] = sorted(set(re.findall(r"/\w+/nbfeat-\w+", " ".join(running.values()))))
                told["modes"] = [stat.S_IMODE(Path(folder).stat().st_mode) for folder in told["folders"]]
                told |= {"running": len(running), "reached": reached(told["folders"])}
                at_work()
    except KeyboardInterrupt:
        told["interrupted"] = True
    steps.close()
    told |= {"state": extraction.state, "done": extraction.done, "notes": extraction.notes}
    told["left"] = [*descendants().values(), *(path for path in told["folders"] if Path(path).exists())]
    told["left"] += [f"{name}={value}" for name, value in {*os.environ.items()} ^ {*before.items()}]
    told["restored"] = handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return told


def main(folder: Path) -> list[dict[str, Any]]:
    """Run three times, and report on each."""
    warnings.simplefilter("ignore")
    with isolation.quiet_ray():  # imports Ray like a run does, before anything else here
        pass
    paths = sorted(map(str, folder.glob("*.png")))
    few, many = pd.DataFrame({"path": paths * 5}), pd.DataFrame({"path": paths * 100})
    asked: dict[str, Any] = {"precision": "float32", "on": "ray", "cache": False}
    goes_on = nbfeat.Extraction(few, "EfficientNetLite0 --size 32", **asked)
    interrupted("init", descendants)
    told = [run(goes_on, lambda: None)]
    interrupted("shutdown", lambda: True)
    told.append(run(goes_on, lambda: None))
    told[-1]["same"] = goes_on.run().frame.equals(
        nbfeat.extract(few, "EfficientNetLite0 --size 32", precision="float32").frame
    )
    soon = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    told.append(run(nbfeat.Extraction(many, "EfficientNetLite0 --size 32", **asked), soon.start))
    return told


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
