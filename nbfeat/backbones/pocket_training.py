"""Train Pocket: ``python -m nbfeat.backbones.pocket_training ZIP --teachers FOLDER --out FOLDER``.

ZIP holds photographs of 64 × 64 pixels as ``class/name_number.JPEG`` (Tiny ImageNet's), the folder of teachers the
ImageNet weights of two larger networks under Keras' own file names. Pocket learns the classes and, far more, the
teachers' features. Written to OUT: ``pocket.npz``, its model card ``pocket.json``, and what a later run would compute
again (``teachers.npy``). Needs PyTorch, whose convolutions train fastest on a CPU, beside nbfeat; an hour on two cores
that compute in bfloat16.

Run it with ``OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0`` where other programs share the cores: threads that wait for
each other at full speed were 40 times slower there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.pocket import CONVOLUTIONS

Floats = NDArray[np.float32]
Weights = dict[str, NDArray[np.float16]]

HELD_OUT = 30  # photographs of each class, the last ones: never learned from
TEACHERS = {
    "MobileNetV2": "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
    "MobileNet --alpha 0.75": "mobilenet_7_5_224_tf_no_top.h5",
}
TEACHER_SIZE = 160  # pixels, to which they are enlarged for the teachers
TARGETS = 256  # principal components of each teacher
_MEANS, _DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as nbfeat scales pixels in mode `torch`
_CHECKED_AT_ONCE = 500  # photographs


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
    parser = argparse.ArgumentParser(prog="python -m nbfeat.backbones.pocket_training")
    parser.add_argument("zip", type=Path, help="photographs, as class/name_number.JPEG")
    parser.add_argument("--teachers", type=Path, required=True, help="folder of Keras' weights files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--epochs", type=int, default=Recipe().epochs)
    parser.add_argument("--minutes", type=float, help="end by then, with fewer epochs")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=given.seed, epochs=given.epochs, minutes=given.minutes)
    lessons = read_lessons(given.zip, given.teachers, given.out / "teachers.npy")
    card = {"learned from": given.zip.name, "teachers": list(TEACHERS), "recipe": asdict(recipe)}
    for figures, weights in train(recipe, lessons):
        print(json.dumps(figures), flush=True)
        half = given.out / "half.npz"
        np.savez(half, **weights)  # type: ignore[arg-type]  # its own parameters have other types
        digest = hashlib.sha256(half.read_bytes()).hexdigest()
        half.replace(given.out / "pocket.npz")
        written = json.dumps({"sha256": digest, **card, **figures}, indent=1)
        (given.out / "pocket.json").write_text(written, encoding="utf-8")


def read_lessons(path: Path, teachers: Path, kept: Path) -> Lessons:
    """Read the photographs, and let the teachers look at them unless `kept` has what they saw."""
    import pandas as pd
    from PIL import Image

    import nbfeat

    def class_and_number(name: str) -> tuple[str, int]:
        return name.partition("/")[0], int(name.removesuffix(".JPEG").rpartition("_")[2])

    with zipfile.ZipFile(path) as archive:
        names = sorted((name for name in archive.namelist() if name.endswith(".JPEG")), key=class_and_number)
        files = [archive.read(name) for name in names]
    classes = [name.partition("/")[0] for name in names]
    each = len(names) // len(set(classes))
    held_out = np.arange(len(names)) % each >= each - HELD_OUT
    if not kept.exists():
        blocks = [f"{name} --weights {teachers / file} --size {TEACHER_SIZE}" for name, file in TEACHERS.items()]
        frame = pd.DataFrame({"file": files})
        found = [nbfeat.extract(frame, one, images="file", precision="bfloat16", cache=False) for one in blocks]
        np.save(kept, np.hstack([one.features.to_numpy(np.float16) for one in found]))
    seen = np.split(np.load(kept), [1280], axis=1)  # MobileNetV2's width
    return Lessons(
        np.stack([np.asarray(Image.open(BytesIO(file)).convert("RGB")) for file in files]),
        np.unique(classes, return_inverse=True)[1],
        tuple(components(one.astype(np.float32), ~held_out) for one in seen),
        held_out,
    )


def components(features: Floats, learn: NDArray[np.bool_]) -> Floats:
    """Return principal components of standardized features, halfway to equal variance, each row of length 1.

    The first components alone would be color and light; of equal variance, the last would be noise.
    """
    x = (features - features[learn].mean(0)) / (features[learn].std(0) + 1e-3)
    variances, vectors = np.linalg.eigh(x[learn].T @ x[learn] / learn.sum())
    largest = np.argsort(variances)[::-1][:TARGETS]
    y = x @ (vectors[:, largest] * variances[largest] ** -0.25).astype(np.float32)
    return np.asarray(y / np.linalg.norm(y, axis=1, keepdims=True))


def train(recipe: Recipe, lessons: Lessons) -> Iterator[tuple[dict[str, Any], Weights]]:
    """Train; yield after each epoch how well the averaged weights do on what is held out, and those weights, folded."""
    import torch
    from torch.optim import swa_utils

    torch.manual_seed(recipe.seed)
    random = torch.Generator().manual_seed(recipe.seed)
    student = torch.nn.ModuleList([make_network(), make_heads(lessons)]).to(memory_format=torch.channels_last)
    average = swa_utils.get_ema_multi_avg_fn(recipe.average)
    averaged = swa_utils.AveragedModel(student, multi_avg_fn=average, use_buffers=True)
    # Kernels are pulled towards zero; neither biases nor the batch norms are.
    kernels, others = ([part for part in student.parameters() if (part.ndim > 1) == many] for many in (True, False))
    groups = [{"params": kernels, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate)
    learn = torch.from_numpy(np.flatnonzero(~lessons.held_out))
    steps, begun, progress, epoch = len(learn) // recipe.batch, time.monotonic(), 0.0, 0
    while progress < 1:
        student.train()
        order = learn[torch.randperm(len(learn), generator=random)].numpy()
        for step in range(steps):
            minutes = (time.monotonic() - begun) / 60
            progress = max((epoch + step / steps) / recipe.epochs, minutes / (recipe.minutes or math.inf))
            if progress >= 1:
                break
            rows = order[step * recipe.batch : (step + 1) * recipe.batch]
            rate = recipe.rate * min(1.0, progress / recipe.warm) * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-6
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            _loss(student, lessons, rows, recipe, random).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
            optimizer.step()
            averaged.update_parameters(student)
        epoch += 1
        progress = max(progress, epoch / recipe.epochs)
        figures = {"epochs": epoch, "minutes": round(minutes, 1), "held out": check(averaged.module, lessons)}
        yield figures, folded(averaged.module[0])


def _loss(student: Any, lessons: Lessons, rows: NDArray[np.int64], recipe: Recipe, random: Any) -> Any:
    """Return the loss of one step, on some rows of the lessons, at a random size."""
    import torch

    side = recipe.sides[int(torch.randint(len(recipe.sides), (), generator=random))]
    x = augmented(scaled(lessons.pixels[rows]), side, recipe.smallest_crop, random)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = maps_of(student[0], x.to(memory_format=torch.channels_last))
    right, near = losses(student[1], maps.float().mean((2, 3)), lessons, rows, recipe.smoothing)
    return right + recipe.teaching * near


def losses(heads: Any, features: Any, lessons: Lessons, rows: NDArray[np.int64], smoothing: float) -> tuple[Any, Any]:
    """Return the cross-entropy of the classes, and 1 - cosine to the teachers' features, averaged over the teachers."""
    import torch

    functional, labels = torch.nn.functional, torch.from_numpy(lessons.labels[rows])
    right = functional.cross_entropy(heads[0](features), labels, label_smoothing=smoothing)
    cosines = [
        functional.cosine_similarity(head(features), torch.from_numpy(target[rows])).mean()
        for head, target in zip(heads[1:], lessons.targets, strict=True)
    ]
    return right, 1 - sum(cosines) / len(cosines)


