"""``growth``: whether ten times the images take ten times the time, and how much memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg

from nbfeat.inference.engines.cpu_count import available_cores
from tests.benchmarks.child import fresh
from tests.benchmarks.rounds import progress
from tests.benchmarks.setting import Setting, numbered, weights_of
from tests.benchmarks.table import Row, Table, rate

SIZES = (100, 1_000, 10_000, 100_000)
MANY = 10_000  # from so many on one round says enough
SIDE, GROUND = 64, 1_100
ALPHA = 0.35
HEAD = (
    "images",
    "seconds",
    "images/s",
    "processor ms an image",
    "from a straight line",
    "peak MB",
    "without the features",
)
Told = dict[str, Any]


def tables(setting: Setting) -> Iterator[Table]:
    """Measure each number of images in fresh processes."""
    sizes = [size for size in SIZES if size <= MANY] if setting.quick else list(SIZES)
    folder = setting.folder / "small"
    progress(f"growth: drawing {sizes[-1]:,} images")
    draw(folder, sizes[-1])
    real = weights_of("MobileNetV2", ALPHA) == "imagenet"
    block = f"MobileNetV2 --alpha {ALPHA}" if real else "Pocket"
    request: Told = {
        "folder": str(folder),
        "block": block,
        "options": {"weights": "imagenet" if real else "bundled"},
    }
    fresh({**request, "count": 100})  # builds the network, and settles the precision
    told: dict[int, list[Told]] = {size: [] for size in sizes}
    for number in range(setting.rounds):
        for size in sizes:
            if number == 0 or size < MANY:
                progress(f"  round {number + 1} of {setting.rounds}: {size:,} images")
                told[size].append(fresh({**request, "count": size}))
    seconds, memory, before = (typical(told, what) for what in ("run", "working", "before"))
    yield Table(
        f"Growth: {block}, 64 × 64 JPEGs, no two alike",
        HEAD,
        rows(seconds, typical(told, "cpu"), typical(told, "peak"), memory),
        note(seconds, memory, before),
    )


def typical(told: Mapping[int, Sequence[Told]], what: str) -> dict[int, float]:
    """Return medians by the number of images; `working` is memory without the matrix of features."""
    return {
        size: median(each["peak"] - each["matrix"] if what == "working" else each[what] for each in found)
        for size, found in told.items()
    }


def rows(
    seconds: Mapping[int, float], cpu: Mapping[int, float], peaks: Mapping[int, float], memory: Mapping[int, float]
) -> list[Row]:
    """Show what each number of images took."""
    fixed, each = line(seconds)
    return [
        (
            f"{size:,}",
            f"{took:,.2f}",
            rate(size / took),
            f"{1000 * cpu[size] / size:.2f}",
            f"{took / (fixed + each * size) - 1:+.1%}",
            f"{peaks[size]:,.0f}",
            f"{memory[size]:,.0f}",
        )
        for size, took in seconds.items()
    ]


def line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Fit seconds = a + b × images so that relative deviations are least; return a and b."""
    sizes, took = np.array(list(seconds), float), np.array(list(seconds.values()))
    (fixed, each), *_ = np.linalg.lstsq(np.stack([1 / took, sizes / took], axis=1), np.ones(len(took)), rcond=None)
    return float(fixed), float(each)


def note(seconds: Mapping[int, float], memory: Mapping[int, float], before: Mapping[int, float]) -> str:
    """Say how far time is from linear, and memory from flat."""
    fixed, each = line(seconds)
    worst = max(abs(took / (fixed + each * size) - 1) for size, took in seconds.items())
    few, many = sorted(memory)[1], max(memory)
    slope = math.log(seconds[many] / seconds[few]) / math.log(many / few)
    more = memory[many] - memory[few]
    return (
        f"Each in a fresh process, from `extract` to its end. Seconds ≈ {fixed:.2f} + {1000 * each:.3f} per 1,000 "
        f"images, at most {worst:.1%} beside; from {few:,} to {many:,} images they grow as (images)^{slope:.3f}. "
        f"Memory without the features grows by {more:+,.1f} MB from {few:,} to {many:,} images, "
        f"{more * 2**20 / (many - few):,.0f} bytes an image; {before[many] - before[few]:+,.1f} MB of it are there "
        "before, as the frame of paths."
    )


def draw(folder: Path, count: int) -> None:
    """Write `count` small JPEGs, no two alike: patches of one large picture of noise, each from a place of its own."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (GROUND // 4, GROUND // 4, 3), dtype=np.uint8)
    ground = noise.repeat(4, axis=0).repeat(4, axis=1)  # coarse, so that files are small
    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(partial(_draw, folder, ground), range(count), chunksize=1_000))


def _draw(folder: Path, ground: np.ndarray, number: int) -> None:
    places = GROUND - SIDE
    top, left = divmod(number * 7_919 % places**2, places)  # a prime: each number has a place of its own
    patch = np.ascontiguousarray(ground[top : top + SIDE, left : left + SIDE])
    Path(numbered(folder, number)).write_bytes(simplejpeg.encode_jpeg(patch, quality=70))
