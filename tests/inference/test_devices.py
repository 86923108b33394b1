"""The Keras engine on several devices: TensorFlow and JAX are made to see two CPUs, since most machines have no GPU."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbfeat import NetworkError
from nbfeat.inference import engines
from nbfeat.inference.engines import sizing
from tests.keras_child import run

BACKENDS = ("tensorflow", "jax", "torch")
pytestmark = pytest.mark.slow


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Return each backend that is installed."""
    name = str(request.param)
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"no {name} here: pip install '.[{name}]'")
    return name


@functools.cache
def told(backend: str, *words: str) -> dict[str, Any]:
    """Run a program of `tests.inference.devices_child` once."""
    return run(*words, backend=backend, module="tests.inference.devices_child")


@pytest.fixture(scope="module")
def paths(pictures: Path) -> tuple[str, ...]:
    """Return twenty small pictures."""
    return tuple(sorted(map(str, pictures.glob("*.png"))))


def test_replicas_are_equal_and_take_batches_in_turn(backend: str) -> None:
    found = told(backend, "replicas")
    assert found["same weights"]
    assert found["apart"], "both run on the same variables"
    assert found["bit-equal"]
    assert found["turns"] == [0, 1, 0, 1, 0, 1]
    assert found["as one"], "two devices give other rows, or another order, than one"
    if backend != "torch":  # which has one CPU
        assert len(set(found["devices"])) == 2
        assert found["name"].endswith(", CPU:0 and CPU:1")
    # Which devices, and how many, does not change the numbers, so the cache does not ask.
    assert found["kind"] == found["one's name"]


def test_the_window_is_two_for_each_device_and_closing_drops_it(backend: str) -> None:
    found = told(backend, "replicas")
    assert found["window"] == 4
    assert found["in flight"] == 0
    assert found["after closing"]


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_batch_that_memory_does_not_do_for_runs_in_parts(backend: str, when: str) -> None:
    found = told(backend, "memory")[when]
    assert found["rows"] == 22
    assert found["worst"] > 0.99999
    assert found["ran"] == [2]
    assert [sentence.partition(" had not ")[2] for sentence in found["told"]] == [
        "enough memory for 10 images at once, so 5 ran at once.",
        "enough memory for 5 images at once, so 2 ran at once.",
    ]


def test_the_search_runs_the_network_and_stops_where_memory_ends(backend: str) -> None:
    assert told(backend, "memory")["searched"] == {
        "size": 64,
        "told": ["CPU:0 had not enough memory for 128 images at once, so 64 ran at once."],
    }


def test_memory_that_does_not_do_for_one_image_is_an_error(backend: str) -> None:
    found = told(backend, "memory")
    assert "not enough memory for the network and one image. Close" in found["none"]
    assert found["another error"] == "not about that"
    assert found["recognized"] == [True, True]
    assert found["not"] == [False, False]


def test_a_run_whose_memory_does_not_do_loses_no_image_and_says_so(backend: str, paths: tuple[str, ...]) -> None:
    found = told(backend, "whole", *paths)
    assert found["worst"] > 0.99999
    assert found["failures"] == 0
    assert "had not enough memory for 8 images at once, so 4 ran at once." in found["report"]


def test_fewer_bits_give_nearly_the_same(backend: str, paths: tuple[str, ...]) -> None:
    found = told(backend, "precisions")
    assert min(found["bfloat16"].values()) > 0.95
    assert min(found["float16"].values()) > 0.99
    assert found["differs"], "it was computed in float32"
    assert set(found["type"]) == {"float32"}
    assert found["policy"] == "mixed_float16", "the user's own policy was changed"
    bfloat16, float16 = told(backend, "whole", *paths)["precision"]
    assert bfloat16 > 0.9  # the network is random: between pictures that are nearly alike its errors count for more
    assert float16 > 0.99


def test_what_cannot_be_turned_to_fewer_bits_is_told(backend: str) -> None:
    found = told(backend, "precisions")
    for refused, reason in zip(found["refused"], ("stays in float32", "gives other numbers", "Nameless"), strict=True):
        assert refused.startswith("Mine cannot be turned to bfloat16 (")
        assert reason in refused
        assert refused.endswith("Use --precision float32.")
    assert "Use --precision bfloat16" in found["huge"]
    assert found["huge in bfloat16"] == ""


def test_layers_that_prepare_pixels_and_a_norm_at_the_end_stay_in_float32() -> None:
    found = told("tensorflow", "scaled_and_normed")
    for name, end in (("EfficientNetB0", "bfloat16"), ("ConvNeXtTiny", "float32")):
        assert found[name]["copied"], "a copy in float32 gives other numbers"
        assert found[name]["differs"]
        assert found[name]["first"] == ["float32", "float32"]
        assert found[name]["last"] == [end, "float32"]
        assert found[name]["low"] > 0.9


