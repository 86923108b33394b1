"""The original networks, in a Python that has them: ``python tests/backbones/torchvision_child.py NAME OUT SIZE …``.

Needs torch, torchvision, efficientnet-lite-pytorch and NumPy, and nothing of nbfeat. NAME=FILE has the weights in FILE,
and NAME alone random ones. The folder OUT gets a state dict in both layouts, ``zip.pth`` and ``row.pth``, and for each
SIZE ``SIZE.npz``: ``pixels``, random images as uint8, and under the name of each layer in nbfeat's catalog what it
should give for them, channels last.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

ALEXNET = {
    "features.1": "conv1", "features.2": "pool1", "features.4": "conv2", "features.5": "pool2", "features.7": "conv3",
    "features.9": "conv4", "features.11": "conv5", "features.12": "pool5", "classifier.2": "fc6", "classifier.5": "fc7",
}  # fmt: skip
GOOGLENET = {
    "conv1": "conv1_relu", "conv3": "conv3_relu",
    **{f"inception{part}": f"inception_{part}" for part in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")},
}  # fmt: skip
LITE_BLOCKS = {
    "0": (0, 2, 4, 7, 10, 14, 15),
    "1": (0, 3, 6, 10, 14, 19, 20),
    "2": (0, 3, 6, 10, 14, 19, 20),
}  # last ones
LITE_NAMES = {
    "0": ("1a_project_bn", "2b_add", "3b_add", "4c_add", "5c_add", "6d_add", "7a_project_bn"),
    "1": ("1a_project_bn", "2c_add", "3c_add", "4d_add", "5d_add", "6e_add", "7a_project_bn"),
    "2": ("1a_project_bn", "2c_add", "3c_add", "4d_add", "5d_add", "6e_add", "7a_project_bn"),
}


def definitions() -> Any:
    """Import torchvision's definitions, also where its compiled operators, which they do not need, cannot be loaded."""
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError:  # this module registers them
        sys.modules["torchvision._meta_registrations"] = ModuleType("_meta_registrations")
        return importlib.import_module("torchvision.models")


def made(name: str) -> tuple[torch.nn.Module, dict[str, str]]:
    """Return a network as its published weights are used with, and which of its parts to look at."""
    if name.startswith("EfficientNetLite"):
        kind: Any = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        network: torch.nn.Module = kind.from_name(f"efficientnet-lite{name[-1]}", image_size=None)  # None: of any size
        blocks = zip(LITE_BLOCKS[name[-1]], LITE_NAMES[name[-1]], strict=True)
        # The head's activation is called after the stem's, which is the same module.
        return network, {"_swish": "top_activation"} | {f"_blocks.{at}": f"block{layer}" for at, layer in blocks}
    models = definitions()
    if name == "AlexNet":
        return models.AlexNet(), ALEXNET
    return models.GoogLeNet(aux_logits=True, transform_input=True, init_weights=False), GOOGLENET


def randomize(network: torch.nn.Module) -> None:
    """Draw weights that keep values near 1 in every layer, and batch norms of which no two channels are alike."""
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(part.weight, a=0.5)  # a little less than ReLU asks for: maxima add to it
            if part.bias is not None:
                torch.nn.init.normal_(part.bias, std=0.2)
        elif isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.normal_(part.bias, std=0.3)
            torch.nn.init.normal_(part.running_mean, std=0.3)
            torch.nn.init.uniform_(part.running_var, 0.5, 2)


def main(name: str, out: str, *sizes: str) -> None:
    """Run random images of each size through the network and save everything."""
    torch.manual_seed(0)
    name, _, file = name.partition("=")
    network, looked_at = made(name)
    if file:
        network.load_state_dict(torch.load(file, weights_only=True))
    else:
        randomize(network)
    network.eval()
    for layout in ("zip", "row"):
        torch.save(network.state_dict(), Path(out, f"{layout}.pth"), _use_new_zipfile_serialization=layout == "zip")
    found: dict[str, Any] = {}

    def keep(layer: str) -> Callable[..., None]:
        def hook(_part: object, _given: object, value: torch.Tensor) -> None:
            last = value.permute(0, 2, 3, 1) if value.ndim == 4 else value
            found[layer] = last.numpy().copy()  # the next ReLU may work in place

        return hook

    for part, layer in looked_at.items():
        network.get_submodule(part).register_forward_hook(keep(layer))
    for size in sizes:
        pixels = np.random.default_rng(0).integers(0, 256, (2, int(size), int(size), 3), dtype=np.uint8)
        with torch.inference_mode():
            network(scaled(pixels, name))
        np.savez(Path(out, f"{size}.npz"), pixels=pixels, **found)


def scaled(pixels: np.ndarray, name: str) -> torch.Tensor:
    """Scale pixels as torchvision's transforms do, or Google's code for EfficientNet-Lite."""
    if name.startswith("EfficientNetLite"):
        return ((torch.from_numpy(pixels).float() - 127) / 128).permute(0, 3, 1, 2)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(pixels).float() / 255 - mean) / deviation).permute(0, 3, 1, 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
