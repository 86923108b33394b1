"""How far rows of features are from each other, and which hang together.

Every row becomes a point, so that both metrics are distances between points: of the cosine metric, and wherever several
blocks are taken together, each block has unit length, so that all blocks count the same. The cosine distance 1 - cos is
then half the squared distance between points, which is exactly 0 for equal rows; of several blocks it is their mean.

Products in float32 tell which rows may be near; those alone are measured, in float64. Both are done in parts, so that
memory does not grow with the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from nbfeat.explore.vectors import Rows
from nbfeat.extraction.options import one_of
from nbfeat.images.sources import spread

Metric = Literal["cosine", "euclidean"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Distances: TypeAlias = NDArray[np.float64]
Positions: TypeAlias = NDArray[np.intp]

CHUNK = 256  # rows in float64 that stay in the processor's cache
TILE = 1024  # rows compared with as many others at a time
SAMPLED = 512  # rows whose distances tell what is usual
SMALLEST = 1e-30  # squares below it lose digits in float32


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """Rows in several blocks, as points under a metric."""

    blocks: Sequence[Rows]
    metric: Metric

    def __post_init__(self) -> None:
        """Check the metric."""
        one_of(METRICS, "metric")(self.metric)

    def nearest(self, query: Sequence[Rows], rows: Positions, count: int) -> tuple[Positions, Distances]:
        """Return the `count` of `rows` nearest to the one row in each block of `query`, and how far each is.

        Exact; equal distances stand in the order of `rows`.
        """
        if not rows.size:
            return rows, np.empty(0)
        parts = [rows[start : start + TILE] for start in range(0, len(rows), TILE)]
        found = [self._about(self._parts(part), query) for part in parts]
        about, slack = (np.concatenate(column)[:, 0] for column in zip(*found, strict=True))
        count = min(count, len(rows))
        most = np.partition(about + slack, count - 1)[count - 1]
        rows = rows[~(about - slack > most)]  # not a number where float32 does not reach: measured
        point = self._points(query)
        distances = np.concatenate(
            [self._between(self.points(rows[at : at + CHUNK]), point) for at in range(0, len(rows), CHUNK)]
        )
        order = np.argsort(distances, kind="stable")[:count]
        return rows[order], distances[order]

    def usual(self, rows: Positions) -> float:
        """Return the median distance between rows, of up to SAMPLED spread over all."""
        chosen = rows[spread(len(rows), SAMPLED)]
        points = self.points(chosen)
        found = [self._between(points[number + 1 :], points[number]) for number in range(len(points) - 1)]
        return float(np.median(np.concatenate(found))) if found else 0.0

    def groups(self, rows: Positions, limit: float) -> NDArray[np.int32]:
        """Return a number for each of `rows`, the same for those joined by steps of at most `limit`."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        different, which = self._different(rows)  # a thousand equal rows would be half a million pairs
        count = len(different)
        numbers = np.arange(count, dtype=np.int32)
        for first, second in self._near(different, limit):
            graph = coo_array((np.ones(first.size, np.int8), (numbers[first], numbers[second])), shape=(count, count))
            numbers = connected_components(graph, directed=False)[1][numbers]
        return numbers[which]

    def between(self, rows: Positions, others: Positions) -> Distances:
        """Return how far each of `rows` is from the one in the same place of `others`."""
        parts = [slice(at, at + CHUNK) for at in range(0, len(rows), CHUNK)]
        found = [self._between(self.points(rows[part]), self.points(others[part])) for part in parts]
        return np.concatenate(found) if found else np.empty(0)

    def points(self, rows: Positions) -> NDArray[np.float64]:
        """Return the points of some rows."""
        return self._points(self._parts(rows))

    @property
    def scales(self) -> bool:
        """Whether each block has unit length."""
        return self.metric == "cosine" or len(self.blocks) > 1

    def _parts(self, rows: Positions) -> list[Rows]:
        return [block[rows] for block in self.blocks]

    def _points(self, parts: Sequence[Rows]) -> NDArray[np.float64]:
        if not self.scales:
            return parts[0].astype(np.float64)
        units = np.concatenate([_unit(part.astype(np.float64)) for part in parts], axis=1)
        units /= np.sqrt(len(parts))
        return units

    def _between(self, points: NDArray[np.float64], others: NDArray[np.float64]) -> Distances:
        squares = np.square(points - others).sum(axis=1)
        distances: Distances = squares / 2 if self.metric == "cosine" else np.sqrt(squares)
        return distances

    def _near(self, rows: Positions, limit: float) -> Iterator[tuple[Positions, Positions]]:
        """Yield pairs of places in `rows` that are at most `limit` apart."""
        most = 2 * limit if self.metric == "cosine" else limit**2
        starts = range(0, len(rows), TILE)
        for start, other in ((start, other) for start in starts for other in starts if other >= start):
            here, there = rows[start : start + TILE], rows[other : other + TILE]
            squares, slack = self._about(
                [block[here] for block in self.blocks], [block[there] for block in self.blocks]
            )
            maybe = ~(squares - slack > most)
            if other == start:
                maybe = np.triu(maybe, 1)
            left, right = np.nonzero(maybe)
            unsure = np.flatnonzero(~((squares + slack)[left, right] <= most))
            near = np.ones(left.size, bool)
            near[unsure] = self.between(here[left[unsure]], there[right[unsure]]) <= limit
            if near.any():
                yield start + left[near], other + right[near]

    def _about(self, first: Sequence[Rows], second: Sequence[Rows]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return about how far points are from others, squared, and by how much that may be wrong."""
        squares = np.zeros((len(first[0]), len(second[0])), np.float32)
        slack: NDArray[Any] = np.zeros((1, 1), np.float32)
        with np.errstate(all="ignore"):
            for rows, others in zip(first, second, strict=True):
                products, sizes, other_sizes = rows @ others.T, _sizes(rows)[:, None], _sizes(others)[None, :]
                rounding = np.finfo(np.float32).eps * (16 + rows.shape[1] / 8)  # sums of eight or more lanes
                products *= -2
                if self.scales:
                    products /= np.sqrt(sizes)
                    products /= np.sqrt(other_sizes)
                    squares += (products + 2) / len(first)
                    slack = slack + 4 * rounding / len(first)
                else:
                    squares += products + sizes + other_sizes
                    slack = slack + rounding * (sizes + other_sizes)
        return squares, np.broadcast_to(slack, squares.shape)

    def _different(self, rows: Positions) -> tuple[Positions, Positions]:
        """Return the first of each set of equal `rows`, and for each row which of those it equals."""
        seen: dict[bytes, int] = {}
        which = np.array([seen.setdefault(self._content(row), len(seen)) for row in rows], np.intp)
        return rows[np.unique(which, return_index=True)[1]], which

    def _content(self, row: np.intp) -> bytes:
        return blake2b(b"".join(block[row].tobytes() for block in self.blocks)).digest()


def _sizes(rows: Rows) -> Rows:
    """Return squared lengths; not a number where float32 does not hold them."""
    sizes = np.einsum("ij,ij->i", rows, rows)
    return np.where((sizes > SMALLEST) & np.isfinite(sizes), sizes, np.nan)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rows of unit length; one of zeros gets a direction of its own, so that it is far from all others."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.concatenate([rows / np.where(lengths > 0, lengths, 1), lengths == 0], axis=1)
