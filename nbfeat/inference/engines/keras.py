"""The engine for GPUs, and for CPUs without OpenVINO: it runs the model on the current Keras backend.

The model is built once. Each device has a replica: a copy of the variables, and a function that runs the model with
them. Batches go to the replicas in turn. If memory runs out, a batch is run in smaller parts, so no image is lost.

Keras runs in its own session, in full float32, independent of the user's settings. TensorFlow's and PyTorch's switches
for reduced float32 precision are process-wide, so they are off only while nbfeat traces, dispatches and fetches.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nbfeat import isolation
from nbfeat.errors import NetworkError, listing
from nbfeat.inference.engines import devices as hardware
from nbfeat.inference.engines.base import Pixels, Precision, Vectors, Work, until_exit
from nbfeat.inference.engines.devices import Result
from nbfeat.inference.model import Base, Built, build, load_base, mixed_precision
from nbfeat.inference.spec import NetworkSpec

BATCH = 32
FASTER_ON_GPUS: tuple[Precision, ...] = ("bfloat16", "float16")  # than float32; only float16 can overflow
WINDOW = 2  # batches in flight on each device
_LIBRARIES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch", "openvino": "OpenVINO backend"}
Call = Callable[[list[Any], list[Any], Any], Any]  # a model as a function of its variables and the pixels


class KerasEngine:
    """Run the network of `spec` on `devices` (``cpu`` or ``gpu:N``), and pass notes for the report to `tell`."""

    @until_exit
    def __init__(
        self, spec: NetworkSpec, *, devices: tuple[str, ...], precision: Precision, batch_size: int | None,
        base: Base | None = None, tell: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        keras: Any = importlib.import_module("keras")
        backend, shape = keras.backend.backend(), (spec.size, spec.size, 3)
        library = f"Keras {keras.__version__} on {_LIBRARIES.get(backend, backend)}"
        self.name = f"{library}, {listing(device.upper() for device in devices)}"
        self.kind = f"{library}, {hardware.kinds(devices)}"  # the parts of the name that affect features
        self.backend = f"{backend} {importlib.import_module(backend).__version__}"
        self._precision, self.work = precision, Work()

        def work() -> tuple[Built, list[Replica]]:
            with full_float32():
                whole = mixed_precision(spec, base or load_base(spec, lambda _: None), precision)
                built = build(spec, lambda _: None, base=whole)
                return built, replicate(built.model, devices)

        built, self._replicas = in_a_fresh_session(work, devices[0])
        self.outputs, self.weights = built.outputs, built.weights
        self._room = hardware.Room(batch_size or BATCH, tell)
        if batch_size is None and devices[0].startswith("gpu"):
            self._find_size(shape)
        for replica in self._replicas:  # compiling for the final size takes memory
            self._room.fit(replica.device, replica.prepare)
        self.batch_size = batch_size or self._room.size
        lent = WINDOW * len(devices) + 1
        self._buffers: list[Pixels] = [np.zeros((self.batch_size, *shape), np.uint8) for _ in range(lent)]
        self._free = list(self._buffers)
        self._busy: deque[_Flight] = deque()
        self._turns = itertools.cycle(self._replicas)

    def _find_size(self, shape: tuple[int, ...]) -> None:
        """Measure the best batch size on the first device; all are assumed to be equal."""
        replica = self._replicas[0]

        def run(pixels: Pixels) -> None:
            flight = _Flight(pixels, len(pixels), replica)
            with full_float32():
                flight.start(len(pixels))
                flight.fetch(self.outputs)

        self._room.grow(replica.device, hardware.stopwatch(run, shape), hardware.largest_batch(shape))

    @property
    def is_full(self) -> bool:
        """Whether the maximum number of batches is in flight."""
        return len(self._busy) >= WINDOW * len(self._replicas)

    def buffer(self) -> Pixels:
        """Lend a buffer of a whole batch."""
        return self._free.pop()

    @until_exit
    def submit(self, buffer: Pixels, count: int) -> None:
        """Dispatch the batch to the next device in turn."""
        self._fitting(flight := _Flight(buffer, count, next(self._turns)), lambda: None)
        self._busy.append(flight)

    @until_exit
    def collect(self) -> Vectors:
        """Fetch the oldest batch's vectors."""
        flight = self._busy.popleft()
        try:
            vectors: Vectors = self._fitting(flight, lambda: flight.fetch(self.outputs))
        finally:
            self._free.append(flight.buffer)
            self.work.add(flight.started, time.perf_counter())
        if self._precision == "float16" and not all(np.isfinite(rows).all() for rows in vectors.values()):
            overflow = "float16 overflows for some images: the network gives infinite or NaN values."
            raise NetworkError(f"{overflow} Use `precision='bfloat16'` or `precision='float32'`.")
        return vectors

    def _fitting(self, flight: _Flight, then: Callable[[], Any]) -> Any:
        """Start a batch if not yet started, and call `then`; each time memory runs out, retry in smaller parts."""
        while True:
            try:
                with full_float32():
                    if not flight.parts:
                        flight.start(self._room.size)
                    return then()
            except Exception as error:  # raised again unless it is about memory
                flight.parts = []
                self._room.shrink(flight.size, flight.replica.device, error)

    @until_exit
    def close(self) -> None:
        """Wait for the batches in flight, drop them, and take back all buffers; the engine stays usable."""
        while self._busy:
            flight = self._busy.popleft()
            with suppress(Exception), full_float32():  # a dropped batch may have failed
                flight.fetch(self.outputs)
        self._free = list(self._buffers)


