"""scatter: features in two dimensions (principal components, t-SNE or UMAP; seeded), colored by a column."""

from __future__ import annotations

import base64
import importlib
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
COMPONENTS = 50  # before t-SNE and UMAP, as their authors do: faster, and less noise
PERPLEXITY, NEIGHBORS = 30, 15  # the methods' own defaults, where there are rows enough
FEW_ROWS = 1_000  # too few for several threads
SEED = 0
LIMIT = 5_000  # points: t-SNE takes a minute or more then, and more would only hide each other
MISSING, OTHERS = "missing", "other: "
GREY = (0.6, 0.6, 0.6)
MARKERS = "os^DvPX<>*dp"  # of colors, of the others, of missing ones: color alone does not have to tell
WIDTH, HEIGHT, DPI = 7.0, 4.6, 100
SHADES = 128  # of the picture: a third of the bytes of millions, and the same to the eye
LONGEST = 30  # letters of a name in the legend
MANY_POINTS = 1_000


def scatter(
    result: Data,
    color: object = "label",
    method: Method = "pca",
    *,
    features: str | None = None,
    limit: int = LIMIT,
) -> Scatter:
    """Lay features out in two dimensions, and color them by a column. The same rows give the same picture.

    Parameters
    ----------
    result
        A result, or a frame with columns of features. Rows without features are left out.
    color
        A column of the frame, or one value for each row. Text, booleans, categories, and whole numbers of up to 20
        values are classes, each with its color and its marker (of more than 10, the 9 most frequent); other numbers
        have a scale. None for one color.
    method
        ``"pca"`` (at once), ``"tsne"`` (a minute or more for 5,000 rows), or ``"umap"`` (takes umap-learn). The last
        two see the first 50 principal components; distances between groups mean little in them.
    features
        The prefix of one block; by default all blocks: each is then scaled to unit length, so that all count the same.
    limit
        Of more rows than this, so many are drawn, classes in proportion (seeded).

    Returns
    -------
    Scatter
        ``.frame``: ``x``, ``y`` and the color's column, a row for each point, indexed like the frame. A notebook shows
        the picture; ``.plot()`` draws it on axes.

    Examples
    --------
    >>> nbfeat.scatter(result, color="label")  # doctest: +SKIP
    >>> nbfeat.scatter(result, "label", "tsne", features="resnet50").plot().figure.savefig("tsne.png")  # doctest: +SKIP
    """
    one_of([*TITLES], "method", method)
    if method == "umap" and importlib.util.find_spec("umap") is None:
        raise RequestError(
            "method='umap' needs a package that is not installed: pip install umap-learn. Or take method='tsne'."
        )
    vectors = vectors_of(result, features)
    values, classes = None, None
    if color is not None:
        values = column_of(vectors.images.frame, color, "color").iloc[vectors.positions]
        values = values.rename("color") if values.name is None else values
        classes = _classes(values)
    count = len(vectors.positions)
    rows = drawn(count, whole("limit")(limit), None if classes is None else classes.cat.codes.to_numpy())
    positions = vectors.positions[rows]
    places, names = _places(Space([*vectors.blocks.values()], "euclidean").points(positions).astype(np.float32), method)
    frame = pd.DataFrame({"x": places[:, 0], "y": places[:, 1]}, vectors.images.frame.index.take(positions))
    if values is not None:
        frame.insert(2, free_name(values.name, frame), values.iloc[rows].array)
    chosen = [f"{len(rows):,} of {count:,} rows drawn"] if len(rows) < count else []
    classes = None if classes is None else classes.iloc[rows].cat.remove_unused_categories()
    title, note = f"{TITLES[method]} of {listing(vectors.blocks)}", " · ".join([*chosen, *vectors.left_out])
    return Scatter(frame, classes, None if values is None else values.name, names, title, note)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Scatter:
    """Features in two dimensions; a notebook shows the picture, `plot()` draws it."""

    frame: pd.DataFrame
    classes: pd.Series[Any] | None  # of each point, as the legend names it; None for numbers with a scale
    color: Hashable | None
    names: tuple[str, str]  # of the axes
    title: str
    note: str  # what was left out

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the points on `ax`, or on a new figure of pyplot's, which a notebook shows at the end of the cell."""
        return self._draw(axes(ax, WIDTH, HEIGHT))

    def __repr__(self) -> str:
        by = "" if self.color is None else f" by {self.color}"
        return f"{self.title}{by}: {len(self.frame):,} points" + (f" · {self.note}" if self.note else "")

    def _repr_html_(self) -> str:
        address = f"data:image/png;base64,{base64.b64encode(self.png()).decode('ascii')}"
        picture = f'<img src="{address}" alt="{escape(repr(self))}" style="max-width:100%;height:auto">'
        return Html(picture + (paragraph(self.note) if self.note else ""))

    def png(self) -> bytes:
        """Return the picture that a notebook shows."""
        from matplotlib.figure import Figure

        # Not pyplot's, which would show it a second time.
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        self._draw(figure.subplots())
        picture, out = io.BytesIO(), io.BytesIO()
        figure.savefig(picture, format="png", dpi=DPI)
        if self.color is not None and self.classes is None:
            return picture.getvalue()  # a scale has more shades
        with Image.open(picture) as image:
            image.convert("RGB").quantize(SHADES, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
        return out.getvalue()

    def _draw(self, ax: Axes) -> Axes:
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

    def _draw_classes(self, ax: Axes, classes: pd.Series[Any], look: dict[str, Any]) -> None:
        import seaborn as sns

        named = [name for name in classes.cat.categories if name != MISSING and not name.startswith(OTHERS)]
        unnamed = [name for name in classes.cat.categories if name not in named]
        # The greys are for those: the palette's own, its eighth color, is taken where ten classes need it.
        spread = named if len(named) == COLORS else [*named[:7], MISSING, *named[7:]]
        order = np.argsort(classes.isin(named).to_numpy(), kind="stable")  # those on top
        sns.scatterplot(
            x=self.frame["x"].to_numpy()[order], y=self.frame["y"].to_numpy()[order],
            hue=classes.to_numpy()[order], style=classes.to_numpy()[order],
            hue_order=[*named, *unnamed], style_order=[*named, *unnamed],
            palette={**(colors(spread) or {}), **dict.fromkeys(unnamed, GREY)},
            markers=dict(zip([*named, *unnamed], MARKERS, strict=False)),
            ax=ax, **look,
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
    """Return x and y of each point, and what the axes are called; empty where they mean nothing."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    count, least = len(points), 2 if method == "pca" else 4
    if count < least:
        raise RequestError(f"{method} takes at least {least} rows with features, and there are {count}.")
    if not (points != points[0]).any():
        raise RequestError(f"There is nothing to lay out: all {count:,} rows have the same features.")
    pca = PCA(min(2 if method == "pca" else COMPONENTS, *points.shape), random_state=SEED)
    reduced = pca.fit_transform(points)
    if method == "pca":
        shares = enumerate(pca.explained_variance_ratio_, 1)
        names = [f"PC {number} ({share:.0%} of variance)" for number, share in shares]
        if len(names) == 1:  # one feature
            return np.column_stack([reduced, np.zeros(count)]), (names[0], "")
        return reduced, (names[0], names[1])
    if method == "umap":
        umap: Any = importlib.import_module("umap")
        # One job, since a seed takes that; UMAP would warn of it.
        layout = umap.UMAP(n_neighbors=min(NEIGHBORS, count - 1), random_state=SEED, n_jobs=1)
    else:
        start = "pca" if reduced.shape[1] > 1 else "random"
        layout = TSNE(2, perplexity=min(PERPLEXITY, (count - 1) / 3), init=start, random_state=SEED)
    # More threads than cores wait for each other, fifty times as long as they work; OpenMP does not know of quotas.
    with threadpool_limits(available_cores() if count > FEW_ROWS else 1, "openmp"):
        return np.asarray(layout.fit_transform(reduced)), ("", "")


def _classes(values: pd.Series[Any]) -> pd.Series[Any] | None:
    """Return names in few categories: the most frequent, the others together, and missing ones; None for a quantity."""
    import pandas as pd
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    known = values.dropna()
    is_number = is_numeric_dtype(values) and not is_bool_dtype(values)
    if is_number and ((known % 1 != 0).any() or known.nunique() > MOST_CLASSES):
        return None
    is_categorical = isinstance(known.dtype, pd.CategoricalDtype)
    order = list(known.cat.categories if is_categorical else known.unique())
    try:
        order = order if is_categorical else sorted(order)
    except TypeError:  # they are of several types
        order.sort(key=str)
    names = {value: str(int(value)) if isinstance(value, (float, np.floating)) else str(value) for value in order}
    counts = known.value_counts()
    order = [value for value in order if counts.get(value, 0)]
    others = sorted(order, key=lambda value: -counts[value])[COLORS - 1 :] if len(order) > COLORS else []
    shared = f"{OTHERS}{len(others):,} classes"
    names.update(dict.fromkeys(others, shared))
    named = values.map(names).astype(object)
    named[values.isna().to_numpy()] = MISSING
    categories = dict.fromkeys([*(names[value] for value in order if value not in others), shared, MISSING])
    return named.astype(pd.CategoricalDtype(list(categories)))
