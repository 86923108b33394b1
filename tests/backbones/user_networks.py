"""Networks such as users have, run in a process of its own: ``python -m tests.backbones.user_networks NAME …``.

Each program prints one line of JSON at the end.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import pandas as pd

import nbfeat
from nbfeat.backbones import catalog
from tests import keras_child

SIZE = 32


run = functools.partial(keras_child.run, module="tests.backbones.user_networks")


def plain(keras: Any) -> Any:
    k = keras.layers
    image = keras.Input((SIZE, SIZE, 3))
    x = k.Conv2D(6, 3, strides=2, activation="relu", name="conv")(image)
    x = k.BatchNormalization(name="norm")(x)
    left = k.Conv2D(6, 1, padding="same", name="side")(x)
    x = k.MaxPooling2D(name="pool")(k.Concatenate(name="both")([x, left]))
    x = k.Flatten(name="flat")(x)
    return keras.Model(image, k.Dense(4, activation="softmax", name="classes")(x), name="plain")


def not_to_be_turned(keras: Any) -> Any:
    """Build one that works along the last axis, whatever it is: the sizes would all fit channels-first too."""
    k = keras.layers
    image = keras.Input((5, 5, 3))
    x = k.Conv2D(5, 1, name="conv")(image)  # 5 × 5 × 5
    x = k.Dense(5, name="dense")(x)
    return keras.Model(image, k.Softmax(axis=-1, name="soft")(x), name="not_to_be_turned")


def sequential(keras: Any) -> Any:
    """Build one of any size that scales inside itself."""
    k = keras.layers
    layers = [keras.Input((None, None, 3)), k.Rescaling([1 / 127, 1 / 255, 1 / 63], offset=-1, name="scale")]
    layers += [k.Conv2D(5, 3, activation="relu", name="conv"), k.GroupNormalization(5, name="group")]
    return keras.Sequential(layers, name="any_size")


def nested(keras: Any) -> Any:
    base = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3), alpha=0.35)
    image = keras.Input((SIZE, SIZE, 3))
    x = base(keras.layers.Rescaling(1 / 127.5, offset=-1)(image))
    return keras.Model(image, keras.layers.GlobalAveragePooling2D(name="pool")(x))


def nested_last(keras: Any) -> Any:
    inner = keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Conv2D(4, 3)], name="inner")
    return keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Rescaling(1 / 255), inner])


def with_lambda(keras: Any) -> Any:
    inner = keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Lambda(lambda x: x * 2, name="twice")])
    return keras.Sequential([keras.Input((SIZE, SIZE, 3)), inner])


def with_code(keras: Any) -> Any:
    return keras.Sequential([keras.Input((SIZE, SIZE, 3)), own_layer(keras, 2.0)(), keras.layers.Conv2D(3, 3)])


def own_layer(keras: Any, by: float) -> Any:
    """Write a layer whose code, and nothing of its configuration, says what it multiplies by."""

    class Times(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return x * by

    return Times


def with_own_activation(keras: Any) -> Any:
    return keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Conv2D(3, 3, activation=lambda x: x * 3)])


def simple(shape: tuple[int | None, ...], **words: Any) -> Callable[[Any], Any]:
    return lambda keras: keras.Sequential([keras.Input(shape, **words), keras.layers.Conv2D(2, 1)])


def whole_pixels(keras: Any) -> Any:
    image = keras.Input((SIZE, SIZE, 3), dtype="uint8")
    return keras.Model(image, keras.layers.Conv2D(2, 3)(keras.layers.Rescaling(1 / 255)(image)))


def half(keras: Any) -> Any:
    image = keras.Input((SIZE, SIZE, 3))
    return keras.Model(image, keras.layers.Conv2D(2, 3, dtype="mixed_bfloat16")(image))


def two_inputs(keras: Any) -> Any:
    one, two = keras.Input((SIZE, SIZE, 3)), keras.Input((SIZE, SIZE, 3))
    return keras.Model([one, two], keras.layers.Add()([one, two]))


def two_outputs(keras: Any) -> Any:
    image = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Conv2D(2, 3, name="conv")(image)
    shared = keras.layers.Conv2D(2, 3, padding="same", name="shared")
    return keras.Model(image, [x, shared(shared(x))])


REFUSED: dict[str, Callable[[Any], Any]] = {
    "two_inputs": two_inputs, "two_outputs": two_outputs, "oblong": simple((SIZE, 2 * SIZE, 3)),
    "gray": simple((SIZE, SIZE, 1)),
}  # fmt: skip
MODELS: dict[str, Callable[[Any], Any]] = {
    "plain": plain, "not_to_be_turned": not_to_be_turned, "sequential": sequential, "nested": nested,
    "nested_last": nested_last, "with_lambda": with_lambda, "with_code": with_code,
    "with_own_activation": with_own_activation, "whole_pixels": whole_pixels, "half": half,
    "one_at_a_time": simple((SIZE, SIZE, 3), batch_size=1), **REFUSED,
}  # fmt: skip


def save(folder: str) -> dict[str, Any]:
    """Save every model, with weights that are not the initial ones, and what it and its layers give for pixels."""
    keras: Any = importlib.import_module("keras")
    for name, make in MODELS.items():
        keras.utils.clear_session()
        keras.utils.set_random_seed(1)
        model = make(keras)
        generator = np.random.default_rng(3)
        model.set_weights([generator.normal(0.2, 0.3, array.shape) ** 2 / 3 for array in model.get_weights()])
        model.save(Path(folder, f"{name}.keras"))
        if make is plain:
            model.compile("adam", "mse")
            model.save(Path(folder, "plain.h5"))
            model.save_weights(Path(folder, "plain.weights.h5"))
        given: dict[str, Any] = {}
        for scaling in ("tf", "none") if name not in REFUSED else ():
            x = pixels(model.input_shape[1] or 24).astype("float32")
            given[scaling] = model(x / 127.5 - 1 if scaling == "tf" else x, training=False)
            if make is plain:
                inner = keras.Model(model.inputs, model.get_layer("pool").output)
                given["pool"] = inner(x / 127.5 - 1, training=False)
        arrays = {key: keras.ops.convert_to_numpy(keras.ops.cast(value, "float32")) for key, value in given.items()}
        np.savez(Path(folder, f"{name}.npz"), **arrays)
    return {}


def pixels(size: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def frame_of(size: int, count: int = 1) -> pd.DataFrame:
    return pd.DataFrame({"image": list(pixels(size, count))})


def build_with(seed: int, size: int = SIZE) -> Any:
    """Build a network of stock layers whose weights come from `seed`."""
    keras: Any = importlib.import_module("keras")
    image = keras.Input((size, size, 3))
    x = keras.layers.Conv2D(4, 3, kernel_initializer=keras.initializers.RandomNormal(seed=seed), name="conv")(image)
    return keras.Model(image, keras.layers.ReLU(name="relu")(x))


def own_with(by: float, size: int = SIZE) -> Any:
    """Build a network with a layer of the user's own, whose code multiplies by `by`."""
    keras: Any = importlib.import_module("keras")
    return keras.Sequential([keras.Input((size, size, 3)), own_layer(keras, by)(), keras.layers.Flatten(name="flat")])


