"""The Keras engine on several devices: TensorFlow and JAX see two CPUs, because most machines have no GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nbfeat import ExtractionError
from nbfeat.inference.engines import devices
from tests.keras_child import run

PROGRAMS = "replicas,memory,whole,precisions,scaled_and_normed,pretended_gpus,older"  # the last changes settings


@pytest.fixture(scope="module")
def paths(pictures: Path) -> tuple[str, ...]:
    """Return twenty small pictures."""
    return tuple(sorted(map(str, pictures.glob("*.png"))))


def ran(backend: str, programs: str, paths: tuple[str, ...]) -> dict[str, Any]:
    """Run programs of `tests.inference.devices_child` in one process, where the backend is installed."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"no {backend} here: pip install '.[{backend}]'")
    return run(programs, *paths, backend=backend, module="tests.inference.devices_child")


@pytest.fixture(scope="module", params=["tensorflow", "jax", "torch"])
def on(request: pytest.FixtureRequest, paths: tuple[str, ...]) -> dict[str, Any]:
    """Return the results of the programs on each backend, with its name."""
    return {"backend": request.param, **ran(request.param, PROGRAMS, paths)}


@pytest.fixture(scope="module")
def newer(paths: tuple[str, ...]) -> dict[str, Any]:
    """Return the results with the settings that only PyTorch has."""
    found: dict[str, Any] = ran("torch", "newer", paths)["newer"]
    return found


@pytest.mark.slow
def test_replicas_are_equal_and_take_batches_in_turn(on: dict[str, Any]) -> None:
    found = on["replicas"]
    assert found["same weights"]
    assert found["apart"], "both run on the same variables"
    assert found["bit-equal"]
    assert found["turns"] == [0, 1, 0, 1, 0, 1]
    assert found["as one"], "two devices give different rows or a different order"
    if on["backend"] != "torch":  # PyTorch has one CPU
        assert len(set(found["devices"])) == 2
        assert found["name"].endswith(", CPU:0 and CPU:1")
    # The number of devices doesn't change features, so it isn't in the cache key.
    assert found["kind"] == found["one's kind"]
    # Two batches are in flight per device, and closing drops them.
    assert found["window"] == 4
    assert found["in flight"] == 0
    assert found["after closing"]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["early", "late"])
def test_a_batch_that_memory_does_not_do_for_runs_in_parts(on: dict[str, Any], when: str) -> None:
    found = on["memory"][when]
    assert found["rows"] == 22
    assert found["worst"] > 0.99999
    assert found["ran"] == [2]
    assert [sentence.partition(" ran out of ")[2] for sentence in found["notes"]] == [
        "memory for 10 images at once, so it ran 5 at a time.",
        "memory for 5 images at once, so it ran 2 at a time.",
    ]


@pytest.mark.slow
def test_the_search_stops_where_memory_ends_and_none_for_one_image_is_an_error(on: dict[str, Any]) -> None:
    found = on["memory"]
    sentence = "CPU:0 ran out of memory for 128 images at once, so it ran 64 at a time."
    assert found["searched"] == {"size": 64, "notes": [sentence]}
    assert "have enough memory for the network and one image. Close" in found["none"]
    assert found["another error"] == "not about that"
    assert found["recognized"] == [True, True, False, False]


@pytest.mark.slow
def test_a_run_that_stops_or_lacks_memory_loses_no_image_and_says_so(on: dict[str, Any]) -> None:
    found = on["whole"]
    assert found["worst"] > 0.99999
    assert found["failures"] == 0
    assert 0 < found["stopped"] < 20
    assert "ran out of memory for 8 images at once, so it ran 4 at a time." in found["report"]
    assert {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}[on["backend"]] in found["report"]


@pytest.mark.slow
def test_fewer_bits_give_nearly_the_same(on: dict[str, Any]) -> None:
    found = on["precisions"]
    assert found["bfloat16"] > 0.99
    assert found["float16"] > 0.999
    assert found["differs"], "it was computed in float32"
    assert set(found["type"]) == {"float32"}
    assert found["policy"] == "mixed_float16", "the user's own policy was changed"


@pytest.mark.slow
def test_what_cannot_be_turned_to_fewer_bits_is_told(on: dict[str, Any]) -> None:
    found = on["precisions"]
    for refused, reason in zip(found["refused"], ("stays in float32", "different values", "Nameless"), strict=True):
        assert refused.startswith("Mine cannot be converted to bfloat16 (")
        assert reason in refused
        assert refused.endswith("Use `precision='float32'`.")
    assert "Use `precision='bfloat16'`" in found["huge in float16"]
    assert found["huge in bfloat16"] == ""


