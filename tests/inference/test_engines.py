"""The CPU engine and the networks on disk."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import nbfeat
from nbfeat import ExtractionError, NetworkError, RequestError, WeightsError, isolation
from nbfeat.backbones.catalog import CATALOG
from nbfeat.backbones.weights import Loaded
from nbfeat.errors import DiskFullError
from nbfeat.inference import compiled_models
from nbfeat.inference.compiled_models import Stored, prepare
from nbfeat.inference.engines import devices
from nbfeat.inference.engines.base import Precision
from nbfeat.inference.engines.openvino import OpenVINOEngine
from nbfeat.inference.model import negative_layers
from nbfeat.inference.prepared import vectors_of
from nbfeat.inference.spec import Cut, NetworkSpec, Output
from tests.faces import same
from tests.fake import to_its_end

SMALL = "EfficientNetLite0 --size 32"
SPEC = NetworkSpec(
    backbone="EfficientNetLite0", alpha=None, weights="imagenet", scaling=CATALOG["EfficientNetLite0"].scaling, size=32,
    cuts=(Cut(), Cut("block2b_add", "max")),
)  # fmt: skip


@pytest.fixture
def stored() -> Stored:
    return to_its_end(prepare(SPEC))[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows_are_the_same_to_the_bit_for_any_batch_size_order_and_company(
    photos: pd.DataFrame, precision: str
) -> None:
    options = {"images": "path", "precision": precision, "cache": False}
    try:
        whole = nbfeat.extract(photos, SMALL, **options).features
    except NetworkError:
        pytest.skip(f"this CPU does not compute in {precision}")
    for size in (1, 3, 16):
        same(nbfeat.extract(photos, SMALL, batch_size=size, **options).features, whole)
    some = photos.sample(7, random_state=0)
    same(nbfeat.extract(some, SMALL, **options).features, whole.loc[some.index])
    same(
        nbfeat.extract(photos, SMALL, f"{SMALL} --resize crop --prefix another", **options)["efficientnetlite0"], whole
    )


@pytest.mark.slow
def test_cuts_beside_cuts_are_never_mixed_with_those_of_the_cuts_alone(photos: pd.DataFrame) -> None:
    """OpenVINO fuses layers up to the next cut, so another cut changes the last bits of those after it."""
    some, options = photos.head(6), {"images": "path", "precision": "float32"}
    layers = [layer.name for layer in CATALOG["ResNet50V2"].layers][::3]
    blocks = [f"ResNet50V2 --size 64 --weights random --layer {layer}" for layer in layers]
    alone = [nbfeat.extract(some, block, **options) for block in blocks]
    together = nbfeat.extract(some, blocks, **options)
    same(together.features, nbfeat.extract(some, blocks, **options, cache=False).features)
    assert together.cached == 0
    again = [nbfeat.extract(some, block, **options) for block in blocks]
    for first, second in zip(alone, again, strict=True):
        same(second.features, first.features)
        assert second.cached == len(some)


def test_an_engine_closed_in_flight_has_all_its_buffers_again(stored: Stored) -> None:
    engine = OpenVINOEngine(stored, precision="float32", batch_size=2)
    free = len(engine._free)
    for _ in range(2):
        while not engine.is_full:
            engine.submit(engine.buffer(), 2)
        engine.buffer()
        assert engine._busy
        engine.close()
        assert not engine._busy
        assert len(engine._free) == free
    buffer = engine.buffer()
    engine.submit(buffer, 1)
    assert engine.collect()[Cut().key].shape == (1, 1280)


def test_a_network_that_fails_to_build_leaves_nothing(own_home: Path) -> None:
    before = sorted((own_home / "networks").iterdir())
    with pytest.raises(RequestError, match="no layer 'nosuch'"):
        list(prepare(replace(SPEC, cuts=(Cut("nosuch"),))))
    abandoned = prepare(replace(SPEC, size=33))
    next(abandoned)
    abandoned.close()
    assert sorted((own_home / "networks").iterdir()) == before


def limited(monkeypatch: pytest.MonkeyPatch, shell: str, folder: Path) -> None:
    """Run these commands of the shell before each child that writes to `folder`."""
    usual = isolation.child_command

    def command(module: str, *arguments: str) -> list[str]:
        words = usual(module, *arguments)
        return ["sh", "-c", f'{shell}; exec "$@"', "sh", *words] if folder in Path(arguments[-1]).parents else words

    monkeypatch.setattr(isolation, "child_command", command)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs limits of POSIX")
@pytest.mark.parametrize("kind", ["a full disk", "a limit"])
def test_where_the_disk_is_full_networks_are_built_in_the_temporary_folder(
    stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    disk, temporary = tmp_path / "disk", tmp_path / "temporary"
    for folder in (disk, temporary):
        folder.mkdir(mode=0o700)
    monkeypatch.setenv("NBFEAT_HOME", str(disk / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(disk)]
    if kind == "a limit":
        limited(monkeypatch, "ulimit -f 1000", disk)
    elif shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a disk")
    try:
        here = to_its_end(prepare(SPEC))[1]
        assert temporary in here.folder.parents
        why = "File too large" if kind == "a limit" else "No space left on device"
        room = rf"{re.escape(str(disk / 'home' / 'networks'))} \({why}, [\d,.]+ [kMGT]?B free and [\d.]+ MB needed\)\. "
        assert re.match(
            rf"The disk is full at {room}Free some space, or set NBFEAT_HOME .* only for this run", here.note
        )
        assert [(here.folder / name).read_bytes() for name in ("network.xml", "network.bin")] == [
            (stored.folder / name).read_bytes() for name in ("network.xml", "network.bin")
        ]
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(
            DiskFullError, match=rf"full at {re.escape(str(disk))}/nbfeat-\w+ \({why}, .* Free some space"
        ):
            to_its_end(prepare(SPEC))
        assert not list((disk / "home" / "networks").iterdir())
    finally:
        if kind == "a full disk":
            subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.name == "nt", reason="needs the shell of POSIX")
@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        ("kill -9 $$", "it printed no error"),
        ("echo terminated >&2; echo '  what():  std::bad_alloc' >&2; kill -6 $$", r"what\(\):  std::bad_alloc"),
        ("raise MemoryError", "MemoryError"),
        ("raise RuntimeError('Exception from here:\\nstd::bad_alloc\\n')", r"std::bad_alloc"),
    ],
)
def test_a_lack_of_memory_while_building_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, reason: str
) -> None:
    if "raise" in ends:
        code = f"""
