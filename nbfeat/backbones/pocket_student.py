"""Pocket while it learns: in PyTorch, whose convolutions train fastest on a CPU, with batch norms and heads.

Used by `pocket_training` alone; nothing that extracts features imports it.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.pocket import CONVOLUTIONS

if TYPE_CHECKING:
    from nbfeat.backbones.pocket_training import Lessons, Recipe

WIDTH = CONVOLUTIONS[-1].after
_MEANS, _DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as nbfeat scales pixels in mode `torch`
_CHECKED_AT_ONCE = 500  # photographs

Weights = dict[str, NDArray[np.float16]]


def train(recipe: Recipe, lessons: Lessons) -> Iterator[tuple[dict[str, Any], Weights]]:
    """Train; yield after each epoch how well the averaged weights do on what is held out, and those weights, folded."""
    torch: Any = importlib.import_module("torch")
    torch.manual_seed(recipe.seed)
    random = torch.Generator().manual_seed(recipe.seed)
    student = torch.nn.ModuleList([make_network(), make_heads(lessons)]).to(memory_format=torch.channels_last)
    swa: Any = importlib.import_module("torch.optim.swa_utils")
    average = swa.get_ema_multi_avg_fn(recipe.average)
    averaged = swa.AveragedModel(student, multi_avg_fn=average, use_buffers=True)
    optimizer = _optimizer(student, recipe)
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
            _learn(student, optimizer, lessons, rows, recipe, progress, random)
            averaged.update_parameters(student)
        epoch += 1
        progress = max(progress, epoch / recipe.epochs)
        figures = {"epochs": epoch, "minutes": round(minutes, 1), "held out": check(averaged.module, lessons)}
        yield figures, folded(averaged.module[0])


def _optimizer(student: Any, recipe: Recipe) -> Any:
    """Make AdamW, which pulls kernels towards zero but neither biases nor the batch norms."""
    torch: Any = importlib.import_module("torch")
    kernels = [each for each in student.parameters() if each.ndim > 1]
    others = [each for each in student.parameters() if each.ndim == 1]
    groups = [{"params": kernels, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.rate)


def _learn(
    student: Any,
    optimizer: Any,
    lessons: Lessons,
    rows: NDArray[np.int64],
    recipe: Recipe,
    progress: float,
    random: Any,
) -> None:
    """Take one step, on some rows of the lessons, when `progress` (0 … 1) of the training is over."""
    torch: Any = importlib.import_module("torch")
    rate = recipe.rate * min(1.0, progress / recipe.warm) * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-6
    for group in optimizer.param_groups:
        group["lr"] = rate
    side = recipe.sides[int(torch.randint(len(recipe.sides), (), generator=random))]
    x = augmented(scaled(lessons.pixels[rows]), side, recipe.smallest_crop, random)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = student[0](x.to(memory_format=torch.channels_last))
    right, near = losses(student[1], maps.float().mean((2, 3)), lessons, rows, recipe.smoothing)
    optimizer.zero_grad()
    (right + recipe.teaching * near).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
    optimizer.step()


def losses(
    heads: Any,
    features: Any,
    lessons: Lessons,
    rows: NDArray[np.int64],
    smoothing: float,
) -> tuple[Any, Any]:
    """Return the cross-entropy of the classes, and 1 - cosine to the teachers' features, averaged over the teachers."""
    torch: Any = importlib.import_module("torch")
    functional = torch.nn.functional
    labels = torch.from_numpy(lessons.labels[rows])
    right = functional.cross_entropy(heads[0](features), labels, label_smoothing=smoothing)
    cosines = [
        functional.cosine_similarity(head(features), torch.from_numpy(target[rows])).mean()
        for head, target in zip(heads[1:], lessons.targets, strict=True)
    ]
    return right, 1 - sum(cosines) / len(cosines)


def make_network() -> Any:
    """Make Pocket with a batch norm after each convolution; (n, 3, side, side) → (n, 512, side / 16, side / 16)."""
    torch: Any = importlib.import_module("torch")
    nn = torch.nn

    class Pocket(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(each.before, each.after, each.side, each.stride, each.side // 2, bias=False),
                    nn.BatchNorm2d(each.after),
                )
                for each in CONVOLUTIONS
            )
            for each, (_, norm) in zip(CONVOLUTIONS, self.steps, strict=True):
                if each.shortcut:  # at first the shortcut alone passes (Goyal et al. 2017)
                    nn.init.zeros_(norm.weight)

        def forward(self, x: Any) -> Any:
            given: dict[str, Any] = {}
            for each, step in zip(CONVOLUTIONS, self.steps, strict=True):
                x = step(x)
                x = torch.relu(x + given[each.shortcut] if each.shortcut else x)
                given[each.name] = x
            return x

    return Pocket()


def make_heads(lessons: Lessons) -> Any:
    """Make what is left behind after training: from features to classes, and to what each teacher gives."""
    nn: Any = importlib.import_module("torch.nn")
    classes = int(lessons.labels.max()) + 1
    return nn.ModuleList(nn.Linear(WIDTH, to) for to in (classes, *(target.shape[1] for target in lessons.targets)))


def augmented(x: Any, side: int, smallest: float, random: Any) -> Any:
    """Return a random crop of each image, resized to `side`, perhaps mirrored, in somewhat other light and color."""
    torch: Any = importlib.import_module("torch")
    functional, count = torch.nn.functional, len(x)

    def drawn(*shape: int) -> Any:
        return torch.rand(*shape, generator=random)

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
    torch: Any = importlib.import_module("torch")
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(_MEANS).view(3, 1, 1)) / torch.tensor(_DEVIATIONS).view(3, 1, 1)


def check(student: Any, lessons: Lessons) -> dict[str, float]:
    """Tell of the photographs held out how many classes are right, and how near the teachers' features are."""
    torch: Any = importlib.import_module("torch")
    student.eval()
    held_out = np.flatnonzero(lessons.held_out)
    right, near = [], []
    with torch.inference_mode():
        for rows in np.array_split(held_out, math.ceil(len(held_out) / _CHECKED_AT_ONCE)):
            features = student[0](scaled(lessons.pixels[rows])).mean((2, 3))
            guessed = student[1][0](features).argmax(1).numpy()
            right.append(guessed == lessons.labels[rows])
            near += [float(losses(student[1], features, lessons, rows, 0.0)[1])] * len(rows)
    return {"right": float(np.concatenate(right).mean()), "cosine to the teachers": 1 - float(np.mean(near))}


def folded(network: Any) -> Weights:
    """Fold each batch norm into its convolution: a kernel (rows, columns, inputs, outputs) and a bias for each."""
    found: Weights = {}
    for each, (convolution, norm) in zip(CONVOLUTIONS, network.steps, strict=True):
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        kernel = (convolution.weight * gain[:, None, None, None]).permute(2, 3, 1, 0).contiguous()
        bias = norm.bias - norm.running_mean * gain
        found[f"{each.name}/kernel"] = kernel.detach().numpy().astype(np.float16)
        found[f"{each.name}/bias"] = bias.detach().numpy().astype(np.float16)
    return found
