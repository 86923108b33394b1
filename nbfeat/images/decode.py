"""A path, bytes or array → RGB pixels of the sizes asked for, or the reason why not."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, JpegImagePlugin, TiffImagePlugin

from nbfeat.errors import ImageError
from nbfeat.images import resize
from nbfeat.images.formats import opened, reason
from nbfeat.images.resize import Pixels, PixelSpec
from nbfeat.images.sources import Fetch, Source, load

MOST_PIXELS = 178_956_970
# Older Pillows widen a thin image before they shorten it: 90 megabytes at this length and 224 pixels.
LONGEST_SIDE = 100_000
_ONE_AT_A_TIME = 40_000_000

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE = 258

_large = threading.RLock()
_lent = tuple(threading.Lock() for _ in range(61))


def read_pixels(value: object, specs: Sequence[PixelSpec], root: Path, fetch: Fetch | None = None) -> list[Pixels]:
    """Return the pixels of one image, an array (size, size, 3) of uint8 for each of `specs`.

    The file is read once, decoded once for each reduction that the specs call for, upright by its EXIF orientation,
    and transparent parts are laid over white. Threads may call this at once. Relative paths start at `root`; `fetch`
    gets what is at an address.

    Raises
    ------
    ImageError
        For anything wrong with this image; its message is a short sentence.

    Examples
    --------
    >>> grey = np.full((40, 60), 128, np.uint8)
    >>> [pixels.shape for pixels in read_pixels(grey, [PixelSpec(32), PixelSpec(48, "crop")], Path())]
    [(32, 32, 3), (48, 48, 3)]
    """
    source, _ = load_image(value, root, fetch)
    return pixels_of(source, specs)


def load_image(value: object, root: Path, fetch: Fetch | None = None) -> tuple[Source, bytes | None]:
    """Return what the cell `value` stands for (bytes, an array, or an upright RGB image), and the state of its file.

    Raises ImageError where there is nothing to decode; that may be otherwise at the next try.
    """
    with _explained():
        source, state = load(value, root, fetch)
        return _own(source) if isinstance(source, Image.Image) else source, state


def pixels_of(source: Source, specs: Sequence[PixelSpec]) -> list[Pixels]:
    """Return the pixels of a loaded image, an array (size, size, 3) of uint8 for each of `specs`.

    Raises ImageError for anything wrong with it; that depends on nothing but its content and the decoders, unless the
    reason is OUT_OF_MEMORY.
    """
    with _explained(source):
        if isinstance(source, bytes):
            return _from_bytes(source, specs)
        if isinstance(source, np.ndarray):
            with _image_of(source) as image:
                return _fitted_to_all(image, specs)
        with _turn(*source.size):
            return _fitted_to_all(source, specs)


def read_thumbnail(value: object, side: int, root: Path) -> Image.Image:
    """Return one image, read as for a network, in its own proportions, at most `side` pixels wide and high.

    Raises ImageError as `read_pixels` does.
    """
    source, _ = load_image(value, root)
    with _explained(source):
        if isinstance(source, Image.Image):
            with _turn(*source.size):
                return resize.within(source, side)
        if isinstance(source, np.ndarray):
            with _image_of(source) as image:
                return resize.within(image, side)
        size = _jpeg_size(source)
        if size is None:
            image = opened(source)
            with _turn(*image.size):
                return resize.within(_decoded(image), side)
        with _turn(*size):
            return resize.within(_decoded_jpeg(source, *size, resize.reduction(*size, PixelSpec(side))), side)


@contextlib.contextmanager
def _explained(source: object = b"") -> Iterator[None]:
    """Turn whatever the decoders raise over `source` into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # a broken file makes the decoders raise nearly every class there is
        raise ImageError(reason(error, source if isinstance(source, bytes) else b"")) from error


def _from_bytes(data: bytes, specs: Sequence[PixelSpec]) -> list[Pixels]:
    size = _jpeg_size(data)
    if size is None:
        image = opened(data)
        with _turn(*image.size):
            return _fitted_to_all(_decoded(image), specs)
    with _turn(*size):
        factors = [resize.reduction(*size, spec) for spec in specs]
        decoded = {factor: _decoded_jpeg(data, *size, factor) for factor in set(factors)}
        return [resize.fitted(decoded[factor], spec) for factor, spec in zip(factors, specs, strict=True)]


