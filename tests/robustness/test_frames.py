"""Odd frames: each row gets the features of its image or a reason, or the frame is refused with a next step."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given

import nbfeat
from nbfeat import NbfeatError, extract
from nbfeat.extraction import sink
from tests.messages import assert_says_what_to_do
from tests.mutations import TIMES
from tests.robustness.tries import CHANCE, Trials, tries

pytestmark = [pytest.mark.usefixtures("fake_network"), pytest.mark.slow, pytest.mark.robustness]
ODD_CELLS: tuple[Any, ...] = (
    None, np.nan, pd.NA, pd.NaT, "", " ", "\0", "x" * 100_000, "gone.png", 7, -1.5, True, b"", b"no image", [], {},
    object(), "\ud800", "<img src=x onerror=alert(1)>.jpg", np.zeros((0, 3), np.uint8), np.zeros(3), "https://x.invalid/a",
    Path("gone.png"), ("a", "b"), "~nobody/x.png", "/dev/zero", "con", pd.Timestamp("2026-01-01"), 10**40,
)  # fmt: skip
ODD_LABELS: tuple[Any, ...] = (
    None, np.nan, pd.NaT, 0, -1, 1.5, True, "", " ", "a\nb", "\ud800", "x" * 10_000, ("a", "b"), b"path", "mobilenet",
    "mobilenet_0000", "mobilenet_0047", "failure", "path ", "Path", pd.Timestamp("2026-01-01"), "index", "<b>",
)  # fmt: skip


def odd_index(rows: int, chance: random.Random) -> pd.Index:
    numbers = range(rows)
    return chance.choice([
        lambda: pd.RangeIndex(rows), lambda: pd.Index([0] * rows), lambda: pd.Index([None] * rows),
        lambda: pd.Index([chance.choice(ODD_LABELS) for _ in numbers], dtype=object, tupleize_cols=False),
        lambda: pd.MultiIndex.from_tuples([(at % 2, str(at)) for at in numbers], names=[None, "path"])
        if rows else pd.RangeIndex(0),
        lambda: pd.date_range("2026-01-01", periods=rows, tz="Europe/Berlin", name="when"),
        lambda: pd.CategoricalIndex([str(at % 3) for at in numbers]),
        lambda: pd.Index(np.linspace(-1, 1, rows), name="path"),
        lambda: pd.interval_range(0, rows) if rows else pd.RangeIndex(0),
        lambda: pd.RangeIndex(-5, -5 + 3 * rows, 3, name="failure"),
    ])()  # fmt: skip


def odd_values(rows: int, chance: random.Random) -> Any:
    return chance.choice([
        lambda: np.arange(rows), lambda: np.linspace(0, 1, rows).astype("complex64"),
        lambda: pd.Categorical(["ab"[at % 2] for at in range(rows)]),
        lambda: pd.Series([chance.choice(ODD_CELLS) for _ in range(rows)], dtype=object),
        lambda: pd.array([None, *range(rows)][:rows], dtype="Int64"),
        lambda: pd.arrays.SparseArray(np.zeros(rows)),
        lambda: pd.date_range("2026-01-01", periods=rows, tz="UTC"),
        lambda: pd.period_range("2026-01", periods=rows, freq="M"),
        lambda: np.full(rows, "x" * 10_000),
    ])()  # fmt: skip


def odd_frame(paths: list[str], chance: random.Random) -> pd.DataFrame:
    """Return a frame of a column of images, with odd cells among them, and odd columns and an odd index around."""
    rows = chance.choice([0, 1, 2, 5, 9, 9])
    share = chance.choice([0, 0.2, 0.4, 1])
    cells = [chance.choice(ODD_CELLS if chance.random() < share else paths) for _ in range(rows)]
    values = pd.Series(cells, dtype=object)
    if all(isinstance(cell, str) and cell.isprintable() for cell in cells):
        kinds: list[Any] = [object, "str", "category", "string[python]", "string[pyarrow]"]
        values = values.astype(chance.choice(kinds))
    others = [chance.choice(ODD_LABELS) for _ in range(chance.choice([0, 0, 1, 3]))]
    series = [values, *(pd.Series(odd_values(rows, chance), copy=True) for _ in others)]
    label = "path" if chance.random() < 0.7 else chance.choice(ODD_LABELS)
    frame = pd.concat(series, axis=1) if rows else pd.DataFrame(dict(enumerate(series)))
    frame.columns = pd.Index([label, *others], dtype=object, tupleize_cols=False)
    if chance.random() < 0.1:
        frame.columns = pd.MultiIndex.from_tuples([(1, str(at)) for at in range(frame.shape[1])])
    elif chance.random() < 0.2 and frame.shape[1] > 1:
        frame = frame.iloc[:, [*range(frame.shape[1]), 0]]  # the image column twice
    frame.index = odd_index(rows, chance)
    return frame.iloc[:, ::-1] if chance.random() < 0.3 else frame


def test_any_frame_gives_right_features_or_a_refusal(
    photos: pd.DataFrame, tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "MOST_ROWS", 3)
    paths = photos["path"].tolist()
    right = dict(zip(paths, extract(photos, "MobileNet --size 32", cache=False).features.to_numpy(), strict=True))

    def check(frame: pd.DataFrame, chance: random.Random) -> str:
        label = "path" if chance.random() < 0.7 else chance.choice([*frame.columns.tolist(), None])
        to_files = tmp_path / "files" if chance.random() < 0.3 else None
        given = frame.copy(deep=True)
        is_one = label is not None and label in frame and list(frame.columns).count(label) == 1
        cells = frame[label].tolist() if is_one else None
        try:
            result = extract(
                frame, "MobileNet --size 32", images=label, parquet=to_files, cache=chance.random() < 0.5,
                replace=chance.random() < 0.3,
            )  # fmt: skip
            features = (nbfeat.read(to_files) if to_files else result).features
        except NbfeatError as error:
            assert_says_what_to_do(str(error))
            return "refused frames"
        finally:
            pd.testing.assert_frame_equal(frame, given)
            shutil.rmtree(tmp_path / "files", ignore_errors=True)
        repr(result)
        result._repr_html_()
        if cells is None:  # found by itself
            (column,) = result.request.columns
            cells = frame[column].tolist()
        assert len(features) == len(frame)
        failed = set(result.failures["position"])
        for row, (cell, vector) in enumerate(zip(cells, features.to_numpy(), strict=True)):
            expected = right.get(cell) if isinstance(cell, str) else None
            assert (expected is None) == (row in failed) == bool(np.isnan(vector).all()), (cell, failed)
            assert expected is None or np.array_equal(vector, expected)
        if not to_files:
            assert result.frame.index.equals(frame.index)
            now, before = (
                one.iloc[:, [at for at, name in enumerate(one.columns) if str(name) not in result.columns]]
                for one in (result.frame, frame)
            )
            pd.testing.assert_frame_equal(now, before, check_column_type=False)
        return "frames with failures" if failed else "frames"

    @tries(150)
    @given(chance=CHANCE)
    def odd(chance: random.Random) -> None:
        trials[check(odd_frame(paths, chance), chance)] += 1

    odd()
    assert trials.total() >= 150 * TIMES
    assert min(trials.values()) > 5, trials


@pytest.mark.parametrize("label", [None, "\ud800", ("a", "b"), np.nan], ids=["none", "surrogate", "pair", "nan"])
def test_a_label_stays_as_it_is(photos: pd.DataFrame, label: Any) -> None:
    frame = pd.DataFrame({"x": photos["path"].tolist(), "y": [*photos["path"].tolist()[:-1], "gone.png"]}, dtype=object)
    frame.columns = pd.Index([label, "path"], dtype=object, tupleize_cols=False)
    result = extract(frame, "MobileNet --size 32", images="path")
    assert result.frame.columns[0] is label
    if not isinstance(label, tuple | None):  # None lets the column be found, and a tuple means several
        frame.iloc[3, 0] = "gone.png"
        other = extract(frame.iloc[:, [0]], "MobileNet --size 32", images=label)
        assert other.failures["column"].tolist() == [label]
        assert repr(other)


@pytest.mark.parametrize("value", [{}, 10**40], ids=["no data", "large"])
def test_a_column_that_parquet_cannot_hold_is_left_out_of_files(
    photos: pd.DataFrame, tmp_path: Path, value: object
) -> None:
    frame = photos.assign(odd=pd.Series([value for _ in photos.index], photos.index, dtype=object))
    result = extract(frame, "MobileNet --size 32", images="path", parquet=tmp_path / "files")
    assert f"Not written to the files: 'odd' (values of type {type(value).__name__})." in result.notes
    assert "odd" not in nbfeat.read(tmp_path / "files").frame
    with pytest.raises(NbfeatError, match="cannot store column 'odd'"):
        extract(frame, "MobileNet --size 32", images="path").to_parquet(tmp_path / "one.parquet")
