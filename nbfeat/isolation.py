"""Keras, OpenVINO, Ray and Pillow without noise, telemetry or lasting changes to this process."""

import faulthandler
import importlib
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LONGEST_READING = 300  # seconds, to check a weights file, which is a matter of milliseconds
_FAST_MATH = "ONEDNN_DEFAULT_FPMATH_MODE"
_FOLDER = Path(__file__).resolve().parents[1]
# Keras and OpenVINO import these if installed: seconds of start-up, 600 MB, telemetry, a font cache.
_NOT_NEEDED = {"openvino_telemetry", "tensorflow", "torch", "jax", "matplotlib", "pandas", "sklearn", "IPython"}


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would send data and write to ``~/intel``; may raise ImportError."""
    if masked := "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # makes the import fail; OpenVINO has a stub for that
    try:
        return importlib.import_module("openvino")
    finally:
        if masked:
            del sys.modules["openvino_telemetry"]


@contextmanager
def without_fast_math() -> Iterator[None]:
    """Hide the variable that makes oneDNN compute "float32" in bfloat16."""
    value = os.environ.pop(_FAST_MATH, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[_FAST_MATH] = value


def quiet_child() -> None:
    """Prepare a child process to import Keras and build networks, without telemetry or unneeded imports."""
    sys.meta_path.insert(0, _Refuse())
    warnings.simplefilter("ignore")
    keras: Any = importlib.import_module("keras")
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    openvino: Any = importlib.import_module("openvino")
    # Keras' `predict` leaves the precision to OpenVINO, whose default is bfloat16 where the CPU has it.
    run, exact = openvino.compile_model, {"INFERENCE_PRECISION_HINT": "f32"}
    openvino.compile_model = lambda model, device="CPU", config=None: run(model, device, {**exact, **(config or {})})


@contextmanager
def reading_in_time() -> Iterator[None]:
    """End a child process that reads longer than LONGEST_READING: damaged files can keep HDF5 busy forever."""
    is_child = any(isinstance(finder, _Refuse) for finder in sys.meta_path)
    if is_child:  # nothing else ends a loop in a C library
        faulthandler.dump_traceback_later(LONGEST_READING, exit=True)
    try:
        yield
    finally:
        if is_child:
            faulthandler.cancel_dump_traceback_later()


class _Refuse(MetaPathFinder):
    """Blocks imports that a child doesn't need."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:  # the protocol's
        if fullname.partition(".")[0] in _NOT_NEEDED:
            raise ModuleNotFoundError(f"{fullname} is not needed in this process", name=fullname)


def version_of(package: str) -> str:
    """Return the version of an installed package; "unknown" if it has no metadata, as on a bare PYTHONPATH."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def child_environment() -> dict[str, str]:
    """Return the environment of a child that builds networks with Keras' OpenVINO backend."""
    return {name: value for name, value in os.environ.items() if name != _FAST_MATH} | {"KERAS_BACKEND": "openvino"}


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this package in this interpreter, wherever the package lies."""
    # Its folder comes last on the path: PYTHONPATH would put it and its neighbors before the standard library.
    run = f"import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-P", "-c", run, str(_FOLDER), *arguments]


@contextmanager
def keras_defaults() -> Iterator[None]:
    """Give Keras the settings of a fresh session; restore the user's settings, layer counters and seeds afterwards."""
    keras: Any = importlib.import_module("keras")
    state: Any = importlib.import_module("keras.src.backend.common.global_state")
    interactive, seeds, names = keras.config.is_interactive_logging_enabled(), random.getstate(), "object_name_uids"
    settings = (
        (keras.config.set_image_data_format, keras.config.image_data_format(), "channels_last"),
        (keras.config.set_floatx, keras.config.floatx(), "float32"),
        (keras.config.set_dtype_policy, keras.config.dtype_policy(), "float32"),
        (partial(state.set_global_attribute, names), state.get_global_attribute(names), None),
    )
    try:
        for change, _, fresh in settings:
            change(fresh)
        keras.config.disable_interactive_logging()
        yield
    finally:
        for change, before, _ in settings:
            change(before)
        random.setstate(seeds)
        if interactive:
            keras.config.enable_interactive_logging()


_lock, _undo, _users = threading.Lock(), ExitStack(), 0


@contextmanager
def pillow_defaults() -> Iterator[None]:
    """Give Pillow its defaults while any block runs, so truncated and huge files fail; then undo that."""
    global _users  # noqa: PLW0603 - runs may overlap; the last one restores the settings
    with _lock:
        _users += 1
        if _users == 1:
            defaults = {"Image": ("MAX_IMAGE_PIXELS", 89_478_485), "ImageFile": ("LOAD_TRUNCATED_IMAGES", False)}
            for module, (name, value) in defaults.items():
                holder: Any = importlib.import_module(f"PIL.{module}")
                _undo.callback(setattr, holder, name, getattr(holder, name))
                setattr(holder, name, value)
            # Its warnings come from decoder threads, where the caller's filters don't work reliably.
            warnings.filterwarnings("ignore", module=r"PIL(\..*)?$")
            filters: Any = warnings.filters
            added = filters[0]
            _undo.callback(lambda: added in filters and filters.remove(added))
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _undo.close()


RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_USAGE_DISABLED": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # what its processes write to the terminal
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a new cluster binds to 127.0.0.1
}


@contextmanager
def quiet_ray() -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Yield Ray, silent and without telemetry, and a function that calls it in a thread."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="nbfeat-ray")

    def call(work: Callable[..., Any], *values: object, **options: object) -> Any:
        future = thread.submit(work, *values, **options)
        try:
            return future.result()
        except KeyboardInterrupt:  # in a thread, Ray handles no signals
            wait([future])  # unless there is a second interrupt
            raise

    with ExitStack() as stack:
        stack.callback(put_ray_variables_back, ray_variables())
        stack.callback(thread.shutdown, wait=False)
        os.environ.update(RAY_ENVIRONMENT)
        call(importlib.import_module, "ray.data")
        for logger in map(logging.getLogger, ("ray", "ray.data")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield importlib.import_module("ray"), call


def ray_variables() -> dict[str, str]:
    """Return Ray's environment variables."""
    return {name: value for name, value in os.environ.items() if name.startswith(("RAY_", "PYTHONBREAKPOINT"))}


def put_ray_variables_back(before: dict[str, str]) -> None:
    """Restore Ray's environment variables, removing those that Ray set."""
    for name in ray_variables().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
