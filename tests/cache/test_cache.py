"""No image is computed twice, and the result is right even if the cache is damaged."""

from __future__ import annotations

import ctypes
import io
import itertools
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image, Jpeg2KImagePlugin, features

import nbfeat
from nbfeat import Extraction, RequestError, paths
from nbfeat.backbones.weights import Loaded
from nbfeat.cache import database
from nbfeat.cache.keys import CacheKey
from nbfeat.cache.storage import KINDS
from nbfeat.extraction import pipeline
from nbfeat.extraction.network_state import Batch
from nbfeat.extraction.normalize import Normalizer
from nbfeat.extraction.run import Progress
from nbfeat.images import decode, fingerprint, resize, sources
from nbfeat.inference import spec as model
from tests import fake
from tests.faces import Face, every_face, same
from tests.fake import FakeEngine, FakeNetwork
from tests.mutations import mutated

pytestmark = pytest.mark.usefixtures("fake_network")
BLOCK = "MobileNet --size 32"


@pytest.fixture
def photos(photos: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """Return photos whose files this test may change, and which count as old enough to be recognized by their state."""
    monkeypatch.setattr(fingerprint, "SETTLED_AFTER_NS", 0)
    return photos.assign(path=[str(shutil.copy(path, tmp_path)) for path in photos["path"]])


def run(frame: pd.DataFrame, *blocks: str, **options: Any) -> Extraction:
    return Extraction(frame, *(blocks or [BLOCK]), **{"images": "path", **options}).run()


def rows(file: Path, query: str) -> list[Any]:
    """Run a query on a database file."""
    with closing(sqlite3.connect(file)) as db:
        return db.execute(query).fetchall()


def file_of(folder: Path) -> Path:
    """Return the only database in a home folder."""
    (file,) = (folder / "features").glob("*.sqlite")
    return file


# Cached features


@every_face
def test_the_same_cell_again_computes_nothing(extract: Face, photos: pd.DataFrame, own_cache: Path) -> None:
    assert extract(photos, BLOCK, images="path", cache=False).keeps is False
    assert not (own_cache / "features").exists()
    first = extract(photos, BLOCK, images="path")
    assert (first.cached, FakeEngine.computed) == (0, 40)
    again = extract(photos, BLOCK, images="path")
    assert (again.cached, again.done, FakeEngine.computed, FakeEngine.opened) == (20, 20, 40, 2)
    same(again.features, first.features)
    assert re.search(r"from 20 images in \d\.\d s, all from the cache\n", repr(again))
    assert again.profile["bottleneck"] is None
    assert "bottleneck" not in repr(again)
    assert extract(photos, BLOCK, images="path", cache=False).cached == 0


def test_normalization_and_names_do_not_compute_again(photos: pd.DataFrame) -> None:
    raw = run(photos).features.to_numpy()
    options: list[dict[str, Any]] = [{"normalize": "l2"}, {"normalize": "standard"}, {"components": 3}, {"prefix": "x"}]
    assert [run(photos, **each).cached for each in options] == [20] * 4
    learned = run(photos, normalize="standard", fit_on="split == 'train'")
    assert learned.cached == 20
    np.testing.assert_allclose(learned.features.to_numpy()[:14].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_array_equal(run(photos).features.to_numpy(), raw)


# The key


def test_what_changes_the_numbers_is_computed_again(photos: pd.DataFrame) -> None:
    run(photos)
    assert run(photos).cached == 20
    for change in ("", " --resize pad", " --interpolation nearest", " --layer x", " --scaling none", " --alpha 0.5"):
        assert run(photos, f"MobileNet --size 48{change}").cached == 0


def test_every_field_is_in_the_key() -> None:
    values: dict[str, Any] = dict.fromkeys((field.name for field in fields(CacheKey)), "")
    values["engine"] = {"kind": "fake", "precision": "float32"}
    key = CacheKey(**values)
    assert len(key.key) == 40
    assert key.key == CacheKey(**{**values, "engine": {"precision": "float32", "kind": "fake"}}).key
    others = {"engine": {"kind": "fake", "precision": "bfloat16"}, "width": 9}
    for name in values:
        other = CacheKey(**{**values, name: others.get(name, "other")})
        assert (other.key == key.key) is (name in {"width", "weights_name"}), name
    assert key.key_fields == dict.fromkeys(values.keys() - {"engine", "width", "weights_name"}, "") | values["engine"]


def test_a_run_gives_each_field_its_value_and_keeps_what_the_network_gave(
    photos: pd.DataFrame, own_cache: Path
) -> None:
    run(photos)
    (block,) = nbfeat.storage.features.to_dict("records")
    assert set(block) > {field.name for field in fields(CacheKey)} - {"engine"}
    assert (block["numerics"], block["least_reduced"]) == (model.NUMERICS, resize.LEAST_REDUCED)
    assert block["decoders"] == f"pillow {version('pillow')}, simplejpeg {version('simplejpeg')}"
    assert (block["keras"], block["engine"], block["precision"]) == (version("keras"), "fake", "float32")
    assert (block["weights"], block["weights_name"], block["width"]) == ("0" * 64, "random", 48)
    data = Path(photos["path"].iloc[0]).read_bytes()
    stored = dict(rows(file_of(own_cache), "SELECT key, value FROM entries"))[fingerprint.digest(data)]
    pixels = decode.pixels_of(data, [resize.PixelSpec(32)])[0]
    np.testing.assert_array_equal(np.frombuffer(stored[4:], np.float32), fake.features(pixels[None], model.Cut())[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", Loaded("random", "1" * 64)),
        ("numbers", {"engine": "another"}),
        ("outputs", {model.Cut().key: model.Output(48, "max", (2, 2, 48), negative=False)}),
        ("", "bfloat16"),
    ],
)
def test_another_network_or_precision_computes_again(
    photos: pd.DataFrame, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(photos)
    made = FakeNetwork.__init__

    def other(self: FakeNetwork, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        vars(self).update({name: value})

    monkeypatch.setattr(FakeNetwork, "__init__", other)
    assert [run(photos, precision="auto" if name else value).cached for _ in range(2)] == [0, 20]


# Files


@pytest.mark.parametrize("days", [0, -1])
def test_a_file_that_changed_is_computed_again_alone(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """If the clock was set back, a change may lie in the future."""
    before = run(photos).features
    path = Path(photos["path"].iloc[7])
    status, now, now_ns = path.stat(), time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + days * 86_400)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + days * 86_400 * 10**9)
    Image.new("RGB", (48, 48), "red").save(path)
    path.write_bytes(path.read_bytes().ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the change time differs
    assert fingerprint.is_settled(path.stat()) is (days == 0)
    after = run(photos)
    assert after.cached == 19
    assert list(np.flatnonzero((before != after.features).any(axis=1))) == [7]
    assert run(photos).cached == 20


def test_files_are_read_where_their_state_is_new_and_computed_where_their_content_is(
    photos: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(photos)
    moved = photos.assign(
        path=[shutil.move(path, str(tmp_path / f"moved {Path(path).name}")) for path in photos["path"]]
    )
    after = run(moved)
    assert (after.cached, FakeEngine.computed) == (20, 20)
    same(after.features, before.features)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read a file that it knew"))
    same(run(moved).features, before.features)


def test_a_file_that_changes_now_is_not_known_by_its_state(
    photos: pd.DataFrame, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = Path(photos["path"].iloc[0]), Path.read_bytes

    def read_and_change(self: Path) -> bytes:
        data = read(self)
        self.write_bytes(data + b"\0")
        return data

    assert sources.load(str(path), Path())[1] is not None
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_and_change)
        assert sources.load(str(path), Path())[1] is None
    monkeypatch.setattr(fingerprint, "SETTLED_AFTER_NS", 2_000_000_000)
    assert sources.load(str(path), Path())[1] is None
    run(photos)
    assert rows(file_of(own_cache), "SELECT COUNT(*) FROM entries") == [(20,)], "features alone"


def test_images_in_memory_are_known_by_their_content(photos: pd.DataFrame) -> None:
    data = [Path(path).read_bytes() for path in photos["path"]]
    opened = [Image.open(io.BytesIO(one)) for one in data]
    mappings = [{"bytes": None, "path": path} for path in photos["path"]]
    for values in (data, [np.asarray(image) for image in opened], opened, mappings):
        photos["image"] = pd.Series(list[Any](values), index=photos.index, dtype=object)
        before = run(photos, images="image", cache=False)
        assert run(photos, images="image").done == 20
        after = run(photos.iloc[::-1], images="image")
        assert after.cached == 20
        same(after.features.iloc[::-1], before.features)


def test_arrays_are_told_apart_by_shape_and_type() -> None:
    flat, square = np.zeros((1, 4), np.uint8), np.zeros((2, 2), np.uint8)
    digests = {fingerprint.digest(array) for array in (flat, square, square.astype(bool), square[:1, :1].view(np.int8))}
    assert len(digests) == 4
    assert fingerprint.digest(square) == fingerprint.digest(np.asfortranarray(square))
    with pytest.raises(nbfeat.ImageError, match="an array of object has no pixels"):
        fingerprint.digest(np.array([[object()]]))


@pytest.mark.parametrize("in_memory", [False, True])
def test_another_backbone_beside_a_known_one_is_computed_alone(photos: pd.DataFrame, in_memory: bool) -> None:
    if in_memory:
        photos["path"] = pd.Series([Path(path).read_bytes() for path in photos["path"]], index=photos.index)
    first = run(photos)
    both = run(photos, BLOCK, "VGG16 --size 32")
    assert (FakeEngine.computed, FakeEngine.opened, both.cached) == (40, 2, 0)
    same(both["mobilenet"], first.features)
    assert "mobilenet_0000 … 0047 (20 from the cache)" in repr(both)
    assert repr(both).count("from the cache") == 1


# Equal images


def test_equal_images_are_computed_once_in_whatever_column(photos: pd.DataFrame, tmp_path: Path) -> None:
    copies = [str(shutil.copy(path, tmp_path / f"copy {Path(path).name}")) for path in photos["path"]]
    result = run(pd.concat([photos, photos.assign(path=copies), photos]), cache=False)
    assert (FakeEngine.computed, result.progress.equal, result.done) == (20, 40, 60)
    assert "40 images are identical to others and share their features" in repr(result)
    same(result.features.iloc[20:40], result.features.iloc[:20])
    same(result.features.iloc[40:], result.features.iloc[:20])
    two = run(photos.assign(back=copies[::-1]), images=["path", "back"], normalize="l2", cache=False)
    assert FakeEngine.computed == 40
    np.testing.assert_array_equal(two["path_mobilenet"].to_numpy(), two["back_mobilenet"].to_numpy()[::-1])


def test_blocks_that_differ_in_normalization_share_one_matrix_and_do_not_spoil_it(photos: pd.DataFrame) -> None:
    blocks = [f"{BLOCK} -n l2 -x a", f"{BLOCK} -n standard -x b", f"{BLOCK} -x c"]
    together = run(photos, *blocks, cache=False)
    for block, prefix in zip(blocks, "abc", strict=True):
        same(together[prefix], run(photos, block, cache=False).features)


def test_waiting_images_cost_a_batch_nothing() -> None:
    def lines_of_a_batch(waiting: int) -> int:
        """Return how many lines Python executes to count a batch while so many images wait for another one."""
        progress, count = Progress(waiting + 9, 1), 0
        progress.take(Batch(equal=dict.fromkeys(range(9, waiting + 9), 0)))
        batch = Batch(rows=[5, 6], failures={7: "broken"}, equal={8: 0})

        def counted(_: FrameType, event: str, __: object) -> Any:
            nonlocal count
            count += event == "line"
            return counted

        sys.settrace(counted)
        try:
            assert progress.take(batch) == []
        finally:
            sys.settrace(None)
        assert progress.take(Batch(rows=[0]))[:1] == [(9, 0)]
        assert progress.equal == waiting + 1
        return count

    assert lines_of_a_batch(10_000) == lines_of_a_batch(10)


def test_equal_images_do_not_wait_for_a_batch_that_nothing_fills(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "QUIET", 100)
    frame = pd.concat([photos.head(3)] * 200)
    extraction = Extraction(frame, BLOCK, images="path", cache=False)
    done = [step.done for step in extraction.steps()]
    assert any(0 < count < 300 for count in done)
    assert done[-1] == 600
    assert FakeEngine.computed == 3


# Failures


def test_what_cannot_be_decoded_is_not_tried_again_until_the_decoders_change(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("row 3", "row 4", "row 11"):
        Path(str(photos.loc[name, "path"])).write_text("text")
    first = run(photos)
    assert list(first.failures["position"]) == [3, 4, 11], "equals of an image that fails fail, too"
    original, decoded = decode.pixels_of, list[object]()

    def counted(source: decode.Source, specs: Any) -> Any:
        decoded.append(source)
        return original(source, specs)

    monkeypatch.setattr(pipeline, "pixels_of", counted)
    again = run(photos)
    assert decoded == []
    assert list(again.failures["reason"]) == ["text, not an image"] * 3
    assert (again.done, again.cached) == (20, 17)
    assert ", 17 from the cache\n" in repr(again)
    assert "bottleneck" not in repr(again)
    for change in ("decoders", "codecs"):
        decoded.clear()
        monkeypatch.setattr(f"nbfeat.extraction.run.{change}", lambda: "others")
        run(photos)
        assert decoded == [b"text"]


def test_what_can_be_decoded_depends_on_this_package_and_on_pillows_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = decode.codecs()
    assert re.fullmatch(r"decoding 1, jpg .+, jpg_2000 \d.+, zlib \d.+, libtiff \d.+, webp \d.+, avif \d.+", usual)
    monkeypatch.setattr(decode, "DECODING", 2)
    newer = decode.codecs()
    monkeypatch.setattr(features, "version", lambda name: None if name == "avif" else "1")
    assert len({usual, newer, decode.codecs()}) == 3


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("broken data stream when reading image file", "damaged: broken data stream when reading image file"),
        ("out of memory error when reading image file", decode.OUT_OF_MEMORY),
    ],
)
def test_a_jpeg_2000_that_failed_is_tried_again(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, reason: str, told: str
) -> None:
    """OpenJPEG calls a file broken where memory was short."""
    path = str(Path(photos["path"].iloc[3]).with_suffix(".jp2"))
    Image.open(photos["path"].iloc[3]).save(path)
    photos["path"] = [path, *photos["path"].iloc[1:]]
    with monkeypatch.context() as patch:
        patch.setattr(Jpeg2KImagePlugin.Jpeg2KImageFile, "load", lambda _: (_ for _ in ()).throw(OSError(reason)))
        assert list(run(photos).failures["reason"]) == [told]
    assert run(photos).failures.empty


def test_what_is_missing_and_want_of_memory_are_not_remembered(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(resize, "fitted", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(nbfeat.ExtractionError, match=decode.OUT_OF_MEMORY):
            run(photos)
    good = Path(photos["path"].iloc[3])
    hidden = good.rename(good.with_name("hidden.png"))
    assert "no such file" in run(photos).failures["reason"].iloc[0]
    hidden.rename(good)
    assert run(photos).failures.empty


def test_a_file_that_vanished_has_no_features_even_where_one_network_had_them(photos: pd.DataFrame) -> None:
    bad = photos["path"].iloc[5]
    run(photos)
    steps = Extraction(photos, BLOCK, "VGG16 --size 32", images="path")
    work = steps.steps()
    while not next(work).note.startswith("20 rows"):
        pass
    next(work)  # one network's features are recalled
    Path(bad).unlink()
    for _ in work:
        pass
    assert list(steps.failures["position"]) == [5]
    assert steps.features.iloc[5].isna().all()


# Resuming


def test_what_was_done_before_a_stop_is_not_done_again(photos: pd.DataFrame) -> None:
    first = Extraction(photos, BLOCK, images="path", batch_size=3)
    steps = first.steps()
    list(islice(steps, 5))
    steps.close()
    assert first.keeps
    assert first.done == 9
    second = run(photos, batch_size=3)
    assert (second.cached, second.done) == (9, 20)
    assert FakeEngine.computed <= 20 + 2 * 3
    seen = next(step for step in Extraction(photos, BLOCK, images="path").steps() if step.done)
    assert (seen.cached, seen.failed) == (20, 0)
    assert "9 from the cache, 11 computed" in repr(second)


@pytest.mark.parametrize(("where", "name", "at"), [(Progress, "take", 2), (Normalizer, "apply", 1)])
def test_an_interrupt_anywhere_loses_no_row_and_normalizes_none_twice(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, where: type, name: str, at: int
) -> None:
    expected = run(photos, normalize="standard", cache=False).features
    original, calls = getattr(where, name), list[object]()

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        done = original(*args) if where is Normalizer else None  # it works in place
        if len(calls) == at:
            raise KeyboardInterrupt
        return done if where is Normalizer else original(*args)

    monkeypatch.setattr(where, name, interrupted)
    extraction = Extraction(photos, BLOCK, images="path", normalize="standard", batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        extraction.run()
    extraction.run()
    assert (extraction.done, extraction.state, FakeEngine.computed < 2 * 20 + 9) == (20, "done", True)
    same(extraction.features, expected)


def test_a_cache_that_is_cleared_meanwhile_fills_again(photos: pd.DataFrame) -> None:
    extraction = Extraction(photos, BLOCK, images="path", batch_size=2)
    for number, _ in enumerate(extraction.steps()):
        if number == 6:
            nbfeat.storage.clear()
    assert (extraction.done, extraction.notes) == (20, [])
    assert 0 < run(photos).cached < 20
    assert run(photos).cached == 20


def test_steps_that_nobody_asks_for_any_more_leave_nothing_open(photos: pd.DataFrame, own_cache: Path) -> None:
    steps = Extraction(photos, BLOCK, images="path", batch_size=2).steps()
    list(islice(steps, 4))
    del steps
    assert not list((own_cache / "features").glob("*-wal")), "the connection is still open"


# Damaged or unusable caches


@pytest.mark.parametrize("kind", ["empty", "text", "cut 1 %", "cut 20 %", "cut 90 %", *map(str, range(8))])
def test_a_damaged_database_costs_time_and_nothing_else(photos: pd.DataFrame, own_cache: Path, kind: str) -> None:
    before, file, chance = run(photos), file_of(own_cache), random.Random(kind)
    data = {"empty": b"", "text": b"not a database\n" * 100}.get(kind, file.read_bytes())
    if kind.startswith("cut"):
        data = data[: len(data) * int(kind.split()[1]) // 100]
    for _ in range(20 if kind.isdigit() else 0):  # not in the header, which could give a different format
        data = data[:100] + mutated(data[100:], chance, 4096)
    file.write_bytes(data)
    after = run(photos)
    same(after.features, before.features)
    assert all("was damaged" in note and "A new one was started" in note for note in after.notes)
    assert run(photos).cached == 20, "it is kept again"
    assert len(list((own_cache / "features").glob("*.sqlite"))) == 1


def test_a_newer_format_is_left_alone(photos: pd.DataFrame, own_cache: Path) -> None:
    run(photos)
    rows(file_of(own_cache), "PRAGMA user_version = 99")
    again = run(photos)
    assert (again.cached, again.keeps) == (0, False)
    assert "written by a newer nbfeat, in format 99" in again.notes[0]
    assert "Update nbfeat" in repr(again)
    with pytest.raises(nbfeat.NbfeatError, match="newer nbfeat"):
        nbfeat.storage.clear()


def test_an_older_format_gives_way(photos: pd.DataFrame, own_cache: Path) -> None:
    file = own_cache / "features" / "features-0.sqlite"
    file.parent.mkdir(mode=0o700)
    rows(file, "CREATE TABLE features (block INTEGER, image BLOB, vector BLOB, sum INTEGER)")
    rows(file, "PRAGMA user_version = 1")
    assert run(photos).notes == []
    assert run(photos).cached == 20
    assert file_of(own_cache) == file
    assert rows(file, "SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'features'") == []


def test_a_locked_database_is_read_and_not_written(
    photos: pd.DataFrame, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(photos.iloc[:10])
    monkeypatch.setattr(database, "PATIENCE", 0.1)
    other = sqlite3.connect(file_of(own_cache), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    locked = run(photos)
    assert (locked.cached, locked.done, locked.keeps) == (10, 20, False), locked.notes
    (note,) = locked.notes
    assert note == (
        f"The cache in {own_cache / 'features'} cannot be written (another program has locked it): features are no "
        "longer cached. Close that program, and run the cell again."
    )
    other.close()
    assert run(photos).cached == 10


UNUSABLE: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "no access": lambda _, patch: patch.setattr(
        os, "access", lambda *_: False
    ),  # pretend read-only; root can write anywhere
    "a file in the way": lambda folder, _: folder.write_text(""),
    "open to others": lambda folder, _: folder.parent.chmod(0o777),
    "another owner": lambda _, patch: patch.setattr(os, "getuid", lambda: 12_345),
}


@pytest.mark.parametrize("how", UNUSABLE)
def test_a_folder_that_cannot_be_used_is_told_and_the_run_goes_on(
    photos: pd.DataFrame, own_cache: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    UNUSABLE[how](own_cache / "features", monkeypatch)
    result = run(photos)
    (note,) = result.notes
    assert (result.done, result.keeps) == (20, False)
    assert note.endswith("Features are not cached.")
    assert "NBFEAT_HOME" in note


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_database_that_may_only_be_read_is_read(photos: pd.DataFrame, own_cache: Path) -> None:
    run(photos.iloc[:10])
    file_of(own_cache).chmod(0o400)
    again = run(photos)
    assert again.done == 20
    assert "cannot be" in again.notes[0]


def test_on_a_network_file_system_it_works_and_says_that_it_is_slower(
    photos: pd.DataFrame, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "file_system", lambda _: "nfs4")
    first = run(photos)
    assert "network file system (nfs4)" in first.notes[0]
    assert rows(file_of(own_cache), "PRAGMA journal_mode") == [("delete",)]
    assert run(photos).cached == 20


def test_the_file_system_is_that_of_the_deepest_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    lines = ["1 0 8:1 / / rw - ext4 /dev/sda rw", "2 1 0:5 / /home rw shared:1 - nfs4 server:/home rw"]
    table.write_text("\n".join([*lines, "3 2 0:6 / /home/my\\040own rw - tmpfs none rw"]))
    mounts = paths._mounts
    monkeypatch.setattr(paths, "_mounts", lambda folder: mounts(folder, table))
    for folder, kind in (("/", "ext4"), ("/home/a/b", "nfs4"), ("/home/my own/x", "tmpfs"), ("/homes", "ext4")):
        assert paths.file_system(Path(folder)) == kind
    table.unlink()
    assert paths.file_system(tmp_path) == ""
    assert paths.is_remote("nfs4")
    assert not paths.is_remote("ext4")


@pytest.mark.parametrize(("kind", "is_remote"), [(3, False), (4, True)])
def test_a_share_is_recognized_on_macos_and_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int, is_remote: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        kernel = SimpleNamespace(GetDriveTypeW=lambda drive: kind if drive == tmp_path.anchor else 0)
        patch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
        assert paths.is_remote(paths.file_system(tmp_path)) is is_remote
    share = f"//me@server/a share on {tmp_path} ({'smbfs' if is_remote else 'apfs'}, nodev)"
    listed = f"/dev/disk3s1 on / (apfs, local)\n{share}\n"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        patch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listed))
        assert paths.is_remote(paths.file_system(tmp_path / "features")) is is_remote


# Size


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """Return 150 small images with 29 kB of features per block, and limit the cache to about two blocks."""
    monkeypatch.setattr(database, "LOOK_EVERY", 1)
    monkeypatch.setattr(database, "LARGEST", 130_000)
    return pd.DataFrame({"path": list(np.random.default_rng(0).integers(0, 255, (150, 8, 8, 3), dtype=np.uint8))})


def test_the_block_longest_unused_is_evicted_whole_and_the_disk_given_back(many: pd.DataFrame, own_cache: Path) -> None:
    blocks = ["MobileNet --size 32", "VGG16 --size 32", "VGG19 --size 32"]
    assert [run(many, blocks[number]).cached for number in (0, 1, 0, 2)] == [0, 0, 150, 0]
    assert set(nbfeat.storage.features["backbone"]) == {"MobileNet", "VGG19"}
    assert file_of(own_cache).stat().st_size < 140_000
    assert run(many, blocks[0]).cached == run(many, blocks[2]).cached == 150
    assert rows(file_of(own_cache), "PRAGMA integrity_check") == [("ok",)]


def key(backbone: str, width: int) -> CacheKey:
    values: dict[str, Any] = {field.name: "any" for field in fields(CacheKey)}
    return CacheKey(**{**values, "backbone": backbone, "engine": {}, "width": width})


def filled(folder: Path, block: CacheKey, images: int) -> database.Cache:
    """Open a cache with so many images of `block`, which no run uses any more."""
    kept = database.Cache(folder)
    for start in range(0, images, 500):
        names = [f"{number:016d}".encode() for number in range(start, min(start + 500, images))]
        kept.keep(database.CacheEntries(vectors=[(block, names, np.zeros((len(names), block.width), np.float32))]))
    kept._unmeasured = database.LOOK_EVERY
    return kept


@pytest.mark.parametrize(("width", "images", "most"), [(8, 2000, database.MOST_AT_ONCE), (50_000, 30, 5)])
def test_eviction_takes_a_little_at_a_time_and_more_than_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, images: int, most: int
) -> None:
    old, new = key("old", width), key("new", width)
    with closing(filled(tmp_path, old, images)) as kept:
        size = kept.path.stat().st_size
        monkeypatch.setattr(database, "LARGEST", size // 2)
        kept.use([new])
        left = [images]
        for number in range(images):
            vectors = (new, [f"new {number:012d}".encode()], np.zeros((1, width), np.float32))
            kept.keep(database.CacheEntries(vectors=[vectors]))
            left.append(sum(row["images"] for row in kept.blocks() if row["backbone"] == "old"))
            assert kept.path.stat().st_size <= size + 10 * 4 * width + 100_000
        assert max(before - after for before, after in itertools.pairwise(left)) <= most
        assert left[-1] < images // 2


def test_a_reader_never_waits_for_a_writer(tmp_path: Path) -> None:
    block = key("any", 8)
    with closing(filled(tmp_path, block, 3)) as kept, ThreadPoolExecutor(1) as other, kept._lock:
        assert kept._db is not None
        kept._db.execute("BEGIN IMMEDIATE")
        kept._db.execute("DELETE FROM entries")
        assert len(other.submit(kept.vectors, block, [f"{1:016d}".encode()]).result(timeout=5)) == 1
        kept._db.execute("ROLLBACK")


def test_the_disk_is_given_back_where_the_limit_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(filled(tmp_path, key("old", 1000), 500)) as kept:
        monkeypatch.setattr(database, "LARGEST", 200_000)
        for _ in range(20):
            kept.keep(database.CacheEntries(files={b"state": b"image"}))
    assert kept.path.stat().st_size < 300_000


def test_an_error_in_this_package_deletes_no_cache(
    photos: pd.DataFrame, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(photos)
    with monkeypatch.context() as patch:
        patch.setattr(database, "_touch", lambda *_: (_ for _ in ()).throw(ValueError("a bug")))
        second = run(photos, "VGG16 --size 32")
    assert "cannot be written (a bug): features are no longer cached" in second.notes[0]
    assert file_of(own_cache).name == "features-000000.sqlite"
    assert run(photos).cached == 20
    same(run(photos).features, first.features)


def test_a_run_that_is_larger_than_the_cache_keeps_what_fits_and_says_so(
    many: pd.DataFrame, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LARGEST", 55_000)
    result = run(many)
    assert result.done == 150
    assert "This run alone fills the cache" in result.notes[0]
    again = run(many)
    assert 20 < again.cached < 150
    same(again.features, result.features)
    assert file_of(own_cache).stat().st_size < 90_000


def test_the_limit_is_a_tenth_of_what_would_be_free(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = shutil.disk_usage(own_cache)
    with closing(database.Cache.at_home()) as kept:
        for free, limit in ((10**13, 20 * 10**9), (1_000_000, (1_000_000 + nbfeat.storage.bytes) // 10)):
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: disk._replace(free=free))
            assert kept.limit() == limit


# Display and clearing


def test_storage_shows_what_there_is_and_clears_it(photos: pd.DataFrame, own_cache: Path) -> None:
    assert str(own_cache) in repr(nbfeat.storage)
    assert nbfeat.storage.features.empty
    assert not (own_cache / "features").exists(), "looking makes nothing"
    run(photos, BLOCK, "VGG16 --size 32 --resize pad")
    table = nbfeat.storage.features
    assert set(table["backbone"]) == {"MobileNet", "VGG16"}
    assert list(table["images"]) == [20, 20]
    assert list(table["bytes"]) == [20 * 48 * 4] * 2
    for text in (repr(nbfeat.storage), nbfeat.storage._repr_html_()):
        assert "MobileNet (random weights), 32 px squash: end avg, float32" in text
        assert "32 px pad" in text
        assert "nbfeat.storage.clear(" in text
        assert all(kind in text.rpartition("nbfeat.storage.clear(")[2] for kind in KINDS)
    assert nbfeat.storage.bytes > 20 * 48 * 4
    nbfeat.storage.clear()
    assert nbfeat.storage.features.empty
    assert run(photos).cached == 0
    kinds = "features, networks, weights, precisions or all"
    with pytest.raises(RequestError, match=f"Cannot clear 'everything': use {kinds}"):
        nbfeat.storage.clear("everything")


def test_the_magic_shows_and_clears_and_a_setting_turns_it_off(
    photos: pd.DataFrame, shell: InteractiveShell, own_cache: Path
) -> None:
    shell.user_ns["photos"] = photos
    shell.run_line_magic("config", "ExtractMagics.cache = False")
    shell.run_line_magic("extract", f"photos {BLOCK}")
    shell.run_line_magic("config", "ExtractMagics.cache = True")
    assert not (own_cache / "features").exists()
    run(photos)
    assert shell.run_line_magic("extract_cache", "") is nbfeat.storage
    shell.run_line_magic("extract_cache", "clear")
    assert nbfeat.storage.features.empty
    with pytest.raises(UsageError, match="Cannot clear 'rubbish': use features, networks"):
        shell.run_line_magic("extract_cache", "clear rubbish")
    with pytest.raises(UsageError, match=r"Use %extract_cache alone or with clear"):
        shell.run_line_magic("extract_cache", "empty")


def test_clearing_networks_and_weights_removes_them(own_cache: Path) -> None:
    (own_cache / "networks").unlink()
    folder = own_cache / "networks" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(
        '{"spec": {"backbone": "VGG16", "alpha": null, "size": 224, "cuts": [{"layer": "", "pooling": "max"}]},'
        ' "weights": {"name": "imagenet"}}'
    )
    (own_cache / "networks" / ".half-built").mkdir()
    (own_cache / "weights").mkdir()
    (own_cache / "weights" / "net-12345678.pth").write_bytes(bytes(2_000_000))
    assert "net-12345678.pth" in repr(nbfeat.storage)
    assert "2.0 MB" in repr(nbfeat.storage)
    assert list(nbfeat.storage.networks["backbone"]) == ["VGG16"]
    assert "VGG16 (imagenet weights), 224 px: end max" in repr(nbfeat.storage)
    nbfeat.storage.clear("networks")
    assert [path.name for path in (own_cache / "networks").iterdir()] == [".half-built"]  # another process may build it
    assert len(list((own_cache / "weights").iterdir())) == 1
    nbfeat.storage.clear("all")
    assert not list((own_cache / "weights").iterdir())
