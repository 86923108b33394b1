"""``python -m tests.benchmarks.speed``: the same files through nbfeat and through other ways, in one run.

The limit is what the cores could do at best: cores ÷ (processor seconds per image of reading, decoding in full and
resizing, plus of the network), both measured here. Machines drift, so everything is measured in rounds and the medians
of the ratios within a round are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

import nbfeat
from nbfeat import Extraction, FeatureBlock, NetworkError
from nbfeat.features.engines import Precision
from nbfeat.features.engines.cores import available_cores
from nbfeat.features.engines.openvino import OpenVINOEngine
from nbfeat.features.fit import PixelSpec
from nbfeat.features.images import read_pixels
from nbfeat.features.network import Cut, NetworkSpec
from nbfeat.features.store import Preparing
from nbfeat.html import text_table
from tests.conftest import DATA, ROOT

ONE_AT_A_TIME = 40  # images for the tutorial loop, which needs no more to be measured
MEASURED: tuple[Precision, ...] = ("float32", "bfloat16")
# The test data have no others; the speed of a network does not depend on them.
WEIGHTS = {"MobileNetV2": "imagenet", "Pocket": "bundled"}


class Others:
    """The process that runs the other ways."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.others"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )

    def rate(self, way: str, files: list[str], **options: str) -> float | None:
        """Return images per second, or None where a package is not installed."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"way": way, "files": files, **options}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return len(files) / answer["seconds"] if "seconds" in answer else None


def photographs(folder: Path, count: int) -> list[str]:
    """Write `count` JPEGs of 500 × 375, from photographs where there are test data, else smooth noise."""
    sources = sorted((DATA / "photos").rglob("*.jpg"))
    generator = np.random.default_rng(0)
    files = []
    for number in range(count):
        image: Image.Image
        if sources:
            image = Image.open(sources[number % len(sources)])
        else:
            image = Image.fromarray(generator.integers(0, 256, (25, 33, 3), dtype=np.uint8))
        file = folder / f"{number:05d}.jpg"
        image = image.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
        again = number // max(1, len(sources))
        image.paste((8 * again % 256, again // 32 * 8, 128), (0, 0, 16, 16))  # equal images would be computed once
        image.save(file, quality=90)
        files.append(str(file))
    return files


def spec_of(backbone: str) -> NetworkSpec:
    """Describe the network that is measured."""
    return NetworkSpec.of(FeatureBlock.parse(backbone, {"weights": WEIGHTS.get(backbone, "random")}))


def decoding_seconds(files: list[str], size: int) -> float:
    """Return processor seconds per image of reading, decoding and resizing, on all cores at once."""
    start = time.process_time()
    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(lambda file: read_pixels(file, [PixelSpec(size)], Path()), files))
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


def ours(files: list[str], backbone: str, precision: str) -> tuple[float, float]:
    """Return images per second of a whole warm run, and of its steady part."""
    options: dict[str, Any] = {"weights": WEIGHTS.get(backbone, "random"), "precision": precision, "cache": False}
    start = time.perf_counter()
    extraction = Extraction(pd.DataFrame({"path": files}), backbone, images="path", **options).run()
    return len(files) / (time.perf_counter() - start), extraction.rate


def caching(files: list[str], backbone: str, rounds: int) -> list[tuple[str, ...]]:
    """Measure what keeping costs, and what it saves."""
    weights = WEIGHTS.get(backbone, "random")
    frame = pd.DataFrame({"path": files})

    def rate(*, cache: bool) -> float:
        start = time.perf_counter()
        Extraction(frame, backbone, images="path", weights=weights, cache=cache).run()
        return len(files) / (time.perf_counter() - start)

    shares, colds, warms = list[float](), list[float](), list[float]()
    for _ in range(rounds):
        nbfeat.storage.clear()
        without, cold = rate(cache=False), rate(cache=True)
        warms.append(max(rate(cache=True) for _ in range(3)))
        shares.append(cold / without)
        colds.append(cold)
    return [
        (f"{backbone}, first run, kept", f"{median(colds):,.0f}", f"{median(shares):.0%} of the speed without cache"),
        (f"{backbone}, again", f"{median(warms):,.0f}", f"{median(warms) / median(colds):,.0f} times the first run"),
    ]


def fresh(code: str, **environment: str) -> dict[str, Any]:
    """Run a program in a fresh process and return its JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


START = """
import time; start = time.perf_counter()
import nbfeat; imported = time.perf_counter() - start
import json, re, sys
from pathlib import Path
import pandas as pd
frame = pd.DataFrame({{"path": {files!r}}})
nbfeat.extract(frame, {backbone!r}, images="path", weights={weights!r}, cache=False)
seconds = time.perf_counter() - start
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
heavy = [name for name in ("tensorflow", "keras") if name in sys.modules]
print(json.dumps({{"import": imported, "seconds": seconds, "peak": peak, "heavy": heavy}}))
"""


