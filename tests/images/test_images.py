"""A cell of the image column → RGB pixels, or the reason why not; and which column that is."""

from __future__ import annotations

import importlib.util
import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps

from nbfeat.errors import ImageError, RequestError
from nbfeat.images import decode, resize, sources
from nbfeat.images.public_hosts import NOT_ALLOWED
from nbfeat.images.resize import INTERPOLATIONS, RESIZES, PixelSpec, reduction
from nbfeat.images.sources import image_column, name_of, read_pixels

HERE = Path()
WHOLE = 24  # an image of this size is given back as it is
FILTERS: dict[str, Image.Resampling] = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}


def photo(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Make a smooth picture, different in every corner."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def one_of_each() -> list[Any]:
    """Return the same picture in every way that it can be given."""
    return [encoded(photo()), encoded(photo(), "JPEG"), photo(), np.asarray(photo())]


def read(value: object, spec: PixelSpec | None = None, root: Path = HERE) -> npt.NDArray[np.uint8]:
    spec = spec or PixelSpec(WHOLE)
    (pixels,) = read_pixels(value, [spec], root)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.shape == (spec.size, spec.size, 3)
    return pixels


def as_pillow(image: Image.Image, size: int, how: str = "bilinear") -> npt.NDArray[np.uint8]:
    """Return what Pillow alone makes of an image."""
    return np.asarray(image.convert("RGB").resize((size, size), FILTERS[how]))


def reason(value: object, root: Path = HERE) -> str:
    text = pixels_or_sentence(value, root)
    assert isinstance(text, str)
    return text


def pixels_or_sentence(value: object, root: Path) -> npt.NDArray[np.uint8] | str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(value, root=root)
        except ImageError as error:
            text = str(error)
    assert 0 < len(text) <= 200
    assert "\n" not in text
    assert text[0] == text[0].lower()
    assert " at 0x" not in text
    text.encode()
    return text


class RemotePath(os.PathLike[str]):
    """A path object of the kind that fsspec's friends have."""

    def __fspath__(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        return "s3://bucket/a.jpg"


# What is read


def test_every_kind_of_value_gives_the_same_pixels(tmp_path: Path) -> None:
    image = photo()
    data = encoded(image)
    path = tmp_path / "a folder" / "Grüße 100% #1?.png"
    path.parent.mkdir()
    path.write_bytes(data)
    relative = str(path.relative_to(tmp_path))
    array = np.asarray(image)
    values: list[object] = [
        data, bytearray(data), memoryview(data), memoryview(data + data)[: len(data)], np.bytes_(data + b"."),
        image, array, array[:, :, ::-1][:, :, ::-1], np.asfortranarray(array),
        path, str(path), np.str_(path), relative, Path(relative), path.as_uri(),
        path.as_uri().replace("file:///", "file://localhost/"), path.as_uri().replace("file:///", "FILE:/"),
        {"bytes": data, "path": None}, {"bytes": data, "path": "somewhere else.png"},
        {"bytes": None, "path": relative}, {"bytes": float("nan"), "path": str(path)},
    ]  # fmt: skip
    for value in values:
        np.testing.assert_array_equal(read(value, root=tmp_path), as_pillow(image, WHOLE), err_msg=repr(value)[:80])


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    photo().save(tmp_path / "a.png")
    np.testing.assert_array_equal(read("~/a.png", root=Path("/nowhere")), read(photo()))
    photo().save(tmp_path / "~nobody-is-called-so.png")
    np.testing.assert_array_equal(read("~nobody-is-called-so.png", root=tmp_path), read(photo()))


REMOTE = ("http://a.org/a.jpg", "HTTPS://a.org/a.jpg?x=1", "s3://b/a.jpg", "gs://b/a", "zip://a::b.zip", RemotePath())
SHAPES = {(): "()", (3, 5, 6): "3×5×6", (5, 6, 2): "5×6×2", (0, 6, 3): "0×6×3", (1, 5, 6, 3): "1×5×6×3"}
MISSING: tuple[object, ...] = (None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, "", "  ", {}, {"path": None})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((value, "the value is missing") for value in MISSING),
        *((address, NOT_ALLOWED) for address in REMOTE),
        ("hdfs://node/a", "hdfs: URLs aren't supported, only http, https, s3, gs and zip: download the file first"),
        ("file://server/share/a.jpg", "remote URLs aren't supported here: download the file first"),
        ("data:image/png;base64,iVBORw0KGgo=", "data: URLs aren't supported: decode it to bytes first"),
        (b"", "the value has no bytes"),
        (7, "a value of type int, not a path, bytes, a PIL image or a uint8 array"),
        ([1, 2], "a value of type list, not a path, bytes, a PIL image or a uint8 array"),
        (Image.new("RGB", (0, 5)), "the image has no pixels"),
        (np.zeros(5, np.uint8), "an array of shape 5, not height × width with 0, 1, 3 or 4 channels last"),
        *((np.zeros(shape, np.uint8), f"an array of shape {text}, not") for shape, text in SHAPES.items()),
        (np.zeros((5, 6, 3), np.float32), "an array of float32 has no defined range: convert it to uint8 or uint16"),
        *((np.zeros((5, 6), kind), f"an array of {kind} has no") for kind in ("int32", "uint32", "int8", "object")),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000)), "too many pixels (20,000 × 20,000)"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_values_that_are_not_read(value: object, expected: str) -> None:
    assert reason(value).startswith(expected)


