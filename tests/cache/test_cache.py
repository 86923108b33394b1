"""No image is computed twice; and whatever happens to the cache, the result is right."""

from __future__ import annotations

import io
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

import nbfeat
from nbfeat import Extraction, RequestError, paths
from nbfeat.cache import database, tables
from nbfeat.cache.storage import KINDS
from nbfeat.extraction import lane, pipeline, progress
from nbfeat.extraction.normalize import Normalizer
from nbfeat.images import decode, fingerprint, formats, resize, sources
from nbfeat.inference import spec as networks
from tests import fake
from tests.faces import Face, same
from tests.fake import FakeEngine, FakeNetwork

pytestmark = pytest.mark.usefixtures("fake_network")
BLOCK = "MobileNet --size 32"


@pytest.fixture
def photos(photos: pd.DataFrame, tmp_path: Path) -> pd.DataFrame:
    """Return photos of files that this test may change, and that have not changed for a minute."""
    for name, path in photos["path"].items():
        file = tmp_path / Path(path).name
        shutil.copy(path, file)
        photos.loc[str(name), "path"] = str(file)
    return photos


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take files that were just written as old enough to be known by their state."""
    monkeypatch.setattr(fingerprint, "SETTLED_AFTER_NS", 0)


def run(frame: pd.DataFrame, *blocks: str, **options: Any) -> Extraction:
    return Extraction(frame, *(blocks or [BLOCK]), **{"images": "path", **options}).run()


def computed(work: Callable[[], object]) -> int:
    """Return how many images the networks ran over during `work`."""
    before = FakeEngine.computed
    work()
    return FakeEngine.computed - before


def file_of(folder: Path) -> Path:
    """Return the one database in a home folder."""
    (file,) = (folder / "features").glob("*.sqlite")
    return file


# What is found again


def test_the_same_cell_again_computes_nothing(extract: Face, photos: pd.DataFrame) -> None:
    first = extract(photos, BLOCK, images="path")
    assert (first.cached, FakeEngine.computed) == (0, 20)
    again = extract(photos, BLOCK, images="path")
    assert (again.cached, again.done, FakeEngine.computed, FakeEngine.opened) == (20, 20, 20, 1)
    same(again.features, first.features)
    assert re.search(r"from 20 images in \d\.\d s, all from the cache\n", repr(again))
    assert again.profile["bottleneck"] is None
    assert "bounded by" not in repr(again)


def test_without_the_cache_everything_is_computed_and_nothing_is_kept(
    extract: Face, photos: pd.DataFrame, own_cache: Path
) -> None:
    assert computed(lambda: extract(photos, BLOCK, images="path", cache=False)) == 20
    assert computed(lambda: extract(photos, BLOCK, images="path", cache=False)) == 20
    assert not (own_cache / "features").exists()


def test_normalization_and_names_do_not_compute_again(extract: Face, photos: pd.DataFrame) -> None:
    raw = extract(photos, BLOCK, images="path").features.to_numpy()
    for options in ({"normalize": "l2"}, {"normalize": "standard"}, {"components": 3}, {"prefix": "other"}):
        assert computed(lambda options=options: extract(photos, BLOCK, images="path", **options)) == 0  # type: ignore[misc]
    learned = extract(photos, BLOCK, images="path", normalize="standard", fit_on="split == 'train'")
    assert learned.cached == 20
    np.testing.assert_allclose(learned.features.to_numpy()[:14].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_array_equal(extract(photos, BLOCK, images="path").features.to_numpy(), raw)


@pytest.mark.parametrize(
    "change",
    ["--size 48", "--resize pad", "--interpolation nearest", "--layer conv1_relu", "--scaling none", "--alpha 0.5"],
)
def test_what_changes_the_numbers_is_computed_again(photos: pd.DataFrame, change: str) -> None:
    run(photos)
    assert computed(lambda: run(photos, f"{BLOCK} {change}".replace("--size 32 --size", "--size"))) == 20


@pytest.mark.parametrize("change", ["weights", "engine", "numerics", "decoders", "reduction", "precision", "pooling"])
def test_so_is_what_the_versions_change(photos: pd.DataFrame, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(photos)
    made = FakeNetwork.__init__

    def other(self: FakeNetwork, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        if change == "weights":
            self.weights = nbfeat.backbones.weights.Loaded("random", "1" * 64)
        elif change == "engine":
            self.numbers = {"engine": "another"}
        elif change == "pooling":
            (key,) = self.outputs
            self.outputs = {key: networks.Output(48, "max", (2, 2, 48), negative=False)}

    monkeypatch.setattr(FakeNetwork, "__init__", other)
    if change == "numerics":
        monkeypatch.setattr(lane, "NUMERICS", networks.NUMERICS + 1)
    elif change == "decoders":
        monkeypatch.setattr(lane, "decoders", lambda: "another pillow")
    elif change == "reduction":
        monkeypatch.setattr(resize, "LEAST_REDUCED", 2)
    precision = "auto"
    if change == "precision":
        precision = "bfloat16"
        run(photos, precision=precision, cache=False)  # it is compared with float32, once
    assert computed(lambda: run(photos, precision=precision)) == 20
    assert computed(lambda: run(photos, precision=precision)) == 0


@pytest.mark.usefixtures("settled")
def test_a_file_that_changed_is_computed_again_alone(photos: pd.DataFrame) -> None:
    before = run(photos).features
    path = Path(photos["path"].iloc[7])
    status = path.stat()
    Image.new("RGB", (48, 48), "red").save(path)
    path.write_bytes(path.read_bytes().ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the time of the change tells
    assert computed(lambda: run(photos)) == 1
    after = run(photos).features
    changed = (before != after).any(axis=1)
    assert list(np.flatnonzero(changed)) == [7]


@pytest.mark.usefixtures("settled")
def test_files_that_moved_or_were_touched_are_read_but_not_computed(photos: pd.DataFrame, tmp_path: Path) -> None:
    before = run(photos)
    moved = [shutil.move(path, str(tmp_path / f"moved {Path(path).name}")) for path in photos["path"]]
    after = run(photos.assign(path=moved))
    assert (after.cached, FakeEngine.computed) == (20, 20)
    same(after.features, before.features)


@pytest.mark.usefixtures("settled")
def test_files_in_a_known_state_are_not_even_read(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(photos)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read a file that it knew"))
    same(run(photos).features, before.features)


def test_a_file_that_has_just_changed_is_not_known_by_its_state(photos: pd.DataFrame) -> None:
    status = Path(photos["path"].iloc[0]).stat()
    assert not fingerprint.is_settled(status)
    assert sources.load(photos["path"].iloc[0], Path())[1] is None
    run(photos)
    with sqlite3.connect(database.Cache.at_home().path) as db:
        assert db.execute("SELECT COUNT(*) FROM files").fetchone() == (0,)


def test_a_file_that_changes_while_it_is_read_is_not_known_by_its_state(
    photos: pd.DataFrame, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(photos["path"].iloc[0])
    read = Path.read_bytes

    def read_and_change(self: Path) -> bytes:
        data = read(self)
        self.write_bytes(data + b"\0")
        return data

    assert settled is None
    assert sources.load(str(path), Path())[1] is not None
    monkeypatch.setattr(Path, "read_bytes", read_and_change)
    assert sources.load(str(path), Path())[1] is None


@pytest.mark.parametrize("kind", ["bytes", "array", "PIL", "mapping"])
def test_images_in_memory_are_known_by_their_content(photos: pd.DataFrame, kind: str) -> None:
    data = [Path(path).read_bytes() for path in photos["path"]]
    opened = [Image.open(io.BytesIO(one)) for one in data]
    values: dict[str, list[Any]] = {
        "bytes": data,
        "array": [np.asarray(image) for image in opened],
        "PIL": list(opened),
        "mapping": [{"bytes": None, "path": path} for path in photos["path"]],
    }
    photos["image"] = pd.Series(values[kind], index=photos.index, dtype=object)
    before = run(photos, images="image")
    after = run(photos.iloc[::-1], images="image")
    assert (after.cached, FakeEngine.computed) == (20, 20)
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
    assert run(photos, "VGG16 --size 32", BLOCK).cached == 20


# Equal images


def test_equal_images_are_computed_once(extract: Face, photos: pd.DataFrame, tmp_path: Path) -> None:
    copies = [str(shutil.copy(path, tmp_path / f"copy {Path(path).name}")) for path in photos["path"]]
    many = pd.concat([photos, photos.assign(path=copies), photos])
    result = extract(many, BLOCK, images="path", cache=False)
    assert (FakeEngine.computed, result.equal, result.done) == (20, 40, 60)
    assert "40 images are equal to others and share their features" in repr(result)
    same(result.features.iloc[20:40], result.features.iloc[:20])
    same(result.features.iloc[40:], result.features.iloc[:20])


def test_an_image_that_stands_in_two_columns_is_computed_once(photos: pd.DataFrame) -> None:
    photos["back"] = list(photos["path"])[::-1]
    result = run(photos, images=["path", "back"], normalize="l2", cache=False)
    assert FakeEngine.computed == 20
    np.testing.assert_array_equal(result["path_mobilenet"].to_numpy(), result["back_mobilenet"].to_numpy()[::-1])


def test_blocks_that_differ_in_normalization_share_one_matrix_and_do_not_spoil_it(photos: pd.DataFrame) -> None:
    blocks = [f"{BLOCK} -n l2 -x a", f"{BLOCK} -n standard -x b", f"{BLOCK} -x c"]
    together = run(photos, *blocks, cache=False)
    for block, prefix in zip(blocks, "abc", strict=True):
        same(together[prefix], run(photos, block, cache=False).features)


def test_equals_of_an_image_that_fails_fail_with_its_reason(photos: pd.DataFrame, tmp_path: Path) -> None:
    for name in ("row 3", "row 4", "row 11"):
        (tmp_path / f"{name}.png").write_text("text")
        photos.loc[name, "path"] = str(tmp_path / f"{name}.png")
    result = run(photos, cache=False)
    assert list(result.failures["position"]) == [3, 4, 11]
    assert set(result.failures["reason"]) == {"text, not an image"}


# Failures


def test_what_cannot_be_decoded_is_not_tried_again_until_the_decoders_change(
    photos: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.png").write_text("text")
    photos.loc["row 3", "path"] = str(tmp_path / "bad.png")
    run(photos)
    original, decoded = decode.pixels_of, list[object]()

    def counted(source: sources.Source, specs: Any) -> Any:
        decoded.append(source)
        return original(source, specs)

    monkeypatch.setattr(pipeline, "pixels_of", counted)
    again = run(photos)
    assert decoded == []
    assert list(again.failures["reason"]) == ["text, not an image"]
    assert (again.done, again.cached) == (20, 19)
    assert ", 19 from the cache\n" in repr(again)
    assert "bounded by" not in repr(again)
    monkeypatch.setattr("nbfeat.extraction.run.decoders", lambda: "others")
    run(photos)
    assert decoded == [b"text"]


def test_what_is_missing_is_tried_every_time(photos: pd.DataFrame, tmp_path: Path) -> None:
    good = photos["path"].iloc[3]
    hidden = Path(good).rename(tmp_path / "hidden.png")
    assert "no such file" in run(photos).failures["reason"].iloc[0]
    hidden.rename(good)
    assert run(photos).failures.empty


def test_want_of_memory_is_not_remembered(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(resize, "fitted", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(nbfeat.ExtractionError, match=formats.OUT_OF_MEMORY):
            run(photos)
    assert run(photos).failures.empty


def test_a_file_that_vanished_has_no_features_even_where_one_network_had_them(
    photos: pd.DataFrame, settled: None
) -> None:
    assert settled is None
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


# Going on


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


def test_an_interrupt_between_placing_and_counting_loses_no_row(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(photos, cache=False).features
    take, calls = progress.Progress.take, list[int]()

    def interrupted(self: progress.Progress, batch: Any) -> Any:
        calls.append(len(batch.rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return take(self, batch)

    monkeypatch.setattr(progress.Progress, "take", interrupted)
    extraction = Extraction(photos, BLOCK, images="path", batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        extraction.run()
    extraction.run()
    assert (extraction.done, extraction.state) == (20, "done")
    same(extraction.features, expected)


def test_an_interrupt_while_normalizing_in_place_does_not_normalize_twice(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(photos, normalize="standard", cache=False).features
    apply, calls = Normalizer.apply, list[int]()

    def interrupted(self: Normalizer, rows: Any) -> Any:
        calls.append(len(rows))
        normalized = apply(self, rows)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return normalized

    monkeypatch.setattr(Normalizer, "apply", interrupted)
    extraction = Extraction(photos, BLOCK, images="path", normalize="standard")
    with pytest.raises(KeyboardInterrupt):
        extraction.run()
    extraction.run()
    assert (extraction.done, FakeEngine.computed) == (20, 40)
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


# Trouble


def hurt(path: Path, kind: str) -> None:
    """Spoil the database."""
    data = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a database\n" * 100)
    elif kind.startswith("cut at"):
        path.write_bytes(data[: len(data) * int(kind.split()[2]) // 100])
    else:
        generator = np.random.default_rng(int(kind.split()[1]))
        spoiled = bytearray(data)
        for start in generator.integers(0, len(data), 40):
            spoiled[start : start + 300] = generator.bytes(len(spoiled[start : start + 300]))
        path.write_bytes(spoiled)


SPOILED = ["empty", "text", *(f"cut at {share} %" for share in (1, 20, 50, 90)), *(f"random {n}" for n in range(20))]


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.usefixtures("settled")
def test_a_damaged_database_costs_time_and_nothing_else(photos: pd.DataFrame, own_cache: Path, kind: str) -> None:
    before = run(photos)
    hurt(file_of(own_cache), kind)
    after = run(photos)
    same(after.features, before.features)
    assert all("was damaged" in note and "begun anew" in note for note in after.notes)
    assert run(photos).cached == 20, "it is kept again"
    assert len(list((own_cache / "features").glob("*.sqlite"))) == 1


def test_a_newer_format_is_left_alone(photos: pd.DataFrame, own_cache: Path) -> None:
    run(photos)
    with sqlite3.connect(file_of(own_cache)) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    again = run(photos)
    assert (again.cached, again.keeps) == (0, False)
    assert "written by a newer nbfeat, in format 99" in again.notes[0]
    assert "Update nbfeat" in repr(again)
    with pytest.raises(nbfeat.NbfeatError, match="newer nbfeat"):
        nbfeat.storage.clear()


def test_a_locked_database_is_read_and_not_written(
    photos: pd.DataFrame, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(photos.iloc[:10])
    monkeypatch.setattr(tables, "PATIENCE", 0.1)
    other = sqlite3.connect(file_of(own_cache), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    locked = run(photos)
    assert (locked.cached, locked.done, locked.keeps) == (10, 20, False), locked.notes
    (note,) = locked.notes
    assert note == (
        f"The cache in {own_cache / 'features'} cannot be written (another program has locked it): features are not "
        "kept from here on. Close it, and run the cell again."
    )
    other.close()
    assert run(photos).cached == 10


@pytest.mark.parametrize("how", ["no access", "a file in the way", "open to others", "another owner"])
def test_a_folder_that_cannot_be_used_is_told_and_the_run_goes_on(
    photos: pd.DataFrame, own_cache: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "no access":
        monkeypatch.setattr(os, "access", lambda *_: False)  # as for a folder that is read-only; root may write all
    elif how == "a file in the way":
        (own_cache / "features").write_text("")
    elif how == "open to others":
        (own_cache / "features").mkdir()
        (own_cache / "features").chmod(0o777)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12_345)
    result = run(photos)
    assert result.done == 20
    assert not result.keeps
    (note,) = result.notes
    assert note.endswith("Features are not kept.")
    assert "NBFEAT_HOME" in note


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_database_that_may_only_be_read_is_read(photos: pd.DataFrame, own_cache: Path) -> None:
    run(photos.iloc[:10])
    file_of(own_cache).chmod(0o400)
    again = run(photos)
    assert again.done == 20
    assert "cannot be" in again.notes[0]


@pytest.mark.usefixtures("settled")
def test_a_clock_that_goes_back_does_not_make_old_files_look_right(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(photos)
    day = 86_400
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() - day)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() - day * 10**9)
    path = Path(photos["path"].iloc[2])
    Image.new("RGB", (48, 48), "blue").save(path)
    assert not fingerprint.is_settled(path.stat()), "a change of tomorrow is not past"
    after = run(photos)
    assert list(np.flatnonzero((after.features != before.features).any(axis=1))) == [2]
    assert run(photos).cached == 20


def test_on_a_network_file_system_it_works_and_says_that_it_is_slower(
    photos: pd.DataFrame, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "file_system", lambda _: "nfs4")
    first = run(photos)
    assert "network file system (nfs4)" in first.notes[0]
    with sqlite3.connect(file_of(own_cache)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert run(photos).cached == 20


def test_the_file_system_is_that_of_the_deepest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    lines = ["1 0 8:1 / / rw - ext4 /dev/sda rw", "2 1 0:5 / /home rw shared:1 - nfs4 server:/home rw"]
    mounts.write_text("\n".join([*lines, "3 2 0:6 / /home/my\\040own rw - tmpfs none rw"]))
    for folder, kind in (("/", "ext4"), ("/home/a/b", "nfs4"), ("/home/my own/x", "tmpfs"), ("/homes", "ext4")):
        assert paths.file_system(Path(folder), mounts) == kind
    assert paths.file_system(tmp_path, tmp_path / "nosuch") == ""
    assert paths.is_remote("nfs4")
    assert not paths.is_remote("ext4")


# Size


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the cache room for some two blocks, and look at its size at every batch."""
    monkeypatch.setattr(database, "LOOK_EVERY", 1)
    monkeypatch.setattr(database, "LARGEST", 130_000)


