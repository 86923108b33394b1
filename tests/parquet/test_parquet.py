"""A result is stored in a Parquet file that any reader can open, and is checked when it is read back."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import functools
import json
import os
import re
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
from nbfeat import Extraction, RequestError, Result
from nbfeat.extraction import recipe
from nbfeat.parquet import result_file
from tests.faces import same

pytestmark = pytest.mark.usefixtures("fake_network")
BLOCK = "MobileNet --size 32"
extract = functools.partial(nbfeat.extract, cache=False)
LEARNED = f"{BLOCK} --normalize standard --components 3"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "train.parquet"


@pytest.fixture
def result(photos: pd.DataFrame) -> Extraction:
    photos = photos.copy()
    photos.iloc[2, 0] = None
    photos.iloc[9, 0] = "<img src=x onerror=alert(1)>.jpg"
    blocks = [LEARNED, f"{BLOCK} --layer conv1 --normalize l2", f"{BLOCK} --normalize minmax --prefix 'a b'"]
    return extract(photos, *blocks, images="path", fit_on="split == 'train'")


@pytest.fixture
def there(result: Extraction, file: Path) -> Path:
    """Write a file that the test will damage."""
    result.to_parquet(file)
    return file


def test_what_was_written_is_read_again(result: Extraction, photos: pd.DataFrame, file: Path) -> None:
    result.to_parquet(file)
    back = nbfeat.read(file)
    assert isinstance(back, Result)
    same(back.frame, result.frame)
    same(back.features, result.features)
    same(back.failures, result.failures)
    pd.testing.assert_series_equal(back.ok, result.ok)
    assert (back.columns, back.recipe) == (result.columns, result.recipe)
    for prefix in ("mobilenet", "mobilenet_conv1", "a b"):
        same(back[prefix], result[prefix])
    with pytest.raises(RequestError, match=r"no block 'mobilnet'\. Did you mean mobilenet"):
        back["mobilnet"]
    photos.iloc[2, 0] = None
    again = back.like(photos.iloc[::-1]).features
    same(again.drop(index="row 9"), result.features.iloc[::-1].drop(index="row 9"))
    other = file.with_name("other.parquet")
    back.to_parquet(other)
    same(nbfeat.read(other).frame, result.frame)
    result.frame.to_parquet(other)
    same(pd.read_parquet(file), pd.read_parquet(other))
    assert parquet.read_schema(file).names == [*result.frame.columns, "name"]


def test_what_was_read_shows_itself_with_everything_escaped(there: Path) -> None:
    back = nbfeat.read(there)
    assert repr(back).splitlines()[0] == "54 feature columns of 20 rows, read from train.parquet"
    assert "3      path: MobileNet --normalize standard --components 3 --size 32" in repr(back)
    assert "2 of 20 images failed and are NaN" in repr(back)
    assert "engine: Fake engine · float32" in repr(back)
    html = back._repr_html_()
    assert "<img" not in html
    assert "&lt;img src=x" in html


def arrow(value: Any, kind: Any) -> Any:
    return pd.arrays.ArrowExtensionArray(pa.chunked_array([pa.array([value] * 19 + [None], kind)]))


TIME = dt.datetime(2026, 11, 24, 1, 2, 3, tzinfo=dt.UTC)
COLUMNS: dict[str, Any] = {
    "text": ["text", None] * 10, "bytes": [b"bytes"] * 20, "image": [{"bytes": b"x", "path": "p"}, None] * 10,
    "number": range(20), "list": [[1.5, 2.5], None] * 10, "lists": [[{"a": b"x"}], []] * 10, "none": [None] * 20,
    "half": np.arange(20, dtype=np.float16), "nan": [np.nan, 1.5] * 10, "maybe": pd.array([1, None] * 10, "Int64"),
    "bool": pd.array([True, None] * 10, "boolean"), "day": [TIME.date()] * 20, "time": [TIME.time(), None] * 10,
    "decimal": [decimal.Decimal("1.50"), None] * 10, "zone": pd.date_range("2026", periods=20, tz="Europe/Berlin"),
    "kind": pd.Categorical(["a", "b", None, "a"] * 5), "order": pd.Categorical([1, 2] * 10, [2, 1], ordered=True),
    "period": pd.period_range("2026", periods=20, freq="M"), "interval": pd.interval_range(0, 20),
    "second": np.full(20, "2026-11-24", "datetime64[s]"), "long ago": np.full(20, "-9999-11-24", "datetime64[s]"),
    "seconds": np.full(20, 3, "timedelta64[s]"), "clock": arrow(TIME.time(), pa.time32("s")),
    "days": arrow(TIME.date(), pa.date64()),
}  # fmt: skip


def test_columns_of_the_user_travel(photos: pd.DataFrame, file: Path) -> None:
    more = {name: pd.Series(values, photos.index) for name, values in COLUMNS.items()}
    result = extract(photos.assign(**more), BLOCK, images="path")
    result.to_parquet(file)
    result.frame.to_parquet(file.with_name("pandas.parquet"))
    same(nbfeat.read(file).frame, pd.read_parquet(file.with_name("pandas.parquet")))
    parquet.write_table(parquet.read_table(file), file)  # by another tool, which preserves nbfeat's metadata
    same(nbfeat.read(file).frame, pd.read_parquet(file.with_name("pandas.parquet")))
    same(nbfeat.read(file).like(photos).features, result.features)
    extract(photos.assign(fixed=arrow(b"abc", pa.binary(3))), BLOCK, images="path").to_parquet(file)
    with pytest.raises(RequestError, match=r"has columns that cannot be read: "):  # pandas cannot either
        nbfeat.read(file)


def test_a_column_that_parquet_cannot_hold_is_named_and_can_be_left_out(photos: pd.DataFrame, file: Path) -> None:
    images: Any = [Image.new("RGB", (40, 40), (number, 0, 0)) for number in range(20)]
    result = extract(photos.assign(image=images, file=photos["path"].map(Path)), BLOCK, images="image")
    expected = r"cannot store column 'image' \(values of type Image\) and 'file' \(values of type PosixPath\).*without="
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
def test_names_and_indexes_that_parquet_cannot_hold_are_refused(
    photos: pd.DataFrame, file: Path, names: list[Any]
) -> None:
    photos.columns = pd.Index(names)
    result = extract(photos, BLOCK, images="path")
    with pytest.raises(RequestError, match=r"cannot store column (7|'twice'): column names must be.*Rename it"):
        result.to_parquet(file)
    if 7 in names:
        result.to_parquet(file, without=[7])
        assert "7" not in nbfeat.read(file).frame
    photos = photos[["path"]].set_axis(pd.Index([*range(19), ("a", "b")], dtype=object))
    with pytest.raises(RequestError, match=r"cannot store this frame: .*Change it and extract again"):
        extract(photos, BLOCK, images="path").to_parquet(file)


def test_what_is_large_is_in_the_file_once(there: Path, result: Extraction, monkeypatch: pytest.MonkeyPatch) -> None:
    size = there.stat().st_size
    monkeypatch.setattr(result_file, "LARGE", 100)
    result.to_parquet(there)
    assert there.stat().st_size < size - 5000
    same(nbfeat.read(there).frame, result.frame)
    parquet.write_table(parquet.read_table(there), there)  # by another tool, which drops it
    with pytest.raises(RequestError, match=r"train\.parquet was not written by nbfeat"):
        nbfeat.read(there)


def test_an_empty_result_of_a_repeated_one_travels(result: Extraction, photos: pd.DataFrame, file: Path) -> None:
    empty = result.like(photos.iloc[:0])
    empty.to_parquet(file)
    back = nbfeat.read(file)
    assert back.frame.shape == empty.frame.shape
    assert "engine: none" in repr(back)
    good = result.ok.to_numpy()
    same(back.like(photos[good]).features, result.features[good])


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
    link = file.with_name("link.parquet")
    link.symlink_to(file)
    result.to_parquet(link)
    assert link.is_symlink()
    assert len(nbfeat.read(file).frame) == 20
    if os.name == "posix":
        (file.parent / "plain").write_text("")
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((file.parent / "plain").stat().st_mode)


def test_what_cannot_be_written_is_told_with_the_way_out(
    result: Extraction, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match=r"folder .*nowhere doesn't exist: create it"):
        result.to_parquet(file.parent / "nowhere" / "x.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "LARGEST", 2000)
        with pytest.raises(
            RequestError, match=r"2 failures take \d kB \(mobilenet: .*more than the 2 kB.*`components`"
        ):
            result.to_parquet(file)
    del result.frame["mobilenet_0001"]
    with pytest.raises(RequestError, match="missing 1 of its 54 feature columns"):
        result.to_parquet(file)
    assert not file.exists()


# Files from other sources


def resealed(file: Path, table: pa.Table, entries: dict[bytes, bytes]) -> None:
    """Write a table with different metadata entries and correct checksums."""
    plain = {key: value for key, value in table.schema.metadata.items() if not key.startswith(b"nbfeat")}
    groups: dict[str, list[str]] = {}
    for name in sorted(table.column_names):
        groups.setdefault(re.sub(r"_\d{4}$", "", name), []).append(name)
    with file.open("wb") as sink:
        result_file.write_table(sink, table.replace_schema_metadata(plain), entries, list(groups.values()))


def flipped(data: bytes, place: int) -> bytes:
    """Return `data` with one bit flipped."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def array(*values: float, shape: list[int] | None = None) -> dict[str, Any]:
    data = np.array(values, "<f4").tobytes()
    return {"shape": [len(values)] if shape is None else shape, "float32": base64.b64encode(data).decode()}


