"""What Ray does to the process and the machine that it is in: kept within bounds, and put back."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # what its other parts write to the terminal
}
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # there is no other machine: each socket is bound to 127.0.0.1


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set `variables` for the block, and put all that Ray sets besides back after it."""
    before = _variables()
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in _variables().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("RAY_", "PYTHONBREAKPOINT"))}


@contextmanager
def alone() -> Iterator[None]:
    """Tell Ray that there is no other machine: this process, which read the variable already, and those it starts."""
    constants: Any = importlib.import_module("ray._private.ray_constants")
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        with environment(ALONE):
            yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def without_statistics() -> Iterator[None]:
    """Keep Ray Data from recording how it is used, with a process and a thread that stay."""
    name = "RAY_DATA_USAGE_DISABLED"  # it looks at the end, too
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@contextmanager
def quietly() -> Iterator[None]:
    """Silence Ray's loggers for the block, and what it prints of workers that died, whose rows are tried again."""
    worker: Any = importlib.import_module("ray._private.worker")
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    prints, worker._worker_logs_enabled = worker._worker_logs_enabled, False  # as Ray's debugger does
    try:
        yield
    finally:
        worker._worker_logs_enabled = prints
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def without_greeting() -> Iterator[None]:
    """Keep from the terminal that Ray obeys RAY_BACKEND_LOG_LEVEL; what else is written meanwhile comes at the end."""
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            written.seek(0)
            os.write(2, b"".join(line for line in written if b"RAY_BACKEND_LOG_LEVEL" not in line))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let an interrupt wait for the end of the block, as half of Ray would be left behind; a second one need not."""
    if threading.current_thread() is not threading.main_thread():  # which has no interrupts
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    came: list[int] = []

    def wait(number: int, frame: Any) -> None:
        if came and callable(before):
            before(number, frame)
        came.append(number)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def same_signals() -> Iterator[None]:
    """Put back the handler of SIGTERM, which Ray replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
