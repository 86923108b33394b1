"""A job in every state and at every transition; a gate in the pretended network makes each moment last."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell

from nbfeat import Extraction, ExtractionError
from nbfeat.jupyter.job import FrameSnapshot, Job, State, between_cells, is_running_a_cell
from tests.fake import FakeEngine, Gate

BLOCK = "MobileNet --size 32"
pytestmark = pytest.mark.usefixtures("fake_network")


class Watched:
    """A job, what it bound, and its states, in order, each once."""

    def __init__(self, extraction: Extraction, **options: Any) -> None:
        self.states: list[State] = []
        self.bound: list[Extraction] = []
        self.moved = threading.Condition()
        options = {"bind": self.bound.append, "schedule": lambda work: work(), **options}
        self.job = Job(extraction, notify=self._notified, **options)

    def _notified(self) -> None:
        with self.moved:
            if self.states[-1:] != [self.job.state]:
                self.states.append(self.job.state)
            self.moved.notify_all()

    def until(self, done: Callable[[], bool]) -> None:
        with self.moved:
            assert self.moved.wait_for(done, 30)


@pytest.fixture
def extraction(photos: pd.DataFrame) -> Extraction:
    return Extraction(photos, BLOCK, images="path", batch_size=4)


def test_cancelling_asks_for_no_further_step_and_going_on_computes_only_the_rest(
    extraction: Extraction, gate: Gate
) -> None:
    watched = Watched(extraction)
    job = watched.job
    assert job.state is State.IDLE
    job.cancel()
    assert not watched.states
    job.start()
    job.start()  # it is at work already
    gate.let(1)
    watched.until(lambda: job.step is not None and job.step.done == 4)
    job.cancel()
    assert watched.states == [State.RUNNING, State.CANCELLING]
    assert not job.wait(0)
    gate.open()
    assert job.wait(30)
    assert watched.states[2:] == [State.CANCELLED]
    assert extraction.state == "stopped"
    assert 4 <= extraction.done < 20
    job.start()
    assert job.wait(30)
    job.cancel()  # it is not running
    assert watched.states[3:] == [State.RUNNING, State.DONE]
    assert watched.bound == [extraction]
    assert "20 rows" in job.coming
    assert FakeEngine.computed <= 20 + 2 * 4, "more was computed again than what was in flight"


def test_cancelled_before_it_is_bound_nothing_is_bound(extraction: Extraction) -> None:
    waiting: list[Callable[[], None]] = []
    watched = Watched(extraction, schedule=waiting.append)
    job = watched.job
    job.start()
    watched.until(lambda: job.is_binding)
    job.cancel()
    waiting.pop()()
    assert job.wait(30)
    assert job.state is State.CANCELLED
    assert not watched.bound
    job.start()  # everything is computed: only the binding is left
    watched.until(lambda: bool(waiting))
    waiting.pop()()
    assert watched.bound == [extraction]
    assert FakeEngine.computed == 20


@pytest.mark.parametrize("end", ["assert not done", "1 / 0"])
def test_work_waits_for_the_end_of_the_running_cell(notebook: InteractiveShell, end: str) -> None:
    done: list[bool] = []
    work = lambda: between_cells(notebook, lambda: done.append(is_running_a_cell(notebook)))
    notebook.user_ns |= {"work": work, "done": done}
    assert notebook.run_cell(f"work(); {end}").success is ("assert" in end)
    assert done == [False]
    work()
    assert done == [False, False]
    assert not [one for one in notebook.events.callbacks["post_run_cell"] if one.__name__ == "once"]


# What happens to the frame in the meantime

Held = tuple[dict[str, Any], Callable[[], None], Extraction]


def hold(photos: pd.DataFrame) -> Held:
    """Extract from a snapshot of the frame, and return the names of the notebook and what binds the result."""
    names: dict[str, Any] = {"photos": photos}
    snapshot = FrameSnapshot("photos", photos.copy(deep=False), "photos")
    extraction = Extraction(snapshot.frame, BLOCK, images="path")
    return names, lambda: snapshot.bind(extraction, names, replace=False), extraction


def test_a_column_that_was_added_meanwhile_is_kept(photos: pd.DataFrame) -> None:
    photos["path"] = photos["path"].astype(object)
    photos.iloc[3:5, 0] = [None, b"no image"]  # which are compared, too
    names, bind, extraction = hold(photos)
    extraction.run()
    names["photos"] = old = photos.copy().assign(new=1)
    old.iloc[3, 0] = float("nan")  # as missing as before
    bind()
    assert list(names["photos"].columns) == ["path", "label", "split", "new", *extraction.columns]
    assert names["photos"] is not old
    assert list(old.columns) == ["path", "label", "split", "new"]


def test_features_never_come_to_stand_beside_other_images(photos: pd.DataFrame) -> None:
    names, bind, extraction = hold(photos)
    extraction.run()
    for change in (
        lambda frame: frame.iloc[::-1],
        lambda frame: frame.iloc[:10],
        lambda frame: frame.assign(path=list(frame["path"])[::-1]),
        lambda frame: frame.drop(columns="path"),
        lambda frame: frame.reset_index(),
    ):
        names["photos"] = changed = change(photos.copy())
        with pytest.raises(ExtractionError, match="have changed, so nothing was attached"):
            bind()
        assert names["photos"] is changed
    names["photos"] = 7
    with pytest.raises(ExtractionError, match="photos now has type int"):
        bind()
    del names["photos"]
    with pytest.raises(ExtractionError, match="photos no longer exists"):
        bind()
    assert names == {}


def test_sorting_in_place_meanwhile_mixes_nothing_up(photos: pd.DataFrame) -> None:
    _, bind, extraction = hold(photos)
    backwards = photos.iloc[::-1].copy()
    photos.index = backwards.index  # as sorting in place does
    photos["path"] = list(backwards["path"])
    extraction.run()
    assert list(extraction.frame.index) == [f"row {number}" for number in range(20)]
    with pytest.raises(ExtractionError, match="nothing was attached"):
        bind()
