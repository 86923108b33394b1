"""What is asked for, read into networks, pixels, rows and columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import nbfeat
from nbfeat import Extraction, FeatureBlock, RequestError
from nbfeat.extraction.request import network_spec, networks_of, read_blocks
from nbfeat.inference.spec import Cut

pytestmark = pytest.mark.usefixtures("fake_network")
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


@pytest.mark.parametrize(
    "query",
    [
        "n.to_csv('stolen')", "path.str.len() > 3", "abs(n) > 1", "split.values == 'train'", "x = n.to_csv('stolen')",
        "@n > 1", "n > 1\nn.to_csv('stolen')", "(n)[0].real > 1", "`my col`.abs() > 1", "'a`'.join(split) == split",
    ],
)  # fmt: skip
def test_a_query_calls_nothing(
    photos: pd.DataFrame, query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    frame = photos.assign(n=range(20), **{"my col": range(20)})
    with pytest.raises(RequestError, match=r"`fit_on` .* can.t be evaluated on the frame"):
        Extraction(frame, "MobileNet", images="path", fit_on=query)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("n > 3 and split in ('train', 'test')", 16), ("not (n > 3 or n < 1)", 3), ("`my col` == 3", 1),
        ("label == 'a.b(c)'", 2), ('label == "x`y`.z()"', 3), ("~(n > 3) & (n != 2)", 3), (" n * 2 > 30", 4),
    ],
)  # fmt: skip
def test_a_query_compares(photos: pd.DataFrame, query: str, rows: int) -> None:
    labels = ["a.b(c)"] * 2 + ["x`y`.z()"] * 3 + ["c"] * 15
    frame = photos.assign(n=range(20), label=labels, **{"my col": range(20)})
    assert Extraction(frame, "MobileNet", images="path", fit_on=query).request.fit_count == rows


def test_a_working_folder_that_is_gone_disturbs_no_absolute_path(
    photos: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = Extraction(photos, "MobileNet --size 32", images="path").run()
    assert result.failures.empty
    result.to_parquet(tmp_path / "result.parquet")
    assert nbfeat.read(tmp_path / "result.parquet").columns == result.columns
    assert len(nbfeat.similar(result, to=photos.index[0], k=3).frame) == 3
    nbfeat.ImageFeatures("MobileNet --size 32").fit(photos["path"])
    lost = Extraction(photos.assign(path="relative.jpg"), "MobileNet --size 32", images="path")
    with pytest.raises(nbfeat.ExtractionError, match="Relative paths start at /: set a different folder with `root`"):
        lost.run()
    monkeypatch.chdir(tmp_path)


def test_attributes_of_the_frame_are_kept(photos: pd.DataFrame) -> None:
    photos.attrs["source"] = ["a survey"]
    result = Extraction(photos, "MobileNet --size 32", images="path").run()
    assert result.frame.attrs == {"source": ["a survey"]}
    result.frame.attrs["source"].append("changed")
    assert photos.attrs == {"source": ["a survey"]}
