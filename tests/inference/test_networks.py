"""Compare networks with Keras itself: one of each kind on Keras and on OpenVINO, both with real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import nbfeat
from nbfeat.backbones.catalog import CATALOG
from nbfeat.inference.compiled_models import prepare
from nbfeat.inference.engines.openvino import OpenVINOEngine
from nbfeat.inference.prepared import vectors_of
from tests import keras_child
from tests.fake import to_its_end
from tests.keras_child import cosine, run as keras

pytestmark = pytest.mark.slow


def one_of_each_module() -> list[str]:
    """Return the smallest network of each Keras module; the catalog's test checks the rest."""
    smallest: dict[str, str] = {}
    for name, backbone in sorted(CATALOG.items(), key=lambda item: item[1].parameters):
        if backbone.package == "keras.applications" and backbone.module != "vgg19":  # like VGG16
            smallest.setdefault(backbone.module, name)
    return list(smallest.values())


@pytest.fixture(scope="module")
def on_keras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run on Keras; return the folder with the output of Keras' networks, and its similarity to nbfeat's."""
    folder = tmp_path_factory.mktemp("vectors")
    return folder, keras("vectors", str(folder), *one_of_each_module())


@pytest.mark.parametrize("name", one_of_each_module())
def test_keras_and_openvino_give_what_keras_own_network_gives(name: str, on_keras: tuple[Path, dict[str, Any]]) -> None:
    folder, agreement = on_keras
    assert agreement[name]["worst"] >= 0.9999
    assert 1e-3 < agreement[name]["norm"] < 1e8
    spec = keras_child.spec_of(name, *keras_child.cuts_of(name))
    engine = OpenVINOEngine(to_its_end(prepare(spec))[1], precision="float32", batch_size=4)
    ours, theirs = vectors_of(engine, keras_child.pictures(spec.size)), np.load(folder / f"{name}.npz")
    assert set(ours) == set(theirs.files)
    for key in theirs.files:
        assert ours[key].shape == theirs[key].shape
        assert ours[key].shape[1] == engine.outputs[key].width
        assert cosine(ours[key], theirs[key]) >= 0.9999, key
        if not engine.outputs[key].negative:
            assert theirs[key].min() >= 0, key


def test_pixels_are_normalized_by_the_networks_own_numbers(tmp_path: Path) -> None:
    found = keras("normalizing", str(tmp_path))
    assert found["engine"].startswith("OpenVINO")
    assert found["cosine"] > 0.99999


def test_photographs_give_what_keras_own_way_gives_on_both_engines(flowers: pd.DataFrame, tmp_path: Path) -> None:
    some = flowers.iloc[::30]
    on_tensorflow = keras("photographs", str(tmp_path), *some["path"])
    assert "OpenVINO cannot be imported, so Keras runs the network" in on_tensorflow.pop("report")
    assert min(on_tensorflow.values()) >= 0.99999, on_tensorflow
    for name, block, _, how in keras_child.PHOTOGRAPHED:
        ours = nbfeat.extract(some, block, images="path", interpolation=how, cache=False).features.to_numpy()
        assert cosine(ours, np.load(tmp_path / f"{name}.npy")) >= 0.99999


def test_every_kind_of_file_with_a_classifier_serves_the_network_without(tmp_path: Path) -> None:
    found = keras("files_of_weights", str(tmp_path))
    for kind in ("weights.h5", "keras", "h5", "whole model"):
        assert found[kind]["same"], kind
        refused = found[kind]["refused"]
        assert "do not fit mobilenet_0.50_64: the first layer that differs is conv1: 3 × 3 × 3 × 16 here" in refused
        assert "3 × 3 × 3 × 8 in the file" in refused
    assert "the first layer that differs is block1_conv1, which is missing from the file" in found["another network"]