@pytest.fixture
def many() -> pd.DataFrame:
    """Return 150 small images, whose features take 29 kB a block."""
    generator = np.random.default_rng(0)
    return pd.DataFrame({"path": list(generator.integers(0, 255, (150, 8, 8, 3), dtype=np.uint8))})


@pytest.mark.usefixtures("small")
def test_the_block_longest_unused_is_evicted_whole_and_the_disk_given_back(many: pd.DataFrame, own_cache: Path) -> None:
    blocks = ["MobileNet --size 32", "VGG16 --size 32", "VGG19 --size 32"]
    run(many, blocks[0])
    run(many, blocks[1])
    assert run(many, blocks[0]).cached == 150, "which makes it the one used last"
    run(many, blocks[2])
    assert set(nbfeat.storage.features["backbone"]) == {"MobileNet", "VGG19"}
    assert file_of(own_cache).stat().st_size < 140_000
    assert run(many, blocks[0]).cached == run(many, blocks[2]).cached == 150
    with sqlite3.connect(file_of(own_cache)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA freelist_count").fetchone() == (0,)


@pytest.mark.usefixtures("small")
def test_a_run_that_is_larger_than_the_cache_keeps_what_fits_and_says_so(
    many: pd.DataFrame, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LARGEST", 55_000)
    result = run(many)
    assert result.done == 150
    assert "The cache is full with this run alone" in result.notes[0]
    again = run(many)
    assert 20 < again.cached < 150
    same(again.features, result.features)
    assert file_of(own_cache).stat().st_size < 90_000


def test_the_limit_is_a_tenth_of_what_would_be_free(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = database.Cache.at_home()
    disk = shutil.disk_usage(own_cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=1_000_000))
    assert kept.limit() == (1_000_000 + kept.size()) // 10
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=10**13))
    assert kept.limit() == 20 * 10**9
    kept.close()


