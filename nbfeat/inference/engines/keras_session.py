"""A Keras session of one's own, in full float32: what runs in it neither obeys nor changes the user's settings.

The switches by which TensorFlow and PyTorch compute float32 in fewer bits belong to the whole process, so they are off
for short blocks: around tracing, dispatching and fetching, and never around what the user runs in between.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from nbfeat import isolation

_AUTO_MIXED = "auto_mixed_precision"  # the first part of several options
Result = TypeVar("Result")


def in_a_fresh_session(work: Callable[[], Result], device: str) -> Result:
    """Do `work` in a thread of its own: Keras counts by thread, so neither side sees the other's names."""
    result: list[Any] = []

    def do() -> None:
        try:
            if device.startswith("gpu"):
                grow_memory()
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


def grow_memory() -> None:
    """Let TensorFlow take the memory of GPUs as it needs it, unless it has started or the user has said how to."""
    if importlib.import_module("keras").backend.backend() != "tensorflow":
        return
    config: Any = importlib.import_module("tensorflow").config
    with contextlib.suppress(RuntimeError, ValueError):
        for gpu in config.get_visible_devices("GPU"):
            config.experimental.set_memory_growth(gpu, enable=True)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute in all bits of float32 on the backend that Keras has here; every switch is put back after the block."""
    switched: dict[str, Any] = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    backend = importlib.import_module("keras").backend.backend()
    with isolation.without_fast_math(), switched.get(backend, contextlib.nullcontext)():
        yield


@contextmanager
def _tensorflow() -> Iterator[None]:
    """Switch off TF32, and the optimizer that turns graphs into mixed precision."""
    config: Any = importlib.import_module("tensorflow").config
    was = config.experimental.tensor_float_32_execution_enabled()
    options = config.optimizer.get_experimental_options()
    mixed = [name for name, is_on in options.items() if name.startswith(_AUTO_MIXED) and is_on is True]
    try:
        config.experimental.enable_tensor_float_32_execution(enabled=False)
        if mixed:
            config.optimizer.set_experimental_options(dict.fromkeys(mixed, False))
        yield
    finally:
        config.experimental.enable_tensor_float_32_execution(was)
        if mixed:
            config.optimizer.set_experimental_options(dict.fromkeys(mixed, True))


@contextmanager
def _jax() -> Iterator[None]:
    """Ask for full precision, and JAX's own rules for types; what is compiled in the block keeps them."""
    jax: Any = importlib.import_module("jax")
    wide = (jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")).enable_x64
    with (
        jax.default_matmul_precision("highest"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        wide(False),
    ):
        yield


@contextmanager
def _torch() -> Iterator[None]:
    """Switch off TF32 and bfloat16 products, automatic casts, and the search for algorithms by their speed."""
    torch: Any = importlib.import_module("torch")
    cudnn, dtype, searches = torch.backends.cudnn, torch.get_default_dtype(), torch.backends.cudnn.benchmark
    with contextlib.ExitStack() as stack:
        stack.enter_context(_torch_products(torch))
        for kind in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.callback(setattr, cudnn, "benchmark", searches)
        cudnn.benchmark = False
        yield


@contextmanager
def _torch_products(torch: Any) -> Iterator[None]:
    """Compute products and convolutions in all bits, by the older switches and by those of PyTorch 2.9.

    The older ones are both set and put back first: they change the newer ones too, and PyTorch refuses to run where the
    two disagree. Where the user has made them disagree, the older ones cannot be read, and are left alone.
    """
    cudnn, switches = torch.backends.cudnn, _switches(torch)
    own: list[str] = []
    product = convolution = None
    try:
        for switch in switches:  # from the most general down: one that was not set shows what is set above it
            own.append(switch.fp32_precision)
            switch.fp32_precision = "none"
        _set(switches, own)
        with contextlib.suppress(RuntimeError):
            product = torch.get_float32_matmul_precision()
            convolution = cudnn.allow_tf32
        if convolution is not None:
            torch.set_float32_matmul_precision("highest")
            cudnn.allow_tf32 = False
        _set(switches, ["ieee"] * len(switches))
        yield
    finally:
        if convolution is not None:
            torch.set_float32_matmul_precision(product)
            cudnn.allow_tf32 = convolution
        _set(switches, own)


def _set(switches: list[Any], values: list[str]) -> None:
    """Set switches from the most special up: in PyTorch 2.13 mkldnn's own sets the most general one."""
    for switch, value in reversed(list(zip(switches, values, strict=False))):  # an interrupt leaves some unread
        switch.fp32_precision = value


def _switches(torch: Any) -> list[Any]:
    """Return what has a `fp32_precision` in this PyTorch, the more general before what it holds for."""
    backends = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return []
    found = [backends, backends.cuda.matmul]
    for whole, names in ((backends.cudnn, ("conv", "rnn")), (backends.mkldnn, ("matmul", "conv", "rnn"))):
        found += [whole, *(getattr(whole, name) for name in names)]
    return found
