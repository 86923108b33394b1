"""Programs about devices: a process pretends to have two. ``python -m tests.inference.devices_child NAME …``.

One process has one backend. TensorFlow and JAX divide the CPU into two; of PyTorch's there is one, taken twice.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import numpy as np
import pandas as pd

import nbfeat
from nbfeat.inference import engines, mixed
from nbfeat.inference.engines import devices, gpus, sizing
from nbfeat.inference.engines.keras import KerasEngine
from nbfeat.inference.model import Base, Cut, NetworkSpec, load_base
from tests.keras_child import cosine

BACKEND = os.environ["KERAS_BACKEND"]
TWO = ("cpu:0", "cpu:1")
BLOCK = "MobileNet --alpha 0.25 --size 64 --weights random"
SPEC = NetworkSpec(
    backbone="MobileNet", alpha=0.25, weights="random", scaling="tf", size=64,
    cuts=(Cut(), Cut("conv_pw_3_relu", "max")),
)  # fmt: skip
END = Cut().key
Rows = dict[str, np.ndarray]


def pretend_two() -> None:
    """Divide TensorFlow's CPU; JAX was told by its variable."""
    if BACKEND == "tensorflow":
        config: Any = importlib.import_module("tensorflow").config
        halves = [config.LogicalDeviceConfiguration()] * 2
        config.set_logical_device_configuration(config.list_physical_devices("CPU")[0], halves)


def pixels(count: int = 22) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8)


def engine_on(devices: tuple[str, ...], **options: Any) -> KerasEngine:
    return KerasEngine(SPEC, devices=devices, **{"precision": "float32", "batch_size": 4, **options})


def rows(engine: KerasEngine, images: np.ndarray) -> Rows:
    """Run the engine as the pipeline does."""
    found: list[dict[str, Any]] = []
    start, size = 0, engine.batch_size
    while start < len(images):
        part, buffer = images[start : start + size], engine.buffer()
        buffer[: len(part)] = part
        engine.submit(buffer, len(part))
        start += size
        if engine.is_full:
            found.append(engine.collect())
    while engine.in_flight:
        found.append(engine.collect())
    return {key: np.concatenate([one[key] for one in found]) for key in found[0]}


def equal(left: Rows, right: Rows) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def out_of_memory() -> Exception:
    """Return what the backend raises where memory does not do."""
    if BACKEND == "tensorflow":
        error = importlib.import_module("tensorflow").errors.ResourceExhaustedError
        return error(None, None, "failed to allocate")  # type: ignore[no-any-return]
    if BACKEND == "jax":
        error = importlib.import_module("jax").errors.JaxRuntimeError
        return error("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")  # type: ignore[no-any-return]
    return importlib.import_module("torch").OutOfMemoryError("no more")  # type: ignore[no-any-return]


class Late(dict[str, Any]):
    """A result whose error comes when it is fetched, as of backends that do not wait."""

    def __getitem__(self, key: str) -> Any:
        raise out_of_memory()


def with_room_for(images: int, replica: devices.Replica, *, late: bool, ran: list[int]) -> None:
    """Let a replica run no more than so many images at once."""
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
    """Return the list in which replicas write down their numbers when they run."""
    turns: list[int] = []
    for number, replica in enumerate(engine._replicas):
        replica.run = functools.partial(_noting, turns, number, replica.run)
    return turns


def _noting(turns: list[int], number: int, run: Callable[[Any], Any], batch: np.ndarray) -> Any:
    assert batch.dtype == np.uint8
    turns.append(number)
    return run(batch)


