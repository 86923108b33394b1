"""Processes that are killed, race each other or fill the disk: cached features are found again and are right."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import nbfeat
from nbfeat import paths
from nbfeat.inference.compiled_models import prepare
from nbfeat.inference.engines.openvino import BATCH
from tests.faces import same
from tests.fake import to_its_end

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="uses signals and limits of Linux")]
BLOCK = "MobileNet --alpha 0.25 --size 64 --weights random"
MANY = 5000
# There is one request in flight more than threads, and another batch is being filled.
DEPTH = len(os.sched_getaffinity(0)) + 2

PROGRAM = """
import sys, pandas as pd, nbfeat
frame, out = pd.read_pickle(sys.argv[1]), sys.argv[2]
extraction = nbfeat.Extraction(frame, sys.argv[3], images="path", precision="float32")
for step in extraction.steps():
    print(step.done, step.cached, flush=True)
extraction.features.to_pickle(out)
print(*extraction.notes, sep="\\n", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def photos(many: list[str]) -> pd.DataFrame:
    """Return a frame of 5,000 different images."""
    return pd.DataFrame({"path": many[:MANY]})


@pytest.fixture(scope="module")
def expected(photos: pd.DataFrame) -> pd.DataFrame:
    return nbfeat.extract(photos, BLOCK, images="path", cache=False).features


class Child:
    """A process that extracts and reports its progress after each step."""

    def __init__(self, frame: pd.DataFrame, folder: Path, name: str = "a", **options: Any) -> None:
        self.out = folder / f"{name} out.pickle"
        frame.to_pickle(folder / f"{name}.pickle")
        command = [sys.executable, "-W", "error", "-c", PROGRAM, str(folder / f"{name}.pickle"), str(self.out), BLOCK]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ, **options
        )

    def steps(self) -> list[tuple[int, int]]:
        """Read to the end and return the remaining (done, cached); a killed process may leave half a line."""
        out, self.said = self.process.communicate()
        whole = out[: out.rfind("\n") + 1]
        return [(int(done), int(cached)) for done, cached in map(str.split, whole.splitlines())]

    def until(self, wanted: Callable[[int, int], bool]) -> tuple[int, int]:
        """Read until `wanted` accepts (done, cached), or to the end; return the last pair."""
        assert self.process.stdout
        last = (0, 0)
        for line in self.process.stdout:
            done, cached = map(int, line.split())
            last = (done, cached)
            if wanted(*last):
                break
        return last

    def result(self) -> pd.DataFrame:
        assert self.process.returncode == 0, self.said
        frame = pd.read_pickle(self.out)  # noqa: S301 - written by this test
        assert isinstance(frame, pd.DataFrame)
        return frame


def test_a_process_killed_at_any_moment_costs_what_was_in_flight(
    photos: pd.DataFrame, expected: pd.DataFrame, tmp_path: Path
) -> None:
    chance, done = np.random.default_rng(0), 0
    for _ in range(20):
        child = Child(photos, tmp_path)
        _, kept = child.until(lambda done, cached: done > cached)
        assert kept >= done - 2 * BATCH * DEPTH
        target = kept + int(chance.integers(1, 230))
        at, _ = child.until(lambda done, _, target=target: done >= target)  # type: ignore[misc]
        time.sleep(chance.random() / 50)
        child.process.send_signal(signal.SIGKILL)
        steps = child.steps()
        done = steps[-1][0] if steps else at
    assert 1000 < done < MANY
    last = Child(photos, tmp_path)
    steps = last.steps()
    assert done - 2 * BATCH * DEPTH <= steps[-1][1] < MANY
    assert steps[-1][0] == MANY
    same(last.result(), expected)


def test_processes_at_once_are_all_right(photos: pd.DataFrame, expected: pd.DataFrame, tmp_path: Path) -> None:
    """Run six processes that all create the cache, and two with many images in common."""
    for frames in ([photos.iloc[:50]] * 6, [photos.iloc[:3500], photos.iloc[1500:]]):
        shutil.rmtree(nbfeat.storage.folder / "features", ignore_errors=True)
        children = [Child(frame, tmp_path, f"child {number}") for number, frame in enumerate(frames)]
        for frame, child in zip(frames, children, strict=True):
            child.steps()
            same(child.result(), expected.loc[frame.index])
            assert not child.said.strip(), "the cache had something to say"
    assert nbfeat.extract(photos, BLOCK, images="path").cached == MANY


def test_a_full_disk_stops_the_keeping_and_not_the_run(
    photos: pd.DataFrame, expected: pd.DataFrame, tmp_path: Path
) -> None:
    limit = 700_000  # bytes per file; beyond it, writing fails as on a full disk

    def set_limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    child = Child(photos.iloc[:600], tmp_path, preexec_fn=set_limit)
    output, said = child.process.communicate()
    assert "cannot be written" in said
    assert "features are no longer cached. Free some disk space" in said
    assert "600 0" in output, "every image was computed"
    again = nbfeat.extract(photos.iloc[:600], BLOCK, images="path")
    assert 50 < again.cached < 600
    same(again.features, expected.iloc[:600])


def test_networks_that_are_not_what_they_should_be_are_not_used(
    photos: pd.DataFrame, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that are half built, that don't match their hash, or that belong to another user."""
    (own_cache / "networks").unlink()
    old, new = (paths.keep("networks") / name for name in (".half-built", ".being-built"))
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    few = photos.iloc[:20]
    before = nbfeat.extract(few, BLOCK, images="path")
    assert not old.exists()
    assert new.exists()
    (weights,) = (own_cache / "networks").glob("*/network.bin")
    poisoned = bytearray(weights.read_bytes())
    poisoned[len(poisoned) // 2] ^= 1
    weights.write_bytes(poisoned)
    said, _ = to_its_end(prepare(before._run.networks[0].spec))
    assert [text for text in said if text.startswith("building")]
    same(nbfeat.extract(few, BLOCK, images="path", cache=False).features, before.features)
    assert weights.read_bytes() != poisoned
    monkeypatch.setattr(os, "getuid", lambda: 12_345)
    with pytest.raises(paths.HomeError, match="belongs to another user"):
        paths.keep("networks")
    after = nbfeat.extract(few, BLOCK, images="path")
    assert any("belongs to another user" in note and "only for this run" in note for note in after.notes)
    assert after.cached == 0
    same(after.features, before.features)
    assert str(own_cache) in after.notes[0]


STOPPED = """
import os, signal, threading
from nbfeat import Extraction
steps = Extraction.steps
def stopped(self):
    for number, step in enumerate(steps(self)):
        if number == 60:  # what Jupyter's stop button sends
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        yield step
Extraction.steps = stopped
"""


def test_an_interrupted_cell_says_how_to_go_on_and_goes_on(photos: pd.DataFrame, tmp_path: Path) -> None:
    photos.to_pickle(tmp_path / "many.pickle")
    cells = [
        "%load_ext nbfeat\nimport pandas as pd\nphotos = pd.read_pickle('many.pickle')",
        STOPPED,
        f"%extract photos {BLOCK} --images path",
        "'Run All did not stop'",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    with pytest.raises(CellExecutionError, match=r"of 5,000 images are saved"):
        client.execute()
    assert not notebook.cells[3].outputs
    again = [
        cells[0],
        cells[2].replace("%extract", "result = %extract"),
        "import json; print(json.dumps([result.cached, result.done, len(photos.columns)]))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in again])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cached, done, columns = json.loads(notebook.cells[2].outputs[0]["text"])
    assert 0 < cached < MANY
    assert (done, columns) == (MANY, 257)
