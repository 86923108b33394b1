"""Programs that pretend to have two devices: ``python -m tests.inference.devices_child NAME[,NAME] …``.

A process has one backend. TensorFlow and JAX split the CPU into two devices; PyTorch uses its only one twice.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import os
import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import numpy as np
import pandas as pd

import nbfeat
from nbfeat.inference.engines import devices, keras as keras_engine
from nbfeat.inference.engines.keras import KerasEngine
from nbfeat.inference.model import in_policy
from nbfeat.inference.prepared import vectors_of
from nbfeat.inference.spec import Cut, NetworkSpec
from tests.keras_child import cosine

BACKEND = os.environ["KERAS_BACKEND"]
TWO = ("cpu:0", "cpu:1")
SIZE = 32
BLOCK = f"MobileNet --alpha 0.25 --size {SIZE} --weights random"
SPEC = NetworkSpec(
    backbone="Small", alpha=None, weights="own", scaling="tf", size=SIZE, cuts=(Cut(), Cut("conv2d", "max"))
)
END = Cut().key
Rows = dict[str, np.ndarray]


def pretend_two() -> None:
    """Split TensorFlow's CPU; an environment variable has split JAX's."""
    if BACKEND == "tensorflow":
        config: Any = importlib.import_module("tensorflow").config
        halves = [config.LogicalDeviceConfiguration()] * 2
        config.set_logical_device_configuration(config.list_physical_devices("CPU")[0], halves)


def small(size: int) -> Any:
    """Build a network with several kinds of layers, names from Keras and the same weights each time."""
    keras: Any = importlib.import_module("keras")
    k, drawn = keras.layers, functools.partial(keras.initializers.HeNormal, seed=1)
    image = keras.Input((size, size, 3))
    x = k.Conv2D(8, 3, strides=2, activation="relu", kernel_initializer=drawn())(image)
    x = k.DepthwiseConv2D(3, depthwise_initializer=drawn())(k.BatchNormalization()(x))
    return keras.Model(image, k.Conv2D(16, 1, activation="relu", kernel_initializer=drawn())(x))


def pixels(count: int = 22) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def engine_on(devices: tuple[str, ...], **options: Any) -> KerasEngine:
    return KerasEngine(SPEC, devices=devices, **{"precision": "float32", "batch_size": 4, **options})


def extracted(images: Any, block: str, **options: Any) -> nbfeat.Extraction:
    """Extract features of paths or arrays, without the cache."""
    frame = pd.DataFrame({"image": list(images)})
    return nbfeat.extract(frame, block, images="image", cache=False, **options)


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except (nbfeat.NetworkError, nbfeat.ExtractionError, RuntimeError) as error:
        return str(error)
    return ""


def equal(left: Rows, right: Rows) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def out_of_memory() -> Exception:
    """Return the error that the backend raises if memory runs out."""
    if BACKEND == "tensorflow":
        error = importlib.import_module("tensorflow").errors.ResourceExhaustedError
        return error(None, None, "failed to allocate")  # type: ignore[no-any-return]
    if BACKEND == "jax":
        error = importlib.import_module("jax").errors.JaxRuntimeError
        return error("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")  # type: ignore[no-any-return]
    return importlib.import_module("torch").OutOfMemoryError("no more")  # type: ignore[no-any-return]


class Late(dict[str, Any]):
    """A result that raises only when it is fetched, as with asynchronous backends."""

    def __getitem__(self, key: str) -> Any:
        raise out_of_memory()


def with_room_for(images: int, replica: keras_engine.Replica, *, late: bool, ran: list[int]) -> None:
    """Limit the number of images that a replica can run at once."""
    run = replica.run

    def limited(batch: np.ndarray) -> Any:
        if len(batch) > images:
            if late:
                return Late()
            raise out_of_memory()
        ran.append(len(batch))
        return run(batch)

    replica.run = limited


def note_turns(engine: KerasEngine) -> list[int]:
    """Return a list to which each replica adds its number when it runs."""
    turns: list[int] = []
    for number, replica in enumerate(engine._replicas):
        replica.run = functools.partial(_noting, turns, number, replica.run)
    return turns


def _noting(turns: list[int], number: int, run: Callable[[Any], Any], batch: np.ndarray) -> Any:
    assert batch.dtype == np.uint8
    turns.append(number)
    return run(batch)


def replicas(*_: str) -> dict[str, Any]:
    """Compare two replicas with one."""
    engine, images = engine_on(TWO), pixels()
    first, second = engine._replicas
    numpy = importlib.import_module("keras").ops.convert_to_numpy
    pairs = list(zip(first.variables, second.variables, strict=True))
    alone = engine_on(("cpu",))
    turns = note_turns(engine)
    both = vectors_of(engine, images)
    window = 0
    while not engine.is_full:
        engine.submit(engine.buffer(), 4)
        window += 1
    engine.buffer()
    engine.close()
    return {
        "name": engine.name,
        "kind": engine.kind,
        "one's kind": alone.kind,
        "devices": [str(value.device) for value in (first.variables[0], second.variables[0])],
        "apart": all(left is not right for left, right in pairs),
        "same weights": all(np.array_equal(numpy(left), numpy(right)) for left, right in pairs),
        "bit-equal": np.array_equal(*(numpy(replica.run(images[:4])[END]) for replica in (first, second))),
        "as one": equal(both, vectors_of(alone, images)),
        "turns": turns[:6],
        "window": window,
        "in flight": len(engine._busy),
        "after closing": equal(both, vectors_of(engine, images)),
    }


def memory(*_: str) -> dict[str, Any]:
    """Let memory run out for batches of more than a few images, on starting and on fetching."""
    images = pixels()
    found: dict[str, Any] = {}
    enough = vectors_of(engine_on(TWO, batch_size=16), images)
    for when in ("early", "late"):
        notes: list[str] = []
        ran: list[int] = []
        engine = engine_on(TWO, batch_size=10, tell=notes.append)
        for replica in engine._replicas:
            with_room_for(3, replica, late=when == "late", ran=ran)
        short = vectors_of(engine, images)
        worst = min(cosine(short[key], enough[key]) for key in enough)
        found[when] = {"worst": worst, "rows": len(short[END]), "notes": notes, "ran": sorted(set(ran))}
    notes = []
    engine = engine_on(TWO, tell=notes.append)
    with_room_for(100, engine._replicas[0], late=True, ran=[])
    every_run_takes_a_second = SimpleNamespace(perf_counter=itertools.count().__next__)
    with mock.patch.object(devices, "time", every_run_takes_a_second):
        engine._find_size((SIZE, SIZE, 3))
    found["searched"] = {"size": engine._room.size, "notes": notes}
    engine = engine_on(TWO)
    for replica in engine._replicas:
        with_room_for(0, replica, late=False, ran=[])
    found["none"] = error_of(lambda: engine.submit(engine.buffer(), 4))
    engine.close()
    for replica in engine._replicas:
        replica.run = broken
    found["another error"] = error_of(lambda: engine.submit(engine.buffer(), 4))
    errors = [out_of_memory(), MemoryError(), RuntimeError("no such layer"), KeyError("memory")]
    found["recognized"] = [devices.is_out_of_memory(error) for error in errors]
    return found


def broken(_: np.ndarray) -> Any:
    raise RuntimeError("not about that")


def whole(*paths: str) -> dict[str, Any]:
    """Extract on two devices with too little memory, on one with enough, and with an interruption."""
    one = extracted(paths, BLOCK)
    replicate = keras_engine.replicate

    def limited(*args: Any) -> list[keras_engine.Replica]:
        made = replicate(*args)
        for replica in made:
            with_room_for(5, replica, late=False, ran=[])
        return made

    with (
        mock.patch.object(devices, "choose_devices", return_value=TWO),
        mock.patch.object(keras_engine, "replicate", limited),
    ):
        two = extracted(paths, BLOCK, batch_size=16)
    # A partial last batch, and an interruption.
    frame = pd.DataFrame({"image": paths})
    parts = nbfeat.Extraction(frame, BLOCK, images="image", batch_size=3, cache=False)
    steps = parts.steps()
    for _ in range(4):
        next(steps)
    steps.close()
    stopped = parts.done
    parts.run()
    return {
        "worst": min(cosine(one.features.to_numpy(), other.features.to_numpy()) for other in (two, parts)),
        "failures": len(two.failures),
        "report": repr(two),
        "stopped": stopped,
    }


def precisions(*_: str) -> dict[str, Any]:
    """Run at lower precision, with layers that can and layers that cannot."""
    keras: Any = importlib.import_module("keras")
    keras.config.set_dtype_policy("mixed_float16")
    images = pixels(4)
    exact = vectors_of(engine_on(("cpu",)), images)
    found: dict[str, Any] = {"type": []}
    for precision in ("bfloat16", "float16"):
        engine = engine_on(TWO, precision=precision)
        less = vectors_of(engine, images)
        found[precision] = min(cosine(less[key], exact[key]) for key in exact)
        numpy = keras.ops.convert_to_numpy
        found["type"] += [str(numpy(value).dtype) for value in engine._replicas[0].run(images).values()]
        found["differs"] = not equal(less, exact)
    found["policy"] = keras.config.dtype_policy().name
    keras.config.set_dtype_policy("float32")
    found["refused"] = [refused(layer) for layer in own_layers()]
    nbfeat.register_backbone("Huge", huge, input_size=SIZE, scaling="none")
    for precision in ("float16", "bfloat16"):
        asked = functools.partial(extracted, pixels(2), "Huge", precision=precision)
        found[f"huge in {precision}"] = error_of(asked)
    return found


def refused(layer: Any) -> str:
    """Return the error of a network that ends in `layer` and runs only in float32."""
    nbfeat.register_backbone("Mine", network_of(layer), input_size=SIZE, scaling="none")
    extracted(pixels(2), "Mine")
    return error_of(lambda: extracted(pixels(2), "Mine", precision="bfloat16"))


def network_of(layer: Callable[[], Any]) -> Callable[[int], Any]:
    """Return a function that builds a network with a layer at its end."""
    keras: Any = importlib.import_module("keras")

    def build(size: int) -> Any:
        image = keras.Input((size, size, 3))
        return keras.Model(image, layer()(keras.layers.Conv2D(4, 3, kernel_initializer="ones")(image)))

    return build


def own_layers() -> list[Callable[[], Any]]:
    """Define custom layers: one that stays in float32, one that copies wrongly, one that cannot be copied."""
    keras: Any = importlib.import_module("keras")

    class Stubborn(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "dtype": "float32"})

        def call(self, x: Any) -> Any:
            return x * 2.0

    class Forgetful(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self, by: float = 1.0, **options: Any) -> None:
            super().__init__(**options)
            self.by = by

        def call(self, x: Any) -> Any:
            return keras.ops.sin(x / 4000.0 * self.by)

        def get_config(self) -> Any:
            return keras.layers.Layer.get_config(self)

    class Nameless(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self, by: float, *more: float) -> None:  # Keras cannot serialize this
            super().__init__()
            self.by = by

        def call(self, x: Any) -> Any:
            return x * self.by

    return [Stubborn, functools.partial(Forgetful, by=3.0), functools.partial(Nameless, 3.0)]


def huge(size: int) -> Any:
    """Build a network that overflows in float16."""
    keras: Any = importlib.import_module("keras")
    return network_of(lambda: keras.layers.Conv2D(4, 1, kernel_initializer=keras.initializers.Constant(1e3)))(size)


def scaled_and_normed(*_: str) -> dict[str, Any]:
    """Report the dtypes of pixel scaling and of a final normalization in mixed precision."""
    keras: Any = importlib.import_module("keras")
    k = keras.layers
    image = keras.Input((SIZE, SIZE, 3))
    x = k.Normalization(mean=[0.4] * 3, variance=[0.1] * 3)(k.Rescaling(1 / 255)(image))
    inner = keras.Sequential([keras.Input((SIZE, SIZE, 3)), k.Conv2D(4, 3), k.Dense(6)])  # as in ConvNeXt
    network = keras.Model(image, k.LayerNormalization()(k.LayerNormalization()(inner(x))))
    turned = in_policy(network, "mixed_bfloat16")
    images = pixels(2).astype("float32")
    twin, less, exact = (
        keras.ops.convert_to_numpy(model(images, training=False)).astype("float32")
        for model in (in_policy(network, "float32"), turned, network)
    )
    inside = next(layer.layers for layer in turned.layers if hasattr(layer, "layers"))
    return {
        "copied": np.array_equal(twin, exact),
        "differs": not np.array_equal(less, exact),
        "outside": [layer.compute_dtype for layer in turned.layers[1:] if not hasattr(layer, "layers")],
        "inside": [layer.compute_dtype for layer in inside],
        "variables": sorted({str(variable.dtype) for variable in turned.variables}),
    }


def settings() -> dict[str, Any]:
    """Return all settings of this process that could affect a result."""
    keras: Any = importlib.import_module("keras")
    found = {
        "policy": keras.config.dtype_policy().name,
        "layout": keras.config.image_data_format(),
        "floatx": keras.config.floatx(),
        "oneDNN": os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE"),
        "seeds": hash(random.getstate()),
    }
    module: Any = importlib.import_module(BACKEND)
    if BACKEND == "tensorflow":
        found["TF32"] = module.config.experimental.tensor_float_32_execution_enabled()
        found |= module.config.optimizer.get_experimental_options()
    elif BACKEND == "jax":
        names = ("default_matmul_precision", "enable_x64", "numpy_dtype_promotion", "numpy_rank_promotion")
        found |= {name: getattr(module.config, f"jax_{name}") for name in names}
    else:
        back = module.backends
        parts = {"all": back, "cuda": back.cuda.matmul, "cudnn": back.cudnn, "conv": back.cudnn.conv}
        parts |= {"rnn": back.cudnn.rnn, "mkldnn": back.mkldnn, "products": back.mkldnn.matmul}
        found |= {name: getattr(part, "fp32_precision", "") for name, part in parts.items()}
        found |= {"dtype": str(module.get_default_dtype()), "benchmark": back.cudnn.benchmark}
        found |= {"autocast": module.is_autocast_enabled("cpu"), "product": _or_error(module)}
    return found


def _or_error(torch: Any) -> list[Any]:
    try:
        return [
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
        ]
    except RuntimeError:
        return ["mixed"]


def make_hostile(way: str) -> None:
    """Change all settings that could affect the features or make the run fail."""
    keras: Any = importlib.import_module("keras")
    keras.config.set_dtype_policy("mixed_float16")
    keras.config.set_image_data_format("channels_first")
    keras.config.set_floatx("float16")
    os.environ["ONEDNN_DEFAULT_FPMATH_MODE"] = "BF16"
    module: Any = importlib.import_module(BACKEND)
    if BACKEND == "tensorflow":
        module.config.experimental.enable_tensor_float_32_execution(enabled=True)
        module.config.optimizer.set_experimental_options(
            {"auto_mixed_precision": True, "auto_mixed_precision_onednn_bfloat16": True}
        )
    elif BACKEND == "jax":
        module.config.update("jax_default_matmul_precision", "bfloat16")
        module.config.update("jax_enable_x64", val=True)
        module.config.update("jax_numpy_dtype_promotion", "strict")
        module.config.update("jax_numpy_rank_promotion", "raise")
    else:
        module.set_default_dtype(module.float64)
        module.set_autocast_enabled("cpu", True)
        module.backends.cudnn.benchmark = True
        if way == "older":
            module.set_float32_matmul_precision("medium")
            module.backends.cudnn.allow_tf32 = True
        else:
            module.backends.fp32_precision = "tf32"
            module.backends.mkldnn.matmul.fp32_precision = "bf16"


def switches(way: str, *paths: str) -> dict[str, Any]:
    """Run with hostile settings; return those that the network saw, those between steps, and the changes."""
    keras: Any = importlib.import_module("keras")
    seen: list[dict[str, Any]] = []
    call, noting = keras_engine._call, [False]

    def watched(model: Any) -> Callable[..., Any]:
        """Record the settings when the model is traced or, with PyTorch, run."""
        inner = call(model)

        def noted(*args: Any) -> Any:
            if noting[0]:
                seen.append(settings())
            return inner(*args)

        return noted

    def features(block: str, steps: list[dict[str, Any]]) -> Any:
        frame = pd.DataFrame({"path": paths})
        extraction = nbfeat.Extraction(frame, block, images="path", batch_size=4, cache=False)
        with (
            mock.patch.object(devices, "choose_devices", return_value=TWO),
            mock.patch.object(keras_engine, "_call", watched),
        ):
            steps.extend(settings() for _ in extraction.steps())
        return extraction.features

    blocks = (BLOCK, "Small --layer conv2d")
    normal = [features(block, []) for block in blocks]
    make_hostile(way)
    keras.layers.DepthwiseConv2D(1)
    before, noting[0] = settings(), True
    steps: list[dict[str, Any]] = []
    hostile = [features(block, steps) for block in blocks]
    after = settings()
    if BACKEND == "torch" and way == "newer":  # shows what the other settings inherited
        importlib.import_module("torch").backends.fp32_precision = "none"
    return {
        "left": settings(),
        "same": all(one.equals(other) for one, other in zip(normal, hostile, strict=True)),
        "inside": seen,
        "before": before,
        "kept": all(step == before for step in steps) and len(steps) > 4,
        "after": after,
        "next": keras.layers.DepthwiseConv2D(1).name,
    }


def pretended_gpus(*_: str) -> dict[str, Any]:
    """Pretend that the backend has two identical GPUs."""
    module: Any = importlib.import_module(BACKEND)
    grown: list[str] = []

    def grow(gpu: str, *, enable: bool) -> None:
        assert enable
        if grown:
            raise RuntimeError("cannot be set any more")
        grown.append(gpu)

    with contextlib.ExitStack() as stack:
        if BACKEND == "tensorflow":
            config = module.config
            fakes: list[tuple[Any, str, Any]] = [
                (config, "get_visible_devices", lambda _: ["first", "second"]),
                (config.experimental, "set_memory_growth", grow),
                (config.experimental, "get_device_details", lambda _: {"device_name": "Fast 5"}),
            ]
        elif BACKEND == "jax":
            gpu = mock.Mock(platform="gpu", device_kind="Fast 5")
            fakes = [(module, name, lambda *_: [gpu, gpu]) for name in ("devices", "local_devices")]
        else:
            names = {"device_count": lambda: 2, "get_device_name": lambda _: "Fast 5"}
            fakes = [(module.cuda, name, value) for name, value in names.items()]
        for holder, name, value in fakes:
            stack.enter_context(mock.patch.object(holder, name, value))
        keras_engine.grow_memory()
        return {"count": devices.count_gpus(), "kinds": devices.kinds(("gpu:0", "gpu:1")), "grown": grown}


def on_gpu(*paths: str) -> dict[str, Any]:
    """Extract on every available GPU, and on the CPU."""
    count = devices.count_gpus()
    if not count:
        return {"gpus": 0}
    on_cpu = extracted(paths, BLOCK, device="cpu").features.to_numpy()
    found: dict[str, Any] = {"gpus": count}
    for precision in ("float32", "bfloat16", "float16"):
        result = extracted(paths, BLOCK, device="auto", precision=precision)
        found[precision] = cosine(result.features.to_numpy(), on_cpu)
        found["report"] = repr(result)
    found["first alone"] = cosine(extracted(paths, BLOCK, device="gpu:0").features.to_numpy(), on_cpu)
    engine = KerasEngine(SPEC, devices=("gpu:0",), precision="float32", batch_size=None)
    found["batch"] = engine.batch_size
    found["where"] = [str(value.device).lower() for value in engine._replicas[0].variables[:1]]
    return found


PROGRAMS: dict[str, Callable[..., dict[str, Any]]] = {
    program.__name__: program
    for program in (replicas, memory, whole, precisions, scaled_and_normed, pretended_gpus, on_gpu)
}
PROGRAMS |= {way: functools.partial(switches, way) for way in ("older", "newer")}

if __name__ == "__main__":
    names = sys.argv[1].split(",")
    if names != ["on_gpu"]:
        pretend_two()
        devices.openvino_works = lambda: False  # as if it were not installed
    nbfeat.register_backbone("Small", small, input_size=SIZE, scaling="tf")
    print(json.dumps({name: PROGRAMS[name](*sys.argv[2:]) for name in names}))
