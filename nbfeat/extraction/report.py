"""Report: the summary of a result, as text and as HTML."""

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
FAILURES_SHOWN = 10
LONGEST = 90  # characters of a reason in plain text

Row = tuple[str, int, str]  # names of columns, their number, and the steps that made them


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The sentences and tables about one result."""

    headline: str
    footer: str
    blocks: Sequence[Row] = ()
    planned: Sequence[str] = ()  # instead of `blocks`, before columns exist
    total: int  # images
    failures: pd.DataFrame
    notes: Sequence[str] = ()

    def _failed(self) -> tuple[str, list[list[Any]]]:
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
        """Draw the report as HTML without scripts, in the colors of the theme."""
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
    """Describe columns and the steps that made them; `cached` images came from the cache for all networks."""
    block, names, output = part.block, part.names, part.output
    alpha = "" if block.alpha is None else f" {block.alpha:g}"
    # The spec first: a user's file may have changed or gone since.
    size = part.network.spec.size if part.network else block.size or find(block.backbone).size
    name = part.network.prepared.weights.name if part.network and part.network.spec.backbone != NAME else ""
    weights = "" if name in {"", title_of(block)} else f" ({name} weights)"
    steps = [f"{size} px {block.resize}", f"{title_of(block)}{alpha}{weights}"]
    if output:
        steps.append(f"{block.layer or 'end'} {'×'.join(map(str, output.shape))}")
        steps += [_POOLED[output.pooling]] if output.pooling else []
    steps += [block.normalize] if block.normalize != "none" else []
    steps += [f"PCA to {block.components:,}"] if block.components else []
    marks = ["replaced"] if part.replaced else []
    marks += [f"{part.network.cached:,} from the cache"] if part.network and part.network.cached > cached else []
    return _spanned(names) + (f" ({', '.join(marks)})" if marks else ""), len(names), " → ".join(steps)


def read_row(part: PartRecipe) -> Row:
    """Describe columns that were read from a file."""
    return _spanned(part.names), len(part.names), f"{part.column}: {briefly(part.block)}"


def _spanned(columns: Sequence[str]) -> str:
    return f"{columns[0]} … {columns[-1].rpartition('_')[2]}" if len(columns) > 1 else columns[0]


def title_of(block: FeatureBlock) -> str:
    """Return the name of a block's backbone; for a file, without its folders."""
    return Path(block.backbone).name if block.backbone.endswith(SUFFIXES) else block.backbone


def briefly(block: FeatureBlock) -> str:
    """Write a block as text, but a file without its folders."""
    return str(block).replace(quoted(block.backbone), quoted(title_of(block)), 1)


def normalization_notes(parts: Sequence[FeatureColumns], *, repeats: Recipe | None, fit_rows: int | None) -> list[str]:
    """Say which rows normalization was fitted on, and where GeM pooling lost negative values."""
    notes = []
    fitted = [part.prefix for part in parts if part.block.is_learned]
    if repeats:
        names = f" Normalization of {listing(fitted)} was fitted there." if fitted else ""
        notes.append(f"Repeats {repeats.source}; nothing was fitted on these rows.{names}")
    elif fitted and fit_rows is None:
        notes.append(
            f"{listing(fitted)}: Normalization was fitted on all rows, including any test rows; name the training rows "
            "with `fit_on`."
        )
    elif fitted:
        notes.append(f"{listing(fitted)}: Normalization was fitted on {fit_rows:,} rows.")
    if lost := [part.prefix for part in parts if (cut := part.output) and cut.pooling == "gem" and cut.negative]:
        notes.append(f"{listing(lost)}: GeM pooling treats negative values as zero, and this layer has some.")
    for part in parts:
        rank, count = part.normalizer.rank if part.normalizer else 0, len(part.names)
        if part.block.normalize == "whiten" and rank < count:
            notes.append(f"{part.prefix}: {rank:,} of {count:,} components have variance. Use `components={rank}`.")
    return notes


def headline(subject: str, step: Step, preparing: float) -> str:
    """Summarize the run up to `step` in one line."""
    took = f"{subject} {step.total:,} images in {step.seconds:,.1f} s"
    computed = step.done - step.cached - step.failed
    if step.cached and not computed:
        return f"{took}, {'all' if step.cached == step.total else f'{step.cached:,}'} {step.kept}"
    if step.cached:
        took += f": {step.cached:,} {step.kept}, {computed:,} computed"
    loading = f"{preparing:,.1f} s to load the network, then " if preparing > 1 else ""
    return f"{took} ({loading}{pace(step.images_per_second)})"


def pace(rate: float) -> str:
    """Write images per second, with two digits for slow networks."""
    return f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"


def indented(text: str) -> str:
    """Indent every line of `text` by two spaces."""
    return "\n".join("  " + line for line in text.splitlines())
