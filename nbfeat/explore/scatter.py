"""scatter: features in two dimensions (PCA, t-SNE or UMAP; seeded), colored by a column."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from nbfeat.errors import RequestError, listing
from nbfeat.explore.gallery import COLORS, axes, colors, plain
from nbfeat.explore.neighbors import free_name
from nbfeat.explore.scoring import MOST_CLASSES, column_of, drawn
from nbfeat.explore.vectors import Data, Space, vectors_of
from nbfeat.extraction.options import one_of
from nbfeat.html import Html, escape, paragraph
from nbfeat.images.decode import short
from nbfeat.inference.engines.cpu_count import available_cores
from nbfeat.inference.spec import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Method = Literal["pca", "tsne", "umap"]
TITLES = {"pca": "Principal components", "tsne": "t-SNE", "umap": "UMAP"}
COMPONENTS = 50  # before t-SNE and UMAP, as their authors recommend: faster, with less noise
PERPLEXITY, NEIGHBORS = 30, 15  # the methods' own defaults, if there are enough rows
FEW_ROWS = 1_000  # too few to benefit from several threads
SEED = 0
LIMIT = 5_000  # points: t-SNE takes a minute or more, and more points would only overlap
MISSING, OTHERS = "missing", "other: "
GREY = (0.6, 0.6, 0.6)
MARKERS = "os^DvPX<>*dp"  # so that color is not the only cue
WIDTH, HEIGHT, DPI = 7.0, 4.6, 100
SHADES = 128  # in the PNG: a third of the size, with no visible difference
LONGEST = 30  # characters of a name in the legend
MANY_POINTS = 1_000


def scatter(
    result: Data, color: object = "label", method: Method = "pca", *, features: str | None = None, limit: int = LIMIT,
) -> Scatter:  # fmt: skip
    """Plot features in two dimensions, colored by a column. The same rows always give the same plot.

    Parameters
    ----------
    result : Extraction, Result or DataFrame
        A result, or a frame with feature columns. Rows without features are left out.
    color : str, array-like or None, default "label"
        A column of the frame, or one value per row. Text, booleans, categories, and whole numbers with at most 20
        distinct values are classes, each with its own color and marker (if more than 10, only the 9 most frequent);
        other numbers get a color scale. None for a single color.
    method : {"pca", "tsne", "umap"}, default "pca"
        PCA is immediate; t-SNE takes a minute or more for 5,000 rows; UMAP needs umap-learn. t-SNE and UMAP use the
        first 50 principal components, and their distances between groups mean little.
    features : str, optional
        The prefix of one block. By default all blocks, each scaled to unit length so that they have equal weight.
    limit : int, default 5000
        The most points to plot, sampled in proportion to the classes with a fixed seed.

    Returns
    -------
    Scatter
        The plot, which a notebook shows; ``.frame`` has the points.

    Raises
    ------
    RequestError
        If there are too few rows, all features are equal, or umap-learn is missing.

    Examples
    --------
    >>> nbfeat.scatter(result, color="label").frame.columns.tolist()
    ['x', 'y', 'label']
    """
    one_of([*TITLES], "method", method)
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise RequestError("`method='umap'` needs umap-learn. Run `pip install umap-learn`, or use `method='tsne'`.")
    vectors = vectors_of(result, features)
    values, classes, unnamed = None, None, ("", "")
    if color is not None:
        values = column_of(vectors.images.frame, color, "color").iloc[vectors.positions]
        values = values.rename("color") if values.name is None else values
        classes, unnamed = _classes(values)
    count = len(vectors.positions)
    rows = drawn(count, whole("limit")(limit), None if classes is None else classes.cat.codes.to_numpy())
    positions = vectors.positions[rows]
    places, names = _places(Space([*vectors.blocks.values()], "euclidean").points(positions).astype(np.float32), method)
    frame = pd.DataFrame({"x": places[:, 0], "y": places[:, 1]}, vectors.images.frame.index.take(positions))
    if values is not None:
        frame.insert(2, free_name(values.name, frame), values.iloc[rows].array)
    chosen = [f"{len(rows):,} of {count:,} rows sampled"] if len(rows) < count else []
    classes = None if classes is None else classes.iloc[rows].cat.remove_unused_categories()
    title, note = f"{TITLES[method]} of {listing(vectors.blocks)}", " · ".join([*chosen, *vectors.left_out])
    return Scatter(frame, classes, None if values is None else values.name, unnamed, names, title, note)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Scatter:
    """Features in two dimensions; a notebook shows the plot.

    Attributes
    ----------
    frame : DataFrame
        One row per point, indexed like the original frame: ``x``, ``y`` and the column used for color.
    """

    frame: pd.DataFrame
    classes: pd.Series[Any] | None  # each point's name in the legend; None for numbers with a scale
    color: Hashable | None
    unnamed: tuple[str, str]  # the classes in gray: rare ones together, and missing
    names: tuple[str, str]  # axis labels
    title: str
    note: str  # what was left out

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the points.

        Parameters
        ----------
        ax : Axes, optional
            Where to draw; by default a new pyplot figure.

        Returns
        -------
        Axes
            The axes that were drawn on.
        """
        ax = axes(ax, WIDTH, HEIGHT)
        look: dict[str, Any] = {"s": 18 if len(self.frame) > MANY_POINTS else 36, "linewidth": 0.3, "alpha": 0.85}
        if self.color is None:
            ax.scatter(self.frame["x"], self.frame["y"], **look)
        elif self.classes is None:
            self._draw_scale(ax, look)
        else:
            self._draw_classes(ax, self.classes, look)
        ax.set_title(plain(self.title), loc="left", fontsize="medium")
        ax.set(xlabel=self.names[0], ylabel=self.names[1])
        if not any(self.names):
            ax.set(xticks=[], yticks=[])
        return ax

    def __repr__(self) -> str:
        by = "" if self.color is None else f" by {self.color}"
        return f"{self.title}{by}: {len(self.frame):,} points" + (f" · {self.note}" if self.note else "")

    def _repr_html_(self) -> str:
        url = f"data:image/png;base64,{base64.b64encode(self.png()).decode('ascii')}"
        picture = f'<img src="{url}" alt="{escape(repr(self))}" style="max-width:100%;height:auto">'
        return Html(picture + (paragraph(self.note) if self.note else ""))

    def png(self) -> bytes:
        """Return the plot as PNG bytes."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")  # pyplot's would show twice
        self.plot(figure.subplots())
        picture, out = io.BytesIO(), io.BytesIO()
        figure.savefig(picture, format="png", dpi=DPI)
        if self.color is not None and self.classes is None:
            return picture.getvalue()  # a color scale needs more shades
        with Image.open(picture) as image:
            image.convert("RGB").quantize(SHADES, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        return out.getvalue()

    def _draw_classes(self, ax: Axes, classes: pd.Series[Any], look: dict[str, Any]) -> None:
        import seaborn as sns

        named = [name for name in classes.cat.categories if name not in self.unnamed]
        unnamed = [name for name in classes.cat.categories if name in self.unnamed]
        # Gray is for unnamed classes, so the palette's own gray (its eighth color) is used only for ten classes.
        spread = named if len(named) == COLORS else [*named[:7], self.unnamed[1], *named[7:]]
        order = np.argsort(classes.isin(named).to_numpy(), kind="stable")  # named classes on top
        names = [*named, *unnamed]
        sns.scatterplot(
            x=self.frame["x"].to_numpy()[order], y=self.frame["y"].to_numpy()[order],
            hue=classes.to_numpy()[order], style=classes.to_numpy()[order], hue_order=names, style_order=names,
            palette={**(colors(spread) or {}), **dict.fromkeys(unnamed, GREY)},
            markers=dict(zip(names, MARKERS, strict=False)), ax=ax, **look,
        )  # fmt: skip
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(
            handles, [plain(short(label, LONGEST)) for label in labels], title=plain(short(str(self.color), LONGEST)),
            loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0, alignment="left",
        )  # fmt: skip

    def _draw_scale(self, ax: Axes, look: dict[str, Any]) -> None:
        x, y = self.frame["x"].to_numpy(), self.frame["y"].to_numpy()
        values = self.frame.iloc[:, 2].to_numpy(float, na_value=np.nan)
        known = np.isfinite(values)
        if not known.all():
            ax.scatter(x[~known], y[~known], color=GREY, marker="x", label=MISSING, **{**look, "linewidth": 1})
            ax.legend(loc="best")
        points = ax.scatter(x[known], y[known], c=values[known], cmap="viridis", **look)
        ax.figure.colorbar(points, ax=ax, label=plain(short(str(self.color), LONGEST)))


def _places(points: NDArray[Any], method: Method) -> tuple[NDArray[Any], tuple[str, str]]:
    """Return x and y of each point, and the axis labels (empty if the axes have no meaning)."""
    from sklearn import decomposition, manifold
    from threadpoolctl import threadpool_limits

    count, least = len(points), 2 if method == "pca" else 4
    if count < least:
        raise RequestError(f"{method} needs at least {least} rows with features, not {count}. Use more rows.")
    if not (points != points[0]).any():
        raise RequestError(f"All {count:,} rows have the same features. Use rows with different images.")
    pca = decomposition.PCA(min(2 if method == "pca" else COMPONENTS, *points.shape), random_state=SEED)
    reduced = pca.fit_transform(points)
    if method == "pca":
        shares = enumerate(pca.explained_variance_ratio_, 1)
        names = [f"PC {number} ({share:.0%} of variance)" for number, share in shares]
        if len(names) == 1:  # one feature
            return np.column_stack([reduced, np.zeros(count)]), (names[0], "")
        return reduced, (names[0], names[1])
    if method == "umap":
        umap: Any = importlib.import_module("umap")
        layout = umap.UMAP(n_neighbors=min(NEIGHBORS, count - 1), random_state=SEED, n_jobs=1)  # a seed needs one job
    else:
        start = "pca" if reduced.shape[1] > 1 else "random"
        layout = manifold.TSNE(2, perplexity=min(PERPLEXITY, (count - 1) / 3), init=start, random_state=SEED)
    # OpenMP ignores CPU quotas, and with more threads than cores this takes fifty times as long.
    with threadpool_limits(available_cores() if count > FEW_ROWS else 1, "openmp"):
        return np.asarray(layout.fit_transform(reduced)), ("", "")


def _classes(values: pd.Series[Any]) -> tuple[pd.Series[Any] | None, tuple[str, str]]:
    """Return each row's class as a categorical, None for a quantity; and the names of rare and of missing classes."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    known = values.dropna()
    is_number = is_numeric_dtype(values) and not is_bool_dtype(values)
    if is_number and ((known % 1 != 0).any() or known.nunique() > MOST_CLASSES):
        return None, ("", "")
    try:
        counts = known.value_counts(sort=False).to_dict()  # categories and distinct values in order
    except TypeError as error:
        kinds = listing(sorted({type(value).__name__ for value in known}))
        problem = f"{values.name!r} has values of type {kinds}, but needs one class or number per row."
        raise RequestError(f"{problem} Name another column for `color`, or use `.astype(str)`.") from error
    order: list[Any] = [value for value, count in counts.items() if count]
    if not isinstance(known.dtype, pd.CategoricalDtype):
        try:
            order = sorted(order)
        except TypeError:  # mixed types
            order = sorted(order, key=str)
    names = {value: str(int(value)) if isinstance(value, (float, np.floating)) else str(value) for value in order}
    named_missing = MISSING if MISSING not in names.values() else f"({MISSING})"
    ranked = sorted(order, key=lambda value: -counts[value])
    others = set(ranked[COLORS - 1 :] if len(order) > COLORS else ())
    shared = f"{OTHERS}{len(others):,} classes"
    names.update(dict.fromkeys(others, shared))
    named = values.map(names).astype(object)
    named[values.isna().to_numpy()] = named_missing
    categories = dict.fromkeys([*(names[value] for value in order if value not in others), shared, named_missing])
    return named.astype(pd.CategoricalDtype(list(categories))), (shared, named_missing)
