"""An Extraction → a dict → text and html.

`summarize` reads, `text` and `html` only draw: what is shown in a notebook, in a terminal and in a saved file is the
same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbfeat.backbones.catalog import find
from nbfeat.backbones.user_models import NAME, SUFFIXES
from nbfeat.errors import listing
from nbfeat.extraction.columns import spanned
from nbfeat.extraction.options import quoted
from nbfeat.html import Html, details, escape, paragraph, table, text_table

if TYPE_CHECKING:
    from nbfeat.extraction.extraction import Extraction
    from nbfeat.extraction.options import FeatureBlock
    from nbfeat.extraction.part import FeatureColumns

_POOLED = {"avg": "average", "max": "maximum", "gem": "generalized mean", "flatten": "flattened"}
HEAD = ("columns", "width", "from")
FAILURES = ("row", "image", "reason")
BOUNDS = {"reading": "reading", "decoding": "decoding", "network": "the network"}
FAILURES_SHOWN = 10
REASON_SHOWN = 90


def summarize(extraction: Extraction) -> dict[str, Any]:
    """Gather what a report shows."""
    finished = extraction.state == "done"
    failures = extraction.failures
    return {
        "state": extraction.state,
        "done": extraction.done,
        "total": extraction.total,
        "failed": len(failures),
        "cached": extraction.cached,
        "kept": extraction.where_kept,
        "computed": extraction.computed,
        "failures": failures.head(FAILURES_SHOWN)[["position", "image", "reason"]].to_numpy().tolist(),
        "seconds": extraction.seconds,
        "rate": extraction.rate,
        "preparing": extraction.timings.preparing,
        "width": len(extraction.columns) if finished else None,
        "blocks": [_block(part, extraction.cached) for part in extraction.parts] if finished else [],
        "planned": [briefly(block) for block in extraction.blocks],
        "engines": extraction.engines,
        "precision": extraction.precision,
        "bottleneck": extraction.bottleneck,
        "notes": [*extraction.notes, *_notes(extraction)],
    }


def _block(part: FeatureColumns, cached: int) -> tuple[str, int, str]:
    """Say what became what: the names of the columns, how many, and the steps from pixels to features.

    `cached` images had everything from the cache; where one network had more, its blocks say so.
    """
    block, names, output = part.block, part.names, part.output
    alpha = "" if block.alpha is None else f" {block.alpha:g}"
    # What a file of the user's holds may be another network by now, or gone.
    size = part.lane.spec.size if part.lane else block.size or find(block.backbone).size
    steps = [f"{size} px {block.resize}", f"{title_of(block)}{alpha}{_weights(part)}"]
    if output:
        steps.append(f"{block.layer or 'end'} {'×'.join(map(str, output.shape))}")
        steps += [_POOLED[output.pooling]] if output.pooling else []
    if block.normalize != "none":
        steps.append(block.normalize)
    if block.components:
        steps.append(f"PCA to {block.components:,}")
    told = ["replaced"] if part.replaced else []
    told += [f"{part.lane.cached:,} from the cache"] if part.lane and part.lane.cached > cached else []
    return spanned(names) + (f" ({', '.join(told)})" if told else ""), len(names), " → ".join(steps)


def title_of(block: FeatureBlock) -> str:
    """Return what a block's backbone is called: of a file, the name without its folders."""
    return Path(block.backbone).name if block.backbone.endswith(SUFFIXES) else block.backbone


def briefly(block: FeatureBlock) -> str:
    """Write a block as %extract takes it, but a file without its folders."""
    return str(block).replace(quoted(block.backbone), quoted(title_of(block)), 1)


def _weights(part: FeatureColumns) -> str:
    """Say which weights, where the name of the network does not."""
    name = part.lane.weights.name if part.lane else ""
    if part.lane and (part.lane.spec.backbone == NAME or name == title_of(part.block)):
        return ""
    # Nobody should mistake its features for ImageNet's.
    return " (bundled, small)" if name == "bundled" else f" ({name} weights)" if name else ""


