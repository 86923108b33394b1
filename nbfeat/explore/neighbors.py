"""similar: the images whose features are nearest to those of one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import RequestError
from nbfeat.explore import gallery
from nbfeat.explore.query import Query, query_of
from nbfeat.explore.space import Metric, Space
from nbfeat.explore.tile import Tile, caption_columns, tile
from nbfeat.explore.vectors import Made, vectors_of
from nbfeat.extraction.report import indented
from nbfeat.html import Html, paragraph, table, text_table
from nbfeat.inference.spec import whole

if TYPE_CHECKING:
    import pandas as pd

NEIGHBORS = 12


def similar(
    result: Made | pd.DataFrame,
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
    space = Space(list(vectors.blocks.values()), metric)
    captions = caption_columns(vectors.images.frame, caption)
    query = query_of(vectors, to, captions)
    rows = vectors.positions[vectors.positions != query.position]
    nearest, distances = space.nearest(query.rows, rows, whole("k")(k))
    return Similar(
        frame=_frame(vectors.images.frame, nearest, distances),
        query=query,
        tiles=tuple(
            tile(vectors.images, at, captions, distance_text(distance))
            for at, distance in zip(nearest, distances, strict=True)
        ),
        root=vectors.images.root,
        compared=len(rows),
        told=" · ".join(filter(None, [f"{metric} distance of {vectors.title}", vectors.left_out])),
        captions=tuple(captions),
        has_images=vectors.images.column is not None,
    )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Similar:
    """The rows nearest to one; a notebook shows their images, `plot()` draws them."""

    frame: pd.DataFrame
    query: Query
    tiles: tuple[Tile, ...]
    root: Path
    compared: int  # rows
    captions: tuple[Hashable, ...]
    told: str  # metric, features, what was left out
    has_images: bool

    def plot(self) -> NDArray[Any]:
        """Draw the images, the one asked for first, on axes of a new figure of pyplot's, and return the axes."""
        self._check_images()
        return gallery.plot([self.query.tile, *self.tiles], self.root, self._heading())

    def __repr__(self) -> str:
        """Return the nearest rows as text."""
        return "\n".join(filter(None, [self._heading(), indented(self._rows(text_table)), self.told]))

    def _repr_html_(self) -> str:
        """Return the gallery, or the rows where no column holds images."""
        asked = [self.query.tile, *self.tiles]
        body = gallery.html(asked, self.root) if self.has_images else Html(self._rows(table))
        return Html(paragraph(self._heading(), strong=True) + body + paragraph(self.told))

    def _heading(self) -> str:
        return f"The {len(self.frame):,} nearest of {self.compared:,} rows to {self.query.name}"

    def _rows(self, draw: Any) -> str:
        rows = [(*tile.lines, tile.name) for tile in self.tiles]
        return str(draw(rows, ("distance", *(self.captions or ("index",)), "image"))) if rows else ""

    def _check_images(self) -> None:
        if not self.has_images:
            raise RequestError(
                "There are no images to draw: no column looks like images. Name it with images='COLUMN'."
            )


def distance_text(distance: float) -> str:
    """Write a distance with three digits, as tell neighbors apart."""
    if not distance:
        return "0"
    return f"{distance:#.3g}" if distance < 1000 else f"{distance:,.0f}"


def _frame(frame: pd.DataFrame, positions: NDArray[np.intp], distances: NDArray[np.float64]) -> pd.DataFrame:
    found = frame.take(positions)
    found.insert(0, free_name("distance", frame), distances)
    return found


def free_name(name: Hashable, frame: pd.DataFrame) -> Hashable:
    """Return `name`, with as many underscores after it as keep it from being a column already."""
    while name in frame.columns:
        name = f"{name}_"
    return name
