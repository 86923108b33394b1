"""Groups of nearly equal rows: by the book, in bounded memory, and on photographs saved again."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from scipy.sparse.csgraph import connected_components

import nbfeat
from nbfeat import RequestError
from nbfeat.explore import vectors
from nbfeat.explore.vectors import Space
from tests.look import HOSTILE, cosine, euclidean, featured

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(("metric", "book", "threshold"), [("cosine", cosine, 0.1), ("euclidean", euclidean, 0.7)])
@pytest.mark.parametrize("tile", [7, 1024])
def test_groups_are_those_by_the_book(
    metric: Any, book: Callable[..., Any], threshold: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "TILE", tile)
    rows = RANDOM.normal(size=(90, 4)).astype(np.float32)
    rows[60:75] = rows[20:35]  # equal ones, too
    distances = book(rows)
    numbers = connected_components(distances <= threshold)[1]
    found = nbfeat.duplicates(featured(rows, number=np.arange(90)), threshold, metric=metric)
    members = [list(np.flatnonzero(numbers == number)) for number in dict.fromkeys(numbers)]
    members = [group for group in members if len(group) > 1]
    assert len(members) > 8
    assert [list(part["number"]) for _, part in found.frame.groupby("group")] == members
    assert list(found.frame["group"].unique()) == list(range(1, len(members) + 1))
    first = found.frame.groupby("group")["number"].transform("first").to_numpy()
    np.testing.assert_allclose(found.frame["distance"], distances[first, found.frame["number"]], atol=1e-6)
    assert list(found.rest) == [not any(row in group[1:] for group in members) for row in range(90)]
    assert list(found.rest.index) == list(range(100, 190))


def test_a_threshold_is_met_to_the_last_bit() -> None:
    rows = np.zeros((3, 2))
    rows[:, 0] = [0, 0.25, 0.75]
    frame = featured(rows)
    assert len(nbfeat.duplicates(frame, 0.25, metric="euclidean").frame) == 2
    assert nbfeat.duplicates(frame, np.nextafter(0.25, 0), metric="euclidean").frame.empty
    assert len(nbfeat.duplicates(frame, 0.5, metric="euclidean").frame) == 3


@pytest.mark.parametrize(("metric", "blocks"), [("cosine", 1), ("cosine", 2), ("euclidean", 1), ("euclidean", 2)])
def test_rounding_in_products_decides_no_pair(metric: Any, blocks: int) -> None:
    space = Space(list(np.random.default_rng(1).normal(size=(blocks, 30, 512)).astype(np.float32)), metric)
    for pair in np.arange(30).reshape(15, 2):
        distance = space.between(pair[:1], pair[1:])[0]
        assert len(set(space.groups(pair, distance))) == 1
        assert len(set(space.groups(pair, np.nextafter(distance, 0)))) == 2


@pytest.mark.parametrize(("metric", "book"), [("cosine", cosine), ("euclidean", euclidean)])
def test_the_usual_threshold_is_a_tenth_of_the_median_distance(metric: Any, book: Callable[..., Any]) -> None:
    rows = np.random.default_rng(1).normal([5, 0, 0], size=(40, 3)).astype(np.float32)
    rows[30:] *= -4  # a few that are far from most
    distances = book(rows)[np.triu_indices(40, 1)]
    assert np.mean(distances) > 1.5 * np.median(distances)
    assert nbfeat.duplicates(featured(rows), metric=metric).threshold == pytest.approx(np.median(distances) / 10)


def test_features_that_are_all_the_same_are_one_group_without_all_their_pairs() -> None:
    rows = np.ones((3_000, 16), np.float32)
    found = nbfeat.duplicates(featured(rows))
    assert len(found.frame) == 3_000
    assert found.rest.sum() == 1
    assert "One group has 3,000 of 3,000 rows: the threshold may be too large" in repr(found)
    assert "and 2,994 more rows in these groups" in repr(found)
    nearly = Space([rows + RANDOM.normal(0, 1e-3, rows.shape).astype(np.float32)], "cosine")
    tracemalloc.start()
    assert len(np.unique(nearly.groups(np.arange(3_000), 0.1))) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6  # 4.5 million pairs


def test_no_duplicates_is_said_and_only_some_of_many_groups_are_shown() -> None:
    found = nbfeat.duplicates(featured(np.repeat(np.eye(40), 2, axis=0)), 0)
    assert found.frame["group"].max() == 40
    assert "… and 28 more groups: see .frame" in repr(found)
    assert found._repr_html_().count("<tr>") == 24 + 1
    found = nbfeat.duplicates(featured(np.eye(8)))
    assert "No two of 8 rows are nearly identical" in repr(found)
    assert "a tenth of the median" in repr(found)
    assert found.threshold == pytest.approx(0.1)
    assert found.rest.all()
    assert "No two of 8 rows" in found._repr_html_()
    assert list(found.frame.columns) == ["group", "distance"]
    with pytest.raises(RequestError, match="no two rows are within the threshold"):
        found.plot()
    assert nbfeat.duplicates(featured(np.eye(1))).frame.empty
    nothing: list[Any] = [-1, np.nan, "near", True]
    for threshold in nothing:
        with pytest.raises(RequestError, match="`threshold` must be a distance of at least 0"):
            nbfeat.duplicates(featured(np.eye(4)), threshold)


@pytest.mark.usefixtures("fake_network")
def test_groups_are_shown_and_rows_without_features_counted(photos: pd.DataFrame, tmp_path: Path) -> None:
    photos["label"] = photos["label"].where(photos.index != "row 3", HOSTILE)
    twice = pd.concat([photos, photos.iloc[[3, 3, 7]].set_axis(["again", HOSTILE, "seven"])])
    twice.loc["row 9", "path"] = str(tmp_path / "gone.png")
    found = nbfeat.duplicates(nbfeat.extract(twice, "MobileNet --size 32", images="path"), 1e-9)
    assert list(found.frame.index) == ["row 3", "again", HOSTILE, "row 7", "seven"]
    assert list(found.frame["group"]) == [1, 1, 1, 2, 2]
    html = found._repr_html_()
    assert "2 groups of nearly identical images: 5 of 22 rows" in html
    assert "1 row without features left out" in html
    assert HOSTILE not in html
    assert html.count("<img ") == 5
    assert len(found.plot()) == 5
    plt.close("all")


@pytest.mark.slow
def test_copies_of_photographs_are_found_and_nothing_else(flowers: pd.DataFrame, tmp_path: Path) -> None:
    files = [Path(path) for path in flowers["path"]]
    copies = []
    for number, file in enumerate(files[7::15]):
        with Image.open(file) as image:
            image.save(tmp_path / f"{number}.jpg", quality=75)
            smaller = image.resize((image.width * 3 // 4, image.height * 3 // 4))
            smaller.save(tmp_path / f"{number}.webp", quality=80)
        copies += [{"path": str(tmp_path / f"{number}.{kind}"), "of": file.name} for kind in ("jpg", "webp")]
    originals = pd.DataFrame({"path": flowers["path"], "of": [file.name for file in files]})
    frame = pd.concat([originals, pd.DataFrame(copies)], ignore_index=True)
    found = nbfeat.duplicates(nbfeat.extract(frame, "EfficientNetLite0 --layer block7a_project_bn", images="path"))
    groups = [set(part["of"]) for _, part in found.frame.groupby("group")]
    assert sorted(map(len, groups)) == [1] * 20 + [2]
    assert len(found.frame) == 3 * 20 + 2
    # The flowers do hold one photograph twice, with other colors.
    assert {"4278757393_bca8415ed4_n.jpg", "4654848357_9549351e0b_n.jpg"} in groups