# Files


def test_files_that_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "video.jpg").open("wb") as file:
        file.truncate(3 << 30)  # sparse
    assert reason("gone.jpg", tmp_path) == f"no such file: {tmp_path}/gone.jpg"
    assert reason("empty.jpg/a.jpg", tmp_path) == f"no such file: {tmp_path}/empty.jpg/a.jpg"
    assert reason(".", tmp_path) == f"a folder, not a file: {tmp_path}"
    assert reason("empty.jpg", tmp_path) == f"the file is empty: {tmp_path}/empty.jpg"
    assert reason("loop.jpg", tmp_path).startswith("too many levels of symbolic links: ")
    assert reason("pipe.jpg", tmp_path) == f"a pipe, socket or device, not a file: {tmp_path}/pipe.jpg"
    assert reason("/dev/zero").startswith("a pipe, socket or device")
    assert reason("video.jpg", tmp_path).startswith("too large for an image (3,221,225,472 bytes): ")
    assert reason("a\0b.jpg", tmp_path).startswith("the path contains a character that file names can't have: ")
    assert reason("a\ud800b.jpg", tmp_path).startswith("the path contains a character that file names can't have: ")
    assert reason("n" * 5_000, tmp_path).startswith("file name too long: ")
    assert len(reason("folder/" * 300 + "a.jpg", tmp_path)) == 200


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.jpg").write_bytes(b"x")
    if os.name == "posix" and os.geteuid():  # root may read every file
        (tmp_path / "a.jpg").chmod(0)
        assert reason("a.jpg", tmp_path) == f"permission denied: {tmp_path}/a.jpg"
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert reason("a.jpg", tmp_path) == f"permission denied: {tmp_path}/a.jpg"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"just some text", "text, not an image"),
        (b"x" * 5_000, "text, not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript file"),
        (b"%PDF-1.7\n", "a PDF file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page, not an image"),
        (b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg width="5">', "an SVG drawing"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "a HEIC photograph: convert it to JPEG"),
        (b"\0\0\0\x18ftypmp42" + bytes(40), "a video, not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a Git LFS pointer"),
        (b"\xff\x0a" + bytes(40), "a JPEG XL file"),
        (bytes(range(150, 250)), "not an image, or in an unsupported format"),
        (b"\xd7\xcd\xc6\x9a" + bytes(40), "not an image, or in an unsupported format"),  # WMF
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "damaged"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "damaged"),
        (b"\xff\xd8", "not an image"),
        (b"GIF89a", "damaged: it starts like GIF, but its header can't be read"),
        (b"RIFF\0\0\0\0WEBPVP8 " + bytes(40), "damaged"),
    ],
)
def test_data_that_is_no_image(data: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    assert reason("a.jpg", tmp_path).startswith(expected)
    assert reason(data).startswith(expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM", "TGA"])
def test_a_truncated_file_is_a_failure(kind: str) -> None:
    data = encoded(photo(100, 75), kind)
    for share in (0.3, 0.6, 0.9):
        assert reason(data[: int(len(data) * share)]).startswith(("damaged", "not an image"))


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    jpeg = bytearray(encoded(photo(), "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 65_500, 65_500)
    started = time.perf_counter()
    assert reason(png_header(60_000, 60_000)) == "too many pixels (3,600,000,000)"
    assert reason(bytes(jpeg)) == "too many pixels (65,500 × 65,500)"
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(("width", "height"), [(100_001, 1), (1, 100_001)])
def test_a_side_that_is_too_long(width: int, height: int) -> None:
    expected = f"a side of more than 100,000 pixels ({width:,} × {height:,})"
    assert reason(f"P6 {width} {height} 255\n".encode() + bytes(3 * width * height)) == expected
    assert reason(np.zeros((height, width), np.uint8)) == expected


def test_the_limit_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert reason(png_header(60_000, 60_000)) == "too many pixels (60,000 × 60,000)"
    monkeypatch.setattr(decode, "MOST_PIXELS", 60 * 40 - 1)
    for value in one_of_each():
        assert reason(value) == "too many pixels (60 × 40)"
    monkeypatch.setattr(decode, "MOST_PIXELS", 60 * 40)
    read(encoded(photo()))


@pytest.mark.parametrize("error", [MemoryError(), RecursionError(), KeyError("x"), UserWarning("x"), struct.error()])
def test_whatever_a_library_raises_is_a_reason(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    values = one_of_each()
    monkeypatch.setattr(Image.Image, "resize", fail)
    expected = "not enough memory to decode it" if isinstance(error, MemoryError) else "damaged"
    for value in values:
        assert reason(value).startswith(expected)
    monkeypatch.setattr(sources, "load", fail)
    assert reason("a.jpg").startswith(expected)
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        read("a.jpg")


# Modes


def color_of(image: Image.Image | bytes | npt.NDArray[Any]) -> tuple[int, ...]:
    pixels = read(image)
    assert (pixels == pixels[0, 0]).all()
    return tuple(map(int, pixels[0, 0]))


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 255, (255, 255, 255)), ("L", 77, (77, 77, 77)), ("P", 0, (0, 0, 0)),
        ("RGB", (1, 2, 3), (1, 2, 3)), ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)), ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 100, 200, 51), (204, 224, 244)), ("RGBa", (0, 20, 40, 51), (204, 224, 244)),
        ("LA", (0, 51), (204, 204, 204)), ("La", (0, 51), (204, 204, 204)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)), ("YCbCr", (128, 128, 128), (128, 128, 128)),
        ("HSV", (0, 0, 200), (200, 200, 200)), ("LAB", (255, 128, 128), (255, 255, 255)),
        ("I;16", 257 * 9, (9, 9, 9)), ("I;16", 257 * 9 + 128, (9, 9, 9)), ("I;16", 257 * 9 + 129, (10, 10, 10)),
        ("I;16", 65_535, (255, 255, 255)), ("I;16L", 257 * 200, (200, 200, 200)), ("I;16B", 257 * 200, (200, 200, 200)),
    ],
)  # fmt: skip
def test_modes(mode: str, color: Any, expected: tuple[int, ...]) -> None:
    image = Image.new(mode, (WHOLE, WHOLE), color)
    assert color_of(image) == pytest.approx(expected, abs=1 if mode == "LAB" else 0)
    assert image.mode == mode


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range(mode: str) -> None:
    image = Image.new(mode, (5, 5), 3)
    expected = "32-bit and float images have no defined range: convert it to 8 or 16 bits"
    assert reason(image) == reason(encoded(image, "TIFF")) == expected