def replicas() -> dict[str, Any]:
    """Run two replicas, and one."""
    engine, images = engine_on(TWO), pixels()
    first, second = engine._replicas
    numpy = importlib.import_module("keras").ops.convert_to_numpy
    pairs = list(zip(first.variables, second.variables, strict=True))
    alone = engine_on(("cpu",))
    turns = note_turns(engine)
    both = rows(engine, images)
    window = 0
    while not engine.is_full:
        engine.submit(engine.buffer(), 4)
        window += 1
    engine.buffer()
    engine.close()
    return {
        "name": engine.name,
        "kind": engine.kind,
        "one's name": alone.name,
        "devices": [str(value.device) for value in (first.variables[0], second.variables[0])],
        "apart": all(left is not right for left, right in pairs),
        "same weights": all(np.array_equal(numpy(left), numpy(right)) for left, right in pairs),
        "bit-equal": np.array_equal(*(numpy(replica.run(images[:4])[END]) for replica in (first, second))),
        "as one": equal(both, rows(alone, images)),
        "turns": turns[:6],
        "window": window,
        "in flight": engine.in_flight,
        "after closing": equal(both, rows(engine, images)),
    }


def memory() -> dict[str, Any]:
    """Let memory fail for batches of more than a few images, when they are started and when they are fetched."""
    images = pixels()
    found: dict[str, Any] = {}
    enough = rows(engine_on(TWO, batch_size=16), images)
    for late in (False, True):
        told: list[str] = []
        ran: list[int] = []
        engine = engine_on(TWO, batch_size=10, tell=told.append)
        for replica in engine._replicas:
            with_room_for(3, replica, late=late, ran=ran)
        short = rows(engine, images)
        found["late" if late else "early"] = {
            "worst": min(cosine(short[key], enough[key]) for key in enough),
            "rows": len(short[END]),
            "told": told,
            "ran": sorted(set(ran)),
        }
    told = []
    engine = engine_on(TWO, tell=told.append)
    with_room_for(100, engine._replicas[0], late=True, ran=[])
    stopwatch = functools.partial(sizing.stopwatch, clock=itertools.count().__next__)  # every run takes a second
    with mock.patch.object(sizing, "stopwatch", stopwatch):
        engine._find_size((64, 64, 3))
    found["searched"] = {"size": engine._room.size, "told": told}
    engine = engine_on(TWO, batch_size=4)
    for replica in engine._replicas:
        with_room_for(0, replica, late=False, ran=[])
    try:
        engine.submit(engine.buffer(), 4)
    except nbfeat.NetworkError as error:
        found["none"] = str(error)
    engine.close()
    for replica in engine._replicas:
        replica.run = broken
    try:
        engine.submit(engine.buffer(), 4)
    except RuntimeError as error:
        found["another error"] = str(error)
    found["recognized"] = [sizing.is_out_of_memory(error) for error in (out_of_memory(), MemoryError())]
    found["not"] = [sizing.is_out_of_memory(error) for error in (RuntimeError("no such layer"), KeyError("memory"))]
    return found


def broken(_: np.ndarray) -> Any:
    raise RuntimeError("not about that")


def whole(*paths: str) -> dict[str, Any]:
    """Extract on two devices whose memory does not do, and on one that has enough."""
    frame, options = pd.DataFrame({"path": paths}), {"images": "path", "cache": False}
    one = nbfeat.extract(frame, BLOCK, batch_size=4, **options)
    replicate = devices.replicate

    def limited(*args: Any) -> list[devices.Replica]:
        made = replicate(*args)
        for replica in made:
            with_room_for(5, replica, late=False, ran=[])
        return made

    with (
        mock.patch.object(engines, "choose_devices", return_value=TWO),
        mock.patch.object(devices, "replicate", limited),
    ):
        two = nbfeat.extract(frame, BLOCK, batch_size=16, **options)
    return {
        "worst": cosine(one.features.to_numpy(), two.features.to_numpy()),
        "failures": len(two.failures),
        "report": repr(two),
        "precision": list(_precisions(frame, one)),
    }


def _precisions(frame: pd.DataFrame, exact: Any) -> Any:
    for precision in ("bfloat16", "float16"):
        less = nbfeat.extract(frame, BLOCK, images="path", cache=False, precision=precision)
        yield cosine(less.features.to_numpy(), exact.features.to_numpy())


