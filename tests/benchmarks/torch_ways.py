"""What is done on PyTorch; in a process of its own, of a Python that may have nothing of nbfeat.

Needs torch, NumPy, Pillow, and timm or torchvision. Weights are random, since nothing is downloaded. Speed does not
depend on them: in none of these networks do they make values so small (denormal) that a CPU slows down.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.serve import Answer, serve

BATCH, SIDE = 32, 224
# In timm and in torchvision.
NAMES = {
    "MobileNetV2": ("mobilenetv2_100", "mobilenet_v2"), "ResNet50": ("resnet50", "resnet50"),
    "VGG16": ("vgg16", "vgg16"),
}  # fmt: skip
# What img2vec_pytorch takes by default is in front of the classifier; it has no MobileNetV2.
HOOKED = {
    "timm": {"MobileNetV2": "global_pool", "ResNet50": "global_pool", "VGG16": "pre_logits"},
    "torchvision": {"MobileNetV2": "classifier.0", "ResNet50": "avgpool", "VGG16": "classifier.5"},
}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@cache
def optional(name: str) -> Any:
    """Import timm or torchvision, also where torchvision's operators, which are not needed, cannot be loaded."""
    importlib.import_module("torch")
    try:
        return importlib.import_module(name)
    except RuntimeError:  # this module registers those operators
        sys.modules["torchvision._meta_registrations"] = ModuleType("_meta_registrations")
        return importlib.import_module(name)


def library(*preferred: str) -> str:
    """Return the first of two libraries of networks that can be imported."""
    for name in preferred:
        try:
            optional(name)
        except ImportError:
            continue
        return name
    message = " or ".join(preferred)
    raise ImportError(message, name=message)


@cache
def whole(backbone: str, origin: str) -> Any:
    """Return a network with its classifier."""
    in_timm, in_torchvision = NAMES[backbone]
    if origin == "timm":
        return optional("timm").create_model(in_timm, pretrained=False).eval()
    models = importlib.import_module("torchvision.models")
    return getattr(models, in_torchvision)(weights=None).eval()


@cache
def maps(backbone: str) -> Callable[[Any], Any]:
    """Return what gives a network's last feature map, without the classifier, in channels-last memory."""
    torch: Any = importlib.import_module("torch")
    origin = library("timm", "torchvision")
    network = whole(backbone, origin).to(memory_format=torch.channels_last)
    if origin == "timm":
        return network.forward_features  # type: ignore[no-any-return]
    if backbone == "ResNet50":
        return torch.nn.Sequential(*list(network.children())[:-2])  # type: ignore[no-any-return]
    return network.features  # type: ignore[no-any-return]


@cache
def features(backbone: str, *, compiled: bool) -> Callable[[Any], Any]:
    """Return what turns a batch of uint8 pixels into average-pooled features."""
    torch: Any = importlib.import_module("torch")
    mapped = maps(backbone)
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (MEAN, DEVIATION))

    def pooled(pixels: Any) -> Any:
        return mapped((pixels.permute(0, 3, 1, 2).float() - mean) / deviation).mean((2, 3))

    return torch.compile(pooled) if compiled else pooled


def loaded(file: str) -> np.ndarray:
    """Read, decode and resize an image."""
    return np.asarray(Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def in_batches(files: list[str]) -> Iterator[np.ndarray]:
    """Load batches ahead, in as many threads as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        ahead = pool.map(loaded, files)
        for start in range(0, len(files), BATCH):
            yield np.stack([next(ahead) for _ in files[start : start + BATCH]])


def batches(files: list[str], backbone: str, precision: str, *, compiled: bool) -> Answer:
    """Run batches of 32, decoded ahead by threads."""
    torch: Any = importlib.import_module("torch")
    pooled, half = features(backbone, compiled=compiled), precision == "bfloat16"
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        for batch in in_batches(files):
            pooled(torch.from_numpy(batch)).float().numpy()
    origin = library("timm", "torchvision")
    return {"torch": torch.__version__, "networks": f"{origin} {optional(origin).__version__}"}


def img2vec(files: list[str], backbone: str) -> None:
    """Do as img2vec_pytorch's `get_vec`: one image at a time through the whole network, a forward hook on one layer."""
    torch: Any = importlib.import_module("torch")
    origin = library("torchvision", "timm")
    network = whole(backbone, origin)
    layer = network.get_submodule(HOOKED[origin][backbone])
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    for file in files:
        scaled = Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous().float().div(255)
        found: list[Any] = []
        hook = layer.register_forward_hook(lambda _layer, _given, value, found=found: found.append(value.clone()))
        with torch.no_grad():
            network(((pixels - mean) / deviation).unsqueeze(0))
        hook.remove()
        found[0].numpy()


def embetter(files: list[str], backbone: str) -> None:
    """Do as embetter's image loader and its encoder with timm: every image transformed, then one pass for each."""
    timm: Any = optional("timm")
    data: Any = importlib.import_module("timm.data")
    key = f"embetter {backbone}"
    if key not in KEPT:
        network = timm.create_model(NAMES[backbone][0], pretrained=False, num_classes=0).eval()
        KEPT[key] = network, data.create_transform(**data.resolve_data_config({}, model=network))
    network, transform = KEPT[key]
    given = [transform(Image.open(file).convert("RGB")).unsqueeze(0) for file in files]
    np.array([network(pixels).squeeze(0).detach().numpy() for pixels in given])


KEPT: dict[str, tuple[Any, Any]] = {}

if __name__ == "__main__":
    serve({"batches": batches, "img2vec": img2vec, "embetter": embetter})
