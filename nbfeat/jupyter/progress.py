"""The display that updates in place: html and text, at most five times a second, its last text true."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from nbfeat.extraction.report import pace
from nbfeat.extraction.run import Step
from nbfeat.html import Html, bar, escape

SECONDS_BETWEEN = 0.2
WAITED_FOR = {"reading": "files to be read", "decoding": "images to be decoded", "network": "the network"}


class Live:
    """Show Steps under a cell. In a terminal, which cannot redraw, only what is coming and the end are printed."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title, self.quiet = title, quiet
        self._handle: Any = None
        self._started, self._shown_at = time.monotonic(), 0.0
        self._coming = ""
        self._last: Step | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave a final text, so that a saved notebook does not end at some percentage."""
        if self._last is not None and not self.quiet:
            self._draw(self._last, end="done" if kind is None else "stopped" if kind is KeyboardInterrupt else "failed")

    def show(self, step: Step) -> None:
        """Draw a step, unless one was drawn a moment ago."""
        self._last = step
        self._coming = step.note or self._coming
        now = time.monotonic()
        if self.quiet or (now - self._shown_at < SECONDS_BETWEEN and not step.note):
            return
        self._shown_at = now
        self._draw(step)

    def _draw(self, step: Step, end: str = "") -> None:
        from IPython.display import display

        lines = [f"{self.title}: {self._coming}"]
        if step.done or end:  # before, nothing is to be seen but what is being prepared
            lines.append(f"{end} · {ended(step, self._elapsed())}" if end else progress(step))
        if in_terminal():
            if end or step.note:
                print(lines[-1])  # noqa: T201 - a display there would be printed again at each update
            return
        bundle = {"text/plain": "\n".join(lines), "text/html": drawn(lines, None if end else step)}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(bundle, raw=True)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started


def in_terminal() -> bool:
    """Tell whether this is IPython in a terminal, by the name of its shell: its module need not be imported."""
    from IPython.core.getipython import get_ipython

    return type(get_ipython()).__name__ == "TerminalInteractiveShell"


def drawn(lines: list[str], step: Step | None) -> Html:
    """Draw the lines, and a bar between them while images are being worked on."""
    quiet = "opacity:.7;font-size:90%;line-height:1.5;font-variant-numeric:tabular-nums"
    parts = [f'<div style="{quiet}">{escape(line)}</div>' for line in lines]
    if step is not None and step.done:
        parts.insert(1, bar(step.done / step.total))
    return Html("".join(parts))


def progress(step: Step) -> str:
    """Say in one line how far a run is: counts, speed, time left and what it waits for."""
    parts = counts(step)
    if step.images_per_second:
        parts.append(pace(step.images_per_second))
    if step.seconds_left is not None:
        parts.append(f"{clock(step.seconds_left)} left")
    if step.bottleneck:
        parts.append(f"waiting for {WAITED_FOR[step.bottleneck]}")
    return " · ".join(parts)


def ended(step: Step, seconds: float) -> str:
    """Say in one line how far a run came, and in what time; the report below says more."""
    return " · ".join([*counts(step), f"{seconds:,.1f} s"])


def counts(step: Step) -> list[str]:
    """Say how many images are done, and how many of them came from the cache or failed."""
    parts = [f"{step.done:,} of {step.total:,} images"]
    parts += [f"{step.cached:,} {step.kept}"] if step.cached else []
    return parts + ([f"{step.failed:,} failed"] if step.failed else [])


def clock(seconds: float) -> str:
    """Write a duration as people read it: 8 s, 2:05 min, 1:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
