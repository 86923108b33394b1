"""Features in two dimensions: seeded, readable, and without a trace in anybody's matplotlib."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from sklearn.decomposition import PCA

import nbfeat
from nbfeat import RequestError
from nbfeat.explore.gallery import COLORS
from nbfeat.explore.scatter import Scatter, _classes
from tests.look import HOSTILE, featured

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(size=(60, 12)) * np.linspace(3, 1, 12)
LABELS = np.array(["a", "b", "c"])[np.arange(60) % 3]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def legend(found: Scatter) -> list[str]:
    drawn = found.plot().get_legend()
    assert drawn is not None
    return [text.get_text() for text in drawn.get_texts()]


def test_principal_components_are_scikit_learns() -> None:
    found = nbfeat.scatter(featured(ROWS, label=LABELS))
    pca = PCA(2).fit(ROWS)
    np.testing.assert_allclose(np.abs(found.frame[["x", "y"]]), np.abs(pca.transform(ROWS)), atol=1e-4)
    assert list(found.frame.columns) == ["x", "y", "label"]
    assert list(found.frame.index) == list(range(100, 160))
    ax = found.plot()
    assert ax.get_xlabel() == f"PC 1 ({pca.explained_variance_ratio_[0]:.0%} of variance)"
    assert ax.get_title(loc="left") == "Principal components of net0"
    assert legend(found) == ["a", "b", "c"]
    assert repr(found) == "Principal components of net0 by label: 60 points"

    (points,) = ax.collections  # are told apart by color and by marker
    assert len(np.unique(np.asarray(points.get_facecolor()), axis=0)) == 3
    assert len({np.asarray(path.vertices).tobytes() for path in points.get_paths()}) == 3


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_the_same_rows_give_the_same_picture(method: Any) -> None:
    frame = featured(ROWS[:12], label=LABELS[:12])
    np.random.seed(0)
    first = nbfeat.scatter(frame, method=method)
    np.random.seed(1)
    pd.testing.assert_frame_equal(nbfeat.scatter(frame, method=method).frame, first.frame, check_exact=True)
    if method == "tsne":
        ax = first.plot()
        assert (ax.get_xlabel(), ax.get_ylabel(), len(ax.get_xticks())) == ("", "", 0)


def test_of_many_rows_some_are_drawn_with_the_classes_in_proportion() -> None:
    rows = RANDOM.normal(size=(10_000, 3))
    labels = np.where(np.arange(10_000) % 10, "many", "few")
    found = nbfeat.scatter(featured(rows, label=labels))
    assert len(found.frame) == 5_000
    assert abs((found.frame["label"] == "few").sum() - 500) <= 1
    assert found.frame.index.is_monotonic_increasing
    assert found.frame.index.is_unique
    assert "5,000 of 10,000 rows sampled" in repr(found)
    html = found._repr_html_()
    assert "5,000 of 10,000 rows sampled" in html
    assert len(html) < 200_000
    pd.testing.assert_frame_equal(nbfeat.scatter(featured(rows, label=labels)).frame, found.frame)
    assert len(nbfeat.scatter(featured(rows, label=labels), None, limit=10).frame) == 10


def test_classes_are_few_and_named() -> None:
    numbers = np.r_[np.repeat(np.arange(9), 5), np.arange(9, 24)]
    found = nbfeat.scatter(featured(ROWS, label=[f"kind {number}" for number in numbers]))
    assert legend(found) == [*(f"kind {number}" for number in range(9)), "other: 15 classes"]
    ten = nbfeat.scatter(featured(ROWS, label=np.arange(60) % 10))
    assert legend(ten) == list(map(str, range(10)))
    values = (np.arange(60) % 3).astype(float)
    values[5] = np.nan
    assert legend(nbfeat.scatter(featured(ROWS, label=values))) == ["0", "1", "2", "missing"]
    ordered = pd.Categorical(LABELS, ["c", "b", "a", "none"])
    assert legend(nbfeat.scatter(featured(ROWS, label=ordered))) == ["c", "b", "a"]
    assert legend(nbfeat.scatter(featured(ROWS, label=LABELS == "a"))) == ["False", "True"]

    named = np.where(LABELS == "a", "missing", LABELS).astype(object)
    named[5] = None
    assert legend(nbfeat.scatter(featured(ROWS, label=named))) == ["b", "c", "missing", "(missing)"]

    values = np.linspace(0, 1, 60)
    values[7] = np.nan
    found = nbfeat.scatter(featured(ROWS, age=values), "age")
    figure = found.plot().figure
    assert [ax.get_ylabel() for ax in figure.axes] == [found.names[1], "age"]
    assert found.classes is None
    assert legend(found) == ["missing"]


def test_distinct_texts_cost_the_same_each() -> None:
    """Count comparisons of texts: a search in a list for each of them would make four million."""

    class Text(str):
        __slots__ = ()
        compared = 0

        def __eq__(self, other: object) -> bool:
            Text.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    values = pd.Series([Text(f"{number:05d}") for number in range(2_000)], dtype=object, name="label")
    classes, _ = _classes(values)
    assert classes is not None
    assert len(classes.cat.categories) == COLORS + 1
    assert Text.compared < 100_000


@pytest.mark.parametrize(("value", "kind"), [([1, 2], "list"), ({"a": 1}, "dict"), ({1}, "set")])
def test_a_column_of_lists_has_no_colors(value: object, kind: str) -> None:
    frame = featured(ROWS, label=[value] * 60)
    with pytest.raises(RequestError, match=rf"'label' has values of type {kind}, but .* `color`, or use `\.astype"):
        nbfeat.scatter(frame)


def test_what_cannot_be_drawn_is_told_and_one_color_needs_no_column(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = featured(ROWS, lable=LABELS)
    assert nbfeat.scatter(frame, None).plot().get_legend() is None
    with pytest.raises(RequestError, match=r"no column 'label' for the color. Did you mean lable"):
        nbfeat.scatter(frame)
    own = nbfeat.scatter(frame, LABELS)
    assert legend(own) == ["a", "b", "c"]
    assert list(own.frame["color"]) == list(LABELS)
    assert legend(nbfeat.scatter(frame, pd.Series(LABELS, frame.index))) == ["a", "b", "c"]
    with pytest.raises(RequestError, match=r"`method` must be .*, not 'tnse'. Did you mean tsne"):
        nbfeat.scatter(frame, None, "tnse")  # type: ignore[arg-type]

    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(RequestError, match="pip install umap-learn"):
        nbfeat.scatter(frame, None, "umap")
    with pytest.raises(RequestError, match="All 60 rows have the same features"):
        nbfeat.scatter(featured(np.ones((60, 3))), None)
    with pytest.raises(RequestError, match="tsne needs at least 4 rows with features, not 3"):
        nbfeat.scatter(featured(ROWS[:3]), None, "tsne")
    two = nbfeat.scatter(featured(ROWS[:2]), None)
    assert len(two.frame) == 2
    line = nbfeat.scatter(featured(ROWS[:, :1]), None)
    assert (line.frame["y"] == 0).all()
    assert line.names[1] == ""


def test_umap_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Umap:
        def __init__(self, **options: Any) -> None:
            asked.update(options)

        def fit_transform(self, points: Any) -> Any:
            return points[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap, __spec__=SimpleNamespace()))
    assert "UMAP of net0" in repr(nbfeat.scatter(featured(ROWS), None, "umap"))
    assert asked == {"n_neighbors": 15, "random_state": 0, "n_jobs": 1}


def test_the_users_theme_is_taken_and_left_alone() -> None:
    found = nbfeat.scatter(featured(ROWS, label=LABELS))
    with mpl.rc_context({"axes.facecolor": "black", "axes.grid": True, "figure.dpi": 30}):
        before, filters = dict(mpl.rcParams), plt.get_fignums()
        picture = found.png()
        assert plt.get_fignums() == filters
        ax = found.plot()
        assert ax.get_facecolor() == (0, 0, 0, 1)
        assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == [*filters, 1]
    assert picture.startswith(b"\x89PNG")
    mine = plt.figure().subplots()
    assert found.plot(mine) is mine


def test_nothing_is_cut_off_and_what_comes_from_data_is_escaped(tmp_path: Any) -> None:
    found = nbfeat.scatter(featured(ROWS, **{HOSTILE: [HOSTILE, "$x$"] * 30}), HOSTILE)
    assert HOSTILE not in found._repr_html_()
    assert legend(found) == [r"\$x\$", HOSTILE]
    labels = np.array(["a rather long name of a class, longer than a legend takes", "b"])[np.arange(60) % 2]
    (tmp_path / "picture.png").write_bytes(nbfeat.scatter(featured(ROWS, label=labels)).png())
    with Image.open(tmp_path / "picture.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert (pixels[[0, -1]] == 255).all()
    assert (pixels[:, [0, -1]] == 255).all()
