"""Files of weights in HDF5 that lead out of themselves, or are larger than they look, are refused before a read.

What HDF5 itself makes of a damaged file is not tried here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nbfeat.backbones.keras_weights import MOST_LEVELS, check_hdf5
from nbfeat.errors import WeightsError

Fill = Callable[[Any], object]


def made(folder: Path, fill: Fill, **how: Any) -> Path:
    path = folder / "weights.h5"
    with h5py.File(path, "w", **how) as file:
        fill(file)
    return path


def numbers(size: int = 1000) -> np.ndarray:
    return np.random.default_rng(0).normal(size=size).astype(np.float32)


def virtual(file: Any, name: str = "elsewhere.h5") -> None:
    layout = h5py.VirtualLayout((10,), "f4", maxshape=(None,))
    layout[:] = h5py.VirtualSource(name, "data", (10,), maxshape=(None,))
    file.create_virtual_dataset("v", layout)


def nested(file: Any) -> None:
    for _ in range(MOST_LEVELS + 2):
        file = file.create_group("g")


def like_keras(file: Any) -> None:
    file.attrs["layer_names"] = ["conv", "norm"]
    file.attrs["model_config"] = "{}"
    for name in ("conv/conv/kernel:0", "norm/norm/gamma:0"):
        file[name] = numbers()
    file["layers/conv/vars/0"] = numbers()
    file["layers/norm/seed"] = np.array([1, 2], np.uint32)
    file["layers/norm/on"] = True
    file["scalar"] = np.float64(1)
    file["nothing"] = h5py.Empty("f4")
    file["zeros"] = np.zeros(10_000)
    file["type"] = np.dtype("f4")


def in_circles(file: Any) -> None:
    group = file.create_group("group")
    group["up"] = file["/"]
    group["itself"] = group
    file["soft"] = h5py.SoftLink("/soft")
    file["gone"] = h5py.SoftLink("/nowhere")
    file["there"] = h5py.SoftLink("/group/itself/up/data")
    file["data"] = numbers()


def compressed(file: Any) -> None:
    file.create_dataset("w", data=numbers(), compression="gzip", shuffle=True, fletcher32=True)
    file.create_dataset("v", data=numbers(), compression="lzf", chunks=(100,))


@pytest.mark.parametrize("version", ["earliest", "latest"])
@pytest.mark.parametrize("fill", [like_keras, in_circles, compressed])
def test_weights_are_let_through(fill: Fill, version: str, tmp_path: Path) -> None:
    check_hdf5(made(tmp_path, fill, libver=version))


def test_weights_weights_are_let_through(shared_data: Path) -> None:
    files = list((shared_data / "keras_home" / "models").glob("*.h5"))
    for path in files:
        check_hdf5(path)


@pytest.mark.parametrize("version", ["earliest", "latest"])
@pytest.mark.parametrize(
    ("fill", "said"),
    [
        (lambda file: file.update(e=h5py.ExternalLink("elsewhere.h5", "/data")), "its link 'e' points to another file"),
        (lambda file: file.update({"a/b/e": h5py.ExternalLink("x.h5", "/")}), "its link 'e' points to another file"),
        (lambda file: file.create_dataset("w", (10,), "f4", external=[("x", 0, 40)]), "'/w' is in another file"),
        (virtual, "'/v' is in another file"),
        (lambda file: file.create_dataset("w", (10**12,), "f4"), "more than 16 times"),
        (lambda file: file.create_dataset("w", (1 << 62, 4), "f4", chunks=(1, 4)), "more than 16 times"),
        (lambda file: file.create_dataset("w", (10**9,), "f4", compression="gzip"), "more than 16 times"),
        (lambda file: file.create_dataset("w", data=np.zeros(10**7, "f4"), compression="gzip"), "16 times"),
        (lambda file: [file.create_dataset(f"{n}", (300_000,), "u1") for n in range(9)], "16 times"),
        (lambda file: file.create_dataset("w", (0,), "f4", maxshape=(None,), chunks=(1 << 29,)), "16 times"),
        (lambda file: file.create_dataset("w", data=np.arange(99), scaleoffset=0), "'/w' uses filter 6"),
        (lambda file: file.update(w="text"), "its dataset '/w' is not numeric"),
        (lambda file: file.update(w=np.zeros(2, [("a", "f4")])), "its dataset '/w' is not numeric"),
        (lambda file: file.create_dataset("w", data=file.ref, dtype=h5py.ref_dtype), "is not numeric"),
        (nested, "levels of groups"),
    ],
    ids=range(15),
)
def test_what_is_not_only_weights_is_refused(fill: Fill, said: str, version: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=re.escape(said)) as caught:
        check_hdf5(made(tmp_path, fill, libver=version))
    assert str(caught.value).startswith("weights.h5 cannot be read as weights in HDF5: ")
    assert str(caught.value).endswith("download them again.")


@pytest.mark.timeout(20)  # opening a pipe waits for its other end
@pytest.mark.skipif(os.name != "posix", reason="pipes are files on POSIX")
@pytest.mark.parametrize("way", ["link", "storage", "virtual", "path"])
def test_nothing_is_opened_beside_the_file(way: str, tmp_path: Path) -> None:
    pipe = str(tmp_path / "pipe")
    ways: dict[str, Fill] = {
        "link": lambda file: file.update(e=h5py.ExternalLink(pipe, "/")),
        "storage": lambda file: file.create_dataset("w", (10,), "f4", external=[(pipe, 0, 40)]),
        "virtual": lambda file: virtual(file, pipe),
        "path": lambda file: file.update({"z/e": h5py.ExternalLink(pipe, "/"), "a": h5py.SoftLink("/z"), "aQe": [1]}),
    }
    path = made(tmp_path, ways[way])
    path.write_bytes(path.read_bytes().replace(b"aQe", b"a/e"))
    os.mkfifo(pipe)
    with pytest.raises(WeightsError, match=r"another file|is a path"):
        check_hdf5(path)


@pytest.mark.parametrize("name", [b"a/b", b"./b", b"a/"])
def test_names_that_are_paths_are_refused(name: bytes, tmp_path: Path) -> None:
    """HDF5 would follow them, through links that were not looked at."""
    path = made(tmp_path, lambda file: file.create_group("Q" * len(name)))
    data = path.read_bytes()
    assert data.count(b"Q" * len(name)) == 1
    path.write_bytes(data.replace(b"Q" * len(name), name))
    with pytest.raises(WeightsError, match=r"the name of its link .* is a path"):
        check_hdf5(path)


def test_links_of_unknown_kinds_are_refused(tmp_path: Path) -> None:
    path = made(tmp_path, lambda file: file.update(e=h5py.ExternalLink("x.h5", "/")))
    data = path.read_bytes()
    assert data.count(b"\1\x08\x40") == 1  # version, flags, kind
    path.write_bytes(data.replace(b"\1\x08\x40", b"\1\x08\x46"))
    with pytest.raises(WeightsError, match="points to another file"):
        check_hdf5(path)


def test_what_is_no_hdf5_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.h5"
    path.write_text("<!DOCTYPE html>", encoding="ascii")
    for bad in (path, tmp_path, tmp_path / "missing.h5", tmp_path / "a\0b.h5"):
        with pytest.raises(WeightsError, match=r"Check the path"):
            check_hdf5(bad)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = made(tmp_path, like_keras)
    data = path.read_bytes()
    for percent in range(100):
        path.write_bytes(data[: len(data) * percent // 100])
        with pytest.raises(WeightsError):
            check_hdf5(path)