def put(*place: Any) -> Callable[[dict[str, Any]], object]:
    """Return a function that sets the last value of `place` at the path of the others."""
    *keys, last, value = place

    def change(whole: Any) -> None:
        for key in keys:
            whole = whole[key]
        whole[last] = value

    return change


PART = ("parts", 0)
YES = True
HOSTILE = [
    lambda whole: whole.pop("format"), put("format", "1"), put("format", YES), put("parts", []), put("parts", "abc"),
    put("parts", 1, "prefix", "mobilenet"), put(*PART, "block", "MobileNet --nosuch 3"), put(*PART, "block", 7),
    put(*PART, "block", "__import__('os').system('true')"), put(*PART, "block", "MobileNet --layer a,b"),
    put(*PART, "width", 0), put(*PART, "width", "48"), put(*PART, "width", YES), put(*PART, "width", 47),
    put("parts", 1, "width", 10**15), put(*PART, "prefix", ["mobilenet"]), put(*PART, "prefix", "label"),
    put(*PART, "images", {"a": 1}), put(*PART, "weights", "imagenet"), put(*PART, "weights", "more", 1),
    put(*PART, "weights", "name", None), put(*PART, "key_fields", None), put(*PART, "arrays", {}),
    put(*PART, "arrays", None), put("parts", 1, "arrays", {"shift": array(1, 2, 3)}),
    put(*PART, "arrays", "__class__", array(1)), put(*PART, "arrays", "shift", array(1, 2)),
    put(*PART, "arrays", "axes", "shape", [48, 3]), put(*PART, "arrays", "shift", array(1, 2, shape=[48])),
    put(*PART, "arrays", "shift", "shape", [-48]), put(*PART, "arrays", "shift", "float32", "!!!!"),
    put(*PART, "arrays", "shift", "float32", 3.5), put(*PART, "arrays", "shift", array(*[np.nan] * 48)),
    put(*PART, "unit_length", YES),
    put("parts", 1, "unit_length", "yes"), put(*PART, "key_fields", "precision", "int8"),
    put(*PART, "key_fields", "precision", []), put("recipe", "none"), put("recipe", "engines", [1, 2]),
    put("failures", "abcd"), put("failures", [[1, "path", "x"]]), put("failures", [[1, "path", "x", 3]]),
    put("failures", [["1", "path", "x", "gone"]]), put("failures", [[20, "path", "x", "gone"]]),
    put("failures", [[-1, "path", "x", "gone"]]),
]  # fmt: skip


