"""Runs that are killed, interrupted or short of room: ``python -m tests.robustness.processes KIND FIRST COUNT FOLDER``.

One process imports everything and forks a child for each run. It prints how each trial ended, and what was odd, as
JSON.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

import nbfeat
from nbfeat import Extraction, NbfeatError
from nbfeat.extraction import sink
from nbfeat.inference import prepared
from tests.fake import FakeNetwork
from tests.memory import bytes_of
from tests.messages import assert_says_what_to_do

END = "MobileNet --size 32"
STANDARD = f"{END} --normalize standard"
IMAGES, ROWS_OF_A_FILE, BATCH = 36, 9, 3
# Blocks, and whether features go to files and to the cache.
RUNS: dict[str, tuple[list[str], bool, bool]] = {
    "cache": ([END, f"{END} --layer x --pooling max"], False, True),
    "files": ([END], True, False),
    "fitted": ([STANDARD], True, False),
    "both": ([END, f"{END} --layer x"], True, True),
}
LONGEST = 60.0  # seconds of a run, which takes a few hundredths of one
MB = 1_000_000
IMPORTED_IN_RUNS = ("sklearn.preprocessing", "sklearn.decomposition", "pyarrow.parquet", "filelock", "platformdirs")
Outcome = dict[str, Any]


class Place:
    """A home, a folder of files and a temporary folder of one trial."""

    def __init__(self, top: Path) -> None:
        self.top, self.home, self.files = top, top / "home", top / "files"
        self.temporary, self.out = top / "temporary", top.with_name(f"{top.name}.npy")
        for folder in (top, self.home, self.temporary):
            folder.mkdir(mode=0o700, exist_ok=True)

    def left(self) -> list[str]:
        """Return what a finished run should not have left."""
        here = sorted(str(path.relative_to(self.top)) for path in self.top.rglob("*") if path.is_file())
        return [name for name in here if not name.startswith("files/part-") and not name.endswith(".sqlite")]


def run_once(place: Place, kind: str, frame: pd.DataFrame, *, goes_on: bool = False) -> Outcome:
    """Extract features in this process, and save them; with `goes_on`, again after each interrupt."""
    os.environ["NBFEAT_HOME"] = str(place.home)
    tempfile.tempdir = str(place.temporary)
    blocks, to_files, to_cache = RUNS[kind]
    files = place.files if to_files else None
    extraction = Extraction(frame, *blocks, images="path", batch_size=BATCH, parquet=files, cache=to_cache)
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            Armed.is_on = goes_on
            extraction.run()
            Armed.is_on = False
            break
    gc.collect()  # the traceback of an interrupt may be in a cycle, and hold a connection to the cache
    result = nbfeat.read(place.files) if to_files else extraction
    features, threads = result.features.to_numpy(), [one.name for one in threading.enumerate()][1:]
    lift_limits()
    np.save(place.out, features)
    counts = {"done": extraction.done, "cached": extraction.cached, "interrupts": Armed.count}
    reasons = extraction.failures["reason"].tolist()
    return {**counts, "notes": extraction.notes, "threads": threads, "reasons": reasons}


class Armed:
    """Raises KeyboardInterrupt for a signal, as Python does, but only during a run."""

    is_on, count = False, 0

    def __init__(self, *_: object) -> None:
        if Armed.is_on:
            Armed.is_on, Armed.count = False, Armed.count + 1
            raise KeyboardInterrupt


class Child:
    """A process that does `work`, forked from this one."""

    def __init__(self, work: Callable[[], Outcome]) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self._told(work, write)
        os.close(write)
        assert os.read(self._read, 1) == b"!", "the child didn't begin"

    def _told(self, work: Callable[[], Outcome], write: int) -> None:
        try:
            os.close(self._read)
            signal.signal(signal.SIGINT, Armed)
            os.write(write, b"!")
            try:
                outcome = work()
            except NbfeatError as error:
                assert_says_what_to_do(str(error))
                outcome = {"error": type(error).__name__, "message": str(error)}
            os.write(write, json.dumps(outcome).encode())
        except BaseException:  # whatever it is, it is odd
            lift_limits()
            with contextlib.suppress(BaseException):
                os.write(write, json.dumps({"odd": traceback.format_exc()[-3000:]}).encode())
        finally:
            os._exit(0)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)  # it is not yet waited for, so nobody else has its id

    def end(self) -> Outcome:
        """Wait; return what it told, or the signal that killed it."""
        said, end = b"", time.monotonic() + LONGEST
        while select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
            if not (some := os.read(self._read, 1 << 16)):
                break
            said += some
        else:
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._read)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            return {"killed": os.WTERMSIG(status)}
        return json.loads(said) if said else {"odd": "it said nothing"}


class Sweep:
    """Trials of a kind, and what came of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes, self.odd = Counter[str](), list[str]()
        pixels = np.random.default_rng(0).integers(0, 255, (IMAGES, 8, 8, 3), dtype=np.uint8)
        pixels[7], pixels[20] = pixels[30], pixels[3]  # copies share their features
        paths = [str(folder / f"{number:02d}.bmp") for number in range(IMAGES)]
        for path, image in zip(paths, pixels, strict=True):
            Image.fromarray(image).save(path)
        paths[11] = str(folder / "gone.png")
        self.frame = pd.DataFrame({"path": paths, "number": np.arange(IMAGES)})
        self.right: dict[str, np.ndarray] = {}
        self.seconds: dict[str, float] = {}
        for kind in RUNS:
            for number in range(2):  # the first one takes longer
                place = Place(folder / f"right {kind} {number}")
                start = time.perf_counter()
                outcome = self.child(place, kind).end()
                self.seconds[kind] = time.perf_counter() - start
                self.check(f"undisturbed {kind}", outcome, place, kind, is_last=True)
            self.right[kind] = np.load(place.out)

    def child(self, place: Place, kind: str, before: Callable[[], object] = bool, *, goes_on: bool = False) -> Child:
        def work() -> Outcome:
            before()
            return run_once(place, kind, self.frame, goes_on=goes_on)

        return Child(work)

    def check(self, name: str, outcome: Outcome, place: Place, kind: str, *, is_last: bool = False) -> None:
        """Note what is odd about an outcome: only right features, or an error that is clear, aren't."""
        problem = ""
        if odd := outcome.get("odd"):
            problem = odd
        elif "done" in outcome:
            made = np.load(place.out)
            right = self.right.get(kind, made)
            rows = ~np.isnan(made).all(axis=1)
            if made.shape != right.shape or not np.array_equal(made[rows], right[rows]):
                problem = "wrong features"
            elif rows.sum() + len(outcome["reasons"]) != IMAGES:
                problem = f"{IMAGES - rows.sum()} rows without features, reasons {outcome['reasons']}"
            elif outcome["threads"]:
                problem = f"threads {outcome['threads']}"
            elif is_last and (left := place.left()):
                problem = f"left {left}"
            elif is_last and len(outcome["reasons"]) != 1:
                problem = f"failures {outcome['reasons']}"
        elif is_last:
            problem = f"it didn't finish: {outcome}"
        if problem:
            self.odd.append(f"{name}: {problem}")

    def goes_on(self, name: str, place: Place, kind: str) -> None:
        """Run once more without disturbance, which finishes the work, and remove the place."""
        self.check(f"{name}, then undisturbed", self.child(place, kind).end(), place, kind, is_last=True)
        shutil.rmtree(place.top)
        place.out.unlink(missing_ok=True)


