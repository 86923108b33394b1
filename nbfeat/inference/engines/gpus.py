"""What a backend says of its GPUs, and how it takes their memory."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any


def grow_memory() -> None:
    """Let TensorFlow take the memory of GPUs as it needs it, so that others can use them too.

    Where it has started already, or the user has said how to share a GPU, it stays as it is.
    """
    if importlib.import_module("keras").backend.backend() != "tensorflow":
        return
    config: Any = importlib.import_module("tensorflow").config
    with contextlib.suppress(RuntimeError, ValueError):
        for gpu in config.get_visible_devices("GPU"):
            config.experimental.set_memory_growth(gpu, enable=True)


def kinds(devices: tuple[str, ...]) -> str:
    """Name what `devices` are, but neither which nor how many: another kind gives other last bits."""
    return ", ".join(sorted({_kind(device) for device in devices}))


def _kind(device: str) -> str:
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return "CPU"
    place = int(number or 0)
    match importlib.import_module("keras").backend.backend():
        case "tensorflow":
            config: Any = importlib.import_module("tensorflow").config
            details = config.experimental.get_device_details(config.get_visible_devices("GPU")[place])
            return str(details.get("device_name", "GPU"))
        case "jax":
            return str(importlib.import_module("jax").devices("gpu")[place].device_kind)
        case "torch":
            return str(importlib.import_module("torch").cuda.get_device_name(place))
    return "GPU"
