"""ImageFeatures: extraction as a transformer of scikit-learn."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted, validate_data

from nbfeat.errors import ExtractionError, RequestError
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.options import Normalize, one_of
from nbfeat.extraction.request import Blocks, check_frame
from nbfeat.extraction.run import FIRST_REASONS
from nbfeat.images.sources import image_column
from nbfeat.inference.spec import Pooling

Rows = npt.NDArray[np.float32]
_BLOCK_DEFAULTS = {"layer": None, "pooling": "avg", "normalize": "none", "components": None, "weights": None}


class ImageFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """Turn images into features of pretrained networks, as a step of a scikit-learn pipeline.

    `fit` learns the normalizations that blocks ask for, from its rows alone; `transform` applies them. Features come
    from the cache where an image was seen before: a grid search decodes each image once, or once in each worker.

    Parameters
    ----------
    blocks
        What to extract: ``"ResNet50"``, ``"VGG16 --layer block4_pool --pooling max"``, a FeatureBlock, or a list of
        them.
    images
        The column of X that holds images, or several; by default the only one, or the one that looks like images.
    layer, pooling, normalize, components, weights
        Block options for blocks that do not say otherwise, as in `nbfeat.extract`.
    on_failure
        What becomes of an image that cannot be read: ``"nan"``, a row of NaN, for a step that takes them
        (``HistGradientBoostingClassifier``) or fills them (``SimpleImputer``); or ``"raise"``, an ExtractionError. A
        fit of which every image fails raises in either case.
    precision, device, batch_size, allow_remote, cache
        As in `nbfeat.extract`; a pickle keeps them. In a worker of joblib (``n_jobs``) threads are the cores ÷ the
        workers. Without the cache each `fit` and `transform` computes its images again.

    Attributes
    ----------
    recipe_ : Recipe
        The blocks, the precision that was computed in, what was learned, and all that decides the numbers; `transform`
        keeps to it, whatever the parameters are by then.
    failures_ : DataFrame
        The images of the last `fit` that gave no features: position, column, image, reason. It is not pickled.
    n_features_in_ : int
        How many columns X had in `fit`.
    feature_names_in_ : ndarray of str
        Their names, where X was a frame.

    Notes
    -----
    X is a frame, a series, an array with a column of images, or a list of images: paths, bytes, PIL images, uint8
    arrays. The result is a float32 array, or a frame with the index of X after ``set_output(transform="pandas")``.

    A pickle holds parameters, what was learned and names: no network, no weights, no images. `transform` refuses, with
    the difference, where the network would give other features than those that were fitted; another machine, engine
    or release of Keras may give other last bits.

    Examples
    --------
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.svm import SVC
    >>> model = make_pipeline(nbfeat.ImageFeatures("Pocket", normalize="standard"), SVC())
    >>> model.fit(photos["path"], photos["label"]).predict(["new.jpg"])  # doctest: +SKIP
    array(['tulip'], dtype=object)
    """

    def __init__(
        self,
        blocks: Blocks = "ResNet50",
        *,
        images: Hashable | Sequence[Hashable] | None = None,
        layer: str | Sequence[str] | None = None,
        pooling: Pooling = "avg",
        normalize: Normalize = "none",
        components: int | None = None,
        weights: str | Path | None = None,
        on_failure: Literal["nan", "raise"] = "nan",
        precision: str = "auto",
        device: str = "auto",
        batch_size: int | str = "auto",
        allow_remote: bool = False,
        cache: bool = True,
    ) -> None:
        self.blocks = blocks
        self.images = images
        self.layer = layer
        self.pooling = pooling
        self.normalize = normalize
        self.components = components
        self.weights = weights
        self.on_failure = on_failure
        self.precision = precision
        self.device = device
        self.batch_size = batch_size
        self.allow_remote = allow_remote
        self.cache = cache

    def fit(self, X: Any, y: object = None) -> Self:  # as scikit-learn calls them
        """Learn the normalizations from the images of X that can be read, and how wide the features are.

        Raises
        ------
        RequestError
            A ValueError: X or a parameter is none that could be worked with.
        ExtractionError
            Every image failed, or one did and `on_failure` is ``"raise"``.
        """
        self._learn(X)
        return self

    def fit_transform(self, X: Any, y: object = None) -> Rows:
        """Do `fit` and `transform` in one run; the result is the same to the bit."""
        return _rows(self._learn(X))

    def transform(self, X: Any) -> Rows:
        """Return the features of the images of X, normalized by what `fit` has learned.

        Raises
        ------
        RequestError
            A ValueError: X does not have the columns of `fit`, or the network gives other features now.
        ExtractionError
            An image failed and `on_failure` is ``"raise"``.
        """
        check_is_fitted(self, "recipe_")
        table = _table(X)
        named = table if table is X else np.empty(table.shape, object)  # which has no names to compare
        validate_data(self, named, reset=False, skip_check_array=True)
        frame = table.take(list(self._places.values()), axis=1).set_axis(list(self._places), axis=1)
        if len(frame) and (extraction := self._run(frame, like=self.recipe_)).state == "done":
            return _rows(extraction)
        return np.full((len(frame), len(self.get_feature_names_out())), np.nan, np.float32)

    def get_feature_names_out(self, input_features: Sequence[str] | None = None) -> npt.NDArray[np.object_]:
        """Return the names of the columns, e.g. ``resnet50_0000``; `input_features` are only checked."""
        check_is_fitted(self, "recipe_")
        _check_feature_names_in(self, input_features)
        return np.array([name for part in self.recipe_.parts for name in part.names], dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.allow_nan = True  # a missing path is a failure like others
        tags.transformer_tags.preserves_dtype = []
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the table of failures, which names images."""
        return {name: value for name, value in super().__getstate__().items() if name != "failures_"}

    def _learn(self, X: Any) -> Extraction:
        table = _table(X)
        if not len(table):
            raise RequestError("X has no rows: there is no image to learn from.")
        asked = self.images if isinstance(self.images, list | tuple) else [self.images]
        is_nameless = table.shape[1] == len(asked) == 1 and (asked[0] is None or table is not X)
        columns = [*table.columns] if is_nameless else [image_column(table, column) for column in asked]
        given = {name: getattr(self, name) for name, value in _BLOCK_DEFAULTS.items() if getattr(self, name) != value}
        extraction = self._run(table[columns], self.blocks, precision=self.precision, **given)
        # Only now, so that a fit that fails leaves what an earlier one made.
        validate_data(self, table if table is X else np.empty(table.shape, object), skip_check_array=True)
        self._places = {column: [*table.columns].index(column) for column in columns}
        self.recipe_ = extraction.to_recipe("The fitted ImageFeatures")
        self.failures_ = extraction.failures
        return extraction

    def _run(self, frame: pd.DataFrame, *blocks: Blocks, **options: Any) -> Extraction:
        """Run over the images in all columns of `frame`; rows that fail may stay NaN, also all of a `transform`."""
        one_of(("nan", "raise"), "on_failure", self.on_failure)
        options |= {name: getattr(self, name) for name in ("device", "batch_size", "allow_remote", "cache")}
        extraction = Extraction(frame, *blocks, images=list(frame.columns), **options)
        try:
            extraction.run()
        except ExtractionError:
            if len(extraction.failures) < extraction.total:
                raise
        failures, total = extraction.failures, extraction.total
        if not failures.empty and (self.on_failure == "raise" or (len(failures) == total and "like" not in options)):
            first = failures[["image", "reason"]].head(FIRST_REASONS).to_numpy().tolist()
            is_lost = failures["reason"].str.startswith("no such file").any()
            where = f" Relative paths start at {Path.cwd()}." if is_lost else ""
            way = " Leave them out, or set on_failure='nan' for rows of NaN." if len(failures) < total else ""
            reasons = "; ".join(f"{image}: {reason}" for image, reason in first)
            raise ExtractionError(f"{len(failures):,} of the {total:,} images gave no features. {reasons}.{where}{way}")
        return extraction


