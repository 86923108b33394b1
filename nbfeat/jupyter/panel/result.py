"""The panel's result: the report, the images that failed, a scatter and a comparison, each one click away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets

from nbfeat.errors import NbfeatError
from nbfeat.extraction.extraction import Extraction
from nbfeat.html import Html, paragraph
from nbfeat.jupyter.background import in_background
from nbfeat.jupyter.panel.widgets import Choice, Kit, answer_at_once, offer

REPORT, FAILURES, SCATTER, COMPARISON = "Report", "Failures", "Scatter", "Comparison"
FAILURES_SHOWN = 24
MOST_COLUMNS = 60  # offered to color by


class Result:
    """What came of a run; nothing before the first."""

    def __init__(self, kit: Kit) -> None:
        self.pages = kit.make(widgets.ToggleButtons, "pages", options=[REPORT])
        self.column = kit.dropdown(description="Color by", tooltip="A column of the dataframe")
        self._heading, self.page = kit.heading("Result"), kit.html("page")
        self._choice = kit.box("fields", [self.column])
        self.box = kit.box("part", [])
        self._of: Extraction | None = None
        self._made: dict[tuple[str, object], Html] = {}  # pages, by what they show
        self._making = 0  # a number for each page that was asked for; an older one is not shown any more
        self._thread: threading.Thread | None = None
        self._kit = kit
        for widget in (self.pages, self.column):
            kit.on_choice(widget, lambda _: self._turn())

    def show(self, extraction: Extraction) -> None:
        """Show what `extraction` gave, its report first."""
        self._of, self._made = extraction, {}
        with self._kit.filling():
            failed = len(extraction.failures)
            pages = [(f"{FAILURES} ({failed:,})", FAILURES)] if failed else []
            self.pages.options = [(REPORT, REPORT), *pages, (SCATTER, SCATTER), (COMPARISON, COMPARISON)]
            self.pages.value = REPORT
            offer(self.column, columns_of(extraction))
        self._turn()

    def hide(self) -> None:
        """Show nothing."""
        self._of, self.box.children = None, ()

    def wait(self) -> None:
        """Wait until the page that was chosen is shown."""
        if self._thread is not None:
            self._thread.join()

    def _turn(self) -> None:
        """Show the page that is chosen; what takes a while is made in a thread."""
        if self._of is None:
            return
        self._making += 1
        page, column = self.pages.value, self.column.value
        has_column = page in {SCATTER, COMPARISON}
        self.column.description = "Predict" if page == COMPARISON else "Color by"
        choice = [self._choice] if has_column and self.column.options else []
        self.box.children = (self._heading, self.pages, *choice, self.page)
        key = (page, column if has_column else None)
        if page == REPORT:
            self.page.value = self._of._repr_html_()
        elif key in self._made:
            self.page.value = self._made[key]
        else:
            self.page.value = paragraph(f"Making the {page.lower()} …")
            self._thread = in_background("page", self._make, key, self._of, self._making)
        answer_at_once(self.pages)

    def _make(self, key: tuple[str, object], of: Extraction, number: int) -> None:
        page, column = key
        try:
            made = MAKERS[page](of, column)
        except NbfeatError as error:
            made = paragraph(f"⚠ {error}")
        except Exception as error:  # whatever it is, it is shown: nobody sees what a thread raises
            made = paragraph(f"⚠ {type(error).__name__}: {error}")
        else:
            self._made[key] = made
        if number == self._making:
            self.page.value = made


def columns_of(extraction: Extraction) -> list[Choice]:
    """Return the columns to color by, ``label`` first where there is one; features and images are none."""
    frame = extraction.frame
    others = {*extraction.columns, *(part.column for part in extraction.parts)}
    found = [column for column in frame.columns if column not in others][:MOST_COLUMNS]
    return [(str(column), column) for column in sorted(found, key=lambda column: column != "label")]


def failures(extraction: Extraction, _: object) -> Html:
    """Draw the images that failed, each with its reason."""
    from nbfeat.explore import gallery
    from nbfeat.explore.gallery import Tile

    found = extraction.failures
    shown = found.head(FAILURES_SHOWN)
    tiles = [
        Tile(None, (f"row {position:,}", Path(image).name), image, reason)
        for position, image, reason in zip(shown["position"], shown["image"], shown["reason"], strict=True)
    ]
    more = f"… and {len(found) - len(shown):,} more: see result.failures" if len(found) > len(shown) else ""
    return Html(gallery.html(tiles, Path()) + (paragraph(more) if more else ""))


def scatter(extraction: Extraction, column: object) -> Html:
    """Draw the features in two dimensions."""
    from nbfeat.explore.scatter import scatter

    return Html(scatter(extraction, color=column)._repr_html_())


def comparison(extraction: Extraction, column: object) -> Html:
    """Score every block by how well it predicts a column."""
    from nbfeat.explore.compare import compare

    if column is None:
        return paragraph("The frame has no column to predict. Add one, such as a label, and extract again.")
    return Html(compare(extraction, column)._repr_html_())


MAKERS: dict[str, Callable[[Extraction, object], Html]] = {
    FAILURES: failures, SCATTER: scatter, COMPARISON: comparison,
}  # fmt: skip
