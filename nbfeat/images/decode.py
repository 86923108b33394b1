"""Bytes, an array or a PIL image → RGB pixels, or the reason why an image fails.

Every failure passes through `explained`; answers of servers are described in `remote`.
"""

import contextlib
import errno
import importlib
import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError, features

from nbfeat.errors import ImageError, printable
from nbfeat.images import resize
from nbfeat.images.resize import Pixels, PixelSpec

Source: TypeAlias = bytes | npt.NDArray[np.generic] | Image.Image

MOST_PIXELS = 178_956_970
LONGEST_SIDE = 100_000  # older Pillows widen a thin image before shortening it: 90 MB at this length and 224 pixels
_ONE_AT_A_TIME = 40_000_000
LONGEST_TEXT = 200
OUT_OF_MEMORY = "not enough memory to decode it"  # the only reason that isn't about the image
DECODING = 1  # increased whenever this module accepts other images

# Format, Pillow's module, suffixes, signature. Never EPS or WMF, which run other programs. The JPEG reader opens MPO.
_FORMATS = (
    ("JPEG", "Jpeg", ".jpg .jpeg .jpe .jfif .mpo", rb"\xff\xd8\xff"),
    ("PNG", "Png", ".png .apng", rb"\x89PNG\r\n\x1a\n"),
    ("WebP", "WebP", ".webp", rb"RIFF.{4}WEBP"),
    ("GIF", "Gif", ".gif", rb"GIF8[79]a"),
    ("BMP", "Bmp", ".bmp .dib", rb"BM"),
    ("TIFF", "Tiff", ".tif .tiff", rb"II[*+]\x00|MM\x00[*+]"),
    ("JPEG 2000", "Jpeg2K", ".jp2 .j2k .j2c .jpc .jpf .jpx", rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    ("AVIF", "Avif", ".avif .avifs", rb".{4}ftypavi[fs]"),
    ("PPM", "Ppm", ".ppm .pgm .pbm .pnm", rb"P[1-6]\s"),
    ("ICO", "Ico", ".ico", rb"\x00\x00\x01\x00"),
    ("PCX", "Pcx", ".pcx", rb"\n[\x00\x02\x03\x05]"),
    ("PSD", "Psd", ".psd", rb"8BPS"),
    ("QOI", "Qoi", ".qoi", rb"qoif"),
    ("TGA", "Tga", ".tga .icb .vda .vst", rb"(?!)"),  # last: it has no signature, so any data could be TGA
)
# Otherwise Pillow would import all its formats at the first image, in some thread.
for _module in (*(module for _, module, _, _ in _FORMATS), "Mpo"):
    importlib.import_module(f"PIL.{_module}ImagePlugin")

NAMES = tuple(name.replace(" ", "").upper() for name, *_ in _FORMATS)  # as in Pillow
SUFFIXES = frozenset(suffix for _, _, suffixes, _ in _FORMATS for suffix in suffixes.split())
_SIGNS = {sign: name for name, _, _, sign in _FORMATS}
_FOREIGN = {
    rb"%!PS|\xc5\xd0\xd3\xc6": "a PostScript file: convert it to PNG",
    rb"%PDF": "a PDF file: convert it to PNG",
    rb".{4}ftyp(hei|hev|mif1|msf1)": "a HEIC photograph: convert it to JPEG",
    rb".{4}ftyp": "a video, not an image",
    rb"\xff\x0a|\x00\x00\x00\x0cJXL ": "a JPEG XL file: convert it to JPEG",
    rb"version https://git-lfs": "a Git LFS pointer instead of the image: run `git lfs pull`",
    rb"(?i)\s*<(!doctype html|html)": "a web page, not an image",
    rb"(?i)\s*(<[?!][^>]*>\s*)*<svg": "an SVG drawing: convert it to PNG",
    rb"[\t\n\r -~]+\Z": "text, not an image",
}
_BITS_PER_SAMPLE, _ORIENTATION = 258, 0x0112
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_UPRIGHT: dict[object, Image.Transpose] = {at: Image.Transpose[name] for at, name in enumerate(_TURNS, start=2)}

_large = threading.RLock()
_lent = tuple(threading.Lock() for _ in range(61))


def pixels_of(source: Source, specs: Sequence[PixelSpec]) -> list[Pixels]:
    """Return the pixels (size, size, 3) of a loaded image for each of `specs`; thread-safe.

    An ImageError depends only on the content and the decoders, if it `is_permanent`.
    """
    with explained(source), _decoded(source, specs) as images:
        return [resize.fitted(image, spec) for image, spec in zip(images, specs, strict=True)]


def thumbnail_of(source: Source, side: int) -> Image.Image:
    """Return a loaded image with its proportions, at most `side` pixels wide and high; raise like `pixels_of`."""
    with explained(source), _decoded(source, [PixelSpec(side)]) as (image,):
        if (longest := max(image.size)) <= side:
            return image
        width, height = (max(1, round(length * side / longest)) for length in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)


def is_permanent(source: Source, reason: str) -> bool:
    """Tell whether `source` can never be decoded here; JPEG 2000's decoder calls images broken if memory is short."""
    return isinstance(source, bytes) and reason != OUT_OF_MEMORY and kind_of(source) != "JPEG 2000"


def codecs() -> str:
    """Return the versions of everything that decides which images can be decoded."""
    found = {name: features.version(name) for name in ("jpg", "jpg_2000", "zlib", "libtiff", "webp", "avif")}
    return ", ".join(f"{name} {version}" for name, version in {"decoding": DECODING, **found}.items())


def upright(image: Image.Image) -> Image.Image:
    """Return an upright RGB copy of the caller's image, which several rows may share."""
    with _turn(*image.size), _lent[id(image) % len(_lent)]:  # two threads that load one image at once would both fail
        return _upright_rgb(image)


@contextlib.contextmanager
def explained(source: object = b"") -> Iterator[None]:
    """Turn any error into an ImageError with one short sentence."""
    try:
        yield
    except ImageError as error:
        if len(text := str(error)) <= LONGEST_TEXT:
            raise
        raise ImageError(short(text)) from None
    except Exception as error:  # decoders raise nearly any class for a corrupt file
        raise_if_no_files_are_left(error)
        raise ImageError(_reason(error, source if isinstance(source, bytes) else b"")) from error


def raise_if_no_files_are_left(error: Exception) -> None:
    """Raise an error about the limit on open files, which says nothing about the image."""
    if getattr(error, "errno", None) in {errno.EMFILE, errno.ENFILE}:
        raise error


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return OUT_OF_MEMORY
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the data", str(error).partition("\n")[0])
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        found = re.search(r"(\d+) pixels", text)
        return f"too many pixels ({int(found[1]):,})" if found else "too many pixels"
    if isinstance(error, UnidentifiedImageError):
        if kind := kind_of(data):
            return f"damaged: it starts like {kind}, but its header can't be read"
        return kind_of(data, _FOREIGN) or "not an image, or in an unsupported format"
    if "truncated" in text.lower():
        return "damaged: the image file is truncated"
    return short(f"damaged: {text[:1].lower()}{text[1:]}" if text else f"damaged ({type(error).__name__})")


def file_reason(error: OSError | ValueError, kind: str = "file") -> str:
    """Say in a few words why a file can't be opened."""
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return f"no such {kind}"
        case PermissionError():
            return "permission denied"
        case OSError():
            return (error.strerror or type(error).__name__).lower()
    return "the path contains a character that file names can't have"  # such as NUL


def size_objection(size: int, most: int) -> str:
    """Say why a file of this size isn't read; "" if it is."""
    if not size:
        return "the file is empty"
    return f"too large for an image ({size:,} bytes)" if size > most else ""


def short(text: str, most: int = LONGEST_TEXT) -> str:
    """Return `text` on one printable line, with its middle left out if it is longer than `most`."""
    line = printable(text)
    head = most // 3
    return line if len(line) <= most else f"{line[:head]}…{line[head + 1 - most :]}"


def kind_of(data: bytes, signs: dict[bytes, str] = _SIGNS) -> str | None:
    """Return the image format of `data` by its signature, or None; TGA has no signature."""
    return next((name for sign, name in signs.items() if re.match(sign, data[:1024], re.DOTALL)), None)


@contextlib.contextmanager
def _decoded(source: Source, specs: Sequence[PixelSpec]) -> Iterator[list[Image.Image]]:
    """Yield the RGB image to fit to each of `specs`; JPEGs are reduced as far as they allow."""
    if isinstance(source, Image.Image):
        with _turn(*source.size):
            yield [source] * len(specs)
    elif isinstance(source, np.ndarray):
        with _turn(*_size_of(source)):
            yield [_image_of(source)] * len(specs)
    elif (size := _jpeg_size(source)) is None:
        image = Image.open(io.BytesIO(source), formats=NAMES)
        with _turn(*image.size):
            yield [_upright_rgb(image)] * len(specs)
    else:
        with _turn(*size):
            factors = [resize.reduction(*size, spec) for spec in specs]
            images = {factor: _read_jpeg(source, *size, factor) for factor in set(factors)}
            yield [images[factor] for factor in factors]


def _turn(width: int, height: int) -> contextlib.AbstractContextManager[object]:
    """Return a context to decode an image of this size in; raise ImageError if it has too many pixels or none."""
    if not width * height:
        raise ImageError("the image has no pixels")
    if width * height > MOST_PIXELS:
        raise ImageError(f"too many pixels ({width:,} × {height:,})")
    if max(width, height) > LONGEST_SIDE:
        raise ImageError(f"a side of more than {LONGEST_SIDE:,} pixels ({width:,} × {height:,})")
    return _large if width * height > _ONE_AT_A_TIME else contextlib.nullcontext()


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    # Converting a palette with transparency changes the palette, which may be the caller's.
    return _turned(_rgb(image.copy() if image.mode in {"P", "PA"} else image), lambda: image)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height if simplejpeg gives exactly Pillow's pixels, else None."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if space in {"YCbCr", "Gray", "RGB"} else None


def _read_jpeg(data: bytes, width: int, height: int, factor: int) -> Image.Image:
    shape = (resize.reduced(height, factor), resize.reduced(width, factor))
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=shape[0], min_width=shape[1])
    except ValueError:  # strict: here it is an error what Pillow only warns about, such as stray bytes before a marker
        pixels = None
    if pixels is None or pixels.shape[:2] != shape:
        return _upright_rgb(Image.open(io.BytesIO(data), formats=NAMES))
    # Opening takes 16 µs, less than searching a file without them for the letters "Exif".
    return _turned(Image.fromarray(pixels), lambda: JpegImagePlugin.JpegImageFile(io.BytesIO(data)))


