"""Where a benchmark runs: a folder of its own, the images that all sections share, this machine and its versions."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from nbfeat.inference.engines.cpu_count import available_cores
from tests.benchmarks.rounds import progress
from tests.conftest import DATA

VERSIONS = ("nbfeat", "openvino", "keras", "tensorflow", "numpy", "pillow", "simplejpeg")
QUIET = 0.7  # the load of a machine that does nothing else; PyTorch loses most where it has to share cores
_NO_TOP = {
    "MobileNetV2": "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{}_224_no_top.h5",
    "MobileNet": "mobilenet_{}_224_tf_no_top.h5",
}
_ALPHAS = {("MobileNet", 0.25): "2_5", ("MobileNet", 0.5): "5_0", ("MobileNet", 0.75): "7_5"}


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
    if backbone == "Pocket":
        return "bundled"
    name = _NO_TOP.get(backbone, "").format(_ALPHAS.get((backbone, alpha), f"{alpha:.2f}".removesuffix("0")))
    is_there = bool(name) and Path(os.environ.get("KERAS_HOME", ""), "models", name).is_file()
    return "imagenet" if is_there else "random"


def titled(backbone: str) -> str:
    """Name a network and its weights."""
    return f"{backbone} ({ {'imagenet': 'ImageNet', 'random': 'random'}.get(weights_of(backbone), 'bundled') } weights)"


def numbered(folder: Path, number: int) -> str:
    """Return the path of one of the images that were drawn into `folder`."""
    return str(folder / f"{number:06d}.jpg")


def sources() -> list[Path]:
    """Return the photographs of the test data."""
    return sorted((DATA / "photos").rglob("*.jpg"))


def photographs(folder: Path, count: int) -> list[str]:
    """Write `count` JPEGs of 500 × 375, from photographs where there are test data, else smooth noise."""
    progress(f"drawing {count} images of 500 × 375")
    folder.mkdir(parents=True)
    found, files = sources(), []
    generator = np.random.default_rng(0)
    for number in range(count):
        image: Image.Image
        if found:
            image = Image.open(found[number % len(found)])
        else:
            image = Image.fromarray(generator.integers(0, 256, (25, 33, 3), dtype=np.uint8))
        image = image.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
        again = number // max(1, len(found))
        image.paste((8 * again % 256, again // 32 * 8, 128), (0, 0, 16, 16))  # equal images would be computed once
        files.append(numbered(folder, number))
        image.save(files[-1], quality=90)
    return files


def processor() -> str:
    """Return the name of the processor, with what decides how fast it multiplies."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = told.get("flags", "").split()
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}
    has = [known[flag] for flag in known if flag in flags]
    return f"{told.get('model name', platform.machine())} ({', '.join(has) or 'no AVX2'})"


def heading(date: str) -> str:
    """Say what the figures hold for."""
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    cores = f"{available_cores()} core{'s' if available_cores() > 1 else ''}"
    told = f"{processor()}, {cores}; Python {platform.python_version()}, {versions}; {date}."
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < QUIET:
        return told
    return f"{told}\n\n**Other programs were busy (load {load:.1f}): measure again when they are not.**"
