"""similar: the images whose features are nearest to those of one, a row of the frame or an image that is in none."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from nbfeat import isolation
from nbfeat.errors import ImageError, RequestError, listing, near, sentences
from nbfeat.explore import gallery
from nbfeat.explore.gallery import Tile, caption_columns, file_name, tile
from nbfeat.explore.vectors import Data, Images, Metric, Rows, Vectors, parts_of, vectors_of
from nbfeat.extraction.report import indented
from nbfeat.html import Html, paragraph, table, text_table
from nbfeat.images.decode import short
from nbfeat.images.public_hosts import redact_url
from nbfeat.images.sources import is_missing, name_of, path_of, read_thumbnail
from nbfeat.inference.spec import whole

if TYPE_CHECKING:
    import pandas as pd

NEIGHBORS = 12
LABELS_SHOWN = 3
SMALL = 32  # pixels to which an image is read, to see whether it can be


def similar(
    result: Data,
    to: object,
    k: int = NEIGHBORS,
    *,
    features: str | None = None,
    metric: Metric = "cosine",
    caption: Hashable | Sequence[Hashable] | None = None,
    images: Hashable | None = None,
    root: str | Path | None = None,
) -> Similar:
    """Find the images whose features are nearest to those of one.

    Every row is compared, nothing is approximated. Rows without features are left out.

    Parameters
    ----------
    result
        A result, or a frame with columns of features.
    to
        A label of the frame's index, which names a row; else an image: a path, bytes, a PIL image or an array. One
        that is in no row is extracted as the result was, normalizations included; a frame does not tell how that is.
    k
        How many; all where there are fewer.
    features
        The prefix of one block; by default all blocks: each is then scaled to unit length, so that all count the same.
    metric
        ``"cosine"`` (1 - cos, from 0 to 2; of several blocks the mean) or ``"euclidean"``.
    caption
        The column, or columns, of the captions; by default ``label`` where there is one, else the index.
    images, root
        Of a frame: the column that holds images, and where relative paths start.

    Returns
    -------
    Similar
        ``.frame``: the nearest rows, nearest first, their ``distance`` before the frame's own columns. Equal distances
        stand in the frame's order. A notebook shows the images; ``.plot()`` draws them.

    Raises
    ------
    RequestError
        Where `to` is no row and no image, is the label of several rows, or of one without features.

    Examples
    --------
    >>> nbfeat.similar(result, to=17)  # doctest: +SKIP
    >>> nbfeat.similar(result, to="another.jpg", k=5, features="resnet50").frame  # doctest: +SKIP
    """
    vectors = vectors_of(result, features, images, root)
    space = vectors.space(metric)
    captions = caption_columns(vectors.images.frame, caption)
    position, query, asked = _find(vectors, to, captions)
    rows = vectors.positions[vectors.positions != position]
    nearest, distances = space.nearest(query, rows, whole("k")(k))
    frame = vectors.images.frame.take(nearest)
    frame.insert(0, free_name("distance", frame), distances)
    texts = map(distance_text, distances)
    tiles = [tile(vectors.images, at, captions, text) for at, text in zip(nearest, texts, strict=True)]
    note = " · ".join(filter(None, [f"{metric} distance of {vectors.title}", vectors.left_out]))
    return Similar(frame, asked, tuple(tiles), vectors.images, len(rows), tuple(captions), note)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Similar:
    """The rows nearest to one; a notebook shows their images, `plot()` draws them."""

    frame: pd.DataFrame
    asked: Tile  # the one that they are near to
    tiles: tuple[Tile, ...]
    images: Images
    compared: int  # rows
    captions: tuple[Hashable, ...]
    note: str  # metric, features, what was left out

    def plot(self) -> NDArray[Any]:
        """Draw the images, the one asked for first, on axes of a new figure of pyplot's, and return the axes."""
        if self.images.column is None:
            raise RequestError(
                "There are no images to draw: no column looks like images. Name it with images='COLUMN'."
            )
        return gallery.plot([self.asked, *self.tiles], self.images.root, self._heading())

    def __repr__(self) -> str:
        """Return the nearest rows as text."""
        return "\n".join(filter(None, [self._heading(), indented(self._rows(text_table)), self.note]))

    def _repr_html_(self) -> str:
        """Return the gallery, or the rows where no column holds images."""
        tiles = [self.asked, *self.tiles]
        body = self._rows(table) if self.images.column is None else gallery.html(tiles, self.images.root)
        return Html(paragraph(self._heading(), strong=True) + body + paragraph(self.note))

    def _heading(self) -> str:
        return f"The {len(self.frame):,} nearest of {self.compared:,} rows to {self.asked.name}"

    def _rows(self, draw: Any) -> str:
        rows = [(*tile.lines, tile.name) for tile in self.tiles]
        return str(draw(rows, ("distance", *(self.captions or ("index",)), "image"))) if rows else ""


