"""Datasets whose files were cut, emptied, swapped, edited or joined by others: gone on from right, or refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given

import nbfeat
from nbfeat import Extraction, NbfeatError
from nbfeat.extraction import sink
from tests.messages import assert_says_what_to_do
from tests.mutations import TIMES, mutated
from tests.robustness.tries import CHANCE, Trials, tries

pytestmark = [pytest.mark.usefixtures("fake_network"), pytest.mark.slow, pytest.mark.robustness]
BLOCK = "MobileNet --size 32"
EXTRA = (
    "notes.txt", "part-00009.parquet", "part-0.parquet", ".raw/part-00009.npz", ".raw/x", ".DS_Store", "sub/x",
    ".part-00001.parquet-0123abcd", ".raw/.part-00000.npz-0123abcd", "..nbfeat.json-0123abcd", ".nbfeat.json",
    ".nbfeat.lock",
)  # fmt: skip


def cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size + 1)])


def zeroed(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = chance.choice([0, chance.randrange(len(data) or 1)])
    end = chance.choice([len(data), start + chance.randrange(1, 5000)])
    data[start:end] = bytes(len(data[start:end]))
    path.write_bytes(data)


def swapped(path: Path, chance: random.Random) -> None:
    other = chance.choice(sorted(path.parent.glob("*")))
    if other.is_file():
        mine, its = path.read_bytes(), other.read_bytes()
        path.write_bytes(its)
        other.write_bytes(mine)


def changed(path: Path, chance: random.Random) -> None:
    path.write_bytes(mutated(path.read_bytes() or b"x", chance, 4096))


def removed(path: Path, chance: random.Random) -> None:
    path.unlink()


def joined(path: Path, chance: random.Random) -> None:
    extra = path.parent / chance.choice(EXTRA)
    if not extra.parent.is_file():
        extra.parent.mkdir(exist_ok=True)
        extra.write_bytes(chance.choice([b"", b"x" * 100, path.read_bytes()]))


def edited(path: Path, chance: random.Random) -> None:
    """Change the manifest of an unfinished dataset."""
    file = path.parent / ".nbfeat.json"
    if file.is_file():
        try:
            words = json.loads(file.read_bytes())
        except ValueError:
            return
        holder = words["request"] if chance.random() < 0.5 and isinstance(words.get("request"), dict) else words
        if holder:
            values = [None, 0, -1, 10**30, True, "", [], {}, "x", 1.5, [[1]], words.get("chunk"), {"rows": 20}]
            holder[chance.choice(list(holder))] = chance.choice(values)
        file.write_text(json.dumps(words))


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (cut, zeroed, swapped, changed, removed, joined, edited)


def damage(folder: Path, chance: random.Random) -> None:
    """Damage one or two files of a dataset."""
    for work in chance.sample(DAMAGES, chance.choice([1, 1, 2])):
        if files := sorted(path for path in folder.rglob("*") if path.is_file()):
            work(chance.choice(files), chance)


@pytest.mark.parametrize("block", [BLOCK, f"{BLOCK} --normalize standard"], ids=["plain", "fitted"])
def test_a_damaged_dataset_is_gone_on_from_or_refused(
    photos: pd.DataFrame, tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch, block: str
) -> None:
    monkeypatch.setattr(sink, "MOST_ROWS", 6)
    photos = photos.assign(number=range(len(photos)))

    def extraction(folder: Path, *, replace: bool = False) -> Extraction:
        return Extraction(photos, block, images="path", batch_size=3, parquet=folder, replace=replace)

    templates = []
    for steps in (3, 8, 11, 1000):  # begun, nearly done, being normalized, finished
        begun = tmp_path / str(steps)
        for _ in islice(extraction(begun).steps(), steps):
            pass
        templates.append(begun)
    right = nbfeat.read(templates[-1])
    folder = tmp_path / "features"

    def is_right() -> None:
        back = nbfeat.read(folder)
        pd.testing.assert_frame_equal(back.frame[photos.columns], photos)
        np.testing.assert_array_equal(back.features.to_numpy(), right.features.to_numpy())

    def outcome() -> str:
        """Go on, or replace the dataset where that is refused."""
        refused = ""
        for replace in (False, True):
            try:
                extraction(folder, replace=replace).run()
                is_right()
                break
            except NbfeatError as error:
                assert_says_what_to_do(str(error))
                refused = "refused"
        return refused or "repaired"

    @tries(60)
    @given(chance=CHANCE)
    def damaged(chance: random.Random) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(chance.choice(templates), folder)
        damage(folder, chance)
        trials[f"damaged datasets {outcome()}"] += 1

    damaged()
    assert trials.total() >= 60 * TIMES
    assert min(trials.values()) > 5, trials


def test_a_lock_that_holds_anything_is_taken_over(photos: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / ".nbfeat.lock").write_bytes(b"process \xf0\0")
    nbfeat.extract(photos, BLOCK, images="path", parquet=tmp_path / "features")
    assert [path.name for path in (tmp_path / "features").iterdir()] == ["part-00000.parquet"]
