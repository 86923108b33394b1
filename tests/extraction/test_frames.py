"""Accepted frames: a DataFrame, a Parquet file or folder, or a Ray dataset."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import nbfeat
from nbfeat import RequestError
from tests.faces import run_cell, same

pytestmark = pytest.mark.usefixtures("fake_network")
BLOCK = "MobileNet --size 32"


def test_a_label_of_half_a_character_serves_as_a_prefix(photos: pd.DataFrame, fake_network: object) -> None:
    labels = pd.Index(["path", "half\ud800"], dtype=object)
    frame = pd.DataFrame(photos[["path", "path"]].to_numpy(), columns=labels)
    result = nbfeat.extract(frame, "MobileNet --size 32", images=["path", "half\ud800"])
    assert [part.prefix for part in result.parts] == ["path_mobilenet", "half?_mobilenet"]
    assert result.features.to_numpy().shape == (len(photos), 2 * len(result.parts[0].names))


def test_a_frame_may_be_a_parquet_file_or_folder(photos: pd.DataFrame, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    photos.iloc[:8].to_parquet(folder / "a.parquet")
    photos.iloc[8:].to_parquet(folder / "b.parquet")
    (folder / "_SUCCESS").write_text("")
    photos.to_parquet(tmp_path / "one.parquet")
    usual = nbfeat.extract(photos, BLOCK, images="path")
    for path in (folder, str(folder), tmp_path / "one.parquet", str(tmp_path / "one.parquet")):
        same(nbfeat.extract(path, BLOCK, images="path").frame, usual.frame)
        same(usual.like(path).frame, usual.frame)
    assert nbfeat.Extraction(folder, BLOCK, images="path").total == 20


def test_images_within_a_parquet_file_are_read(photos: pd.DataFrame, tmp_path: Path) -> None:
    cells = [{"bytes": Path(path).read_bytes(), "path": None} for path in photos["path"]]
    photos.assign(path=pd.Series(cells, photos.index)).to_parquet(tmp_path / "with.parquet")
    usual = nbfeat.extract(photos, BLOCK, images="path")
    same(nbfeat.extract(tmp_path / "with.parquet", BLOCK).features, usual.features)


def test_a_path_that_holds_no_frame_is_refused_in_one_sentence(photos: pd.DataFrame, tmp_path: Path) -> None:
    photos.to_csv(tmp_path / "some.csv")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "some.csv").write_text("a,b")
    pd.DataFrame(index=range(3)).to_parquet(tmp_path / "bare.parquet")
    os.mkfifo(tmp_path / "pipe.parquet")
    words = {
        tmp_path / "gone.parquet": r"gone\.parquet doesn't exist\. Pass",
        tmp_path / "some.csv" / "x": r"x doesn't exist\. Pass",
        tmp_path / "pipe.parquet": r"pipe\.parquet isn't a regular file or a folder\. Pass",
        tmp_path / "some.csv": r"some\.csv can't be read as Parquet \(\w.+\)\. Pass",
        tmp_path / "cut.parquet": r"cut\.parquet can't be read as Parquet \(\w.+\)\. Pass",
        tmp_path / "mixed": r"mixed can't be read as Parquet \(\w.+\)\. Pass",
        tmp_path / "empty": "empty is a folder without Parquet files",
        tmp_path / "bare.parquet": r"bare\.parquet has no columns",
        "nul\0.parquet": "can't be read as Parquet|doesn't exist",
        "s3://bucket/frame": r"from the URL s3://bucket/frame\. Pass `pandas\.read_parquet",
    }
    for path, sentence in words.items():
        with pytest.raises(RequestError, match=sentence) as error:
            nbfeat.extract(path, BLOCK)
        assert str(error.value).count(". ") <= 1
        assert "\n" not in str(error.value)


def test_a_dataset_of_ray_is_read_without_importing_ray(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dataset:
        def to_pandas(self) -> pd.DataFrame:
            return photos

    data = ModuleType("ray.data")
    data.Dataset = Dataset  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray.data", data)
        result = nbfeat.extract(Dataset(), BLOCK, images="path")
    same(result.frame, nbfeat.extract(photos, BLOCK, images="path").frame)
    with pytest.raises(RequestError, match=r"not tests\.\S+Dataset: use its \.to_pandas\(\)"):
        nbfeat.extract(Dataset(), BLOCK)


def test_tables_of_others_are_refused_with_the_way(photos: pd.DataFrame) -> None:
    polars = pytest.importorskip("polars")
    for table in (polars.DataFrame({"path": photos["path"].tolist()}), pa.Table.from_pandas(photos)):
        with pytest.raises(RequestError, match=r"must be a pandas DataFrame, not \w+\.\w+: use its \.to_pandas\(\)"):
            nbfeat.extract(table, BLOCK)


def test_magics_take_names_of_frames_only(photos: pd.DataFrame, tmp_path: Path, shell: InteractiveShell) -> None:
    photos.to_parquet(tmp_path / "one.parquet")
    shell.user_ns["photos"] = str(tmp_path / "one.parquet")
    with pytest.raises(UsageError, match="must be a pandas DataFrame, not str"):
        run_cell(shell, f"%extract photos {BLOCK}")


@pytest.mark.parametrize(
    "label",
    [None, pd.NA, pd.NaT, np.nan, ("a", 1), 7, np.int64(7), 1.5, True, b"x", pd.Timestamp("2026-01-01")],
    ids=repr,
)
def test_labels_of_columns_stay_what_they_were(photos: pd.DataFrame, label: object) -> None:
    photos = photos[["label", "path", "split"]]
    photos.columns = pd.Index([label, "path", "split"], dtype=object, name="what", tupleize_cols=False)
    photos["mobilenet_0000"] = "replaced"
    first = nbfeat.extract(photos, BLOCK, images="path", replace=True)
    again = nbfeat.extract(first.frame.iloc[:, [*range(2, 51), 1, 0]], BLOCK, images="path", prefix="more")
    for frame, at in ((first.frame, 0), (again.frame, 50)):
        assert frame.columns[at] is label
        assert frame.columns.name == "what"
        assert list(frame.iloc[:, at]) == list(photos.iloc[:, 0])
    assert list(first.frame.columns[1:]) == ["path", "split", *first.columns]
    assert list(again.frame.columns[-48:]) == again.columns
