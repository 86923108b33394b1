"""What Keras does on TensorFlow, as its users write it; in a process of its own."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np

from nbfeat.backbones.catalog import CATALOG
from tests.benchmarks.serve import serve

KEPT: dict[str, tuple[Any, Callable[..., Any]]] = {}


def keras_model(backbone: str, weights: str) -> tuple[Any, Callable[..., Any]]:
    """Return a Keras model with average pooling, and how its pixels are prepared."""
    if backbone not in KEPT:
        keras: Any = importlib.import_module("keras")
        row = CATALOG[backbone]
        model = getattr(keras.applications, backbone)(
            include_top=False, pooling="avg", weights=None if weights == "random" else weights
        )
        KEPT[backbone] = model, getattr(keras.applications, row.module).preprocess_input
    return KEPT[backbone]


def pixels_of(file: str, side: int) -> Any:
    """Load one image as the tutorials do."""
    utils: Any = importlib.import_module("keras").utils
    return utils.img_to_array(utils.load_img(file, target_size=(side, side)))


def tutorial(files: list[str], backbone: str, weights: str) -> None:
    """Load, prepare and predict one image at a time, as the tutorials do."""
    model, prepare = keras_model(backbone, weights)
    for file in files:
        pixels = pixels_of(file, CATALOG[backbone].size)
        model.predict(prepare(pixels[None]), verbose=0)


def batches(files: list[str], backbone: str, weights: str) -> None:
    """Load everything, then one `predict` in batches of 32."""
    model, prepare = keras_model(backbone, weights)
    pixels = [pixels_of(file, CATALOG[backbone].size) for file in files]
    model.predict(prepare(np.stack(pixels)), batch_size=32, verbose=0)


def load_img(files: list[str], side: int, threads: int) -> None:
    """Load images and do nothing with them."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(partial(pixels_of, side=side), files))


if __name__ == "__main__":
    serve({"tutorial": tutorial, "batches": batches, "load_img": load_img})
