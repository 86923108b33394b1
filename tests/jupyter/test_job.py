"""A job in every state and at every transition; a gate in the pretended network makes each moment last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell

from nbfeat import Extraction, ExtractionError
from nbfeat.jupyter.binding import FrameSnapshot, between_cells, is_running_a_cell
from nbfeat.jupyter.job import Job, State
from tests.fake import FakeEngine, Gate

BLOCK = "MobileNet --size 32"
pytestmark = pytest.mark.usefixtures("fake_network")


class Told:
    """What a job told: its states, in order, each once."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.job: Job | None = None
        self.steps = 0
        self.moved = threading.Condition()

    def __call__(self) -> None:
        assert self.job is not None
        with self.moved:
            if not self.states or self.states[-1] is not self.job.state:
                self.states.append(self.job.state)
            self.steps = self.job.step.done if self.job.step else 0
            self.moved.notify_all()

    def until(self, done: Callable[[], bool]) -> None:
        with self.moved:
            assert self.moved.wait_for(done, 30)


def job_of(extraction: Extraction, bind: Callable[[Extraction], None] = lambda _: None) -> tuple[Job, Told]:
    told = Told()
    told.job = job = Job(extraction, bind=bind, schedule=lambda work: work(), notify=told)
    return job, told


@pytest.fixture
def extraction(photos: pd.DataFrame) -> Extraction:
    return Extraction(photos, BLOCK, images="path", batch_size=4)


def test_a_job_runs_to_its_end_in_a_thread_of_its_own(extraction: Extraction) -> None:
    bound: list[Extraction] = []
    job, told = job_of(extraction, bound.append)
    assert job.state is State.IDLE
    job.start()
    assert job.wait(30)
    assert told.states == [State.RUNNING, State.DONE]
    assert bound == [extraction]
    assert job.step is not None
    assert job.step.done == 20
    assert "20 rows" in job.coming


def test_cancelling_asks_for_no_further_step_and_going_on_computes_only_the_rest(
    extraction: Extraction, gate: Gate
) -> None:
    job, told = job_of(extraction)
    job.start()
    gate.let(1)
    told.until(lambda: told.steps == 4)
    job.cancel()
    assert told.states[-1:] == [State.CANCELLING]
    assert not job.wait(0)
    gate.open()
    assert job.wait(30)
    assert told.states[-1:] == [State.CANCELLED]
    assert extraction.state == "stopped"
    assert 4 <= extraction.done < 20
    job.start()
    assert job.wait(30)
    assert told.states == [State.RUNNING, State.CANCELLING, State.CANCELLED, State.RUNNING, State.DONE]
    assert FakeEngine.computed <= 20 + 2 * 4, "more was computed again than what was in flight"


def test_only_what_runs_can_be_cancelled_and_only_what_does_not_can_be_started(
    extraction: Extraction, gate: Gate
) -> None:
    job, told = job_of(extraction)
    job.cancel()
    assert not told.states
    job.start()
    job.start()
    gate.open()
    assert job.wait(30)
    job.cancel()
    assert told.states == [State.RUNNING, State.DONE]


def test_what_goes_wrong_is_kept_to_be_shown(photos: pd.DataFrame, extraction: Extraction) -> None:
    job, _ = job_of(Extraction(photos.assign(path="gone.png"), BLOCK, images="path"))
    job.start()
    assert job.wait(30)
    assert job.state is State.FAILED
    assert isinstance(job.error, ExtractionError)

    def refuse(_: Extraction) -> None:
        raise ExtractionError("no such name any more")

    job, told = job_of(extraction, refuse)
    job.start()
    assert job.wait(30)
    assert told.states == [State.RUNNING, State.FAILED]
    assert str(job.error) == "no such name any more"


def test_an_error_that_nobody_thought_of_is_shown_too(extraction: Extraction, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: FakeEngine) -> None:
        raise OSError("a wire is loose")

    monkeypatch.setattr(FakeEngine, "collect", broken)
    job, _ = job_of(extraction)
    job.start()
    assert job.wait(30)
    assert job.state is State.FAILED
    assert isinstance(job.error, OSError)


def test_cancelled_before_it_is_bound_nothing_is_bound(extraction: Extraction) -> None:
    bound: list[Extraction] = []
    waiting: list[Callable[[], None]] = []
    told = Told()
    told.job = job = Job(extraction, bind=bound.append, schedule=waiting.append, notify=told)
    job.start()
    told.until(lambda: job.is_binding)
    job.cancel()
    waiting.pop()()
    assert job.wait(30)
    assert job.state is State.CANCELLED
    assert not bound
    job.start()  # everything is computed: only the binding is left
    told.until(lambda: bool(waiting))
    waiting.pop()()
    assert bound == [extraction]
    assert FakeEngine.computed == 20


