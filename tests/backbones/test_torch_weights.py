"""PyTorch's checkpoints, read without PyTorch: all that it wrote comes out, and nothing hostile runs, hangs or grows.

The files in `checkpoints` are PyTorch 2.13's, written by `saved`.
"""

from __future__ import annotations

import functools
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nbfeat.backbones import torch_weights
from nbfeat.errors import WeightsError, quote
from tests import keras_child
from tests.backbones import hostile_checkpoints
from tests.backbones.torch_files import (
    FORMATS,
    FOUR,
    MAGIC,
    ORDERED,
    REBUILD,
    START,
    Member,
    as_row,
    as_zip,
    call,
    listed,
    members,
    named,
    number,
    shape,
    state,
    storage,
    tensor,
    text,
    zipped,
)
from tests.mutations import TIMES

Arrays = dict[str, npt.NDArray[Any]]
FIXTURES = Path(__file__).parent / "checkpoints"
SAVED = tuple(FIXTURES / name for name in ("zip.pth", "row.pth", "zip_protocol_4.pth", "row_protocol_3.pth"))
COUNT = 1_000 * TIMES  # of mutated files
VALUES = np.arange(-12, 12).reshape(2, 3, 4)
EXPECTED: Arrays = {
    "float": (VALUES / 8).astype(np.float32),
    "double": VALUES / 7,
    "half": (VALUES / 8).astype(np.float16),
    "long": VALUES << 40,
    "int": VALUES.astype(np.int32) << 20,
    "short": VALUES.astype(np.int16) << 8,
    "char": VALUES.astype(np.int8),
    "byte": np.arange(256, dtype=np.uint8),
    "bool": VALUES % 3 == 0,
    "complex": (VALUES + 1j).astype(np.complex64),
    "scalar": np.array(1.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "transposed": (VALUES[0] / 8).astype(np.float32).T,
    "part": (VALUES[1, 1:] / 8).astype(np.float32),
    "column": (VALUES[1, :, 2] / 8).astype(np.float32),
    "brain": (VALUES / 8).astype(np.float32),
    "parameter": np.ones((3, 1), np.float32),
    "tied": np.ones((3, 1), np.float32),
}
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux does")


def saved(torch: Any, path: Path, **how: Any) -> None:
    """Have PyTorch save `EXPECTED`, with the metadata that a module's state dict has."""
    tensors = OrderedDict((name, torch.from_numpy(np.array(array))) for name, array in EXPECTED.items())
    whole = torch.from_numpy((VALUES / 8).astype(np.float32))
    tensors |= {"transposed": whole[0].T, "part": whole[1, 1:], "column": whole[1, :, 2], "brain": whole.bfloat16()}
    tensors["parameter"] = torch.nn.Parameter(tensors["parameter"])
    tensors["tied"] = tensors["parameter"].detach()
    tensors._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as torch.nn.Module does
    torch.save(tensors, path, **how)


def read(data: bytes, folder: Path) -> Arrays:
    (folder / "weights.pth").write_bytes(data)
    return torch_weights.read(folder / "weights.pth")


def refusal(data: bytes, folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read(data, folder)
    return str(caught.value).removeprefix("weights.pth cannot be read as PyTorch weights: ")


def assert_as_expected(arrays: Arrays) -> None:
    assert list(arrays) == list(EXPECTED)
    for name, expected in EXPECTED.items():
        array = arrays[name]
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape), name
        np.testing.assert_array_equal(array, expected, err_msg=name)
        assert array.flags.c_contiguous, name
        assert array.flags.aligned, name
    assert arrays["tied"] is arrays["parameter"]


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_what_pytorch_saved_is_read(path: Path) -> None:
    assert_as_expected(torch_weights.read(path))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "row"])
