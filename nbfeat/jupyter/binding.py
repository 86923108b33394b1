"""Bind the result of work beside the notebook to its name: between cells, and to what the name stands for by then."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from IPython.core.interactiveshell import InteractiveShell

from nbfeat.errors import ExtractionError
from nbfeat.extraction.columns import attach
from nbfeat.extraction.extraction import Extraction
from nbfeat.images.sources import is_missing

if TYPE_CHECKING:
    import pandas as pd


def between_cells(shell: InteractiveShell, work: Callable[[], None]) -> None:
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


def is_in_a_cell(shell: InteractiveShell) -> bool:
    """Tell whether the running cell is what calls this, and not a click or a thread beside it."""
    return is_running_a_cell(shell) and threading.current_thread() is threading.main_thread()


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
        places = [part.place_in(now, replace=replace) for part in extraction.parts]
        names[self.name] = attach(now, [part.frame(now.index) for part in extraction.parts], places)

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
