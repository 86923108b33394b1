"""similar: the rows whose features are nearest to those of one; duplicates: groups of rows nearly the same."""

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
SMALL = 32  # pixels to which an image is read, to see whether it can be
SHARE = 0.1  # of the usual distance: copies saved again or made smaller are nearer, hardly any two photographs are
MOST_TILES, MOST_OF_GROUP = 24, 6  # images that a notebook shows
CHAINED = 0.5  # of all rows in one group: then the features tell little apart


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
    space, found = Space([*vectors.blocks.values()], metric), vectors.images
    captions = caption_columns(found.frame, caption)
    position, query, asked = _find(vectors, to, captions)
    rows = vectors.positions[vectors.positions != position]
    nearest, distances = space.nearest(query, rows, whole("k")(k))
    frame = found.frame.take(nearest)
    frame.insert(0, free_name("distance", frame), distances)
    tiles = [tile(found, at, captions, text) for at, text in zip(nearest, map(distance_text, distances), strict=True)]
    heading = f"The {len(frame):,} nearest of {len(rows):,} rows to {asked.name}"
    note = " · ".join([f"{metric} distance of {listing(vectors.blocks)}", *vectors.left_out])
    return Similar(frame, found, heading, [asked, *tiles], captions or ["index"], note)


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
    vectors = vectors_of(result, features, images, root)
    space, rows, frame = Space([*vectors.blocks.values()], metric), vectors.positions, vectors.images.frame
    is_number = isinstance(threshold, (int, float, np.number)) and not isinstance(threshold, bool)
    if threshold is not None and not (is_number and 0 <= threshold < np.inf):
        raise RequestError(f"threshold takes a distance of at least 0, such as 0.05, not {threshold!r}.")
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
    captions, why = caption_columns(frame, caption), ", a tenth of the median" if threshold is None else ""
    note = f"{metric} distance of at most {distance_text(limit)}{why}, of {listing(vectors.blocks)}"
    note = " · ".join([note, *vectors.left_out])
    return Duplicates(found, rest, limit, rows_in_groups, sizes, vectors.images, captions, len(rows), note)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Similar:
    """The rows nearest to one; a notebook shows their images, `plot()` draws them."""

    frame: pd.DataFrame
    images: Images
    heading: str
    tiles: Sequence[Tile]  # the one that they are near to, then they
    head: Sequence[Hashable]  # of the tiles' lines
    note: str  # metric, features, what was left out

    def plot(self) -> NDArray[Any]:
        """Draw the images, the one asked for first, on axes of a new figure of pyplot's, and return the axes."""
        if self.images.column is None:
            raise RequestError(
                "There are no images to draw: no column looks like images. Name it with images='COLUMN'."
            )
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
    """Groups of nearly equal images; a notebook shows them, `plot()` draws them."""

    frame: pd.DataFrame
    rest: pd.Series[bool]  # False for all but the first row of each group, indexed like the frame
    threshold: float
    positions: NDArray[np.intp]  # of the rows of `frame`
    sizes: NDArray[np.intp]  # of the groups
    images: Images
    captions: Sequence[Hashable]
    compared: int  # rows
    note: str  # metric, threshold, features, what was left out

    def plot(self) -> NDArray[Any]:
        """Draw the images on axes of a new figure of pyplot's, and return the axes."""
        if not self.sizes.size or self.images.column is None:
            why = "no column looks like images; name it with images=" if self.sizes.size else "no two rows are so near"
            raise RequestError(f"There is nothing to draw: {why}.")
        numbered = [(number, tile) for number, group in enumerate(self._groups(), 1) for tile in group]
        tiles = [replace(tile, lines=(f"group {at}: {tile.lines[0]}", *tile.lines[1:])) for at, tile in numbered]
        return gallery.plot(tiles, self.images.root, sentences(self._heading(), self._more()))

    def __repr__(self) -> str:
        return gallery.text(self._heading(), self._rows(text_table), *self._notes())

    def _repr_html_(self) -> str:
        has_images = self.images.column is not None
        body = gallery.groups(self._groups(), self.images.root) if has_images else self._rows(table)
        return gallery.page(self._heading(), body, *self._notes())

    def _heading(self) -> str:
        if not self.sizes.size:
            return f"No two of {self.compared:,} rows are nearly the same"
        groups = f"{len(self.sizes):,} {'group' if len(self.sizes) == 1 else 'groups'}"
        return f"{groups} of nearly equal images: {len(self.frame):,} of {self.compared:,} rows"

    def _groups(self) -> list[list[Tile]]:
        """Return the first rows of the first groups, as many as a notebook holds."""
        shown = np.minimum(self.sizes, MOST_OF_GROUP)
        groups = []
        for start, count in zip(
            np.cumsum(self.sizes) - self.sizes, shown[np.cumsum(shown) <= MOST_TILES], strict=False
        ):
            distances = self.frame.iloc[start + 1 : start + count, 1]
            texts = zip(self.positions[start : start + count], ["first", *map(distance_text, distances)], strict=True)
            groups.append([tile(self.images, at, self.captions, text) for at, text in texts])
        return groups

    def _rows(self, draw: Callable[..., str]) -> str:
        groups = enumerate(self._groups(), 1)
        rows = [(number, *tile.lines, tile.name) for number, group in groups for tile in group]
        return draw(rows, ("group", "distance", *(self.captions or ("index",)), "image")) if rows else ""

    def _more(self) -> str:
        shown = [len(group) for group in self._groups()]
        rows, groups = self.sizes[: len(shown)].sum() - sum(shown), len(self.sizes) - len(shown)
        more = [f"{rows:,} more {'row' if rows == 1 else 'rows'} of these groups"] if rows else []
        more += [f"{groups:,} more {'group' if groups == 1 else 'groups'}"] if groups else []
        return f"… and {listing(more)}: see .frame" if more else ""

    def _notes(self) -> list[str]:
        notes, largest = [self._more()], self.sizes.max(initial=0)
        if largest > max(CHAINED * self.compared, MOST_OF_GROUP):
            notes.append(
                f"One group holds {largest:,} of {self.compared:,} rows: the features tell little apart at this "
                f"distance; try a threshold below {distance_text(self.threshold)}."
            )
        return [*notes, self.note]


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
    """Return where `to` is, -1 where it is an image that is in no row; its features in each block; and its tile."""
    images = vectors.images
    position = _position(images, to)
    if position is None:
        return -1, _extracted(vectors, to), Tile(to, ("asked for",), file_name(to), marked=True)
    if not vectors.ok[position]:
        reason = images.reasons.get(position, "its values are missing or not finite")
        raise RequestError(f"Row {images.frame.index[position]!r} has no features: {reason}. Choose another row.")
    rows = [block[position : position + 1] for block in vectors.blocks.values()]
    return position, rows, replace(tile(images, position, captions, "asked for"), marked=True)


def _position(images: Images, to: object) -> int | None:
    """Return where the row of label `to` is, else the first row with this very path; None where there is none."""
    index, found = images.frame.index, None
    with suppress(KeyError, TypeError, ValueError):
        found = index.get_loc(to) if isinstance(to, Hashable) and not is_missing(to) else None
    if isinstance(found, int):
        return found
    if found is not None:
        count = len(index[found])
        raise RequestError(
            f"{count:,} rows are labelled {to!r}. Make labels unique first: frame.reset_index(drop=True)."
        )
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
        asked = short(repr(redact_url(to)) if isinstance(to, str) else number, 80)
        raise RequestError(
            f"{asked} is no label of the index (which begins with {first}), and no image that can be read: {error}. "
            + (hint or "frame.index[n] is the label of the row at position n.")
        ) from None
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
