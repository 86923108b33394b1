"""Repeating results of real networks: in a later process, in fewer bits, and of user networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import nbfeat
from nbfeat import NetworkError
from tests.extraction import like_child
from tests.faces import same

BLOCKS = [
    "MobileNet --alpha 0.25 --size 64 --weights random --normalize whiten --components 5",
    "MobileNet --alpha 0.25 --size 64 --weights random --layer conv_pw_3_relu --pooling max --normalize l2",
]


@pytest.mark.slow
def test_another_process_repeats_it_to_the_bit(photos: pd.DataFrame, tmp_path: Path) -> None:
    both = nbfeat.extract(photos, *BLOCKS, images="path", fit_on="split == 'train'")
    train, test = (photos[photos["split"] == name] for name in ("train", "test"))
    nbfeat.extract(train, *BLOCKS, images="path").to_parquet(tmp_path / "train.parquet")
    nbfeat.storage.clear()
    test.to_parquet(tmp_path / "test.parquet")
    told = like_child.run("repeated", str(tmp_path))
    assert told["columns"] == both.columns
    assert told["computed"] == 6
    assert told["notes"] == []
    np.testing.assert_array_equal(np.load(tmp_path / "test.npy"), both.features.loc[test.index])


@pytest.mark.slow
def test_fewer_bits_are_repeated_in_as_few(photos: pd.DataFrame) -> None:
    try:
        both = nbfeat.extract(photos, *BLOCKS, images="path", fit_on="split == 'train'", precision="bfloat16")
    except NetworkError as error:
        pytest.skip(str(error))
    train, test = (photos[photos["split"] == name] for name in ("train", "test"))
    repeated = nbfeat.extract(train, *BLOCKS, images="path", precision="bfloat16").like(test, cache=False)
    assert repeated.precision == "bfloat16"
    same(repeated.features, both.features.loc[test.index])


@pytest.mark.slow
def test_networks_of_the_users_own_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    told = like_child.run("own_networks", str(tmp_path))
    names = {"file": ("net", "net.keras", "weights"), "registered": ("mynet", "MyNet", "weights")}
    for kind, (prefix, name, what) in names.items():
        is_same, refusal = told[kind]
        assert is_same
        assert f"{prefix} was made with {what} {name} (SHA-256 " in refusal
    is_same, refusal = told["with code"]  # has no weights, so its output identifies it
    assert is_same
    assert "own was made with gives SHA-256 " in refusal
