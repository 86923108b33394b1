"""Names for features, and attaching them to a frame in one concat."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nbfeat.errors import RequestError, listing, near, sentences
from nbfeat.extraction.options import FeatureBlock

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 4  # at least; so that blocks of different widths sort and read alike
SHOWN = 3
_MADE = re.compile(r"(.*)_(\d{4,})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block's columns go: at a position among the given columns, and which of those they replace."""

    names: list[str]
    at: int
    replaced: tuple[int, ...] = ()


def prefix_of(block: FeatureBlock, backbone: str, image_column: str | None = None) -> str:
    """Return the first part of a block's column names: ``[image column_]backbone[alpha][_layer][_pooling]``."""
    if block.prefix is not None:
        name = block.prefix
    else:
        alpha = "" if block.alpha is None else f"{block.alpha:.2f}".replace(".", "")
        pooling = "" if block.pooling in {None, "avg"} else block.pooling
        name = "_".join(part for part in (backbone.lower() + alpha, block.layer, pooling) if part)
    return f"{image_column}_{name}" if image_column is not None else name


def names(prefix: str, width: int) -> list[str]:
    """Return the names of `width` columns, numbers padded with zeros, from ``prefix_0000`` on."""
    digits = max(DIGITS, len(str(width - 1)))
    return [f"{prefix}_{number:0{digits}d}" for number in range(width)]


def spanned(columns: Sequence[str]) -> str:
    """Name a block's columns from the first to the last: ``resnet50_0000 … 2047``."""
    return f"{columns[0]} … {columns[-1].rpartition('_')[2]}" if len(columns) > 1 else columns[0]


def block_called(prefix: str, prefixes: Collection[str]) -> str:
    """Return `prefix` if it is one of the `prefixes` of a result, or raise RequestError with near ones."""
    if prefix in prefixes:
        return prefix
    raise RequestError(
        sentences(f"There is no block {prefix!r}.", near(prefix, prefixes), f"Blocks: {listing(prefixes)}.")
    )


def place(frame: pd.DataFrame, prefix: str, width: int, *, replace: bool) -> Place:
    """Find where `width` columns of `prefix` go in `frame`.

    Columns that are exactly what a block of this prefix makes are replaced where they stand. Any other clash is an
    error, unless `replace` says to overwrite.
    """
    new = names(prefix, width)
    own = own_columns(frame, prefix)
    taken, wanted = [], set(new)
    for position, column in enumerate(frame.columns):
        if position not in own and isinstance(column, str) and column in wanted:
            taken.append(position)
    if taken and not replace:
        shown = listing([str(frame.columns[position]) for position in taken[:SHOWN]])
        more = f" and {len(taken) - SHOWN:,} more" if len(taken) > SHOWN else ""
        raise RequestError(
            f"The frame already has columns {shown}{more}, which this block did not make. "
            f"Choose other names with --prefix, or overwrite them with --replace."
        )
    replaced = tuple(sorted([*own, *taken]))
    return Place(new, replaced[0] if replaced else frame.shape[1], replaced)


def own_columns(frame: pd.DataFrame, prefix: str) -> set[int]:
    """Return the positions of columns that a block of `prefix` made before: 0 … width-1, each once, float32."""
    return set(made_columns(frame).get(prefix, ()))


def made_columns(frame: pd.DataFrame) -> dict[str, list[int]]:
    """Return the positions of the columns that blocks made before, in the order of their numbers, by prefix."""
    found: dict[str, list[tuple[int, int]]] = {}
    for position, (column, kind) in enumerate(zip(frame.columns, frame.dtypes, strict=True)):
        if isinstance(column, str) and (match := _MADE.fullmatch(column)):
            # A column that no block made spoils the set: -1 is the number of none.
            number = int(match[2]) if kind == np.float32 else -1
            found.setdefault(match[1], []).append((number, position))
    made = {}
    for prefix, numbered in found.items():
        numbers, positions = zip(*sorted(numbered), strict=True)
        wanted = names(prefix, len(positions))
        if numbers[0] == 0 and [frame.columns[position] for position in positions] == wanted:
            made[prefix] = list(positions)
    return made


def attach(frame: pd.DataFrame, blocks: Sequence[pd.DataFrame], places: Sequence[Place]) -> pd.DataFrame:
    """Return a new frame with `blocks` at their places; the given one is not touched, its index and order are kept."""
    import pandas as pd

    gone = {position for place in places for position in place.replaced}
    pieces: list[pd.DataFrame] = []
    kept: list[int] = []
    for position in range(frame.shape[1] + 1):
        arriving = [block for block, place in zip(blocks, places, strict=True) if place.at == position]
        if arriving and kept:
            pieces.append(frame.iloc[:, kept])
            kept = []
        pieces += arriving
        if position < frame.shape[1] and position not in gone:
            kept.append(position)
    if kept or not pieces:
        pieces.append(frame.iloc[:, kept])
    return pd.concat(pieces, axis=1)
