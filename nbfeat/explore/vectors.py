"""Reads the features of a result or frame as matrices, and measures distances between rows."""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nbfeat.errors import RequestError, listing
from nbfeat.extraction.columns import FeatureColumns, made_columns
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.feature_table import block_called
from nbfeat.extraction.options import one_of
from nbfeat.extraction.recipe import PartRecipe
from nbfeat.extraction.request import check_frame
from nbfeat.extraction.result import Result
from nbfeat.images.sources import image_column, spread
from nbfeat.paths import absolute

Made: TypeAlias = Extraction | Result
Data: TypeAlias = "Made | pd.DataFrame"
Rows: TypeAlias = NDArray[np.floating[Any]]
Floats: TypeAlias = NDArray[np.float64]
Positions: TypeAlias = NDArray[np.intp]
Metric = Literal["cosine", "euclidean"]
METRICS: tuple[Metric, ...] = get_args(Metric)

CHUNK = 128  # rows in float64 that fit the processor's cache
TILE = 1024  # rows compared with as many others at once
SAMPLED = 512  # rows used to estimate the median distance


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """The frame without its feature columns, and which column holds images."""

    frame: pd.DataFrame
    column: Hashable | None  # None if no column looks like images
    root: Path  # that relative paths start from
    reasons: Mapping[int, str]  # by position: why an image couldn't be read


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """One feature matrix per block, with a row for each row of the frame."""

    images: Images
    blocks: Mapping[str, Rows]  # by prefix
    ok: NDArray[np.bool_]  # which rows have features in every block
    made: Made | None  # the result they come from, if known

    @property
    def positions(self) -> Positions:
        """Positions of the rows with features."""
        return np.flatnonzero(self.ok)

    @property
    def left_out(self) -> list[str]:
        """A note on how many rows have no features, if any."""
        count = len(self.ok) - int(self.ok.sum())
        return [f"{count:,} {'row' if count == 1 else 'rows'} without features left out"] if count else []


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """The rows of one or more blocks as points under a metric.

    For cosine, and for several blocks, each block is scaled to unit length. Cosine distance is then half the squared
    distance between points, exactly 0 for equal rows. Distances use float64, in chunks to bound memory.
    """

    blocks: Sequence[Rows]
    metric: Metric

    def __post_init__(self) -> None:
        one_of(METRICS, "metric", self.metric)

    def nearest(self, query: Sequence[Rows], rows: Positions, count: int) -> tuple[Positions, Floats]:
        """Return the `count` of `rows` nearest to `query`, and their distances; ties keep the order of `rows`."""
        point = self._points(query)
        distances = _in_parts(len(rows), lambda part: self._between(self.points(rows[part]), point))
        order = np.argsort(distances, kind="stable")[:count]
        return rows[order], distances[order]

    def between(self, rows: Positions, others: Positions) -> Floats:
        """Return the distances between `rows` and `others`, pairwise."""
        return _in_parts(len(rows), lambda part: self._between(self.points(rows[part]), self.points(others[part])))

    def usual(self, rows: Positions) -> float:
        """Return the median distance between up to SAMPLED evenly sampled rows."""
        points = self.points(rows[spread(len(rows), SAMPLED)])
        found = [self._between(points[place + 1 :], points[place]) for place in range(len(points) - 1)]
        return float(np.median(np.concatenate(found))) if found else 0.0

    def groups(self, rows: Positions, limit: float) -> Positions:
        """Return for each of `rows` the first row of its group, linked by distances of at most `limit`."""
        from scipy.sparse import coo_array, csgraph

        # Equal rows are compared once: a thousand of them would give half a million pairs.
        _, different, which = np.unique(contents_of(self.blocks, rows), return_index=True, return_inverse=True)
        numbers = np.arange(len(different), dtype=np.int32)
        for first, second in self._near(rows[different], limit):
            pairs = np.ones(first.size, np.int8), (numbers[first], numbers[second])
            graph = coo_array(pairs, shape=(len(numbers), len(numbers)))
            numbers = csgraph.connected_components(graph, directed=False)[1][numbers]
        _, firsts, group = np.unique(numbers[which], return_index=True, return_inverse=True)
        return rows[firsts[group]]

    def points(self, rows: Positions) -> Floats:
        """Return rows as points."""
        return self._points([block[rows] for block in self.blocks])

    @property
    def _is_scaled(self) -> bool:
        return self.metric == "cosine" or len(self.blocks) > 1

    def _points(self, blocks: Sequence[Rows]) -> Floats:
        if not self._is_scaled:
            return blocks[0].astype(np.float64)
        units: list[Floats] = []
        for rows in blocks:
            vectors = rows.astype(np.float64)
            lengths = np.sqrt(len(blocks) * np.einsum("ij,ij->i", vectors, vectors))[:, None]
            vectors /= np.where(lengths > 0, lengths, 1)
            units += [vectors, (lengths == 0) / np.sqrt(len(blocks))]  # puts a row of zeros far from all others
        return np.hstack(units)

    def _between(self, points: Floats, others: Floats) -> Floats:
        squares = np.square(points - others).sum(axis=1)
        distances: Floats = squares / 2 if self.metric == "cosine" else np.sqrt(squares)
        return distances

    def _near(self, rows: Positions, limit: float) -> Iterator[tuple[Positions, Positions]]:
        """Yield pairs in `rows` at most `limit` apart: by products in float32 if scaled, measured again when close."""
        most = 2 * limit if self.metric == "cosine" else limit**2
        kind: Any = np.float32 if self._is_scaled else np.float64
        rounding = np.finfo(kind).eps * (32 + sum(block.shape[1] for block in self.blocks) / 4)
        for here in range(0, len(rows), TILE):
            points = self.points(rows[here : here + TILE]).astype(kind)
            for there in range(here, len(rows), TILE):
                others = self.points(rows[there : there + TILE]).astype(kind)
                sizes = np.square(points).sum(axis=1)[:, None] + np.square(others).sum(axis=1)
                squares = points @ others.T
                squares *= -2
                squares += sizes
                slack = rounding * sizes.max()
                first, second = np.nonzero(squares <= most + slack)
                is_open = squares[first, second] > most - slack
                first, second = first + here, second + there
                near = ~is_open
                near[is_open] = self.between(rows[first[is_open]], rows[second[is_open]]) <= limit
                yield first[near], second[near]


