"""What is done without nbfeat, on Keras and on PyTorch, in a process of its own: ``python -m tests.benchmarks.others``.

It takes a JSON request per line and answers each. For PyTorch's ways it may be of a Python that has nothing of nbfeat,
but NumPy, Pillow, torch and timm or torchvision. Their weights are random, since nothing is downloaded. Speed does not
depend on them: in none of these networks do they make values so small (denormal) that a CPU slows down.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

Answer = dict[str, Any]
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


def serve(ways: Mapping[str, Callable[..., Answer | None]]) -> None:
    """Answer requests until there are no more; what libraries print goes elsewhere."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm: set[str] = set()
    for line in sys.stdin:
        answers.write(json.dumps(answer(ways, json.loads(line), warm)) + "\n")
        answers.flush()


def answer(ways: Mapping[str, Callable[..., Answer | None]], request: dict[str, Any], warm: set[str]) -> Answer:
    """Run one way and return its seconds and what it tells, or what it lacks, or how it failed.

    The first time it runs over a few images before, `first` of them: it may build, trace or compile something.
    """
    files, first = request.pop("files"), request.pop("first", 32)
    key = json.dumps(request, sort_keys=True)
    way = ways[request.pop("way")]
    try:
        if key not in warm:
            way(files=files[:first], **request)
            warm.add(key)
        start = time.perf_counter()
        told = way(files=files, **request)
        return {"seconds": time.perf_counter() - start, **(told or {})}
    except ImportError as error:
        return {"missing": error.name or str(error)}
    except Exception as error:  # the row of the table says it
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0]}"}


# Keras on TensorFlow, as its users write it


@cache
def import_keras() -> Any:
    os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["KERAS_BACKEND"] = "3", "tensorflow"
    return importlib.import_module("keras")


@cache
def keras_model(backbone: str, weights: str) -> tuple[Any, Callable[..., Any], int]:
    """Return a Keras model with average pooling, how its pixels are prepared, and their size."""
    from nbfeat.backbones.catalog import CATALOG

    keras = import_keras()
    row = CATALOG[backbone]
    weights_or_none = None if weights == "random" else weights
    model = getattr(keras.applications, backbone)(include_top=False, pooling="avg", weights=weights_or_none)
    return model, getattr(keras.applications, row.module).preprocess_input, row.size


def pixels_of(file: str, side: int) -> Any:
    utils = import_keras().utils
    return utils.img_to_array(utils.load_img(file, target_size=(side, side)))


def tutorial(files: list[str], backbone: str, weights: str) -> None:
    """Load, prepare and predict one image at a time, as the tutorials do."""
    model, prepare, size = keras_model(backbone, weights)
    for file in files:
        model.predict(prepare(pixels_of(file, size)[None]), verbose=0)


def keras_batches(files: list[str], backbone: str, weights: str) -> None:
    """Load everything, then one `predict` in batches of 32."""
    model, prepare, size = keras_model(backbone, weights)
    model.predict(prepare(np.stack([pixels_of(file, size) for file in files])), batch_size=32, verbose=0)


def load_img(files: list[str], side: int, threads: int) -> None:
    """Load images and do nothing with them."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(partial(pixels_of, side=side), files))


# PyTorch


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
    for name in preferred:
        try:
            optional(name)
        except ImportError:
            continue
        return name
    raise ImportError(name=" or ".join(preferred))


@cache
def whole(backbone: str, origin: str) -> Any:
    in_timm, in_torchvision = NAMES[backbone]
    if origin == "timm":
        return optional("timm").create_model(in_timm, pretrained=False).eval()
    models = importlib.import_module("torchvision.models")
    return getattr(models, in_torchvision)(weights=None).eval()


@cache
def features(backbone: str, *, compiled: bool) -> Callable[[Any], Any]:
    """Return what turns a batch of uint8 pixels into average-pooled features, in channels-last memory."""
    torch: Any = importlib.import_module("torch")
    origin = library("timm", "torchvision")
    network = whole(backbone, origin).to(memory_format=torch.channels_last)
    if origin == "timm":
        mapped = network.forward_features
    elif backbone == "ResNet50":
        mapped = torch.nn.Sequential(*list(network.children())[:-2])
    else:
        mapped = network.features
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (MEAN, DEVIATION))

    def pooled(pixels: Any) -> Any:
        return mapped((pixels.permute(0, 3, 1, 2).float() - mean) / deviation).mean((2, 3))

    return torch.compile(pooled) if compiled else pooled


def loaded(file: str) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def in_batches(files: list[str]) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        ahead = pool.map(loaded, files)
        for start in range(0, len(files), BATCH):
            yield np.stack([next(ahead) for _ in files[start : start + BATCH]])


def torch_batches(files: list[str], backbone: str, precision: str, *, compiled: bool) -> Answer:
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
        pixels = torch.from_numpy(loaded(file).copy()).permute(2, 0, 1).contiguous().float().div(255)
        found: list[Any] = []
        hook = layer.register_forward_hook(lambda _layer, _given, value, found=found: found.append(value.clone()))
        with torch.no_grad():
            network(((pixels - mean) / deviation).unsqueeze(0))
        hook.remove()
        found[0].numpy()


@cache
def embetter_model(backbone: str) -> tuple[Any, Any]:
    """Return a network without its classifier, and the transform that timm has for it."""
    timm, data = optional("timm"), importlib.import_module("timm.data")
    network = timm.create_model(NAMES[backbone][0], pretrained=False, num_classes=0).eval()
    return network, data.create_transform(**data.resolve_data_config({}, model=network))


def embetter(files: list[str], backbone: str) -> None:
    """Do as embetter's image loader and its encoder with timm: every image transformed, then one pass for each."""
    network, transform = embetter_model(backbone)
    given = [transform(Image.open(file).convert("RGB")).unsqueeze(0) for file in files]
    np.array([network(pixels).squeeze(0).detach().numpy() for pixels in given])


if __name__ == "__main__":
    serve({way.__name__: way for way in (tutorial, keras_batches, load_img, torch_batches, img2vec, embetter)})
