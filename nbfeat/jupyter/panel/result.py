"""The panel's result: the report, the images that failed, a scatter and a comparison, each one click away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets

from nbfeat.errors import NbfeatError
from nbfeat.extraction.extraction import Extraction
from nbfeat.html import Html, paragraph
from nbfeat.jupyter.job import in_background
from nbfeat.jupyter.panel.widgets import Choice, Kit, offer

REPORT, FAILURES, SCATTER, COMPARISON = "Report", "Failures", "Scatter", "Comparison"
FAILURES_SHOWN = 24
MOST_COLUMNS = 60  # offered to color by


class Result:
    """What came of a run; nothing before the first."""

    def __init__(self, kit: Kit) -> None:
        self.pages = kit.make(widgets.ToggleButtons, "pages", options=[REPORT])
        self.column = kit.make(widgets.Dropdown, description="Color by", tooltip="A column of the dataframe")
        self.page = kit.html("page")
        self._choice = kit.box("fields", self.column)
        self.box = kit.part("Result", self.pages, self._choice, self.page)
        self._whole, self.box.children = self.box.children, ()
        self._of: Extraction | None = None
        self._made: dict[tuple[str, object], Html] = {}  # pages, by what they show
        self._asked: tuple[str, object] | None = None  # for which page: another that gets ready is not shown
        self._kit = kit
        kit.on_choice(lambda _: self._turn(), self.pages, self.column)

    def show(self, extraction: Extraction) -> None:
        """Show what `extraction` gave, its report first."""
        self._of, self._made = extraction, {}
        failed = len(extraction.failures)
        failures = [(f"{FAILURES} ({failed:,})", FAILURES)] if failed else []
        with self._kit.filling():
            self.pages.options = [(REPORT, REPORT), *failures, (SCATTER, SCATTER), (COMPARISON, COMPARISON)]
            self.pages.value = REPORT
            offer(self.column, columns_of(extraction))
        self._turn()

    def hide(self) -> None:
        """Show nothing."""
        self._of, self.box.children = None, ()

    def _turn(self) -> None:
        """Show the page that is chosen; what takes a while is made in a thread."""
        if self._of is None:
            return
        page = self.pages.value
        has_column = page in {SCATTER, COMPARISON} and bool(self.column.options)
        self.column.description = "Predict" if page == COMPARISON else "Color by"
        self.box.children = [one for one in self._whole if has_column or one is not self._choice]
        key = self._asked = page, self.column.value if has_column else None
        if page == REPORT:
            self.page.value = self._of._repr_html_()
        elif key in self._made:
            self.page.value = self._made[key]
        else:
            self.page.value = paragraph(f"Making the {page.lower()} …")
            in_background("page", self._make, key, self._of)

    def _make(self, key: tuple[str, object], of: Extraction) -> None:
        page, column = key
        try:
            made = MAKERS[page](of, column)
            is_good = True
        except Exception as error:  # whatever it is, it is shown: nobody sees what a thread raises
            kind = "" if isinstance(error, NbfeatError) else f"{type(error).__name__}: "
            made, is_good = paragraph(f"⚠ {kind}{error}"), False
        if self._of is of:
            self._made |= {key: made} if is_good else {}
            if self._asked == key:
                self.page.value = made


def columns_of(extraction: Extraction) -> list[Choice]:
    """Return the columns to color by, ``label`` first where there is one; features and images are none."""
    others = {*extraction.columns, *(part.column for part in extraction.parts)}
    found = [column for column in extraction.frame.columns if column not in others][:MOST_COLUMNS]
    return [(str(column), column) for column in sorted(found, key=lambda column: column != "label")]


def failures(extraction: Extraction, _: object) -> Html:
    """Draw the images that failed, each with its reason."""
    from nbfeat.explore import gallery
    from nbfeat.explore.gallery import Tile

    found = extraction.failures
    rows = found[["position", "image", "reason"]].head(FAILURES_SHOWN).itertuples(index=False)
    tiles = [Tile(None, (f"row {position:,}", Path(image).name), image, reason) for position, image, reason in rows]
    more = f"… and {len(found) - len(tiles):,} more: see result.failures" if len(found) > len(tiles) else ""
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
