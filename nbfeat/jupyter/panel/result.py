"""The panel's output: progress, equivalent code, report, failures, scatter and comparison."""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from nbfeat.errors import NbfeatError
from nbfeat.extraction.extraction import Extraction
from nbfeat.html import Html, bar, escape, paragraph
from nbfeat.jupyter.job import FrameSnapshot, Job, State, in_background
from nbfeat.jupyter.panel.widgets import DEFAULT, Kit, labelled, offer
from nbfeat.jupyter.progress import counts, progress

ELSEWHERE = "The panel appears here while the notebook is running. Its saved report:"  # followed by the static report
LOOKS = {  # sign, word (color isn't the only cue), and a text that `progress_of` fills in
    State.IDLE: ("○", "Ready", ""),
    State.RUNNING: ("▶", "Running", "{progress}"),
    State.CANCELLING: ("…", "Cancelling", "{counts} · stopping after the current batch"),
    State.CANCELLED: ("■", "Cancelled", "{counts} · {of.name} is unchanged · press Extract to resume{kept}"),
    State.FAILED: ("✕", "Failed", "{error}"),
    State.DONE: ("✓", "Done", "{of.into} has {width} new columns · {counts}"),
}
REPORT, FAILURES, SCATTER, COMPARISON = "Report", "Failures", "Scatter", "Comparison"
METHODS = [("PCA", "pca"), ("t-SNE", "tsne"), *([("UMAP", "umap")] if find_spec("umap") else [])]
CLICK = escape(files("nbfeat.jupyter.panel").joinpath("panel.js").read_text(encoding="utf-8"))
FAILURES_SHOWN = 24
MOST_COLUMNS = 60  # offered for coloring


def progress_of(job: Job | None, of: FrameSnapshot | None) -> Html:
    """Draw the progress of `job`, a run on `of`: a bar, the sign and word of its state, and details."""
    sign, word, text = LOOKS[job.state if job else State.IDLE]
    step = job.step if job else None
    if job and of:
        error = job.error  # with its type, unless it is nbfeat's own
        now = progress(step) if step and step.done else job.coming or "starting"
        text = text.format(
            of=of,
            width=f"{len(job.extraction.columns):,}" if job.extraction.state == "done" else "",
            counts=" · ".join(counts(step)) if step else "no images",
            progress="everything is computed · waiting for the running cell to finish" if job.is_binding else now,
            kept=" (finished features are cached)" if job.extraction.keeps else "",
            error=labelled(f"{'' if isinstance(error, NbfeatError) else f'{type(error).__name__}: '}{error}"),
        )
    has_bar = job and job.state not in {State.IDLE, State.FAILED}
    drawn = bar(step.done / step.total if step and step.total else 0.0) if has_bar else ""
    return Html(f'{drawn}<div><b class="nbfeat-{word.lower()}">{sign} {word}</b> {escape(text)}</div>')


def code_of(code: str, *, loaded: bool) -> Html:
    """Draw the equivalent cell, which a click selects, and buttons that copy it and put it into a new cell."""
    first = "" if loaded else " (run <code>%load_ext nbfeat</code> first)"
    ways = [f'<button class="jupyter-button nbfeat-quiet">{way}</button>' for way in ("Copy", "Insert below")]
    return Html(
        f'<div class="nbfeat-tools" onclick="{CLICK}"><h4>Equivalent code{first}</h4>{"".join(ways)}'
        f'<span role="status"></span></div><pre title="Click to select all">{escape(code)}</pre>'
    )