def start_up(files: list[str], backbone: str, home: Path) -> list[tuple[str, str]]:
    """Measure a fresh kernel: with nothing on disk, and with the network there."""
    code = START.format(files=files[:10], backbone=backbone, weights=WEIGHTS.get(backbone, "random"))
    cold = fresh(code, NBFEAT_HOME=str(home / "cold"))
    warm = min(
        (fresh(code, NBFEAT_HOME=str(home / "cold")) for _ in range(3)), key=lambda found: float(found["seconds"])
    )
    shutil.rmtree(home / "cold")
    return [
        ("import nbfeat", f"{warm['import'] * 1000:.0f} ms"),
        ("fresh kernel → 10 images, cold (network is built)", f"{cold['seconds']:.2f} s"),
        ("fresh kernel → 10 images, network on disk", f"{warm['seconds']:.2f} s"),
        ("   its peak memory", f"{warm['peak']:.0f} MB"),
        ("   TensorFlow or Keras imported", ", ".join(warm["heavy"]) or "no"),
    ]


def measure(backbone: str, files: list[str], rounds: int, others: Others) -> list[tuple[str, ...]]:
    """Measure every way in turn, `rounds` times, and return the rows of the table."""
    spec, weights = spec_of(backbone), WEIGHTS.get(backbone, "random")
    preparing = Preparing(NetworkSpec(**{**{name: getattr(spec, name) for name in spec.__slots__}, "cuts": (Cut(),)}))
    list(preparing)
    found: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for _ in range(rounds):
        loop = others.rate("tutorial", files[:ONE_AT_A_TIME], backbone=backbone, weights=weights)
        rates: dict[str, float | None] = {"tutorial loop": loop}
        rates["Keras predict, batches of 32"] = others.rate(
            "keras_batches", files[:128], backbone=backbone, weights=weights
        )
        for precision in MEASURED:
            rates[f"timm {precision}"] = others.rate("timm", files[:128], backbone=backbone, precision=precision)
            try:
                engine = OpenVINOEngine(preparing.result, precision=precision, batch_size=None)
            except NetworkError:
                continue
            network_seconds(engine, 4)
            decoding, running = decoding_seconds(files, spec.size), network_seconds(engine, max(8, len(files) // 16))
            del engine
            whole, steady = ours(files, backbone, precision)
            limit = available_cores() / (decoding + running)
            rates |= {
                f"decoding alone {precision}": available_cores() / decoding,
                f"limit {precision}": limit,
                f"nbfeat {precision}, warm": whole,
                f"nbfeat {precision}, steady": steady,
            }
            shares.setdefault(f"nbfeat {precision}, steady", []).append(steady / limit)
        for way, rate in rates.items():
            if rate is not None and loop:
                found.setdefault(way, []).append(rate)
                found.setdefault(f"{way} ×", []).append(rate / loop)
    missing: list[tuple[str, ...]] = []
    if "timm float32" not in found:
        missing.append(("PyTorch and timm", "not installed, or without this network", "", ""))
    rows: list[tuple[str, ...]] = []
    for way in [way for way in found if not way.endswith("×")]:
        share = f"{median(shares[way]):.0%} of the limit" if way in shares else ""
        rows.append((way, f"{median(found[way]):.1f}", f"{median(found[f'{way} ×']):.1f}×", share))
    return rows + missing


def processor() -> str:
    """Return the name of the processor, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbones", nargs="+", default=["MobileNetV2", "ResNet50"])
    asked = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("nbfeat", "keras", "tensorflow", "openvino"))
    print(f"{processor()}, {available_cores()} cores; {versions}; {datetime.now(UTC).date()}")
    print(f"{asked.images} JPEGs of 500 × 375, medians of {asked.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        os.environ["NBFEAT_HOME"] = str(folder / "home")
        if (DATA / "keras_home").is_dir():
            shutil.copytree(DATA / "keras_home", folder / "keras", copy_function=shutil.copyfile)
        os.environ["KERAS_HOME"] = str(folder / "keras")
        files = photographs(folder / "images", asked.images)
        for backbone in asked.backbones:
            rows = measure(backbone, files, asked.rounds, Others())
            print(text_table(rows, (backbone, "images/s", "vs. tutorial", "")), "\n", flush=True)
        print(text_table(caching(files, asked.backbones[0], asked.rounds), ("cache", "images/s", "")), "\n", flush=True)
        print(text_table(start_up(files, asked.backbones[0], folder)))


if __name__ == "__main__":
    main()
