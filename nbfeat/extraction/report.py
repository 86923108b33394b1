"""Report: what a result says of itself, drawn as text and as html; the words that it is put together from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbfeat.backbones.catalog import find
from nbfeat.backbones.user_models import NAME, SUFFIXES
from nbfeat.errors import listing
from nbfeat.extraction.columns import FeatureColumns
from nbfeat.extraction.options import FeatureBlock, quoted
from nbfeat.extraction.recipe import PartRecipe, Recipe
from nbfeat.extraction.run import Step
from nbfeat.html import Html, details, escape, paragraph, table, text_table

if TYPE_CHECKING:
    import pandas as pd

_POOLED = {"avg": "average", "max": "maximum", "gem": "generalized mean", "flatten": "flattened"}
_HEAD = ("columns", "width", "from")
_FAILURES = ("row", "image", "reason")
_BOUNDS = {"reading": "reading", "decoding": "decoding", "network": "the network"}
FAILURES_SHOWN = 10
LONGEST = 90  # characters of a reason in plain text

Row = tuple[str, int, str]  # the names of columns, how many, and what they were made from


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The sentences and tables about one result."""

    headline: str
    footer: str
    blocks: Sequence[Row] = ()
    planned: Sequence[str] = ()  # in place of `blocks`, before there are columns
    total: int  # images
    failures: pd.DataFrame
    notes: Sequence[str] = ()

    def _failed(self) -> tuple[str, list[list[Any]]]:
        """Say how many images failed, and where to read why; return row, image and reason of the first."""
        first = self.failures[["position", "image", "reason"]].head(FAILURES_SHOWN).to_numpy().tolist()
        return f"{len(self.failures):,} of {self.total:,} images failed and are NaN: see result.failures", first

    def text(self) -> str:
        """Draw the report as plain text."""
        lines = [self.headline]
        if self.blocks:
            lines.append(indented(text_table(self.blocks, _HEAD)))
        lines += [f"  {block}" for block in self.planned]
        if len(self.failures):
            failed, first = self._failed()
            rows = [(*rest, text[: LONGEST - 1] + "…" if text[LONGEST:] else text) for *rest, text in first]
            lines += [failed, indented(text_table(rows, _FAILURES))]
        return "\n".join([*lines, *self.notes, self.footer])

    def html(self) -> Html:
        """Draw the report as html that needs no script and follows the theme."""
        parts = [paragraph(self.headline, strong=True)]
        if self.blocks:
            joint = "\N{NO-BREAK SPACE}…\N{NO-BREAK SPACE}"
            parts.append(table([(names.replace(" … ", joint), *rest) for names, *rest in self.blocks], _HEAD))
        parts += [paragraph(block) for block in self.planned]
        if len(self.failures):
            failed, first = self._failed()
            parts.append(details(failed, table(first, _FAILURES)))
        parts += [paragraph(note) for note in self.notes]
        return Html("".join(parts) + f'<div style="opacity:.65;font-size:90%">{escape(self.footer)}</div>')


def made_row(part: FeatureColumns, cached: int) -> Row:
    """Say what became what: the names of the columns, how many, and the steps from pixels to features.

    `cached` images had everything from the cache; where one network had more, its blocks say so.
    """
    block, names, output = part.block, part.names, part.output
    alpha = "" if block.alpha is None else f" {block.alpha:g}"
    # What a file of the user's holds may be another network by now, or gone.
    size = part.network.spec.size if part.network else block.size or find(block.backbone).size
    steps = [f"{size} px {block.resize}", f"{title_of(block)}{alpha}{_weights(part)}"]
    if output:
        steps.append(f"{block.layer or 'end'} {'×'.join(map(str, output.shape))}")
        steps += [_POOLED[output.pooling]] if output.pooling else []
    steps += [block.normalize] if block.normalize != "none" else []
    steps += [f"PCA to {block.components:,}"] if block.components else []
    marks = ["replaced"] if part.replaced else []
    marks += [f"{part.network.cached:,} from the cache"] if part.network and part.network.cached > cached else []
    return _spanned(names) + (f" ({', '.join(marks)})" if marks else ""), len(names), " → ".join(steps)