def test_transparency_told_beside_the_pixels() -> None:
    for mode, clear in (("L", 9), ("RGB", (9, 9, 9)), ("I;16", 9), ("1", 0)):
        color: Any = 0 if mode == "1" else clear
        data = encoded(Image.new(mode, (WHOLE, WHOLE), color), "PNG", transparency=clear)
        assert color_of(data) == (255, 255, 255), mode
    palette = Image.new("P", (WHOLE, WHOLE), 1)
    palette.putpalette([0, 0, 0, 100, 50, 0])
    assert color_of(encoded(palette)) == color_of(encoded(palette, transparency=0)) == (100, 50, 0)
    assert color_of(encoded(palette, transparency=1)) == (255, 255, 255)
    assert color_of(encoded(palette, transparency=bytes([255, 51]))) == (224, 214, 204)
    assert color_of(encoded(palette, "GIF", transparency=1)) == (255, 255, 255)


def test_sixteen_bits_of_files() -> None:
    for mode, kind in (("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF")):
        assert color_of(encoded(Image.new(mode, (WHOLE, WHOLE), 257 * 100), kind)) == (100, 100, 100)
    plain = f"P2 {WHOLE} {WHOLE} 1000\n" + "500 " * WHOLE**2
    assert color_of(plain.encode()) == (128, 128, 128)
    raw = f"P5 {WHOLE} {WHOLE} 65535\n".encode() + struct.pack(">H", 257 * 3) * WHOLE**2
    assert color_of(raw) == color_of(Image.open(io.BytesIO(raw))) == (3, 3, 3)