# Between cells


@pytest.fixture
def notebook(shell: InteractiveShell) -> Iterator[InteractiveShell]:
    shell.reset(new_session=False)
    yield shell
    assert not [one for one in shell.events.callbacks["post_run_cell"] if one.__name__ == "once"]


def test_work_waits_for_the_end_of_the_running_cell(notebook: InteractiveShell) -> None:
    done: list[bool] = []
    notebook.user_ns["ask"] = lambda: between_cells(notebook, lambda: done.append(is_running_a_cell(notebook)))
    notebook.user_ns["done"] = done
    assert notebook.run_cell("ask(); assert not done").success
    assert done == [False]
    between_cells(notebook, lambda: done.append(is_running_a_cell(notebook)))
    assert done == [False, False]


def test_work_waits_for_a_cell_that_fails_too(notebook: InteractiveShell) -> None:
    done: list[int] = []
    notebook.user_ns["ask"] = lambda: between_cells(notebook, lambda: done.append(1))
    notebook.run_cell("ask(); 1 / 0")
    assert done == [1]


# What the frame has become meanwhile


@pytest.fixture
def held(photos: pd.DataFrame) -> tuple[dict[str, object], FrameSnapshot, Extraction]:
    names: dict[str, object] = {"photos": photos}
    held = FrameSnapshot.of("photos", names)
    return names, held, Extraction(held.frame, BLOCK, images="path").run()


def test_a_column_that_was_added_meanwhile_is_kept(
    held: tuple[dict[str, pd.DataFrame], FrameSnapshot, Extraction],
) -> None:
    names, hold, extraction = held
    old = names["photos"]
    names["photos"]["new"] = 1
    hold.bind(extraction, names, replace=False)
    assert list(names["photos"].columns) == ["path", "label", "split", "new", *extraction.columns]
    assert names["photos"] is not old
    assert list(old.columns) == ["path", "label", "split", "new"]


def test_features_never_come_to_stand_beside_other_images(
    held: tuple[dict[str, pd.DataFrame], FrameSnapshot, Extraction],
) -> None:
    names, hold, extraction = held
    photos = names["photos"]
    for change in (
        lambda frame: frame.iloc[::-1],
        lambda frame: frame.iloc[:10],
        lambda frame: frame.assign(path=list(frame["path"])[::-1]),
        lambda frame: frame.drop(columns="path"),
        lambda frame: frame.reset_index(),
    ):
        names["photos"] = changed = change(photos.copy())
        with pytest.raises(ExtractionError, match="not those that were read, so nothing was bound"):
            hold.bind(extraction, names, replace=False)
        assert names["photos"] is changed


def test_sorting_in_place_meanwhile_mixes_nothing_up(photos: pd.DataFrame) -> None:
    names = {"photos": photos}
    hold = FrameSnapshot.of("photos", names)
    extraction = Extraction(hold.frame, BLOCK, images="path")
    backwards = photos.iloc[::-1].copy()
    photos.index = backwards.index  # as sorting in place does
    photos["path"] = list(backwards["path"])
    extraction.run()
    assert list(extraction.frame.index) == [f"row {number}" for number in range(20)]
    with pytest.raises(ExtractionError, match="nothing was bound"):
        hold.bind(extraction, names, replace=False)


def test_a_name_that_was_deleted_or_is_no_frame_any_more_is_left_alone(
    held: tuple[dict[str, object], FrameSnapshot, Extraction],
) -> None:
    names, hold, extraction = held
    names["photos"] = 7
    with pytest.raises(ExtractionError, match="photos is not a dataframe any more but int"):
        hold.bind(extraction, names, replace=False)
    del names["photos"]
    with pytest.raises(ExtractionError, match="There is no photos any more"):
        hold.bind(extraction, names, replace=False)
    assert names == {}


def test_missing_images_and_images_in_memory_are_compared_too(photos: pd.DataFrame) -> None:
    photos["path"] = photos["path"].astype(object)
    photos.iloc[3, 0] = None
    photos.iloc[4, 0] = b"no image"
    names = {"photos": photos}
    hold = FrameSnapshot.of("photos", names)
    extraction = Extraction(hold.frame, BLOCK, images="path").run()
    names["photos"] = photos.copy()
    hold.bind(extraction, names, replace=False)
    assert len(names["photos"].columns) == 3 + 48
