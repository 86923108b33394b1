"""Published weights, from a server of this test's own: each way that a download can end."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import nbfeat
from nbfeat import WeightsError
from nbfeat.backbones import weights
from nbfeat.backbones.backbone import Backbone
from nbfeat.backbones.catalog import CATALOG
from nbfeat.extraction.request import network_spec
from nbfeat.inference.compiled_models import located
from tests.backbones.test_alexnet_googlenet import googlenets
from tests.backbones.torch_files import checkpoint
from tests.fake import to_its_end
from tests.web import Answer, Request, Web


def sent(data: bytes, way: str) -> Answer:
    """Send a file in the `way` that a test asks for."""

    def answer(request: Request) -> None:
        request.begin(200, **({} if way == "without a length" else {"Content_Length": str(len(data))}))
        half = len(data) // 2
        request.wfile.write(data[:half])
        if way == "stalled":
            request.server.closing.wait(1)
        for start in range(half, half if way in {"cut", "stalled"} else len(data), max(1, half // 4)):
            time.sleep(0.05 if way == "slow" else 0)
            request.wfile.write(data[start : start + max(1, half // 4)])

    return answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Web]:
    """Run a server in place of PyTorch's."""
    with Web() as server:
        monkeypatch.setattr(weights, "HOST", server.url(""))
        monkeypatch.setattr(weights, "PATIENCE", 0.2)
        monkeypatch.setattr(weights, "NOTE_EVERY", 0.0)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server


DATA = np.random.default_rng(0).bytes(100_000)