def test_what_pytorch_saves_is_read(tmp_path: Path, *, new: bool) -> None:
    torch, path = pytest.importorskip("torch"), tmp_path / "weights.pth"
    for protocol in (2, 3, 4, 5):
        saved(torch, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
        assert_as_expected(torch_weights.read(path))
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5), torch.nn.BatchNorm2d(4), torch.nn.LSTM(2, 3))
    torch.save(module.state_dict(), path, _use_new_zipfile_serialization=new)
    arrays = torch_weights.read(path)
    assert list(arrays) == list(module.state_dict())
    for name, expected in module.state_dict().items():
        np.testing.assert_array_equal(arrays[name], expected.numpy(), strict=True)
    torch.save(module, path, _use_new_zipfile_serialization=new)
    with pytest.raises(WeightsError, match=r"'torch\.nn\.modules\.container\.Sequential'.*state_dict"):
        torch_weights.read(path)


def test_what_python_2_wrote_is_read(tmp_path: Path) -> None:
    """Python 2 gave an OrderedDict its items as a list of lists, and wrote text as bytes."""
    identity = b"(U\7storagectorch.cuda\nFloatStorage\nq\2U\x0a1933719376q\3U\6cuda:0\x8a\1\4NtQ"
    hooks = ORDERED + b"]\x85R"
    rebuilt = REBUILD + b"(" + identity + b"K\0K\2K\2\x86K\2K\1\x86\x89" + hooks + b"tR"
    metadata = b"}U\x09_metadata" + ORDERED + b"](](U\0}U\7versionK\1see\x85Rs"
    value = ORDERED + b"](](T\6\0\0\0weight" + rebuilt + b"ee\x85R" + metadata + b"b"
    arrays = read(as_row(value, (4, FOUR), keys=b"]U\x0a1933719376a"), tmp_path)
    assert list(arrays) == ["weight"]
    np.testing.assert_array_equal(arrays["weight"], np.array([[1, 2], [3, 4]], np.float32), strict=True)


@pytest.mark.parametrize("kind", FORMATS)
def test_state_dicts_are_found_where_training_puts_them(kind: str, tmp_path: Path) -> None:
    good = state({"w": tensor()})
    for value in (
        good,
        b"}" + text("w") + tensor() + b"s",
        state({"epoch": number(90), "arch": text("alexnet"), "state_dict": good, "best": b"G" + bytes(8)}),
        state({"model": good, "optimizer": b"}(" + number(0) + b"}" + text("lr") + listed(tensor()) + b"su"}),
    ):
        arrays = read(FORMATS[kind](value), tmp_path)
        np.testing.assert_array_equal(arrays["w"], np.arange(1, 5, dtype=np.float32), strict=True)
        assert list(arrays) == ["w"]


def test_axes_of_one_may_have_any_stride_and_older_names_and_zips_are_read(tmp_path: Path) -> None:
    arrays = read(as_zip(state({"w": tensor(size=shape(1, 2, 1), stride=shape(1 << 40, 2, 7))}), FOUR), tmp_path)
    np.testing.assert_array_equal(arrays["w"], np.array([[[1], [3]]], np.float32), strict=True)
    older = call(named("torch._utils", "_rebuild_tensor"), storage(), number(0), shape(4), shape(1))
    few = [Member("old/data.pkl", START + state({"w": older}) + b"."), Member("old/data/0", FOUR)]
    assert list(read(zipped(*few), tmp_path)) == ["w"]