def _notes(extraction: Extraction) -> list[str]:
    """Say which images are equal, what learned normalizations learned from, and what GeM lost."""
    notes = []
    if extraction.written and extraction.state == "done":
        notes.append(extraction.written.sentence)
    if equal := extraction.equal:
        notes.append(f"{equal:,} images are equal to others and share their features.")
    learned = [part.prefix for part in extraction.parts if part.block.is_learned]
    if extraction.repeats:
        are = "is" if len(learned) == 1 else "are"
        taken = f": {listing(learned)} {are} normalized by what was learned there, and" if learned else ";"
        notes.append(f"Repeats {extraction.repeats.source}{taken} nothing was learned from these rows.")
    elif learned and extraction.fit_rows is None:
        notes.append(
            f"{listing(learned)}: normalization learned from all rows, those you may test on included; "
            "name the training rows with --fit-on."
        )
    elif learned:
        notes.append(f"{listing(learned)}: normalization learned from {extraction.fit_rows:,} rows.")
    cut = [part for part in extraction.parts if part.output and part.output.pooling == "gem"]
    if lost := [part.prefix for part in cut if part.output and part.output.negative]:
        notes.append(f"{listing(lost)}: GeM counts values below zero as zero, and this layer has some.")
    return notes


def headline(report: dict[str, Any]) -> str:
    """Say in one line how it went."""
    state, total, cached = report["state"], report["total"], report["cached"]
    subject = f"{report['width']:,} new columns from" if state == "done" else f"{state}: {report['done']:,} of"
    took = f"{subject} {total:,} images in {report['seconds']:,.1f} s"
    computed = report["computed"]
    if cached and not computed:
        return f"{took}, {'all' if cached == total else f'{cached:,}'} {report['kept']}"
    speed = f"({pace(report['rate'])})"
    if cached:
        took += f": {cached:,} {report['kept']}, {computed:,} computed"
    if report["preparing"] > 1:
        speed += f", {report['preparing']:,.1f} s of them to prepare the network"
    return f"{took} {speed}"


def pace(rate: float) -> str:
    """Return images per second as people read it; a large network on few images must not be told as none a second."""
    return f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"


def footer(report: dict[str, Any]) -> str:
    """Say what ran it, and what bounded its speed."""
    engine = listing(report["engines"]) or "nothing ran"
    bound = f" · bounded by {BOUNDS[report['bottleneck']]}" if report["bottleneck"] else ""
    return f"{engine} · {report['precision']}{bound}"


def failed(report: dict[str, Any]) -> str:
    """Say how many images failed, and where to read why."""
    return f"{report['failed']:,} of {report['total']:,} images failed and are NaN: see result.failures"


def text(report: dict[str, Any]) -> str:
    """Draw the report as plain text."""
    lines = [headline(report)]
    if report["blocks"]:
        lines.append(indented(text_table(report["blocks"], HEAD)))
    else:
        lines += [f"  {block}" for block in report["planned"]]
    if report["failed"]:
        rows = [(position, image, shorten(reason)) for position, image, reason in report["failures"]]
        lines += [failed(report), indented(text_table(rows, FAILURES))]
    return "\n".join([*lines, *report["notes"], footer(report)])


def html(report: dict[str, Any]) -> Html:
    """Draw the report as html that needs no script and follows the theme."""
    parts = [paragraph(headline(report), strong=True)]
    if report["blocks"]:
        unbroken = [
            (names.replace(" … ", "\N{NO-BREAK SPACE}…\N{NO-BREAK SPACE}"), *rest) for names, *rest in report["blocks"]
        ]
        parts.append(table(unbroken, HEAD))
    else:
        parts += [paragraph(block) for block in report["planned"]]
    if report["failed"]:
        parts.append(details(failed(report), table(report["failures"], FAILURES)))
    parts += [paragraph(note) for note in report["notes"]]
    parts.append(faint(footer(report)))
    return Html("".join(parts))


def faint(text: str) -> Html:
    """Draw what is said last and least."""
    return Html(f'<div style="opacity:.65;font-size:90%">{escape(text)}</div>')


def shorten(text: str) -> str:
    """Cut a long reason for a table in plain text."""
    return text if len(text) <= REASON_SHOWN else text[: REASON_SHOWN - 1] + "…"


def indented(text: str) -> str:
    """Set every line of `text` in by two spaces."""
    return "\n".join("  " + line for line in text.splitlines())
