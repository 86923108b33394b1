"""Results larger than memory: the files survive any interruption and have the same features as in memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from PIL import Image
from pyarrow import parquet

import nbfeat
from nbfeat import Extraction, ExtractionError, RequestError, Result
from nbfeat.extraction import sink
from nbfeat.extraction.recipe import Recipe, unpack
from nbfeat.extraction.run import Run
from nbfeat.parquet import dataset
from nbfeat.parquet.dataset import MANIFEST, PART
from nbfeat.parquet.location import LOCK, Location
from nbfeat.parquet.result_file import RECIPE, Failure
from tests.conftest import ROOT
from tests.faces import run_cell, same
from tests.fake import FakeEngine, FakeNetwork
from tests.parquet.test_parquet import extract, flipped, resealed

pytestmark = pytest.mark.usefixtures("fake_network", "small_files")
BLOCK = "MobileNet --size 32"
STANDARD = f"{BLOCK} --normalize standard"
FILES = [f"part-{number:05d}.parquet" for number in range(4)]
both = pytest.mark.parametrize("block", [BLOCK, STANDARD], ids=["plain", "standard"])


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit files to six rows, in batches of three: twenty photos give four files."""
    monkeypatch.setattr(sink, "MOST_ROWS", 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "features"


def written(frame: pd.DataFrame, *blocks: Any, parquet: Path | str, **options: Any) -> Extraction:
    return extract(frame, *blocks, images=options.pop("images", "path"), batch_size=3, parquet=parquet, **options)


def begun(frame: pd.DataFrame, folder: Path | str, steps: int, *blocks: Any, **options: Any) -> Extraction:
    """Run this many steps, and stop."""
    extraction = Extraction(frame, *(blocks or [BLOCK]), images="path", batch_size=3, parquet=folder, **options)
    for _ in islice(extraction.steps(), steps):
        pass
    return extraction


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def nearly(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """Assert equality up to the last bits, which depend on the order in which normalization was fitted."""
    pd.testing.assert_frame_equal(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", ["none", "l2", "standard", "minmax"])
def test_files_have_what_memory_would_have(photos: pd.DataFrame, folder: Path, normalize: str) -> None:
    photos.iloc[2, 0] = None
    photos.iloc[9, 0] = "gone.png"
    block, fit_on = f"{BLOCK} --normalize {normalize}", "split == 'train'"
    usual = extract(photos, block, images="path", fit_on=fit_on)
    result = written(photos, block, parquet=folder, fit_on=fit_on)
    assert names(folder) == FILES
    back = nbfeat.read(folder)
    assert isinstance(back, Result)
    (same if normalize in {"none", "l2"} else nearly)(back.frame, usual.frame)
    same(back.failures, usual.failures)
    same(result.failures, usual.failures)
    assert FakeEngine.opened == 2, "one engine for all files"
    pd.testing.assert_series_equal(back.ok, usual.ok)
    assert (result.done, result.total, result.cached, result.state) == (20, 20, 0, "done")
    assert result.columns == usual.columns
    for attribute in ("frame", "features", "ok"):
        with pytest.raises(ExtractionError, match=r"not in memory\. Read them with `nbfeat\.read\('.*features'\)`"):
            getattr(result, attribute)
    assert not any(network.features for network in result._run.networks)
    assert f"4 files, {sum(file.stat().st_size for file in folder.iterdir()) / 1000:,.0f} kB" in repr(result)
    assert "mobilenet_0000 … 0047" in repr(result)


def test_several_blocks_of_several_columns_are_columns_by_prefix(photos: pd.DataFrame, folder: Path) -> None:
    photos["again"] = photos["path"].iloc[::-1].tolist()
    photos.iloc[3, 0] = photos.iloc[13, 3] = photos.iloc[13, 0] = "gone.png"
    blocks = [BLOCK, f"{BLOCK} --normalize standard --prefix 'a b'", f"{BLOCK} --layer conv1 --normalize l2"]
    usual = extract(photos, blocks, images=["path", "again"])
    written(photos, blocks, parquet=folder, images=["path", "again"])
    back = nbfeat.read(folder)
    nearly(back.frame, usual.frame)
    same(back["path_mobilenet"], usual["path_mobilenet"])
    same(back.failures, usual.failures)
    table = parquet.read_table(folder)
    prefixes = ["path_mobilenet", "again_mobilenet", "path_a b", "again_a b", "path_mobilenet_conv1"]
    assert table.column_names[4:9] == ["name", *prefixes[:4]]
    assert table.schema.field("again_a b").type == pa.list_(pa.float32(), 48)
    assert table.column("failure").to_pylist()[3].startswith("path: no such file")
    assert table.column("failure").to_pylist()[13].count("no such file") == 2
    assert table.column("failure").null_count == 18


def test_like_gives_the_same_to_the_bit(photos: pd.DataFrame, folder: Path) -> None:
    photos.iloc[2, 0] = None
    train = extract(photos.iloc[:14], f"{STANDARD} --components 3", f"{BLOCK} --layer conv1", images="path")
    usual = train.like(photos)
    result = extract(photos, like=train, parquet=folder, batch_size=3)
    back = nbfeat.read(folder)
    same(back.frame, usual.frame)
    for again in (back.like(photos), extract(photos, like=folder), result.like(photos)):
        same(again.features, usual.features)
    assert back.recipe["blocks"] == usual.recipe["blocks"]


# Resuming


@both
def test_a_stopped_run_goes_on_where_its_files_end(photos: pd.DataFrame, folder: Path, block: str) -> None:
    photos.iloc[2, 0] = None
    stopped = begun(photos, folder, 7, block)
    assert (stopped.state, stopped.kept, stopped.keeps) == ("stopped", 11, True)
    with pytest.raises(ExtractionError, match="isn't finished"):
        _ = stopped.frame
    there = FILES[:2] if block == BLOCK else [".raw/part-00000.npz", ".raw/part-00001.npz"]
    assert names(folder) == sorted([".nbfeat.json", *there])
    with pytest.raises(RequestError, match=r"not finished: .*Rerun its extraction to resume it"):
        nbfeat.read(folder)
    before = FakeEngine.computed
    result = written(photos, block, parquet=folder)
    assert FakeEngine.computed - before == 8
    assert (result.done, result.cached, result.computed) == (20, 11, 8)
    assert "11 already in files, 8 computed" in repr(result)
    assert names(folder) == FILES
    fresh = written(photos, block, parquet=folder.with_name("fresh"))
    same(nbfeat.read(folder).frame, nbfeat.read(folder.with_name("fresh")).frame)
    assert list(fresh.failures["position"]) == list(result.failures["position"]) == [2]

    before, times = FakeEngine.computed, {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = written(photos, block, parquet=folder)
    assert FakeEngine.computed == before
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == times
    assert (again.state, again.done, again.cached) == ("done", 20, 19)
    assert "Everything was already computed." in repr(again)


def test_the_same_extraction_goes_on_in_the_middle_of_a_file(photos: pd.DataFrame, folder: Path) -> None:
    extraction = begun(photos, folder, 5)
    computed, done = FakeEngine.computed, extraction.done
    extraction.run()
    assert done > 6
    assert FakeEngine.computed - computed <= 20 - done
    assert (extraction.done, extraction.cached) == (20, 0)
    same(nbfeat.read(folder).frame, extract(photos, BLOCK, images="path").frame)


def test_cells_that_are_missing_in_another_way_are_the_same_request(photos: pd.DataFrame, folder: Path) -> None:
    photos["path"] = photos["path"].astype(object)
    for missing in (None, np.nan, pd.NA):
        photos.iloc[2, 0] = missing
        written(photos, BLOCK, parquet=folder)
    assert FakeEngine.computed == 19


def test_with_replace_what_is_finished_is_made_anew_and_what_is_not_goes_on(
    photos: pd.DataFrame, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(photos, BLOCK, parquet=folder)
    begun(photos, folder, 7, replace=True)
    before, remove = FakeEngine.computed, Location.remove

    def stopping(location: Location, name: str) -> None:
        if name == ".nbfeat.json":
            raise KeyboardInterrupt
        remove(location, name)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "remove", stopping)
        with pytest.raises(KeyboardInterrupt):
            written(photos, BLOCK, parquet=folder, replace=True)
    written(photos, BLOCK, parquet=folder, replace=True)
    assert FakeEngine.computed - before == 8, "what was about to end is not made anew"
    assert names(folder) == FILES
    written(photos, BLOCK, parquet=folder, replace=True)
    assert FakeEngine.computed - before == 28


@both
def test_a_file_that_was_cut_short_or_removed_is_computed_again(photos: pd.DataFrame, folder: Path, block: str) -> None:
    written(photos, block, parquet=folder)
    whole = nbfeat.read(folder).frame
    for path, size in [
        (folder / FILES[0], 0),
        (folder / FILES[1], 100),
        (folder / FILES[3], -1),
        (folder / FILES[2], 0),
    ]:
        data, before = path.read_bytes(), FakeEngine.computed
        path.write_bytes(data[:size])
        if path.name == FILES[2]:
            path.unlink()
        written(photos, block, parquet=folder)
        assert FakeEngine.computed - before == (2 if path.name == FILES[3] else 6)
        same(nbfeat.read(folder).frame, whole)
    assert names(folder) == FILES


def test_a_dataset_whose_files_are_all_cut_short_is_computed_again(photos: pd.DataFrame, folder: Path) -> None:
    few = photos.iloc[:5]
    for frame, files in ((few, FILES[:1]), (photos, FILES)):
        written(frame, BLOCK, parquet=folder)
        whole, data = nbfeat.read(folder).frame, [(folder / file).read_bytes() for file in files]
        for size in (0, 3, 4, 9, 10, 100, len(data[0]) // 2, -1):
            for file, content in zip(files, data, strict=True):
                (folder / file).write_bytes(content[:size] if size != 3 else bytes(len(content)))
            with pytest.raises(RequestError, match=r"not finished: it has no files\. Rerun its extraction"):
                nbfeat.read(folder)
            before = FakeEngine.computed
            written(frame, BLOCK, parquet=folder)
            assert FakeEngine.computed - before == len(frame)
            same(nbfeat.read(folder).frame, whole)
        shutil.rmtree(folder)


def test_files_of_others_that_are_cut_short_are_left_alone(photos: pd.DataFrame, folder: Path) -> None:
    written(photos, BLOCK, parquet=folder)
    ours = (folder / FILES[0]).read_bytes()[:-1]
    photos.to_parquet(folder / FILES[0])
    theirs = (folder / FILES[0]).read_bytes()
    for content in (theirs[:-1], theirs[:5], bytes(2_000_000) + theirs[:100], b"PAR1nbfea" + theirs, b"\0note"):
        for beside in ({}, {FILES[1]: ours}, {FILES[1]: b""}):
            shutil.rmtree(folder)
            folder.mkdir()
            there = {FILES[0]: content, **beside}
            for file, data in there.items():
                (folder / file).write_bytes(data)
            for replace in (False, True):
                with pytest.raises(RequestError, match=r"don't belong to an nbfeat dataset: part-00000\.parquet\. Use"):
                    written(photos, BLOCK, parquet=folder, replace=replace)
            assert {name: (folder / name).read_bytes() for name in names(folder)} == there


def test_a_full_disk_is_told_and_gone_on_from(
    photos: pd.DataFrame, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = parquet.ParquetWriter.write_table

    def full(self: Any, table: Any, **_: Any) -> None:
        if len(list(folder.glob("part-*"))) == 2:
            raise OSError(28, "No space left on device")
        write(self, table)

    train = extract(photos.iloc[:14], STANDARD, images="path")
    cases: list[tuple[list[str], dict[str, Any]]] = [([BLOCK], {}), ([STANDARD], {}), ([], {"like": train})]
    for blocks, asked in cases:
        shutil.rmtree(folder, ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(parquet.ParquetWriter, "write_table", full)
            extraction = Extraction(photos, *blocks, **asked, images="path", batch_size=3, parquet=folder)
            with pytest.raises(ExtractionError, match=r"No space left on device\. \d of 4 files are finished"):
                extraction.run()
            assert extraction.state == "failed"
        assert [name for name in names(folder) if "-00002" in name and name.startswith(".part")] == []
        extraction.run()
        assert names(folder) == FILES
        nearly(nbfeat.read(folder).frame, extract(photos, *blocks, **asked, images="path").frame)


def test_what_a_killed_run_left_is_removed(photos: pd.DataFrame, folder: Path) -> None:
    begun(photos, folder, 9, STANDARD)
    shutil.copytree(folder / ".raw", folder.with_name("raw"))
    for name in (".part-00000.parquet-0123abcd", ".raw/.part-00002.npz-0123abcd", "..nbfeat.json-0123abcd"):
        (folder / name).write_text("half")
    (folder / ".nbfeat.lock").write_text("process 1 of nowhere")
    written(photos, STANDARD, parquet=folder)
    usual = nbfeat.read(folder).frame
    for _ in range(2):  # raw files remain next to finished ones; then one finished file is missing
        shutil.copytree(folder.with_name("raw"), folder / ".raw")
        written(photos, STANDARD, parquet=folder)
        assert names(folder) == FILES
        assert not (folder / ".raw").exists()
        same(nbfeat.read(folder).frame, usual)
        (folder / FILES[3]).unlink()


@pytest.mark.slow
@both
@pytest.mark.parametrize("replaced", [False, True])
def test_a_stop_at_any_change_of_the_folder_is_gone_on_from(
    photos: pd.DataFrame, tmp_path: Path, block: str, monkeypatch: pytest.MonkeyPatch, *, replaced: bool
) -> None:
    usual = extract(photos, block, images="path").frame
    originals = {name: getattr(Location, name) for name in ("writing", "remove", "remove_folder")}

    def stopping(name: str, at: list[int]) -> Any:
        def work(location: Location, file: str) -> Any:
            at[0] -= 1
            if at[0] == 0:
                raise KeyboardInterrupt
            return originals[name](location, file)

        return work

    for number in range(1, 1000):
        folder, at = tmp_path / str(number), [number]
        if replaced:
            written(photos, f"{BLOCK} --normalize minmax", parquet=folder)
        with monkeypatch.context() as patch:
            for name in originals:
                patch.setattr(Location, name, stopping(name, at))
            try:
                written(photos, block, parquet=folder, replace=replaced)
            except KeyboardInterrupt:
                pass
            else:
                break
        written(photos, block, parquet=folder, replace=replaced and number % 2 == 1)
        assert names(folder) == FILES
        nearly(nbfeat.read(folder).frame, usual)
    assert number > 6 + 4 * (block == STANDARD) + 4 * replaced


def test_what_was_computed_otherwise_is_gone_on_with_or_refused(
    photos: pd.DataFrame, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(photos, folder, 10, precision="bfloat16")
    monkeypatch.setattr(FakeNetwork, "key_fields", lambda _, precision: {"engine": "other", "precision": precision})
    result = written(photos, BLOCK, parquet=folder)
    assert "was made with fake (here other)" in repr(result)
    assert (result.cached, result.precision, nbfeat.read(folder).fitted.precision) == (18, "bfloat16", "bfloat16")
    changed = {"engine": "fake", "precision": "bfloat16", "x": 1}
    monkeypatch.setattr(FakeNetwork, "key_fields", lambda *_: changed)
    (folder / FILES[3]).unlink()
    with pytest.raises(RequestError, match=r"mobilenet was made with x None, but now has 1.*`replace=True`"):
        written(photos, BLOCK, parquet=folder)
    written(photos, BLOCK, parquet=folder, replace=True)
    assert nbfeat.read(folder).fitted.parts[0].key_fields["x"] == 1


# Errors


def test_a_folder_of_another_request_is_refused_naming_the_difference(photos: pd.DataFrame, folder: Path) -> None:
    begun(photos, folder, 7, fit_on=None)
    others: dict[str, tuple[Any, dict[str, Any]]] = {
        r"it has features of `MobileNet --size 32`, but the request is for `MobileNet --pooling max --size 32`": (
            photos, {"pooling": "max"}),
        r"it has 20 rows, but the frame has 19": (photos.iloc[1:], {}),
        r"column path now has different images": (photos.assign(path=photos["path"].iloc[::-1].tolist()), {}),
        r"column label now has different values": (photos.assign(label="x"), {}),
        r"column name now has different values": (photos.rename(index=lambda name: f"{name}!"), {}),
        r"it has a column label, but the frame doesn't": (photos.drop(columns="label"), {}),
        r"the frame has a column more, but the dataset doesn't": (photos.assign(more=1), {}),
        r"its columns are in a different order": (photos[["label", "path", "split"]], {}),
        r"they were computed in float32, not bfloat16": (photos, {"precision": "bfloat16"}),
    }  # fmt: skip
    before = names(folder)
    for words, (frame, options) in others.items():
        with pytest.raises(RequestError, match=f"{words}.*Write to another folder, or replace this one"):
            written(frame, BLOCK, parquet=folder, **options)
        assert names(folder) == before
    for frame, options in list(others.values())[::4]:
        written(frame, BLOCK, parquet=folder, replace=True, **options)
        assert len(nbfeat.read(folder).frame) == len(frame)
    assert nbfeat.read(folder).fitted.precision == "bfloat16"


def test_rows_to_learn_from_and_results_to_repeat_are_part_of_the_request(photos: pd.DataFrame, folder: Path) -> None:
    written(photos, STANDARD, parquet=folder, fit_on="split == 'train'")
    for fit_on in (None, "split == 'test'"):
        with pytest.raises(RequestError, match=r"fitted on different rows \(`fit_on`\)"):
            written(photos, STANDARD, parquet=folder, fit_on=fit_on)
    trains = [extract(photos.iloc[:many], STANDARD, images="path") for many in (14, 15)]
    with pytest.raises(RequestError, match=r"it repeats a different result \(`like`\), or none"):
        extract(photos, like=trains[0], parquet=folder)
    extract(photos, like=trains[0], parquet=folder, replace=True)
    with pytest.raises(RequestError, match=r"it repeats a different result"):
        extract(photos, like=trains[1], parquet=folder)


def test_a_folder_with_other_files_is_left_alone(photos: pd.DataFrame, folder: Path) -> None:
    for name in ("notes.txt", "part-00000.parquet", "part-0.parquet", ".raw/x", ".raw/part-00000.npz", "sub/x"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        photos.to_parquet(folder / name)
        for replace in (False, True):
            with pytest.raises(RequestError, match=r"don't belong to an nbfeat dataset: .*empty or new folder"):
                written(photos, BLOCK, parquet=folder, replace=replace)
        assert pd.read_parquet(folder / name).shape == (20, 3)
        shutil.rmtree(folder)
    folder.mkdir()
    for name in (LOCK, MANIFEST, "part-00000.parquet"):
        os.mkfifo(folder / name)
        with pytest.raises(RequestError, match=rf"don't belong to an nbfeat dataset: {re.escape(name)}/\."):
            written(photos, BLOCK, parquet=folder)
        (folder / name).unlink()
    (folder / ".DS_Store").write_text("")
    written(photos, BLOCK, parquet=folder)
    with pytest.raises(RequestError, match="is a file"):
        written(photos, BLOCK, parquet=folder / FILES[0])
    with pytest.raises(RequestError, match=r"folder .*nowhere doesn't exist: create it"):
        written(photos, BLOCK, parquet=folder / "nowhere" / "there")


def rewritten(file: Path, rows: slice = slice(None), **entries: Any) -> None:
    """Rewrite a part with different metadata or fewer rows, and a correct checksum."""
    table, old = parquet.read_table(file)[rows], parquet.read_metadata(file).metadata
    resealed(file, table, {RECIPE: old[RECIPE], PART: json.dumps({**json.loads(old[PART]), **entries}).encode()})


@pytest.mark.parametrize("finished", [True, False])
def test_a_file_that_says_something_else_is_refused(photos: pd.DataFrame, folder: Path, *, finished: bool) -> None:
    begun(photos, folder, 1000 if finished else 9)
    file, data = folder / FILES[1], (folder / FILES[1]).read_bytes()
    changes: list[dict[str, Any]] = [
        {"made": "another"}, {"number": 2}, {"chunk": 7}, {"number": "1"}, {"format": 2}, {"request": {}},
        {"request": []}, {"chunk": 0}, {"more": 1}, {"rows": slice(1, None)}, {"failures": [[1, "path", "x", 3]]},
        {"failures": [[6, "path", "x", "y"]]},
    ]  # fmt: skip
    for change in changes:
        rewritten(file, **change)
        with pytest.raises(RequestError, match=r"part-00001\.parquet was (changed after|written by another version)"):
            written(photos, BLOCK, parquet=folder)
        if finished and "rows" not in change:
            with pytest.raises(RequestError, match=r"part-00001\.parquet was|not finished"):
                nbfeat.read(folder)
        file.write_bytes(data)


def test_damages_are_told_or_no_matter(photos: pd.DataFrame, folder: Path) -> None:
    few = photos.iloc[:5]
    written(few, BLOCK, parquet=folder)
    file, data, good = folder / FILES[0], (folder / FILES[0]).read_bytes(), nbfeat.read(folder).frame
    for words in (b'"chunk": 6', b'"rows": 5', b'"precision": "float32'):
        file.write_bytes(flipped(data, data.rindex(words) + len(words) - 1))
        for work in (lambda: written(few, BLOCK, parquet=folder), lambda: nbfeat.read(folder)):
            with pytest.raises(RequestError, match=r"part-00000\.parquet was changed"):
                work()
    file.write_bytes(data)
    chunk = parquet.read_metadata(file).row_group(0).column(4)
    assert chunk.path_in_schema.startswith("mobilenet")
    file.write_bytes(flipped(data, chunk.data_page_offset + chunk.total_compressed_size - 9))  # in a feature
    told = r"part-00000\.parquet is damaged .*remove that file, and rerun .* only its rows are computed again"
    with pytest.raises(RequestError, match=told):
        nbfeat.read(folder)
    refused = 0
    for place in range(chunk.data_page_offset, chunk.data_page_offset + 60):  # page headers have no checksum
        file.write_bytes(flipped(data, place))
        try:
            same(nbfeat.read(folder).frame, good)
        except RequestError as error:
            refused += bool(re.search(told, str(error)))
    assert refused > 30


def test_a_file_that_another_tool_wrote_anew_is_as_good(photos: pd.DataFrame, folder: Path) -> None:
    written(photos, BLOCK, parquet=folder)
    good, table = nbfeat.read(folder).frame, parquet.read_table(folder / FILES[1])
    parquet.write_table(table, folder / FILES[1], compression="zstd")
    same(nbfeat.read(folder).frame, good)
    assert "already computed" in repr(written(photos, BLOCK, parquet=folder))
    rows = table.column("mobilenet").combine_chunks().flatten().to_numpy()[::-1].copy()
    others = pa.FixedSizeListArray.from_arrays(pa.array(rows), 48)
    parquet.write_table(table.set_column(table.column_names.index("mobilenet"), "mobilenet", others), folder / FILES[1])
    with pytest.raises(RequestError, match=r"part-00001\.parquet is damaged \(column mobilenet doesn't match"):
        nbfeat.read(folder)


def test_damaged_features_that_wait_are_remade_or_told(photos: pd.DataFrame, folder: Path) -> None:
    block = f"{STANDARD} --prefix file"
    usual = extract(photos, block, images="path").frame
    begun(photos, folder, 9, block)
    raw, outcomes = folder / ".raw" / "part-00001.npz", []
    data = raw.read_bytes()
    for place in (-500, 60, 0, -10):  # a feature, the metadata, the zip headers
        raw.write_bytes(flipped(data, place % len(data)))
        try:
            written(photos, block, parquet=folder)
            nearly(nbfeat.read(folder).frame, usual)
            outcomes.append("remade")
            begun(photos, folder, 9, block, replace=True)
        except RequestError as error:
            found = re.search(r"part-00001\.npz is damaged .*remove that file, and rerun", str(error))
            outcomes.append("told" if found else str(error))
    assert set(outcomes) == {"remade", "told"}


def test_a_manifest_that_nbfeat_did_not_write_is_refused(photos: pd.DataFrame, folder: Path) -> None:
    begun(photos, folder, 4, f"{BLOCK} --pooling max")
    assert names(folder) == [".nbfeat.json"], "which stands in nobody's way"
    begun(photos, folder, 7)
    newer = json.dumps({**json.loads((folder / ".nbfeat.json").read_text()), "format": 4})
    for text in ("", "{}", "[1]", '{"format": "1"}', "\xff", newer):
        (folder / ".nbfeat.json").write_text(text, encoding="latin-1")
        with pytest.raises(
            RequestError, match=r"\.nbfeat\.json was changed.*remove that file|written by another version"
        ):
            written(photos, BLOCK, parquet=folder)
    (folder / ".nbfeat.json").unlink()
    before = FakeEngine.computed
    written(photos, BLOCK, parquet=folder)
    assert FakeEngine.computed - before == 8


def test_two_at_once_on_one_folder_are_refused(photos: pd.DataFrame, folder: Path) -> None:
    steps = Extraction(photos, BLOCK, images="path", batch_size=3, parquet=folder).steps()
    for _ in range(6):
        next(steps)
    with pytest.raises(ExtractionError, match=rf"being written by process {os.getpid()} of .*wait until it finishes"):
        written(photos, BLOCK, parquet=folder)
    list(steps)
    assert names(folder) == FILES
    assert written(photos, BLOCK, parquet=folder).cached == 20


# Frames of all kinds


def test_frames_without_rows_and_what_learns_from_all_rows_at_once(photos: pd.DataFrame, folder: Path) -> None:
    for block in (f"{BLOCK} --components 3", f"{BLOCK} --normalize whiten --components 3"):
        with pytest.raises(RequestError, match=r"all rows at once.*`like=sample` and `parquet=.*features"):
            written(photos, block, parquet=folder)
    with pytest.raises(RequestError, match="no rows to fit on"):
        written(photos.iloc[:0], STANDARD, parquet=folder)
    assert not folder.exists()
    block = f"{BLOCK} --normalize l2"
    assert written(photos.iloc[:0], block, parquet=folder).state == "done"
    assert names(folder) == FILES[:1]
    back = nbfeat.read(folder)
    assert back.frame.shape == (0, 51)
    same(back.like(photos).features, extract(photos, block, images="path").features)
    assert "already computed" in repr(written(photos.iloc[:0], block, parquet=folder))


INDEXES = [
    pd.RangeIndex(40, 0, -2), pd.Index(["same"] * 20),
    pd.DatetimeIndex([f"2026-01-{day:02d}T00:00Z" for day in range(1, 21)]),
    pd.MultiIndex.from_product([["a", "b"], range(10)], names=["letter", None]), pd.Index(range(20), name="path"),
]  # fmt: skip


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: f"{type(index).__name__} {index.name}")
def test_any_index_travels(photos: pd.DataFrame, folder: Path, index: pd.Index) -> None:
    photos.index = index
    written(photos, BLOCK, parquet=folder)
    back = nbfeat.read(folder)
    usual = extract(photos, BLOCK, images="path")
    pd.testing.assert_index_equal(back.frame.index, index, exact="equiv")
    pd.testing.assert_frame_equal(back.frame, usual.frame, check_freq=False)
    pd.testing.assert_index_equal(pd.read_parquet(folder).index, index, exact="equiv")
    beside = nbfeat.read(folder, frame=photos[["split"]])
    assert list(beside.frame.columns) == ["split", *usual.columns]
    pd.testing.assert_frame_equal(beside.features, usual.features, check_freq=False)
    for other in (photos.iloc[::-1], photos.iloc[1:]):
        if not other.index.equals(photos.index):
            with pytest.raises(
                RequestError, match=r"features/ was extracted from a different frame: th(e index|is one has)"
            ):
                nbfeat.read(folder, frame=other)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_features_are_never_attached_to_rows_of_other_images(photos: pd.DataFrame, tmp_path: Path, form: str) -> None:
    frame = photos.reset_index(drop=True)
    frame.loc[3, "path"] = None
    if form == "folder":
        written(frame, BLOCK, parquet=tmp_path / form)
    else:
        extract(frame, BLOCK, images="path").to_parquet(tmp_path / form)
    same(nbfeat.read(tmp_path / form, frame=frame).features, extract(frame, BLOCK, images="path").features)
    reversed_frame = frame.iloc[::-1].reset_index(drop=True)  # with the same index
    with pytest.raises(RequestError, match=r"a different frame: row 0 of path is .*, not .*\. .*drop `frame`"):
        nbfeat.read(tmp_path / form, frame=reversed_frame)
    swapped = frame.assign(path=frame["path"].where(frame.index != 19, frame["path"].iloc[0]))
    with pytest.raises(RequestError, match="row 19 of path"):
        nbfeat.read(tmp_path / form, frame=swapped)
    strings = frame.astype({"path": "string"})  # with pandas' NA
    same(nbfeat.read(tmp_path / form, frame=strings).features, nbfeat.read(tmp_path / form, frame=frame).features)
    with pytest.raises(RequestError, match="row 3 of path"):
        nbfeat.read(tmp_path / form, frame=strings.assign(path=strings["path"].fillna("a.png")))
    as_paths = frame.assign(path=frame["path"].map(Path, na_action="ignore"))  # the same images
    same(nbfeat.read(tmp_path / form, frame=as_paths).features, nbfeat.read(tmp_path / form, frame=frame).features)


def test_columns_that_cannot_travel_are_left_out_and_told(photos: pd.DataFrame, folder: Path) -> None:
    photos["image"] = [Path(path).read_bytes() for path in photos["path"]]
    photos["file"] = photos["path"].map(Path)
    photos[7] = 1
    photos["kind"] = pd.Categorical(["a", "b"] * 10)
    photos["late"] = [None] * 15 + ["text"] * 5  # the first files have no values
    photos.insert(0, "label", "twice", allow_duplicates=True)
    result = written(photos, BLOCK, parquet=folder, images="image")
    back = nbfeat.read(folder).frame
    assert list(back.columns[:4]) == ["path", "split", "kind", "late"]
    told = next(note for note in result.notes if note.startswith("Not written"))
    for words in (
        "'image' (images that are not text)", "'file' (values of type PosixPath)", "7 (column names must be text)",
        "'label' (column names must be unique)",
    ):  # fmt: skip
        assert words in told
    pd.testing.assert_series_equal(back["kind"], photos["kind"])
    pd.testing.assert_series_equal(back["late"], photos["late"], check_dtype=False)
    frame = photos[["image"]].reset_index(drop=True)  # without any column that can be stored
    written(frame, BLOCK, parquet=folder, images="image", replace=True)
    assert nbfeat.read(folder).frame.shape == (20, 48)
    same(nbfeat.read(folder, frame=frame).frame, extract(frame, BLOCK, images="image").frame)


def test_names_that_are_taken_are_refused_and_features_of_an_earlier_run_made_anew(
    photos: pd.DataFrame, folder: Path
) -> None:
    for name, words in {"mobilenet": "`prefix`", "failure": "rename it"}.items():
        for frame in (photos.assign(**{name: 1}), photos.rename_axis(name)):
            with pytest.raises(RequestError, match=words):
                written(frame, BLOCK, parquet=folder)
    with pytest.raises(RequestError, match=r"mobilenet_0003.*prefix"):
        written(photos.assign(mobilenet_0003="mine"), BLOCK, parquet=folder)
    usual = extract(photos, BLOCK, images="path").frame
    taken = photos.assign(mobilenet=1, failure=2, mobilenet_0003="mine")
    earlier = extract(photos, f"{BLOCK} --normalize l2", images="path").frame
    for frame, replace in ((taken, True), (earlier, False)):
        written(frame, BLOCK, parquet=folder, replace=replace)
        same(nbfeat.read(folder).frame, usual)
        shutil.rmtree(folder)


def test_when_no_image_can_be_read_nothing_is_left(photos: pd.DataFrame, folder: Path, tmp_path: Path) -> None:
    photos["path"] = [Path(path).name for path in photos["path"]]
    with pytest.raises(ExtractionError, match=r"None of the 20 images.*`root`"):
        written(photos, BLOCK, parquet=folder, root=tmp_path)
    assert names(folder) == []


@pytest.mark.parametrize("steps", [0, 3, 6, 9])
def test_equal_images_in_several_files_are_computed_once(photos: pd.DataFrame, folder: Path, steps: int) -> None:
    paths = photos["path"].tolist()
    photos["path"] = [paths[number % 5] for number in range(20)]
    photos.iloc[[3, 8], 0] = paths[3] = "gone.png"
    usual = extract(photos, BLOCK, images="path", cache=False)
    FakeEngine.computed = 0
    result = begun(photos, folder, steps).run()
    same(nbfeat.read(folder).frame, usual.frame)
    assert (result.done, result.progress.equal) == (20, usual.progress.equal)
    assert FakeEngine.computed == 5 if not steps else FakeEngine.computed <= 8  # a batch in flight is lost


def test_features_that_other_files_may_share_take_little_memory(
    photos: pd.DataFrame, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbfeat.extraction.run.CARRIED", 2 * 48 * 4)  # two images
    most, closed = 0, Run.close_window

    def watched(run: Run, coming: Collection[int] = ()) -> None:
        nonlocal most
        closed(run, coming)
        most = max(most, *(len(network.carried) for network in run.networks), len(run.seen))

    monkeypatch.setattr(Run, "close_window", watched)
    frame = photos.iloc[[*range(6), 0, 0, 1, 2, 3, 4, 0, 5, 1, 2, 3, 4]].reset_index()
    result = written(frame, BLOCK, parquet=folder)
    same(nbfeat.read(folder).frame, extract(frame, BLOCK, images="path", cache=False).frame)
    assert most == 2
    assert result.progress.equal > 3  # the image that is shared most stays


def test_a_large_recipe_is_written_once(photos: pd.DataFrame, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "LARGEST_COPY", 1000)
    train = extract(photos, f"{STANDARD} --components 5", images="path")
    usual = train.like(photos)
    unpacked: list[str] = []

    def counted(text: str, source: str) -> tuple[Recipe, list[Failure]]:
        unpacked.append(text)
        return unpack(text, source)

    monkeypatch.setattr(sink, "unpack", counted)
    written(photos, like=train, parquet=folder)
    recipes = [parquet.read_metadata(folder / name).metadata[b"nbfeat"] for name in FILES]
    assert len(recipes[0]) > 1000
    assert recipes[1:] == [b"sha256 " + hashlib.sha256(recipes[0]).hexdigest().encode()] * 3
    same(nbfeat.read(folder).frame, usual.frame)
    same(extract(photos, like=folder, cache=False).features, usual.features)
    (folder / FILES[2]).unlink()
    assert unpacked == []
    FakeEngine.computed = 0
    written(photos, like=train, parquet=folder)
    assert (FakeEngine.computed, len(unpacked)) == (6, 1)
    (folder / FILES[0]).unlink()  # without the recipe, the other files can't be trusted
    with pytest.raises(RequestError, match="not finished"):
        nbfeat.read(folder)
    written(photos, like=train, parquet=folder)
    same(nbfeat.read(folder).frame, usual.frame)


def test_names_sort_as_rows_however_many_files_there_are() -> None:
    for count in (1, 99_999, 100_000, 100_001, 2_000_000):
        numbers = [0, count // 9, count // 3, count // 2, count - 1]
        made = [dataset._name(number, count) for number in numbers]
        assert made == sorted(made)
        assert len(set(map(len, made))) == 1
        assert all(dataset._PART.fullmatch(name) for name in made)
    assert dataset._name(3, 100_000) == "part-00003.parquet"


@pytest.fixture
def copies(photos: pd.DataFrame, tmp_path: Path) -> pd.DataFrame:
    """Return photos whose files may be changed."""
    (tmp_path / "copies").mkdir()
    return photos.assign(path=[str(shutil.copy2(path, tmp_path / "copies")) for path in photos["path"]])


@both
@pytest.mark.parametrize("steps", [8, 100])
def test_image_files_that_changed_are_computed_again_and_told(
    copies: pd.DataFrame, folder: Path, block: str, steps: int
) -> None:
    begun(copies, folder, steps, block)
    assert "written again" not in repr(begun(copies, folder, 1, block))
    Image.new("RGB", (12, 12), "red").save(copies["path"].iloc[1])
    gone = Path(copies["path"].iloc[4])
    kept = gone.rename(gone.with_suffix(".kept"))
    result = written(copies, block, parquet=folder)
    assert "Images in 1 of 4 files changed: these are written again." in result.notes
    assert (result.done, list(result.failures["position"])) == (20, [4])
    back = nbfeat.read(folder)
    usual = extract(copies, BLOCK, images="path", cache=False)
    if block == BLOCK:
        same(back.features, usual.features)
    else:  # the normalization that the other files were written with
        order = usual.features.drop("row 4").rank().to_numpy()
        np.testing.assert_array_equal(back.features.drop("row 4").rank().to_numpy(), order)
    kept.rename(gone)
    again = written(copies, block, parquet=folder)
    assert (len(again.failures), FakeEngine.computed > 0) == (0, True)
    assert "written again" not in repr(written(copies, block, parquet=folder))
    assert nbfeat.read(folder).failures.empty


def test_files_that_were_copied_with_their_times_are_the_same(
    copies: pd.DataFrame, folder: Path, tmp_path: Path
) -> None:
    written(copies, BLOCK, parquet=folder)
    FakeEngine.computed = 0
    for path in copies["path"]:
        Path(shutil.copy2(path, tmp_path / "copy")).replace(path)  # another inode
    assert "Everything was already computed" in repr(written(copies, BLOCK, parquet=folder))
    assert FakeEngine.computed == 0


def test_the_cache_is_used_only_when_asked_for(photos: pd.DataFrame, folder: Path) -> None:
    written(photos, BLOCK, parquet=folder)
    assert nbfeat.extract(photos, BLOCK, images="path").cached == 0
    assert written(photos, BLOCK, parquet=folder, replace=True).cached == 0
    assert written(photos, BLOCK, parquet=folder, replace=True, cache=True).cached == 20
    other = folder.with_name("other")
    assert begun(photos, other, 6, f"{BLOCK} --layer conv1", cache=True).kept == 12  # six of them are in a file
    assert written(photos, f"{BLOCK} --layer conv1", parquet=other, cache=True).cached == 12


# Other readers and file systems


@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb"])
def test_other_readers_see_plain_tables(photos: pd.DataFrame, folder: Path, reader: str) -> None:
    library = pytest.importorskip(reader)
    written(photos, BLOCK, parquet=folder)
    usual = extract(photos, BLOCK, images="path").features.to_numpy()
    if reader == "pandas":
        plain = pd.read_parquet(folder)
        same(plain[["path", "label", "split"]], photos)
        assert plain["failure"].isna().all()
        rows = plain["mobilenet"].tolist()
    elif reader == "polars":
        rows = library.scan_parquet(folder).collect()["mobilenet"].to_numpy()
    else:
        rows = [
            row[0] for row in library.read_parquet(f"{folder}/*.parquet").order("path").select("mobilenet").fetchall()
        ]
    np.testing.assert_array_equal(np.array(list(rows), np.float32), usual)


@pytest.fixture
def address() -> Iterator[str]:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield "memory://bucket/features"
    system.store.clear()


@both
def test_an_address_is_as_good_as_a_folder(photos: pd.DataFrame, folder: Path, address: str, block: str) -> None:
    import fsspec

    begun(photos, address, 7, block)
    with pytest.raises(RequestError, match="not finished"):
        nbfeat.read(address)
    with pytest.raises(RequestError, match=r"memory://bucket/features was written for a different request"):
        written(photos, f"{BLOCK} --pooling max", parquet=address)
    before = FakeEngine.computed
    result = written(photos, block, parquet=address)
    assert FakeEngine.computed - before == 8
    written(photos, block, parquet=folder.as_uri())
    assert names(folder) == FILES
    same(nbfeat.read(address).frame, nbfeat.read(folder).frame)
    store = fsspec.filesystem("memory").store
    assert sorted(name.rpartition("/")[2] for name in store) == FILES
    assert "nbfeat.read('memory://bucket/features')" in repr(result)
    same(extract(photos, like=address).features, nbfeat.read(folder).features)
    assert "already computed" in repr(written(photos, block, parquet=address))
    with pytest.raises(RequestError, match=r"Cannot open 'nosuch://bucket/x'.*or use a local folder"):
        written(photos, block, parquet="nosuch://bucket/x")


def test_reading_what_is_not_there_or_too_large_is_refused(
    photos: pd.DataFrame, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    with pytest.raises(RequestError, match="has no nbfeat dataset"):
        nbfeat.read(folder)
    written(photos, BLOCK, parquet=folder)
    monkeypatch.setattr("nbfeat.extraction.columns.free_bytes", lambda: 1000)
    with pytest.raises(RequestError, match=r"20 rows × 48 features, 4 kB.*polars\.scan_parquet"):
        nbfeat.read(folder)


# In a notebook


def test_the_magic_writes_and_binds_nothing_and_says_so(
    shell: InteractiveShell, photos: pd.DataFrame, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.reset(new_session=False)
    shell.user_ns["photos"] = photos
    cell = f"%extract photos {BLOCK} --images path --batch-size 3 --parquet {folder}"
    with pytest.raises(UsageError, match=r"With --parquet no dataframe is created. Drop --into more"):
        run_cell(shell, f"{cell} --into more")
    assert not folder.exists()

    original = Extraction.steps

    def interrupted(self: Extraction) -> Any:
        with closing(original(self)) as steps:
            yield from islice(steps, 7)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, capture_output() as shown:
        patch.setattr(Extraction, "steps", interrupted)
        shell.run_cell(cell)
    assert "12 of 20 images are saved. Run the cell again to continue." in shown.stdout
    bound = {name for name in shell.user_ns if not name.startswith("_")}
    with capture_output() as shown:
        result = shell.run_cell(cell).result
    assert "20 of 20 images · 12 already in files" in shown.outputs[-1].data["text/plain"] + shown.stdout
    assert shell.user_ns["photos"] is photos
    assert {name for name in shell.user_ns if not name.startswith("_")} == bound
    assert "photos is unchanged: the features are only on disk." in repr(result)
    shown_as = result._repr_html_().replace("&#x27;", "'").replace("&#39;", "'")
    assert f"Read it with `nbfeat.read('{folder}')`" in shown_as
    assert names(folder) == FILES
    assert nbfeat.extract(photos, BLOCK, images="path").cached == 0, "the setting of the cache is not asked for"
    again = run_cell(shell, f"%extract photos --like {folder}")
    same(again.features, nbfeat.read(folder).features)
    assert "(replaced)" not in repr(again)


# Processes that are killed, and memory


def child(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.parquet.parts_child", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def killed(process: subprocess.Popen[str], lines: int, pause: float) -> bool:
    """Kill a process some time after `lines` lines; tell whether it was still running."""
    assert process.stdout
    for _ in zip(range(lines), process.stdout, strict=False):
        pass
    time.sleep(pause)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@both
def test_a_process_killed_at_any_moment_loses_no_row_and_leaves_nothing(
    many: list[str], tmp_path: Path, folder: Path, block: str
) -> None:
    photos = pd.DataFrame({"path": many[:800], "number": range(800)})
    photos.iloc[700, 0] = "gone.png"
    photos.to_pickle(tmp_path / "frame.pickle")
    usual = extract(photos, block, images="path")
    chance, kills = np.random.default_rng(len(block)), 0
    while kills < 10:
        process = child("write", tmp_path / "frame.pickle", folder, block, 16)
        kills += killed(process, int(chance.integers(0, 40)), chance.random() / 20)
        if process.returncode == 0:
            shutil.rmtree(folder)  # it had finished, so start again
    process = child("write", tmp_path / "frame.pickle", folder, block, 16)
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert json.loads(out.splitlines()[-1])["done"] == 800
    assert names(folder) == [f"part-{number:05d}.parquet" for number in range(50)]
    back = nbfeat.read(folder)
    nearly(back.frame, usual.frame)
    same(back.failures, usual.failures)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="memory is measured as Linux does")
@pytest.mark.parametrize("normalize", ["none", "standard"])
def test_memory_does_not_grow_with_the_rows(folder: Path, normalize: str) -> None:
    block, found = f"MobileNet --size 32 --normalize {normalize}", {}
    for rows in (16_384, 49_152):
        out, said = child("peak", folder.with_name(str(rows)), rows, block).communicate()
        assert out, said
        found[rows] = json.loads(out)
    assert found[49_152]["bytes"] > 2.9 * found[16_384]["bytes"] > 200_000_000
    grown = {rows: one["peak"] - one["before"] for rows, one in found.items()}
    assert grown[49_152] < grown[16_384] + 70_000_000  # the features of the rows between are 168 MB


def test_a_file_address_is_unquoted_once(tmp_path: Path) -> None:
    assert Location.at(f"file://{tmp_path}/a%2541%20b").folder == tmp_path / "a%41 b"
