"""The processes that the other ways run in, and fresh ones for nbfeat."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import REASON_SHOWN, MissingError
from tests.conftest import ROOT

FRESH = """
import time; start = time.perf_counter()
import nbfeat; imported = time.perf_counter() - start
from tests.benchmarks import once; once.main(start, imported)
"""
LONGEST = 900  # seconds: compiling takes minutes


class Child:
    """A process that measures ways; it starts when the first is asked for, and again where one has killed it."""

    def __init__(self, module: str = "others", python: str = sys.executable, **environment: str) -> None:
        self.command = [python, "-W", "ignore", "-m", f"tests.benchmarks.{module}"]
        self.environment = environment
        self.told: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

    def rate(self, way: str, files: list[str], **options: object) -> float:
        """Return images per second of one way; raise MissingError where it cannot run here."""
        answer = self._ask({"way": way, "files": files, **options})
        if "missing" in answer:
            raise MissingError(f"not installed: {answer['missing']}")
        if "failed" in answer:
            raise MissingError(f"failed: {answer['failed']}"[:REASON_SHOWN])
        self.told |= {name: value for name, value in answer.items() if name != "seconds"}
        return len(files) / float(answer["seconds"])

    def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                cwd=ROOT, env={**os.environ, **self.environment},
            )  # fmt: skip
        process = self._process
        assert process.stdin
        assert process.stdout
        timer = threading.Timer(LONGEST, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return dict(json.loads(line))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        self.close()
        return {"failed": f"its process ended with {process.returncode}"}

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()


def torch_child(folder: Path) -> Child:
    """Return the process for what PyTorch does, in the Python that NBFEAT_TORCH_PYTHON names, else in this one."""
    python = os.environ.get("NBFEAT_TORCH_PYTHON") or sys.executable
    return Child("others", python, TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"), TORCHINDUCTOR_FREEZING="1")


def fresh(request: dict[str, object], **environment: str) -> dict[str, Any]:
    """Run one extraction in a fresh process, as `once` takes it, and return what it tells."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(request)],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise RuntimeError(lines[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))