# What people see of it


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
    assert computed(lambda: run(photos)) == 20
    kinds = "features, networks, weights, precisions, all"
    with pytest.raises(RequestError, match=f"clear takes {kinds}, not 'everything'"):
        nbfeat.storage.clear("everything")


def test_the_magic_shows_and_clears(photos: pd.DataFrame, shell: InteractiveShell) -> None:
    run(photos)
    assert shell.run_line_magic("extract_cache", "") is nbfeat.storage
    shell.run_line_magic("extract_cache", "clear")
    assert nbfeat.storage.features.empty
    with pytest.raises(UsageError, match="clear takes features, networks, weights, precisions, all, not 'rubbish'"):
        shell.run_line_magic("extract_cache", "clear rubbish")
    with pytest.raises(UsageError, match=r"%extract_cache takes nothing, or clear"):
        shell.run_line_magic("extract_cache", "empty")


def test_a_setting_turns_it_off_for_all_cells(photos: pd.DataFrame, shell: InteractiveShell, own_cache: Path) -> None:
    shell.user_ns["photos"] = photos
    shell.run_line_magic("config", "ExtractMagics.cache = False")
    try:
        shell.run_line_magic("extract", f"photos {BLOCK}")
        assert not (own_cache / "features").exists()
    finally:
        shell.run_line_magic("config", "ExtractMagics.cache = True")


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
    assert not (own_cache / "networks").exists()
    assert (own_cache / "weights").exists()
    nbfeat.storage.clear("all")
    assert not (own_cache / "weights").exists()


def test_features_are_what_the_network_gave(photos: pd.DataFrame) -> None:
    run(photos)
    kept = database.Cache.at_home()
    digest = fingerprint.digest(Path(photos["path"].iloc[0]).read_bytes())
    (block,) = kept.blocks()
    assert (block["backbone"], block["rows"], block["width"]) == ("MobileNet", 20, 48)
    pixels = decode.pixels_of(Path(photos["path"].iloc[0]).read_bytes(), [resize.PixelSpec(32)])[0]
    with sqlite3.connect(kept.path) as db:
        vector = db.execute("SELECT vector FROM features WHERE image = ?", (digest,)).fetchone()[0]
    kept.close()
    np.testing.assert_array_equal(np.frombuffer(vector, np.float32), fake.features(pixels[None], networks.Cut())[0])
