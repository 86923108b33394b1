"""Choose the devices that run a network, name them, and find how many images fit on one at once."""

import hashlib
import importlib
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import numpy as np

from nbfeat import isolation
from nbfeat.errors import ExtractionError, RequestError, first_line, listing
from nbfeat.inference.engines.base import Asked, Pixels

_DRIVERS = Path("/dev")
FIRST = 32  # images in the first batch that is timed
LARGEST = 1024
LARGEST_BYTES = 256 * 2**20  # of pixels per batch; three batches wait decoded, and more are in flight
GROWTH = 1.05  # speedup that makes a batch of twice the size worthwhile
REPEATS = 2
_OUT_OF_MEMORY = re.compile(
    "RESOURCE_EXHAUSTED|ALLOC_FAILED|out of memory|can't (alloc|start new thread)|cannot allocate memory|MemoryError|"
    "bad.alloc|failed to map segment|resource temporarily unavailable", re.IGNORECASE,
)  # fmt: skip
Result = TypeVar("Result")


def check_device(asked: str) -> str:
    """Return `asked` if it is ``auto``, ``cpu``, ``gpu`` or ``gpu:N``."""
    if re.fullmatch(r"auto|cpu|gpu(:\d+)?", str(asked)) is None:
        raise RequestError(f"`device` must be auto, cpu, gpu or gpu:N, not {asked!r}.")
    return asked


def check_precision(asked: str) -> Asked:
    """Return `asked` if it is ``auto`` or a precision."""
    if asked not in get_args(Asked):
        raise RequestError(f"`precision` must be {listing(get_args(Asked), 'or')}, not {asked!r}.")
    return cast("Asked", asked)


def choose_devices(asked: str) -> tuple[str, ...]:
    """Turn ``auto``, ``cpu``, ``gpu`` or ``gpu:1`` into ``cpu`` or ``gpu:N``; ``auto`` gives all GPUs, if any."""
    kind, _, number = asked.partition(":")
    if kind == "cpu" or (kind == "auto" and not sign_of_gpu()):  # without importing Keras' backend, which takes seconds
        return ("cpu",)
    found = count_gpus()
    if kind == "auto":
        return tuple(f"gpu:{one}" for one in range(found)) or ("cpu",)
    if int(number or 0) < found:
        return (f"gpu:{number or 0}",)
    seen = f"{found} GPU{'s' if found > 1 else ''}" if found else "no GPU"
    way = "Use `device='cpu'`, or install GPU support: pip install 'nbfeat[gpu]'."
    raise RequestError(f"`device={asked!r}` is not available: Keras' backend sees {seen}. {way}")


def sign_of_gpu() -> bool:
    """Look for a GPU driver's files, without importing anything."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return False
    # A container may have access to only the second GPU. Windows has no device files, but the library of the driver.
    windows = Path(os.environ.get("SYSTEMROOT", os.sep), "System32")
    files = {_DRIVERS: ("nvidia[0-9]*", "kfd", "dxg"), windows: ("nvcuda.dll", "amdhip64*.dll")}
    return any(any(folder.glob(name)) for folder, names in files.items() for name in names)


def count_gpus() -> int:
    """Count the GPUs that Keras' backend can use in this process."""
    with suppress(ImportError, RuntimeError):
        return len(_gpu_names())
    return 0


def kinds(devices: tuple[str, ...]) -> str:
    """Name the hardware models of `devices`, because the last bits of features depend on the model."""
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
    """Identify this CPU and its instruction set, because the last bits of features depend on them."""
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
    """How many images fit in memory at once; reductions are reported to `tell`."""

    def __init__(self, size: int, tell: Callable[[str], None] = lambda _: None) -> None:
        self.size, self.was_short, self._tell = size, False, tell

    def fit(self, device: str, run: Callable[[int], Result]) -> Result:
        """Return the result of `run` with the current size, which is halved each time memory runs out."""
        while True:
            try:
                return run(size := self.size)
            except Exception as error:  # raised again unless it is about memory
                self.shrink(size, device, error)

    def shrink(self, size: int, device: str, error: Exception) -> None:
        """Halve the batch after `size` images did not fit; raise any error that is not about memory again."""
        if not is_out_of_memory(error):
            raise error
        self.was_short = True
        if size == 1:
            another = ", or `device='cpu'`" if device.startswith("gpu") else ""
            problem = f"{device.upper()} doesn't have enough memory for the network and one image."
            way = f"Close other programs that use it, or use a smaller backbone or `size`{another}."
            raise ExtractionError(f"{problem} {way}") from error
        if size == self.size:  # not yet halved since this batch started
            self.size = size // 2
            short = f"{device.upper()} ran out of memory for {size:,} images at once"
            self._tell(f"{short}, so it ran {self.size:,} at a time.")

    def grow(self, device: str, seconds: Callable[[int], float], largest: int) -> None:
        """Double the size until that is no longer faster (`seconds` times one size) or memory runs out."""
        self.size, best = min(FIRST, largest), 0.0
        while True:
            rate = self.fit(device, lambda size: size / seconds(size))
            if rate < best * GROWTH and not self.was_short:
                self.size //= 2
                return
            if self.was_short or self.size * 2 > largest:  # this is the largest size that fits
                return
            best, self.size = rate, self.size * 2


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that a backend ran out of memory."""
    classes = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if classes & {"builtins.MemoryError", "tensorflow.ResourceExhaustedError", "torch.OutOfMemoryError"}:
        return True
    # Errors of lower-level libraries say so only in their message.
    named = {"builtins.RuntimeError", "builtins.ImportError", "builtins.OSError", "tensorflow.OpError"}
    return bool(classes & named) and _OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def memory_errors_named(doing: str) -> Iterator[None]:
    """Turn errors that mean that memory ran out into ExtractionError; also a decorator."""
    try:
        yield
    except (RuntimeError, MemoryError, ImportError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        problem = f"There is not enough memory to {doing} ({first_line(error, -1)})."
        way = "Close other programs and notebooks, or use a smaller backbone or `size`."
        raise ExtractionError(f"{problem} {way}") from error


def largest_batch(shape: tuple[int, ...]) -> int:
    """Return the largest number of images of `shape` in a batch."""
    return max(1, min(LARGEST, LARGEST_BYTES // int(np.prod(shape))))


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """Return the result of `work` and the seconds that it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def stopwatch(run: Callable[[Pixels], object], shape: tuple[int, ...]) -> Callable[[int], float]:
    """Return a function that times `run` on a number of images of `shape`, after a warm-up."""

    def seconds(size: int) -> float:
        pixels = np.zeros((size, *shape), np.uint8)
        run(pixels)  # compiles, and lets libraries choose their algorithms
        return min(timed(lambda: run(pixels))[1] for _ in range(REPEATS))

    return seconds