@pytest.fixture
def backbone(server: Web, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    return publish(DATA, server, monkeypatch)


def publish(data: bytes, server: Web, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    digits = hashlib.sha256(data).hexdigest()[:8]
    name = f"googlenet-{digits}.pth"
    server.put(f"/{name}", data)
    backbone = replace(CATALOG["GoogLeNet"], published=name, sha256=digits)
    monkeypatch.setitem(CATALOG, "GoogLeNet", backbone)
    return backbone


def fetched(backbone: Backbone, folder: Path) -> tuple[list[str], Path]:
    return to_its_end(weights.fetch(backbone, folder))


@pytest.fixture
def folder(own_cache: Path) -> Path:
    folder = own_cache / "weights"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("way", ["whole", "slow", "without a length"])
def test_a_file_that_comes_whole_is_kept_and_not_fetched_again(
    backbone: Backbone, server: Web, folder: Path, way: str
) -> None:
    server.put(f"/{backbone.published}", sent(DATA, way))
    told, path = fetched(backbone, folder)
    assert told[0] == f"downloading {backbone.published} (once; it is saved in {folder})"
    assert (f"downloading {backbone.published}: 0 of 0 MB" in told) == (way != "without a length")
    assert path.read_bytes() == DATA
    assert list(folder.iterdir()) == [path]
    assert fetched(backbone, folder) == ([], path)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("404", "the server answered 404 Not Found"),
        ("cut", "the connection ended after 50,000 of 100,000 bytes"),
        ("stalled", "no data for 0.2 seconds"),
        ("another file", "the server sent a different file: its SHA-256 starts with "),
        ("too large", "it is larger than 60,000 bytes"),
        ("nobody there", "Connection refused"),
    ],
)
def test_a_download_that_fails_is_one_sentence_and_leaves_nothing(
    backbone: Backbone, server: Web, folder: Path, way: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put(f"/{backbone.published}", sent(DATA[::-1] if way == "another file" else DATA, way))
    if way == "404":
        server.answers.clear()
    elif way == "too large":
        monkeypatch.setattr(weights, "LARGEST", 60_000)
    elif way == "nobody there":
        monkeypatch.setattr(weights, "HOST", "http://127.0.0.1:9")
    with pytest.raises(WeightsError) as caught:
        fetched(backbone, folder)
    text = str(caught.value)
    assert reason in text
    assert "\n" not in text
    assert text.endswith(
        f"Download {weights.HOST}/{backbone.published} and save it as {folder / backbone.published}, or use "
        "`weights='random'` to try things out."
    )
    assert not list(folder.iterdir())


def test_a_download_that_is_stopped_leaves_nothing(backbone: Backbone, server: Web, folder: Path) -> None:
    server.put(f"/{backbone.published}", sent(DATA, "slow"))
    fetching = weights.fetch(backbone, folder)
    assert len(list(itertools.islice(fetching, 2))) == 2
    assert len(list(folder.iterdir())) == 1
    fetching.close()
    assert not list(folder.iterdir())


def test_a_file_that_is_here_needs_no_network(
    backbone: Backbone, server: Web, folder: Path, tmp_path: Path, own_cache: Path
) -> None:
    assert weights.on_this_machine(backbone) is None
    torchs = tmp_path / "torch" / "hub" / "checkpoints" / backbone.published
    torchs.parent.mkdir(parents=True)
    torchs.write_bytes(DATA[:-1])
    assert weights.on_this_machine(backbone) is None, "it is not whole"
    torchs.write_bytes(DATA)
    assert weights.on_this_machine(backbone) == torchs
    by_hand = own_cache / "weights" / backbone.published
    shutil.copy(torchs, by_hand)
    assert weights.on_this_machine(backbone) == by_hand
    assert server.asked == []
    assert list(folder.iterdir()) == [by_hand]


def test_keras_fetches_its_own(server: Web) -> None:
    block = nbfeat.FeatureBlock.parse("MobileNet")[0]
    with pytest.raises(StopIteration) as end:
        next(located(network_spec(block, cuts=())))
    assert end.value.value[1] is None
    assert server.asked == []


@pytest.mark.slow
def test_checkpoints_are_for_the_networks_that_have_them(photos: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "mobilenet.pth"
    file.write_bytes(checkpoint({"conv.weight": np.ones((1, 1), np.float32)}))
    with pytest.raises(
        WeightsError, match=r"mobilenet.pth is a PyTorch checkpoint, which works only for AlexNet, Goog"
    ):
        nbfeat.extract(photos, f"MobileNet --size 64 --weights {file}", images="path")
    with pytest.raises(WeightsError, match=r"These weights don't belong to GoogLeNet: conv1.conv.weight is missing"):
        nbfeat.extract(photos, f"GoogLeNet --size 64 --weights {file}", images="path")
    file.write_bytes(b"no checkpoint")
    with pytest.raises(
        WeightsError, match=r"mobilenet.pth cannot be read as PyTorch weights: it is not a PyTorch checkpoint"
    ):
        nbfeat.extract(photos, f"GoogLeNet --size 64 --weights {file}", images="path")


def drawn(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Draw weights of the shapes of `state` that keep features within reason."""
    generator = np.random.default_rng(0)
    found = {}
    for name, array in state.items():
        spread = np.sqrt(2 / max(1, array[0].size)) if array.ndim > 1 else 0.1
        centre = 1 if name.endswith(("running_var", "bn.weight")) else 0
        found[name] = (
            generator.normal(centre, spread, array.shape).astype("float32").clip(*((0.5, 2) if centre else (-9, 9)))
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("home", ["usable", "in the way"])
def test_the_whole_way_from_the_server_to_features(
    server: Web, photos: pd.DataFrame, own_cache: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = checkpoint(drawn(googlenets()))
    backbone = publish(data, server, monkeypatch)
    (own_cache / "networks").unlink()
    if home == "in the way":
        own_cache.rmdir()
        own_cache.write_text("")
    steps = [step.note for step in nbfeat.Extraction(photos, "GoogLeNet --size 64", images="path").steps() if step.note]
    assert steps[0].startswith(f"downloading {backbone.published}")
    result = nbfeat.extract(photos, "GoogLeNet --size 64", images="path")
    assert result.features.shape == (20, 1024)
    assert result.features.std().max() > 0
    if home == "usable":
        assert len(server.asked) == 1
        assert result.recipe["weights"] == [hashlib.sha256(data).hexdigest()]
        file = own_cache / "weights" / backbone.published
        named = nbfeat.extract(photos, f"GoogLeNet --size 64 --weights {file}", images="path")
        np.testing.assert_array_equal(named.features.to_numpy(), result.features.to_numpy())


KERAS = "_weights_tf_dim_ordering_tf_kernels_notop.h5"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (f"resnet50{KERAS}", "ResNet50"),
        (f"resnet50v2{KERAS}", "ResNet50V2"),
        (f"inception_v3{KERAS}", "InceptionV3"),
        (f"inception_resnet_v2{KERAS}", "InceptionResNetV2"),
        (f"densenet121{KERAS}", "DenseNet121"),
        ("mobilenet_1_0_224_tf_no_top.h5", "MobileNet"),
        ("mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5", "MobileNetV2"),
        ("weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5", "MobileNetV3Small"),
        ("nasnet_large_no_top.h5", "NASNetLarge"),
        ("efficientnetb0_notop.h5", "EfficientNetB0"),
        ("efficientnetv2-b0_notop.h5", "EfficientNetV2B0"),
        ("efficientnetv2-l_notop.h5", "EfficientNetV2L"),
        ("convnext_large_notop.h5", "ConvNeXtLarge"),
        ("convnext_xlarge_notop.h5", "ConvNeXtXLarge"),
        ("vgg16_weights_tf_dim_ordering_tf_kernels.h5", ""),  # with the classifier
        ("mobilenet_5_0_224_tf_no_top.h5", ""),  # alpha 0.5
        ("mobilenet_1_0_128_tf_no_top.h5", ""),
    ],
)
def test_what_is_downloaded_is_told_by_the_names_that_keras_gives(
    file: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("KERAS_HOME", "NBFEAT_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    others = [one for one in CATALOG.values() if not one.requirement]
    assert weights.downloaded(others) == set()
    (tmp_path / "KERAS_HOME" / "models").mkdir(parents=True)
    (tmp_path / "KERAS_HOME" / "models" / file).touch()
    assert weights.downloaded(others) == {name} - {""}


@pytest.mark.parametrize("folder", ["NBFEAT_HOME/weights", "TORCH_HOME/hub/checkpoints"])
def test_published_checkpoints_are_told_by_their_names(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("KERAS_HOME", "NBFEAT_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / CATALOG["GoogLeNet"].published).touch()
    installed = {name for name, one in CATALOG.items() if one.requirement and weights.on_this_machine(one)}
    assert weights.downloaded(CATALOG.values()) == {"GoogLeNet", *installed}
