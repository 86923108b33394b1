"""Programs that need Keras, each run in a process of its own: ``python -m tests.keras_child NAME …``.

Each prints one line of JSON at the end.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import h5py
import numpy as np
import pandas as pd

import nbfeat
from nbfeat import isolation
from nbfeat.backbones import keras_weights, weights
from nbfeat.backbones.catalog import CATALOG
from nbfeat.inference.engines import devices
from nbfeat.inference.model import build, load_base, negative_layers
from nbfeat.inference.spec import Cut, NetworkSpec

SMALLEST = 64  # pixels; below it some maps are a single cell
PHOTOGRAPHED: tuple[tuple[str, str, dict[str, float], str], ...] = (
    ("MobileNetV2", "MobileNetV2", {}, "bilinear"),
    ("MobileNet", "MobileNet --alpha 0.25", {"alpha": 0.25}, "nearest"),
)


def run(*words: str, backend: str = "tensorflow", module: str = "tests.keras_child") -> dict[str, Any]:
    """Run a program of this module, or another one of its kind, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", module, *words]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert not done.returncode, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def spec_of(name: str, *cuts: Cut) -> NetworkSpec:
    """Describe a network with random weights, small enough to be quick."""
    backbone = CATALOG[name]
    size = max(backbone.smallest, SMALLEST)
    return NetworkSpec(
        backbone=name, alpha=None, weights="random", scaling=backbone.scaling, size=size, cuts=tuple(sorted(cuts))
    )


def pictures(size: int, count: int = 3) -> np.ndarray:
    """Draw smooth pictures, as uint8."""
    from PIL import Image

    coarse = np.random.default_rng(5).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((size, size))) for one in coarse])


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    """Return the cosine of the worst row."""
    left, right = left.astype(float), right.astype(float)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / lengths).min())


def vectors(out: str, *names: str) -> dict[str, Any]:
    """Save what Keras' own networks give, pooled by NumPy; tell how far the model that nbfeat builds of them agrees."""
    keras: Any = importlib.import_module("keras")
    to_numpy = keras.ops.convert_to_numpy
    found = {}
    for name in names:
        spec = spec_of(name, *cuts_of(name))
        base: Any = load_base(spec, lambda _: None)
        network, images = base[0], pictures(spec.size)
        application = getattr(keras.applications, CATALOG[name].module)
        x = application.preprocess_input(images.astype("float32"))
        layer = CATALOG[name].layers[1].name
        at_layer, at_end = map(
            to_numpy, keras.Model(network.input, [network.get_layer(layer).output, network.output])(x)
        )
        expected: dict[str, Any] = {
            cut.key: pooled(at_layer if cut.layer else at_end, cut.pooling) for cut in spec.cuts
        }
        if name.startswith("ConvNeXt"):  # which Keras normalizes after pooling
            for how in ("avg", "max"):
                own = getattr(keras.applications, name)(
                    include_top=False, weights=None, pooling=how, input_shape=(spec.size, spec.size, 3)
                )
                own.set_weights(network.get_weights())
                expected[f"end:{how}"] = to_numpy(own(x))
        np.savez(Path(out) / f"{name}.npz", **expected)
        ours = build(spec, lambda _: None, base=base).model(images, training=False)
        found[name] = {
            "worst": min(cosine(to_numpy(ours[key]), values) for key, values in expected.items()),
            "norm": float(np.linalg.norm(expected["end:avg"], axis=1).min()),
        }
        keras.utils.clear_session()
    return found


def cuts_of(name: str) -> list[Cut]:
    """Return every pooling at the end, and two at a customary layer."""
    layer = CATALOG[name].layers[1].name
    return [*(Cut("", how) for how in ("avg", "max", "gem", "flatten")), Cut(layer, "avg"), Cut(layer, "flatten")]


def pooled(maps: np.ndarray, how: str) -> np.ndarray:
    """Pool feature maps by NumPy."""
    if how == "flatten":
        return maps.reshape(len(maps), -1)
    if how == "gem":
        return np.asarray((np.maximum(maps, 1e-6).astype(float) ** 3).mean(axis=(1, 2)) ** (1 / 3))
    return np.asarray(maps.max(axis=(1, 2)) if how == "max" else maps.mean(axis=(1, 2)))


def photographs(*paths: str) -> dict[str, Any]:
    """Compare the Keras engine, and Keras' own way, on photographs; save Keras' own for the other engine."""
    keras: Any = importlib.import_module("keras")
    out, *files = paths
    devices.openvino_works = lambda: False  # as where it is not installed
    found: dict[str, Any] = {}
    for name, block, options, how in PHOTOGRAPHED:
        model = getattr(keras.applications, name)(
            include_top=False, weights="imagenet", input_shape=(224, 224, 3), **options
        )
        module = getattr(keras.applications, CATALOG[name].module)
        load = keras.utils.load_img
        images = [keras.utils.img_to_array(load(f, target_size=(224, 224), interpolation=how)) for f in files]
        theirs = model.predict(module.preprocess_input(np.stack(images)), verbose=0).mean(axis=(1, 2))
        np.save(Path(out) / f"{name}.npy", theirs)
        result = nbfeat.extract(pd.DataFrame({"path": files}), block, images="path", interpolation=how, cache=False)
        found[name] = cosine(result.features.to_numpy(), theirs)
        found["report"] = repr(result)
    return found