@dataclass(slots=True)
class _Flight:
    """A batch in flight, in parts."""

    buffer: Pixels
    count: int
    replica: Replica
    started: float = field(default_factory=time.perf_counter)
    size: int = 0  # images in each part
    parts: list[Any] = field(default_factory=list)

    def start(self, size: int) -> None:
        self.size = size
        for start in range(0, self.count, size):
            part = self.buffer[start : start + size]
            missing = size - len(part)  # at the end of the buffer
            part = np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else part
            self.parts.append(self.replica.run(part))

    def fetch(self, keys: Iterable[str]) -> Vectors:
        to_numpy = importlib.import_module("keras").ops.convert_to_numpy
        rows = {key: [np.asarray(to_numpy(part[key]), np.float32) for part in self.parts] for key in keys}
        return {key: np.concatenate(parts)[: self.count] for key, parts in rows.items()}


@dataclass(slots=True)
class Replica:
    """A network on one device."""

    device: str
    variables: list[Any]  # tensors of the backend, on the device
    run: Callable[[Pixels], Any]  # takes a whole batch; doesn't wait if the backend is asynchronous
    prepare: Callable[[int], object] = lambda _: None  # compiles for a batch size, if needed


def replicate(model: Any, devices: tuple[str, ...]) -> list[Replica]:
    """Copy `model`, built on the first of `devices`, to each of them."""
    backend = importlib.import_module("keras").backend.backend()
    if backend == "openvino":
        return [Replica(device, [], model.predict_on_batch) for device in devices]
    if (make := {"tensorflow": _on_tensorflow, "jax": _on_jax, "torch": _on_torch}.get(backend)) is None:
        raise NetworkError(f"nbfeat cannot run Keras' backend {backend!r}: use tensorflow, jax or torch.")
    return [make(model, device, _call(model), device == devices[0]) for device in devices]


def _call(model: Any) -> Call:
    return lambda trained, others, pixels: model.stateless_call(trained, others, pixels, training=False)[0]


