"""How many images run at once: as many as make a GPU faster, and fewer wherever its memory does not do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nbfeat.errors import NetworkError
from nbfeat.inference.engines import Pixels

FIRST = 32
LARGEST = 1024
LARGEST_BYTES = 256 * 2**20  # of pixels in one batch: three of them wait decoded, and more are in flight
GROWTH = 1.05  # a batch of twice as many images has to be faster by this
REPEATS = 2
# What libraries below a backend say where its own class of error does not.
_SIGNS = ("RESOURCE_EXHAUSTED", "ALLOC_FAILED", "out of memory", "can't allocate memory")
# Where each backend keeps the errors that are about memory, and those that may be.
_ALWAYS = (("tensorflow", "errors.ResourceExhaustedError"), ("torch", "OutOfMemoryError"))
_PERHAPS = (("tensorflow", "errors.OpError"),)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a backend had not enough memory for what it was given."""
    if isinstance(error, (MemoryError, *_classes(_ALWAYS))):
        return True
    told = str(error)
    return isinstance(error, (RuntimeError, *_classes(_PERHAPS))) and any(sign in told for sign in _SIGNS)


def _classes(names: tuple[tuple[str, str], ...]) -> list[type[BaseException]]:
    """Find classes by module and name, without importing a backend that is not there already."""
    found: list[type[BaseException]] = []
    for module, path in names:
        thing: Any = sys.modules.get(module)
        for part in path.split("."):
            thing = getattr(thing, part, None)
        if isinstance(thing, type):
            found.append(thing)
    return found


class Room:
    """How many images run at once; what has to be said of it is given to `tell`."""

    def __init__(self, size: int, tell: Callable[[str], None] = lambda _: None) -> None:
        self.size, self.was_short, self._tell = size, False, tell

    def shrink(self, size: int, device: str, error: Exception) -> None:
        """Halve the batch after `size` images were too many; any error that is not about memory is raised again."""
        if not is_out_of_memory(error):
            raise error
        self.was_short = True
        if size == 1:
            another = ", or use --device cpu" if device.startswith("gpu") else ""
            raise NetworkError(
                f"{device.upper()} has not enough memory for the network and one image. Close what else uses it, or "
                f"take a smaller backbone or --size{another}."
            ) from error
        if size == self.size:  # else it was halved already, after this batch had been started
            self.size = size // 2
            self._tell(
                f"{device.upper()} had not enough memory for {size:,} images at once, so {self.size:,} ran at once."
            )


def find(room: Room, device: str, seconds: Callable[[int], float], largest: int) -> None:
    """Set the size in `room`: double it from `FIRST` on until that is not faster, or memory does not do.

    `seconds` runs so many images on `device` and tells how long it took.
    """
    room.size, best = min(FIRST, largest), 0.0
    while True:
        size = room.size
        try:
            rate = size / seconds(size)
        except Exception as error:  # raised again unless it is about memory
            room.shrink(size, device, error)
            if best:
                return
            continue
        if rate < best * GROWTH:
            room.size = size // 2
            return
        best = rate
        if room.was_short or size * 2 > largest:
            return
        room.size = size * 2


def largest_for(shape: tuple[int, ...]) -> int:
    """Return how many images of `shape` a batch has at most."""
    return max(1, min(LARGEST, LARGEST_BYTES // int(np.prod(shape))))


def stopwatch(
    run: Callable[[Pixels], object], shape: tuple[int, ...], clock: Callable[[], float] = time.perf_counter
) -> Callable[[int], float]:
    """Return what tells how many seconds `run` takes for so many images of `shape`, once it is warm."""

    def seconds(size: int) -> float:
        pixels = np.zeros((size, *shape), np.uint8)
        run(pixels)  # compiles, and lets libraries choose how
        times = []
        for _ in range(REPEATS):
            start = clock()
            run(pixels)
            times.append(clock() - start)
        return min(times)

    return seconds
