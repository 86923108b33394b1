"""Which devices run a network, what they are called, and how many images run on one at once."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np

from nbfeat import isolation
from nbfeat.errors import NetworkError, RequestError
from nbfeat.inference.engines.base import Asked, Pixels

_DRIVERS = Path("/dev")
FIRST = 32  # images in the first batch whose size is measured
LARGEST = 1024
LARGEST_BYTES = 256 * 2**20  # of pixels in one batch: three of them wait decoded, and more are in flight
GROWTH = 1.05  # a batch of twice as many images has to be faster by this
REPEATS = 2
Result = TypeVar("Result")


def check_device(asked: str) -> str:
    """Return `asked` if it is ``auto``, ``cpu``, ``gpu`` or ``gpu:N``."""
    if re.fullmatch(r"auto|cpu|gpu(:\d+)?", str(asked)) is None:
        raise RequestError(f"--device takes auto, cpu, gpu or gpu:N, not {asked!r}.")
    return asked


def check_precision(asked: str) -> Asked:
    """Return `asked` if it is ``auto`` or a precision."""
    words: tuple[Asked, ...] = get_args(Asked)
    if asked not in words:
        raise RequestError(f"--precision takes {', '.join(words)}, not {asked!r}.")
    return words[words.index(asked)]


def choose_devices(asked: str) -> tuple[str, ...]:
    """Turn ``auto``, ``cpu``, ``gpu`` or ``gpu:1`` into ``cpu``, one ``gpu:N``, or for ``auto`` every GPU there is."""
    kind, _, number = asked.partition(":")
    if kind == "cpu" or (kind == "auto" and not sign_of_gpu()):  # else Keras' backend is imported, for seconds
        return ("cpu",)
    found = count_gpus()
    if kind == "auto":
        return tuple(f"gpu:{one}" for one in range(found)) or ("cpu",)
    if int(number or 0) < found:
        return (f"gpu:{number or 0}",)
    seen = f"{found} GPU{'s' if found > 1 else ''}" if found else "no GPU"
    raise RequestError(
        f"Keras' backend sees {seen}, so --device {asked} cannot be had. Use --device cpu, or install the extra "
        "for GPUs: pip install 'nbfeat[gpu]'."
    )


def sign_of_gpu() -> bool:
    """Look for a GPU without importing anything: a driver's files."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return False
    # A container may have been given the second GPU alone.
    return any(any(_DRIVERS.glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg"))


def count_gpus() -> int:
    """Ask the backend that Keras has in this process how many GPUs it can use."""
    with suppress(ImportError, RuntimeError):
        return len(_gpu_names())
    return 0


def kinds(devices: tuple[str, ...]) -> str:
    """Name what `devices` are, but neither which nor how many: another kind gives other last bits."""
    named = [device.partition(":") for device in devices]
    return ", ".join(sorted({"CPU" if kind == "cpu" else _gpu_names()[int(at or 0)] for kind, _, at in named}))


def _gpu_names() -> list[str]:
    backend = importlib.import_module("keras").backend.backend()
    module: Any = importlib.import_module(backend)
    match backend:
        case "tensorflow":
            details = map(module.config.experimental.get_device_details, module.config.get_visible_devices("GPU"))
            return [detail.get("device_name", "GPU") for detail in details]
        case "jax":
            return [device.device_kind for device in module.local_devices() if device.platform == "gpu"]
        case "torch":
            return [module.cuda.get_device_name(at) for at in range(module.cuda.device_count())]
    return []


def cpu() -> str:
    """Name this CPU and what it can compute with: the same network gives other last bits on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.processor()} {platform.machine()}"
    facts = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def openvino_works() -> bool:
    """Tell whether OpenVINO can be imported."""
    with suppress(ImportError, OSError):
        isolation.import_openvino()
        return True
    return False


class Room:
    """How many images run at once; what has to be said of it is given to `tell`."""

    def __init__(self, size: int, tell: Callable[[str], None] = lambda _: None) -> None:
        self.size, self.was_short, self._tell = size, False, tell

    def fit(self, device: str, run: Callable[[int], Result]) -> Result:
        """Return what `run` does with as many images as run at once, fewer wherever memory does not do."""
        while True:
            try:
                return run(size := self.size)
            except Exception as error:  # raised again unless it is about memory
                self.shrink(size, device, error)

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
            short = f"{device.upper()} had not enough memory for {size:,} images at once"
            self._tell(f"{short}, so {self.size:,} ran at once.")

    def grow(self, device: str, seconds: Callable[[int], float], largest: int) -> None:
        """Double the size until that is not faster, by the `seconds` that so many take, or memory does not do."""
        self.size, best = min(FIRST, largest), 0.0
        while True:
            rate = self.fit(device, lambda size: size / seconds(size))
            if self.was_short:  # this is the largest size that runs
                return
            if rate < best * GROWTH:
                self.size //= 2
                return
            if self.size * 2 > largest:
                return
            best, self.size = rate, self.size * 2


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a backend had not enough memory for what it was given."""
    classes = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if classes & {"builtins.MemoryError", "tensorflow.ResourceExhaustedError", "torch.OutOfMemoryError"}:
        return True
    # Libraries below a backend say so where its own class of error does not.
    return bool(classes & {"builtins.RuntimeError", "tensorflow.OpError"}) and any(
        sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "ALLOC_FAILED", "out of memory", "can't allocate memory")
    )


def largest_batch(shape: tuple[int, ...]) -> int:
    """Return how many images of `shape` a batch has at most."""
    return max(1, min(LARGEST, LARGEST_BYTES // int(np.prod(shape))))


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """Return what `work` gives, and in how many seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def stopwatch(run: Callable[[Pixels], object], shape: tuple[int, ...]) -> Callable[[int], float]:
    """Return what tells how many seconds `run` takes for so many images of `shape`, once it is warm."""

    def seconds(size: int) -> float:
        pixels = np.zeros((size, *shape), np.uint8)
        run(pixels)  # compiles, and lets libraries choose how
        return min(timed(lambda: run(pixels))[1] for _ in range(REPEATS))

    return seconds
