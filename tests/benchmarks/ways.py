"""``ways`` and ``cache``: the same files through nbfeat and other ways, against the limit; and again from the cache.

The limit is what the cores could do at best: cores ÷ (processor seconds per image of reading, decoding and resizing,
plus of the network), both measured in the same round as what is compared with it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

import nbfeat
from nbfeat import Extraction, FeatureBlock
from nbfeat.extraction.request import network_spec
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import read_pixels
from nbfeat.inference.compiled_models import prepare
from nbfeat.inference.engines.base import Precision
from nbfeat.inference.engines.cpu_count import available_cores
from nbfeat.inference.engines.openvino import OpenVINOEngine
from nbfeat.inference.spec import Cut
from tests.benchmarks import measure
from tests.benchmarks.processes import Child, torch_child
from tests.fake import to_its_end

LOOP = "tutorial loop: `load_img`, `model.predict`, one image at a time"
HEAD = ("way", "images/s", "× tutorial loop", "of the limit")
LIMIT = "limit, {}"
CACHED = "MobileNetV2"
WITHOUT, FIRST, AGAIN, BEST = "without the cache", "first run, features kept", "run again, features taken", "limit"
CACHE_HEAD = ("nbfeat, auto", "images/s", "× without the cache", "of the limit")


class Ours:
    """nbfeat on the same files, warm: the network is on disk, and which precision `auto` is has been settled before."""

    def __init__(self, files: list[str], block: str, precision: str, **options: Any) -> None:
        self.files, self.block = files, block
        self.options: dict[str, Any] = {"precision": precision, "cache": False, **options}
        self.options.setdefault("weights", measure.weights_of(block))
        self._whole = 0.0
        self.last: Extraction | None = None

    def steady(self) -> float:
        """Run, and return images per second apart from opening the network and attaching columns."""
        start = time.perf_counter()
        self.last = Extraction(pd.DataFrame({"path": self.files}), self.block, images="path", **self.options).run()
        self._whole = len(self.files) / (time.perf_counter() - start)
        return self.last.rate

    def whole(self) -> float:
        if self.last is None:
            raise measure.MissingError("not measured: the run failed")
        return self._whole

    @property
    def precision(self) -> str:
        assert self.last is not None
        return self.last.precision


class Limit:
    def __init__(self, files: list[str], backbone: str, precision: Precision) -> None:
        self.files, self.backbone, self.precision = files, backbone, precision

    def rate(self) -> float:
        block = FeatureBlock.parse(self.backbone, {"weights": measure.weights_of(self.backbone)})[0]
        spec = network_spec(block, cuts=(Cut(),))
        engine = OpenVINOEngine(to_its_end(prepare(spec))[1], precision=self.precision, batch_size=None)
        network_seconds(engine, 4)
        decoding = decoding_seconds(self.files, spec.size)
        return available_cores() / (decoding + network_seconds(engine, max(8, len(self.files) // 16)))


def decode(files: list[str], size: int, threads: int) -> None:
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
    while engine._busy:
        engine.collect()
    return (time.process_time() - start) / (batches * engine.batch_size)


class Counts(NamedTuple):
    """How many images each kind of way is measured with: slow ones need no more."""

    loop: int
    single: int
    batches: int  # of 32
    ours: int


COUNTS = {"MobileNetV2": Counts(24, 48, 4, 480), "ResNet50": Counts(16, 24, 2, 240), "VGG16": Counts(12, 12, 1, 160)}
QUICK = Counts(4, 4, 1, 32)
Way = Callable[[], float]


def tables(setting: measure.Setting) -> Iterator[measure.Table]:
    """Measure each backbone in every way."""
    for backbone, counts in COUNTS.items():
        measure.progress(f"ways: {backbone}")
        few = QUICK if setting.quick else counts
        files = setting.files[: few.ours]
        with closing(Child()) as keras, closing(torch_child(setting.folder)) as torch:
            ways = {
                **with_keras(keras, files, backbone, few),
                **with_torch(torch, files, backbone, few),
                **with_nbfeat(files, backbone),
            }
            rows = shown(measure.in_rounds(ways, setting.rounds), list(ways))
            yield measure.Table(
                f"From files to features: {measure.titled(backbone)}", HEAD, rows, note(setting, few, torch)
            )


def note(setting: measure.Setting, counts: Counts, torch: Child) -> str:
    if torch.told:
        with_what = f"PyTorch {torch.told['torch']} with {torch.told['networks']}, random weights, as fast as others."
    else:
        with_what = "PyTorch's ways need torch, and timm or torchvision, in the Python that NBFEAT_TORCH_PYTHON names."
    return (
        f"JPEGs of 500 × 375: {min(counts.ours, len(setting.files))} through nbfeat, {32 * counts.batches} in batches, "
        f"{counts.loop} through the tutorial loop, {counts.single} one at a time through PyTorch. "
        f"Medians of {setting.rounds} round{'s' * (setting.rounds > 1)}. {with_what} nbfeat's networks are on disk; "
        "opening them and attaching columns are in the whole run alone. Limit: cores ÷ (processor seconds per image of "
        "nbfeat's decoding, plus of its network); each way is compared with that of its precision."
    )


def with_keras(keras: Child, files: list[str], backbone: str, counts: Counts) -> dict[str, Way]:
    rated = partial(keras.rate, backbone=backbone, weights=measure.weights_of(backbone))
    return {
        LOOP: partial(rated, "tutorial", files[: counts.loop], first=2),
        "Keras `predict`, batches of 32": partial(rated, "keras_batches", files[: 32 * counts.batches]),
    }


def with_torch(torch: Child, files: list[str], backbone: str, counts: Counts) -> dict[str, Way]:
    few, many = files[: counts.single], files[: 32 * counts.batches]
    batches = partial(torch.rate, "torch_batches", many, backbone=backbone)
    return {
        "img2vec's way, one image at a time": partial(torch.rate, "img2vec", few, backbone=backbone, first=2),
        "embetter's way, one image at a time": partial(torch.rate, "embetter", few, backbone=backbone, first=2),
        "PyTorch, batches of 32, float32": partial(batches, precision="float32", compiled=False),
        "PyTorch, batches of 32, bfloat16 autocast": partial(batches, precision="bfloat16", compiled=False),
        "PyTorch, batches of 32, bfloat16 autocast, compiled": partial(compiled, batches),
    }


def compiled(batches: Callable[..., float]) -> float:
    if not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        raise measure.MissingError("not installed: a C++ compiler")
    return batches(precision="bfloat16", compiled=True)


def with_nbfeat(files: list[str], backbone: str) -> dict[str, Way]:
    """Return nbfeat in each precision, after the limit of that precision; a first run builds what is kept on disk."""
    ways: dict[str, Way] = {}
    auto = Ours(files, backbone, "auto")
    try:
        auto.steady()
        chosen = auto.precision
    except Exception as error:  # its row says so, and says it again
        measure.progress(f"  nbfeat auto: {measure.why(error)}")
        chosen = "float32"
    for asked, precision in (("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", chosen)):
        if precision in {"float32", "bfloat16"}:
            ways.setdefault(LIMIT.format(precision), Limit(files, backbone, precision).rate)  # type: ignore[arg-type]
        ours = Ours(files, backbone, asked)
        name = f"**nbfeat, auto** (here {chosen})" if asked == "auto" else f"nbfeat, {asked}"
        ways[name] = ours.steady
        if asked == "auto":
            ways[f"the same ({chosen}), the whole run"] = ours.whole
    return ways


def precision_in(way: str) -> str:
    return "bfloat16" if "bfloat16" in way else "float16" if "float16" in way else "float32"


def shown(found: measure.Found, ways: list[str]) -> list[measure.Row]:
    rows = []
    for way in sorted(ways, key=lambda way: way.startswith("limit")):
        limit = LIMIT.format(precision_in(way))
        rows.append(found.row(way, (way, LOOP, measure.times), (way, "" if way == limit else limit, measure.share)))
    return rows


# The cache


def cache_tables(setting: measure.Setting) -> Iterator[measure.Table]:
    """Measure one backbone without the cache, with an empty one, and with a full one."""
    measure.progress("cache")
    note = (
        f"{len(setting.files)} images; whole runs, the network on disk. The share of the limit is of the steady part "
        "of a run, without opening the network and attaching columns."
    )
    yield measure.Table(f"The cache: {measure.titled(CACHED)}", CACHE_HEAD, cache_rows(setting), note)


def cache_rows(setting: measure.Setting) -> list[measure.Row]:
    without = Ours(setting.files, CACHED, "auto")
    kept = Ours(setting.files, CACHED, "auto", cache=True)
    without.steady()  # builds the network, and settles the precision
    steady: dict[str, list[float]] = {WITHOUT: [], FIRST: []}

    def run(way: str, ours: Ours) -> float:
        steady[way].append(ours.steady())
        return ours.whole()

    def first() -> float:
        nbfeat.storage.clear()
        return run(FIRST, kept)

    def again() -> float:
        return max((kept.steady(), kept.whole())[1] for _ in range(3))

    limit = Limit(setting.files, CACHED, without.precision)  # type: ignore[arg-type]
    ways = {WITHOUT: lambda: run(WITHOUT, without), FIRST: first, AGAIN: again, BEST: limit.rate}
    found = measure.in_rounds(ways, setting.rounds)
    found.values |= {f"{way}, steady": values for way, values in steady.items() if found.has(way)}
    return [
        found.row(way, (way, "" if way == BEST else WITHOUT, measure.times), (f"{way}, steady", BEST, measure.share))
        for way in ways
    ]
