"""Train Pocket: ``python -m nbfeat.backbones.pocket_training ZIP --teachers FOLDER --out FOLDER``.

ZIP holds photographs of 64 × 64 pixels as ``class/name_number.JPEG`` (Tiny ImageNet's), the folder of teachers the
ImageNet weights of two larger networks under Keras' own file names. Pocket learns the classes and, far more, the
teachers' features. Written to OUT: ``pocket.npz``, its model card ``pocket.json``, and what a later run would compute
again (``teachers.npy``). Needs PyTorch beside nbfeat; an hour on two cores that compute in bfloat16.

Run it with ``OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0`` where other programs share the cores: threads that wait for
each other at full speed were 40 times slower there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

HELD_OUT = 30  # photographs of each class, the last ones: never learned from
TEACHERS = {
    "MobileNetV2": "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
    "MobileNet --alpha 0.75": "mobilenet_7_5_224_tf_no_top.h5",
}
TEACHER_SIZE = 160  # pixels, to which they are enlarged for the teachers
TARGETS = 256  # principal components of each teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How Pocket is trained. Its epochs are cut where `minutes` end before; the learning rate falls to 0 either way."""

    seed: int = 0
    epochs: int = 44
    minutes: float | None = None
    batch: int = 128
    rate: float = 3e-3  # of AdamW at its highest
    warm: float = 0.04  # share of the epochs in which it rises
    decay: float = 0.05
    smoothing: float = 0.1  # of the classes
    teaching: float = 8.0  # weight of the teachers' loss beside that of the classes
    smallest_crop: float = 0.4  # share of the photograph's area
    sides: tuple[int, ...] = (48, 56, 64)  # pixels; each step draws one, so that things of many sizes are learned
    average: float = 0.998  # how much of the averaged weights stays at each step


@dataclass(frozen=True, slots=True)
class Lessons:
    """Photographs (n, 64, 64, 3) of uint8, the number of each one's class, what each teacher gives, who is held out."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    targets: tuple[Floats, ...]
    held_out: NDArray[np.bool_]


def main(arguments: list[str] | None = None) -> None:
    """Train, and write the weights and their card."""
    from nbfeat.backbones import pocket_student

    recipe = Recipe()
    parser = argparse.ArgumentParser(prog="python -m nbfeat.backbones.pocket_training")
    parser.add_argument("zip", type=Path, help="photographs, as class/name_number.JPEG")
    parser.add_argument("--teachers", type=Path, required=True, help="folder of Keras' weights files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--epochs", type=int, default=recipe.epochs)
    parser.add_argument("--minutes", type=float, default=recipe.minutes, help="end by then, with fewer epochs")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=given.seed, epochs=given.epochs, minutes=given.minutes)
    lessons = read_lessons(given.zip, given.teachers, given.out / "teachers.npy")
    for figures, weights in pocket_student.train(recipe, lessons):
        print(json.dumps(figures), flush=True)
        write(
            weights,
            {"learned from": given.zip.name, "teachers": list(TEACHERS), "recipe": asdict(recipe), **figures},
            given.out,
        )


def read_lessons(path: Path, teachers: Path, kept: Path) -> Lessons:
    """Read the photographs, and let the teachers look at them unless `kept` has what they saw."""
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        names = sorted((name for name in archive.namelist() if name.endswith(".JPEG")), key=_class_and_number)
        files = [archive.read(name) for name in names]
    classes = [_class_and_number(name)[0] for name in names]
    each = len(names) // len(set(classes))
    held_out = np.arange(len(names)) % each >= each - HELD_OUT
    if not kept.exists():
        np.save(kept, np.hstack([_seen(files, f"{name} --weights {teachers / TEACHERS[name]}") for name in TEACHERS]))
    seen = np.split(np.load(kept), [1280], axis=1)  # MobileNetV2's width
    return Lessons(
        np.stack([np.asarray(Image.open(BytesIO(file)).convert("RGB")) for file in files]),
        np.unique(classes, return_inverse=True)[1],
        tuple(components(one.astype(np.float32), ~held_out) for one in seen),
        held_out,
    )


def _class_and_number(name: str) -> tuple[str, int]:
    return name.partition("/")[0], int(name.removesuffix(".JPEG").rpartition("_")[2])


def _seen(files: list[bytes], teacher: str) -> NDArray[np.float16]:
    """Return the features that a teacher gives of each file."""
    import pandas as pd

    import nbfeat

    frame = pd.DataFrame({"file": files})
    block = f"{teacher} --size {TEACHER_SIZE}"
    found = nbfeat.extract(frame, block, images="file", precision="bfloat16", cache=False)
    print(found, flush=True)
    return found.features.to_numpy(np.float16)


def components(features: Floats, learn: NDArray[np.bool_]) -> Floats:
    """Return principal components of standardized features, halfway to equal variance, each row of length 1.

    The first components alone would be color and light; of equal variance, the last would be noise.
    """
    x = (features - features[learn].mean(0)) / (features[learn].std(0) + 1e-3)
    variances, vectors = np.linalg.eigh(x[learn].T @ x[learn] / learn.sum())
    largest = np.argsort(variances)[::-1][:TARGETS]
    y = x @ (vectors[:, largest] * variances[largest] ** -0.25).astype(np.float32)
    rows: Floats = y / np.linalg.norm(y, axis=1, keepdims=True)
    return rows


def write(weights: dict[str, NDArray[np.float16]], card: dict[str, Any], out: Path) -> None:
    """Write ``pocket.npz`` whole, and ``pocket.json`` with its SHA-256."""
    half = out / "half.npz"
    np.savez(half, **weights)  # type: ignore[arg-type]  # its own parameters have other types
    digest = hashlib.sha256(half.read_bytes()).hexdigest()
    half.replace(out / "pocket.npz")
    (out / "pocket.json").write_text(json.dumps({"sha256": digest, **card}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
