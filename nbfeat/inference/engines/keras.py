"""The engine for GPUs, and for a CPU without OpenVINO: the same model on whatever backend Keras has here.

A model is built once. Each device has a replica: a copy of its variables, and a function that runs the model with
these, so that replicas are equal to the bit. Batches go to them in turn; the next ones are dispatched before the oldest
is fetched. Where memory does not do, a batch is run in smaller parts, and no image is lost.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nbfeat import isolation
from nbfeat.backbones import keras_weights
from nbfeat.errors import NetworkError, listing
from nbfeat.inference.channels_first import gives_the_same
from nbfeat.inference.engines import devices as hardware
from nbfeat.inference.engines.base import Pixels, Precision, Vectors, Work
from nbfeat.inference.engines.keras_session import full_float32, in_a_fresh_session
from nbfeat.inference.model import Base, Built, build, load_base
from nbfeat.inference.spec import NetworkSpec

BATCH = 32
FASTER_ON_GPUS: tuple[Precision, ...] = ("bfloat16", "float16")  # than float32; numbers in the first cannot overflow
WINDOW = 2  # batches in flight on each device
_LIBRARIES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch", "openvino": "OpenVINO backend"}
Call = Callable[[list[Any], list[Any], Any], Any]  # a model as a function of its variables and the pixels


class KerasEngine:
    """Run the network of `spec` on `devices` (``cpu`` or ``gpu:N``); what comes up is given to `tell` as sentences."""

    def __init__(
        self,
        spec: NetworkSpec,
        *,
        devices: tuple[str, ...],
        precision: Precision,
        batch_size: int | None,
        base: Base | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        keras: Any = importlib.import_module("keras")
        backend, shape = keras.backend.backend(), (spec.size, spec.size, 3)
        library = f"Keras {keras.__version__} on {_LIBRARIES.get(backend, backend)}"
        self.name = f"{library}, {listing(device.upper() for device in devices)}"
        self.kind = f"{library}, {hardware.kinds(devices)}"  # all of the name that decides numbers
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
        for replica in self._replicas:  # compiled for the size that is used, which takes memory, too
            self._room.fit(replica.device, replica.prepare)
        self.batch_size = batch_size or self._room.size
        lent = WINDOW * len(devices) + 1
        self._buffers: list[Pixels] = [np.zeros((self.batch_size, *shape), np.uint8) for _ in range(lent)]
        self._free = list(self._buffers)
        self._busy: deque[Flight] = deque()
        self._turns = itertools.cycle(self._replicas)

    def _find_size(self, shape: tuple[int, ...]) -> None:
        """Measure how many images should run at once; all devices are taken for equal."""
        replica = self._replicas[0]

        def run(pixels: Pixels) -> None:
            with full_float32():
                fetch(replica.run(pixels), list(self.outputs), len(pixels))

        self._room.grow(replica.device, hardware.stopwatch(run, shape), hardware.largest_batch(shape))

    @property
    def is_full(self) -> bool:
        """Whether the window of batches in flight is full."""
        return len(self._busy) >= WINDOW * len(self._replicas)

    @property
    def in_flight(self) -> int:
        """How many batches were submitted and not yet collected."""
        return len(self._busy)

    def buffer(self) -> Pixels:
        """Lend a buffer of a whole batch."""
        return self._free.pop()

    def submit(self, buffer: Pixels, count: int) -> None:
        """Dispatch the batch to the device whose turn it is."""
        flight = Flight(buffer, count, next(self._turns))
        self._fitting(flight, lambda: None)
        self._busy.append(flight)

    def collect(self) -> Vectors:
        """Fetch the oldest batch's vectors."""
        flight = self._busy.popleft()
        try:
            vectors: Vectors = self._fitting(flight, lambda: flight.fetch(list(self.outputs)))
        finally:
            self._free.append(flight.buffer)
            self.work.add(flight.started, time.perf_counter())
        if self._precision == "float16" and not all(np.isfinite(rows).all() for rows in vectors.values()):
            raise NetworkError(
                "In float16 the network's numbers grow too large for some images. "
                "Use --precision bfloat16, or --precision float32."
            )
        return vectors

    def _fitting(self, flight: Flight, then: Callable[[], Any]) -> Any:
        """Start a batch unless that was done, and do `then`; whenever memory does not do, again in smaller parts."""
        while True:
            try:
                with full_float32():
                    if not flight.parts:
                        flight.start(self._room.size)
                    return then()
            except Exception as error:  # raised again unless it is about memory
                flight.parts = []
                self._room.shrink(flight.size, flight.replica.device, error)

    def close(self) -> None:
        """Wait for what is in flight, drop it, and take back every buffer; the engine can be used again."""
        while self._busy:
            flight = self._busy.popleft()
            with contextlib.suppress(Exception), full_float32():  # what is dropped may have failed
                flight.fetch(list(self.outputs))
        self._free = list(self._buffers)


