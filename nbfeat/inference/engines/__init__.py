"""Run a network on the hardware: one interface, an engine for the CPU and one for whatever Keras can use.

An engine lends buffers, runs them in the background and gives results back oldest first::

    buffer = engine.buffer()        # (batch, size, size, 3) uint8, to fill
    if engine.is_full:              # the window of batches in flight
        vectors = engine.collect()  # {cut: (count, width) float32}, the oldest
    engine.submit(buffer, count)    # the first `count` images of the buffer count
"""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nbfeat import isolation
from nbfeat.backbones.weights import Loaded, digest
from nbfeat.errors import NetworkError, RequestError, WeightsError
from nbfeat.inference.model import Base, NetworkSpec, Output

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
Asked = Literal["auto", "float32", "bfloat16", "float16"]
_DRIVERS = Path("/dev")
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

    @property
    def in_flight(self) -> int:
        """How many batches were submitted and not yet collected."""

    def buffer(self) -> Pixels:
        """Lend a buffer of a whole batch."""

    def submit(self, buffer: Pixels, count: int) -> None:
        """Start the network on the first `count` images of a lent buffer; returns at once."""

    def collect(self) -> Vectors:
        """Wait for the oldest batch and return its rows."""

    def close(self) -> None:
        """Stop what is in flight, wait until nothing reads from the buffers, and take them all back."""


def vectors_of(engine: Engine, pixels: Pixels) -> Vectors:
    """Run all `pixels` (images, size, size, 3) through an engine of any size of batch."""
    found: list[Vectors] = []
    for start in range(0, len(pixels), engine.batch_size):
        some = pixels[start : start + engine.batch_size]
        buffer = engine.buffer()
        buffer[: len(some)] = some
        engine.submit(buffer, len(some))
        if engine.is_full:
            found.append(engine.collect())
    while engine.in_flight:
        found.append(engine.collect())
    return {key: np.concatenate([vectors[key] for vectors in found]) for key in found[0]}