def test_arrays() -> None:
    shape = (WHOLE, WHOLE)
    for array in (
        np.full(shape, 5, np.uint8), np.full((*shape, 1), 5, np.uint8), np.full(shape, 257 * 5, np.uint16),
        np.full((*shape, 3), 257 * 5, ">u2"), np.ma.masked_array(np.full(shape, 5, np.uint8)),
    ):  # fmt: skip
        assert color_of(array) == (5, 5, 5)
    assert color_of(np.full((*shape, 4), (0, 0, 0, 51), np.uint8)) == (204, 204, 204)
    assert color_of(np.full(shape, 1, np.bool_)) == (255, 255, 255)
    strided = np.arange(4 * WHOLE * WHOLE * 3, dtype=np.uint8).reshape(2 * WHOLE, 2 * WHOLE, 3)[::2, ::-2]
    np.testing.assert_array_equal(read(strided), strided)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_of_several_pictures_the_first_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (WHOLE, WHOLE), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind in {"MPO", "AVIF"} else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert color_of(data) == pytest.approx((255, 0, 0), abs=6)


# Orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_that_of_exif_transpose(kind: str) -> None:
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(photo(), kind, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert expected.size == ((40, 60) if orientation in {5, 6, 7, 8} else (60, 40))
        for value in (data, Image.open(io.BytesIO(data))):
            np.testing.assert_array_equal(read(value, PixelSpec(32)), as_pillow(expected, 32))


def test_an_image_whose_orientation_cannot_be_asked_for_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SyntaxError

    values = one_of_each()
    expected = [read(value) for value in values]
    for place in ("PIL.Image.Image.getexif", "PIL.JpegImagePlugin.JpegImageFile"):
        monkeypatch.setattr(place, fail)
        for value, pixels in zip(values, expected, strict=True):
            np.testing.assert_array_equal(read(value), pixels)


def test_orientation_in_xmp_counts() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(photo(), "JPEG", xmp=xmp)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected.size == (40, 60)
    np.testing.assert_array_equal(read(data, PixelSpec(32)), as_pillow(expected, 32))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(30)])
def test_an_orientation_that_cannot_be_read_is_none(exif: bytes) -> None:
    plain = encoded(photo(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(read(plain[:2] + segment + plain[2:]), read(plain))


# Fitting


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(60, 40), (500, 375), (31, 97), (1, 1), (64, 64)])
def test_squash_is_what_load_img_calls(kind: str, size: tuple[int, int]) -> None:
    data = encoded(photo(*size), kind)
    image = Image.open(io.BytesIO(data))
    for how in INTERPOLATIONS:
        np.testing.assert_array_equal(read(data, PixelSpec(64, "squash", how)), as_pillow(image, 64, how))


LOAD_IMG = """
import sys
sys.modules["openvino_telemetry"] = None  # or it would send
import numpy, keras
folder, size, *how = sys.argv[1:]
for file in ("a.jpg", "grey.jpg", "cmyk.jpg", "palette.png"):
    for name in how:
        image = keras.utils.load_img(f"{folder}/{file}", target_size=(int(size), int(size)), interpolation=name)
        numpy.save(f"{folder}/{file}-{name}.npy", numpy.asarray(image))
"""


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("keras", "openvino"))), reason="needs keras and openvino")
def test_squash_is_what_keras_loads(tmp_path: Path) -> None:
    image = photo(500, 375)
    kinds = {"a.jpg": image, "grey.jpg": image.convert("L"), "cmyk.jpg": image.convert("CMYK"),
             "palette.png": image.quantize()}  # fmt: skip
    for file, kind in kinds.items():
        kind.save(tmp_path / file)
    command = [sys.executable, "-c", LOAD_IMG, str(tmp_path), "224", *INTERPOLATIONS]
    subprocess.run(command, env={**os.environ, "KERAS_BACKEND": "openvino"}, check=True, capture_output=True)
    for file in kinds:
        for how in INTERPOLATIONS:
            expected = np.load(tmp_path / f"{file}-{how}.npy")
            np.testing.assert_array_equal(read(tmp_path / file, PixelSpec(224, "squash", how)), expected)