def files_of_weights(folder: str) -> dict[str, Any]:
    """Save a network with its classifier in every kind of file; load each into one without, and into one too wide."""
    keras: Any = importlib.import_module("keras")
    legacy: Any = importlib.import_module("keras.src.legacy.saving.legacy_h5_format")
    make = functools.partial(keras.applications.MobileNet, weights=None, input_shape=(64, 64, 3))
    whole = make(alpha=0.25, classes=10)
    paths = {kind: Path(folder, f"{kind}.{kind}") for kind in ("weights.h5", "keras", "h5")}
    whole.save_weights(paths["weights.h5"])
    whole.save(paths["keras"])
    with warnings.catch_warnings(), h5py.File(paths["h5"], "w") as file:
        warnings.simplefilter("ignore")
        legacy.save_weights_to_hdf5_group(file, whole)
    paths["whole model"] = Path(folder, "whole.h5")
    whole.save(paths["whole model"])
    found: dict[str, Any] = {}
    wide = make(alpha=0.5, include_top=False)
    for kind, path in paths.items():
        network = make(alpha=0.25, include_top=False)
        keras_weights.load(network, path)
        pairs = zip(network.get_weights(), whole.get_weights(), strict=False)
        found[kind] = {"same": all(np.array_equal(ours, theirs) for ours, theirs in pairs)}
        try:
            keras_weights.load(wide, path)
        except nbfeat.WeightsError as error:
            found[kind]["refused"] = str(error)
    try:
        keras_weights.load(keras.applications.VGG16(weights=None, include_top=False), paths["h5"])
    except nbfeat.WeightsError as error:
        found["another network"] = str(error)
    return found


def structures(*words: str) -> dict[str, Any]:
    """Build each NAME:SIZE; tell how many parameters it has, and the shape and sign of every layer."""
    isolation.quiet_child()
    found = {}
    for word in words:
        name, _, size = word.partition(":")
        network: Any = weights.build(CATALOG[name], int(size))
        negative = negative_layers(network)
        shapes = {layer.name: list(layer.output.shape[1:]) for layer in network.layers}
        found[word] = {"parameters": network.count_params(), "shapes": shapes, "negative": negative}
    return found


def from_torch(name: str, folder: str, *sizes: str) -> dict[str, Any]:
    """Give a network the weights that `torchvision_child` left in `folder`, and keep its output."""
    ops: Any = importlib.import_module("keras").ops
    for size in sizes:
        built = build(torch_spec(name, Path(folder, "row.pth"), size), lambda _: None)
        with np.load(Path(folder, f"{size}.npz")) as saved:
            result = built.model(saved["pixels"], training=False)
        arrays_out: dict[str, Any] = {key: ops.convert_to_numpy(value) for key, value in result.items()}
        np.savez(Path(folder, f"keras-{size}.npz"), **arrays_out)
    return {"weights": built.weights.name}


def normalizing(folder: str) -> dict[str, Any]:
    """Save an EfficientNet that normalizes pixels by numbers of its own; tell whether OpenVINO computes with them."""
    keras: Any = importlib.import_module("keras")
    network: Any = load_base(spec_of("EfficientNetB0", Cut()), lambda _: None)[0]
    layer = network.get_layer("normalization")
    layer.set_weights([np.array([120.0, 60.0, 180.0]) / 255, np.array([0.02, 0.3, 0.1]), *layer.get_weights()[2:]])
    layer.finalize_state()
    network.save_weights(Path(folder, "own.weights.h5"))
    images, early = pictures(SMALLEST), "block1a_activation"  # deeper, random weights make much of the last digits
    begun = keras.Model(network.input, network.get_layer(early).output)
    theirs = keras.ops.convert_to_numpy(begun(images.astype("float32"), training=False)).mean(axis=(1, 2))
    block = f"EfficientNetB0 --size {SMALLEST} --weights {Path(folder, 'own.weights.h5')} --layer {early}"
    result = nbfeat.extract(pd.DataFrame({"image": list(images)}), block, images="image", cache=False)
    return {"engine": result.engines[0], "cosine": cosine(result.features.to_numpy(), theirs)}


def torch_spec(name: str, weights: Path, size: str | int) -> NetworkSpec:
    """Describe the network with these weights, cut at the end and at every customary layer, whole."""
    cuts = [Cut("", "flatten"), *(Cut(layer.name, "flatten" if layer.stride else "") for layer in CATALOG[name].layers)]
    return NetworkSpec(
        backbone=name, alpha=None, weights=str(weights), scaling=CATALOG[name].scaling, size=int(size),
        cuts=tuple(sorted(cuts)),
    )  # fmt: skip


PROGRAMS: dict[str, Callable[..., dict[str, Any]]] = {
    program.__name__: program
    for program in (vectors, photographs, files_of_weights, structures, from_torch, normalizing)
}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))
