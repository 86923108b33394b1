"""The table of backbones: looking things up, and whether it still says what Keras does."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from nbfeat.backbones.backbone import SCALINGS, Backbone
from nbfeat.backbones.catalog import CATALOG, backbones, find
from nbfeat.errors import RequestError
from tests import keras_child

WRITTEN_HERE = {"AlexNet", "GoogLeNet", "EfficientNetLite0", "EfficientNetLite1", "EfficientNetLite2"}


def test_names_families_and_layers_are_consistent() -> None:
    assert len(CATALOG) == 40 + len(WRITTEN_HERE)
    assert len({backbone.family for backbone in CATALOG.values()}) == 16
    assert {name for name, backbone in CATALOG.items() if backbone.package != "keras.applications"} == WRITTEN_HERE
    for name, backbone in CATALOG.items():
        assert backbone.name == name
        assert backbone.scaling in SCALINGS
        assert backbone.smallest < backbone.size
        names = [layer.name for layer in backbone.layers]
        assert len(set(names)) == len(names) >= 4
        assert backbone.end in {"", *names}
        strides = [layer.stride for layer in backbone.layers if layer.stride]
        assert strides == sorted(strides)
        assert {8, 16, 32} <= set(strides) <= {2, 4, 8, 16, 32}


def test_find_takes_any_case_and_names_what_is_near_and_where_all_are() -> None:
    assert find("ResNet50") is find("resnet50") is find("RESNET50") is CATALOG["ResNet50"]
    with pytest.raises(
        RequestError, match=r"^Backbone 'Resnet5' not found\. Did you mean ResNet50.*`nbfeat\.backbones\(\)` lists"
    ):
        find("Resnet5")
    for name in ("", "*", "Grüße", "<img src=x>"):
        with pytest.raises(RequestError) as caught:
            find(name)
        assert str(caught.value) == f"Backbone {name!r} not found. `nbfeat.backbones()` lists all."


def test_width_at_alpha() -> None:
    assert find("VGG16").width_at(None) == 512
    assert [find("MobileNet").width_at(alpha) for alpha in (None, 0.25, 0.75, 1.0)] == [1024, 256, 768, 1024]
    assert [find("MobileNetV2").width_at(alpha) for alpha in (0.35, 1.0, 1.3, 1.4)] == [1280, 1280, 1664, 1792]
    for name in ("VGG16", "MobileNetV3Small"):
        with pytest.raises(RequestError, match=f"{name} has no width multiplier"):
            find(name).width_at(1.0)
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(RequestError, match=f"`alpha` must be a positive number for MobileNet, not {alpha}"):
            find("MobileNet").width_at(alpha)


def test_backbones_lists_all() -> None:
    table = backbones()
    assert list(table.index) == list(CATALOG)
    assert table.index.name == "backbone"
    columns = ["family", "input size", "width", "parameters", "scaling", "alphas", "layers", "weights"]
    assert list(table.columns) == columns
    assert table.loc["MobileNet", "alphas"] == "0.25, 0.5, 0.75, 1.0"
    assert table.loc["VGG16", "alphas"] == ""
    assert table.loc["VGG16", "layers"] == "block1_pool, block2_pool, block3_pool, block4_pool, block5_pool"
    assert table["weights"].to_dict() == dict.fromkeys(CATALOG, "imagenet")


def test_backbones_matches_wildcards_in_any_case_or_names_what_is_near() -> None:
    assert list(backbones("res*").index) == [name for name in CATALOG if name.startswith("ResNet")]
    assert list(backbones("VGG1?").index) == ["VGG16", "VGG19"]
    assert list(backbones("ResNet[15]*V2").index) == ["ResNet50V2", "ResNet101V2", "ResNet152V2"]
    with pytest.raises(RequestError, match=r"No backbone matches 'Rezn\*'.*`nbfeat\.backbones\(\)` lists all\.$"):
        backbones("Rezn*")
    with pytest.raises(RequestError, match=r"Did you mean .*ResNet50"):
        backbones("*ResNet5")


@pytest.mark.slow
def test_the_table_says_what_keras_does() -> None:
    """Build all networks in a child process, so that the user's Keras session is not touched."""
    measured = keras_child.run(backend="openvino", module="tests.backbones.test_catalog")
    declared = {name: _declared(backbone) for name, backbone in CATALOG.items() if name not in WRITTEN_HERE}
    assert sorted(measured) == sorted(declared)
    different = {
        f"{name}, {what}": f"the table says {says}, Keras {measured[name][what]}"
        for name, facts in declared.items()
        for what, says in facts.items()
        if says != measured[name][what]
    }
    assert not different


