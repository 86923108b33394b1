"""How many trials, of what chance, and processes that tell what came of theirs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings, strategies as some

from tests.mutations import TIMES

Trials = Counter[str]  # by outcome
CHANCE = some.integers(0, 1 << 40).map(random.Random)


def tries(count: int) -> settings:
    """Return settings of so many examples, the same each time."""
    return settings(
        max_examples=count * TIMES, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


def said_by(module: str, *words: object, folder: Path, before: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a module of the tests in a process of its own, and return what it says; where that dies, say of what."""
    done = subprocess.run(
        [*before, sys.executable, "-m", module, *map(str, words)], cwd=folder, capture_output=True, check=False,
        timeout=300 * TIMES,
    )  # fmt: skip
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr.decode(errors='replace')[-3000:]}"
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@cache
def own_mounts() -> tuple[str, ...]:
    """Return what a command starts with to have mounts of its own; nothing where that isn't allowed."""
    command = ("unshare", "--mount") if os.name == "posix" and not os.getuid() else ("unshare", "-r", "--mount")
    try:
        test = [*command, "mount", "-t", "tmpfs", "none", "/mnt"]
        subprocess.run(test, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return command
