"""Normalize features (L2, standard, min-max, PCA, whitening), outside the network, so that the cache holds raw ones."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from nbfeat.errors import RequestError
from nbfeat.extraction.options import FeatureBlock

Rows = NDArray[np.floating[Any]]
CHUNK = 4096  # rows normalized at a time, to avoid a second matrix of full height
NOISE = 4 * np.finfo(np.float32).eps  # of singular values, relative to the largest, times the root of the longer side
FITTED_AT_ONCE = 1024  # rows in float64, which scikit-learn copies several times


@dataclass(frozen=True, slots=True)
class Normalizer:
    """L2, then an affine map per column, then a projection; each is optional."""

    unit_length: bool = False
    shift: Rows | None = field(default=None, repr=False)
    stretch: Rows | None = field(default=None, repr=False)
    center: Rows | None = field(default=None, repr=False)
    axes: Rows | None = field(default=None, repr=False)  # (components, width)

    def apply(self, rows: Rows) -> Rows:
        """Return normalized rows, in place unless the width changes."""
        out = rows if self.axes is None else np.empty((len(rows), len(self.axes)), np.float32)
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            out[part] = self.applied_to(rows[part])
        return out

    def applied_to(self, rows: Rows) -> Rows:
        """Return normalized rows in a new matrix."""
        if self.unit_length:
            length = np.linalg.norm(rows, axis=1, keepdims=True)
            rows = rows / np.where(length > 0, length, 1)
        if self.shift is not None and self.stretch is not None:
            rows = (rows - self.shift) * self.stretch
        if self.center is not None and self.axes is not None:
            # Row by row, in one thread: a product's last bits depend on other rows and on the number of threads.
            centered, rows = rows - self.center, np.empty((len(rows), len(self.axes)), np.float32)
            with threadpool_limits(1, "blas"):
                for row, projected in zip(centered, rows, strict=True):
                    np.dot(self.axes, row, out=projected)
        return rows

    @property
    def rank(self) -> int:
        """How many components carry variance; whitening sets the others to zero."""
        return 0 if self.axes is None else int(np.count_nonzero(self.axes.any(axis=1)))


def learn(block: FeatureBlock, rows: Rows, chosen: NDArray[np.bool_]) -> Normalizer:
    """Fit the normalization of `block` on the `chosen` rows with scikit-learn; PCA is seeded."""
    base = Normalizer(unit_length=block.normalize == "l2")
    if not block.is_learned:
        return base
    learned = rows[chosen]
    check(block, rows.shape[1], len(learned))
    if block.normalize in {"standard", "minmax"}:
        base = Learner(block, rows.shape[1]).fit(learned)
    if block.components is None:
        return base
    from sklearn.decomposition import PCA

    whiten = block.normalize == "whiten"
    with np.errstate(invalid="ignore", divide="ignore"):  # a single row has no variance, which is 0 / 0
        pca = PCA(block.components, whiten=whiten, random_state=0).fit(base.applied_to(learned))
    axes, spread = pca.components_, np.sqrt(pca.explained_variance_)[:, None]
    if whiten:  # without rounding errors, which it would scale up to millions
        noise = NOISE * np.sqrt(max(learned.shape)) * spread.max(initial=0)
        axes = np.divide(axes, spread, out=np.zeros_like(axes), where=spread > noise)
    return Normalizer(base.unit_length, base.shift, base.stretch, _f32(pca.mean_), _f32(axes))


class Learner:
    """Fits the normalization of a `block` without components, on rows that come in chunks."""

    def __init__(self, block: FeatureBlock, width: int) -> None:
        from sklearn.preprocessing import MinMaxScaler, StandardScaler

        self._block, self._width, self._count = block, width, 0
        self._scaler: Any = StandardScaler() if block.normalize == "standard" else MinMaxScaler()

    def fit(self, rows: Rows) -> Normalizer:
        """Fit on these rows only."""
        self._scaler.fit(rows)
        self._count = len(rows)
        return self.learned()

    def see(self, rows: Rows) -> None:
        """Add rows to fit on."""
        for start in range(0, len(rows), FITTED_AT_ONCE):
            self._scaler.partial_fit(rows[start : start + FITTED_AT_ONCE].astype(np.float64))
        self._count += len(rows)

    def learned(self) -> Normalizer:
        """Return the fitted normalization; raise RequestError if it had no rows to fit on."""
        check(self._block, self._width, self._count)
        if self._block.normalize == "standard":
            return Normalizer(shift=_f32(self._scaler.mean_), stretch=_f32(1 / self._scaler.scale_))
        return Normalizer(shift=_f32(self._scaler.data_min_), stretch=_f32(self._scaler.scale_))


def check(block: FeatureBlock, width: int, count: int) -> None:
    """Raise RequestError if `count` rows of features of that `width` are too few for what `block` fits."""
    if not count:
        problem = f"`{block}` can't be fitted: none of the rows to fit on has features."
        raise RequestError(f"{problem} Select other rows with `fit_on`.")
    if (block.components or 0) > (most := min(count, width)):
        there = f"{width:,} features of {block.backbone} and {count:,} rows to fit on"
        way = f"Use `components={most}` or fewer."
        raise RequestError(f"`components={block.components}` is too many for {there}. {way}")


def _f32(values: Rows) -> Rows:
    return np.ascontiguousarray(values, np.float32)
