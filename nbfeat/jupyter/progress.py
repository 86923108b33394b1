"""The progress display: HTML and text, updated in place at most five times a second."""

import time
from collections.abc import Iterable
from typing import Any

from IPython.core.getipython import get_ipython
from IPython.display import display

from nbfeat.extraction.report import pace
from nbfeat.extraction.run import Step
from nbfeat.html import Html, bar, escape

SECONDS_BETWEEN = 0.2
BOTTLENECKS = {"reading": "reading files", "decoding": "decoding images", "network": "network"}
_LINE = "opacity:.7;font-size:90%;line-height:1.5;font-variant-numeric:tabular-nums"


def follow(title: str, steps: Iterable[Step], *, quiet: bool = False) -> None:
    """Show progress at most five times a second, and a final text even if the steps fail or are interrupted."""
    step, end, coming = None, "failed", f"{title}: "
    handle, started, drawn_at = None, time.monotonic(), 0.0
    try:
        for step in steps:
            coming = f"{title}: {step.note}" if step.note else coming
            if not quiet and (step.note or time.monotonic() - drawn_at >= SECONDS_BETWEEN):
                drawn_at = time.monotonic()
                lines, share = ([coming, progress(step)], step.done / step.total) if step.done else ([coming], None)
                handle = _draw(handle, lines, share, is_news=bool(step.note))
        end = "done"
    except KeyboardInterrupt:
        end = "stopped"
        raise
    finally:
        if step is not None and not quiet:
            last = " · ".join([end, *counts(step), f"{time.monotonic() - started:,.1f} s"])
            _draw(handle, [coming, last], None, is_news=True)


def _draw(handle: Any, lines: list[str], share: float | None, *, is_news: bool) -> Any:
    """Show lines, and a bar if there is a share; a terminal, which can't redraw, gets only the last line of news."""
    if type(get_ipython()).__name__ == "TerminalInteractiveShell":  # by name, so its module is not imported
        if is_news:
            print(lines[-1])  # noqa: T201 - a terminal shows nothing else
        return None
    parts = [f'<div style="{_LINE}">{escape(line)}</div>' for line in lines]
    if share is not None:
        parts.insert(1, bar(share))
    bundle = {"text/plain": "\n".join(lines), "text/html": Html("".join(parts))}
    if handle is None:
        return display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
    handle.update(bundle, raw=True)
    return handle


def progress(step: Step) -> str:
    """Return the progress in one line: counts, speed, time left and bottleneck."""
    parts = counts(step)
    parts += [pace(step.images_per_second)] if step.images_per_second else []
    parts += [] if step.seconds_left is None else [f"{clock(step.seconds_left)} left"]
    parts += [f"bottleneck: {BOTTLENECKS[step.bottleneck]}"] if step.bottleneck else []
    return " · ".join(parts)


def counts(step: Step) -> list[str]:
    """Return how many images are done, came from the cache, and failed."""
    parts = [f"{step.done:,} of {step.total:,} images"]
    parts += [f"{step.cached:,} {step.kept}"] if step.cached else []
    return parts + ([f"{step.failed:,} failed"] if step.failed else [])


def clock(seconds: float) -> str:
    """Format a duration: 8 s, 2:05 min, 1:10 h."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"