def test_what_nbfeat_would_not_write_is_refused(there: Path) -> None:
    table, text = parquet.read_table(there), parquet.read_metadata(there).metadata[b"nbfeat"]
    for number, change in enumerate(HOSTILE):
        whole = json.loads(text)
        change(whole)
        resealed(there, table, {b"nbfeat": json.dumps(whole).encode()})
        with pytest.raises(RequestError, match=r"^train\.parquet .*Extract the features again\.$") as caught:
            print(number, nbfeat.read(there))
        assert len(str(caught.value)) < 300
        if "rows" not in str(caught.value):  # `like` reads no rows
            with pytest.raises(RequestError, match=r"^train\.parquet"):
                print(number, extract(pd.DataFrame({"path": ["x"]}), like=there))


def test_an_entry_that_is_no_json_of_ours_is_refused(there: Path) -> None:
    table = parquet.read_table(there)
    for text in (b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}', b"1" * 9999):
        resealed(there, table, {b"nbfeat": text})
        with pytest.raises(RequestError, match=r"^train\.parquet can't be read as a result of nbfeat"):
            nbfeat.read(there)
    whole = json.loads(table.schema.metadata[b"nbfeat"])
    resealed(there, table, {b"nbfeat": json.dumps({**whole, "format": 2}).encode()})
    with pytest.raises(RequestError, match=r"written by a newer nbfeat \(format 2, this one reads 1\)"):
        nbfeat.read(there)


