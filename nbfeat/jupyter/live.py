"""The display that updates in place: html and text, at most five times a second, its last text true."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from nbfeat.features.extraction import Step
from nbfeat.html import Html, bar, escape

SECONDS_BETWEEN = 0.2


class Live:
    """Show Steps under a cell. In a terminal, which cannot redraw, only what is coming and the end are printed."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title, self.quiet = title, quiet
        self._handle: Any = None
        self._shown_at = 0.0
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
        from IPython.display import display  # noqa: PLC0415 - only in a notebook

        text = f"{self.title}: {self._coming}\n{progress(step, end)}"
        bundle = {"text/plain": text, "text/html": self._html(step, end)}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(bundle, raw=True)

    def _html(self, step: Step, end: str) -> Html:
        share = step.done / step.total if step.total else 1.0
        quiet = "opacity:.7;font-size:90%;line-height:1.5;font-variant-numeric:tabular-nums"
        lines = [f'<div style="{quiet}">{escape(self.title)}: {escape(self._coming)}</div>']
        lines += [] if end else [bar(share)]
        return Html("".join([*lines, f'<div style="{quiet}">{escape(progress(step, end))}</div>']))


def progress(step: Step, end: str = "") -> str:
    """Say in one line how far a run is: counts, speed, time left and what it waits for."""
    parts = [f"{step.done:,} of {step.total:,} images"]
    if step.failed:
        parts.append(f"{step.failed:,} failed")
    if step.images_per_second:
        parts.append(f"{step.images_per_second:,.0f} images/s")
    if end:
        return " · ".join([end, *parts, f"{step.seconds:,.1f} s"])
    if step.seconds_left is not None:
        parts.append(f"{clock(step.seconds_left)} left")
    if step.bottleneck:
        parts.append(f"waiting for {'images to be decoded' if step.bottleneck == 'decoding' else 'the network'}")
    return " · ".join(parts)


def clock(seconds: float) -> str:
    """Write a duration as people read it: 8 s, 2:05 min, 1:10 h."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004 - a minute
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"  # noqa: PLR2004 - an hour
