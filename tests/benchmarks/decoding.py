"""``decoding``: photographs of 12 megapixels, and what is lost where they are not decoded in full."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
from PIL import Image

import nbfeat
from nbfeat.images.resize import PixelSpec, reduction
from nbfeat.inference.engines.cpu_count import available_cores
from tests.benchmarks import measure
from tests.benchmarks.processes import Child
from tests.benchmarks.ways import decode
from tests.conftest import DATA

WIDTH, HEIGHT, SIDE = 4_000, 3_000, 224
BACKBONE = "MobileNetV2"
HEAD = ("files → pixels", "photographs/s", "× `load_img`", "per thread")
LOAD_IMG = "`load_img`, one thread"


def tables(setting: measure.Setting) -> Iterator[measure.Table]:
    """Measure decoding alone, then compare features."""
    count = 4 if setting.quick else 16
    measure.progress(f"decoding: drawing {count} photographs of 12 megapixels")
    files = photographs(setting.folder / "large", count)
    megabytes = sum(Path(file).stat().st_size for file in files) / len(files) / 2**20
    origin = "photographs enlarged, with grain" if (DATA / "photos").is_dir() else "smooth noise, with grain"
    yield measure.Table(
        f"Decoding {count} JPEGs of {WIDTH:,} × {HEIGHT:,} to {SIDE} × {SIDE}",
        HEAD,
        speeds(files, setting.rounds),
        f"Read, decoded and resized, no network; {origin}, {megabytes:.1f} MB each. {losses(files)}",
    )


def speeds(files: list[str], rounds: int) -> list[measure.Row]:
    """Measure nbfeat and `load_img`, on one thread and on as many as there are cores."""
    cores, keras = available_cores(), Child()

    def ours(threads: int) -> float:
        start = perf_counter()
        decode(files, SIDE, threads)
        return len(files) / (perf_counter() - start)

    theirs = partial(keras.rate, "load_img", files, side=SIDE, first=2)
    ways = {LOAD_IMG: (partial(theirs, threads=1), 1), "nbfeat, one thread": (partial(ours, 1), 1)}
    if cores > 1:
        ways[f"`load_img`, {cores} threads"] = partial(theirs, threads=cores), cores
        ways[f"nbfeat, {cores} threads, as it does"] = partial(ours, cores), cores
    try:
        found = measure.in_rounds({way: measured for way, (measured, _) in ways.items()}, rounds)
    finally:
        keras.close()
    rows = [found.row(way, (way, LOAD_IMG, measure.times)) for way in ways]
    for number, (way, (_, threads)) in enumerate(ways.items()):
        if found.has(way):
            rows[number] += (measure.rate(found.typical(way) / threads),)
    return rows


def losses(files: list[str]) -> str:
    """Say how near the features of files as nbfeat decodes them are to those of files decoded in full."""
    try:
        cosines = agreement(files)
    except Exception as error:  # the speeds are there all the same
        return f"Features were not compared: {measure.why(error)}."
    factor = reduction(WIDTH, HEIGHT, PixelSpec(SIDE))
    return (
        f"nbfeat decodes them at 1/{factor}. Features of {measure.titled(BACKBONE)} against those after decoding "
        f"in full (Pillow, bilinear): cosine at least {cosines.min():.5f}, {cosines.mean():.5f} in the mean."
    )


def agreement(files: list[str]) -> np.ndarray:
    """Return the cosine of each file's features to those of its pixels decoded in full."""
    full = [
        np.asarray(Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for file in files
    ]
    both = [features(frame) for frame in (pd.DataFrame({"image": files}), pd.DataFrame({"image": full}))]
    return np.asarray(np.sum(both[0] * both[1], axis=1))


def features(frame: pd.DataFrame) -> np.ndarray:
    result = nbfeat.extract(
        frame, BACKBONE, images="image", weights=measure.weights_of(BACKBONE), precision="float32", cache=False
    )
    rows = result.features.to_numpy(np.float64)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def photographs(folder: Path, count: int) -> list[str]:
    """Write JPEGs of 12 megapixels with grain, as a camera's have: without it they would decode faster."""
    folder.mkdir(parents=True)
    generator, files = np.random.default_rng(0), []
    grain = generator.normal(0, 5, (HEIGHT // 6, WIDTH // 5, 3)).round().astype(np.int16)
    for number in range(count):
        smooth = np.asarray(measure.source(number, count).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        grained = smooth + np.tile(np.roll(grain, 7 * number, axis=0), (6, 5, 1))
        files.append(measure.numbered(folder, number))
        Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files
