"""The CPU engine: OpenVINO runs a compiled network from disk.

Requests run first in, first out over shared buffers. The batch size is fixed, because a dynamic one is slower and
changes results; a partial batch runs the whole buffer, and only its first rows are used. An image's features are thus
identical to the bit for any batch size, order and neighbors.
"""

import contextlib
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nbfeat import isolation
from nbfeat.errors import NetworkError, first_line
from nbfeat.inference.compiled_models import Stored
from nbfeat.inference.engines.base import Pixels, Precision, Vectors, Work, until_exit
from nbfeat.inference.engines.cpu_count import available_cores
from nbfeat.inference.engines.devices import is_out_of_memory, memory_errors_named

BATCH = 4  # 8 isn't faster and takes 50 MB more; 16 and 32 are slower and delay interrupts
FASTER: tuple[Precision, ...] = ("bfloat16",)  # than float32, on some CPUs; float16 isn't on any
_TYPES: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_WAIT_MS, _RUN = 100, "run the network"


def name(*, threads: bool = True) -> str:
    """Name the engine without importing it: library, version, device and, optionally, threads."""
    cores, library = available_cores(), f"OpenVINO {isolation.version_of('openvino')}, CPU"
    return f"{library}, {cores} thread{'s' if cores > 1 else ''}" if threads else library


def _compiled(core: Any, graph: Any, precision: Precision) -> Any:
    """Compile `graph` in a temporary thread, because OpenVINO permanently changes the thread that compiles."""
    settings = {
        "INFERENCE_PRECISION_HINT": _TYPES[precision],  # always set: the default is bfloat16 if the CPU supports it
        "INFERENCE_NUM_THREADS": available_cores(),
        "NUM_STREAMS": available_cores(),
        "CPU_DENORMALS_OPTIMIZATION": True,  # flush numbers below 1e-38 to zero: some CPUs are 100 times slower on them
    }
    try:
        # It flushes denormals to zero, and the network frees its signal stack: an interrupt then kills the process.
        with isolation.without_fast_math(), ThreadPoolExecutor(1, thread_name_prefix="nbfeat-compile") as one:
            compiled = one.submit(core.compile_model, graph, "CPU", settings).result()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise NetworkError(f"This CPU cannot run the network in {precision}: {first_line(error, -1)}") from error
    runs_in = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
    if runs_in != _TYPES[precision]:  # OpenVINO changes it silently
        instead = f"OpenVINO would use {runs_in} instead. Use `precision='float32'`."
        raise NetworkError(f"This CPU doesn't support {precision}: {instead}")
    return compiled


class OpenVINOEngine:
    """Run `stored` on this machine's CPU, for all outputs or `only` one."""

    @until_exit
    @memory_errors_named(_RUN)
    def __init__(
        self, stored: Stored, *, precision: Precision, batch_size: int | None, only: str | None = None
    ) -> None:
        openvino = isolation.import_openvino()
        self.name, self.outputs, self.batch_size, self.work = name(), stored.outputs, batch_size or BATCH, Work()
        self._tensor, self._stored = openvino.Tensor, stored
        core = openvino.Core()
        graph = core.read_model(stored.folder / "network.xml")
        if only is not None:  # skips layers that only other outputs need
            self.outputs = {only: stored.outputs[only]}
            for other in [output for output in graph.outputs if only not in output.get_names()]:
                graph.remove_result(other.get_node())
        graph.reshape([self.batch_size, *(size.get_length() for size in list(graph.input().get_partial_shape())[1:])])
        compiled = _compiled(core, graph, precision)
        count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") + 1
        self._idle: list[Any] = [compiled.create_infer_request() for _ in range(count)]
        self._busy: deque[tuple[Any, Pixels, int, float]] = deque()  # the last is the start time
        # The engine keeps the buffers alive, since requests don't; one more than can be in flight.
        self._buffers: list[Pixels] = [np.zeros(tuple(graph.input().get_shape()), np.uint8) for _ in range(count + 1)]
        self._free = list(self._buffers)

    @property
    def is_full(self) -> bool:
        """Whether every request is in flight."""
        return not self._idle

    def buffer(self) -> Pixels:
        """Lend a buffer of a whole batch."""
        return self._free.pop()

    @until_exit
    def submit(self, buffer: Pixels, count: int) -> None:
        """Start the oldest idle request on `buffer`, in place."""
        request = self._idle.pop()
        request.set_input_tensor(self._tensor(buffer, shared_memory=True))
        started = time.perf_counter()
        request.start_async()
        self._busy.append((request, buffer, count, started))

    @until_exit
    @memory_errors_named(_RUN)
    def collect(self) -> Vectors:
        """Wait for the oldest batch, in slices that keep interrupts responsive."""
        request, buffer, count, started = self._busy[0]
        while not request.wait_for(_WAIT_MS):
            pass
        self.work.add(started, started + request.latency / 1000)
        vectors = {key: np.array(request.get_tensor(key).data[:count], np.float32) for key in self.outputs}
        self._busy.popleft()
        self._idle.append(request)
        self._free.append(buffer)
        return vectors

    @until_exit
    def close(self) -> None:
        """Cancel the batches in flight, wait for them, and take back all buffers; the engine stays usable."""
        for request, *_ in self._busy:
            request.cancel()
        while self._busy:
            request, *_ = self._busy.popleft()
            with contextlib.suppress(RuntimeError):  # "canceled", as requested
                request.wait()
            self._idle.append(request)
        self._free = list(self._buffers)
