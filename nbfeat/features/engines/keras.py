"""The engine for GPUs, and for a CPU without OpenVINO: the same model on whatever backend Keras has here.

The model is compiled once for one batch shape; the last, partial batch is padded. The next batch is dispatched before
the oldest one is fetched.
"""

from __future__ import annotations

import importlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from nbfeat import quiet
from nbfeat.errors import NetworkError, RequestError
from nbfeat.features.engines import Pixels, Precision, Vectors
from nbfeat.features.network import Base, Built, NetworkSpec, build

BATCH = 32
WINDOW = 2
_SHOWN = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch", "openvino": "OpenVINO backend"}


class KerasEngine:
    """Run the network of `spec` on `device` (``cpu`` or ``gpu:N``)."""

    def __init__(
        self,
        spec: NetworkSpec,
        *,
        device: str,
        precision: Precision,
        batch_size: int | None,
        base: Base | None = None,
    ) -> None:
        if precision != "float32":
            message = f"The Keras engine computes in float32; --precision {precision} is for the CPU engine."
            raise RequestError(message)
        keras: Any = importlib.import_module("keras")
        self.batch_size, self._device = batch_size or BATCH, device
        self.seconds = self._until = 0.0
        backend = keras.backend.backend()
        self.name = f"Keras {keras.__version__} on {_SHOWN.get(backend, backend)}, {device.upper()}"
        self.backend = f"{backend} {importlib.import_module(backend).__version__}"

        def work() -> tuple[Built, Run]:
            built = build(spec, lambda _: None, base=base)
            return built, _compiled(built, self.batch_size)

        built, self._run = in_a_fresh_session(work, device)
        self.outputs, self.weights = built.outputs, built.weights
        shape = (self.batch_size, spec.size, spec.size, 3)
        self._buffers: list[Pixels] = [np.zeros(shape, np.uint8) for _ in range(WINDOW + 1)]
        self._free = list(self._buffers)
        self._busy: deque[tuple[Any, Pixels, int]] = deque()

    @property
    def is_full(self) -> bool:
        """Whether the window of batches in flight is full."""
        return len(self._busy) >= WINDOW

    @property
    def in_flight(self) -> int:
        """How many batches were submitted and not yet collected."""
        return len(self._busy)

    def buffer(self) -> Pixels:
        """Lend a buffer of a whole batch."""
        return self._free.pop()

    def submit(self, buffer: Pixels, count: int) -> None:
        """Dispatch the whole buffer."""
        with importlib.import_module("keras").device(self._device):
            self._busy.append((self._run(buffer), buffer, count))

    def collect(self) -> Vectors:
        """Fetch the oldest batch's vectors."""
        result, buffer, count = self._busy.popleft()
        try:
            to_numpy = importlib.import_module("keras").ops.convert_to_numpy
            return {key: np.array(to_numpy(result[key])[:count], np.float32) for key in self.outputs}
        finally:
            self._free.append(buffer)

    def close(self) -> None:
        """Wait for what is in flight, drop it, and take back every buffer; the engine can be used again."""
        while self._busy:
            self.collect()
        self._free = list(self._buffers)


Run = Callable[[Pixels], Any]
Result = TypeVar("Result")


def in_a_fresh_session(work: Callable[[], Result], device: str) -> Result:
    """Do `work` in a thread of its own: Keras counts by thread, so neither side sees the other's names."""
    result: list[Any] = []

    def do() -> None:
        try:
            with quiet.keras_defaults(), importlib.import_module("keras").device(device):
                result.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again below, in the calling thread
            result.append(error)

    thread = threading.Thread(target=do, name="nbfeat-build", daemon=True)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]  # type: ignore[no-any-return]


def _compiled(built: Built, batch_size: int) -> Run:
    """Compile the model in the way of its backend; `predict_on_batch` would block until the batch is done."""
    keras: Any = importlib.import_module("keras")
    model = built.model
    match keras.backend.backend():
        case "tensorflow":
            tensorflow: Any = importlib.import_module("tensorflow")
            traced = tensorflow.function(lambda x: model(x, training=False), autograph=False)
            # Traced now: at the first batch it would count operations in the user's session, and warn of retracing.
            shape = (batch_size, *model.input_shape[1:])
            concrete = traced.get_concrete_function(tensorflow.TensorSpec(shape, "uint8"))
            return lambda pixels: concrete(tensorflow.constant(pixels))
        case "jax":
            jax: Any = importlib.import_module("jax")
            fixed = [variable.value for variable in model.trainable_variables]
            moving = [variable.value for variable in model.non_trainable_variables]
            call = jax.jit(lambda t, n, x: model.stateless_call(t, n, x, training=False)[0])
            return lambda pixels: call(fixed, moving, jax.device_put(pixels))
        case "torch":
            torch: Any = importlib.import_module("torch")

            def run(pixels: Pixels) -> Any:  # noqa: ANN401 - tensors
                with torch.inference_mode():
                    return model(keras.ops.convert_to_tensor(pixels), training=False)

            return run
        case "openvino":
            return model.predict_on_batch  # type: ignore[no-any-return]
        case other:
            message = f"Keras' backend {other!r} is not one that nbfeat can run: use tensorflow, jax or torch."
            raise NetworkError(message)
