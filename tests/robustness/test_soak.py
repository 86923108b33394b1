"""A day of work in one shell leaves no thread, file, process, hook or widget, and takes no more memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mutations import TIMES
from tests.robustness.tries import Trials, said_by

pytestmark = [
    pytest.mark.slow,
    pytest.mark.robustness,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="memory is measured as Linux does"),
]
CONSTANT = (
    "threads", "files", "children", "temporary", "magics", "registry", "settings", "matchers", "events", "warnings",
    "widgets", "extensions",
)  # fmt: skip


def test_a_day_of_work_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: Trials) -> None:
    for name in ("home", "temporary", "work", "ipython"):
        (tmp_path / name).mkdir(mode=0o700)
    monkeypatch.setenv("NBFEAT_HOME", str(tmp_path / "home"))  # it clears networks, which other tests share
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # otherwise memory grows with threads that come and go, up to a limit
    said = said_by("tests.robustness.soak", 20 * TIMES, folder=tmp_path / "work")
    print(json.dumps(said))
    quarter, *_, end = said["states"].values()
    assert {name: end[name] for name in CONSTANT} == {name: quarter[name] for name in CONSTANT}
    grown = {kind: count for kind, count in end["objects"].items() if count > quarter["objects"].get(kind, 0) + 2}
    assert grown == {}
    assert end["bytes"] < quarter["bytes"] + 20_000_000
    trials.update({f"soak: {kind}": count for kind, count in said["done"].items()})
    assert trials.total() == 20 * TIMES
