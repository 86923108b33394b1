"""An earlier result is repeated on other images: the same numbers to the bit, or a sentence that says what differs."""

from __future__ import annotations

import pandas as pd
import pytest

from nbfeat import extract
from nbfeat.features.recipe import Recipe
from tests.faces import same

pytestmark = pytest.mark.usefixtures("fake_network")
BLOCK = "MobileNet --size 32"
NORMALIZATIONS = (
    "", "--normalize l2", "--normalize standard", "--normalize minmax", "--components 5",
    "--normalize l2 --components 1", "--normalize standard --components 13", "--normalize whiten --components 6",
)  # fmt: skip


def halves(photos: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    return photos[photos["split"] == "train"], photos[photos["split"] == "test"]


@pytest.mark.parametrize("words", NORMALIZATIONS)
def test_features_are_those_of_one_run_over_both_frames(photos: pd.DataFrame, words: str) -> None:
    train, test = halves(photos)
    both = extract(photos, f"{BLOCK} {words}", images="path", fit_on="split == 'train'")
    result = extract(train, f"{BLOCK} {words}", images="path")
    repeated = result.like(test)
    same(repeated.features, both.features.loc[test.index])
    same(result.features, both.features.loc[train.index])
    for count in (1, 3):
        same(result.like(test.iloc[:count]).features, both.features.loc[test.index[:count]])
    same(extract(test, like=Recipe.of(result)).features, repeated.features)
