"""A Keras session of one's own: what is built in it neither sees nor changes the user's."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from nbfeat import isolation
from nbfeat.inference.engines import gpus

Result = TypeVar("Result")


def in_a_fresh_session(work: Callable[[], Result], device: str) -> Result:
    """Do `work` in a thread of its own: Keras counts by thread, so neither side sees the other's names."""
    result: list[Any] = []

    def do() -> None:
        try:
            if device.startswith("gpu"):
                gpus.grow_memory()
            with isolation.keras_defaults(), importlib.import_module("keras").device(device):
                result.append(work())
        except BaseException as error:  # raised again below, in the calling thread
            result.append(error)

    thread = threading.Thread(target=do, name="nbfeat-build", daemon=True)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]  # type: ignore[no-any-return]
