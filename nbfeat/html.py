"""Small HTML tables that follow the notebook's theme; the only place where data is escaped."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import NewType

from nbfeat.errors import printable

Html = NewType("Html", str)

# Inline styles survive JupyterLab's sanitizer, GitHub and nbconvert; `currentColor` and opacity follow any theme.
_TABLE = "border-collapse:collapse;margin:.2em 0 .6em;font-size:90%"
_CELL = "text-align:left;padding:.15em 1.2em .15em 0;vertical-align:top;border:0;line-height:1.4"
_HEAD = _CELL + ";opacity:.65;font-weight:normal"
# Control characters, those that turn the direction of the text around them, and halves of characters.
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NUMBER = _CELL + ";text-align:right;font-variant-numeric:tabular-nums"


def escape(text: object) -> Html:
    """Escape `text`, including quotes; Html is escaped again, so don't pass it here."""
    return Html(html.escape(printable(str(text), _HIDDEN), quote=True))


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> Html:
    """Draw rows of escaped cells; numbers are right-aligned with thousands separators."""
    titles = "".join(f'<th style="{_HEAD}">{escape(cell)}</th>' for cell in head)
    top = f"<thead><tr>{titles}</tr></thead>" if head else ""
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return Html(f'<table style="{_TABLE}">{top}<tbody>{body}</tbody></table>')


def _cell(value: object) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td style="{_NUMBER}">{value:,}</td>'
    return f'<td style="{_CELL}">{escape(value)}</td>'


def details(summary: str, body: Html) -> Html:
    """Fold `body` under a line of text."""
    line = f'<summary style="cursor:pointer">{escape(summary)}</summary>'
    return Html(f'<details style="margin:.2em 0">{line}{body}</details>')


def paragraph(text: str, *, strong: bool = False) -> Html:
    """Draw one line of text, in bold if `strong`."""
    weight = ";font-weight:600" if strong else ""
    return Html(f'<div style="margin:.2em 0;line-height:1.4{weight}">{escape(text)}</div>')


def bar(share: float) -> Html:
    """Draw a thin progress bar, `share` of it (0 … 1) filled."""
    filled = f"width:{max(0.0, min(1.0, share)):.1%};height:100%;background:var(--jp-brand-color1,#1e88e5)"
    track = "height:6px;margin:.35em 0;max-width:32em;border-radius:3px;overflow:hidden;background:rgba(128,128,128,.3)"
    return Html(f'<div style="{track}"><div style="{filled}"></div></div>')


def text_table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Draw rows as plain text with aligned columns."""
    rows = [head, *rows] if head else rows
    cells = [[f"{cell:,}" if isinstance(cell, (int, float)) else printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
