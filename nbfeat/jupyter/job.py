"""Work beside the cells: an Extraction in a thread, and its result bound between them to what its name stands for."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from IPython.core.interactiveshell import InteractiveShell

from nbfeat.errors import ExtractionError, NbfeatError
from nbfeat.extraction.columns import attach, places
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.run import Step
from nbfeat.images.sources import is_missing

if TYPE_CHECKING:
    import pandas as pd

Work = Callable[[], None]


def in_background(name: str, work: Callable[..., None], *given: object) -> None:
    """Call `work` in a thread that may change widgets and update displays, and that ends with the kernel."""
    # ipykernel keeps in the context which cell or click a message belongs to; 7.0 fails where there is none.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(work, *given), name=f"nbfeat-{name}", daemon=True).start()


class State(Enum):
    """How a job stands: IDLE → RUNNING → DONE or FAILED; RUNNING → CANCELLING → CANCELLED → RUNNING."""

    IDLE = "idle"
    RUNNING = "running"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"
    DONE = "done"

    @property
    def is_busy(self) -> bool:
        """Whether there is a thread at work, or a frame to be bound."""
        return self in {State.RUNNING, State.CANCELLING}


class Job:
    """`extraction` in a thread of its own, whose steps are asked for until they end, or until somebody cancels.

    `bind` gets the result; an NbfeatError from it makes the job fail. `schedule` calls a function on the kernel's event
    loop, when no cell is running there. `notify` is called after every step and every change of state, by whichever
    thread made it.
    """

    def __init__(
        self, extraction: Extraction, bind: Callable[[Extraction], None], schedule: Callable[[Work], None], notify: Work
    ) -> None:
        self.extraction = extraction
        self.state = State.IDLE
        self.step: Step | None = None  # the last one
        self.coming = ""  # what is being prepared, or is about to come
        self.error: Exception | None = None
        self._bind, self._schedule, self._notify = bind, schedule, notify
        self._lock, self._finishing = threading.Lock(), threading.Lock()
        self._worked, self._ended = threading.Event(), threading.Event()  # the thread; all that it is for

    def start(self) -> None:
        """Begin, or go on after `cancel`; nothing happens where it is at work already."""
        with self._lock:
            if self.state.is_busy:
                return
            self.state, self.error = State.RUNNING, None
            self._worked.clear()
            self._ended.clear()
        self._notify()
        in_background("job", self._work)

    def cancel(self) -> None:
        """Ask for no further step: what is done is kept, nothing is bound."""
        with self._lock:
            if self.state is not State.RUNNING:
                return
            self.state = State.CANCELLING
        self._notify()

    def wait(self, seconds: float | None = None, *, bind: bool = False) -> bool:
        """Wait until it is not busy, and tell whether that came about.

        With `bind`, the one who waits binds the result: a cell, for whose end it would wait for ever otherwise.
        """
        if not bind:
            return not self.state.is_busy or self._ended.wait(seconds)
        if self.state.is_busy and self._worked.wait(seconds):
            self._finish()
        return not self.state.is_busy

    @property
    def is_binding(self) -> bool:
        """Whether all is computed, and the frame waits for the running cell to end."""
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
        except Exception as error:  # whatever it is, it is shown: nobody sees what a thread raises
            self._end(State.FAILED, error)
        finally:
            self._worked.set()

    def _finish(self) -> None:
        """Bind the result, once, whoever comes first."""
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
    """Do `work` once: on the kernel's event loop, as soon as no cell is running.

    A cell that awaits lets the loop go on under it; such a one is waited for, too.
    """
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
    if loop is None:  # a terminal: cells and what else there is take turns anyway
        now()
    else:
        loop.add_callback(now)


def is_running_a_cell(shell: InteractiveShell) -> bool:
    """Tell whether a cell is between its first and its last line."""
    return getattr(shell.displayhook, "exec_result", None) is not None


@dataclass(frozen=True, slots=True, eq=False)
class FrameSnapshot:
    """A shallow copy of the frame of a name, as it was when work on it began: later changes do not reach it."""

    name: str
    frame: pd.DataFrame

    def bind(self, extraction: Extraction, names: MutableMapping[str, Any], *, replace: bool) -> None:
        """Attach the features to the frame that the name stands for now, and bind the new one to it.

        Raises ExtractionError where it stands for something else than the rows that were read.
        """
        now: Any = names.get(self.name)
        if reason := self.why_not(extraction, now):
            raise ExtractionError(reason)
        where = places(now, extraction.parts, replace=replace)
        names[self.name] = attach(now, [part.frame(now.index) for part in extraction.parts], where)

    def why_not(self, extraction: Extraction, now: Any) -> str:
        """Say why the features do not belong to `now`; an empty string where they do."""
        again = "Press Extract again: what was computed is kept." if extraction.keeps else "Press Extract again."
        if now is None:
            return f"There is no {self.name} any more, so nothing was bound. Make it once more. {again}"
        if type(now) is not type(self.frame):
            return f"{self.name} is not a dataframe any more but {type(now).__name__}, so nothing was bound."
        if not now.index.equals(self.frame.index) or not all(
            column in now.columns and _are_same(now[column].tolist(), extraction.images_in(column))
            for column in {part.column for part in extraction.parts}
        ):
            return f"The images of {self.name} are not those that were read, so nothing was bound. {again}"
        return ""


def _are_same(left: Sequence[object], right: Sequence[object]) -> bool:
    """Compare cells: text by what it says, anything else by whether it is the same thing."""
    return len(left) == len(right) and all(
        one is other
        or (isinstance(one, str | bytes | os.PathLike) and one == other)
        or (is_missing(one) and is_missing(other))
        for one, other in zip(left, right, strict=True)
    )
