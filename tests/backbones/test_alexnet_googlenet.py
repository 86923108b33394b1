"""The networks that Keras lacks: their structure, published weights converted, the numbers of the original networks.

The last needs torchvision and efficientnet-lite-pytorch, here or in the Python that ``NBFEAT_TORCH_PYTHON`` names.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import nbfeat
from nbfeat.backbones import alexnet, efficientnet_lite, googlenet, torch_weights, weights
from nbfeat.backbones.catalog import CATALOG
from nbfeat.errors import WeightsError
from nbfeat.inference.compiled_models import prepare
from nbfeat.inference.engines.openvino import OpenVINOEngine
from nbfeat.inference.prepared import vectors_of
from nbfeat.inference.spec import Cut, NetworkSpec
from tests import keras_child
from tests.backbones.conftest import BUILT
from tests.conftest import ROOT
from tests.fake import to_its_end

# Sides of the customary maps of the original networks, for images of these sizes.
SIDES = {
    ("AlexNet", 224): [55, 27, 27, 13, 13, 13, 13, 6],
    ("AlexNet", 63): [15, 7, 7, 3, 3, 3, 3, 1],
    ("GoogLeNet", 224): [112, 56, 28, 28, 14, 14, 14, 14, 14, 7, 7],
    ("GoogLeNet", 208): [104, 52, 26, 26, 13, 13, 13, 13, 13, 7, 7],
    ("GoogLeNet", 193): [97, 48, 24, 24, 12, 12, 12, 12, 12, 6, 6],
    ("GoogLeNet", 15): [8, 4, 2, 2, 1, 1, 1, 1, 1, 1, 1],
    ("EfficientNetLite0", 224): [112, 56, 28, 14, 14, 7, 7, 7],
    ("EfficientNetLite0", 193): [97, 49, 25, 13, 13, 7, 7, 7],
    ("EfficientNetLite1", 64): [32, 16, 8, 4, 4, 2, 2, 2],
    ("EfficientNetLite1", 240): [120, 60, 30, 15, 15, 8, 8, 8],
    ("EfficientNetLite2", 33): [17, 9, 5, 3, 3, 2, 2, 2],
    ("EfficientNetLite2", 260): [130, 65, 33, 17, 17, 9, 9, 9],
}
LINEAR = ("_add", "_project_bn")  # ends of the names of layers without an activation

ALEXNET, GOOGLENET = CATALOG["AlexNet"], CATALOG["GoogLeNet"]


@pytest.mark.parametrize("built", BUILT)
def test_layers_have_the_shapes_of_the_originals_and_the_table(built: str, structures: dict[str, Any]) -> None:
    name, _, side = built.partition(":")
    backbone, found = CATALOG[name], structures[built]
    maps = {layer.name: layer for layer in backbone.layers if layer.stride}
    sides = SIDES.get((name, int(side))) or [int(side) // layer.stride for layer in maps.values()]
    shapes = {layer: [side, side, maps[layer].channels] for layer, side in zip(maps, sides, strict=True)}
    shapes |= {layer.name: [layer.channels] for layer in backbone.layers if not layer.stride}
    assert {layer: found["shapes"][layer] for layer in shapes} == shapes
    assert {layer: found["negative"][layer] for layer in shapes} == {name: name.endswith(LINEAR) for name in shapes}
    end = backbone.end or list(found["shapes"])[-1]
    assert (end, shapes[end][-1]) == (list(maps)[-1], backbone.width)
    if int(side) == backbone.size:
        assert backbone.parameters == found["parameters"]
        assert [layer.stride for layer in maps.values()] == [2 ** round(np.log2(int(side) / map_)) for map_ in sides]


def test_layers_after_the_end_are_listed_and_customary() -> None:
    table = nbfeat.layers("AlexNet")
    assert list(table.index[-5:]) == ["pool5", "avgpool", "flatten", "fc6", "fc7"]
    assert table.loc["pool5", "shape"] == "6 × 6 × 256"
    assert list(table.loc[["flatten", "fc6", "fc7"], "flatten"]) == [9216, 4096, 4096]
    assert [str(width) for width in table.loc[["conv1", "pool5", "fc6"], "avg, max, gem"]] == ["64", "256", "<NA>"]
    assert list(table.index[table["customary"]]) == [layer.name for layer in CATALOG["AlexNet"].layers]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("AlexNet", ["pool5", "fc6", "fc7"]), ("GoogLeNet", ["inception_5b"])])
def test_random_weights_give_features_of_a_sane_scale(name: str, layers: list[str], photos: pd.DataFrame) -> None:
    block = f"{name} --size 96 --weights random"
    found = nbfeat.extract(photos, block, f"{block} --layer {','.join(layers)}", images="path")
    end = found[name.lower()].to_numpy()
    assert end.shape == (20, CATALOG[name].width)
    assert np.array_equal(end, found[f"{name.lower()}_{layers[0]}"].to_numpy())
    for layer in layers:
        features = found[f"{name.lower()}_{layer}"].to_numpy()
        assert 1e-2 < np.linalg.norm(features, axis=1).min() <= np.linalg.norm(features, axis=1).max() < 1e4
        assert features.std(axis=0).max() > 1e-3, "every image gives the same"


def ones(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: np.broadcast_to(np.float32(1), shape) for name, shape in shapes.items()}


def alexnets() -> dict[str, np.ndarray]:
    weights = {
        "features.0": (64, 3, 11, 11), "features.3": (192, 64, 5, 5), "features.6": (384, 192, 3, 3),
        "features.8": (256, 384, 3, 3), "features.10": (256, 256, 3, 3), "classifier.1": (4096, 9216),
        "classifier.4": (4096, 4096), "classifier.6": (1000, 4096),
    }  # fmt: skip
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    return ones({**shapes, **{f"{name}.bias": shape[:1] for name, shape in weights.items()}})


def googlenets() -> dict[str, np.ndarray]:
    weights = {"conv1": (64, 3, 7, 7), "conv2": (64, 64, 1, 1), "conv3": (192, 64, 3, 3)}
    for part, (before, *after) in {
        "3a": (192, 64, 96, 128, 16, 32, 32), "3b": (256, 128, 128, 192, 32, 96, 64),
        "4a": (480, 192, 96, 208, 16, 48, 64), "4b": (512, 160, 112, 224, 24, 64, 64),
        "4c": (512, 128, 128, 256, 24, 64, 64), "4d": (512, 112, 144, 288, 32, 64, 64),
        "4e": (528, 256, 160, 320, 32, 128, 128), "5a": (832, 256, 160, 320, 32, 128, 128),
        "5b": (832, 384, 192, 384, 48, 128, 128),
    }.items():  # fmt: skip
        befores = (before, before, after[1], before, after[3], before)
        for branch, inputs, outputs in zip(("1", "2.0", "2.1", "3.0", "3.1", "4.1"), befores, after, strict=True):
            side = 3 if branch in {"2.1", "3.1"} else 1  # in branch 3 too: torchvision's "5x5" are 3 × 3
            weights[f"inception{part}.branch{branch}"] = (outputs, inputs, side, side)
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1000, 1024), "aux1.conv.conv.weight": (128, 512, 1, 1)}
    for name, shape in weights.items():
        shapes[f"{name}.conv.weight"] = shape
        norms = ("weight", "bias", "running_mean", "running_var")
        shapes.update({f"{name}.bn.{norm}": shape[:1] for norm in norms}, **{f"{name}.bn.num_batches_tracked": ()})
    return ones(shapes)


def test_every_layer_gets_its_weights_and_nothing_else(structures: dict[str, Any]) -> None:
    lite = CATALOG["EfficientNetLite0"]
    file = weights.on_this_machine(lite)
    assert file is not None
    for name, found in (
        ("AlexNet", alexnet.weights_from(ALEXNET, alexnets())),
        ("GoogLeNet", googlenet.weights_from(GOOGLENET, googlenets())),
        ("EfficientNetLite0", efficientnet_lite.weights_from(lite, torch_weights.read(file))),
    ):
        assert sum(array.size for arrays in found.values() for array in arrays) == CATALOG[name].parameters
        assert set(found) <= set(structures[f"{name}:224"]["shapes"])
        assert {array.dtype for arrays in found.values() for array in arrays} == {np.dtype("float32")}


def test_kernels_turn_and_batch_norms_keep_their_order() -> None:
    state = googlenets()
    kernel = np.random.default_rng(0).normal(size=(64, 3, 7, 7)).astype("float32")
    state["conv1.conv.weight"] = kernel
    for number, part in enumerate(("weight", "bias", "running_mean", "running_var")):
        state[f"conv1.bn.{part}"] = np.full(64, number, np.float64)  # Keras: gamma, beta, mean, variance
    found = googlenet.weights_from(GOOGLENET, state)
    np.testing.assert_array_equal(found["conv1_conv"][0][4, 5, 2, 33], kernel[33, 2, 4, 5], strict=True)
    assert [array[0] for array in found["conv1_bn"]] == [0, 1, 2, 3]


def test_fc6_reads_the_map_in_keras_order() -> None:
    state = alexnets()
    places = np.arange(9216, dtype=np.float32)  # channels, rows, columns, as PyTorch flattens
    state["classifier.1.weight"] = np.broadcast_to(places, (4096, 9216))
    in_keras_order = places.reshape(256, 6, 6).transpose(1, 2, 0).ravel()
    assert np.array_equal(alexnet.weights_from(ALEXNET, state)["fc6"][0][:, 7], in_keras_order)


def test_the_first_array_that_is_missing_or_of_another_shape_is_named() -> None:
    state, others = googlenets(), alexnets()
    del state["inception4c.branch3.1.bn.running_var"], state["inception5a.branch1.conv.weight"]
    with pytest.raises(WeightsError) as caught:
        googlenet.weights_from(GOOGLENET, state)
    assert str(caught.value) == (
        "These weights don't belong to GoogLeNet: inception4c.branch3.1.bn.running_var is missing. "
        "Use the published file, googlenet-1378be20.pth."
    )
    with pytest.raises(WeightsError, match=r"to AlexNet: features\.0\.weight is missing"):
        alexnet.weights_from(ALEXNET, state)
    # The tower of 2012 as others publish it has 96 kernels.
    others["features.0.weight"] = np.ones((96, 3, 11, 11), np.float32)
    with pytest.raises(WeightsError) as caught:
        alexnet.weights_from(ALEXNET, others)
    assert str(caught.value) == (
        "These weights don't fit AlexNet: features.0.weight is 96 × 3 × 11 × 11, not 64 × 3 × 11 × 11. "
        "Use the published file, alexnet-owt-7be5be79.pth."
    )
    state["conv1.bn.bias"] = np.ones((), np.float32)
    with pytest.raises(WeightsError, match=r"conv1\.bn\.bias is a single number, not 64"):
        googlenet.weights_from(GOOGLENET, state)


def python_with(*modules: str) -> str:
    """Return the interpreter that has the original networks, or skip."""
    if named := os.environ.get("NBFEAT_TORCH_PYTHON"):
        return named
    if all(map(importlib.util.find_spec, modules)):
        return sys.executable
    pytest.skip(f"{modules[-1]} is not installed: set NBFEAT_TORCH_PYTHON to a Python that has it")


@pytest.fixture(scope="module", params=sorted({name for name, _ in SIDES}))
def originals(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    """Return a network's name, and a folder with what the original and Keras give with the same weights."""
    name, sizes = request.param, [str(size) for name, size in SIDES if name == request.param]
    python = python_with("torch", "efficientnet_lite_pytorch" if "Lite" in name else "torchvision")
    program = [python, str(ROOT / "tests" / "backbones" / "torchvision_child.py")]
    real = weights.on_this_machine(CATALOG[name]) if "Lite" in name else None
    named = f"{name}={real}" if real else name
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*program, named, folder, *sizes], capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr[-2000:]
        assert keras_child.run("from_torch", name, folder, *sizes) == {"weights": "row.pth"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NBFEAT_HOME", folder)  # hundreds of megabytes that go when the test ends
            yield name, Path(folder)


def on_openvino(spec: NetworkSpec, pixels: np.ndarray) -> dict[str, np.ndarray]:
    return vectors_of(OpenVINOEngine(to_its_end(prepare(spec))[1], precision="float32", batch_size=len(pixels)), pixels)


@pytest.mark.slow
def test_every_customary_layer_gives_what_the_original_gives(originals: tuple[str, Path]) -> None:
    name, folder = originals
    backbone, sizes = CATALOG[name], [size for of, size in SIDES if of == name]
    for size in sizes:
        theirs = np.load(folder / f"{size}.npz")
        spec = keras_child.torch_spec(name, folder / "zip.pth", size)
        with np.load(folder / f"keras-{size}.npz") as saved:
            ours = {"Keras": dict(saved), "OpenVINO": on_openvino(spec, theirs["pixels"])}
        for engine, found in ours.items():
            assert set(found) == {cut.key for cut in spec.cuts}
            for layer in backbone.layers:
                expected = theirs[layer.name].reshape(2, -1)
                assert expected.std() > 0.1
                key = Cut(layer.name, "flatten" if layer.stride else "").key
                assert np.abs(found[key] - expected).max() <= 1e-4, f"{name} at {size}, {layer.name}, on {engine}"
            end = backbone.end or backbone.layers[-1].name
            assert np.array_equal(found["end:flatten"], found[Cut(end, "flatten").key])