import sys
from nbfeat.inference import compiled_models

def build(*_, **__):
    {ends}

compiled_models.build = build
sys.exit(compiled_models._main(*sys.argv[1:]))
"""
        monkeypatch.setattr(isolation, "child_command", lambda _, *given: [sys.executable, "-c", code, *given])
    else:
        limited(monkeypatch, ends, tmp_path)
    (out := tmp_path / "out").mkdir()
    with pytest.raises(
        ExtractionError, match=rf"not enough memory to build {SPEC.network.title} \({reason}\)\. Close other programs"
    ):
        list(compiled_models.run_child(SPEC, out))


@pytest.mark.slow
def test_a_file_that_keeps_hdf5_busy_forever_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py: Any = importlib.import_module("h5py")
    with h5py.File(tmp_path / "endless.h5", "w") as file:
        file.attrs["layer_names"] = ["first", "second"]
    data = bytearray((tmp_path / "endless.h5").read_bytes())
    at = data.index(b"GCOL") + 16  # the first text that the heap holds
    data[at : at + 2], data[at + 8 : at + 16] = bytes(2), bytes(8)  # free space of no size
    (tmp_path / "endless.h5").write_bytes(data)
    code = """
import sys
from nbfeat import isolation
from nbfeat.inference import compiled_models