def _table(X: Any) -> pd.DataFrame:
    """Return X as a frame: a series or a list is one column; of an array, each column is one."""
    if isinstance(X, pd.Series):
        return X.to_frame(X.name if isinstance(X.name, str) else "image")
    if isinstance(X, pd.DataFrame) or hasattr(X, "to_pandas"):
        check_frame(X)
        return X  # type: ignore[no-any-return]
    kind = f"{type(X).__module__}.{type(X).__qualname__}".removeprefix("builtins.")
    if isinstance(X, str | bytes | os.PathLike | dict):
        raise RequestError(f"X is a {kind}, not a list of images: write [X].")
    if isinstance(X, list | tuple) and not all(isinstance(row, list | tuple) for row in X):
        return pd.DataFrame({"image": pd.Series(list(X), dtype=object)})
    array = np.asarray(X, dtype=object)
    if array.ndim not in {1, 2}:
        shape = getattr(X, "shape", ())
        raise RequestError(f"X is a {kind} of shape {shape}: give a frame, a series or a list of images, e.g. list(X).")
    return pd.DataFrame({"image": array} if array.ndim == 1 else array)


def _rows(extraction: Extraction) -> Rows:
    """Return the features of all blocks side by side, in an array that may be written to."""
    rows = [part.rows for part in extraction.parts if part.rows is not None]
    return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)