@pytest.mark.parametrize("size", [(600, 400), (300, 500), (256, 256), (64, 32)])
def test_crop_is_resize_then_cut(size: tuple[int, int]) -> None:
    image, scale = photo(*size), 256 / min(size)
    for how in INTERPOLATIONS[0], *INTERPOLATIONS[2:]:
        whole = image.resize((round(size[0] * scale), round(size[1] * scale)), FILTERS[how])
        left, top = (whole.width - 224) / 2, (whole.height - 224) / 2
        expected = np.asarray(whole.crop((int(left), int(top), int(left) + 224, int(top) + 224))).astype(int)
        difference = np.abs(read(image, PixelSpec(224, "crop", how)) - expected)
        assert difference.mean() < 0.75  # the cut may lie half a pixel beside
    noise = np.random.default_rng(1).integers(0, 256, (256, 300, 3), np.uint8)  # where nothing is scaled, exactly so
    np.testing.assert_array_equal(read(noise, PixelSpec(224, "crop")), noise[16:240, 38:262])


def test_pad_is_black_around_the_whole() -> None:
    pixels = read(Image.new("RGB", (60, 30), "white"), PixelSpec(20, "pad"))
    assert (pixels[5:15] == 255).all()
    assert not pixels[:5].any()
    assert not pixels[15:].any()
    noise = np.random.default_rng(1).integers(0, 256, (20, 10, 3), np.uint8)
    np.testing.assert_array_equal(read(noise, PixelSpec(20, "pad"))[:, 5:15], noise)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (2, 100_000), (1, 1)])
def test_thin_images_stay_small(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (9, 8, 7))
    specs = [PixelSpec(224, how, interpolation) for how in RESIZES for interpolation in INTERPOLATIONS]
    started = time.perf_counter()
    for pixels in read_pixels(image, specs, HERE):
        assert list(pixels.max(axis=(0, 1))) == [9, 8, 7]
    assert time.perf_counter() - started < 5


# JPEG