def test_arrays_are_the_callers(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(SAVED[0].read_bytes())
    before = path.read_bytes()
    for array in torch_weights.read(path).values():
        array[...] = 0
    assert path.read_bytes() == before
    assert_as_expected(torch_weights.read(path))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is not a PyTorch checkpoint"),
        (b"<!DOCTYPE html>\n<html>", r"it starts with '<!DOCTYPE html>\\n<htm'"),
        (b"\x89HDF\r\n\x1a\n", r"it starts with '\\x89HDF\\r\\n\\x1a\\n'"),
        (as_zip(call(named("os", "system"), text("true"))), "it refers to 'os.system', .*was not run.*Save"),
        (as_row(b"cposix\nsystem\n(S'true'\ntR"), "it refers to 'posix.system'"),
        (as_zip(state({"w": tensor()}), FOUR)[:-1], "table of contents.*Download it again"),
        (as_row(state({"w": tensor()}), (4, FOUR))[:-1], r"it should have \d+ bytes but has \d+\. Download it again"),
        (as_zip(state({"epoch": number(3), "net": state({"w": tensor()})}), FOUR), "its entry 'epoch' is not a tensor"),
        (as_row(b"]", (4, FOUR)), "storages"),
        (as_row(b"]"), "it doesn't hold a state dict"),
        (as_zip(state({"w": tensor(storage("QInt8"))}), FOUR), "'torch.QInt8Storage'"),
        (as_row(state({"w": tensor()}), (4, FOUR), little=b"\x89"), "little-endian"),
        (zipped(*members(START + b"N.", byteorder=b"big")), "little-endian"),
        (zipped(*members(START + b"N."), Member("archive/code/a.py", b"1")), "'archive/code/a.py' doesn't belong"),
        (MAGIC + START + number(1000) + b".", "a pickle that PyTorch didn't write"),
    ],
    ids=range(15),
)
def test_refusals_say_why(data: bytes, said: str, tmp_path: Path) -> None:
    found = refusal(data, tmp_path)
    assert re.search(said, found), found
    assert found.endswith(("Download it again.", "or download them again."))


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are files on POSIX")
def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.pth"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero"), tmp_path / "missing.pth", tmp_path / "a\0b.pth"):
        with pytest.raises(WeightsError, match=r"Check the path"):
            torch_weights.read(path)


def test_a_name_from_a_file_is_shown_on_one_line() -> None:
    assert quote("a\n\x1b[31m\N{RIGHT-TO-LEFT OVERRIDE}") == r"'a\n\x1b[31m\u202e'"
    assert len(quote("\0" * 10_000)) < 250
    assert quote(b"\xff") == r"'\xff'"


@pytest.mark.parametrize("path", SAVED[:2], ids=lambda path: path.stem)
def test_truncated_files_are_refused(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    for percent in range(100):
        refusal(data[: len(data) * percent // 100], tmp_path)
    refusal(data[:-1], tmp_path)


watched = functools.partial(keras_child.run, module="tests.backbones.torch_child")


def child(*words: object) -> dict[str, Any]:
    """Have a process of its own read checkpoints, and check what holds whatever they are."""
    found = watched(*map(str, words))
    assert found["odd"] == []  # every refusal is a WeightsError of one sentence
    assert found["seen"] == []  # no file opened, module imported, program started or code compiled
    assert found["seconds"] < 5
    assert found["bytes"] < 100_000_000  # beyond twice the file; the interpreter with NumPy takes 30 MB of them
    return found


@linux
def test_the_watch_sees_what_runs(tmp_path: Path) -> None:
    (tmp_path / "hostile").write_bytes(START + call(named("builtins", "eval"), text("__import__('colorsys')")) + b".")
    found = watched("unpickle", str(tmp_path))
    assert {seen.partition(" ")[0] for seen in found["seen"]} >= {"pickle.find_class", "compile", "exec", "import"}
    assert len(found["odd"]) == 1


@linux
def test_nothing_hostile_is_read_runs_hangs_or_grows(tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "files"
    folder.mkdir()
    files = hostile_checkpoints.everything(canary)
    for place, data in enumerate(files.values()):
        (folder / f"{place}").write_bytes(data)
    found = child("read", folder)
    assert [list(files)[int(name)] for name in found["read"]] == []
    assert found["refused"] == len(files) > 500
    assert not canary.exists()


@linux
@pytest.mark.slow
def test_the_largest_that_are_read_take_little_time_and_memory(tmp_path: Path) -> None:
    files = hostile_checkpoints.heavy()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert child("read", tmp_path)["read"] == sorted(files)


@linux
@pytest.mark.parametrize("path", SAVED[:2], ids=lambda path: path.stem)
def test_mutations_are_read_or_refused(path: Path) -> None:
    found = child("mutate", path, COUNT)
    assert len(found["read"]) + found["refused"] == COUNT
    assert found["refused"] > COUNT / 2


@linux
def test_programs_for_the_machine_are_run_to_the_end_or_refused() -> None:
    found = child("programs", COUNT)
    assert len(found["read"]) + found["refused"] == COUNT
    assert len(found["read"]) > COUNT / 50