def lift_limits() -> None:
    """Set the soft limits of this process to the hard ones."""
    for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_AS):
        limited(what, resource.getrlimit(what)[1])


def limited(what: int, most: int) -> None:
    """Set a limit of this process, which can be lifted again."""
    resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def kill(sweep: Sweep, name: str, chance: random.Random) -> str:
    """Kill runs one after the other at random moments, in whatever the one before left."""
    kind, place = chance.choice(list(RUNS)), Place(sweep.folder / name)
    number, outcome = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]), ""
    for _ in range(chance.randrange(1, 4)):
        child = sweep.child(place, kind)
        time.sleep(chance.random() * sweep.seconds[kind])
        child.signal(number)
        found = child.end()
        outcome = outcome or ("finished before" if "done" in found else f"killed by {number.name}")
        sweep.check(name, found, place, kind)
    sweep.goes_on(name, place, kind)
    return outcome


def interrupt(sweep: Sweep, name: str, chance: random.Random) -> str:
    """Interrupt a run several times at random moments; it goes on in the same process."""
    kind, place = chance.choice(list(RUNS)), Place(sweep.folder / name)
    child = sweep.child(place, kind, goes_on=True)
    for _ in range(chance.randrange(1, 6)):
        time.sleep(chance.random() * sweep.seconds[kind])
        child.signal(signal.SIGINT)
    found = child.end()
    sweep.check(name, found, place, kind, is_last=True)
    sweep.goes_on(name, place, kind)
    return f"{min(found.get('interrupts', 0), 3)} interrupts"