def precisions() -> dict[str, Any]:
    """Run in fewer bits, and what cannot."""
    keras: Any = importlib.import_module("keras")
    keras.config.set_dtype_policy("mixed_float16")
    images = pixels(4)
    exact = rows(engine_on(("cpu",)), images)
    found: dict[str, Any] = {"type": []}
    for precision in ("bfloat16", "float16"):
        engine = engine_on(TWO, precision=precision)
        less = rows(engine, images)
        found[precision] = {key: cosine(less[key], exact[key]) for key in exact}
        numpy = keras.ops.convert_to_numpy
        found["type"] += [str(numpy(value).dtype) for value in engine._replicas[0].run(images).values()]
        found["differs"] = not equal(less, exact)
    found["policy"] = keras.config.dtype_policy().name
    found["refused"] = [refused(build) for build in (stubborn, forgetful, nameless)]
    nbfeat.register_backbone("Huge", huge, input_size=64, scaling="none")
    found["huge"] = huge_in("float16")
    found["huge in bfloat16"] = huge_in("bfloat16")
    return found


def refused(build: Callable[[int], Any]) -> str:
    """Tell why a network that the user builds cannot be run in fewer bits."""
    nbfeat.register_backbone("Mine", build, input_size=64, scaling="none")
    frame = pd.DataFrame({"image": list(pixels(2))})
    nbfeat.extract(frame, "Mine", images="image", cache=False)  # in float32 it can be
    try:
        nbfeat.extract(frame, "Mine", images="image", cache=False, precision="bfloat16")
    except nbfeat.NetworkError as error:
        return str(error)
    return "not refused"


def network_of(layer: Any) -> Callable[[int], Any]:
    """Return what builds a network with `layer` at the end."""
    keras: Any = importlib.import_module("keras")

    def build(size: int) -> Any:
        image = keras.Input((size, size, 3))
        return keras.Model(image, layer(keras.layers.Conv2D(4, 3, kernel_initializer="ones")(image)))

    return build


def own_layers() -> dict[str, Any]:
    """Define layers as users do: one that insists on float32, one that is copied wrongly, one that cannot be."""
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
        def __init__(self, by: float, *more: float) -> None:  # what Keras cannot write down
            super().__init__()
            self.by = by

        def call(self, x: Any) -> Any:
            return x * self.by

    return {"stubborn": Stubborn, "forgetful": Forgetful, "nameless": Nameless}


def stubborn(size: int) -> Any:
    return network_of(own_layers()["stubborn"]())(size)


def forgetful(size: int) -> Any:
    return network_of(own_layers()["forgetful"](by=3.0))(size)


def nameless(size: int) -> Any:
    return network_of(own_layers()["nameless"](3.0))(size)


def huge(size: int) -> Any:
    """Build a network whose numbers float16 does not hold."""
    keras: Any = importlib.import_module("keras")
    return network_of(keras.layers.Conv2D(4, 1, kernel_initializer=keras.initializers.Constant(1e3)))(size)


def huge_in(precision: str) -> str:
    frame = pd.DataFrame({"image": list(pixels(2))})
    try:
        nbfeat.extract(frame, "Huge", images="image", cache=False, precision=precision)
    except nbfeat.NetworkError as error:
        return str(error)
    return ""


def scaled_and_normed() -> dict[str, Any]:
    """Tell what becomes of layers that prepare pixels, and of a norm at the end, in fewer bits."""
    found = {}
    for name in ("EfficientNetB0", "ConvNeXtTiny"):
        spec = NetworkSpec(backbone=name, alpha=None, weights="random", scaling="none", size=64, cuts=(Cut(),))
        base: Base = load_base(spec, lambda _: None)
        network: Any = base[0]
        for layer in network.layers:
            if type(layer).__name__ == "Normalization" and layer.weights:  # as with published weights
                layer.set_weights([np.full(3, 0.4), np.full(3, 0.1), *layer.get_weights()[2:]])
                layer.finalize_state()
        turned: Any = mixed.in_precision(spec, base, "bfloat16")[0]
        pairs = [(layer.compute_dtype, layer.variable_dtype) for layer in turned.layers[1:]]
        x = pixels(2).astype("float32")
        numpy = importlib.import_module("keras").ops.convert_to_numpy
        twin, less, exact = (
            numpy(model(x, training=False)).astype("float32") for model in (mixed._cloned(network), turned, network)
        )
        found[name] = {
            "copied": np.array_equal(twin, exact),
            "differs": not np.array_equal(less, exact),
            "first": pairs[0],
            "last": pairs[-1],
            "low": sum(compute == "bfloat16" for compute, _ in pairs) / len(pairs),
        }
    return found


