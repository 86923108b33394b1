"""An Extraction in a thread: start it, cancel it, let it go on; one enum says how it stands.

The kernel stays free meanwhile. What the result is for is done by `bind`, on the kernel's event loop and between cells.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from contextlib import closing
from enum import Enum

from nbfeat.errors import NbfeatError
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.run import Step


def in_background(name: str, work: Callable[..., None], *given: object) -> threading.Thread:
    """Call `work` in a thread that may change widgets and update displays, and that ends with the kernel."""
    # ipykernel keeps in the context which cell or click a message belongs to; 7.0 fails where there is none.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work, *given), name=f"nbfeat-{name}", daemon=True)
    thread.start()
    return thread


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
        self,
        extraction: Extraction,
        *,
        bind: Callable[[Extraction], None],
        schedule: Callable[[Callable[[], None]], None],
        notify: Callable[[], None],
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