def contents_of(blocks: Collection[Rows], rows: Positions) -> NDArray[np.bytes_]:
    """Return a digest of the features of each of `rows`; equal images have equal features."""
    return np.array([blake2b(b"".join(block[row].tobytes() for block in blocks)).digest() for row in rows])


def _in_parts(count: int, measure: Callable[[slice], Floats]) -> Floats:
    parts = (slice(start, start + CHUNK) for start in range(0, count, CHUNK))
    return np.concatenate([np.empty(0), *map(measure, parts)])


def parts_of(made: Made) -> Sequence[FeatureColumns | PartRecipe]:
    """Return the parts of a result, in column order."""
    return made.parts if isinstance(made, Extraction) else made.fitted.parts


def images_of(data: Data, images: Hashable | None = None, root: str | Path | None = None) -> Images:
    """Find the images of `data`: a result knows its image column; in a frame, it is the one that looks like images."""
    start = data.root if root is None and isinstance(data, Extraction) else absolute(root or "")
    given = data.frame if isinstance(data, Made) else data
    check_frame(given)
    features = {position for positions in made_columns(given).values() for position in positions}
    frame = given.iloc[:, [position for position in range(given.shape[1]) if position not in features]]
    if not isinstance(data, Made):
        found: Hashable | None = None
        with suppress(RequestError) if images is None else nullcontext():
            found = image_column(frame, images)
        return Images(frame, found, start, {})
    column = parts_of(data)[0].column if images is None else image_column(frame, images)
    failed = data.failures[data.failures["column"] == column]
    return Images(frame, column, start, dict(zip(failed["position"].tolist(), failed["reason"].tolist(), strict=True)))


def vectors_of(
    data: Data, features: str | None = None, images: Hashable | None = None, root: str | Path | None = None
) -> Vectors:
    """Read the features of `data`: all its blocks, or the one with prefix `features`; without copying if possible."""
    if isinstance(data, Made):
        prefixes = [part.prefix for part in parts_of(data)] if features is None else [features]
        blocks = {prefix: data[prefix].to_numpy() for prefix in prefixes}
        if images is None:
            images = next(part.column for part in parts_of(data) if part.prefix in blocks)
    else:
        check_frame(data)
        made = made_columns(data)
        if not made:
            problem = "The frame has no feature columns, such as resnet50_0000 … resnet50_2047 (float32)."
            raise RequestError(f"{problem} Extract some first: `nbfeat.extract(frame, 'ResNet50')`.")
        wanted = made if features is None else {features: made[block_called(features, made)]}
        blocks = {prefix: data.iloc[:, positions].to_numpy() for prefix, positions in wanted.items()}
    ok = np.ones(len(next(iter(blocks.values()))), bool)
    for rows in blocks.values():
        for start in range(0, len(rows), TILE):
            ok[start : start + TILE] &= np.isfinite(rows[start : start + TILE]).all(axis=1)
    if not ok.any():
        raise RequestError(f"None of the {len(ok):,} rows has features in {listing(blocks)}. Use rows with features.")
    return Vectors(images_of(data, images, root), blocks, ok, data if isinstance(data, Made) else None)