isolation.LONGEST_READING = 1
sys.exit(compiled_models._main(*sys.argv[1:]))
"""
    monkeypatch.setattr(isolation, "child_command", lambda _, *given: [sys.executable, "-c", code, *given])
    (out := tmp_path / "out").mkdir()
    with pytest.raises(WeightsError, match="take longer to read than an intact file does"):
        list(compiled_models.run_child(replace(SPEC, weights=str(tmp_path / "endless.h5")), out))


def test_a_lack_of_memory_is_not_the_fault_of_the_cpu(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    library = isolation.import_openvino()
    reasons = iter(["std::bad_alloc", "Resource temporarily unavailable", "can't alloc", "no such operation"])

    def compile_model(*_: object) -> None:
        raise RuntimeError(f"Exception from src/core.cpp:117:\n{next(reasons)}\n")

    core = SimpleNamespace(read_model=library.Core().read_model, compile_model=compile_model)
    fake = SimpleNamespace(Tensor=library.Tensor, Core=lambda: core)
    monkeypatch.setattr(isolation, "import_openvino", lambda: fake)
    for _ in range(3):
        with pytest.raises(ExtractionError, match=r"not enough memory to run the network \(.*\)\. Close other"):
            OpenVINOEngine(stored, precision="float32", batch_size=2)
    with pytest.raises(NetworkError, match="This CPU cannot run the network in float32: no such operation"):
        OpenVINOEngine(stored, precision="float32", batch_size=2)


def test_two_that_build_the_same_network_at_once_both_have_it(
    stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(stored.folder, tmp_path / "built")
    both_are_at_it = threading.Barrier(2)

    def run_child(_: NetworkSpec, out: Path) -> Iterator[str]:
        shutil.copytree(tmp_path / "built", out, dirs_exist_ok=True)
        both_are_at_it.wait(30)
        yield "built"

    monkeypatch.setattr(compiled_models, "run_child", run_child)
    with ThreadPoolExecutor(2) as pool:
        (_, one), (_, other) = pool.map(to_its_end, [prepare(SPEC), prepare(SPEC)])
    assert one == other == stored


def test_precision_and_device_are_words_that_exist() -> None:
    assert devices.check_precision("auto") == "auto"
    with pytest.raises(RequestError, match="auto, float32, bfloat16 or float16"):
        devices.check_precision("int8")
    for asked in ("cpu:1", "tpu", "gpu:x", ""):
        with pytest.raises(RequestError):
            devices.check_device(asked)


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "sign_of_gpu", lambda: True)
    for count, asked, expected in (
        (0, "auto", ("cpu",)), (2, "auto", ("gpu:0", "gpu:1")), (2, "gpu", ("gpu:0",)), (2, "gpu:1", ("gpu:1",)),
        (2, "cpu", ("cpu",)),
    ):  # fmt: skip
        monkeypatch.setattr(devices, "count_gpus", lambda count=count: count)
        assert devices.choose_devices(asked) == expected
    with pytest.raises(RequestError, match="sees 2 GPUs"):
        devices.choose_devices("gpu:2")
    monkeypatch.setattr(devices, "count_gpus", lambda: 0)
    with pytest.raises(RequestError, match=r"sees no GPU.*`device='cpu'`"):
        devices.choose_devices("gpu")


@pytest.mark.parametrize(("files", "hidden", "expected"), [
    (["nvidiactl", "null"], None, False), (["nvidia3"], None, True), (["kfd"], None, True), (["nvidia0"], "", False),
])  # fmt: skip
def test_a_driver_s_files_are_the_sign_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], hidden: str | None, expected: object
) -> None:
    monkeypatch.setattr(devices, "_DRIVERS", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    for name in files:
        (tmp_path / name).touch()
    assert devices.sign_of_gpu() is expected


def test_on_windows_the_library_of_the_driver_is_the_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "_DRIVERS", tmp_path / "dev")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SYSTEMROOT", str(tmp_path))
    (tmp_path / "System32").mkdir()
    assert not devices.sign_of_gpu()
    (tmp_path / "System32" / "nvcuda.dll").touch()
    assert devices.sign_of_gpu()


def test_a_child_finds_the_standard_library_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stale backport beside the package, such as `pathlib`, must not replace the standard library's."""
    (tmp_path / "nbfeat").symlink_to(Path(isolation.__file__).parent)
    for stale in ("pathlib.py", "typing.py", "enum.py"):
        (tmp_path / stale).write_text("raise SystemExit('stale')")
    monkeypatch.setattr(isolation, "_FOLDER", tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    child = isolation.child_command("nbfeat.paths"), isolation.child_environment()
    assert child[1]["PYTHONPATH"] == "/of/the/user"
    done = subprocess.run(child[0], env=child[1], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_package_without_metadata_has_an_unknown_version(
    photos: pd.DataFrame, fake_network: type[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fake_network

    def without(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(isolation, "version", without)
    result = nbfeat.extract(photos, "MobileNet --size 32", images="path")
    assert set(result.recipe["versions"].values()) == {"unknown"}
    same(result.like(photos).features, result.features)
    nbfeat.ImageFeatures("MobileNet --size 32").fit(photos["path"])


@pytest.mark.slow
def test_clearing_disturbs_nobody_who_builds_or_runs_a_network(
    photos: pd.DataFrame, own_home: Path, tmp_path: Path
) -> None:
    """Three processes build and run networks while this one clears what is stored fifty times."""
    code = f"""
import itertools, os, nbfeat, pandas as pd
frame = pd.DataFrame({{"path": {photos["path"].tolist()!r}}})
for size in itertools.cycle(range(START, START + 4)):
    assert nbfeat.extract(frame, f"EfficientNetLite0 --size {{size}}").failures.empty
    if os.path.exists({str(tmp_path / "stop")!r}):
        break
"""
    command = [sys.executable, "-c"]
    builders = [subprocess.Popen([*command, code.replace("START", str(start))]) for start in (40, 50, 60)]
    for number in range(50):
        nbfeat.storage.clear("all" if number % 2 else "networks")
        time.sleep(0.1)
    (tmp_path / "stop").touch()
    assert [builder.wait(120) for builder in builders] == [0, 0, 0]


def test_a_network_cleared_before_it_runs_is_built_again(photos: pd.DataFrame, own_home: Path) -> None:
    extraction = nbfeat.Extraction(photos, SMALL, images="path", precision="float32", cache=False)
    with closing(extraction.steps()) as steps:
        while not next(steps).note.startswith("20 rows"):
            pass
        assert list((own_home / "networks").glob("*/network.xml"))
        nbfeat.storage.clear("networks")
        assert not list((own_home / "networks").glob("*/network.xml"))
        last = list(steps)[-1]
    assert (last.done, last.failed) == (20, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "job"])
def test_an_exit_while_a_thread_works_aborts_no_process(kind: str) -> None:
    for seconds in np.random.default_rng(0).uniform(0, 0.3, 3):
        command = [sys.executable, "-m", "tests.inference.exit_child", str(seconds), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "terminate called" not in done.stderr


@pytest.mark.slow
def test_nothing_is_sent_and_nothing_is_written_elsewhere(photos: pd.DataFrame, tmp_path: Path) -> None:
    """Run cold and warm in a fresh home, with a hook in every process that records connections and lookups."""
    hook = tmp_path / "hook"
    hook.mkdir()
    notes = tmp_path / "connections.txt"
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "def note(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        f"        open({str(notes)!r}, 'a').write(f'{{event}} {{arguments}}\\n')\n"
        "sys.addaudithook(note)\n"
    )
    home, networks, keras = (tmp_path / name for name in ("home", "networks", "keras"))
    home.mkdir()
    unset = {"CI", "TF_BUILD", "JENKINS_URL"}  # these switch OpenVINO's telemetry off
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(home), "NBFEAT_HOME": str(networks), "KERAS_HOME": str(keras), "PYTHONPATH": str(hook)}
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        environment.pop(name, None)
    # The child process sets PYTHONPATH itself, so a wrapper adds the hook again.
    wrapper = hook / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH="{hook}:$PYTHONPATH" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    code = f"""
import json, sys
sys.executable = {str(wrapper)!r}
import pandas as pd, nbfeat
result = nbfeat.extract(pd.DataFrame({{"path": {list(photos["path"])!r}}}), {SMALL!r}, images="path")
print(json.dumps([name for name in ("tensorflow", "keras", "openvino_telemetry") if name in sys.modules]))
"""
    for _ in ("cold", "warm"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
        )
        assert not done.returncode, done.stderr
        assert done.stderr == ""
        assert json.loads(done.stdout) == []
    assert not notes.exists(), notes.read_text()
    assert list(home.iterdir()) == []
    assert networks.stat().st_mode & 0o777 == 0o700


def test_pixels_are_read_in_place(stored: Stored) -> None:
    engine = OpenVINOEngine(stored, precision="float32", batch_size=2)
    buffer = engine.buffer()
    buffer[:] = np.arange(buffer.size, dtype=np.uint64).reshape(buffer.shape) % 251
    before = buffer.copy()
    vectors = []
    for _ in range(2):
        engine.submit(buffer, 2)
        vectors.append(engine.collect())
        np.testing.assert_array_equal(buffer, before)
    for key in vectors[0]:
        np.testing.assert_array_equal(vectors[0][key], vectors[1][key])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_precision_is_obeyed_or_refused_and_never_swapped(stored: Stored, precision: Precision) -> None:
    try:
        engine = OpenVINOEngine(stored, precision=precision, batch_size=2)
    except NetworkError as error:
        with pytest.raises(NetworkError, match=r"`precision='float32'`|cannot run the network"):
            raise error from None
        return
    pixels = np.random.default_rng(0).integers(0, 256, engine.buffer().shape, np.uint8)
    exact = OpenVINOEngine(stored, precision="float32", batch_size=2)
    rows = [vectors_of(one, pixels)[Cut().key] for one in (engine, exact)]
    assert not np.array_equal(rows[0], rows[1])
    np.testing.assert_allclose(rows[0], rows[1], atol=0.1 * np.abs(rows[1]).max())


def test_numbers_that_slow_some_cpus_down_are_zero(tmp_path: Path) -> None:
    openvino = isolation.import_openvino()
    ops = importlib.import_module("openvino.opset13")
    pixels = ops.parameter([-1, 8, 8, 3], openvino.Type.u8)
    small = ops.multiply(ops.convert(pixels, "f32"), ops.constant(np.float32(1e-25)))
    kernel = ops.constant(np.full((4, 8, 1, 1), 1e-16, np.float32))  # 1e-25 × 1e-16 is below 1e-38
    features = ops.reduce_mean(ops.convolution(small, kernel, [1, 1], [0, 0], [0, 0], [1, 1]), np.array([2, 3]))
    features.output(0).set_names({"end:default"})
    openvino.save_model(openvino.Model([features], [pixels]), tmp_path / "network.xml", compress_to_fp16=False)
    stored = Stored(tmp_path, {"end:default": Output(4, "avg", (8, 3, 4), negative=False)}, Loaded("random", ""))
    engine = OpenVINOEngine(stored, precision="float32", batch_size=1)
    np.testing.assert_array_equal(vectors_of(engine, np.full((1, 8, 8, 3), 255, np.uint8))["end:default"], 0)


OVERLAPPING = """
import gc, signal, sys
import nbfeat, pandas as pd

signal.signal(signal.SIGINT, signal.default_int_handler)
frame, asked = pd.DataFrame({"path": sys.argv[1:]}), {"images": "path", "cache": False}
one = nbfeat.extract(frame, "EfficientNetLite0", **asked)
another = nbfeat.extract(frame, "EfficientNetLite0 --size 64", **asked)
del one
del another
gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
def test_an_interrupt_after_networks_that_overlapped_ends_no_process(photos: pd.DataFrame) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OVERLAPPING, *photos["path"]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


@pytest.mark.parametrize(("slope", "negative"), [(0.0, False), (0.3, True)])
def test_a_leaky_relu_gives_values_below_zero(slope: float, negative: bool) -> None:
    layer = type("ReLU", (), {"name": "relu", "negative_slope": slope})()
    assert negative_layers(SimpleNamespace(layers=[layer])) == {"relu": negative}
