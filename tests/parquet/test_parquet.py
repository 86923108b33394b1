"""A result travels in a Parquet file that any reader reads; what comes from one is checked before it is believed."""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import nbfeat
from nbfeat import Extraction, RequestError, Result, extract
from nbfeat.extraction import packed
from nbfeat.parquet import sealed
from tests.faces import same

pytestmark = pytest.mark.usefixtures("fake_network")
BLOCK = "MobileNet --size 32"
LEARNED = f"{BLOCK} --normalize standard --components 3"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "train.parquet"


@pytest.fixture
def result(photos: pd.DataFrame) -> Extraction:
    photos.iloc[2, 0] = None
    photos.iloc[9, 0] = "<img src=x onerror=alert(1)>.jpg"
    blocks = [LEARNED, f"{BLOCK} --layer conv1 --normalize l2", f"{BLOCK} --normalize minmax --prefix 'a b'"]
    return extract(photos, *blocks, images="path", fit_on="split == 'train'")


def test_what_was_written_is_read_again(result: Extraction, photos: pd.DataFrame, file: Path) -> None:
    result.to_parquet(file)
    back = nbfeat.read(file)
    assert isinstance(back, Result)
    same(back.frame, result.frame)
    same(back.features, result.features)
    same(back.failures, result.failures)
    pd.testing.assert_series_equal(back.ok, result.ok)
    assert back.columns == result.columns
    for prefix in ("mobilenet", "mobilenet_conv1", "a b"):
        same(back[prefix], result[prefix])
    assert back.recipe == result.recipe
    with pytest.raises(RequestError, match=r"no block 'mobilnet'\. Did you mean mobilenet"):
        back["mobilnet"]
    same(back.like(photos.iloc[::-1]).features, result.features.iloc[::-1])
    back.to_parquet(file.with_name("again.parquet"))
    same(nbfeat.read(file.with_name("again.parquet")).frame, result.frame)


def test_other_readers_see_the_frame_as_pandas_writes_it(result: Extraction, file: Path) -> None:
    result.to_parquet(file)
    result.frame.to_parquet(file.with_name("pandas.parquet"))
    same(pd.read_parquet(file), pd.read_parquet(file.with_name("pandas.parquet")))
    assert parquet.read_schema(file).names == [*result.frame.columns, "name"]


def test_what_was_read_shows_itself_with_everything_escaped(result: Extraction, file: Path) -> None:
    result.to_parquet(file)
    back = nbfeat.read(file)
    assert repr(back).splitlines()[0] == "54 columns of features of 20 rows, read from train.parquet"
    assert "3      path: MobileNet --normalize standard --components 3 --size 32" in repr(back)
    assert "2 of 20 images failed and are NaN" in repr(back)
    assert "made by Fake engine · float32" in repr(back)
    html = back._repr_html_()
    assert "<img" not in html
    assert "&lt;img src=x" in html


@pytest.mark.parametrize(
    "values", [["text", None] * 10, [b"bytes"] * 20, [{"bytes": b"x", "path": "p"}] * 20, range(20), [[1.5, 2.5]] * 20]
)
def test_columns_of_the_user_travel(photos: pd.DataFrame, file: Path, values: list[Any]) -> None:
    frame = photos.assign(extra=pd.Series(list(values), index=photos.index))
    frame["day"] = pd.Timestamp("2026-11-24", tz="UTC")
    frame["kind"] = pd.Categorical(["a", "b"] * 10)
    result = extract(frame, BLOCK, images="path")
    result.to_parquet(file)
    result.frame.to_parquet(file.with_name("pandas.parquet"))
    same(nbfeat.read(file).frame, pd.read_parquet(file.with_name("pandas.parquet")))


