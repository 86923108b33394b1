"""Run a network on the hardware: the protocol of engines, one for the CPU and one for whatever Keras can use.

An engine lends buffers, runs them in the background and gives results back oldest first::

    buffer = engine.buffer()        # (batch, size, size, 3) uint8, to fill
    if engine.is_full:              # the window of batches in flight
        vectors = engine.collect()  # {cut: (count, width) float32}, the oldest
    engine.submit(buffer, count)    # the first `count` images of the buffer count
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from nbfeat.inference.spec import Output

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Asked = Literal["auto", "float32", "bfloat16", "float16"]
Pixels = NDArray[np.uint8]
Vectors = dict[str, NDArray[np.float32]]


@dataclass(slots=True)
class Work:
    """How long an engine was at work."""

    seconds: float = 0.0
    _until: float = 0.0

    def add(self, started: float, ended: float) -> None:
        """Count a batch; what ran beside others counts once. Batches come in the order of their start."""
        self.seconds += max(0.0, ended - max(started, self._until))
        self._until = max(ended, self._until)


class Engine(Protocol):
    """What runs one network."""

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
        """Start the network on the first `count` images of a lent buffer; returns at once."""

    def collect(self) -> Vectors:
        """Wait for the oldest batch and return its rows."""

    def close(self) -> None:
        """Stop what is in flight, wait until nothing reads from the buffers, and take them all back."""
