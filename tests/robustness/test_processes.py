"""Runs that are killed, interrupted, or short of disk, memory or open files: right features or one clear error."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import nbfeat
from nbfeat import Extraction, ExtractionError
from tests.memory import IN_MEMORY
from tests.messages import assert_says_what_to_do
from tests.mutations import TIMES
from tests.robustness.tries import Trials, own_mounts, said_by

pytestmark = [
    pytest.mark.slow,
    pytest.mark.robustness,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="signals and limits of Linux"),
]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder in memory, where there is one: kills at random moments shall not all hit the disk."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # a process without threads can be forked
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        yield Path(name)


def swept(kind: str, count: int, folder: Path, trials: Trials, *words: str) -> Trials:
    """Do so many trials in a process that may have mounts of its own; assert that nothing was odd, and count them."""
    before = own_mounts() if words else ()
    said: dict[str, Any] = said_by(
        "tests.robustness.processes", kind, 0, count * TIMES, folder, *words, folder=folder, before=before
    )
    assert said["odd"] == []
    assert said["children"] == []
    found = Trials(said["outcomes"])
    assert found.total() == count * TIMES
    trials.update({f"{kind}: {outcome}": times for outcome, times in found.items()})
    return found


def test_a_run_killed_at_any_moment_goes_on(folder: Path, trials: Trials) -> None:
    found = swept("kill", 24, folder, trials)
    assert found["killed by SIGKILL"] + found["killed by SIGTERM"] > 0


def test_a_run_interrupted_at_any_moment_goes_on_in_the_same_process(folder: Path, trials: Trials) -> None:
    assert swept("interrupt", 24, folder, trials)["0 interrupts"] < 24 * TIMES


def test_a_full_disk_spoils_no_feature(folder: Path, trials: Trials) -> None:
    found = swept("disk", 20, folder, trials, *(["--mounts"] if own_mounts() else []))
    assert min(found["full"], found["enough"]) > 2


def test_a_full_temporary_folder_disturbs_no_run(folder: Path, trials: Trials) -> None:
    if not own_mounts():
        pytest.skip("mounts of one's own are not allowed here")
    swept("temporary", 5, folder, trials, "--mounts")


def test_few_open_files_and_little_memory_spoil_no_feature(folder: Path, trials: Trials) -> None:
    swept("limit", 24, folder, trials)


@pytest.mark.usefixtures("fake_network")
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread"), OSError(24, "open files")])
def test_a_process_without_room_is_told_so_and_goes_on(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    extraction = Extraction(photos, "MobileNet --size 32", images="path", cache=False)

    def start(_: threading.Thread) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(ExtractionError, match="ran out of memory, threads or open files") as told:
            extraction.run()
    assert_says_what_to_do(str(told.value))
    assert extraction.run().done == len(photos)


@pytest.mark.usefixtures("fake_network")
def test_an_image_that_could_not_be_opened_for_lack_of_files_has_not_failed(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    extraction = Extraction(photos, "MobileNet --size 32", images="path", parquet=tmp_path / "files")

    def read(_: Path) -> bytes:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        with pytest.raises(ExtractionError, match="open files"):
            extraction.run()
    assert extraction.run().failures.empty
    assert nbfeat.read(tmp_path / "files").ok.all()
