"""duplicates: groups of images that are nearly the same."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import RequestError, listing
from nbfeat.explore import gallery
from nbfeat.explore.gallery import Tile, caption_columns, tile
from nbfeat.explore.neighbors import distance_text, free_name
from nbfeat.explore.vectors import Data, Images, Metric, vectors_of
from nbfeat.extraction.report import indented
from nbfeat.html import Html, paragraph, table, text_table

if TYPE_CHECKING:
    import pandas as pd

SHARE = 0.1  # of the usual distance: copies saved again or made smaller are nearer, hardly any two photographs are
MOST_TILES, MOST_OF_GROUP = 24, 6  # images that a notebook shows
CHAINED = 0.5  # of all rows in one group: then the features tell little apart


def duplicates(
    result: Data,
    threshold: float | None = None,
    *,
    features: str | None = None,
    metric: Metric = "cosine",
    caption: Hashable | Sequence[Hashable] | None = None,
    images: Hashable | None = None,
    root: str | Path | None = None,
) -> Duplicates:
    """Find groups of images that are nearly the same: copies, saved again, made smaller, slightly cut.

    Every pair of rows is compared. Rows at most `threshold` apart are in one group, and so are those that only a third
    one joins. Rows without features are left out.

    Parameters
    ----------
    result
        A result, or a frame with columns of features.
    threshold
        The largest distance; 0 for equal features. By default a tenth of the median distance between rows, since
        how far apart different images are is another matter for every network.
    features, metric, caption, images, root
        As `nbfeat.similar` takes them.

    Returns
    -------
    Duplicates
        ``.frame``: the rows that are in groups, with ``group`` (from 1, in the order of the frame) and ``distance``
        (from the group's first row) before the frame's own columns. ``.rest`` tells the rows to keep so that one of
        each group remains. A notebook shows the images; ``.plot()`` draws them.

    Examples
    --------
    >>> found = nbfeat.duplicates(result)  # doctest: +SKIP
    >>> photos = photos[found.rest]  # doctest: +SKIP
    """
    import pandas as pd

    vectors = vectors_of(result, features, images, root)
    space, rows, frame = vectors.space(metric), vectors.positions, vectors.images.frame
    limit = SHARE * space.usual(rows) if threshold is None else _checked(threshold)
    firsts = space.groups(rows, limit)
    _, which, sizes = np.unique(firsts, return_inverse=True, return_counts=True)
    order = np.argsort(firsts, kind="stable")
    order = order[sizes[which[order]] > 1]
    rows_in_groups, firsts, sizes = rows[order], firsts[order], sizes[sizes > 1]
    found = frame.take(rows_in_groups)
    found.insert(0, free_name("group", frame), np.repeat(np.arange(len(sizes)) + 1, sizes))
    found.insert(1, free_name("distance", frame), space.between(rows_in_groups, firsts))
    is_kept = np.ones(len(frame), bool)
    is_kept[rows_in_groups[rows_in_groups != firsts]] = False
    why = ", a tenth of the median" if threshold is None else ""
    note = f"{metric} distance of at most {distance_text(limit)}{why}, of {vectors.title}"
    return Duplicates(
        frame=found,
        rest=pd.Series(is_kept, frame.index, bool, "rest"),
        threshold=limit,
        positions=rows_in_groups,
        sizes=sizes,
        images=vectors.images,
        captions=tuple(caption_columns(frame, caption)),
        compared=len(rows),
        note=" · ".join(filter(None, [note, vectors.left_out])),
    )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Duplicates:
    """Groups of nearly equal images; a notebook shows them, `plot()` draws them."""

    frame: pd.DataFrame
    rest: pd.Series[bool]  # False for all but the first row of each group, indexed like the frame
    threshold: float
    positions: NDArray[np.intp]  # of the rows of `frame`
    sizes: NDArray[np.intp]  # of the groups
    images: Images
    captions: tuple[Hashable, ...]
    compared: int  # rows
    note: str  # metric, threshold, features, what was left out

    def plot(self) -> NDArray[Any]:
        """Draw the images on axes of a new figure of pyplot's, and return the axes."""
        if not self.sizes.size or self.images.column is None:
            why = "no column looks like images; name it with images=" if self.sizes.size else "no two rows are so near"
            raise RequestError(f"There is nothing to draw: {why}.")
        tiles = [
            replace(tile, lines=(f"group {number + 1}: {tile.lines[0]}", *tile.lines[1:]))
            for number, group in enumerate(self._tiles())
            for tile in group
        ]
        return gallery.plot(tiles, self.images.root, " ".join(filter(None, [self._heading(), self._more()])))

    def __repr__(self) -> str:
        """Return the groups as text."""
        rows = indented(self._rows(text_table))
        return "\n".join(filter(None, [self._heading(), rows, self._more(), self._about_largest(), self.note]))

    def _repr_html_(self) -> str:
        has_images = self.images.column is not None
        body = gallery.groups(self._tiles(), self.images.root) if has_images else self._rows(table)
        notes = [paragraph(text) for text in (self._more(), self._about_largest(), self.note) if text]
        return Html(paragraph(self._heading(), strong=True) + body + "".join(notes))

    def _heading(self) -> str:
        if not self.sizes.size:
            return f"No two of {self.compared:,} rows are nearly the same"
        groups = f"{len(self.sizes):,} {'group' if len(self.sizes) == 1 else 'groups'}"
        return f"{groups} of nearly equal images: {len(self.frame):,} of {self.compared:,} rows"

    def _shown(self) -> NDArray[np.intp]:
        """Return how many rows are shown of the first groups, as many as a notebook holds."""
        shown = np.minimum(self.sizes, MOST_OF_GROUP)
        return shown[np.cumsum(shown) <= MOST_TILES]

    def _tiles(self) -> list[list[Tile]]:
        groups = []
        for start, count in zip(np.cumsum(self.sizes) - self.sizes, self._shown(), strict=False):
            distances = self.frame.iloc[start + 1 : start + count, 1]
            texts = zip(self.positions[start : start + count], ["first", *map(distance_text, distances)], strict=True)
            groups.append([tile(self.images, at, self.captions, text) for at, text in texts])
        return groups

    def _rows(self, draw: Any) -> str:
        rows = [(number + 1, *tile.lines, tile.name) for number, group in enumerate(self._tiles()) for tile in group]
        return str(draw(rows, ("group", "distance", *(self.captions or ("index",)), "image"))) if rows else ""

    def _more(self) -> str:
        shown = self._shown()
        rows, groups = self.sizes[: len(shown)].sum() - shown.sum(), len(self.sizes) - len(shown)
        more = [f"{rows:,} more {'row' if rows == 1 else 'rows'} of these groups"] if rows else []
        more += [f"{groups:,} more {'group' if groups == 1 else 'groups'}"] if groups else []
        return f"… and {listing(more)}: see .frame" if more else ""

    def _about_largest(self) -> str:
        largest = self.sizes.max(initial=0)
        if largest <= max(CHAINED * self.compared, MOST_OF_GROUP):
            return ""
        return (
            f"One group holds {largest:,} of {self.compared:,} rows: the features tell little apart at this distance; "
            f"try a threshold below {distance_text(self.threshold)}."
        )


def _checked(threshold: float) -> float:
    is_number = isinstance(threshold, (int, float, np.number)) and not isinstance(threshold, bool)
    if is_number and np.isfinite(threshold) and threshold >= 0:
        return float(threshold)
    raise RequestError(f"threshold takes a distance of at least 0, such as 0.05, not {threshold!r}.")