def generators() -> str:
    """Return the state of the user's own generators."""
    return f"{random.getstate()} {np.random.get_state()}"


def registered(*_: str) -> dict[str, Any]:
    """Register networks, run them, register others of the same name, and tell what came of it."""
    keras: Any = importlib.import_module("keras")
    found: dict[str, Any] = {}
    frame = frame_of(SIZE, 3)
    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.layers.Activation("relu")
    random.seed(4)
    np.random.seed(5)
    state = generators()

    def seeded(seed: int) -> None:
        nbfeat.register_backbone(
            "MyNet", lambda size: build_with(seed, size), input_size=SIZE, scaling="tf", layers=["conv"]
        )
        result = nbfeat.extract(frame, "MyNet", "MyNet --layer conv --pooling max", images="image")
        model = build_with(seed)
        x = keras.ops.convert_to_numpy(model(pixels(SIZE, 3) / 127.5 - 1.0, training=False))
        found.setdefault("differs", []).append(float(abs(result["mynet"].to_numpy() - x.mean(axis=(1, 2))).max()))
        found.setdefault("cached", []).append(result.cached)
        found["report"], found["engines"] = repr(result), result.engines

    keras.config.set_dtype_policy("float32")
    for seed in (1, 1, 2):
        seeded(seed)
    keras.config.set_dtype_policy("mixed_bfloat16")
    for by in (2.0, 2.0, 3.0):
        nbfeat.register_backbone("Own", functools.partial(own_with, by), input_size=SIZE, scaling="none")
        result = nbfeat.extract(frame, "Own", images="image")
        found.setdefault("own", []).append(float(result.features.iloc[0, 0] / pixels(SIZE)[0, 0, 0, 0]))
        found.setdefault("own cached", []).append(result.cached)
        found["own report"], found["own engines"] = repr(result), result.engines
    found["policy"] = keras.config.dtype_policy().name
    found["state kept"] = state == generators()
    found["next"] = keras.layers.Activation("relu").name
    found["layers"] = list(nbfeat.layers("MyNet").index)
    found["listed"] = catalog.backbones("my*").reset_index().astype(str).to_dict("records")
    wrong: dict[str, Any] = {"Fails": lambda _: 1 / 0, "None": lambda _: None, "Wrong": lambda _: build_with(1, 8)}
    for name, build in wrong.items():
        nbfeat.register_backbone(name, build, input_size=SIZE, scaling="none")
        try:
            nbfeat.extract(frame, name, images="image")
        except nbfeat.NbfeatError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def without_openvino(*_: str) -> dict[str, Any]:
    """Run a registered network that OpenVINO is made to refuse."""
    store: Any = importlib.import_module("nbfeat.inference.compiled_models")

    def refuse(*_: Any) -> Any:
        raise nbfeat.NetworkError(f"OpenVINO cannot run MyNet.keras: no such operation. {store.FILE_ADVICE}")

    store.run_child = refuse
    nbfeat.register_backbone("MyNet", lambda size: build_with(8, size), input_size=SIZE, scaling="none")
    blocks = ["MyNet", "MyNet --layer conv"]
    results = [nbfeat.extract(frame_of(SIZE, 3), blocks, images="image") for _ in range(2)]
    network: Any = results[0].parts[1].network
    alone = network.prepared.start("float32", "conv:default")
    buffer = alone.buffer()
    buffer[:3] = pixels(SIZE, 3)
    alone.submit(buffer, 3)
    vectors = alone.collect()
    return {
        "report": repr(results[0]),
        "cached": [result.cached for result in results],
        "alone": list(vectors),
        "differs": float(abs(vectors["conv:default"] - results[0]["mynet_conv"].to_numpy()).max()),
    }


