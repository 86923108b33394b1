"""ImageFeatures: extraction as a scikit-learn transformer."""

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
from nbfeat.paths import absolute

Rows = npt.NDArray[np.float32]
_BLOCK_DEFAULTS = {"layer": None, "pooling": "avg", "normalize": "none", "components": None, "weights": None}


class ImageFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """A scikit-learn transformer from images to features of pretrained networks.

    `fit` fits normalization and PCA on its rows only; `transform` applies them. Features are cached, so a grid search
    computes each image once (with ``n_jobs``, at most once per worker).

    Parameters
    ----------
    blocks : str, FeatureBlock or list of them, default "ResNet50"
        What to extract, e.g. ``"VGG16 --layer block4_pool --pooling max"``.
    images : column name or list of column names, optional
        Columns of X that hold images. By default the only column, or the column that looks like images.
    layer : str or list of str, optional
        Layer to cut the backbone at, for blocks that don't set one; several make several blocks.
    pooling : {"avg", "max", "gem", "flatten"}, default "avg"
        How a feature map becomes a vector, for blocks that don't set it.
    normalize : {"none", "l2", "standard", "minmax", "whiten"}, default "none"
        Normalization of the features, for blocks that don't set it.
    components : int, optional
        Number of columns to reduce the features to by PCA, for blocks that don't set it. By default no PCA.
    weights : str or Path, optional
        ``"imagenet"``, ``"random"`` or a file, for blocks that don't set it. By default the backbone's.
    on_failure : {"nan", "raise"}, default "nan"
        Result for an image that can't be read: a row of NaN, or an ExtractionError. `fit` also raises if every image
        fails.
    precision : {"auto", "float32", "bfloat16", "float16"}, default "auto"
        Number format that the network computes in. ``"auto"`` picks the fastest that agrees with float32.
    device : str, default "auto"
        ``"auto"``, ``"cpu"``, ``"gpu"`` or a numbered GPU such as ``"gpu:1"``.
    batch_size : int or "auto", default "auto"
        Images per batch, 1 to 4,096.
    allow_remote : bool, default False
        Fetch images from URLs.
    cache : bool, default True
        Whether to use cached features and save new ones.

    Attributes
    ----------
    recipe_ : Recipe
        Blocks, precision, fitted normalization and everything else that decides the features. `transform` uses it even
        if parameters have changed.
    failures_ : DataFrame
        Images of the last `fit` without features: position, column, image and reason. It isn't pickled.
    n_features_in_ : int
        Number of columns of X in `fit`.
    feature_names_in_ : ndarray of str
        Their names, if X was a DataFrame.

    Notes
    -----
    In joblib workers (``n_jobs``), each uses its share of the cores. A pickle contains parameters, fitted normalization
    and names, but no network, weights or images. `transform` raises RequestError if the network would now give
    different features; the last bits may differ between machines, engines and Keras versions.

    Examples
    --------
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.svm import SVC
    >>> model = make_pipeline(nbfeat.ImageFeatures("EfficientNetLite0", normalize="standard"), SVC())
    >>> model.fit(photos["path"], photos["label"]).predict(photos["path"]).shape
    (12,)
    """

    def __init__(
        self, blocks: Blocks = "ResNet50", *, images: Hashable | Sequence[Hashable] | None = None,
        layer: str | Sequence[str] | None = None, pooling: Pooling = "avg", normalize: Normalize = "none",
        components: int | None = None, weights: str | Path | None = None, on_failure: Literal["nan", "raise"] = "nan",
        precision: str = "auto", device: str = "auto", batch_size: int | str = "auto", allow_remote: bool = False,
        cache: bool = True,
    ) -> None:  # fmt: skip
        self.blocks, self.images, self.layer, self.pooling, self.normalize = blocks, images, layer, pooling, normalize
        self.components, self.weights, self.on_failure, self.precision = components, weights, on_failure, precision
        self.device, self.batch_size, self.allow_remote, self.cache = device, batch_size, allow_remote, cache

    def fit(self, X: Any, y: object = None) -> Self:
        """Fit normalization and PCA on the images of X that can be read.

        Parameters
        ----------
        X : DataFrame, Series, array or list
            Images, or columns with images: paths, bytes, PIL images or uint8 arrays.
        y : object, optional
            Ignored.

        Returns
        -------
        ImageFeatures
            This object.

        Raises
        ------
        RequestError
            X or a parameter is invalid; it is a ValueError.
        ExtractionError
            Every image failed, or one did and `on_failure` is ``"raise"``.
        """
        self._learn(X)
        return self

    def fit_transform(self, X: Any, y: object = None) -> Rows:
        """Fit and transform in one run; the result is bit-identical to `fit`, then `transform`.

        Parameters
        ----------
        X : DataFrame, Series, array or list
            Images, as in `fit`.
        y : object, optional
            Ignored.

        Returns
        -------
        ndarray of shape (rows, features)
            float32; a DataFrame after ``set_output(transform="pandas")``.
        """
        return _rows(self._learn(X))

    def transform(self, X: Any) -> Rows:
        """Return the features of the images of X, with the normalization that `fit` has fitted.

        Parameters
        ----------
        X : DataFrame, Series, array or list
            Images, as in `fit`.

        Returns
        -------
        ndarray of shape (rows, features)
            float32; a DataFrame after ``set_output(transform="pandas")``. Rows of failed images are NaN.

        Raises
        ------
        RequestError
            X doesn't have the columns of `fit`, or the network would give different features; it is a ValueError.
        ExtractionError
            An image failed and `on_failure` is ``"raise"``.
        """
        check_is_fitted(self, "recipe_")
        table = _table(X)
        named = table if table is X else np.empty(table.shape, object)  # without names, so none are compared
        validate_data(self, named, reset=False, skip_check_array=True)
        frame = table.take(list(self._places.values()), axis=1).set_axis(list(self._places), axis=1)
        if len(frame) and (extraction := self._run(frame, like=self.recipe_)).state == "done":
            return _rows(extraction)
        return np.full((len(frame), len(self.get_feature_names_out())), np.nan, np.float32)

    def get_feature_names_out(self, input_features: Sequence[str] | None = None) -> npt.NDArray[np.object_]:
        """Return the names of the feature columns, e.g. ``resnet50_0000``.

        Parameters
        ----------
        input_features : sequence of str, optional
            Only compared with the column names of `fit`.

        Returns
        -------
        ndarray of str
            One name per feature.
        """
        check_is_fitted(self, "recipe_")
        _check_feature_names_in(self, input_features)
        return np.array([name for part in self.recipe_.parts for name in part.names], dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.allow_nan = True  # a missing path is an ordinary failure
        tags.transformer_tags.preserves_dtype = []
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Omit the failures from pickles, since they name images."""
        return {name: value for name, value in super().__getstate__().items() if name != "failures_"}

    def _learn(self, X: Any) -> Extraction:
        table = _table(X)
        if not len(table):
            raise RequestError("X has no rows to fit on. Pass at least one image.")
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
            where = f" Relative paths start at {absolute('')}." if is_lost else ""
            way = " Remove them, or set `on_failure='nan'` for rows of NaN." if len(failures) < total else ""
            reasons = "; ".join(f"{image}: {reason}" for image, reason in first)
            raise ExtractionError(f"{len(failures):,} of the {total:,} images gave no features. {reasons}.{where}{way}")
        return extraction


def _table(X: Any) -> pd.DataFrame:
    if isinstance(X, pd.Series):
        return X.to_frame(X.name if isinstance(X.name, str) else "image")
    if isinstance(X, pd.DataFrame) or hasattr(X, "to_pandas"):
        check_frame(X)
        return X  # type: ignore[no-any-return]
    kind = f"{type(X).__module__}.{type(X).__qualname__}".removeprefix("builtins.")
    if isinstance(X, str | bytes | os.PathLike | dict):
        raise RequestError(f"X must be a list of images, not {kind}: use [X].")
    if isinstance(X, list | tuple) and not all(isinstance(row, list | tuple) for row in X):
        return pd.DataFrame({"image": pd.Series(list(X), dtype=object)})
    array = np.asarray(X, dtype=object)
    if array.ndim not in {1, 2}:
        shape = getattr(X, "shape", ())
        raise RequestError(f"X is a {kind} of shape {shape}. Pass a DataFrame, Series or list of images, e.g. list(X).")
    return pd.DataFrame({"image": array} if array.ndim == 1 else array)


def _rows(extraction: Extraction) -> Rows:
    rows = [part.rows for part in extraction.parts if part.rows is not None]
    return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)