def test_a_column_that_parquet_cannot_hold_is_named_and_can_be_left_out(photos: pd.DataFrame, file: Path) -> None:
    images: Any = [Image.new("RGB", (40, 40), (number, 0, 0)) for number in range(20)]
    result = extract(photos.assign(image=images, file=photos["path"].map(Path)), BLOCK, images="image")
    expected = r"cannot hold column 'image' \(values of type Image\) and 'file' \(values of type PosixPath\).*without="
    with pytest.raises(RequestError, match=expected):
        result.to_parquet(file)
    assert list(file.parent.iterdir()) == []
    for label, words in {"imag": "is not in the frame. Did you mean image", "mobilenet_0001": "is a feature"}.items():
        with pytest.raises(RequestError, match=words):
            result.to_parquet(file, without=[label])
    result.to_parquet(file, without=["image", "file"])
    back = nbfeat.read(file)
    same(back.frame, result.frame.drop(columns=["image", "file"]))
    same(back.like(photos.assign(image=images)).features, result.features)


@pytest.mark.parametrize("names", [["path", 7, "label"], ["path", "twice", "twice"]])
def test_names_that_parquet_cannot_hold_are_refused(photos: pd.DataFrame, file: Path, names: list[Any]) -> None:
    photos.columns = pd.Index(names)
    result = extract(photos, BLOCK, images="path")
    with pytest.raises(RequestError, match=r"cannot hold column (7: only text|'twice': each name).*Rename it"):
        result.to_parquet(file)
    assert not file.exists()
    if 7 in names:
        result.to_parquet(file, without=[7])
        assert "7" not in nbfeat.read(file).frame


def test_an_index_that_parquet_cannot_hold_is_refused(photos: pd.DataFrame, file: Path) -> None:
    photos.index = pd.Index([*range(19), ("a", "b")], dtype=object)
    with pytest.raises(RequestError, match=r"cannot hold this frame: .*Change it and extract again"):
        extract(photos, BLOCK, images="path").to_parquet(file)


def test_an_empty_result_of_a_repeated_one_travels(result: Extraction, photos: pd.DataFrame, file: Path) -> None:
    empty = result.like(photos.iloc[:0])
    empty.to_parquet(file)
    back = nbfeat.read(file)
    assert back.frame.shape == empty.frame.shape
    assert "made by nothing" in repr(back)
    same(back.like(photos).features, result.features)


def test_a_file_is_written_whole_or_not_at_all(result: Extraction, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("what was there before")

    def broken(self: Any, table: Any, **_: Any) -> None:
        self.where_it_is = table
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parquet.ParquetWriter, "write_table", broken)
        with pytest.raises(OSError, match="No space"):
            result.to_parquet(file)
    assert file.read_text() == "what was there before"
    assert list(file.parent.iterdir()) == [file]
    result.to_parquet(file)
    assert len(nbfeat.read(file).frame) == 20
    if os.name == "posix":
        (file.parent / "plain").write_text("")
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((file.parent / "plain").stat().st_mode)


def test_a_link_is_written_through_and_a_missing_folder_told(result: Extraction, file: Path) -> None:
    link = file.with_name("link.parquet")
    link.symlink_to(file)
    result.to_parquet(link)
    assert link.is_symlink()
    assert len(nbfeat.read(file).frame) == 20
    with pytest.raises(RequestError, match=r"no folder .*nowhere: make it first"):
        result.to_parquet(file.parent / "nowhere" / "x.parquet")


def test_features_that_were_taken_away_since_are_missed(result: Extraction, file: Path) -> None:
    del result.frame["mobilenet_0001"]
    with pytest.raises(RequestError, match="lost 1 of its 54 features"):
        result.to_parquet(file)


def test_what_is_too_large_to_travel_is_told_with_the_way_out(
    result: Extraction, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "LARGEST", 2000)
    with pytest.raises(RequestError, match=r"2 failures take \d kB \(mobilenet: .*more than the 2 kB.*--components"):
        result.to_parquet(file)
    assert not file.exists()


# What comes from elsewhere


def changed(file: Path, change: Callable[[dict[str, Any]], object], *, text: bytes | None = None) -> None:
    """Write the file anew with another entry in its footer, its checksum right."""
    table, entries = parquet.read_table(file), parquet.read_metadata(file).metadata
    whole = json.loads(entries[b"nbfeat"])
    change(whole)
    made = json.dumps(whole).encode() if text is None else text
    resealed(file, table, {b"nbfeat": made})


