"""Rows of features → two numbers each: principal components, t-SNE or UMAP; seeded."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import RequestError
from nbfeat.inference.engines.cpu_count import available_cores

Method = Literal["pca", "tsne", "umap"]
METHODS: tuple[Method, ...] = get_args(Method)
COMPONENTS = 50  # before t-SNE and UMAP, as their authors do: faster, and less noise
PERPLEXITY, NEIGHBORS = 30, 15  # the methods' own defaults, where there are rows enough
LEAST_ROWS = {"pca": 2, "tsne": 4, "umap": 4}
FEW_ROWS = 1_000  # too few for several threads
SEED = 0

Places = NDArray[np.float64]


def lay_out(points: NDArray[Any], method: Method) -> tuple[Places, tuple[str, str]]:
    """Return x and y of each point, and what the axes are called; empty where they mean nothing."""
    count, least = len(points), LEAST_ROWS[method]
    if count < least:
        raise RequestError(f"{method} takes at least {least} rows with features, and there are {count}.")
    if not (points != points[0]).any():
        raise RequestError(f"There is nothing to lay out: all {count:,} rows have the same features.")
    if method == "pca":
        return _pca(points)
    reduced = _components(points, COMPONENTS)[0]
    return (_tsne(reduced) if method == "tsne" else _umap(reduced)), ("", "")


def check_installed(method: Method) -> None:
    """Raise RequestError where what `method` takes is not installed."""
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise RequestError(
            "method='umap' needs a package that is not installed: pip install umap-learn. Or take method='tsne'."
        )


def _pca(points: NDArray[Any]) -> tuple[Places, tuple[str, str]]:
    places, shares = _components(points, 2)
    if places.shape[1] == 1:  # one feature, or two rows
        return np.column_stack([places, np.zeros(len(places))]), (_named(0, shares[0]), "")
    return places, (_named(0, shares[0]), _named(1, shares[1]))


def _named(number: int, share: float) -> str:
    return f"PC {number + 1} ({share:.0%} of variance)"


def _components(points: NDArray[Any], count: int) -> tuple[Places, NDArray[Any]]:
    from sklearn.decomposition import PCA

    pca = PCA(min(count, *points.shape), random_state=SEED)
    return pca.fit_transform(points), pca.explained_variance_ratio_


def _tsne(points: NDArray[Any]) -> Places:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    start = "pca" if points.shape[1] > 1 else "random"
    # More threads than cores wait for each other, fifty times as long as they work; OpenMP does not know of quotas.
    with threadpool_limits(available_cores() if len(points) > FEW_ROWS else 1, "openmp"):
        places: Places = TSNE(2, perplexity=perplexity, init=start, random_state=SEED).fit_transform(points)
    return places


def _umap(points: NDArray[Any]) -> Places:
    umap: Any = importlib.import_module("umap")
    # One job, since a seed takes that; UMAP would warn of it.
    reducer = umap.UMAP(n_neighbors=min(NEIGHBORS, len(points) - 1), random_state=SEED, n_jobs=1)
    places: Places = reducer.fit_transform(points)
    return places