def make_network() -> Any:
    """Make Pocket's convolutions, each with a batch norm after it."""
    from torch import nn

    steps = nn.ModuleList()
    for each in CONVOLUTIONS:
        convolution = nn.Conv2d(each.before, each.after, each.side, each.stride, each.side // 2, bias=False)
        steps.append(nn.Sequential(convolution, nn.BatchNorm2d(each.after)))
        if each.shortcut:  # at first the shortcut alone passes (Goyal et al. 2017)
            nn.init.zeros_(steps[-1][1].weight)
    return steps


def maps_of(network: Any, x: Any) -> Any:
    """Run what `make_network` made; (n, 3, side, side) → (n, 512, side / 16, side / 16)."""
    given: dict[str, Any] = {}
    for each, step in zip(CONVOLUTIONS, network, strict=True):
        x = step(x)
        given[each.name] = x = (x + given[each.shortcut] if each.shortcut else x).relu()
    return x


def make_heads(lessons: Lessons) -> Any:
    """Make what is left behind after training: from features to classes, and to what each teacher gives."""
    from torch import nn

    widths = (int(lessons.labels.max()) + 1, *(target.shape[1] for target in lessons.targets))
    return nn.ModuleList(nn.Linear(CONVOLUTIONS[-1].after, width) for width in widths)


def augmented(x: Any, side: int, smallest: float, random: Any) -> Any:
    """Return a random crop of each image, resized to `side`, perhaps mirrored, in somewhat other light and color."""
    import torch

    def drawn(*shape: int) -> Any:
        return torch.rand(*shape, generator=random)

    functional, count = torch.nn.functional, len(x)
    area, aspect = smallest + (1 - smallest) * drawn(count), torch.exp((drawn(count) - 0.5) * 2 * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    place = torch.zeros(count, 2, 3)
    place[:, 0, 0] = width * (1 - 2 * (drawn(count) < 0.5).float())
    place[:, 1, 1] = height
    place[:, 0, 2] = (1 - width) * (2 * drawn(count) - 1)
    place[:, 1, 2] = (1 - height) * (2 * drawn(count) - 1)
    grid = functional.affine_grid(place, (count, 3, side, side), align_corners=False)
    x = functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    contrast, color, light = drawn(count, 1, 1, 1), drawn(count, 3, 1, 1), drawn(count, 1, 1, 1)
    return x * (0.75 + 0.5 * contrast) + 0.4 * (color - 0.5) + 0.4 * (light - 0.5)


def scaled(pixels: NDArray[np.uint8]) -> Any:
    """Scale pixels (n, rows, columns, 3) as mode `torch` does; (n, 3, rows, columns)."""
    import torch

    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(_MEANS).view(3, 1, 1)) / torch.tensor(_DEVIATIONS).view(3, 1, 1)


def check(student: Any, lessons: Lessons) -> dict[str, float]:
    """Tell of the photographs held out how many classes are right, and how near the teachers' features are."""
    import torch

    student.eval()
    held_out = np.flatnonzero(lessons.held_out)
    right, near = [], []
    with torch.inference_mode():
        for rows in np.array_split(held_out, math.ceil(len(held_out) / _CHECKED_AT_ONCE)):
            features = maps_of(student[0], scaled(lessons.pixels[rows])).mean((2, 3))
            guessed = student[1][0](features).argmax(1).numpy()
            right.append(guessed == lessons.labels[rows])
            near += [float(losses(student[1], features, lessons, rows, 0.0)[1])] * len(rows)
    return {"right": float(np.concatenate(right).mean()), "cosine to the teachers": 1 - float(np.mean(near))}


def folded(network: Any) -> Weights:
    """Fold each batch norm into its convolution: a kernel (rows, columns, inputs, outputs) and a bias for each."""
    found: Weights = {}
    for each, (convolution, norm) in zip(CONVOLUTIONS, network, strict=True):
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        kernel = (convolution.weight * gain[:, None, None, None]).permute(2, 3, 1, 0).contiguous()
        for part, value in (("kernel", kernel), ("bias", norm.bias - norm.running_mean * gain)):
            found[f"{each.name}/{part}"] = value.detach().numpy().astype(np.float16)
    return found


if __name__ == "__main__":
    main()
