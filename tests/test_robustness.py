"""Whatever comes in (words, files, what is kept, images), it is read right, or refused in a sentence; nothing else.

NBFEAT_TEST_EXAMPLES=20 tries that many times as much.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as some
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from pyarrow import parquet

import nbfeat
from nbfeat import Extraction, NbfeatError, RequestError, extract, isolation
from nbfeat.extraction import sink
from nbfeat.extraction.options import OPTIONS
from nbfeat.extraction.recipe import pack
from nbfeat.images import decode, fingerprint
from nbfeat.images.decode import NAMES
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import read_pixels
from nbfeat.parquet.result_file import Failure
from tests.images.images_child import images as image_files, is_a_sentence
from tests.messages import assert_says_what_to_do
from tests.mutations import TIMES, mutated
from tests.parquet.test_parquet import resealed

pytestmark = [pytest.mark.usefixtures("fake_network"), pytest.mark.slow]
BLOCKS = ("MobileNet --size 32 --normalize standard", "MobileNet --size 32 --layer conv1 --normalize l2")


def tries(count: int) -> settings:
    """Return settings of so many examples, the same each time."""
    return settings(
        max_examples=count * TIMES, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


CHANCE = some.integers(0, 1 << 40).map(random.Random)

# The grammar

FLAGS = [flag for option in OPTIONS for flag in option.flags if flag != "--on"]  # which takes seconds to import
VALUES = sorted(
    {choice for option in OPTIONS for choice in option.choices if choice != "ray"}
    | {"path", "label", "photos", "In", "_", "nosuch", "ResNet50", "resnet50", "VGG16", "my.keras", "x.h5", "a,b"}
    | {"1", "0", "-1", "2.5", "nan", "inf", "1e400", "٣", ",", "''", '"', "'", "#", ";", "-", "--", "--=", "(", "\\"}
    | {"9" * 400, "9" * 5000, "\"split == 'train'\"", "split == 'train'", "# a comment", "import os", "a\xa0b", "gpu:1"}
    | {"$nosuch", "$name", "{name}", "{", "}", "{{", "{1/0}", "$$", "{name!r:>5}", "path > 3", "train.parquet", "dir/"}
    | {"\u2028", "\x1b[31m", "\ud800", "s3://bucket/key", "file:///x", "~nobody/", "cpu"}
)  # fmt: skip
WORD = (
    some.sampled_from(FLAGS)
    | some.sampled_from(VALUES)
    | some.builds("{}={}".format, some.sampled_from(FLAGS), some.sampled_from(VALUES))
    | some.text(max_size=6)
)
WORDS = some.lists(WORD, max_size=6).map(" ".join)
STARTS = ["photos VGG16 ", "photos ", "photos MobileNet --images path ", ""]
LINE = some.builds(str.__add__, some.sampled_from(STARTS), WORDS)
BLOCK = some.builds(str.__add__, some.sampled_from(["VGG16 ", ""]), WORDS)
BODY = some.none() | some.lists(BLOCK, max_size=3).map("\n".join)


class ReachedError(Exception):
    """Everything was understood, and work would begin."""


def assert_is_shown_as_one_line(error: UsageError) -> None:
    assert type(error) is UsageError, "IPython prints tracebacks of all others"


@tries(400)
@given(line=LINE, body=BODY)
def test_any_cell_is_understood_or_refused_with_a_next_step(
    shell: InteractiveShell, line: str, body: str | None
) -> None:
    photos = pd.DataFrame({"path": ["a.png"], "label": ["x"], "split": ["train"]})
    shell.user_ns |= {"photos": photos, "name": "VGG16"}

    def steps(_: Extraction) -> Iterator[Any]:
        raise ReachedError

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(Extraction, "steps", steps)
        try:
            if body is None:
                shell.run_line_magic("extract", line)
            else:
                shell.run_cell_magic("extract", line, body)
        except UsageError as error:
            assert_is_shown_as_one_line(error)
            assert_says_what_to_do(str(error))
        except ReachedError:
            pass


@pytest.mark.parametrize("word", ["a(", "b]", "2nd", "it's", "'''", "?", "0x", "a\\"])
def test_words_that_are_no_python_are_words(shell: InteractiveShell, photos: pd.DataFrame, word: str) -> None:
    for end in ("", ";", " # :(", " # ;", "; # as well"):
        block = f'MobileNet --size 32 --prefix "{word}"{end}'
        shell.user_ns["photos"] = photos
        found = [
            shell.run_line_magic("extract", f"photos --quiet {block}"),
            shell.run_cell_magic("extract", "photos -q", block),
        ]
        assert f"{word}_0000" in shell.user_ns["photos"]
        assert [one is None for one in found] == [end.startswith(";")] * 2, "silenced by a semicolon alone"


# Results in files


def told(result: nbfeat.Result) -> str:
    """Return all that a result says beside its frame."""
    rows = [Failure(int(position), *map(str, rest)) for position, *rest in result.failures.itertuples(index=False)]
    return pack(result.fitted, rows)


def written(frame: pd.DataFrame, kind: str, folder: Path) -> Path:
    """Extract features, one image missing, and write them as a file or a folder."""
    frame = frame.assign(number=np.arange(len(frame)) * 1.5)
    frame.iloc[3, 0] = "gone.png"
    if kind == "file":
        extract(frame, *BLOCKS, f"{BLOCKS[1]} --components 2 -x pca", images="path").to_parquet(folder / "all.parquet")
        return folder / "all.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sink, "MOST_ROWS", 7)
        extract(frame, *BLOCKS, images="path", batch_size=3, parquet=folder / "all")
    return folder / "all"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_damaged_file_is_read_right_or_refused(photos: pd.DataFrame, tmp_path: Path, kind: str) -> None:
    where = written(photos, kind, tmp_path)
    whole = {file: file.read_bytes() for file in ([where] if kind == "file" else sorted(where.glob("*.parquet")))}
    good, recipe = nbfeat.read(where), told(nbfeat.read(where))
    outcomes = dict.fromkeys(("refused", "like refused", "like right"), 0)

    @tries(150)
    @given(chance=CHANCE)
    def damaged(chance: random.Random) -> None:
        file = chance.choice(list(whole))
        data = whole[file]
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        at = chance.choice((0, footer, footer))
        file.write_bytes(data[:at] + mutated(data[at:], chance, len(data)))
        try:
            back = nbfeat.read(where)
            pd.testing.assert_frame_equal(back.frame, good.frame, check_exact=True)
            assert told(back) == recipe
        except RequestError as error:
            assert_says_what_to_do(str(error))
            outcomes["refused"] += 1
        try:
            again = extract(photos.iloc[:2], like=where)
            pd.testing.assert_frame_equal(again.features, good.features.iloc[:2], check_exact=True)
            outcomes["like right"] += 1
        except RequestError as error:
            assert_says_what_to_do(str(error))
            outcomes["like refused"] += 1
        file.write_bytes(data)

    damaged()
    assert min(outcomes.values()) > 0, outcomes


JSON = some.recursive(
    some.none() | some.booleans() | some.integers(-(10**20), 10**20) | some.floats() | some.text(max_size=8),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Walk through the places of all values within `value`."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(inner, (*at, key))


def test_a_recipe_that_says_something_else_is_taken_or_refused(photos: pd.DataFrame, tmp_path: Path) -> None:
    where = written(photos, "file", tmp_path)
    table, recipe = parquet.read_table(where), json.loads(parquet.read_metadata(where).metadata[b"nbfeat"])
    spots = list(places(recipe))
    refused = 0

    @tries(120)
    @given(at=some.sampled_from(spots), value=JSON | some.sampled_from(spots), gone=some.booleans())
    def changed(at: tuple[Any, ...], value: Any, *, gone: bool) -> None:
        nonlocal refused
        whole = json.loads(json.dumps(recipe))
        holder, other = whole, whole
        for key in at[:-1]:
            holder = holder[key]
        if isinstance(value, tuple):  # what stands elsewhere
            for key in value:
                other = other[key]
            value = json.loads(json.dumps(other))
        if gone:
            del holder[at[-1]]
        else:
            holder[at[-1]] = value
        resealed(where, table, {b"nbfeat": json.dumps(whole).encode()})
        try:
            repr(nbfeat.read(where))
        except RequestError as error:
            refused += 1
            assert_says_what_to_do(str(error))
        try:
            extract(photos.iloc[:2], like=where, images="path")
        except NbfeatError as error:
            assert_says_what_to_do(str(error))

    changed()
    assert refused


# What is kept


def spots(file: Path) -> list[tuple[int, int]]:
    """Return where in a database the values of its rows lie, and their lengths."""
    data = file.read_bytes()
    with contextlib.closing(sqlite3.connect(file)) as db:
        rows = db.execute("SELECT key, value FROM entries").fetchall()
    values = {value for row in rows for value in row}
    return sorted((data.index(value), len(value)) for value in values if value in data)


def shuffled(data: bytes, values: list[tuple[int, int]], chance: random.Random) -> bytes:
    """Return a database some of whose values stand in place of others."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 9)):
        at, length = chance.choice(values)
        there = chance.choice([place for place, size in values if size == length])
        changed[at : at + length] = data[there : there + length]
    return bytes(changed)


