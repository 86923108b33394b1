"""Pocket while it learns, in a Python that has PyTorch: ``python -m tests.backbones.pocket_child OUT``.

Needs torch and NumPy beside nbfeat's own files. The folder OUT gets ``network.npz``: ``pixels``, random images, what
the network with batch norms gives for them, and its weights, folded; and ``learned.npz``, how two short trainings went.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbfeat.backbones import pocket_training
from nbfeat.backbones.pocket_training import Lessons, Recipe


def folded(out: Path) -> None:
    """Give the batch norms something to do, and keep what the network gives with and without them."""
    torch.manual_seed(0)
    network = pocket_training.make_network()
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.uniform_(part.bias, -0.5, 0.5)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        for _ in range(30):
            pocket_training.maps_of(network, pocket_training.scaled(pixels))
        maps = pocket_training.maps_of(network.eval(), pocket_training.scaled(pixels))
    arrays: dict[str, Any] = {
        "pixels": pixels,
        "maps": maps.permute(0, 2, 3, 1).numpy(),
        **pocket_training.folded(network),
    }
    np.savez(out / "network.npz", **arrays)


def learned() -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Learn four classes, red, green, blue and bright images, and return how it went and the weights."""
    random = np.random.default_rng(1)
    labels = np.arange(96) % 4
    pixels = random.integers(0, 100, (96, 64, 64, 3), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[..., label if label < 3 else slice(None)] += 100
    target = np.eye(4, dtype=np.float32)[labels]
    lessons = Lessons(pixels, labels, (target, target), np.arange(96) >= 80)
    epochs = list(pocket_training.train(Recipe(epochs=6, batch=16, average=0.5), lessons))
    return [figures for figures, _ in epochs], dict(epochs[-1][1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folded(folder)
    (figures, weights), (_, again) = learned(), learned()
    epochs, right = [each["epochs"] for each in figures], [each["held out"]["right"] for each in figures]
    same = all(np.array_equal(weights[key], again[key]) for key in weights)
    np.savez(folder / "learned.npz", epochs=epochs, right=right, same=same)
