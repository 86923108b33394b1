"""nbfeat itself, and the limit: what the cores could do at best.

The limit is cores ÷ (processor seconds per image of reading, decoding and resizing, plus of the network), both measured
in the same round as what is compared with it.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from nbfeat import Extraction, FeatureBlock
from nbfeat.extraction.networks import network_spec
from nbfeat.images.decode import read_pixels
from nbfeat.images.resize import PixelSpec
from nbfeat.inference.compiled_models import prepare
from nbfeat.inference.engines.base import Precision
from nbfeat.inference.engines.cpu_count import available_cores
from nbfeat.inference.engines.openvino import OpenVINOEngine
from nbfeat.inference.spec import Cut
from tests.benchmarks.rounds import MissingError
from tests.benchmarks.setting import weights_of
from tests.fake import to_its_end


class Ours:
    """nbfeat on the same files, warm: the network is on disk, and which precision `auto` is has been settled before."""

    def __init__(self, files: list[str], block: str, precision: str, **options: Any) -> None:
        self.files, self.block = files, block
        self.options: dict[str, Any] = {"precision": precision, "cache": False, **options}
        self.options.setdefault("weights", weights_of(block))
        self._whole = 0.0
        self.last: Extraction | None = None

    def steady(self) -> float:
        """Run, and return images per second apart from opening the network and attaching columns."""
        start = time.perf_counter()
        self.last = Extraction(pd.DataFrame({"path": self.files}), self.block, images="path", **self.options).run()
        self._whole = len(self.files) / (time.perf_counter() - start)
        return self.last.rate

    def whole(self) -> float:
        """Return images per second of the last run, from start to end."""
        if self.last is None:
            raise MissingError("not measured: the run failed")
        return self._whole

    @property
    def precision(self) -> str:
        """The precision that the last run computed in."""
        assert self.last is not None
        return self.last.precision


class Limit:
    """The limit for one network in one precision."""

    def __init__(self, files: list[str], backbone: str, precision: Precision) -> None:
        self.files, self.backbone, self.precision = files, backbone, precision

    def rate(self) -> float:
        """Measure both parts, and return images per second."""
        block = FeatureBlock.parse(self.backbone, {"weights": weights_of(self.backbone)})[0]
        spec = network_spec(block, cuts=(Cut(),))
        engine = OpenVINOEngine(to_its_end(prepare(spec))[1], precision=self.precision, batch_size=None)
        network_seconds(engine, 4)
        decoding = decoding_seconds(self.files, spec.size)
        return available_cores() / (decoding + network_seconds(engine, max(8, len(self.files) // 16)))


def decode(files: list[str], size: int, threads: int) -> None:
    """Read, decode and resize, and do nothing with the pixels."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda file: read_pixels(file, [PixelSpec(size)], Path()), files))


def decoding_seconds(files: list[str], size: int) -> float:
    """Return processor seconds per image of reading, decoding and resizing, on all cores at once."""
    start = time.process_time()
    decode(files, size, available_cores())
    return (time.process_time() - start) / len(files)


def network_seconds(engine: OpenVINOEngine, batches: int) -> float:
    """Return processor seconds per image of the network, all streams busy."""
    start = time.process_time()
    for _ in range(batches):
        engine.submit(engine.buffer(), engine.batch_size)
        if engine.is_full:
            engine.collect()
    while engine.in_flight:
        engine.collect()
    return (time.process_time() - start) / (batches * engine.batch_size)