def disk(sweep: Sweep, name: str, chance: random.Random) -> str:
    """Run on a full disk, and once there is room again: in a small file system, or with a limit on files."""
    kind, top = chance.choice(list(RUNS)), sweep.folder / name
    size, is_mounted = int(2 ** chance.uniform(12, 19)), "--mounts" in sys.argv
    top.mkdir()
    if is_mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", top], check=True)
    with contextlib.suppress(OSError):
        place = Place(top)
        limit = lambda: None if is_mounted else limited(resource.RLIMIT_FSIZE, size)
        found = sweep.child(place, kind, limit).end()
        sweep.check(name, found, place, kind)
    if is_mounted:
        subprocess.run(["mount", "-o", f"remount,size={100 * MB}", top], check=True)
    again = sweep.child(place, kind).end()
    sweep.check(f"{name}, with room", again, place, kind, is_last=True)
    if is_mounted:
        subprocess.run(["umount", top], check=True)
    shutil.rmtree(top)
    full = "error" in found or any("Free some" in note for note in found.get("notes", ()))
    return "full" if full else "enough"


def full_temporary(sweep: Sweep, name: str, chance: random.Random) -> str:
    """Run with a temporary folder that is full."""
    kind, place = chance.choice(list(RUNS)), Place(sweep.folder / name)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "none", place.temporary], check=True)
    with contextlib.suppress(OSError):
        (place.temporary / "full").write_bytes(bytes(4096))
    sweep.check(name, sweep.child(place, kind).end(), place, kind)
    subprocess.run(["umount", place.temporary], check=True)
    sweep.goes_on(name, place, kind)
    return "ran"


def limit(sweep: Sweep, name: str, chance: random.Random) -> str:
    """Run with few open files or little memory."""
    kind, place = chance.choice(list(RUNS)), Place(sweep.folder / name)
    what = chance.choice(["files", "memory"])
    open_now = len(os.listdir("/proc/self/fd"))
    size = bytes_of("VmSize") + int(chance.uniform(0, 120) * MB)

    def before() -> None:
        if what == "files":
            most = max(32, open_now + 5) if chance.random() < 0.5 else open_now + chance.randrange(16)
            limited(resource.RLIMIT_NOFILE, most)
        else:
            limited(resource.RLIMIT_AS, size)

    found = sweep.child(place, kind, before).end()
    sweep.check(f"{name} ({what})", found, place, kind)
    if len(found.get("reasons", ())) > 1:  # files keep the reasons, as the user does who doesn't delete them
        shutil.rmtree(place.files, ignore_errors=True)
    sweep.goes_on(name, place, kind)
    ended = "an error" if "error" in found else "failures" if len(found.get("reasons", ())) > 1 else "right"
    return f"{what}: {ended}"


TRIALS: dict[str, Callable[[Sweep, str, random.Random], str]] = {
    "kill": kill, "interrupt": interrupt, "disk": disk, "temporary": full_temporary, "limit": limit,
}  # fmt: skip


def main(kind: str, first: int, count: int, folder: Path) -> None:
    """Do so many trials, each of its own number, and print what came of them."""
    prepared.PreparedNetwork = FakeNetwork  # type: ignore[misc,assignment]
    sink.MOST_ROWS = ROWS_OF_A_FILE
    for module in IMPORTED_IN_RUNS:
        importlib.import_module(module)
    sweep = Sweep(folder)
    for number in range(first, first + count):
        name = f"{kind} {number}"
        sweep.outcomes[TRIALS[kind](sweep, name, random.Random(name))] += 1
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    print(json.dumps({"outcomes": sweep.outcomes, "odd": sweep.odd, "children": children}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
