"""Odd interpreters and processes: flags, limits, closed streams, no shared memory, full disks: the same features."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.mutations import TIMES
from tests.robustness.tries import Trials, own_mounts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.robustness,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="limits and streams of Linux"),
]
REAL = "MobileNet --alpha 0.25 --weights random --size 32"
FLAGS: dict[str, list[str]] = {
    "plain": [], "-O": ["-O"], "-OO": ["-OO"], "-I": ["-I"], "-W error": ["-W", "error"], "-X dev": ["-X", "dev"],
    "-E": ["-s", "-E"],
}  # fmt: skip
# What a shell does before it becomes the interpreter; those with a mount need mounts of their own.
SHELL: dict[str, str] = {
    "nothing": "",
    "32 open files": "ulimit -n 32",
    "64 open files": "ulimit -n 64",
    "a small stack": "ulimit -s 256",
    "4 GB of addresses": "ulimit -v 4000000",
    "no stdin": "exec 0<&-",
    "no stdout": "exec 1>&-",
    "no stderr": "exec 2>&-",
    "no streams": "exec 0<&- 1>&- 2>&-",
    "a full stdout": "exec >/dev/full 2>&1",
    "no core files, low priority": "ulimit -c 0; renice -n 19 $$ >/dev/null",
    "ASCII": "export LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0",
    "warnings are errors": "export PYTHONWARNINGS=error",
    "no home": "unset HOME; export XDG_CACHE_HOME=",
    "no shared memory": "mount -t tmpfs -o ro,size=4k none /dev/shm",
    "a full temporary folder": "mount -t tmpfs -o size=4k none $TMPDIR; cat /dev/zero >$TMPDIR/full 2>/dev/null",
    "a temporary folder that isn't": "export TMPDIR=/nonexistent",
    "a full home": 'mkdir -p "$NBFEAT_HOME"; mount -t tmpfs -o size=500k,mode=700 none "$NBFEAT_HOME"',
}
FOUND = ("32 open files", "a small stack", "no streams", "no shared memory", "a full temporary folder")
BUILDS = ("a full home", "a full temporary folder", "64 open files", "no streams", "warnings are errors", "-O", "-I")


def ran(folder: Path, block: str, pictures: Path, before: str, flags: list[str], **environment: str) -> dict[str, Any]:
    """Run `interpreters.py` after a shell command, and return what it wrote."""
    folder.mkdir()
    (folder / "temporary").mkdir()
    out, images = folder / "out.json", sorted(map(str, pictures.glob("*.png")))[:9]
    # `-I` looks for no modules in the environment, so it is told where the tests are.
    places = os.environ["PYTHONPATH"].split(os.pathsep)
    code = f"import sys; sys.path[:0] = {places!r}; from tests.robustness import interpreters; interpreters.main()"
    command = [sys.executable, *flags, "-c", code, str(out), block, *images]
    command = [*own_mounts(), "bash", "-c", f'{before}\nexec "$@"', "bash", *command]
    own = {"TMPDIR": str(folder / "temporary"), "NBFEAT_HOME": str(folder / "home"), **environment}
    done = subprocess.run(
        command, env={**os.environ, **own}, capture_output=True, text=True, cwd=folder, check=False, timeout=240
    )
    assert out.exists(), f"ended with {done.returncode}: {done.stderr[-3000:]}"
    said: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    left = [name for name in os.listdir(folder / "temporary") if name != "full"]
    assert left == [], "left in the temporary folder"
    return said


def check(said: dict[str, Any], right: dict[str, Any], trials: Trials, kind: str) -> None:
    """Assert that these are the right features, or one clear error."""
    if "error" in said:
        assert said["error"].splitlines() == [said["error"]]
        trials[f"{kind}: an error"] += 1
    else:
        assert said["features"] == right["features"]
        assert said["same"], "other features in files"
        trials[f"{kind}: right"] += 1


def test_odd_interpreters_give_the_same_features(pictures: Path, tmp_path: Path, trials: Trials) -> None:
    right = ran(tmp_path / "right", "FAKE", pictures, "", [])
    chosen = [("nothing", "-O"), ("nothing", "-I"), ("nothing", "-W error"), ("no streams", "plain")]
    others = [(name, flag) for name in SHELL for flag in FLAGS if "mount" not in SHELL[name] or own_mounts()]
    random.Random(TIMES).shuffle(others)
    chosen = list(dict.fromkeys([*chosen, *others]))[: 8 * TIMES]
    for number, (name, flag) in enumerate(chosen):
        said = ran(tmp_path / str(number), "FAKE", pictures, SHELL[name], FLAGS[flag])
        check(said, right, trials, "odd interpreters")
        if name != "32 open files":
            assert "error" not in said, (name, flag, said)
    assert trials.total() == len(chosen)


def test_odd_processes_build_and_run_a_real_network(pictures: Path, tmp_path: Path, trials: Trials) -> None:
    """Run first one that builds the network; later ones find it in their home, or build it in spite of it all."""
    right = ran(tmp_path / "right", REAL, pictures, "", [])
    home = str(tmp_path / "right" / "home")
    cases = [(name, {"NBFEAT_HOME": home}) for name in (FOUND if TIMES > 1 else FOUND[:2])]
    cases += [(name, {}) for name in (BUILDS if TIMES > 1 else BUILDS[:1])]
    for number, (name, environment) in enumerate(cases):
        before, flags = SHELL.get(name, ""), FLAGS.get(name, [])
        if "mount" not in before or own_mounts():
            said = ran(tmp_path / str(number), REAL, pictures, before, flags, **environment)
            check(said, right, trials, "odd processes that build" if not environment else "odd processes")
            assert name != "a full home" or "error" not in said, said  # it is built in the temporary folder
    assert trials.total() >= (9 if TIMES > 1 else 2)