def test_a_damaged_cache_never_gives_wrong_features(
    photos: pd.DataFrame, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED_AFTER_NS", 0)
    for number in (3, 9):
        (tmp_path / f"{number}.png").write_bytes(b"no image\xff" + bytes([number]))
        photos.iloc[number, 0] = str(tmp_path / f"{number}.png")
    run = lambda: Extraction(photos, *BLOCKS, images="path").run()
    good = run()
    (file,) = (own_cache / "features").glob("*.sqlite")
    whole, values = file.read_bytes(), spots(file)
    outcomes = dict.fromkeys(("all", "some", "none"), 0)

    @tries(150)
    @given(chance=CHANCE)
    def damaged(chance: random.Random) -> None:
        data = (
            shuffled(whole, values, chance)
            if chance.random() < 0.4
            else mutated(whole, chance, chance.choice((100, 4096)))
        )
        for _ in range(2):
            for one in (own_cache / "features").iterdir():
                one.unlink()
            file.write_bytes(data)
            assert repr(nbfeat.storage)
            nbfeat.storage._repr_html_()
        file.write_bytes(data)
        result = run()
        pd.testing.assert_frame_equal(result.frame, good.frame, check_exact=True)
        pd.testing.assert_frame_equal(result.failures, good.failures)
        for note in result.notes:
            assert_says_what_to_do(note.replace("A new one was started.", "Leave it so."))
        outcomes["none" if not result.cached else "all" if result.cached == good.done - 2 else "some"] += 1

    damaged()
    assert min(outcomes.values()) > 0, outcomes


# Images


FILES = [(kind, data) for kind, ways in image_files().items() for data in ways]


def gives_pixels_or_a_sentence(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch, isolation.pillow_defaults():
        patch.setattr(decode, "MOST_PIXELS", 4_000_000)
        try:
            (pixels,) = read_pixels(data, [PixelSpec(24)], Path())
            assert pixels.shape == (24, 24, 3)
        except nbfeat.ImageError as error:
            text = str(error)
        else:
            text = "fine"
    assert is_a_sentence(text), text


def test_every_format_is_among_the_images() -> None:
    assert {kind for kind, _ in FILES} == {*NAMES, "MPO"}
    for kind, data in FILES:
        assert Image.open(io.BytesIO(data)).format == kind
        gives_pixels_or_a_sentence(data)


@tries(400)
@given(file=some.sampled_from(FILES), chance=CHANCE)
def test_a_damaged_image_gives_pixels_or_a_sentence(file: tuple[str, bytes], chance: random.Random) -> None:
    gives_pixels_or_a_sentence(mutated(file[1], chance))


@tries(400)
@given(file=some.sampled_from(FILES), kept=some.integers(2, 40), rest=some.binary(max_size=300))
def test_a_header_before_anything_gives_pixels_or_a_sentence(file: tuple[str, bytes], kept: int, rest: bytes) -> None:
    gives_pixels_or_a_sentence(file[1][:kept] + rest)


# Processes


def child(module: str, *words: object, folder: Path) -> dict[str, Any]:
    """Run a module of the tests in a process of its own, and return what it says; where that dies, say of what."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)], cwd=folder, capture_output=True, check=False,
        timeout=300 * TIMES,
    )  # fmt: skip
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr.decode(errors='replace')[-3000:]}"
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="memory is measured as Linux does")
def test_two_thousand_damaged_images_are_features_or_failures(tmp_path: Path) -> None:
    said = child("tests.images.images_child", 0, 2000 * TIMES, folder=tmp_path)
    assert said["odd"] == []
    assert {kind for kind, _ in FILES} == set(said["found"])
    for kind, counts in said["found"].items():
        assert set(counts) == {"decoded", "failed"}, kind
    assert sum(sum(counts.values()) for counts in said["found"].values()) == 2000 * TIMES
    # Of more images, one is sooner or later as large as any may be.
    assert said["peak"] < (1_000_000_000 if TIMES == 1 else 2_000_000_000)
    print(json.dumps(said))


def test_loading_and_unloading_a_hundred_times_leaves_nothing_behind(tmp_path: Path) -> None:
    said = child("tests.unload_child", 100 * TIMES, folder=tmp_path)
    assert said["after"] == said["before"]
    assert "ExtractMagics" not in said["after"]["registry"]
    assert said["bytes"] < 20_000_000 * TIMES
    print(json.dumps(said))