@pytest.mark.parametrize(
    ("size", "spec", "factor"),
    [
        ((500, 375), PixelSpec(224), 1), ((4000, 3000), PixelSpec(224), 2), ((4000, 3000), PixelSpec(96), 4),
        ((8000, 7168), PixelSpec(224), 8), ((3584, 3584), PixelSpec(224), 4), ((3583, 9000), PixelSpec(224), 4),
        ((3580, 9000), PixelSpec(224), 2), ((1791, 9000), PixelSpec(224), 2), ((1790, 9000), PixelSpec(224), 1),
        ((3584, 3584), PixelSpec(224, "crop"), 2), ((4096, 4096), PixelSpec(224, "crop"), 4),
        ((3584, 3584), PixelSpec(224, "pad"), 4), ((60_000, 500), PixelSpec(224), 1),
        ((8000, 8000), PixelSpec(224, "squash", "nearest"), 1), ((8000, 8000), PixelSpec(224, "squash", "bicubic"), 1),
        ((8000, 8000), PixelSpec(224, "squash", "lanczos"), 1),
    ],
)  # fmt: skip
def test_reduction(size: tuple[int, int], spec: PixelSpec, factor: int) -> None:
    assert reduction(*size, spec) == reduction(size[1], size[0], spec) == factor


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(1003, 801), (640, 640)])
def test_a_reduced_jpeg_is_what_pillow_drafts(factor: int, size: tuple[int, int]) -> None:
    data = encoded(photo(*size), "JPEG", quality=95)
    target = min(size) // factor // 4
    assert reduction(*size, PixelSpec(target)) == factor
    drafted = Image.open(io.BytesIO(data))
    drafted.draft("RGB", (size[0] // factor, size[1] // factor))
    assert drafted.size == (-(-size[0] // factor), -(-size[1] // factor))
    expected = as_pillow(drafted, target)
    np.testing.assert_array_equal(read(data, PixelSpec(target)), expected)
    assert np.abs(as_pillow(photo(*size), target).astype(int) - expected).max() < 16


def test_a_spec_never_depends_on_those_beside_it() -> None:
    data = encoded(photo(1600, 1200), "JPEG")
    specs = [PixelSpec(size, resize) for size in (24, 64, 128, 224) for resize in RESIZES]
    specs += [PixelSpec(8, resize, how) for resize in RESIZES for how in INTERPOLATIONS[1:]]
    assert {reduction(1600, 1200, spec) for spec in specs} == {1, 2, 4, 8}
    for spec, pixels in zip(specs, read_pixels(data, specs, HERE), strict=True):
        np.testing.assert_array_equal(pixels, read(data, spec))
    assert read_pixels(photo(), [], HERE) == []


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"subsampling": "4:1:1"},
        {"keep_rgb": True}, {"restart_marker_blocks": 3}, {"icc_profile": b"x" * 200_000, "comment": b"hello"},
    ],
)  # fmt: skip
def test_kinds_of_jpeg(options: dict[str, Any]) -> None:
    for image in (photo(101, 77), photo(101, 77).convert("L"), photo(101, 77).convert("CMYK")):
        data = encoded(image, "JPEG", **({} if image.mode != "RGB" and "keep_rgb" in options else options))
        np.testing.assert_array_equal(read(data, PixelSpec(32)), as_pillow(Image.open(io.BytesIO(data)), 32))


def test_a_jpeg_that_only_pillow_reads() -> None:
    data = encoded(photo(1600, 1200), "JPEG")
    scan = data.index(b"\xff\xda")
    odd = data[:scan] + b"stray" + data[scan:]
    np.testing.assert_array_equal(read(odd, PixelSpec(64)), as_pillow(Image.open(io.BytesIO(odd)), 64))


# Other people's images, threads, globals


def test_the_callers_image_stays_as_it_is(tmp_path: Path) -> None:
    palette = Image.new("P", (WHOLE, WHOLE), 1)
    palette.putpalette([0, 0, 0, 100, 50, 0])
    palette.save(tmp_path / "a.png", transparency=bytes([255, 51]))
    with Image.open(tmp_path / "a.png") as image:
        before = image.copy()
        assert color_of(image) == color_of(image) == (224, 214, 204)
        assert (image.mode, image.size, image.info) == (before.mode, before.size, before.info)
        assert image.tobytes() == before.tobytes()
        assert image.getpalette("RGBA") == before.getpalette("RGBA")
        assert image.convert("RGBA").getpixel((0, 0)) == (100, 50, 0, 51)
    image = Image.open(tmp_path / "a.png")
    image.close()
    assert reason(image).startswith("damaged: ")
    animated = Image.open(io.BytesIO(encoded(photo(), "GIF", save_all=True, append_images=[photo(seed=1)])))
    animated.seek(1)
    second = read(animated)
    animated.seek(0)
    assert not np.array_equal(read(animated), second)
    array = np.asarray(photo()).copy()
    read(array)
    np.testing.assert_array_equal(array, np.asarray(photo()))


def test_threads_give_what_one_gives() -> None:
    kinds = ("JPEG", "PNG", "GIF", "WEBP", "TIFF")
    data = [encoded(photo(200, 150, seed), kind) for seed in range(2) for kind in kinds]
    specs = [PixelSpec(64), PixelSpec(48, "crop", "bicubic")]
    expected = [read_pixels(item, specs, HERE) for item in data]
    lent = [Image.open(io.BytesIO(item)) for item in data]  # not loaded, and each in several rows
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda value: read_pixels(value, specs, HERE), [*data, *lent] * 4))
    for position, pixels in enumerate(found):
        np.testing.assert_array_equal(pixels[0], expected[position % len(data)][0])
        np.testing.assert_array_equal(pixels[1], expected[position % len(data)][1])


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, fitted = 0, 0, resize.fitted

    def slow(image: Image.Image, spec: PixelSpec) -> npt.NDArray[np.uint8]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.01)
        running -= 1
        return fitted(image, spec)

    monkeypatch.setattr(resize, "fitted", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, one_of_each() * 2))
        assert most > 1
        most = 0
        monkeypatch.setattr(decode, "_ONE_AT_A_TIME", 100)
        list(pool.map(read, one_of_each() * 2))
        assert most == 1
    with pytest.raises(ImageError):
        read(encoded(photo())[:-200])
    assert decode._large.acquire(blocking=False)
    decode._large.release()


