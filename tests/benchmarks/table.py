"""What a section prints: a table in GitHub's markdown, and what is to be known about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a title; the first column is text, the others are numbers."""

    title: str
    head: Row
    rows: Sequence[Row]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as GitHub shows it; a row that is too short says why it has no figures."""
        width = len(self.head)
        rule = ["---", *["---:"] * (width - 1)]
        cells = [[*row, *[""] * (width - len(row))] for row in self.rows]
        lines = [
            f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in (self.head, rule, *cells)
        ]
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])])


def rate(value: float) -> str:
    """Show images per second."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def times(value: float) -> str:
    """Show a ratio of speeds."""
    return f"{value:.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 2 else f"{value:.2f}×"


def share(value: float) -> str:
    """Show a part of something."""
    return f"{value:.0%}"
