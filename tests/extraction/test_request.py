"""What is asked for, read into networks, pixels, rows and columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from nbfeat import Extraction, FeatureBlock
from nbfeat.extraction.request import network_spec, networks_of, read_blocks
from nbfeat.inference.spec import Cut

MOBILENET = {"backbone": "MobileNet", "alpha": None, "weights": "imagenet", "scaling": "tf", "size": 224, "cuts": ()}


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ("", {}), ("--pooling max --normalize l2 --layer conv1", {}), ("--scaling none", {"scaling": "none"}),
        ("--size 96", {"size": 96}), ("--alpha 1.0", {}), ("--alpha 0.25", {"alpha": 0.25}),
        ("--weights random", {"weights": "random"}),
    ],
)  # fmt: skip
def test_a_network_is_what_its_block_says_or_the_backbones_own(options: str, differs: dict[str, Any]) -> None:
    spec = network_spec(FeatureBlock.parse(f"MobileNet {options}")[0])
    assert {name: getattr(spec, name) for name in MOBILENET} == {**MOBILENET, **differs}


def test_blocks_that_differ_in_their_cut_alone_are_one_network() -> None:
    texts = ["MobileNet", "mobilenet --layer conv1 --pooling max", "MobileNet --normalize l2", "MobileNet --size 96"]
    blocks = read_blocks([[texts[0], FeatureBlock.parse(texts[1])[0]], texts[2], [texts[3]]], {})
    (first, apart), members = zip(*networks_of(blocks).items(), strict=True)
    assert members == (blocks[:3], blocks[3:])
    assert first[0].cuts == (Cut(), Cut("conv1", "max"))
    assert (first[1].size, apart[1].size) == (224, 96)


def test_rows_and_images_are_those_of_the_frame(photos: pd.DataFrame) -> None:
    photos["back"] = list(photos["path"])[::-1]
    blocks = ["MobileNet --size 32", "VGG16 --size 32"]
    request = Extraction(photos, blocks, images=["path", "back"], fit_on="split == 'train'").request
    assert request.fit_count == 14
    assert request.images == [*photos["path"], *photos["back"]]
    assert request.images[request.images_of("back")] == list(photos["back"])
    assert [(part.network_index, part.column) for part in request.parts] == [
        (0, "path"), (0, "back"), (1, "path"), (1, "back"),
    ]  # fmt: skip
    assert Extraction(photos, blocks, images="path").request.fit_count is None
    mask = np.arange(20) < 3
    assert Extraction(photos, blocks, images="path", fit_on=list(mask)).request.fit_count == 3
