"""Background work: runs an Extraction in a thread and assigns the result between cells."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, MutableMapping
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from IPython.core.interactiveshell import InteractiveShell

from nbfeat.errors import ExtractionError, NbfeatError
from nbfeat.extraction.columns import attach, places
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.result import is_same
from nbfeat.extraction.run import Step

if TYPE_CHECKING:
    import pandas as pd

Work = Callable[[], None]


def in_background(name: str, work: Callable[..., None], *given: object) -> None:
    """Call `work` in a daemon thread that may change widgets and update displays."""
    # ipykernel keeps the parent cell or click of each message in the context; 7.0 fails without one.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(work, *given), name=f"nbfeat-{name}", daemon=True).start()


class State(Enum):
    """The state of a job: IDLE → RUNNING → DONE or FAILED; RUNNING → CANCELLING → CANCELLED → RUNNING."""

    IDLE = "idle"
    RUNNING = "running"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"
    DONE = "done"

    @property
    def is_busy(self) -> bool:
        """Whether a thread is running, or a frame is waiting to be assigned."""
        return self in {State.RUNNING, State.CANCELLING}


class Job:
    """Runs the steps of `extraction` in a thread until they end or `cancel` is called.

    `bind` assigns the result; its NbfeatError fails the job. `schedule` calls a function on the kernel's event loop
    when no cell is running. `notify` is called after every step and change of state, from the thread that made it.
    """

    def __init__(
        self, extraction: Extraction, bind: Callable[[Extraction], None], schedule: Callable[[Work], None], notify: Work
    ) -> None:
        self.extraction = extraction
        self.state = State.IDLE
        self.step: Step | None = None  # the last one
        self.coming = ""  # what comes before the first image
        self.error: Exception | None = None
        self._bind, self._schedule, self._notify = bind, schedule, notify
        self._lock, self._finishing = threading.Lock(), threading.Lock()
        self._worked, self._ended = threading.Event(), threading.Event()  # the thread; the whole job

    def start(self) -> None:
        """Start, or resume after `cancel`; does nothing while running."""
        with self._lock:
            if self.state.is_busy:
                return
            self.state, self.error = State.RUNNING, None
            self._worked.clear()
            self._ended.clear()
        self._notify()
        in_background("job", self._work)

    def cancel(self) -> None:
        """Stop after the current step; finished features are cached, and nothing is assigned."""
        with self._lock:
            if self.state is not State.RUNNING:
                return
            self.state = State.CANCELLING
        self._notify()

    def wait(self, seconds: float | None = None, *, bind: bool = False) -> bool:
        """Wait until the job has ended and return whether it has; with `bind`, the caller assigns the result."""
        # Otherwise, a cell would wait forever for its own end.
        if not bind:
            return not self.state.is_busy or self._ended.wait(seconds)
        if self.state.is_busy and self._worked.wait(seconds):
            self._finish()
        return not self.state.is_busy

    @property
    def is_binding(self) -> bool:
        """Whether everything is computed, and the frame waits for the running cell to finish."""
        return self.state.is_busy and self.extraction.state == "done"

    def _work(self) -> None:
        try:
            with closing(self.extraction.steps()) as steps:
                for step in steps:
                    self.step, self.coming = step, step.note or self.coming
                    if self.state is State.CANCELLING:
                        break
                    self._notify()
            if self.extraction.state == "done":
                self._notify()
                self._schedule(self._finish)
            else:
                self._end(State.CANCELLED)
        except Exception as error:  # show any error: nobody sees what a thread raises
            self._end(State.FAILED, error)
        finally:
            self._worked.set()

    def _finish(self) -> None:
        """Assign the result exactly once."""
        with self._finishing:
            if not self.is_binding:
                return
            if self.state is State.CANCELLING:
                self._end(State.CANCELLED)
                return
            try:
                self._bind(self.extraction)
            except NbfeatError as error:
                self._end(State.FAILED, error)
            else:
                self._end(State.DONE)

    def _end(self, state: State, error: Exception | None = None) -> None:
        with self._lock:
            self.state, self.error = state, error
        try:
            self._notify()
        finally:
            self._ended.set()


def between_cells(shell: InteractiveShell, work: Work) -> None:
    """Do `work` once, on the kernel's event loop, as soon as no cell is running or awaiting."""
    turn = threading.Lock()

    def once(*_: object) -> None:
        if turn.acquire(blocking=False):
            shell.events.unregister("post_run_cell", once)
            work()

    def now() -> None:
        shell.events.register("post_run_cell", once)
        if not is_running_a_cell(shell):
            once()

    loop: Any = getattr(getattr(shell, "kernel", None), "io_loop", None)
    if loop is None:  # in a terminal, only one thing runs at a time anyway
        now()
    else:
        loop.add_callback(now)


def is_running_a_cell(shell: InteractiveShell) -> bool:
    """Return whether a cell is running."""
    return getattr(shell.displayhook, "exec_result", None) is not None


def running_cell(shell: InteractiveShell) -> tuple[object, object]:
    """Return the ids of the running cell, if the front end sends it, and of this run of the cell."""
    parent: Any = getattr(shell, "get_parent", dict)()
    sent = parent.get("metadata", {})
    return sent.get("cellId") or sent.get("colab", {}).get("cell_id"), parent.get("header", {}).get("msg_id")


@dataclass(frozen=True, slots=True, eq=False)
class FrameSnapshot:
    """A shallow copy of a named frame from when the job started, unaffected by later changes."""

    name: str
    frame: pd.DataFrame
    into: str  # the name that the new frame gets

    def bind(self, extraction: Extraction, names: MutableMapping[str, Any], *, replace: bool) -> None:
        """Attach the features to the frame that has the name now, or raise ExtractionError if its images differ."""
        now: Any = names.get(self.name)
        if reason := self.why_not(extraction, now):
            raise ExtractionError(reason)
        where = places(now, extraction.parts, replace=replace)
        names[self.into] = attach(now, [part.frame(now.index) for part in extraction.parts], where)

    def why_not(self, extraction: Extraction, now: Any) -> str:
        """Return why the features don't belong to `now`, or an empty string."""
        again = "press Extract again (computed features are cached)." if extraction.keeps else "press Extract again."
        if now is None:
            return f"{self.name} no longer exists, so no features were attached. Create it again, then {again}"
        if type(now) is not type(self.frame):
            return f"{self.name} now has type {type(now).__name__}. Make it a dataframe again, then {again}"
        if not now.index.equals(self.frame.index) or not all(
            column in now.columns and all(map(is_same, now[column].tolist(), extraction.images_in(column)))
            for column in {part.column for part in extraction.parts}
        ):
            return f"The images of {self.name} have changed, so nothing was attached. To extract new ones, {again}"
        return ""