def distance_text(distance: float) -> str:
    """Write a distance with three digits, as tell neighbors apart."""
    if not distance:
        return "0"
    return f"{distance:#.3g}" if distance < 1000 else f"{distance:,.0f}"


def free_name(name: Hashable, frame: pd.DataFrame) -> Hashable:
    """Return `name`, with as many underscores after it as keep it from being a column already."""
    while name in frame.columns:
        name = f"{name}_"
    return name


def _find(vectors: Vectors, to: object, captions: Sequence[Hashable]) -> tuple[int, list[Rows], Tile]:
    """Find what `to` names: a row by its label, a row by its image, or an image that is in no row.

    Return its position, -1 where it is in no row, its features in each block, and how it is shown.
    """
    images, index = vectors.images, vectors.images.frame.index
    position = _position(index, to)
    if position is None:
        position = _position_of_image(images, to)
    if position is None:
        return -1, _extracted(vectors, to), Tile(to, ("asked for",), file_name(to), marked=True)
    if not vectors.ok[position]:
        reason = images.reasons.get(position, "its values are missing or not finite")
        raise RequestError(f"Row {index[position]!r} has no features: {reason}. Choose another row.")
    rows = [block[position : position + 1] for block in vectors.blocks.values()]
    return position, rows, replace(tile(images, position, captions, "asked for"), marked=True)


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


def _position_of_image(images: Images, to: object) -> int | None:
    """Return the first row with this very path, or None."""
    if images.column is None or not isinstance(to, (str, os.PathLike)) or (wanted := _path(to, images.root)) is None:
        return None
    paths = (_path(value, images.root) for value in images.frame[images.column].tolist())
    return next((number for number, path in enumerate(paths) if path == wanted), None)


def _path(value: object, root: Path) -> str | None:
    try:
        path = path_of(value, root)
    except ImageError:
        return None
    return None if path is None else os.path.normpath(path)


def _extracted(vectors: Vectors, to: object) -> list[Rows]:
    """Extract the features of an image as the result's own were."""
    import pandas as pd

    try:
        with isolation.pillow_defaults():
            read_thumbnail(to, SMALL, vectors.images.root)
    except ImageError as error:
        raise RequestError(_neither(vectors.images.frame.index, to, str(error))) from None
    if vectors.made is None:
        raise RequestError(
            f"{file_name(to)} is not in the frame, and a frame does not know how its features were made. "
            "Pass what %extract or nbfeat.extract returned in place of the frame."
        )
    parts = parts_of(vectors.made)
    if (count := len({part.column for part in parts if part.prefix in vectors.blocks})) > 1:
        blocks = listing(map(repr, vectors.blocks), "or")
        raise RequestError(f"The features are of {count} columns of images: choose one block with features={blocks}.")
    frame = pd.DataFrame({part.column: pd.Series([to], dtype=object) for part in parts})
    result = vectors.made.like(frame, root=vectors.images.root)
    return [result[prefix].to_numpy() for prefix in vectors.blocks]


def _neither(index: pd.Index, to: object, reason: str) -> str:
    """Say that `to` is no row and no image."""
    hint = near(to, [str(label) for label in index[:1000]]) if isinstance(to, str) else ""
    first = listing([repr(label) for label in index[:LABELS_SHOWN].tolist()])
    asked = repr(redact_url(to)) if isinstance(to, str) else str(to) if isinstance(to, (int, float)) else name_of(to)
    return sentences(
        f"{short(asked, 80)} is no label of the index "
        f"(which begins with {first}), and no image that can be read: {reason}.",
        hint or "frame.index[n] is the label of the row at position n.",
    )
