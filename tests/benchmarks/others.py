"""The other ways of doing the same, in a process of their own: one JSON request per line in, seconds out."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from functools import partial
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np

from nbfeat.backbones.catalog import CATALOG

KEPT: dict[str, Any] = {}


def keras_model(backbone: str, weights: str) -> tuple[Any, Any]:
    """Return a Keras model with average pooling, and how its pixels are prepared."""
    keras: Any = importlib.import_module("keras")
    row = CATALOG[backbone]
    if row.package != "keras.applications":  # nbfeat's own, whose speed does not depend on the weights
        if backbone not in KEPT:
            network = importlib.import_module(f"{row.package}.{row.module}").build(row.size)
            KEPT[backbone] = keras.Sequential([network, keras.layers.GlobalAveragePooling2D()])
        return KEPT[backbone], partial(keras.applications.imagenet_utils.preprocess_input, mode=row.scaling)
    if backbone not in KEPT:
        KEPT[backbone] = getattr(keras.applications, backbone)(
            include_top=False, pooling="avg", weights=None if weights == "random" else weights
        )
    return KEPT[backbone], getattr(keras.applications, row.module).preprocess_input


def tutorial(files: list[str], backbone: str, weights: str) -> None:
    """Load, prepare and predict one image at a time, as the tutorials do."""
    model, prepare = keras_model(backbone, weights)
    utils: Any = importlib.import_module("keras").utils
    side = CATALOG[backbone].size
    for file in files:
        pixels = utils.img_to_array(utils.load_img(file, target_size=(side, side)))
        model.predict(prepare(pixels[None]), verbose=0)


def keras_batches(files: list[str], backbone: str, weights: str) -> None:
    """Load everything, then one `predict` in batches of 32."""
    model, prepare = keras_model(backbone, weights)
    utils: Any = importlib.import_module("keras").utils
    side = CATALOG[backbone].size
    pixels = [utils.img_to_array(utils.load_img(file, target_size=(side, side))) for file in files]
    model.predict(prepare(np.stack(pixels)), batch_size=32, verbose=0)


def timm(files: list[str], backbone: str, precision: str) -> None:
    """Load with Pillow, run PyTorch and timm in batches of 32, channels last."""
    torch: Any = importlib.import_module("torch")
    names = {"MobileNetV2": "mobilenetv2_100", "ResNet50": "resnet50", "VGG16": "vgg16"}
    if backbone not in names:
        message = f"timm has no {backbone}"
        raise ImportError(message, name=message)
    if f"timm {backbone}" not in KEPT:
        made = importlib.import_module("timm").create_model(names[backbone], pretrained=False, num_classes=0)
        KEPT[f"timm {backbone}"] = made.eval().to(memory_format=torch.channels_last)
    image: Any = importlib.import_module("PIL.Image")
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with torch.inference_mode(), torch.autocast("cpu", dtype=kind, enabled=precision == "bfloat16"):
        for start in range(0, len(files), 32):
            batch = [
                np.asarray(image.open(file).convert("RGB").resize((224, 224))) for file in files[start : start + 32]
            ]
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float().div(255)
            KEPT[f"timm {backbone}"](pixels.contiguous(memory_format=torch.channels_last))


WAYS = {way.__name__: way for way in (tutorial, keras_batches, timm)}

if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        way = WAYS[request.pop("way")]
        try:
            way(**{**request, "files": request["files"][:33]})  # warm up: building, tracing both sizes of batch
            start = time.perf_counter()
            way(**request)
            print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
        except ImportError as error:
            print(json.dumps({"missing": error.name}), flush=True)
