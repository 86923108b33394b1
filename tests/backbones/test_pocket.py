"""Pocket: what is in the package, that it is what the catalog says, and that it works where nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import nbfeat
from nbfeat import RequestError, WeightsError
from nbfeat.backbones import pocket
from nbfeat.backbones.catalog import CATALOG
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import read_pixels
from tests.faces import same

POCKET = CATALOG["Pocket"]
Weights = dict[str, list[np.ndarray]]
HALVING = {"conv1", "block1_conv1", "block2_conv1", "block4_conv1"}  # their stride is 2
SHORTCUTS = {  # the last convolution of each block, and whose output is added to its own
    "block1_conv4": "block1_conv1", "block2_conv4": "block2_conv1", "block3_conv3": "block2_conv4",
    "block4_conv4": "block4_conv1", "block5_conv3": "block4_conv4",
}  # fmt: skip


def test_its_weights_are_small_whole_half_precision_and_of_the_shapes_of_its_layers(
    structures: dict[str, Any],
) -> None:
    assert pocket.WEIGHTS.stat().st_size <= 2_500_000
    assert (POCKET.parameters <= 1_200_000, 64 <= POCKET.size <= 112, POCKET.width <= 512) == (True, True, True)
    weights = pocket.read(POCKET.bundled)
    shapes, before = structures[f"Pocket:{POCKET.size}"]["shapes"], 3
    assert list(weights) == [name for name in shapes if "conv" in name and not name.endswith("_pad")]
    for name, (kernel, bias) in weights.items():
        side, after = kernel.shape[0], shapes[name][-1]
        assert (kernel.shape, bias.shape, side in {1, 3}) == ((side, side, before, after), (after,), True)
        before = after
        assert kernel.dtype == bias.dtype == np.float32
        assert np.isfinite(kernel).all()
        assert np.array_equal(kernel, kernel.astype(np.float16))
    assert sum(array.size for arrays in weights.values() for array in arrays) == POCKET.parameters


@pytest.mark.parametrize("change", ["another byte", "missing", "cut short"])
def test_a_file_that_is_not_the_release_s_is_refused_in_a_sentence(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "pocket.npz"
    content = bytearray(pocket.WEIGHTS.read_bytes())
    content[len(content) // 2] ^= 1
    if change != "missing":
        copy.write_bytes(content if change == "another byte" else content[:1000])
    monkeypatch.setattr(pocket, "WEIGHTS", copy)
    with pytest.raises(WeightsError) as caught:
        pocket.read(POCKET.bundled)
    text = str(caught.value)
    assert str(copy) in text
    assert "Reinstall nbfeat" in text
    assert change == "missing" or POCKET.bundled[:8] in text


def test_features_are_what_the_convolutions_give(photos: pd.DataFrame) -> None:
    """Compute the network once more, with NumPy alone."""
    result = nbfeat.extract(
        photos, "Pocket", "Pocket --layer block1_out --pooling max", images="path", precision="float32"
    )
    pixels = [read_pixels(path, [PixelSpec(POCKET.size, "squash", "bilinear")], Path())[0] for path in photos["path"]]
    maps = by_hand(np.stack(pixels[:4]), pocket.read(POCKET.bundled))
    close(result["pocket"].to_numpy()[:4], maps["top_conv"].mean((1, 2)))
    close(result["pocket_block1_out_max"].to_numpy()[:4], maps["block1_conv4"].max((1, 2)))


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def by_hand(pixels: np.ndarray, weights: Weights) -> dict[str, np.ndarray]:
    x = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    maps: dict[str, np.ndarray] = {}
    for name, (kernel, bias) in weights.items():
        side, stride = len(kernel), 2 if name in HALVING else 1
        edge = side // 2
        padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))
        x = np.einsum("nijchw,hwco->nijo", windows[:, ::stride, ::stride], kernel, optimize=True) + bias
        x = np.maximum(x + maps[SHORTCUTS[name]] if name in SHORTCUTS else x, 0)
        maps[name] = x
    return maps


def test_the_report_says_that_it_is_bundled_and_small(photos: pd.DataFrame) -> None:
    result = nbfeat.extract(photos, "Pocket", images="path")
    assert "80 px squash → Pocket (bundled, small) → end 5×5×512 → average" in repr(result)
    assert result.features.shape == (20, 512)
    assert result.recipe["weights"] == [POCKET.bundled]
    again = nbfeat.extract(photos, "Pocket --weights bundled", images="path", cache=False)
    same(again.features, result.features)


@pytest.mark.slow
def test_its_weights_may_be_random(photos: pd.DataFrame) -> None:
    drawn = nbfeat.extract(photos, "Pocket --weights random", images="path")
    assert "Pocket (random weights)" in repr(drawn)
    assert np.linalg.norm(drawn.features, axis=1).min() > 1e-2
    assert not np.allclose(drawn.features, nbfeat.extract(photos, "Pocket", images="path").features)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("Pocket --weights imagenet", "Pocket has no ImageNet weights: drop `weights`"),
        ("VGG16 --weights bundled", "VGG16 has no bundled weights, only Pocket does: drop `weights`."),
        ("Pocket --alpha 0.5", "Pocket has no width multiplier"),
        ("Pocket --size 16", "`size` must be at least 32 for Pocket, not 16."),
    ],
)
def test_what_it_is_not_is_told(block: str, words: str, photos: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match=words):
        nbfeat.extract(photos, block, images="path")


def test_it_is_suggested_and_never_taken_unasked(photos: pd.DataFrame) -> None:
    with pytest.raises(RequestError) as caught:
        nbfeat.extract(photos, "", images="path")
    text = str(caught.value)
    assert "\n" not in text
    for name in ("`Pocket` (no download)", "`MobileNetV2` (light)", "`ResNet50` (standard)"):
        assert name in text


FRESH = """
import json, pathlib, socket, sys, time
def refuse(*_, **__): raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
begun = time.monotonic()
import nbfeat, pandas
photos = pandas.DataFrame({"path": sorted(map(str, pathlib.Path(sys.argv[1]).glob("*.png")))})
result = nbfeat.extract(photos, "Pocket", images="path")
print(json.dumps({"shape": result.features.shape, "ok": int(result.ok.sum()), "seconds": time.monotonic() - begun}))
"""


def test_it_works_in_a_fresh_process_without_network_and_with_empty_homes(pictures: Path, tmp_path: Path) -> None:
    homes = {name: str(tmp_path / name) for name in ("NBFEAT_HOME", "KERAS_HOME", "HOME", "XDG_CACHE_HOME")}
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, str(pictures)],
        capture_output=True, text=True, check=False, env={**os.environ, **homes, **proxies},
    )  # fmt: skip
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert (found["shape"], found["ok"]) == ([20, 512], 20)
    assert not done.stderr


@pytest.mark.slow
def test_it_tells_photographs_apart(flowers: pd.DataFrame) -> None:
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    result = nbfeat.extract(flowers, "Pocket", images="path")
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_score(make_pipeline(StandardScaler(), SVC(C=10)), result.features, flowers["label"], cv=folds)
    assert scores.mean() >= 0.70