# Anything at all


ANYTHING = settings(deadline=None, max_examples=100)


SIGNS = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"P6 ", b"qoif", b"\n\5", b"8BPS", b"\0\0\1\0"]


@ANYTHING
@given(sign=st.sampled_from(SIGNS), data=st.binary(max_size=300))
def test_random_bytes(sign: bytes, data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "MOST_PIXELS", 4_000_000)
        pixels_or_sentence(sign + data, HERE)


@ANYTHING
@given(st.one_of(st.text(), st.none(), st.floats(), st.integers(), st.dates(), st.dictionaries(st.text(), st.text())))
def test_any_value(value: object) -> None:
    pixels_or_sentence(value, Path("/nowhere"))
    assert len(name_of(value)) <= 200


# The collection of odd images

NO_RANGE = {"pillow/10ct_32bit_128.tiff"}


def test_odd_images_are_what_pillow_makes_of_them(shared_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, compared = shared_data / "odd", 0
    rows = [line.split("\t") for line in (folder / "INDEX.tsv").read_text().splitlines()[1:]]
    assert len(rows) > 100
    for name, _, _, mode, *_, orientation, load, to_rgb, _ in rows:
        started = time.perf_counter()
        # Pillow's first load() failed there, and the second gave what there is of the image: a failure all the same.
        if load != "ok" or to_rgb != "ok" or orientation == "ERR OSError" or name in NO_RANGE:
            reason(name, folder)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = read(name, PixelSpec(299), folder)  # no JPEG among them is so large that it would be reduced
            assert time.perf_counter() - started < 5, name
            if mode in {"RGB", "L", "CMYK", "1"} and "trns" not in name:
                with Image.open(folder / name) as image:
                    image.load()
                    expected = as_pillow(ImageOps.exif_transpose(image), 299)
                np.testing.assert_array_equal(pixels, expected, err_msg=name)
                compared += 1
    assert compared > 50
    capfd.readouterr()  # libtiff writes to the terminal itself


def test_twelve_bits_of_a_tiff_are_stretched(shared_data: Path) -> None:
    file = shared_data / "odd/pillow/12bit.cropped.tif"
    values = np.asarray(Image.open(file)).astype(float)
    pixels = read(file, PixelSpec(100))
    np.testing.assert_array_equal(pixels, np.repeat(np.round(values[:, :, None] * 255 / 4_095), 3, axis=2))


# Names


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("photos/a.jpg", "photos/a.jpg"), (Path("photos/a.jpg"), "photos/a.jpg"), (RemotePath(), "s3://bucket/a.jpg"),
        (b"x" * 12_345, "<bytes, 12,345>"), (bytearray(7), "<bytes, 7>"), (memoryview(bytes(7)), "<bytes, 7>"),
        (np.zeros((32, 32, 3), np.uint8), "<array 32×32×3 uint8>"),
        (Image.new("RGB", (64, 48)), "<PIL image 64×48 RGB>"),
        (None, "None"), (float("nan"), "nan"), (pd.NA, "<NA>"), (3, "3"), ([1], "<list>"), ({}, "None"),
        ({"bytes": b"xyz", "path": "a.jpg"}, "a.jpg"), ({"bytes": b"xyz", "path": None}, "<bytes, 3>"),
        ("two\nlines  \0\udcff\u2028", "two\\nlines  \\x00\\udcff\\u2028"),
    ],
)  # fmt: skip
def test_name_of(value: object, expected: str) -> None:
    assert name_of(value) == expected


def test_name_of_long_paths_keeps_both_ends() -> None:
    name = name_of("start/" + "folder/" * 200 + "end.jpg")
    assert len(name) == 200
    assert (name[:6], name[-8:]) == ("start/", "/end.jpg")


# The image column

PATHS = [f"photos/{number}.jpg" for number in range(20)]