def test_files_that_nbfeat_did_not_write_are_refused(there: Path, photos: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match=r"not found: '.*trian\.parquet'.*Did you mean train\.parquet"):
        nbfeat.read(there.with_name("trian.parquet"))
    nbfeat.read(there).frame.to_parquet(there)  # by pandas, which drops nbfeat's metadata
    for work in (lambda: nbfeat.read(there), lambda: extract(photos, like=there)):
        with pytest.raises(
            RequestError, match=r"train\.parquet was not written by nbfeat, or was rewritten by another"
        ):
            work()
    for content in (b"", b"text", b"PAR1" + b"\xff" * 400 + b"PAR1"):
        there.write_bytes(content)
        with pytest.raises(RequestError, match=r"train\.parquet is not a Parquet file, or is damaged"):
            nbfeat.read(there)
    there.unlink()
    with pytest.raises(RequestError, match=r"not found: '.*train\.parquet'\. Check the path; relative paths start at"):
        nbfeat.read(there)
    with pytest.raises(RequestError, match="Cannot open"):
        nbfeat.read("nosuch://bucket/train.parquet")


def test_damages_are_told_by_checksums(there: Path, photos: pd.DataFrame) -> None:
    data, good = there.read_bytes(), nbfeat.read(there)
    there.write_bytes(flipped(data, data.index(b'"float32": "') + 40))  # a digit of a fitted parameter
    for work in (lambda: nbfeat.read(there), lambda: extract(photos, like=there)):
        with pytest.raises(RequestError, match=r"damaged.*: its footer doesn't match its checksum\."):
            work()
    there.write_bytes(data)
    for chunk in [parquet.read_metadata(there).row_group(0).column(column) for column in (1, 5)]:  # a label, a feature
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        there.write_bytes(flipped(data, start + chunk.total_compressed_size - 9))
        with pytest.raises(RequestError, match=r"damaged: its columns don't match their checksum\. Extract"):
            nbfeat.read(there)
    assert not pd.read_parquet(there).equals(good.frame), "nobody else notices"
    assert extract(photos, like=there).total == 20, "which needs the metadata alone"


def test_columns_that_were_changed_since_are_told(there: Path) -> None:
    table, good = parquet.read_table(there), nbfeat.read(there).frame
    values = pa.array(good["a b_0003"].to_numpy()[::-1].copy())
    parquet.write_table(table.set_column(table.column_names.index("a b_0003"), "a b_0003", values), there)
    with pytest.raises(RequestError, match=r"damaged: its columns don't match their checksum"):
        nbfeat.read(there)
    for frame, words in (
        (good.drop(columns="mobilenet_0001"), "doesn't have the 3 columns mobilenet_0000"),
        (good.astype({"mobilenet_0001": "float64"}), "column mobilenet_0001, which isn't float32"),
        (good.set_index("mobilenet_0001"), "doesn't have the 3 columns mobilenet_0000"),
    ):
        resealed(there, pa.Table.from_pandas(frame), {b"nbfeat": table.schema.metadata[b"nbfeat"]})
        with pytest.raises(RequestError, match=words):
            nbfeat.read(there)
