"""The networks against Keras itself: its own 40 on Keras, one of each kind on OpenVINO, real weights on both."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import nbfeat
from nbfeat.backbones.catalog import CATALOG
from nbfeat.inference.compiled_models import Preparing
from nbfeat.inference.engines.openvino import OpenVINOEngine
from tests import keras_child
from tests.keras_child import run as keras

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # all of Keras, beside whatever else runs
BIGGEST = ("ConvNeXtXLarge", "ConvNeXtLarge")  # seconds and gigabytes that show nothing the smaller ones do not
NAMES = [name for name, one in CATALOG.items() if one.package == "keras.applications" and name not in BIGGEST]


def smallest_of_each_module() -> list[str]:
    chosen: dict[str, str] = {}
    for name, backbone in CATALOG.items():
        if backbone.parameters < CATALOG.get(chosen.get(backbone.module, ""), backbone).parameters + 1:
            chosen[backbone.module] = name
    return list(chosen.values())


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    """Compare a quarter of the networks in a process, so that memory is given back, and two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        quarters = pool.map(lambda part: keras("ours_and_kerass", *NAMES[part::4]), range(4))
    return {name: found for quarter in quarters for name, found in quarter.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_network_gives_what_keras_own_gives(name: str, compared: dict[str, Any]) -> None:
    found = compared[name]
    assert found["avg"] >= 0.9999
    assert found["max"] >= 0.9999
    assert 1e-3 < found["norm"] < 1e8


def test_pixels_are_normalized_by_the_networks_own_numbers(tmp_path: Path) -> None:
    found = keras("normalizing", str(tmp_path))
    assert found["engine"].startswith("OpenVINO")
    assert found["cosine"] > 0.99999


@pytest.mark.parametrize("name", BIGGEST)
def test_the_biggest_have_the_configuration_of_their_smaller_kin(name: str) -> None:
    kin = CATALOG["ConvNeXtBase"]
    big = CATALOG[name]
    assert (big.module, big.scaling, [layer.stride for layer in big.layers]) == (
        kin.module, kin.scaling, [layer.stride for layer in kin.layers],
    )  # fmt: skip
    assert big.width > kin.width


@pytest.fixture(scope="module")
def on_keras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the vectors of one network of each module, computed by Keras, and the digests of its weights."""
    folder = tmp_path_factory.mktemp("vectors")
    return folder, keras("vectors", str(folder), *smallest_of_each_module())


@pytest.mark.parametrize("name", smallest_of_each_module())
def test_openvino_gives_what_keras_gives(name: str, on_keras: tuple[Path, dict[str, Any]]) -> None:
    spec = keras_child.spec_of(name, *keras_child.cuts_of(name))
    preparing = Preparing(spec)
    assert list(preparing)
    engine = OpenVINOEngine(preparing.result, precision="float32", batch_size=4)
    images = keras_child.pictures(spec.size)
    buffer = engine.buffer()
    buffer[: len(images)] = images
    engine.submit(buffer, len(images))
    ours = engine.collect()
    theirs = np.load(on_keras[0] / f"{name}.npz")
    assert set(ours) == set(theirs.files)
    for key in theirs.files:
        assert ours[key].shape == theirs[key].shape
        assert ours[key].shape[1] == engine.outputs[key].width
        assert keras_child.cosine(ours[key], theirs[key]) >= 0.9999, key
        if not engine.outputs[key].negative:
            assert theirs[key].min() >= 0, key


def test_photographs_give_what_keras_own_way_gives_on_both_engines(flowers: pd.DataFrame, tmp_path: Path) -> None:
    some = flowers.iloc[::12]
    on_tensorflow = keras("photographs", str(tmp_path), *some["path"])
    assert "OpenVINO cannot be imported here, so Keras runs the network" in on_tensorflow.pop("report")
    assert min(on_tensorflow.values()) >= 0.99999, on_tensorflow
    for name, block in (("MobileNetV2", "MobileNetV2"), ("MobileNet", "MobileNet --alpha 0.25")):
        for how in ("bilinear", "nearest"):
            ours = nbfeat.extract(some, block, images="path", interpolation=how, cache=False).features.to_numpy()
            assert keras_child.cosine(ours, np.load(tmp_path / f"{name}-{how}.npy")) >= 0.99999


def test_every_kind_of_file_with_a_classifier_serves_the_network_without(tmp_path: Path) -> None:
    found = keras("files_of_weights", str(tmp_path))
    for kind in ("weights.h5", "keras", "h5", "whole model"):
        assert found[kind]["same"], kind
        refused = found[kind]["refused"]
        assert "do not fit mobilenet_0.50_64: the first layer that differs is conv1: 3 × 3 × 3 × 16 here" in refused
        assert "3 × 3 × 3 × 8 in the file" in refused
    assert "the first layer that differs is block1_conv1, which the file has not" in found["another network"]


@pytest.fixture(params=["tensorflow", "jax", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """Return each backend that Keras can have, where it is installed."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed: pip install '.[{request.param}]'")
    return str(request.param)


def test_the_keras_engine_stops_goes_on_and_pads_the_last_batch(photos: pd.DataFrame, backend: str) -> None:
    found = keras("batches", *photos["path"], backend=backend)
    assert found["cosine"] >= 0.999999
    assert 0 < found["stopped"] < 20
    assert {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}[backend] in found["report"]


def test_the_keras_engine_neither_obeys_nor_changes_the_users_settings(photos: pd.DataFrame, backend: str) -> None:
    found = keras("globals_kept", *photos["path"], backend=backend)
    assert found["same"]
    assert found["kept"]
    assert found["next"] == "activation_1"