def _turned(image: Image.Image, tagged: Callable[[], Image.Image]) -> Image.Image:
    try:
        turn = _UPRIGHT.get(tagged().getexif().get(_ORIENTATION))
    except Exception:  # the pixels are fine; ignore an unreadable tag
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _eight_bit_grey(image)
    if image.mode in {"I", "F"}:
        raise ImageError("32-bit and float images have no defined range: convert it to 8 or 16 bits")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":  # Pillow has no other conversion
        image = image.convert("LA")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    # convert("RGB") would clip 16 bits to 255, and Pillow doesn't scale the 12 bits of a TIFF to 16.
    values = np.asarray(image)
    bits = image.tag_v2.get(_BITS_PER_SAMPLE) if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    grey = _scaled(values, 4_095 if bits == (12,) else 65_535)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _scaled(values: npt.NDArray[np.generic], top: int) -> Pixels:
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


def _size_of(array: npt.NDArray[np.generic]) -> tuple[int, int]:
    if array.ndim not in {2, 3} or array.size == 0 or array.shape[2:] not in {(), (1,), (3,), (4,)}:
        shape = "×".join(map(str, array.shape)) or "()"
        raise ImageError(f"an array of shape {shape}, not height × width with 0, 1, 3 or 4 channels last")
    return array.shape[1], array.shape[0]


def _image_of(array: npt.NDArray[np.generic]) -> Image.Image:
    tops = {"b1": 1, "u1": 255, "u2": 65_535}  # by kind and bytes
    if (top := tops.get(array.dtype.str[1:])) is None:
        raise ImageError(f"an array of {array.dtype} has no defined range: convert it to uint8 or uint16")
    pixels = np.ascontiguousarray(array if top == 255 else _scaled(array, top), np.uint8)
    return _rgb(Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels))