class Result:
    """The result of a run, page by page; empty before the first."""

    def __init__(self, kit: Kit) -> None:
        self.pages = kit.make(widgets.ToggleButtons, "pages", options=[REPORT])
        self.column = kit.make(widgets.Dropdown, description="Color by", tooltip="A column of the dataframe")
        self.method = kit.make(widgets.Dropdown, description="Method", options=METHODS, tooltip="PCA is the fastest")
        self.block = kit.make(widgets.Dropdown, description="Block", tooltip="The features to plot")
        self.page, self._choice = kit.html("page"), kit.box("fields")
        self.box = kit.part("Result", self.pages, self._choice, self.page)
        self._whole, self.box.children = self.box.children, ()
        self._of: Extraction | None = None
        self._made: dict[tuple[str, ...], Html] = {}  # pages, by what they show
        self._asked: tuple[str, ...] = ()  # the requested page, the only one shown when ready
        self._kit = kit
        kit.on_choice(lambda _: self._turn(), self.pages, self.column, self.method, self.block)

    def show(self, extraction: Extraction) -> None:
        """Show the result of `extraction`, its report first."""
        self._of, self._made = extraction, {}
        failed = len(extraction.failures)
        failures = [(f"{FAILURES} ({failed:,})", FAILURES)] if failed else []
        # Columns to color by, ``label`` first, without features and images.
        others = {*extraction.columns, *(part.column for part in extraction.parts)}
        columns = [column for column in extraction.frame.columns if column not in others][:MOST_COLUMNS]
        with self._kit.filling():
            self.pages.options = [(REPORT, REPORT), *failures, (SCATTER, SCATTER), (COMPARISON, COMPARISON)]
            self.pages.value = REPORT
            offer(self.column, [(str(one), one) for one in sorted(columns, key=lambda column: column != "label")])
            offer(self.block, [("all blocks", DEFAULT), *((part.prefix, part.prefix) for part in extraction.parts)])
        self._turn()

    def hide(self) -> None:
        """Hide the result."""
        self._of, self.box.children = None, ()

    def _turn(self) -> None:
        """Show the chosen page; slow ones are made in a thread."""
        if self._of is None:
            return
        page = self.pages.value
        choices = {SCATTER: (self.column, self.method, self.block), COMPARISON: (self.column,)}.get(page, ())
        self.column.description = "Predict" if page == COMPARISON else "Color by"
        self._choice.children = shown = [one for one in choices if len(one.options) > (one is self.block) * 2]
        self.box.children = [one for one in self._whole if shown or one is not self._choice]
        key = self._asked = (page, *(one.value for one in choices))
        if page == REPORT:
            self.page.value = self._of._repr_html_()
        elif key in self._made:
            self.page.value = self._made[key]
        else:
            self.page.value = paragraph(f"Preparing the {page.lower()} …")
            in_background("page", self._make, key, self._of)

    def _make(self, key: tuple[str, ...], of: Extraction) -> None:
        try:
            page = _drawn(of, *key)
            made = {key: page}
        except Exception as error:  # show any error: nobody sees what a thread raises
            kind = "" if isinstance(error, NbfeatError) else f"{type(error).__name__}: "
            page, made = paragraph(f"⚠ {kind}{error}"), {}
        with self._kit.turn():  # another run or page may be asked for at any moment
            if self._of is of:
                self._made |= made
                if self._asked == key:
                    self.page.value = page


def _drawn(extraction: Extraction, page: str, column: Any = None, method: Any = "pca", block: str = "") -> Html:
    from nbfeat.explore import gallery
    from nbfeat.explore.compare import compare
    from nbfeat.explore.scatter import scatter

    if page == SCATTER:
        return Html(scatter(extraction, column, method, features=block or None)._repr_html_())
    if page == COMPARISON and column is None:
        return paragraph("The frame has no column to predict. Add one, such as a label, and extract again.")
    if page == COMPARISON:
        return Html(compare(extraction, column)._repr_html_())
    found = extraction.failures
    rows = found[["position", "image", "reason"]].head(FAILURES_SHOWN).itertuples(index=False)
    tiles = [gallery.Tile(None, (f"row {row:,}", Path(image).name), image, reason) for row, image, reason in rows]
    more = f"… and {len(found) - len(tiles):,} more: see result.failures" if len(found) > len(tiles) else ""
    return Html(gallery.html(tiles, Path()) + (paragraph(more) if more else ""))
