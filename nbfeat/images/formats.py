"""The image formats that are read: their readers, suffixes and signs, and what is said of a file that is none."""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Iterable

from PIL import Image, UnidentifiedImageError

from nbfeat.errors import printable

# Pillow's name of the format, its module, suffixes. Never EPS or WMF, which run other programs. MPO is opened by the
# reader of JPEG. TGA, which has no sign and which any data might be, comes last.
_FORMATS = (
    ("JPEG", "Jpeg", ".jpg .jpeg .jpe .jfif .mpo"),
    ("PNG", "Png", ".png .apng"),
    ("WEBP", "WebP", ".webp"),
    ("GIF", "Gif", ".gif"),
    ("BMP", "Bmp", ".bmp .dib"),
    ("TIFF", "Tiff", ".tif .tiff"),
    ("JPEG2000", "Jpeg2K", ".jp2 .j2k .j2c .jpc .jpf .jpx"),
    ("AVIF", "Avif", ".avif .avifs"),
    ("PPM", "Ppm", ".ppm .pgm .pbm .pnm"),
    ("ICO", "Ico", ".ico"),
    ("PCX", "Pcx", ".pcx"),
    ("PSD", "Psd", ".psd"),
    ("QOI", "Qoi", ".qoi"),
    ("TGA", "Tga", ".tga .icb .vda .vst"),
)
# Pillow would import them at the first image, in whichever thread that is, and all its other formats too.
for _module in (*(module for _, module, _ in _FORMATS), "Mpo"):
    importlib.import_module(f"PIL.{_module}ImagePlugin")

NAMES = tuple(name for name, _, _ in _FORMATS)
SUFFIXES = frozenset(suffix for _, _, suffixes in _FORMATS for suffix in suffixes.split())
_SIGNS: tuple[tuple[bytes, str], ...] = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"GIF8[79]a", "GIF"),
    (rb"RIFF.{4}WEBP", "WebP"),
    (rb"BM", "BMP"),
    (rb"II[*+]\x00|MM\x00[*+]", "TIFF"),
    (rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG 2000"),
    (rb".{4}ftypavi[fs]", "AVIF"),
    (rb"P[1-6]\s", "PPM"),
    (rb"8BPS", "PSD"),
    (rb"qoif", "QOI"),
    (rb"\x00\x00\x01\x00", "ICO"),
    (rb"\n[\x00\x02\x03\x05]", "PCX"),
)
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file, which is not read: convert it to PNG"),
    (rb"%PDF", "a PDF file, which is not read: convert it to PNG"),
    (rb".{4}ftyp(hei|hev|mif1|msf1)", "a HEIC photograph, which is not read: convert it to JPEG"),
    (rb".{4}ftyp", "a video, not an image"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL file, which is not read: convert it to JPEG"),
    (rb"version https://git-lfs", "a Git LFS pointer instead of the image: run `git lfs pull`"),
    (rb"(?i)\s*<(!doctype html|html)", "a web page, not an image"),
    (rb"(?i)\s*(<[?!][^>]*>\s*)*<svg", "an SVG drawing, which is not read: convert it to PNG"),
    (rb"[\t\n\r -~]+\Z", "text, not an image"),
)
LONGEST_TEXT = 200
OUT_OF_MEMORY = "not enough memory to decode it"  # the one reason that is not of the image


def opened(data: bytes) -> Image.Image:
    """Open an encoded image with Pillow, reading its header only; raises whatever Pillow does."""
    return Image.open(io.BytesIO(data), formats=NAMES)


def kind_of(data: bytes) -> str | None:
    """Return the name of the image format that `data` begins as, or None; TGA has no sign to know it by."""
    return _first_match(_SIGNS, data)


def _first_match(table: Iterable[tuple[bytes, str]], data: bytes) -> str | None:
    head = data[:1024]
    return next((name for pattern, name in table if re.match(pattern, head, re.DOTALL)), None)


def reason(error: Exception, data: bytes) -> str:
    """Say in a short sentence what the `error` that a decoder raised over `data` means."""
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the data", str(error).partition("\n")[0])
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        found = re.search(r"(\d+) pixels", text)
        return f"too many pixels ({int(found[1]):,})" if found else "too many pixels"
    if isinstance(error, UnidentifiedImageError):
        if kind := kind_of(data):
            return f"damaged: it begins as {kind}, but its header cannot be read"
        return _first_match(_FOREIGN, data) or "not an image, or of a format that is not read"
    if "truncated" in text.lower():
        return "damaged: the image file is truncated"
    return short(f"damaged: {text[:1].lower()}{text[1:]}" if text else f"damaged ({type(error).__name__})")


def short(text: str, most: int = LONGEST_TEXT) -> str:
    """Return `text` on one line, printable everywhere, its middle left out where it is longer than `most`."""
    line = printable(text)
    head = most // 3
    return line if len(line) <= most else f"{line[:head]}…{line[head + 1 - most :]}"
