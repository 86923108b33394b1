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
from nbfeat.explore.neighbors import distance_text, free_name
from nbfeat.explore.space import Metric, Space
from nbfeat.explore.tile import Tile, caption_columns, tile
from nbfeat.explore.vectors import Images, Made, vectors_of
from nbfeat.extraction.report import indented
from nbfeat.html import Html, paragraph, table, text_table

if TYPE_CHECKING:
    import pandas as pd

SHARE = 0.1  # of the usual distance: copies saved again or made smaller are nearer, hardly any two photographs are
MOST_TILES, MOST_OF_GROUP = 24, 6  # images that a notebook shows
CHAINED = 0.5  # of all rows in one group: then the features tell little apart


def duplicates(
    result: Made | pd.DataFrame,
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
    vectors = vectors_of(result, features, images, root)
    space = Space(list(vectors.blocks.values()), metric)
    rows = vectors.positions
    limit = SHARE * space.usual(rows) if threshold is None else _checked(threshold)
    groups = _groups(space, rows, limit)
    why = ", a tenth of the median" if threshold is None else ""
    told = [f"{metric} distance of at most {distance_text(limit)}{why}, of {vectors.title}", vectors.left_out]
    return Duplicates(
        frame=_frame(vectors.images.frame, groups),
        rest=_rest(vectors.images.frame, groups),
        threshold=limit,
        groups=tuple(groups),
        images=vectors.images,
        captions=tuple(caption_columns(vectors.images.frame, caption)),
        compared=len(rows),
        told=" · ".join(filter(None, told)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Rows that are nearly the same."""

    positions: NDArray[np.intp]
    distances: NDArray[np.float64]  # from the first


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Duplicates:
    """Groups of nearly equal images; a notebook shows them, `plot()` draws them."""

    frame: pd.DataFrame
    rest: pd.Series[bool]  # False for all but the first row of each group, indexed like the frame
    threshold: float
    groups: tuple[Group, ...]
    images: Images
    captions: tuple[Hashable, ...]
    compared: int  # rows
    told: str  # metric, threshold, features, what was left out

    def plot(self) -> NDArray[Any]:
        """Draw the images on axes of a new figure of pyplot's, and return the axes."""
        if not self.groups or self.images.column is None:
            why = "no two rows are so near" if not self.groups else "no column looks like images; name it with images="
            raise RequestError(f"There is nothing to draw: {why}.")
        shown = self._shown()
        tiles = [
            replace(one, lines=(f"group {number + 1}: {one.lines[0]}", *one.lines[1:]))
            for number, group in enumerate(shown)
            for one in group
        ]
        return gallery.plot(tiles, self.images.root, " ".join(filter(None, [self._heading(), self._more(shown)])))

    def __repr__(self) -> str:
        """Return the groups as text."""
        shown = self._shown()
        drawn = indented(self._rows(shown, text_table))
        return "\n".join(filter(None, [self._heading(), drawn, self._more(shown), self._note(), self.told]))

    def _repr_html_(self) -> str:
        shown = self._shown()
        has_images = self.images.column is not None
        body = gallery.groups(shown, self.images.root) if has_images else self._rows(shown, table)
        told = [paragraph(text) for text in (self._more(shown), self._note(), self.told) if text]
        return Html(paragraph(self._heading(), strong=True) + body + "".join(told))

    def _heading(self) -> str:
        if not self.groups:
            return f"No two of {self.compared:,} rows are nearly the same"
        count = f"{len(self.groups):,} {'group' if len(self.groups) == 1 else 'groups'}"
        return f"{count} of nearly equal images: {len(self.frame):,} of {self.compared:,} rows"

    def _shown(self) -> list[list[Tile]]:
        """Return the tiles of the first groups, as many as a notebook holds."""
        shown: list[list[Tile]] = []
        left = MOST_TILES
        for group in self.groups:
            count = min(len(group.positions), MOST_OF_GROUP)
            if count > left:
                break
            left -= count
            said = ["first", *map(distance_text, group.distances[1:count])]
            shown.append(
                [
                    tile(self.images, at, self.captions, text)
                    for at, text in zip(group.positions[:count], said, strict=True)
                ]
            )
        return shown

    def _rows(self, shown: Sequence[Sequence[Tile]], draw: Any) -> str:
        rows = [(number + 1, *tile.lines, tile.name) for number, group in enumerate(shown) for tile in group]
        return str(draw(rows, ("group", "distance", *(self.captions or ("index",)), "image"))) if rows else ""

    def _more(self, shown: Sequence[Sequence[Tile]]) -> str:
        groups = len(self.groups) - len(shown)
        rows = sum(len(group.positions) for group in self.groups[: len(shown)]) - sum(map(len, shown))
        more = [f"{rows:,} more {'row' if rows == 1 else 'rows'} of these groups"] if rows else []
        more += [f"{groups:,} more {'group' if groups == 1 else 'groups'}"] if groups else []
        return f"… and {listing(more)}: see .frame" if more else ""

    def _note(self) -> str:
        largest = max((len(group.positions) for group in self.groups), default=0)
        if largest <= max(CHAINED * self.compared, MOST_OF_GROUP):
            return ""
        return (
            f"One group holds {largest:,} of {self.compared:,} rows: the features tell little apart at this distance; "
            f"try a threshold below {distance_text(self.threshold)}."
        )


def _groups(space: Space, rows: NDArray[np.intp], limit: float) -> list[Group]:
    """Return groups of at least two rows, in the order of their first."""
    numbers = space.groups(rows, limit)
    order = np.argsort(numbers, kind="stable")
    ends = np.flatnonzero(np.diff(numbers[order])) + 1
    groups = sorted((rows[part] for part in np.split(order, ends) if len(part) > 1), key=lambda group: int(group[0]))
    return [Group(group, space.between(group, group[:1].repeat(len(group)))) for group in groups]


def _checked(threshold: float) -> float:
    is_number = isinstance(threshold, (int, float, np.number)) and not isinstance(threshold, bool)
    if is_number and np.isfinite(threshold) and threshold >= 0:
        return float(threshold)
    raise RequestError(f"threshold takes a distance of at least 0, such as 0.05, not {threshold!r}.")


def _frame(frame: pd.DataFrame, groups: Sequence[Group]) -> pd.DataFrame:
    numbers = [np.full(len(group.positions), number + 1) for number, group in enumerate(groups)]
    found = frame.take(np.concatenate([np.empty(0, np.intp), *(group.positions for group in groups)]))
    found.insert(0, free_name("group", frame), np.concatenate([np.empty(0, int), *numbers]))
    found.insert(1, free_name("distance", frame), np.concatenate([np.empty(0), *(group.distances for group in groups)]))
    return found


def _rest(frame: pd.DataFrame, groups: Sequence[Group]) -> pd.Series[bool]:
    import pandas as pd

    rest = pd.Series(data=True, index=frame.index, name="rest")
    for group in groups:
        rest.iloc[group.positions[1:]] = False
    return rest