def _turn(width: int, height: int) -> contextlib.AbstractContextManager[object]:
    """Return the block to decode an image of this size in; raise ImageError where it has too many pixels, or none."""
    if not width * height:
        raise ImageError("the image has no pixels")
    if width * height > MOST_PIXELS:
        raise ImageError(f"too many pixels ({width:,} × {height:,})")
    if max(width, height) > LONGEST_SIDE:
        raise ImageError(f"a side of more than {LONGEST_SIDE:,} pixels ({width:,} × {height:,})")
    return _large if width * height > _ONE_AT_A_TIME else contextlib.nullcontext()


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height where simplejpeg gives Pillow's pixels to the bit, else None."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if space in {"YCbCr", "Gray", "RGB"} else None


def _decoded_jpeg(data: bytes, width: int, height: int, factor: int) -> Image.Image:
    shape = (resize.reduced(height, factor), resize.reduced(width, factor))
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=shape[0], min_width=shape[1])
    except ValueError:  # strict: what Pillow only warns of, such as stray bytes before a marker, is an error here
        pixels = None
    if pixels is None or pixels.shape[:2] != shape:
        return _decoded(opened(data))
    return _upright(Image.fromarray(pixels), _jpeg_orientation(data))


def _jpeg_orientation(data: bytes) -> object:
    # Opening takes 16 µs, less than looking for the letters "Exif" through a file that lacks them.
    try:
        return _orientation(JpegImagePlugin.JpegImageFile(io.BytesIO(data)))
    except Exception:  # the pixels are read; a tag that cannot be is as good as none
        return None


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:
        return None


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    turn = next((turn for number, turn in _UPRIGHT.items() if number == orientation), None)
    return image if turn is None else image.transpose(turn)


def _decoded(image: Image.Image) -> Image.Image:
    image.load()
    return _upright(_rgb(image), _orientation(image))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _eight_bit_grey(image)
    if image.mode in {"I", "F"}:
        raise ImageError("32-bit and float images have no defined range: convert them to 8 or 16 bits")
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    # convert("RGB") would clip 16 bits to 255, and Pillow does not stretch the 12 bits of a TIFF to 16.
    values = np.asarray(image)
    bits = image.tag_v2.get(_BITS_PER_SAMPLE) if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    grey = _scaled(values, 4_095 if bits == (12,) else 65_535)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _scaled(values: npt.NDArray[np.generic], top: int) -> Pixels:
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow knows no other way out of it
        image = image.convert("LA")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _own(image: Image.Image) -> Image.Image:
    """Make an upright RGB image of one of the caller's, which may stand in several rows and is not changed."""
    with _turn(*image.size), _lent[id(image) % len(_lent)]:  # of two threads that load one image at once, both fail
        image.load()
        # Converting a palette with transparency writes into the palette.
        own = image.copy() if image.mode in {"P", "PA"} else image
        return _upright(_rgb(own), _orientation(image))


@contextlib.contextmanager
def _image_of(array: npt.NDArray[np.generic]) -> Iterator[Image.Image]:
    """Return the block to use the RGB image of an array in."""
    if array.ndim not in {2, 3} or array.size == 0 or array.shape[2:] not in {(), (1,), (3,), (4,)}:
        shape = "×".join(map(str, array.shape))
        raise ImageError(
            f"an array of shape {shape or '()'}: only height × width, or with 1, 3 or 4 channels last, is read"
        )
    height, width = array.shape[:2]
    with _turn(width, height):
        pixels = np.ascontiguousarray(_eight_bits(array))
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)
        yield _rgb(image)


def _eight_bits(array: npt.NDArray[np.generic]) -> Pixels:
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return _scaled(array, 65_535)
    if array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} has no defined range: convert it to uint8 or uint16")
    return np.asarray(array, np.uint8)


def _fitted_to_all(image: Image.Image, specs: Sequence[PixelSpec]) -> list[Pixels]:
    return [resize.fitted(image, spec) for spec in specs]