def _declared(backbone: Backbone) -> dict[str, Any]:
    return {
        "module": backbone.module,
        "size": backbone.size,
        "smaller is refused": True,
        "width": backbone.width,
        "scaling": backbone.scaling,
        "parameters": backbone.parameters,
        "layers": [[layer.name, layer.stride, layer.channels] for layer in backbone.layers],
        "alphas": list(backbone.alphas),
        "widths": [backbone.width_at(alpha) for alpha in backbone.alphas],
        "layers at every alpha": True,
    }


def _measure(backbone: Backbone, sizes: list[int]) -> dict[str, Any]:
    """Build one network at its smallest size and say of it what the table says; `sizes` is where Keras' own is told."""
    import keras

    application = getattr(keras.applications, backbone.name)

    def build(side: int, **options: float) -> keras.Model:
        gc.collect()
        keras.utils.clear_session()  # the layers are named anew
        return application(weights=None, include_top=False, pooling="avg", input_shape=(side, side, 3), **options)

    sizes.clear()
    refused = _refuses(build, backbone.smallest - 1)
    network = build(backbone.smallest)
    # Without padding, maps of few pixels tell little of the stride: 75 pixels of InceptionV3 end as 1, not 3.
    side = backbone.smallest if backbone.smallest == 32 else backbone.size
    maps = {layer.name: layer.output.shape for layer in (network if side == backbone.smallest else build(side)).layers}
    names = [layer.name for layer in backbone.layers if layer.name in maps]
    narrow = {alpha: build(backbone.smallest, alpha=alpha) for alpha in backbone.alphas}
    return {
        "module": application.__module__.rpartition(".")[2],
        # MobileNetV3 never mentions its size to the function that tells; its published weights are for 224 pixels.
        "size": sizes[0] if sizes else {"mobilenet_v3": 224}.get(backbone.module),
        "smaller is refused": refused,
        "width": network.output.shape[-1],
        "scaling": _scaling(backbone.module),
        "parameters": network.count_params(),
        "layers": [[name, _stride(side, maps[name]), maps[name][-1]] for name in names],
        "alphas": _published_alphas(application) if backbone.alphas else [],
        "widths": [model.output.shape[-1] for model in narrow.values()],
        "layers at every alpha": all(set(names) <= {layer.name for layer in model.layers} for model in narrow.values()),
    }


def _refuses(build: Callable[[int], object], side: int) -> bool:
    try:
        build(side)
    except ValueError as error:
        return "at least" in str(error)
    return False


def _stride(side: int, shape: tuple[int | None, ...]) -> int:
    _, height, width, _ = shape
    assert height
    assert height == width
    return int(2 ** round(math.log2(side / height)))


def _scaling(module: str) -> str:
    import numpy as np

    preprocess = importlib.import_module(f"keras.applications.{module}").preprocess_input
    pixels = np.array([[[[0.0, 100.0, 255.0]]]], dtype="float32")
    known = {
        "caffe": pixels[..., ::-1] - [103.939, 116.779, 123.68],
        "tf": pixels / 127.5 - 1,
        "torch": (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
        "none": pixels,
    }
    scaled = preprocess(pixels.copy(), data_format="channels_last")
    return next((name for name, values in known.items() if np.allclose(scaled, values, atol=1e-4)), "another")


def _published_alphas(application: Callable[..., object]) -> list[float]:
    assert "alpha" in inspect.signature(application).parameters
    with pytest.raises(ValueError, match="imagenet weights") as caught:
        application(weights="imagenet", include_top=False, alpha=9.0, input_shape=(224, 224, 3))
    return [float(alpha) for alpha in re.findall(r"`([\d.]+)`", str(caught.value))]


def _measure_all() -> None:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # `import openvino` would report its use
    import keras
    from keras.src.applications import imagenet_utils  # Keras says a network's size nowhere else

    sizes: list[int] = []
    obtain = imagenet_utils.obtain_input_shape

    def obtain_and_tell(*args: object, default_size: int, **options: object) -> object:
        sizes.append(default_size)
        return obtain(*args, default_size=default_size, **options)

    imagenet_utils.obtain_input_shape = obtain_and_tell
    names = [name for name in dir(keras.applications) if name[0].isupper()]
    measured = {name: _measure(CATALOG[name], sizes) if name in CATALOG else {} for name in names}
    print(json.dumps(measured))


if __name__ == "__main__":
    _measure_all()