@pytest.mark.parametrize(
    "values",
    [
        PATHS, list(map(Path, PATHS)), pd.array(PATHS, "string"), pd.array(PATHS, "str"), pd.Categorical(PATHS),
        pd.array(PATHS, "string[pyarrow]"), [None, *PATHS[:18], "notes.txt"], [*[None] * 19, "a.jpg"],
        pd.array([*[None] * 19, "a.jpg"], "string"), ["file:///photos/1"] * 20, ["s3://bucket/a.webp"] * 20,
        ["https://example.org/a.JPG?size=1#x"] * 20, ["zip://a.jpg::b.zip"] * 20,
        [encoded(photo())] * 20, [bytearray(encoded(photo(), "JPEG"))] * 20, [photo()] * 20,
        [np.zeros((4, 4, 3), np.uint8)] * 20, [{"bytes": b"x", "path": None}] * 20,
    ],
)  # fmt: skip
def test_the_column_that_looks_like_images_is_found(values: Any) -> None:
    frame = pd.DataFrame({"number": range(20), "text": ["a.txt"] * 20, "pic": values, "x": 1.5})
    assert image_column(frame, None) == "pic"


@pytest.mark.parametrize(
    "values",
    [
        ["a.txt"] * 20, ["jpg"] * 20, ["hdfs://node/a.jpg"] * 20, PATHS[:17] + ["a.txt"] * 3, [None] * 20,
        [b"no image"] * 20, [np.zeros((4, 4, 3))] * 20, [np.zeros(4, np.uint8)] * 20, list(range(20)),
    ],
)  # fmt: skip
def test_other_columns_are_not_taken(values: Any) -> None:
    with pytest.raises(RequestError, match=r"No column looks like images: other \(.+\) and x \(1\)\. .*`images"):
        image_column(pd.DataFrame({"other": values, "x": 1}), None)


def test_values_spread_over_the_frame_decide() -> None:
    mixed = pd.DataFrame({"pic": ["a.jpg"] * 5_000 + ["a.txt"] * 5_000})
    with pytest.raises(RequestError, match="No column"):
        image_column(mixed, None)
    mostly = pd.DataFrame({"pic": ["a.jpg"] * 9_500 + ["a.txt"] * 500})
    assert image_column(mostly, None) == "pic"


def test_several_candidates_are_named_with_their_first_values() -> None:
    frame = pd.DataFrame({"path": [None, *PATHS], "mask": [b"\xff\xd8\xff"] * 21, "label": "cat"})
    with pytest.raises(RequestError) as caught:
        image_column(frame, None)
    assert str(caught.value) == (
        "2 columns look like images: path ('photos/0.jpg') and mask (<bytes, 3>). Name one with `images=COLUMN`."
    )


def test_many_columns_are_not_all_named() -> None:
    frame = pd.DataFrame(np.zeros((3, 2_000)))
    started = time.perf_counter()
    with pytest.raises(RequestError, match=r"9 \(0\.0\) and 1,990 more\."):
        image_column(frame, None)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("frame", [pd.DataFrame({"pic": []}), pd.DataFrame(index=range(3)), pd.DataFrame()])
def test_frames_with_nothing_to_go_by(frame: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match="images=COLUMN"):
        image_column(frame, None)


def test_the_column_asked_for() -> None:
    assert image_column(pd.DataFrame({0: [1, 2], 1: ["a.jpg", "b.jpg"]}), None) == 1
    frame = pd.DataFrame({"path": PATHS, "label": "cat", 3: "x", ("a", 1): 0})
    assert image_column(frame, "label") == "label"
    assert image_column(frame, 3) == 3
    assert image_column(frame, "3") == 3
    assert image_column(frame, "('a', 1)") == ("a", 1)
    assert image_column(frame.iloc[:0], "path") == "path"
    with pytest.raises(RequestError) as caught:
        image_column(frame, "Pth")
    expected = "The frame has no column Pth. Did you mean path? Columns that look like images: path ('photos/0.jpg')."
    assert str(caught.value) == expected
    with pytest.raises(RequestError, match=r"no column pic\. Its columns: label \('cat'\) and 3 \('x'\)\."):
        image_column(frame[["label", 3]], "pic")


def test_labels_that_would_not_do() -> None:
    twice = pd.DataFrame([["a.jpg", "b.jpg", 1]], columns=["pic", "pic", "x"])
    with pytest.raises(RequestError, match="2 columns are named pic: rename all but one"):
        image_column(twice, "pic")
    with pytest.raises(RequestError, match="2 columns look like images"):
        image_column(twice, None)
    one_of_two = pd.DataFrame([["a.jpg", "text", 1]], columns=["pic", "pic", "x"])
    with pytest.raises(RequestError, match="2 columns are named pic"):
        image_column(one_of_two, None)