def resealed(file: Path, table: pa.Table, entries: dict[bytes, bytes]) -> None:
    """Write a table with other entries in the footer, all checksums right."""
    plain = {key: value for key, value in table.schema.metadata.items() if not key.startswith(b"nbfeat")}
    with file.open("wb") as sink, sealed.writer(sink, table.schema.with_metadata(plain), entries) as writer:
        writer.write_table(table)


def array(*values: float, shape: list[int] | None = None) -> dict[str, Any]:
    data = np.array(values, "<f4").tobytes()
    return {"shape": [len(values)] if shape is None else shape, "float32": base64.b64encode(data).decode()}


def put(*place: Any) -> Callable[[dict[str, Any]], object]:
    """Return a change that puts the last of `place` where the others say."""
    *keys, last, value = place

    def change(whole: Any) -> None:
        for key in keys:
            whole = whole[key]
        whole[last] = value

    return change


PART = ("parts", 0)
YES = True
HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no format": lambda whole: whole.pop("format"),
    "a format of text": put("format", "1"),
    "a format that is true": put("format", YES),
    "no parts": put("parts", []),
    "parts that are text": put("parts", "abc"),
    "one prefix twice": put("parts", 1, "prefix", "mobilenet"),
    "a block that is none": put(*PART, "block", "MobileNet --nosuch 3"),
    "a block that is code": put(*PART, "block", "__import__('os').system('true')"),
    "two blocks in one": put(*PART, "block", "MobileNet --layer a,b"),
    "a block that is a number": put(*PART, "block", 7),
    "no width": put(*PART, "width", 0),
    "a width of text": put(*PART, "width", "48"),
    "a width that is true": put(*PART, "width", YES),
    "another width": put(*PART, "width", 47),
    "an enormous width": put("parts", 1, "width", 10**15),
    "a prefix that is no text": put(*PART, "prefix", ["mobilenet"]),
    "a prefix of other columns": put(*PART, "prefix", "label"),
    "an image column that is no text": put(*PART, "images", {"a": 1}),
    "weights that are text": put(*PART, "weights", "imagenet"),
    "weights with more": put(*PART, "weights", "more", 1),
    "weights without name": put(*PART, "weights", "name", None),
    "nothing that decides": put(*PART, "key_fields", None),
    "no arrays": put(*PART, "arrays", {}),
    "arrays that are none": put(*PART, "arrays", None),
    "an array too many": put("parts", 1, "arrays", {"shift": array(1, 2, 3)}),
    "an array of another name": put(*PART, "arrays", "__class__", array(1)),
    "an array of another width": put(*PART, "arrays", "shift", array(1, 2)),
    "an array of another shape": put(*PART, "arrays", "axes", "shape", [48, 3]),
    "an array that says another shape": put(*PART, "arrays", "shift", array(1, 2, shape=[48])),
    "an array of a negative shape": put(*PART, "arrays", "shift", "shape", [-48]),
    "an array that is no base64": put(*PART, "arrays", "shift", "float32", "!!!!"),
    "an array that is no text": put(*PART, "arrays", "shift", "float32", 3.5),
    "unit length that is not asked for": put(*PART, "unit_length", YES),
    "unit length that is text": put("parts", 1, "unit_length", "yes"),
    "another precision": put(*PART, "key_fields", "precision", "int8"),
    "a precision that is a list": put(*PART, "key_fields", "precision", []),
    "a recipe that is text": put("recipe", "none"),
    "engines that are numbers": put("recipe", "engines", [1, 2]),
    "failures that are text": put("failures", "abcd"),
    "a failure that is too short": put("failures", [[1, "path", "x"]]),
    "a failure whose reason is a number": put("failures", [[1, "path", "x", 3]]),
    "a failure at no row": put("failures", [["1", "path", "x", "gone"]]),
    "a failure beyond the rows": put("failures", [[20, "path", "x", "gone"]]),
    "a failure before the rows": put("failures", [[-1, "path", "x", "gone"]]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_nbfeat_would_not_write_is_refused(
    result: Extraction, photos: pd.DataFrame, file: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    result.to_parquet(file)
    changed(file, change)
    with pytest.raises(RequestError, match=r"^train\.parquet .*Extract the features anew\.$") as caught:
        nbfeat.read(file)
    assert len(str(caught.value)) < 300
    if "rows" not in str(caught.value):  # of which repeating reads none
        with pytest.raises(RequestError, match=r"^train\.parquet"):
            extract(photos, like=file)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}', b"1" * 9999])
def test_an_entry_that_is_no_json_of_ours_is_refused(result: Extraction, file: Path, text: bytes) -> None:
    result.to_parquet(file)
    changed(file, lambda _: None, text=text)
    with pytest.raises(RequestError, match=r"^train\.parquet cannot be read as a result of nbfeat"):
        nbfeat.read(file)


def test_a_file_of_a_newer_nbfeat_says_so(result: Extraction, file: Path) -> None:
    result.to_parquet(file)
    changed(file, put("format", 2))
    with pytest.raises(RequestError, match=r"written by a newer nbfeat \(format 2, this one reads 1\)"):
        nbfeat.read(file)


def test_files_that_nbfeat_did_not_write_are_refused(result: Extraction, photos: pd.DataFrame, file: Path) -> None:
    with pytest.raises(RequestError, match=r"no file '.*train\.parquet'"):
        nbfeat.read(file)
    photos.to_parquet(file)
    with pytest.raises(RequestError, match=r"train\.parquet was not written by nbfeat"):
        nbfeat.read(file)
    result.to_parquet(file)
    with pytest.raises(RequestError, match=r"Did you mean train\.parquet"):
        nbfeat.read(file.with_name("trian.parquet"))
    nbfeat.read(file).frame.to_parquet(file)  # by pandas
    with pytest.raises(RequestError, match=r"or was written anew by something else since"):
        extract(photos, like=file)
    for content in (b"", b"text", b"PAR1" + b"\xff" * 400 + b"PAR1"):
        file.write_bytes(content)
        with pytest.raises(RequestError, match=r"train\.parquet is not a Parquet file, or is damaged"):
            nbfeat.read(file)
    with pytest.raises(RequestError, match="No file system here knows"):
        nbfeat.read("nosuch://bucket/train.parquet")


def test_a_damaged_footer_is_told_by_its_checksum(result: Extraction, photos: pd.DataFrame, file: Path) -> None:
    result.to_parquet(file)
    data = file.read_bytes()
    place = data.index(b'"float32": "') + 40  # a digit of what was learned
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    for work in (lambda: nbfeat.read(file), lambda: extract(photos, like=file)):
        with pytest.raises(RequestError, match=r"damaged.*: its footer does not agree with its checksum\."):
            work()


def test_damaged_columns_are_told_by_their_checksum(result: Extraction, photos: pd.DataFrame, file: Path) -> None:
    result.to_parquet(file)
    place = parquet.read_metadata(file).row_group(0).column(5).data_page_offset + 60
    data = file.read_bytes()
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert not pd.read_parquet(file).equals(result.frame), "nobody else notices"
    with pytest.raises(RequestError, match=r"damaged: its columns do not agree with their checksum\. Extract"):
        nbfeat.read(file)
    assert extract(photos, like=file).total == 20, "which needs the footer alone"


def test_a_table_that_was_written_anew_with_our_entries_is_refused(result: Extraction, file: Path) -> None:
    result.to_parquet(file)
    parquet.write_table(parquet.read_table(file), file)
    with pytest.raises(RequestError, match=r"written anew by something else"):
        nbfeat.read(file)


def test_columns_that_were_changed_since_are_told(result: Extraction, file: Path) -> None:
    result.to_parquet(file)
    entries = parquet.read_metadata(file).metadata
    kept = {b"nbfeat": entries[b"nbfeat"]}
    for frame, words in {
        "narrower": (result.frame.drop(columns="mobilenet_0001"), "has not the 3 columns mobilenet_0000"),
        "double": (result.frame.astype({"mobilenet_0001": "float64"}), "column mobilenet_0001, which is not float32"),
        "index": (result.frame.set_index("mobilenet_0001"), "has not the 3 columns mobilenet_0000"),
    }.values():
        resealed(file, pa.Table.from_pandas(frame), kept)
        with pytest.raises(RequestError, match=words):
            nbfeat.read(file)