def layouts(folder: str, *names: str) -> dict[str, Any]:
    """Tell which networks are turned channels-first."""
    importlib.import_module("nbfeat.isolation").quiet_child()
    network = importlib.import_module("nbfeat.inference.model")
    request = importlib.import_module("nbfeat.extraction.request")
    found = {}
    for word in names:
        name, _, layer = word.partition(":")
        cut = f"--layer {layer}" if layer else ""
        blocks = nbfeat.FeatureBlock.parse(f"{folder}/{name}.keras --scaling none --size 32 {cut}")
        spec, _ = next(iter(request.networks_of(blocks)))
        built = network.build(spec, lambda _: None, channels_first=True)
        found[word] = any("transpose" in operation.name for operation in built.model.operations)
    return found


def in_keras(folder: str) -> dict[str, Any]:
    """Run a file by the Keras engine."""
    devices: Any = importlib.import_module("nbfeat.inference.engines.devices")
    devices.openvino_works = lambda: False
    result = nbfeat.extract(frame_of(SIZE), f"{folder}/plain.keras --scaling tf", images="image")
    return {"features": result.features.iloc[0].tolist(), "report": repr(result)}


PROGRAMS: dict[str, Callable[..., dict[str, Any]]] = {
    program.__name__: program for program in (save, registered, without_openvino, layouts, in_keras)
}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))