@dataclass(slots=True)
class Flight:
    """A batch on its way, in parts."""

    buffer: Pixels
    count: int
    replica: Replica
    started: float = field(default_factory=time.perf_counter)
    size: int = 0  # images in each part
    parts: list[Any] = field(default_factory=list)

    def start(self, size: int) -> None:
        """Dispatch the batch in parts of `size` images."""
        self.size = size
        self.parts = [self.replica.run(part) for part in _parts(self.buffer, self.count, size)]

    def fetch(self, keys: list[str]) -> Vectors:
        """Wait for every part, and put them together."""
        left = range(self.count, 0, -self.size)
        rows = [fetch(part, keys, min(rest, self.size)) for part, rest in zip(self.parts, left, strict=True)]
        return {key: np.concatenate([part[key] for part in rows]) for key in keys}


def _parts(buffer: Pixels, count: int, size: int) -> Iterator[Pixels]:
    for start in range(0, count, size):
        part = buffer[start : start + size]
        missing = size - len(part)  # at the end of the buffer
        yield np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else part


def fetch(result: Any, keys: list[str], count: int) -> Vectors:
    """Wait for a result and return the first `count` rows of each output."""
    to_numpy = importlib.import_module("keras").ops.convert_to_numpy
    return {key: np.array(to_numpy(result[key])[:count], np.float32) for key in keys}


# Replicas, in the way of each backend


@dataclass(slots=True)
class Replica:
    """A network on one device."""

    device: str
    variables: list[Any]  # tensors of the backend, on the device
    run: Callable[[Pixels], Any]  # takes a whole batch; returns before it is done, where the backend can
    prepare: Callable[[int], object] = lambda _: None  # compiles for batches of so many images, where that is needed


def replicate(model: Any, devices: tuple[str, ...]) -> list[Replica]:
    """Put `model`, built on the first of `devices`, on each of them."""
    backend = importlib.import_module("keras").backend.backend()
    if backend == "openvino":
        return [Replica(device, [], model.predict_on_batch) for device in devices]
    make = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}.get(backend)
    if make is None:
        raise NetworkError(f"Keras' backend {backend!r} is not one that nbfeat can run: use tensorflow, jax or torch.")
    return [make(model, device, _call(model), device == devices[0]) for device in devices]


def _call(model: Any) -> Call:
    return lambda trained, others, pixels: model.stateless_call(trained, others, pixels, training=False)[0]


