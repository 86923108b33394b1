"""What every section has: where it runs and on which images, rounds that can be compared, tables that are printed."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from nbfeat.backbones.catalog import CATALOG
from nbfeat.inference.engines.cpu_count import available_cores
from tests.conftest import DATA

VERSIONS = ("nbfeat", "openvino", "keras", "tensorflow", "numpy", "pillow", "simplejpeg")
QUIET = 0.7  # the load of a machine that does nothing else; PyTorch loses most where it has to share cores
REASON_SHOWN = 160
_NO_TOP = {
    "MobileNetV2": "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{}_224_no_top.h5",
    "MobileNet": "mobilenet_{}_224_tf_no_top.h5",
}
_ALPHAS = {("MobileNet", 0.25): "2_5", ("MobileNet", 0.5): "5_0", ("MobileNet", 0.75): "7_5"}
Row = tuple[str, ...]


# Where it runs


@dataclass
class Setting:
    """A folder for this run, and how long it may take."""

    folder: Path
    rounds: int = 3
    quick: bool = False

    @cached_property
    def files(self) -> list[str]:
        """The images that most sections share."""
        return photographs(self.folder / "images", 96 if self.quick else 480)

    def use_own_homes(self) -> None:
        """Keep networks, features and weights in this run's folder, so that nobody's own are used or changed."""
        os.environ["NBFEAT_HOME"] = str(self.folder / "home")
        os.environ["KERAS_HOME"] = str(self.folder / "keras")
        if (DATA / "keras_home").is_dir():
            shutil.copytree(DATA / "keras_home", self.folder / "keras", copy_function=shutil.copyfile)


def weights_of(backbone: str, alpha: float = 1.0) -> str:
    """Return ``imagenet`` where these weights are on this machine, else ``random``: nothing is downloaded."""
    if CATALOG[backbone].requirement:
        return "imagenet"
    name = _NO_TOP.get(backbone, "").format(_ALPHAS.get((backbone, alpha), f"{alpha:.2f}".removesuffix("0")))
    is_there = bool(name) and Path(os.environ.get("KERAS_HOME", ""), "models", name).is_file()
    return "imagenet" if is_there else "random"


def titled(backbone: str) -> str:
    return f"{backbone} ({weights_of(backbone).replace('imagenet', 'ImageNet')} weights)"


def numbered(folder: Path, number: int) -> str:
    """Return the path of one of the images that were drawn into `folder`."""
    return str(folder / f"{number:06d}.jpg")


def source(number: int, count: int) -> Image.Image:
    """Return one of `count` images to draw from: a photograph of the test data where there are any, else noise."""
    found = sorted((DATA / "photos").rglob("*.jpg"))
    if found:
        return Image.open(found[number * max(1, len(found) // count) % len(found)]).convert("RGB")
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def photographs(folder: Path, count: int) -> list[str]:
    """Write `count` JPEGs of 500 × 375, no two alike: equal images would be computed once."""
    progress(f"drawing {count} images of 500 × 375")
    folder.mkdir(parents=True)
    files = [numbered(folder, number) for number in range(count)]
    for number, file in enumerate(files):
        image = source(number, count).resize((500, 375), Image.Resampling.BICUBIC)
        image.paste((number % 256, number // 256, 128), (0, 0, 16, 16))
        image.save(file, quality=90)
    return files


def heading(date: str) -> str:
    """Say what the figures hold for: the processor, with what decides how fast it multiplies, and versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}
    has = [known[flag] for flag in known if flag in told.get("flags", "").split()]
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    cores = f"{available_cores()} core{'s' if available_cores() > 1 else ''}"
    text = (
        f"{told.get('model name', platform.machine())} ({', '.join(has) or 'no AVX2'}), {cores}; "
        f"Python {platform.python_version()}, {versions}; {date}."
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < QUIET:
        return text
    return f"{text}\n\n**Other programs were busy (load {load:.1f}): measure again when they are not.**"


# Rounds


class MissingError(Exception):
    """Raised by a way that cannot be measured here; says why."""


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def why(error: Exception) -> str:
    """Say in one line why something could not be measured."""
    if isinstance(error, MissingError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    text = f"failed: {type(error).__name__}: {lines[0]}".rstrip(": ")
    return text if len(text) <= REASON_SHOWN else f"{text[: REASON_SHOWN - 1]}…"


class Found:
    """What was measured, a number for each way and round, and why some were not."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.missing: dict[str, str] = {}

    def has(self, *ways: str) -> bool:
        return all(way in self.values for way in ways)

    def typical(self, way: str) -> float:
        return median(self.values[way])

    def ratio(self, way: str, to: str) -> float:
        return median(mine / other for mine, other in zip(self.values[way], self.values[to], strict=True))

    def row(self, way: str, *compared: tuple[str, str, Callable[[float], str]], name: str = "") -> Row:
        """Show a way, called `name`: its rate, then each ratio of one way to another; or why it has none."""
        if way in self.missing:
            return way, self.missing[way]
        ratios = (show(self.ratio(one, to)) if self.has(one, to) else "" for one, to, show in compared)
        return name or way, rate(self.typical(way)), *ratios


def in_rounds(ways: Mapping[str, Callable[[], float]], rounds: int) -> Found:
    """Measure every way once in each round, since machines drift: only what one round has is compared.

    One that fails is left out from then on, and the others go on.
    """
    found = Found()
    for number in range(rounds):
        for way, measured in ways.items():
            if way in found.missing:
                continue
            progress(f"  round {number + 1} of {rounds}: {way}")
            try:
                found.values.setdefault(way, []).append(measured())
            except Exception as error:  # whatever it is, the row says it
                found.missing[way] = why(error)
                del found.values[way]
    return found


# Tables


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a title, and what is to be known about them; the first column is text, the others are numbers."""

    title: str
    head: Row
    rows: Sequence[Row]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as GitHub shows it; a row that is too short says why it has no figures."""
        width = len(self.head)
        rule = ["---", *["---:"] * (width - 1)]
        cells = [[*row, *[""] * (width - len(row))] for row in self.rows]
        escaped = [" | ".join(text.replace("|", "\\|") for text in row) for row in (self.head, rule, *cells)]
        lines = [f"| {text} |" for text in escaped]
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])])


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def times(value: float) -> str:
    return f"{value:.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 2 else f"{value:.2f}×"


def share(value: float) -> str:
    return f"{value:.0%}"
