"""Files, recipes and caches that are damaged or changed are read right, or refused in a sentence."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as some
from pyarrow import parquet

import nbfeat
from nbfeat import Extraction, NbfeatError, RequestError, extract
from nbfeat.extraction import sink
from nbfeat.extraction.recipe import pack
from nbfeat.images import fingerprint
from nbfeat.parquet.result_file import Failure
from tests.messages import assert_says_what_to_do
from tests.mutations import TIMES, mutated
from tests.parquet.test_parquet import resealed
from tests.robustness.tries import CHANCE, Trials, tries

pytestmark = [pytest.mark.usefixtures("fake_network"), pytest.mark.slow, pytest.mark.robustness]
BLOCKS = ("MobileNet --size 32 --normalize standard", "MobileNet --size 32 --layer conv1 --normalize l2")


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
def test_a_damaged_file_is_read_right_or_refused(
    photos: pd.DataFrame, tmp_path: Path, trials: Trials, kind: str
) -> None:
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
    trials[f"damaged {kind}s"] = outcomes["like refused"] + outcomes["like right"]
    assert trials.total() >= 150 * TIMES


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


def test_a_recipe_that_says_something_else_is_taken_or_refused(
    photos: pd.DataFrame, tmp_path: Path, trials: Trials
) -> None:
    where = written(photos, "file", tmp_path)
    table, recipe = parquet.read_table(where), json.loads(parquet.read_metadata(where).metadata[b"nbfeat"])
    spots = list(places(recipe))
    refused = 0

    @tries(120)
    @given(at=some.sampled_from(spots), value=JSON | some.sampled_from(spots), gone=some.booleans())
    def changed(at: tuple[Any, ...], value: Any, *, gone: bool) -> None:
        nonlocal refused
        trials["changed recipes"] += 1
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
    assert trials.total() >= 120 * TIMES


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
    photos: pd.DataFrame, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: Trials
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
        trials["damaged caches"] += 1
        outcomes["none" if not result.cached else "all" if result.cached == good.done - 2 else "some"] += 1

    damaged()
    assert min(outcomes.values()) > 0, outcomes
    assert trials.total() >= 150 * TIMES