def _values(model: Any, copy: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
    trained, others = model.trainable_variables, model.non_trainable_variables
    return [copy(variable.value) for variable in trained], [copy(variable.value) for variable in others]


def _on_tensorflow(model: Any, device: str, call: Call, is_first: bool) -> Replica:
    tensorflow: Any = importlib.import_module("tensorflow")
    kind, _, number = device.partition(":")
    place = f"/device:{kind.upper()}:{number or 0}"
    with tensorflow.device(place):
        copied = functools.partial(tensorflow.Variable, trainable=False)
        trained, others = _values(model, (lambda value: value) if is_first else copied)
        traced = tensorflow.function(lambda pixels: call(trained, others, pixels), autograph=False)
        # Tracing later would count operations in the user's session and warn about retracing.
        concrete = traced.get_concrete_function(tensorflow.TensorSpec((None, *model.input_shape[1:]), "uint8"))

    def run(pixels: Pixels) -> Any:
        with tensorflow.device(place):
            return concrete(tensorflow.constant(pixels))

    return Replica(device, [*trained, *others], run)


def _on_jax(model: Any, device: str, call: Call, is_first: bool) -> Replica:
    jax: Any = importlib.import_module("jax")
    kind, _, number = device.partition(":")
    target = jax.devices(kind)[int(number or 0)]
    # A copy, because Keras' `predict` deletes the model's own arrays on JAX.
    trained, others = _values(model, lambda value: jax.device_put(value, target, may_alias=False))
    there = jax.sharding.SingleDeviceSharding(target)

    @functools.cache
    def compiled(size: int) -> Callable[..., Any]:
        """Compile for one batch size; compiled code ignores the settings in force when it runs."""

        def work() -> Callable[..., Any]:
            with full_float32():
                pixels = jax.ShapeDtypeStruct((size, *model.input_shape[1:]), "uint8", sharding=there)
                return jax.jit(call).lower(trained, others, pixels).compile()  # type: ignore[no-any-return]

        return in_a_fresh_session(work, device)

    def run(pixels: Pixels) -> Any:
        return compiled(len(pixels))(trained, others, jax.device_put(pixels, target))

    return Replica(device, [*trained, *others], run, compiled)


def _on_torch(model: Any, device: str, call: Call, is_first: bool) -> Replica:
    torch: Any = importlib.import_module("torch")
    keras: Any = importlib.import_module("keras")
    place = device.replace("gpu", "cuda")
    trained, others = _values(model, lambda value: value.detach() if is_first else value.detach().to(place, copy=True))

    def run(pixels: Pixels) -> Any:
        # Nothing is compiled, so the settings in force now apply.
        with torch.inference_mode(), isolation.keras_defaults(), keras.device(device):
            return call(trained, others, torch.from_numpy(pixels).to(place))

    return Replica(device, [*trained, *others], run)


def in_a_fresh_session(work: Callable[[], Result], device: str) -> Result:
    """Run `work` in a new thread: Keras counts names per thread, so this doesn't affect the user's models."""
    result: Future[Result] = Future()

    def do() -> None:
        try:
            if device.startswith("gpu"):
                grow_memory()
            with isolation.keras_defaults(), importlib.import_module("keras").device(device):
                value = work()
            result.set_result(value)
        except BaseException as error:  # raised again below, in the calling thread
            result.set_exception(error)

    threading.Thread(target=do, name="nbfeat-build", daemon=True).start()
    return result.result()


def grow_memory() -> None:
    """Let TensorFlow allocate GPU memory as needed, unless it has already started or the user configured it."""
    if importlib.import_module("keras").backend.backend() != "tensorflow":
        return
    config: Any = importlib.import_module("tensorflow").config
    with suppress(RuntimeError, ValueError):
        for gpu in config.get_visible_devices("GPU"):
            config.experimental.set_memory_growth(gpu, enable=True)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute in full float32 on the current Keras backend, and restore every setting after the block."""
    switches = {"tensorflow": _full_tensorflow, "jax": _full_jax, "torch": _full_torch}
    backend = importlib.import_module("keras").backend.backend()
    with isolation.without_fast_math(), ExitStack() as stack:
        if backend in switches:
            switches[backend](importlib.import_module(backend), stack)
        yield


def _full_tensorflow(tensorflow: Any, stack: ExitStack) -> None:
    """Switch off TF32 and automatic mixed precision."""
    experimental, optimizer = tensorflow.config.experimental, tensorflow.config.optimizer
    options = optimizer.get_experimental_options().items()
    mixed = [name for name, is_on in options if name.startswith("auto_mixed_precision") and is_on is True]
    set_tf32, was_tf32 = experimental.enable_tensor_float_32_execution, experimental.tensor_float_32_execution_enabled()
    stack.callback(set_tf32, was_tf32)
    set_tf32(False)
    if mixed:
        stack.callback(optimizer.set_experimental_options, dict.fromkeys(mixed, True))
        optimizer.set_experimental_options(dict.fromkeys(mixed, False))


def _full_jax(jax: Any, stack: ExitStack) -> None:
    """Set full precision and JAX's default type rules; code compiled in the block keeps them."""
    enable_x64 = (jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")).enable_x64
    stack.enter_context(jax.default_matmul_precision("highest"))
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    stack.enter_context(enable_x64(False))


def _full_torch(torch: Any, stack: ExitStack) -> None:
    """Switch off TF32, bfloat16 products, autocast and cuDNN's benchmark mode, in older settings and PyTorch 2.9's."""
    backends, cudnn = torch.backends, torch.backends.cudnn
    switches: list[Any] = []  # from general to specific
    if hasattr(backends, "fp32_precision"):
        switches += [backends, backends.cuda.matmul, cudnn, cudnn.conv, cudnn.rnn]
        switches += [backends.mkldnn, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    own: list[str] = []
    stack.callback(_set, switches, own)
    for switch in switches:  # a setting that is not set shows the more general one
        own.append(switch.fp32_precision)
        switch.fp32_precision = "none"
    _set(switches, own)
    with suppress(RuntimeError):  # before the newer ones, which these change; PyTorch raises where the two disagree
        product, convolution = torch.get_float32_matmul_precision(), cudnn.allow_tf32
        stack.callback(setattr, cudnn, "allow_tf32", convolution)
        stack.callback(torch.set_float32_matmul_precision, product)
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
    _set(switches, ["ieee"] * len(switches))
    for kind in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        stack.enter_context(torch.autocast(kind, enabled=False))
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float32)
    stack.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
    cudnn.benchmark = False


def _set(switches: list[Any], values: list[str]) -> None:
    """Set switches from specific to general: in PyTorch 2.13 setting mkldnn's changes the most general one."""
    for switch, value in reversed(list(zip(switches, values, strict=False))):  # an interrupt may leave some unread
        switch.fp32_precision = value