def _values(model: Any, copy: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
    trained, others = model.trainable_variables, model.non_trainable_variables
    return [copy(variable.value) for variable in trained], [copy(variable.value) for variable in others]


def _tensorflow(model: Any, device: str, call: Call, is_first: bool) -> Replica:
    tensorflow: Any = importlib.import_module("tensorflow")
    kind, _, number = device.partition(":")
    place = f"/device:{kind.upper()}:{number or 0}"

    def copied(value: Any) -> Any:
        return value if is_first else tensorflow.Variable(value, trainable=False)

    with tensorflow.device(place):
        trained, others = _values(model, copied)
        traced = tensorflow.function(lambda pixels: call(trained, others, pixels), autograph=False)
        # Traced now: at the first batch it would count operations in the user's session, and warn of retracing.
        concrete = traced.get_concrete_function(tensorflow.TensorSpec((None, *model.input_shape[1:]), "uint8"))

    def run(pixels: Pixels) -> Any:
        with tensorflow.device(place):
            return concrete(tensorflow.constant(pixels))

    return Replica(device, [*trained, *others], run)


def _jax(model: Any, device: str, call: Call, is_first: bool) -> Replica:
    jax: Any = importlib.import_module("jax")
    kind, _, number = device.partition(":")
    target = jax.devices(kind)[int(number or 0)]
    # Not the model's own: what Keras' `predict` is given of those on JAX, it deletes.
    trained, others = _values(model, lambda value: jax.device_put(value, target, may_alias=False))
    there = jax.sharding.SingleDeviceSharding(target)

    @functools.cache
    def compiled(size: int) -> Callable[..., Any]:
        """Compile for one size: what was compiled does not ask for any settings when it runs."""

        def work() -> Callable[..., Any]:
            with full_float32():
                pixels = jax.ShapeDtypeStruct((size, *model.input_shape[1:]), "uint8", sharding=there)
                return jax.jit(call).lower(trained, others, pixels).compile()  # type: ignore[no-any-return]

        return in_a_fresh_session(work, device)

    def run(pixels: Pixels) -> Any:
        return compiled(len(pixels))(trained, others, jax.device_put(pixels, target))

    return Replica(device, [*trained, *others], run, compiled)


def _torch(model: Any, device: str, call: Call, is_first: bool) -> Replica:
    torch: Any = importlib.import_module("torch")
    keras: Any = importlib.import_module("keras")
    place = device.replace("gpu", "cuda")

    def copied(value: Any) -> Any:
        return value.detach() if is_first else value.detach().to(place, copy=True)

    trained, others = _values(model, copied)

    def run(pixels: Pixels) -> Any:
        # Nothing is compiled, so the settings of the moment count.
        with torch.inference_mode(), isolation.keras_defaults(), keras.device(device):
            return call(trained, others, torch.from_numpy(pixels).to(place))

    return Replica(device, [*trained, *others], run)


# Fewer bits


def mixed_precision(spec: NetworkSpec, base: Base, precision: Precision) -> Base:
    """Return `base` computing in `precision`, each layer by a policy of its own; float32 leaves it as it is.

    Variables stay in float32, and so do layers that prepare pixels or end the network with a norm. Of a network that a
    function of the user's builds it is first tried whether a clone in float32 gives the same.
    """
    if precision == "float32":
        return base
    network, loaded = base
    cause = None
    try:
        turned = in_policy(network, f"mixed_{precision}")
        kept = _kept_exact(turned)
        left = [layer for layer in keras_weights.leaves(turned) if layer not in kept]
        exact = sorted(layer.name for layer in left if layer.compute_dtype != precision)
        reason = f"of its layers, {exact[0]} stays in float32" if exact else ""
        if not reason and spec.is_registered:
            models = (in_policy(network, "float32"), network)
            twin, straight = (build(spec, lambda _: None, base=(one, loaded)).model for one in models)
            reason = "" if gives_the_same(twin, straight) else "a copy of it gives other numbers"
    except Exception as error:
        cause = error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if reason:
        raise NetworkError(
            f"{spec.title} cannot be turned to {precision} ({reason}). Use --precision float32."
        ) from cause
    return turned, loaded


def in_policy(network: Any, policy: str) -> Any:
    """Clone `network`, with the same weights, and `policy` for every layer that computes features."""
    keras: Any = importlib.import_module("keras")
    kept = _kept_exact(network)

    def edit(layer: Any, config: dict[str, Any]) -> None:
        if isinstance(layer, keras.layers.Layer):
            config["dtype"] = "float32" if layer in kept else policy

    return keras_weights.cloned(network, edit)


def _kept_exact(network: Any) -> list[Any]:
    """Return the layers that stay in float32: those that scale pixels, and a norm at the end, which follows pooling."""
    layers: Any = importlib.import_module("keras").layers
    preparing = (layers.Rescaling, layers.Normalization)
    kept = [layer for layer in keras_weights.leaves(network) if isinstance(layer, preparing)]
    return kept + [layer for layer in network.layers[-1:] if isinstance(layer, layers.LayerNormalization)]