def settings() -> dict[str, Any]:
    """Return everything of this process that could decide a result."""
    keras: Any = importlib.import_module("keras")
    found = {
        "policy": keras.config.dtype_policy().name,
        "layout": keras.config.image_data_format(),
        "floatx": keras.config.floatx(),
        "oneDNN": os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE"),
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
    """Set everything as a user might, so that it would change the numbers or make the run fail."""
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
    """Run under hostile settings; tell what the network saw, what the user saw in between, and what changed."""
    frame = pd.DataFrame({"path": paths})
    seen: list[dict[str, Any]] = []
    call, noting = devices._call, [False]

    def watched(model: Any) -> Callable[..., Any]:
        """Note the settings where the model is traced, or with PyTorch run."""
        inner = call(model)

        def noted(*args: Any) -> Any:
            if noting[0]:
                seen.append(settings())
            return inner(*args)

        return noted

    def features(steps: list[dict[str, Any]]) -> Any:
        extraction = nbfeat.Extraction(frame, BLOCK, images="path", batch_size=4, cache=False)
        with (
            mock.patch.object(engines, "choose_devices", return_value=TWO),
            mock.patch.object(devices, "_call", watched),
        ):
            steps.extend(settings() for _ in extraction.steps())
        return extraction.features

    normal = features([])
    make_hostile(way)
    before, noting[0] = settings(), True
    steps: list[dict[str, Any]] = []
    hostile = features(steps)
    after = settings()
    if BACKEND == "torch" and way == "newer":  # what the parts inherit shows when it is taken back
        module: Any = importlib.import_module("torch")
        module.backends.fp32_precision = "none"
    return {
        "left": settings(),
        "same": bool(normal.equals(hostile)),
        "inside": seen,
        "before": before,
        "kept": all(step == before for step in steps) and len(steps) > 4,
        "after": after,
    }


def pretended_gpus() -> dict[str, Any]:
    """Pretend that the backend has two GPUs of one kind, and tell what is made of that."""
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
        gpus.grow_memory()
        return {"count": engines.count_gpus(), "kinds": gpus.kinds(("gpu:0", "gpu:1")), "grown": grown}


def on_gpu(*paths: str) -> dict[str, Any]:
    """Extract on every GPU that there is, and on the CPU."""
    count = engines.count_gpus()
    if not count:
        return {"gpus": 0}
    frame, options = pd.DataFrame({"path": paths}), {"images": "path", "cache": False}
    on_cpu = nbfeat.extract(frame, BLOCK, device="cpu", **options).features.to_numpy()
    found: dict[str, Any] = {"gpus": count}
    for precision in ("float32", "bfloat16", "float16"):
        result = nbfeat.extract(frame, BLOCK, device="auto", precision=precision, **options)
        found[precision] = cosine(result.features.to_numpy(), on_cpu)
        found["report"] = repr(result)
    found["first alone"] = cosine(nbfeat.extract(frame, BLOCK, device="gpu:0", **options).features.to_numpy(), on_cpu)
    engine = KerasEngine(SPEC, devices=("gpu:0",), precision="float32", batch_size=None)
    found["batch"] = engine.batch_size
    found["where"] = [str(value.device).lower() for value in engine._replicas[0].variables[:1]]
    return found


PROGRAMS: dict[str, Callable[..., dict[str, Any]]] = {
    program.__name__: program
    for program in (replicas, memory, whole, precisions, scaled_and_normed, switches, pretended_gpus, on_gpu)
}

if __name__ == "__main__":
    if sys.argv[1] != "on_gpu":
        pretend_two()
        engines.openvino_works = lambda: False  # as where it is not installed
    print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))