class PreparedNetwork:
    """Make a network ready; iterate for sentences to show meanwhile, then read what it gives, and `start` it to use it.

    Where all features are in the cache already, nothing is started.
    """

    name: str
    batch_size: int
    outputs: dict[str, Output]
    weights: Loaded
    numbers: dict[str, object]  # all of the engine that decides the numbers, whatever it computes in
    faster: tuple[Precision, ...] = ()  # what it may be faster in than in float32, in the order of trying
    note = ""  # what the report should say; a run may bring up more
    _keeps_apart: frozenset[Precision] = frozenset()  # in what a cut gives the same to the bit beside any others

    def __init__(self, spec: NetworkSpec, *, devices: tuple[str, ...], batch_size: int | None) -> None:
        self.spec, self.devices, self._asked_size = spec, devices, batch_size
        self.device = devices[0]

    def __iter__(self) -> Iterator[str]:
        """Work, yielding what is being done."""
        if self.spec.is_registered:
            yield from self._for_registered()
        elif self.device == "cpu" and openvino_works():
            yield from self._for_openvino()
        else:
            yield from self._for_keras()

    def _for_registered(self) -> Iterator[str]:
        """Run what a function of the user's builds: by OpenVINO where that can be, else by Keras in this process."""
        from nbfeat.inference import own

        name, asked = self.spec.title, self.spec
        yield f"building {name} in Keras"
        made = own.make(asked, self.device)
        why_not = made.why_not
        if made.file and self.device == "cpu" and openvino_works():
            self.spec = made.file
            try:
                yield from self._for_openvino()
            except (NetworkError, WeightsError) as error:
                self.spec, why_not = asked, own.why_not_as_file(error, name)
            else:
                self.weights = replace(self.weights, name=name)
                return
        yield from self._for_keras(made.base)
        if made.file is None:
            self.numbers["gives"] = own.what_it_gives(self.start("float32"))
        else:
            self.weights = Loaded(name, digest(Path(made.file.weights)))
        if why_not and self.device == "cpu":
            self.note = f"{why_not}, so Keras runs it in this process, which is slower on a CPU."

    def _for_openvino(self) -> Iterator[str]:
        from nbfeat.inference.compiled_models import Preparing
        from nbfeat.inference.engines import openvino

        preparing = Preparing(self.spec)
        yield from preparing
        stored = preparing.result
        self.name, self.outputs, self.weights = openvino.name(), stored.outputs, stored.weights
        self.batch_size, self.note = self._asked_size or openvino.BATCH, preparing.note
        self.numbers, self.faster = {"engine": openvino.name(threads=False), "cpu": cpu()}, openvino.FASTER
        self._keeps_apart = frozenset({"float32"})  # in fewer bits fusing shows
        self._start: Callable[[Precision, str | None], Engine] = lambda precision, only: openvino.OpenVINOEngine(
            stored, precision=precision, batch_size=self.batch_size, only=only
        )

    def _for_keras(self, base: Base | None = None) -> Iterator[str]:
        from nbfeat.inference.compiled_models import located
        from nbfeat.inference.engines.keras import FASTER_ON_GPUS, KerasEngine

        if self.device == "cpu":
            self.note = "OpenVINO cannot be imported here, so Keras runs the network, which is slower on a CPU."
        spec, _held = yield from located(self.spec)
        if base is None:
            yield f"building {spec.title} in Keras"

        def tell(sentence: str) -> None:
            self.note = sentence

        def made(precision: Precision, only: str | None = None) -> KerasEngine:
            return KerasEngine(
                replace(spec, cuts=tuple(cut for cut in spec.cuts if only in {None, cut.key})), devices=self.devices,
                precision=precision, batch_size=self._asked_size, base=base, tell=tell,
            )  # fmt: skip

        engine = made("float32")
        self.name, self.outputs, self.weights = engine.name, engine.outputs, engine.weights
        self.batch_size = engine.batch_size
        self.numbers = {"engine": engine.kind, "backend": engine.backend, "cpu": cpu()}
        self.faster = FASTER_ON_GPUS if self.device != "cpu" else ()
        ready = [engine]  # once: it takes memory, which is another precision's if that is better

        def start(precision: Precision, only: str | None) -> Engine:
            return ready.pop() if ready and (precision, only) == ("float32", None) else made(precision, only)

        self._start = start

    def key_fields(self, precision: Precision) -> dict[str, object]:
        """Return all of the engine that decides the numbers that it gives in `precision`."""
        # Where a cut is not known to give the same to the bit beside any others, those decide, too.
        beside = {} if precision in self._keeps_apart else {"beside": [cut.key for cut in self.spec.cuts]}
        return {**self.numbers, "precision": precision, **beside}

    def start(self, precision: Precision, only: str | None = None) -> Engine:
        """Return the engine, ready to run; one that gives `only` one output runs no more than it takes.

        Raises NetworkError where the hardware does not compute in `precision`.
        """
        return self._start(precision, only)


def cpu() -> str:
    """Name this CPU and what it can compute with: the same network gives other last bits on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.processor()} {platform.machine()}"
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def openvino_works() -> bool:
    """Tell whether OpenVINO can be imported."""
    try:
        isolation.import_openvino()
    except (ImportError, OSError):
        return False
    return True


def check_device(asked: str) -> str:
    """Return `asked` if it is ``auto``, ``cpu``, ``gpu`` or ``gpu:N``."""
    if re.fullmatch(r"auto|cpu|gpu(:\d+)?", str(asked)) is None:
        raise RequestError(f"--device takes auto, cpu, gpu or gpu:N, not {asked!r}.")
    return asked


def choose_devices(asked: str) -> tuple[str, ...]:
    """Turn ``auto``, ``cpu``, ``gpu`` or ``gpu:1`` into ``cpu``, one ``gpu:N``, or for ``auto`` every GPU there is.

    ``auto`` asks Keras' backend, which takes seconds to import, only where there is a sign of a GPU.
    """
    kind, _, number = asked.partition(":")
    if kind == "cpu" or (kind == "auto" and not sign_of_gpu()):
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
    try:
        backend = importlib.import_module("keras").backend.backend()
        if backend == "tensorflow":
            return len(importlib.import_module("tensorflow").config.get_visible_devices("GPU"))
        if backend == "jax":
            return sum(device.platform == "gpu" for device in importlib.import_module("jax").local_devices())
        if backend == "torch":
            return int(importlib.import_module("torch").cuda.device_count())
    except (ImportError, RuntimeError):
        return 0
    return 0


def check_precision(asked: str) -> Asked:
    """Return `asked` if it is ``auto`` or a precision."""
    words: Any = ("auto", *PRECISIONS)
    if asked not in words:
        raise RequestError(f"--precision takes {', '.join(words)}, not {asked!r}.")
    return words[words.index(asked)]  # type: ignore[no-any-return]
