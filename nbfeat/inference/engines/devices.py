"""The same network on each of several devices, in the way of the backend that Keras has here.

A model is built once. Each device gets a copy of its variables, and a function that runs the model with these, so that
replicas are equal to the bit and layers of the user's own need not be built again.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbfeat import isolation
from nbfeat.errors import NetworkError
from nbfeat.inference.engines import Pixels, Vectors, exact
from nbfeat.inference.engines.session import in_a_fresh_session

if TYPE_CHECKING:
    import keras


@dataclass(slots=True)
class Replica:
    """A network on one device."""

    device: str
    variables: list[Any]  # tensors of the backend, on the device
    run: Callable[[Pixels], Any]  # takes a whole batch; returns before it is done, where the backend can
    prepare: Callable[[int], None] = lambda _: None  # compiles for batches of so many images, where that is needed


def replicate(model: keras.Model, devices: tuple[str, ...]) -> list[Replica]:
    """Put `model`, built on the first of `devices`, on each of them."""
    backend = importlib.import_module("keras").backend.backend()
    makers: dict[str, Callable[..., Replica]] = {
        "tensorflow": _tensorflow,
        "jax": _jax,
        "torch": _torch,
        "openvino": lambda model, device, **_: Replica(device, [], model.predict_on_batch),
    }
    if backend not in makers:
        raise NetworkError(f"Keras' backend {backend!r} is not one that nbfeat can run: use tensorflow, jax or torch.")
    call = _call(model)
    return [
        makers[backend](model, device, call=call, is_first=number == 0) for number, device in enumerate(devices)
    ]  # fmt: skip


def fetch(result: Any, keys: list[str], count: int) -> Vectors:
    """Wait for a result and return the first `count` rows of each output."""
    to_numpy = importlib.import_module("keras").ops.convert_to_numpy
    return {key: np.array(to_numpy(result[key])[:count], np.float32) for key in keys}


def _call(model: keras.Model) -> Callable[..., Any]:
    """Return the model as a function of its variables and the pixels."""
    return lambda trained, others, pixels: model.stateless_call(trained, others, pixels, training=False)[0]


def _values(model: Any, copy: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
    return (
        [copy(variable.value) for variable in model.trainable_variables],
        [copy(variable.value) for variable in model.non_trainable_variables],
    )


def _tensorflow(model: Any, device: str, *, call: Callable[..., Any], is_first: bool) -> Replica:
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


def _jax(
    model: Any, device: str, *, call: Callable[..., Any], is_first: bool
) -> Replica:  # a Keras model; all is copied
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
            with exact.float32():
                pixels = jax.ShapeDtypeStruct((size, *model.input_shape[1:]), "uint8", sharding=there)
                return jax.jit(call).lower(trained, others, pixels).compile()  # type: ignore[no-any-return]

        return in_a_fresh_session(work, device)

    def run(pixels: Pixels) -> Any:
        return compiled(len(pixels))(trained, others, jax.device_put(pixels, target))

    def prepare(size: int) -> None:
        compiled(size)

    return Replica(device, [*trained, *others], run, prepare)


def _torch(model: Any, device: str, *, call: Callable[..., Any], is_first: bool) -> Replica:
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