@pytest.mark.slow
def test_layers_that_prepare_pixels_and_a_norm_at_the_end_stay_in_float32(on: dict[str, Any]) -> None:
    assert on["scaled_and_normed"] == {
        "copied": True,
        "differs": True,
        "outside": ["float32", "float32", "bfloat16", "float32"],
        "inside": ["bfloat16", "bfloat16"],
        "variables": ["float32"],
    }


def check_switches(backend: str, found: dict[str, Any]) -> None:
    assert found["before"] != found["inside"][0]
    assert found["kept"], "the user's code saw other settings while the run lasted"
    assert found["after"] == found["before"]
    assert found["same"]
    assert found["next"] == "depthwise_conv2d_1", "the names of the user's next layers changed"
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


@pytest.mark.slow
def test_no_setting_of_the_process_decides_a_result_or_is_changed(on: dict[str, Any]) -> None:
    check_switches(on["backend"], on["older"])


@pytest.mark.slow
def test_nor_does_one_that_is_inherited(newer: dict[str, Any]) -> None:
    check_switches("torch", newer)
    assert {newer["before"][name] for name in ("all", "cuda", "mkldnn")} == {"tf32"}
    assert {newer["left"][name] for name in ("all", "cuda", "mkldnn")} == {"none"}
    assert newer["left"]["products"] == "bf16"


# Batch size


def measured(times: dict[int, float], *, room: int = 10_000) -> Callable[[int], float]:
    """Return a function that gives `times` for batches, and has memory for `room` images."""

    def seconds(size: int) -> float:
        if size > room:
            raise MemoryError
        return times.get(size, size * times[max(times)] / max(times))

    return seconds


@pytest.mark.parametrize(
    ("times", "room", "largest", "expected", "sentences"),
    [
        ({32: 1.0, 64: 1.2, 128: 1.8, 256: 3.5}, 10_000, 1024, 128, 0),  # from 128 to 256 it gains 3%
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
    size = devices.Room(32, notes.append)
    size.grow("gpu:0", measured(times, room=room), largest)
    assert size.size == expected
    assert len(notes) == sentences
    assert all(note.startswith("GPU:0 ran out of memory for ") for note in notes)


def test_a_gpu_without_memory_is_told_with_the_way_out() -> None:
    with pytest.raises(ExtractionError, match=r"GPU:1 doesn't have enough memory .* or `device='cpu'`\.$"):
        devices.Room(32).grow("gpu:1", measured({32: 1.0}, room=0), 1024)

    def broken(_: int) -> float:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        devices.Room(32).grow("gpu:1", broken, 1024)


def test_the_first_run_of_a_size_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    clock = iter([0.0, 3.0, 10.0, 12.0])
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert devices.stopwatch(lambda pixels: sizes.append(len(pixels)), (4, 4, 3))(8) == 2.0
    assert sizes == [8, 8, 8]


def test_batches_of_large_images_are_smaller() -> None:
    assert devices.largest_batch((224, 224, 3)) == 1024
    assert 100 < devices.largest_batch((600, 600, 3)) < 256
    assert np.prod((devices.largest_batch((600, 600, 3)), 600, 600, 3)) <= devices.LARGEST_BYTES


# GPUs


@pytest.mark.slow
def test_gpus_are_counted_and_named_by_their_kind_and_not_taken_whole(on: dict[str, Any]) -> None:
    grown = ["first"] if on["backend"] == "tensorflow" else []
    assert on["pretended_gpus"] == {"count": 2, "kinds": "Fast 5", "grown": grown}


@pytest.mark.slow
def test_a_gpu_gives_what_the_cpu_gives(paths: tuple[str, ...]) -> None:
    found: dict[str, Any] = ran("tensorflow", "on_gpu", paths)["on_gpu"] if devices.sign_of_gpu() else {}
    if not found.get("gpus"):
        pytest.skip("Keras' backend sees no GPU: run this where there is one")
    assert found["float32"] > 0.9999
    assert found["first alone"] > 0.9999
    assert found["bfloat16"] > 0.95
    assert found["float16"] > 0.99
    assert "GPU:0" in found["report"]
    assert "gpu" in found["where"][0]
    assert found["batch"] >= 32
