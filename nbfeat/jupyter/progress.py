"""The display that updates in place: html and text, at most five times a second, its last text true."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from IPython.core.getipython import get_ipython
from IPython.display import display

from nbfeat.extraction.report import pace
from nbfeat.extraction.run import Step
from nbfeat.html import Html, bar, escape

SECONDS_BETWEEN = 0.2
WAITED_FOR = {"reading": "files to be read", "decoding": "images to be decoded", "network": "the network"}
_LINE = "opacity:.7;font-size:90%;line-height:1.5;font-variant-numeric:tabular-nums"


class ProgressDisplay:
    """Show Steps under a cell. In a terminal, which cannot redraw, only what is coming and the end are printed."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title, self.quiet = title, quiet
        self._handle: Any = None
        self._started, self._drawn_at = time.monotonic(), 0.0
        self._coming = ""

    def follow(self, steps: Iterable[Step]) -> None:
        """Draw steps as they come, five a second; whatever ends them, leave a final text and not some percentage."""
        step, end = None, "failed"
        try:
            for step in steps:
                self._coming = step.note or self._coming
                if step.note or time.monotonic() - self._drawn_at >= SECONDS_BETWEEN:
                    self._drawn_at = time.monotonic()
                    self._draw(step)
            end = "done"
        except KeyboardInterrupt:
            end = "stopped"
            raise
        finally:
            if step is not None:
                self._draw(step, end)

    def _draw(self, step: Step, end: str = "") -> None:
        if self.quiet:
            return
        lines = [f"{self.title}: {self._coming}"]
        if end:
            lines.append(" · ".join([end, *counts(step), f"{time.monotonic() - self._started:,.1f} s"]))
        elif step.done:  # before, nothing is to be seen but what is being prepared
            lines.append(progress(step))
        # In a terminal a display would be printed again at each update. By name: its module need not be imported.
        if type(get_ipython()).__name__ == "TerminalInteractiveShell":
            if end or step.note:
                print(lines[-1])  # noqa: T201 - it has no other place
            return
        parts = [f'<div style="{_LINE}">{escape(line)}</div>' for line in lines]
        if step.done and not end:
            parts.insert(1, bar(step.done / step.total))
        bundle = {"text/plain": "\n".join(lines), "text/html": Html("".join(parts))}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(bundle, raw=True)


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