def read_row(part: PartRecipe) -> Row:
    """Say which columns were read, and what they were made from."""
    return _spanned(part.names), len(part.names), f"{part.column}: {briefly(part.block)}"


def _spanned(columns: Sequence[str]) -> str:
    return f"{columns[0]} … {columns[-1].rpartition('_')[2]}" if len(columns) > 1 else columns[0]


def title_of(block: FeatureBlock) -> str:
    """Return what a block's backbone is called: of a file, the name without its folders."""
    return Path(block.backbone).name if block.backbone.endswith(SUFFIXES) else block.backbone


def briefly(block: FeatureBlock) -> str:
    """Write a block as %extract takes it, but a file without its folders."""
    return str(block).replace(quoted(block.backbone), quoted(title_of(block)), 1)


def _weights(part: FeatureColumns) -> str:
    """Say which weights, where the name of the network does not."""
    if (
        not part.network
        or part.network.spec.backbone == NAME
        or (name := part.network.weights.name) == title_of(part.block)
    ):
        return ""
    return " (bundled, small)" if name == "bundled" else f" ({name} weights)" if name else ""


def normalization_notes(parts: Sequence[FeatureColumns], *, repeats: Recipe | None, fit_rows: int | None) -> list[str]:
    """Say what learned normalizations learned from, and what GeM lost."""
    notes = []
    learned = [part.prefix for part in parts if part.block.is_learned]
    if repeats:
        are = "is" if len(learned) == 1 else "are"
        taken = f": {listing(learned)} {are} normalized by what was learned there, and" if learned else ";"
        notes.append(f"Repeats {repeats.source}{taken} nothing was learned from these rows.")
    elif learned and fit_rows is None:
        notes.append(
            f"{listing(learned)}: normalization learned from all rows, those you may test on included; "
            "name the training rows with --fit-on."
        )
    elif learned:
        notes.append(f"{listing(learned)}: normalization learned from {fit_rows:,} rows.")
    if lost := [part.prefix for part in parts if (cut := part.output) and cut.pooling == "gem" and cut.negative]:
        notes.append(f"{listing(lost)}: GeM counts values below zero as zero, and this layer has some.")
    for part in parts:
        rank, count = part.normalizer.rank if part.normalizer else 0, len(part.names)
        if part.block.normalize == "whiten" and rank < count:
            notes.append(f"{part.prefix}: {rank:,} of {count:,} components have variance. Use `components={rank}`.")
    return notes


def headline(subject: str, step: Step, preparing: float) -> str:
    """Say in one line how it went with `subject` of all images, up to `step`."""
    took = f"{subject} {step.total:,} images in {step.seconds:,.1f} s"
    computed = step.done - step.cached - step.failed
    if step.cached and not computed:
        return f"{took}, {'all' if step.cached == step.total else f'{step.cached:,}'} {step.kept}"
    speed = f"({pace(step.images_per_second)})"
    if step.cached:
        took += f": {step.cached:,} {step.kept}, {computed:,} computed"
    if preparing > 1:
        speed += f", {preparing:,.1f} s of them to prepare the network"
    return f"{took} {speed}"


def pace(rate: float) -> str:
    """Return images per second as people read it; a large network on few images must not be told as none a second."""
    return f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"


def footer(engines: Sequence[str], precision: str, bottleneck: str | None) -> str:
    """Say what ran it, and what bounded its speed."""
    bound = f" · bounded by {_BOUNDS[bottleneck]}" if bottleneck else ""
    return f"{listing(engines) or 'nothing ran'} · {precision}{bound}"


def indented(text: str) -> str:
    """Set every line of `text` in by two spaces."""
    return "\n".join("  " + line for line in text.splitlines())
