"""similar: the rows with the nearest features; duplicates: groups of nearly identical rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nbfeat import isolation
from nbfeat.errors import ImageError, RequestError, listing, near, sentences
from nbfeat.explore import gallery
from nbfeat.explore.gallery import Tile, caption_columns, file_name, tile
from nbfeat.explore.vectors import Data, Images, Metric, Rows, Space, Vectors, parts_of, vectors_of
from nbfeat.html import table, text_table
from nbfeat.images.decode import short
from nbfeat.images.public_hosts import redact_url
from nbfeat.images.sources import is_missing, name_of, path_of, read_thumbnail
from nbfeat.inference.spec import whole

NEIGHBORS = 12
LABELS_SHOWN = 3
SMALL = 32  # pixels to decode, to check that an image is readable
SHARE = 0.1  # of the median distance: re-saved or resized copies are nearer, hardly any two photos are
MOST_TILES, MOST_OF_GROUP = 24, 6  # shown in a notebook
CHAINED = 0.5  # of all rows in one group: then the threshold is too large


def similar(
    result: Data, to: object, k: int = NEIGHBORS, *, features: str | None = None, metric: Metric = "cosine",
    caption: Hashable | Sequence[Hashable] | None = None, images: Hashable | None = None,
    root: str | Path | None = None,
) -> Similar:  # fmt: skip
    """Find the rows whose features are nearest to those of one image.

    The search is exact. Rows without features are left out.

    Parameters
    ----------
    result : Extraction, Result or DataFrame
        A result, or a frame with feature columns.
    to : label, path, bytes, PIL image or array
        A label of the frame's index selects that row; anything else is an image. An image that isn't in the frame is
        extracted with the result's settings, including fitted normalization, so it needs a result and not a frame.
    k : int, default 12
        The number of rows to find; all if there are fewer.
    features : str, optional
        The prefix of one block. By default all blocks, each scaled to unit length so that they have equal weight.
    metric : {"cosine", "euclidean"}, default "cosine"
        Cosine distance is 1 - cos, from 0 to 2, averaged over the blocks.
    caption : str or list of str, optional
        The column or columns to show as captions; by default ``label`` if it exists, else the index.
    images : str, optional
        The column with images, if `result` is a frame; by default the one that looks like images.
    root : str or Path, optional
        The folder that relative paths start from; by default the Extraction's own, or the working folder.

    Returns
    -------
    Similar
        ``.frame`` has the nearest rows; a notebook shows their images.

    Raises
    ------
    RequestError
        If `to` is neither a row nor a readable image, labels several rows, or labels a row without features.

    Examples
    --------
    >>> nbfeat.similar(result, to=0, k=3).frame.columns[:3].tolist()
    ['distance', 'path', 'label']
    """
    vectors = vectors_of(result, features, images, root)
    space, found = Space([*vectors.blocks.values()], metric), vectors.images
    captions = caption_columns(found.frame, caption)
    position, query, shown = _find(vectors, to, captions)
    rows = vectors.positions[vectors.positions != position]
    nearest, distances = space.nearest(query, rows, whole("k")(k))
    frame = found.frame.take(nearest)
    frame.insert(0, free_name("distance", frame), distances)
    tiles = [tile(found, at, captions, text) for at, text in zip(nearest, map(distance_text, distances), strict=True)]
    heading = f"The {len(frame):,} nearest of {len(rows):,} rows to {shown.name}"
    note = " · ".join([f"{metric} distance of {listing(vectors.blocks)}", *vectors.left_out])
    return Similar(frame, found, heading, [shown, *tiles], captions or ["index"], note)


def duplicates(
    result: Data, threshold: float | None = None, *, features: str | None = None, metric: Metric = "cosine",
    caption: Hashable | Sequence[Hashable] | None = None, images: Hashable | None = None,
    root: str | Path | None = None,
) -> Duplicates:  # fmt: skip
    """Find groups of nearly identical images: copies that were re-saved, resized or slightly cropped.

    All pairs of rows are compared. Rows at most `threshold` apart are in the same group, directly or through other
    rows. Rows without features are left out.

    Parameters
    ----------
    result : Extraction, Result or DataFrame
        A result, or a frame with feature columns.
    threshold : float, optional
        The largest distance within a group; 0 finds only identical features. By default a tenth of the median distance
        between rows, because typical distances differ between networks.
    features, metric, caption, images, root
        The same as in `nbfeat.similar`.

    Returns
    -------
    Duplicates
        ``.frame`` has the groups and ``.rest`` selects one row of each; a notebook shows the images.

    Raises
    ------
    RequestError
        If `threshold` is negative or not a number, or no row has features.

    Examples
    --------
    >>> found = nbfeat.duplicates(result)
    >>> unique = photos[found.rest]
    """
    vectors = vectors_of(result, features, images, root)
    space, rows, frame = Space([*vectors.blocks.values()], metric), vectors.positions, vectors.images.frame
    is_number = isinstance(threshold, (int, float, np.number)) and not isinstance(threshold, bool)
    if threshold is not None and not (is_number and 0 <= threshold < np.inf):
        raise RequestError(f"`threshold` must be a distance of at least 0, not {threshold!r}. Use 0.05, for example.")
    limit = SHARE * space.usual(rows) if threshold is None else float(threshold)
    firsts = space.groups(rows, limit)
    _, which, sizes = np.unique(firsts, return_inverse=True, return_counts=True)
    order = np.argsort(firsts, kind="stable")
    order = order[sizes[which[order]] > 1]
    rows_in_groups, firsts, sizes = rows[order], firsts[order], sizes[sizes > 1]
    found = frame.take(rows_in_groups)
    found.insert(0, free_name("group", frame), np.repeat(np.arange(len(sizes)) + 1, sizes))
    found.insert(1, free_name("distance", frame), space.between(rows_in_groups, firsts))
    rest = pd.Series(data=True, index=frame.index, name="rest")
    rest.iloc[rows_in_groups[rows_in_groups != firsts]] = False
    captions, why = caption_columns(frame, caption), " (a tenth of the median)" if threshold is None else ""
    note = f"{metric} distance of {listing(vectors.blocks)} at most {distance_text(limit)}{why}"
    note = " · ".join([note, *vectors.left_out])
    return Duplicates(found, rest, limit, rows_in_groups, sizes, vectors.images, captions, len(rows), note)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Similar:
    """The rows nearest to one image; a notebook shows their images.

    Attributes
    ----------
    frame : DataFrame
        The nearest rows, nearest first, with ``distance`` before the frame's own columns. Ties are in frame order.
    """

    frame: pd.DataFrame
    images: Images
    heading: str
    tiles: Sequence[Tile]  # the query, then its neighbors
    head: Sequence[Hashable]  # column names for the tiles' captions
    note: str  # metric, features, what was left out

    def plot(self) -> NDArray[Any]:
        """Draw the images, query first, on a new pyplot figure and return an array of its axes, one per image."""
        if self.images.column is None:
            raise RequestError("Nothing to draw: no column looks like images. Name it with `images='COLUMN'`.")
        return gallery.plot(self.tiles, self.images.root, self.heading)

    def __repr__(self) -> str:
        return gallery.text(self.heading, self._rows(text_table), self.note)

    def _repr_html_(self) -> str:
        body = self._rows(table) if self.images.column is None else gallery.html(self.tiles, self.images.root)
        return gallery.page(self.heading, body, self.note)

    def _rows(self, draw: Callable[..., str]) -> str:
        rows = [(*tile.lines, tile.name) for tile in self.tiles[1:]]
        return draw(rows, ("distance", *self.head, "image")) if rows else ""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Duplicates:
    """Groups of nearly identical images, which a notebook shows.

    Attributes
    ----------
    frame : DataFrame
        The rows in groups, with ``group`` (from 1, in frame order) and ``distance`` (from the group's first row) before
        the frame's own columns.
    rest : Series of bool
        False for all but the first row of each group, indexed like the frame: the rows to keep.
    threshold : float
        The largest distance within a group.
    """

    frame: pd.DataFrame
    rest: pd.Series[bool]
    threshold: float
    positions: NDArray[np.intp]  # of the rows of `frame`
    sizes: NDArray[np.intp]  # rows per group
    images: Images
    captions: Sequence[Hashable]
    compared: int  # number of rows
    note: str  # metric, threshold, features, what was left out

    def plot(self) -> NDArray[Any]:
        """Draw the images on a new pyplot figure and return an array of its axes, one per image."""
        if not self.sizes.size or self.images.column is None:
            way = "no column looks like images. Name it with `images='COLUMN'`"
            way = way if self.sizes.size else "no two rows are within the threshold. Try a larger `threshold`"
            raise RequestError(f"Nothing to draw: {way}.")
        numbered = [(number, tile) for number, group in enumerate(self._groups(), 1) for tile in group]
        tiles = [replace(tile, lines=(f"group {at}: {tile.lines[0]}", *tile.lines[1:])) for at, tile in numbered]
        return gallery.plot(tiles, self.images.root, sentences(self._heading(), self._more()))

    def __repr__(self) -> str:
        return gallery.text(self._heading(), self._rows(text_table), *self._notes())

    def _repr_html_(self) -> str:
        body = self._rows(table) if self.images.column is None else gallery.groups(self._groups(), self.images.root)
        return gallery.page(self._heading(), body, *self._notes())

    def _heading(self) -> str:
        if not self.sizes.size:
            return f"No two of {self.compared:,} rows are nearly identical"
        groups = f"{len(self.sizes):,} {'group' if len(self.sizes) == 1 else 'groups'}"
        return f"{groups} of nearly identical images: {len(self.frame):,} of {self.compared:,} rows"

    def _groups(self) -> list[list[Tile]]:
        """Return the tiles to show: the first rows of the first groups."""
        shown = np.minimum(self.sizes, MOST_OF_GROUP)
        groups, starts = [], np.cumsum(self.sizes) - self.sizes
        for start, count in zip(starts, shown[np.cumsum(shown) <= MOST_TILES], strict=False):
            distances = self.frame.iloc[start + 1 : start + count, 1]
            texts = zip(self.positions[start : start + count], ["kept", *map(distance_text, distances)], strict=True)
            groups.append([tile(self.images, at, self.captions, text) for at, text in texts])
        return groups

    def _rows(self, draw: Callable[..., str]) -> str:
        rows = [(number, *tile.lines, tile.name) for number, group in enumerate(self._groups(), 1) for tile in group]
        return draw(rows, ("group", "distance", *(self.captions or ("index",)), "image")) if rows else ""

    def _more(self) -> str:
        shown = [len(group) for group in self._groups()]
        rows, groups = self.sizes[: len(shown)].sum() - sum(shown), len(self.sizes) - len(shown)
        more = [f"{rows:,} more {'row' if rows == 1 else 'rows'} in these groups"] if rows else []
        more += [f"{groups:,} more {'group' if groups == 1 else 'groups'}"] if groups else []
        return f"… and {listing(more)}: see .frame" if more else ""

    def _notes(self) -> list[str]:
        notes, largest = [self._more()], self.sizes.max(initial=0)
        if largest > max(CHAINED * self.compared, MOST_OF_GROUP):
            problem = f"One group has {largest:,} of {self.compared:,} rows: the threshold may be too large."
            notes.append(f"{problem} Try a `threshold` below {distance_text(self.threshold)}.")
        return [*notes, self.note]


def distance_text(distance: float) -> str:
    """Write a distance with three significant digits."""
    if not distance:
        return "0"
    return f"{distance:#.3g}" if distance < 1000 else f"{distance:,.0f}"


def free_name(name: Hashable, frame: pd.DataFrame) -> Hashable:
    """Return `name`, with underscores appended until it differs from every column."""
    while name in frame.columns:
        name = f"{name}_"
    return name


def _find(vectors: Vectors, to: object, captions: Sequence[Hashable]) -> tuple[int, list[Rows], Tile]:
    """Return the position of `to` (-1 if it is an image in no row), its features in each block, and its tile."""
    images = vectors.images
    position = _position(images, to)
    if position is None:
        return -1, _extracted(vectors, to), Tile(to, ("query",), file_name(to), marked=True)
    if not vectors.ok[position]:
        reason = images.reasons.get(position, "some values are missing or infinite")
        raise RequestError(f"Row {images.frame.index[position]!r} has no features: {reason}. Choose another row.")
    rows = [block[position : position + 1] for block in vectors.blocks.values()]
    return position, rows, replace(tile(images, position, captions, "query"), marked=True)


def _position(images: Images, to: object) -> int | None:
    """Return the position of the row labeled `to`, else of the first row with that path, else None."""
    index, found = images.frame.index, None
    with suppress(KeyError, TypeError, ValueError):
        found = index.get_loc(to) if isinstance(to, Hashable) and not is_missing(to) else None
    if isinstance(found, int):
        return found
    if found is not None:
        count = len(index[found])
        raise RequestError(f"{count:,} rows are labeled {to!r}. Use unique labels: `frame.reset_index(drop=True)`.")
    if images.column is None or not isinstance(to, (str, os.PathLike)) or (wanted := _path(to, images.root)) is None:
        return None
    paths = (_path(value, images.root) for value in images.frame[images.column].tolist())
    return next((number for number, path in enumerate(paths) if path == wanted), None)


def _path(value: object, root: Path) -> str | None:
    with suppress(ImageError):
        path = path_of(value, root)
        return None if path is None else os.path.normpath(path)
    return None


def _extracted(vectors: Vectors, to: object) -> list[Rows]:
    try:
        with isolation.pillow_defaults():
            read_thumbnail(to, SMALL, vectors.images.root)
    except ImageError as error:
        index = vectors.images.frame.index
        hint = near(to, [str(label) for label in index[:1000]]) if isinstance(to, str) else ""
        first = listing([repr(label) for label in index[:LABELS_SHOWN].tolist()])
        number = str(to) if isinstance(to, (int, float)) else name_of(to)
        given = short(repr(redact_url(to)) if isinstance(to, str) else number, 80)
        problem = f"{given} is neither a label of the index (which starts with {first}) nor a readable image: {error}."
        raise RequestError(f"{problem} {hint or 'Use `frame.index[n]` for the row at position n.'}") from None
    if vectors.made is None:
        problem = f"{file_name(to)} is not in the frame, and a frame doesn't record how its features were made."
        raise RequestError(f"{problem} Pass the result of `nbfeat.extract` instead of the frame.")
    parts = parts_of(vectors.made)
    if (count := len({part.column for part in parts if part.prefix in vectors.blocks})) > 1:
        blocks = listing([f"`features={prefix!r}`" for prefix in vectors.blocks], "or")
        raise RequestError(f"The features come from {count} image columns. Choose one block with {blocks}.")
    frame = pd.DataFrame({part.column: pd.Series([to], dtype=object) for part in parts})
    result = vectors.made.like(frame, root=vectors.images.root)
    return [result[prefix].to_numpy() for prefix in vectors.blocks]
