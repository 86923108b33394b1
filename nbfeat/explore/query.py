"""Query: the one image that others are compared with, a row of the frame or one that is not in it."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nbfeat import isolation
from nbfeat.errors import ImageError, RequestError, listing, near, sentences
from nbfeat.explore.tile import Tile, file_name, tile
from nbfeat.explore.vectors import Made, Rows, Vectors, parts_of
from nbfeat.images.decode import short
from nbfeat.images.public_hosts import redact_url
from nbfeat.images.sources import is_missing, name_of, path_of, read_thumbnail

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 3
SMALL = 32  # pixels to which an image is read, to see whether it can be


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """One image: its features in each block, and how it is shown."""

    rows: Sequence[Rows]
    tile: Tile
    name: str
    position: int = -1  # of its row; -1 where it is not in the frame


def query_of(vectors: Vectors, to: object, captions: Sequence[Hashable]) -> Query:
    """Find what `to` names: a row by its label, a row by its image, or an image that is in no row."""
    index = vectors.images.frame.index
    position = _position(index, to)
    if position is None:
        position = _position_of_image(vectors, to)
    if position is None:
        return _new(vectors, to)
    if not vectors.ok[position]:
        reason = vectors.images.reasons.get(position, "its values are missing or not finite")
        raise RequestError(f"Row {index[position]!r} has no features: {reason}. Choose another row.")
    redact_url = tile(vectors.images, position, captions, "asked for")
    rows = [block[position : position + 1] for block in vectors.blocks.values()]
    return Query(rows, replace(redact_url, marked=True), redact_url.name, position)


def _position(index: pd.Index, to: object) -> int | None:
    """Return where the row of label `to` is, or None where there is none."""
    if not isinstance(to, Hashable) or is_missing(to):
        return None
    try:
        found = index.get_loc(to)
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(found, int):
        return found
    count = len(index[found])
    raise RequestError(f"{count:,} rows are labelled {to!r}. Make labels unique first: frame.reset_index(drop=True).")


def _position_of_image(vectors: Vectors, to: object) -> int | None:
    """Return the first row with this very path, or None."""
    if not isinstance(to, (str, os.PathLike)) or vectors.images.column is None:
        return None
    wanted = _path(to, vectors.images.root)
    paths = (_path(value, vectors.images.root) for value in vectors.images.cells())
    return next((number for number, path in enumerate(paths) if path is not None and path == wanted), None)


def _path(value: object, root: Path) -> str | None:
    try:
        path = path_of(value, root)
    except ImageError:
        return None
    return None if path is None else os.path.normpath(path)


def _new(vectors: Vectors, to: object) -> Query:
    """Extract the features of an image as the result's own were."""
    name = file_name(to)
    try:
        with isolation.pillow_defaults():
            read_thumbnail(to, SMALL, vectors.images.root)
    except ImageError as error:
        raise RequestError(_neither(vectors, to, str(error))) from None
    if vectors.made is None:
        raise RequestError(
            f"{name} is not in the frame, and a frame does not know how its features were made. "
            "Pass what %extract or nbfeat.extract returned in place of the frame."
        )
    columns = {part.column for part in parts_of(vectors.made) if part.prefix in vectors.blocks}
    if len(columns) > 1:
        blocks = listing(map(repr, vectors.blocks), "or")
        raise RequestError(
            f"The features are of {len(columns)} columns of images: choose one block with features={blocks}."
        )
    rows = _extracted(vectors.made, to, vectors.images.root, vectors.blocks)
    return Query(rows, Tile(to, ("asked for",), name, marked=True), name)


def _extracted(made: Made, to: object, root: Path, prefixes: Iterable[str]) -> list[Rows]:
    import pandas as pd

    columns = dict.fromkeys(part.column for part in parts_of(made))
    frame = pd.DataFrame({column: pd.Series([to], dtype=object) for column in columns})
    result = made.like(frame, root=root)
    return [result[prefix].to_numpy() for prefix in prefixes]


def _neither(vectors: Vectors, to: object, reason: str) -> str:
    """Say that `to` is no row and no image."""
    index = vectors.images.frame.index
    labels = [str(label) for label in index[:1000]]
    hint = near(to, labels) if isinstance(to, str) else ""
    first = listing([repr(label) for label in index[:SHOWN].tolist()])
    asked = repr(redact_url(to)) if isinstance(to, str) else str(to) if isinstance(to, (int, float)) else name_of(to)
    return sentences(
        f"{short(asked, 80)} is no label of the index "
        f"(which begins with {first}), and no image that can be read: {reason}.",
        hint or "frame.index[n] is the label of the row at position n.",
    )
