"""PreparedNetwork: chooses the engine and precisions of a network, and starts it when the first image needs it."""

import hashlib
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from nbfeat.backbones import user_models
from nbfeat.backbones.weights import Loaded, digest
from nbfeat.errors import NetworkError, WeightsError
from nbfeat.inference import compiled_models
from nbfeat.inference.engines import devices as hardware, openvino
from nbfeat.inference.engines.base import Engine, Pixels, Precision, Vectors
from nbfeat.inference.engines.keras import FASTER_ON_GPUS, KerasEngine
from nbfeat.inference.model import Base
from nbfeat.inference.spec import NetworkSpec, Output

_DIGITS = 3  # significant digits of a network's output that don't vary from run to run


class PreparedNetwork:
    """Load a network: iterate over progress messages, then read its outputs; `start` returns an engine that runs it."""

    name: str
    batch_size: int
    outputs: dict[str, Output]
    weights: Loaded
    numbers: dict[str, object]  # everything about the engine, except its precision, that affects the features
    faster: tuple[Precision, ...] = ()  # precisions that may be faster than float32, in the order to try them
    note = ""  # for the report; a run may change it

    def __init__(self, spec: NetworkSpec, *, devices: tuple[str, ...], batch_size: int | None) -> None:
        self.spec, self.devices, self._asked_size = spec, devices, batch_size
        self.device = devices[0]

    def __iter__(self) -> Iterator[str]:
        """Load the network, yielding progress messages."""
        if self.spec.network.package == "registered":
            yield from self._for_user_model()
        elif self.device == "cpu" and hardware.openvino_works():
            yield from self._for_openvino(self.spec)
        else:
            yield from self._for_keras()

    def _for_user_model(self) -> Iterator[str]:
        """Build a registered network, for OpenVINO if possible, else for Keras in this process."""
        name = self.spec.network.title
        yield f"building {name} in Keras"
        with tempfile.TemporaryDirectory(prefix="nbfeat-", ignore_cleanup_errors=True) as folder:
            path = Path(folder, f"{self.spec.backbone}.keras")
            base, why_not = compiled_models.build_user_model(self.spec, self.device, path)
            loaded = None if why_not else Loaded(name, digest(path))
            if loaded and self.device == "cpu" and hardware.openvino_works():
                try:
                    yield from self._for_openvino(replace(self.spec, backbone=user_models.NAME, weights=str(path)))
                except (NetworkError, WeightsError) as error:
                    why_not = compiled_models.why_not_as_file(error, name)
                else:
                    self.weights = replace(self.weights, name=name)
                    return
        yield from self._for_keras(base)
        if loaded is None:
            self.numbers["gives"] = _what_it_gives(self.start("float32"), self.spec.size)
        self.weights = loaded or self.weights
        if why_not and self.device == "cpu":
            self.note = f"{why_not}, so Keras runs it in this process, which is slower on a CPU."

    def _for_openvino(self, spec: NetworkSpec) -> Iterator[str]:
        stored = yield from compiled_models.prepare(spec)
        self.name, self.outputs, self.weights = openvino.name(), stored.outputs, stored.weights
        self.batch_size, self.note = self._asked_size or openvino.BATCH, stored.note
        self.numbers = {"engine": openvino.name(threads=False), "cpu": hardware.cpu()}
        self.faster = openvino.FASTER

        def start(precision: Precision, only: str | None = None) -> Engine:
            try:
                return openvino.OpenVINOEngine(stored, precision=precision, batch_size=self.batch_size, only=only)
            except RuntimeError:
                if stored.folder.is_dir():
                    raise
            deque(self._for_openvino(spec), maxlen=0)  # it was cleared in the meantime
            return self.start(precision, only)

        self._start: Callable[..., Engine] = start

    def _for_keras(self, base: Base | None = None) -> Iterator[str]:
        if self.device == "cpu":
            self.note = "OpenVINO cannot be imported, so Keras runs the network, which is slower on a CPU."
        spec, _held = yield from compiled_models.located(self.spec)
        if base is None:
            yield f"building {spec.network.title} in Keras"

        def made(precision: Precision, only: str | None = None) -> KerasEngine:
            return KerasEngine(
                replace(spec, cuts=tuple(cut for cut in spec.cuts if only in {None, cut.key})), devices=self.devices,
                precision=precision, batch_size=self._asked_size, base=base, tell=partial(setattr, self, "note"),
            )  # fmt: skip

        engine = made("float32")
        self.name, self.outputs, self.weights = engine.name, engine.outputs, engine.weights
        self.batch_size = engine.batch_size
        self.numbers = {"engine": engine.kind, "backend": engine.backend, "cpu": hardware.cpu()}
        self.faster = FASTER_ON_GPUS if self.device != "cpu" else ()
        ready = [engine]  # used once, to free its memory if another precision is better
        self._start = lambda precision, only: (
            ready.pop() if ready and (precision, only) == ("float32", None) else made(precision, only)
        )

    def key_fields(self, precision: Precision) -> dict[str, object]:
        """Return everything about the engine that affects the features it computes in `precision`."""
        # An engine fuses layers up to the next cut, so the last bits of one output depend on the other cuts.
        beside = sorted({f"{cut.layer}:{self.outputs[cut.key].pooling}" for cut in self.spec.cuts})
        return {**self.numbers, "precision": precision, "beside": beside}

    def start(self, precision: Precision, only: str | None = None) -> Engine:
        """Return an engine for all outputs or `only` one; raise NetworkError if `precision` is not available."""
        return self._start(precision=precision, only=only)


def vectors_of(engine: Engine, pixels: Pixels) -> Vectors:
    """Run all `pixels` (images, size, size, 3) through an engine of any batch size."""
    found: list[Vectors] = []
    starts = range(0, len(pixels), engine.batch_size)
    for start in starts:
        some = pixels[start : start + engine.batch_size]
        buffer = engine.buffer()
        buffer[: len(some)] = some
        engine.submit(buffer, len(some))
        if engine.is_full:
            found.append(engine.collect())
    while len(found) < len(starts):
        found.append(engine.collect())
    return {key: np.concatenate([vectors[key] for vectors in found]) for key in found[0]}


def _what_it_gives(engine: Engine, size: int) -> str:
    """Hash a network's output for seeded pixels, because the code of a registered network cannot be hashed."""
    pixels = np.random.default_rng(9).integers(0, 256, (16, size, size, 3), np.uint8)
    total = hashlib.sha256()
    for key, vectors in sorted(vectors_of(engine, pixels).items()):
        largest = np.abs(vectors).max(initial=0)
        total.update(f"{key} {largest:.{_DIGITS}e} {vectors.shape}".encode())
        # Adding zero turns -0 into 0.
        total.update((np.round(vectors / (largest or 1), _DIGITS) + 0.0).astype("float32").tobytes())
    return total.hexdigest()
