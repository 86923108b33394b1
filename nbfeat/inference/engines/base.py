"""Define the protocol of the engines that run a network: OpenVINO on the CPU, Keras on any device that it supports.

An engine lends buffers, runs them in the background and returns results in order::

    buffer = engine.buffer()        # (batch, size, size, 3) uint8, to fill
    if engine.is_full:              # as many batches in flight as possible
        vectors = engine.collect()  # {cut: (count, width) float32} of the oldest batch
    engine.submit(buffer, count)    # runs the first `count` images of the buffer
"""

import atexit
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, ParamSpec, Protocol, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from nbfeat.inference.spec import Output

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Asked = Literal["auto", "float32", "bfloat16", "float16"]
Pixels = NDArray[np.uint8]
Vectors = dict[str, NDArray[np.float32]]
Given = ParamSpec("Given")
Result = TypeVar("Result")
_changed = threading.Condition()
_inside, _is_exiting = 0, False
_PROCESS = os.getpid()


def until_exit(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """At exit, keep threads out of `method`: Python would end those that leave C++, and that aborts the process."""

    @functools.wraps(method)
    def run(*args: Given.args, **options: Given.kwargs) -> Result:
        global _inside  # noqa: PLW0603 - all engines of the process count
        if threading.current_thread() is threading.main_thread():
            return method(*args, **options)
        with _changed:
            _changed.wait_for(lambda: not _is_exiting)  # after that, forever
            _inside += 1
        try:
            return method(*args, **options)
        finally:
            with _changed:
                _inside -= 1
                _changed.notify_all()

    return run


@atexit.register
def _exit() -> None:
    global _is_exiting  # noqa: PLW0603 - for all engines
    if os.getpid() != _PROCESS:  # forked, without the other threads
        return
    with _changed:
        _is_exiting = True
        _changed.wait_for(lambda: not _inside, timeout=30)  # seconds, for a batch


@dataclass(slots=True)
class Work:
    """How long an engine was busy."""

    seconds: float = 0.0
    _until: float = 0.0

    def add(self, started: float, ended: float) -> None:
        """Add a batch, counting overlapping time once. Batches must come in the order in which they started."""
        self.seconds += max(0.0, ended - max(started, self._until))
        self._until = max(ended, self._until)


class Engine(Protocol):
    """Run one network."""

    name: str  # what the report shows: library, version, device
    outputs: dict[str, Output]
    batch_size: int
    work: Work

    @property
    def is_full(self) -> bool:
        """Whether `collect` must be called before `submit`."""

    def buffer(self) -> Pixels:
        """Lend a buffer of a whole batch."""

    def submit(self, buffer: Pixels, count: int) -> None:
        """Start the network on the first `count` images of a lent buffer, without waiting."""

    def collect(self) -> Vectors:
        """Wait for the oldest batch and return its rows."""

    def close(self) -> None:
        """Stop all batches in flight, wait until no buffer is in use, and take back all buffers."""
