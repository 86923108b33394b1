"""``start``, ``cores`` and ``growth``: what a fresh process takes, on one core and on all, for few images and many."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg

from nbfeat.inference.engines.cpu_count import available_cores
from tests.benchmarks import measure
from tests.benchmarks.processes import fresh

Told = dict[str, Any]
BACKBONE = "MobileNetV2"
IMAGES = 10
START_HEAD = (
    "fresh process", "import", f"to the features of {IMAGES} images", "peak memory", "TensorFlow or Keras imported",
)  # fmt: skip
CORES_HEAD = ("nbfeat, auto", "images/s", "× one core", "of the cores' number")
SIZES = (100, 1_000, 10_000, 100_000)
MANY = 10_000  # from so many on one round says enough
SIDE, GROUND = 64, 1_100
ALPHA = 0.35
GROWTH_HEAD = (
    "images", "seconds", "images/s", "processor ms an image", "from a straight line", "peak MB", "without the features",
)  # fmt: skip


def request_of(setting: measure.Setting, count: int) -> Told:
    """Return what `fresh` is asked for: the first images that all sections share."""
    options = {"weights": measure.weights_of(BACKBONE)}
    return {"folder": str(Path(setting.files[0]).parent), "count": count, "block": BACKBONE, "options": options}


def start_tables(setting: measure.Setting) -> Iterator[measure.Table]:
    """Measure a fresh kernel, with nothing on disk and with the network there, in turn."""
    request = request_of(setting, IMAGES)
    ways: dict[str, Told] = {
        "nbfeat, cold: the network is built": {},
        "nbfeat, warm: the network is on disk": {},
        "the tutorial loop": {"way": "tutorial"},
    }
    told: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    missing: dict[str, str] = {}
    for number in range(setting.rounds):
        home = setting.folder / "cold"  # the warm start finds there what the cold one built
        for way, more in ways.items():
            if way not in missing:
                measure.progress(f"start: round {number + 1} of {setting.rounds}: {way}")
                try:
                    told[way].append(fresh({**request, **more}, NBFEAT_HOME=str(home)))
                except Exception as error:  # the row says it
                    missing[way] = measure.why(error)
        shutil.rmtree(home, ignore_errors=True)
    rows = [(way, missing[way]) if way in missing else start_row(way, told[way]) for way in ways]
    note = "From `import` on; pandas and its pyarrow are in it. The medians of rounds."
    yield measure.Table(f"Start: {measure.titled(BACKBONE)}", START_HEAD, rows, note)


def start_row(way: str, told: list[dict[str, Any]]) -> measure.Row:
    """Show one kind of start; a tutorial's import cannot be told from the rest."""
    middle = {what: median(each[what] for each in told) for what in ("total", "peak")}
    imported = f"{1000 * median(each['import'] for each in told):.0f} ms" if told[0]["import"] else ""
    heavy = (", ".join(told[0]["heavy"]) or "no") if "heavy" in told[0] else "yes"
    return way, imported, f"{middle['total']:.2f} s", f"{middle['peak']:,.0f} MB", heavy


def cores_tables(setting: measure.Setting) -> Iterator[measure.Table]:
    """Measure one core and all, each in a fresh process."""
    measure.progress("cores")
    if not hasattr(os, "sched_setaffinity"):
        raise measure.MissingError("this system cannot tell a process which cores to use")
    cores = sorted(os.sched_getaffinity(0))
    if available_cores() == 1:
        raise measure.MissingError("there is only one core")
    note = f"In fresh processes; the network is on disk. {len(setting.files)} images, medians of rounds."
    yield measure.Table(
        f"One core against all: {measure.titled(BACKBONE)}", CORES_HEAD, cores_rows(setting, cores), note
    )


def cores_rows(setting: measure.Setting, cores: list[int]) -> list[measure.Row]:
    one, every = "1 core", f"{available_cores()} cores"
    request = request_of(setting, len(setting.files))
    precisions: dict[str, str] = {}  # should `auto` choose another one on one core

    def steady(way: str, on: list[int]) -> float:
        told = fresh({**request, "cores": on})
        precisions[way] = told["precision"]
        return float(told["rate"])

    ways = {one: partial(steady, one, cores[:1]), every: partial(steady, every, cores)}
    for measured in reversed(ways.values()):
        measured()  # builds the network, and settles the precision
    found = measure.in_rounds(ways, setting.rounds)
    if found.has(every):
        found.values[f"{every}, each"] = [value / available_cores() for value in found.values[every]]
    return [
        found.row(way, (way, one, measure.times), (each, one, measure.share), name=f"{way}, {precisions[way]}")
        for way, each in ((one, one), (every, f"{every}, each"))
    ]


def growth_tables(setting: measure.Setting) -> Iterator[measure.Table]:
    """Measure each number of images in fresh processes."""
    sizes = [size for size in SIZES if size <= MANY] if setting.quick else list(SIZES)
    folder = setting.folder / "small"
    measure.progress(f"growth: drawing {sizes[-1]:,} images")
    draw(folder, sizes[-1])
    real = measure.weights_of("MobileNetV2", ALPHA) == "imagenet"
    block = f"MobileNetV2 --alpha {ALPHA}" if real else "EfficientNetLite0"
    request: Told = {"folder": str(folder), "block": block, "options": {"weights": "imagenet"}}
    fresh({**request, "count": 100})  # builds the network, and settles the precision
    told: dict[int, list[Told]] = {size: [] for size in sizes}
    for number in range(setting.rounds):
        for size in sizes:
            if number == 0 or size < MANY:
                measure.progress(f"  round {number + 1} of {setting.rounds}: {size:,} images")
                told[size].append(fresh({**request, "count": size}))
    seconds, memory, before = (typical(told, what) for what in ("run", "working", "before"))
    yield measure.Table(
        f"Growth: {block}, 64 × 64 JPEGs, no two alike",
        GROWTH_HEAD,
        growth_rows(seconds, typical(told, "cpu"), typical(told, "peak"), memory),
        growth_note(seconds, memory, before),
    )


def typical(told: Mapping[int, Sequence[Told]], what: str) -> dict[int, float]:
    """Return medians by the number of images; `working` is memory without the matrix of features."""
    return {
        size: median(each["peak"] - each["matrix"] if what == "working" else each[what] for each in found)
        for size, found in told.items()
    }


def growth_rows(
    seconds: Mapping[int, float], cpu: Mapping[int, float], peaks: Mapping[int, float], memory: Mapping[int, float]
) -> list[measure.Row]:
    fixed, each = line(seconds)
    return [
        (
            f"{size:,}",
            f"{took:,.2f}",
            measure.rate(size / took),
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


def growth_note(seconds: Mapping[int, float], memory: Mapping[int, float], before: Mapping[int, float]) -> str:
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
    Path(measure.numbered(folder, number)).write_bytes(simplejpeg.encode_jpeg(patch, quality=70))
