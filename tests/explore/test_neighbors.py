"""The nearest rows: exact, in order, and of images that are in no row."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image

import nbfeat
from nbfeat import ExtractionError, RequestError
from nbfeat.explore.neighbors import distance_text
from nbfeat.explore.vectors import Space
from nbfeat.inference import prepared
from tests.look import HOSTILE, cosine, euclidean, featured

pytestmark = pytest.mark.usefixtures("fake_network")
REAL_NETWORK = prepared.PreparedNetwork
RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(size=(60, 12))
ROWS[[7, 31, 32, 50]] = ROWS[3]  # ties
ROWS[40] = 2 * ROWS[3]


@pytest.mark.parametrize(("metric", "book"), [("cosine", cosine), ("euclidean", euclidean)])
@pytest.mark.parametrize("scale", [1, 1e-22, 1e25])
def test_the_nearest_are_those_by_the_book_and_ties_stand_in_order(
    metric: Any, book: Callable[..., Any], scale: float
) -> None:
    rows = (ROWS * scale).astype(np.float32)
    frame, distances = featured(rows, label=np.arange(60)), book(rows)
    for position in (3, 0, 59):
        found = nbfeat.similar(frame, to=100 + position, k=100, metric=metric).frame
        order = np.argsort(distances[position].round(12) if scale == 1 else distances[position], kind="stable")
        order = order[order != position]
        np.testing.assert_allclose(found["distance"], distances[position][order], rtol=1e-6, atol=1e-12)
        if position == 3:
            assert list(found["label"][:3]) == [7, 31, 32]
            assert found["distance"].iloc[0] == 0
        if scale == 1:
            assert list(found["label"]) == list(order)
        assert list(found.columns) == ["distance", "label"]
        assert list(found.index) == list(100 + found["label"])


def test_a_large_table_is_searched_in_parts_that_agree_with_the_whole() -> None:
    rows = RANDOM.normal(size=(8_000, 256)).astype(np.float32)
    rows[[5, 1500, 7_999]] = rows[4]
    space = Space([rows], "cosine")
    tracemalloc.start()
    found, distances = space.nearest([rows[4:5]], np.arange(8_000), 12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes / 4
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert list(found[:4]) == [4, 5, 1500, 7_999]
    assert set(found) == set(np.argsort(1 - unit @ unit[4])[:12])
    assert list(distances[:4]) == [0] * 4


def test_several_blocks_count_the_same() -> None:
    other = 1000 * RANDOM.normal(size=(60, 5))
    frame = featured(ROWS, other, label="x")
    found = nbfeat.similar(frame, to=110, k=59)
    mean = (cosine(ROWS) + cosine(other))[10] / 2
    np.testing.assert_allclose(found.frame["distance"], np.sort(np.delete(mean, 10)), atol=1e-6)
    assert "net0 and net1" in repr(found)
    rows = np.abs(ROWS)
    rows[[0, 20]] = 0  # such rows are far from all others and equal to each other
    zeros = nbfeat.similar(featured(rows, label=np.arange(60)), to=100, k=2).frame
    assert zeros["label"].iloc[0] == 20
    np.testing.assert_allclose(zeros["distance"], [0, 1])
    one = nbfeat.similar(frame, to=110, k=3, features="net1").frame["distance"]
    np.testing.assert_allclose(one, np.sort(np.delete(cosine(other)[10], 10))[:3], atol=1e-6)


def test_a_row_is_named_by_its_label_and_what_is_none_is_told() -> None:
    frame = featured(ROWS, label="x").rename(index={101: 100})
    refused: list[tuple[dict[str, Any], str]] = [
        ({"to": 100}, r"2 rows are labeled 100.*reset_index"),
        ({"to": 3}, r"3 is neither a label of the index \(which starts with 100, 100 and 102\)"),
        ({"k": 0}, "`k` must be a whole number"),
        ({"metric": "cosin"}, r"`metric` must be .*, not 'cosin'. Did you mean cosine"),
        ({"features": "net"}, r"has no block 'net'. Did you mean net0"),
        ({"result": frame[["label"]]}, "has no feature columns"),
        ({"result": [1, 2]}, "must be a pandas DataFrame, not list"),
        ({"caption": "lable"}, r"no column 'lable' for the caption. Did you mean label"),
    ]
    for options, words in refused:
        with pytest.raises(RequestError, match=words):
            nbfeat.similar(**{"result": frame, "to": 102, **options})
    frame = featured(ROWS, label="x")
    for missing in (None, np.nan, pd.NA, " "):  # even where a row has that label
        with pytest.raises(RequestError, match=r"is neither a label .*the value is missing"):
            nbfeat.similar(frame.set_axis(pd.Index([missing, *range(59)], dtype=object)), to=missing)
    frame = featured(ROWS, distance="far", label="x")
    assert list(nbfeat.similar(frame, to=100).frame.columns) == ["distance_", "distance", "label"]


def test_rows_without_features_are_left_out_and_counted(photos: pd.DataFrame, tmp_path: Path) -> None:
    photos.loc["row 5", "path"] = str(tmp_path / "gone.png")
    result = nbfeat.extract(photos, "MobileNet --size 32", images="path")
    found = nbfeat.similar(result, to="row 4", k=30)
    assert len(found.frame) == 18
    assert "row 5" not in found.frame.index
    assert "row 4" not in found.frame.index
    assert list(found.frame.columns) == ["distance", "path", "label", "split"]
    assert "1 row without features left out" in repr(found)
    assert "1 row without features left out" in found._repr_html_()
    with pytest.raises(RequestError, match=r"Row 'row 5' has no features: no such file"):
        nbfeat.similar(result, to="row 5")
    with pytest.raises(ExtractionError, match="isn't finished: 0 of 20 images"):
        nbfeat.similar(nbfeat.Extraction(photos, "MobileNet --size 32", images="path"), to="row 0")
    with pytest.raises(RequestError, match=r"'row 44' is neither a label.*no such file.*Did you mean row 4"):
        nbfeat.similar(result, to="row 44")


def test_an_image_of_no_row_is_extracted_as_the_result_was(photos: pd.DataFrame, tmp_path: Path) -> None:
    first = Path(photos["path"].iloc[0])
    copy = tmp_path / "copy.png"
    copy.write_bytes(first.read_bytes())
    blocks = ["MobileNet --size 32 --normalize standard", "MobileNet --size 32 --layer conv_pw_1_relu"]
    result = nbfeat.extract(photos, blocks, images="path", root=tmp_path)
    with Image.open(first) as image:
        given: list[object] = [copy, "copy.png", copy.read_bytes(), np.asarray(image), image.copy()]
    for to in given:
        found = nbfeat.similar(result, to=to, k=20)
        assert len(found.frame) == 20  # the row of the same pixels, too
        assert found.frame.index[0] == "row 0"
        assert found.frame["distance"].iloc[0] == pytest.approx(0, abs=1e-12)
        assert found.frame["distance"].iloc[1] > 1e-6
        assert str(tmp_path) not in found._repr_html_()
    result.to_parquet(tmp_path / "result.parquet")
    again = nbfeat.similar(nbfeat.read(tmp_path / "result.parquet"), to=copy, k=20)
    pd.testing.assert_frame_equal(again.frame, nbfeat.similar(result, to=copy, k=20).frame)
    with pytest.raises(RequestError, match=r"Pass the result of `nbfeat.extract`"):
        nbfeat.similar(result.frame, to=copy)


def test_of_two_image_columns_one_is_compared_with_a_new_image(photos: pd.DataFrame, tmp_path: Path) -> None:
    photos["back"] = list(photos["path"][::-1])
    photos.loc["row 0", "back"] = str(tmp_path / "gone.png")
    result = nbfeat.extract(photos, "MobileNet --size 32", images=["path", "back"])
    to = Path(photos["path"].iloc[2]).read_bytes()
    with pytest.raises(
        RequestError, match=r"from 2 image columns. Choose one .*`features='path_mobilenet'` or `features='back"
    ):
        nbfeat.similar(result, to=to)
    found = nbfeat.similar(result, to=to, features="back_mobilenet")
    assert found.frame.index[0] == "row 17"
    assert "row 17: 02.png" in repr(found)
    assert "1 row without features left out" in repr(found)
    assert "left out" not in repr(nbfeat.similar(result, to=to, features="path_mobilenet"))


def test_a_label_goes_before_a_path_and_a_path_of_a_row_is_that_row(photos: pd.DataFrame) -> None:
    result = nbfeat.extract(photos, "MobileNet --size 32", images="path")
    by_path = nbfeat.similar(result, to=Path(photos["path"].iloc[6]), k=20).frame
    pd.testing.assert_frame_equal(by_path, nbfeat.similar(result, to="row 6", k=20).frame)
    frame = result.frame.set_axis(np.roll(photos["path"], 1))  # every label is the path of the row before
    by_label = nbfeat.similar(frame, to=photos["path"].iloc[6], k=20).frame
    assert list(by_label["distance"]) == list(nbfeat.similar(result, to="row 7", k=20).frame["distance"])


def test_the_gallery_shows_the_one_asked_for_first_and_escapes_everything(photos: pd.DataFrame) -> None:
    photos["label"] = photos["label"].where(photos.index != "row 3", HOSTILE)
    result = nbfeat.extract(photos.rename(index={"row 4": HOSTILE}), "MobileNet --size 32", images="path")
    found = nbfeat.similar(result, to="row 3", k=19)
    html = found._repr_html_()
    assert html.index("query") < html.index(distance_text(found.frame["distance"].iloc[0]))
    assert HOSTILE not in html
    assert "&lt;img src=x" in html
    assert html.count('<img src="data:image/webp;base64,') == 20
    first, *others = re.findall(r'<div style="([^"]*)" title=', html)
    assert len(others) == 19
    assert "border:2px solid #1e88e5" in first, "its frame is made of what JupyterLab's sanitizer drops a part of"
    assert set(others) == {first.replace("#1e88e5", "transparent")}, "the frame moves its image out of the line"
    axes = found.plot()
    assert len(axes) == 20
    assert axes[0].get_xlabel().startswith("query")
    plt.close("all")


def test_without_images_the_rows_are_shown() -> None:
    found = nbfeat.similar(featured(ROWS, label=HOSTILE), to=103, k=2)
    assert "<table" in found._repr_html_()
    assert HOSTILE not in found._repr_html_()
    assert "row 107" in repr(found)
    with pytest.raises(RequestError, match="no column looks like images"):
        found.plot()


@pytest.mark.slow
def test_neighbors_of_flowers_are_flowers_of_their_kind(flowers: pd.DataFrame, monkeypatch: Any) -> None:
    monkeypatch.setattr(prepared, "PreparedNetwork", REAL_NETWORK)
    result = nbfeat.extract(flowers, "MobileNetV2", images="path")
    labels, distances = flowers["label"].to_numpy(), cosine(result.features.to_numpy())
    np.fill_diagonal(distances, np.inf)
    same = []
    for row in range(0, 300, 5):
        found = nbfeat.similar(result, to=row, k=10).frame
        assert list(found.index) == list(np.argsort(distances[row], kind="stable")[:10])
        same.append((found["label"] == labels[row]).mean())
    assert np.mean(same) > 0.6  # by chance 0.2