@pytest.mark.parametrize("way", ["older", "newer"])
def test_no_setting_of_the_process_decides_a_result_or_is_changed(
    backend: str, way: str, paths: tuple[str, ...]
) -> None:
    if way == "newer" and backend != "torch":
        pytest.skip("only PyTorch has two ways to set this")
    found = told(backend, "switches", way, *paths)
    assert found["before"] != found["inside"][0]
    assert found["kept"], "the user's code saw other settings while the run lasted"
    assert found["after"] == found["before"]
    assert found["same"]
    exact: dict[str, dict[str, Any]] = {
        "tensorflow": {"TF32": False, "auto_mixed_precision": False, "auto_mixed_precision_onednn_bfloat16": False},
        "jax": {"default_matmul_precision": "highest", "enable_x64": False},
        "torch": {
            "cuda": "ieee", "conv": "ieee", "rnn": "ieee", "products": "ieee", "autocast": False,
            "dtype": "torch.float32", "benchmark": False,
        },
    }  # fmt: skip
    for inside in found["inside"]:
        expected = {**exact[backend], "policy": "float32", "layout": "channels_last", "oneDNN": None}
        assert {name: inside[name] for name in expected} == expected


def test_a_setting_that_was_inherited_still_is(paths: tuple[str, ...]) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("no torch here: pip install '.[torch]'")
    found = told("torch", "switches", "newer", *paths)
    assert {found["before"][name] for name in ("all", "cuda", "mkldnn")} == {"tf32"}
    assert {found["left"][name] for name in ("all", "cuda", "mkldnn")} == {"none"}
    assert found["left"]["products"] == "bf16"


# The size of a batch


def measured(times: dict[int, float], *, room: int = 10_000) -> Callable[[int], float]:
    """Return what takes `times` for batches, and has memory for `room` images."""

    def seconds(size: int) -> float:
        if size > room:
            raise MemoryError
        return times.get(size, size * times[max(times)] / max(times))

    return seconds


@pytest.mark.parametrize(
    ("times", "room", "largest", "expected", "sentences"),
    [
        ({32: 1.0, 64: 1.2, 128: 1.8, 256: 3.5}, 10_000, 1024, 128, 0),  # from 128 to 256 it gains 3 %
        ({32: 1.0, 64: 2.0}, 10_000, 1024, 32, 0),
        (dict.fromkeys((32, 64, 128, 256, 512, 1024, 2048), 1.0), 10_000, 1024, 1024, 0),
        (dict.fromkeys((32, 64, 128, 256), 1.0), 10_000, 200, 128, 0),
        (dict.fromkeys((32, 64, 128, 256), 1.0), 100, 1024, 64, 1),
        ({32: 1.0, 16: 1.0, 8: 1.0, 4: 1.0}, 9, 1024, 8, 2),
        (dict.fromkeys((5, 10, 20), 1.0), 10_000, 5, 5, 0),
    ],
)
def test_a_batch_grows_while_it_gets_faster(
    times: dict[int, float], room: int, largest: int, expected: int, sentences: int
) -> None:
    notes: list[str] = []
    size = sizing.Room(32, notes.append)
    sizing.find(size, "gpu:0", measured(times, room=room), largest)
    assert size.size == expected
    assert len(notes) == sentences
    assert all(note.startswith("GPU:0 had not enough memory for ") for note in notes)


def test_a_gpu_without_memory_is_told_with_the_way_out() -> None:
    with pytest.raises(NetworkError, match=r"GPU:1 has not enough memory .* use --device cpu\.$"):
        sizing.find(sizing.Room(32), "gpu:1", measured({32: 1.0}, room=0), 1024)

    def broken(_: int) -> float:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        sizing.find(sizing.Room(32), "gpu:1", broken, 1024)


def test_the_first_run_of_a_size_is_not_measured() -> None:
    ran: list[int] = []
    clock = iter([0.0, 3.0, 10.0, 12.0])
    seconds = sizing.stopwatch(lambda pixels: ran.append(len(pixels)), (4, 4, 3), lambda: next(clock))
    assert seconds(8) == 2.0
    assert ran == [8, 8, 8]


def test_batches_of_large_images_are_smaller() -> None:
    assert sizing.largest_for((224, 224, 3)) == 1024
    assert 100 < sizing.largest_for((600, 600, 3)) < 256
    assert np.prod((sizing.largest_for((600, 600, 3)), 600, 600, 3)) <= sizing.LARGEST_BYTES


# GPUs


def test_gpus_are_counted_and_named_by_their_kind_and_not_taken_whole(backend: str) -> None:
    found = told(backend, "pretended_gpus")
    assert found["count"] == 2
    assert found["kinds"] == "Fast 5"
    assert found["grown"] == (["first"] if backend == "tensorflow" else [])


def test_a_gpu_gives_what_the_cpu_gives(paths: tuple[str, ...]) -> None:
    found: dict[str, Any] = told("tensorflow", "on_gpu", *paths) if engines.sign_of_gpu() else {}
    if not found.get("gpus"):
        pytest.skip("Keras' backend sees no GPU: run this where there is one")
    assert found["float32"] > 0.9999
    assert found["first alone"] > 0.9999
    assert found["bfloat16"] > 0.95
    assert found["float16"] > 0.99
    assert "GPU:0" in found["report"]
    assert "gpu" in found["where"][0]
    assert found["batch"] >= 32
