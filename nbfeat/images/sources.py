"""A cell of the image column → its image and pixels; and which column is the image column."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from PIL import Image

from nbfeat.errors import ImageError, RequestError, listing, near, sentences
from nbfeat.images import decode, fingerprint, public_hosts
from nbfeat.images.decode import Source, short
from nbfeat.images.public_hosts import redact_url, scheme_of
from nbfeat.images.resize import Pixels, PixelSpec

if TYPE_CHECKING:
    import pandas as pd

Fetch: TypeAlias = Callable[[str], bytes]  # URL → bytes; raises ImageError

MOST_BYTES = 2 << 30  # the largest image, 178,956,970 pixels, is 1 GB uncompressed at 16 bits and three channels
LONGEST = 10_000  # characters of a path


def read_pixels(value: object, specs: Sequence[PixelSpec], root: Path, fetch: Fetch | None = None) -> list[Pixels]:
    """Return the pixels of the image in the cell `value`, an array (size, size, 3) for each of `specs`.

    Relative paths start at `root`; `fetch` reads URLs. Raises ImageError with the reason.

    >>> grey = np.full((40, 60), 128, np.uint8)
    >>> [pixels.shape for pixels in read_pixels(grey, [PixelSpec(32), PixelSpec(48, "crop")], Path())]
    [(32, 32, 3), (48, 48, 3)]
    """
    return decode.pixels_of(load_image(value, root, fetch)[0], specs)


def read_thumbnail(value: object, side: int, root: Path) -> Image.Image:
    """Return an image with its proportions, at most `side` pixels wide and high."""
    return decode.thumbnail_of(load_image(value, root)[0], side)


def load_image(value: object, root: Path, fetch: Fetch | None = None) -> tuple[Source, bytes | None]:
    """Return the result of `load`, with PIL images upright and RGB; an ImageError may not be permanent."""
    with decode.explained():
        source, state = load(value, root, fetch)
        return decode.upright(source) if isinstance(source, Image.Image) else source, state


def load(value: object, root: Path, fetch: Fetch | None = None) -> tuple[Source, bytes | None]:
    """Return the image in the cell `value`, and the state of its file if that changes whenever the file does.

    Without `fetch`, URLs aren't read. Raises ImageError with the reason.
    """
    if fetch is not None and (address := address_of(value)) is not None:
        return fetch(address), None
    if (path := path_of(value, root)) is not None:
        return _read_file(path)
    value = held(value)
    if is_missing(value):
        raise ImageError("the value is missing")
    if isinstance(value, (bytes, bytearray, memoryview)):
        if data := bytes(value):
            return data, None
        raise ImageError("the value has no bytes")
    if isinstance(value, (Image.Image, np.ndarray)):
        return value, None
    raise ImageError(f"a value of type {type(value).__name__}, not a path, bytes, a PIL image or a uint8 array")


def path_of(value: object, root: Path) -> str | None:
    """Return the absolute path in the cell `value`, or None; raise ImageError for URLs."""
    value = held(value)
    if not isinstance(value, (str, os.PathLike)) or is_missing(value):
        return None
    text = _text_of(value)
    if ":" in text and (scheme := scheme_of(text)):
        text = _path_of_url(text, scheme)
    # Not pathlib: a frame of cached images spends most of its time here. "~name" of an unknown user stays unchanged.
    return os.path.join(root, os.path.expanduser(text) if text[:1] == "~" else text)


def address_of(value: object) -> str | None:
    """Return the URL in the cell `value`; None if it is anything else."""
    value = held(value)
    if isinstance(value, (str, os.PathLike)) and ":" in (text := _text_of(value)):
        return text.strip() if scheme_of(text) not in {"", "file", "data"} else None
    return None


def hosts(values: Iterable[object]) -> set[str]:
    """Return the hosts and buckets of the URLs among the cells `values`."""
    found = (address_of(value) for value in values)
    fetched = (redact_url(address) for address in found if address and scheme_of(address) in public_hosts.FETCHED)
    return {address.partition("://")[2].partition("/")[0].lower() for address in fetched} - {""}


def held(value: object) -> object:
    """Return the content of a mapping of bytes and path; anything else unchanged."""
    if isinstance(value, Mapping):
        return next((part for key in ("bytes", "path") if not is_missing(part := value.get(key))), None)
    return value


def is_missing(value: object) -> bool:
    """Return whether `value` is None, NaN, pandas' NA or NaT, or blank text, without importing pandas."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (float, np.floating)):
        return math.isnan(value)
    return value is None or type(value).__name__ in {"NAType", "NaTType"}


def _text_of(path: str | os.PathLike[Any]) -> str:
    try:
        return os.fsdecode(path)
    except Exception:  # objects for remote paths have no local path and raise different errors
        return str(path)


def _path_of_url(text: str, scheme: str) -> str:
    if scheme == "data":
        raise ImageError("data: URLs aren't supported: decode it to bytes first")
    if scheme != "file":
        public_hosts.check(text)
        raise ImageError(public_hosts.NOT_ALLOWED)
    rest = text.partition(":")[2]
    host, path = rest[2:].partition("/")[::2] if rest.startswith("//") else ("", rest)
    if host.lower() not in {"", "localhost"}:
        raise ImageError("remote URLs aren't supported here: download the file first")
    path = unquote(f"/{path}" if rest.startswith("//") else path, errors="surrogateescape")
    return path.lstrip("/") if os.name == "nt" else path


def _read_file(name: str) -> tuple[bytes, bytes | None]:
    path = Path(name)
    try:
        before = path.stat()
        if not stat.S_ISREG(before.st_mode):  # opening a pipe blocks forever, and opening a device can do anything
            kind = "a folder" if stat.S_ISDIR(before.st_mode) else "a pipe, socket or device"
            raise ImageError(f"{kind}, not a file: {path}")
        if objection := decode.size_objection(before.st_size, MOST_BYTES):
            raise ImageError(f"{objection}: {path}")
        data, after = path.read_bytes(), path.stat()
    except (OSError, ValueError) as error:
        decode.raise_if_no_files_are_left(error)
        raise ImageError(f"{decode.file_reason(error)}: {redact_url(name) if '://' in name else path}") from None
    if not data:
        raise ImageError(f"the file is empty: {path}")
    state = fingerprint.state(name, after)
    return data, state if state == fingerprint.state(name, before) and fingerprint.is_settled(after) else None


def state_of(value: object, root: Path, *, shared: bool = False) -> bytes | None:
    """Return the state of the file in the cell `value`, or what copies of it share; None if unknown."""
    try:
        if (path := path_of(value, root)) is None:
            return None
        status = os.stat(path)
        return b"%d %d" % (status.st_size, status.st_mtime_ns) if shared else fingerprint.state(path, status)
    except (ImageError, OSError, ValueError):
        return None


def digest_of(values: Iterable[object], root: Path) -> str:
    """Return a digest of cells of an image column: of absolute paths, or of the content of others."""
    hasher = hashlib.sha256()
    for value in values:
        try:
            if (text := path_of(value, root)) is None:
                source = held(value)
                content: Any = bytes(source) if isinstance(source, bytearray | memoryview) else source
                text = "" if is_missing(source) else fingerprint.digest(content).hex()
        except Exception:  # a URL that isn't read, or a broken image
            text = str(value)
        data = text[:LONGEST].encode(errors="surrogatepass")
        hasher.update(b"%d:%b" % (len(data), data))
    return hasher.hexdigest()


def name_of(value: object) -> str:
    """Return a short text for `value`, its path or kind; never raises.

    >>> name_of(b"..."), name_of(np.zeros((32, 32, 3), np.uint8)), name_of(None)
    ('<bytes, 3>', '<array 32×32×3 uint8>', 'None')
    """
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("bytes")
    if isinstance(value, (str, os.PathLike)):
        return short(redact_url(_text_of(value)))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<bytes, {memoryview(value).nbytes:,}>"
    if isinstance(value, np.ndarray):
        return f"<array {'×'.join(map(str, value.shape))} {value.dtype}>"
    if isinstance(value, Image.Image):
        return f"<PIL image {value.width}×{value.height} {value.mode}>"
    return short(str(value)) if is_missing(value) or isinstance(value, (int, float)) else f"<{type(value).__name__}>"


def spread(count: int, most: int) -> npt.NDArray[np.intp]:
    """Return up to `most` positions, evenly spaced over `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.intp))


def image_column(frame: pd.DataFrame, asked: Hashable | None) -> Hashable:
    """Return the label of the column `asked` for, or of the one column that looks like images.

    A column looks like images if 9 of 10 of 50 sampled values do. Raises RequestError, naming candidates, if unclear.
    """
    if asked is None:
        if len(likely := likely_columns(frame)) != 1:
            known = _described(frame, likely)
            if likely:
                raise RequestError(f"{len(likely)} columns look like images: {known}. Name one with `images=COLUMN`.")
            if len(frame):
                known = f"No column looks like images: {known or 'the frame has none'}."
                raise RequestError(f"{known} Name the right one with `images=COLUMN`.")
            raise RequestError("The frame has no rows, so its image column is unknown. Name it with `images=COLUMN`.")
        asked = frame.columns[likely[0]]
    labels = [label for label in frame.columns if not is_missing(label)]  # pandas' NA can't be compared
    same = [label for label in labels if label == asked] or [one for one in frame.columns if str(one) == str(asked)]
    if len(same) == 1:
        return same[0]
    if same:
        raise RequestError(f"{len(same)} columns are named {asked!s}: rename all but one.")
    likely, names = likely_columns(frame), [str(label) for label in frame.columns]
    known = f"{'Columns that look like images' if likely else 'Its columns'}: {_described(frame, likely) or 'none'}."
    raise RequestError(sentences(f"The frame has no column {asked!s}.", near(str(asked), names), known))


def likely_columns(frame: pd.DataFrame) -> list[int]:
    """Return the positions of the columns that look like images."""
    rows, found = spread(len(frame), 50), []
    for place in possible_columns(frame):
        values = [value for value in frame.iloc[rows, place].tolist() if not is_missing(value)]
        if values and sum(map(_looks_like_image, values)) >= 0.9 * len(values):
            found.append(place)
    return found


def possible_columns(frame: pd.DataFrame) -> list[int]:
    """Return the positions of the columns that can hold images: not numbers, booleans or times."""
    return [place for place, dtype in enumerate(frame.dtypes) if getattr(dtype, "kind", "O") not in "biufcmM"]


def _looks_like_image(value: object) -> bool:
    if isinstance(value, (str, os.PathLike)):
        text = _text_of(value)
        if (scheme := scheme_of(text)) == public_hosts.ARCHIVE:
            text = text.partition("::")[0]
        elif scheme in public_hosts.FETCHED:
            text = re.split(r"[?#]", text, maxsplit=1)[0]
        elif scheme:
            return scheme == "file"
        return os.path.splitext(text)[1].lower() in decode.SUFFIXES
    if isinstance(value, (bytes, bytearray, memoryview)):
        return decode.kind_of(bytes(value)) is not None
    if isinstance(value, np.ndarray):
        return value.dtype == np.uint8 and value.ndim in {2, 3}
    return isinstance(value, Image.Image) or (isinstance(value, Mapping) and bool({"bytes", "path"} & set(value)))


def _described(frame: pd.DataFrame, places: Sequence[int], most: int = 10) -> str:
    """List columns, or all if `places` is empty, each with its first value."""
    places, parts = places or range(frame.shape[1]), []
    for place in places[:most]:
        first = next(iter(frame.iloc[:, place].dropna().iloc[:1].tolist()), None)
        value = repr(redact_url(first)) if isinstance(first, str) else "missing" if first is None else name_of(first)
        parts.append(f"{frame.columns[place]!s} ({short(value, 60)})")
    more = len(places) - len(parts)
    return listing([*parts, f"{more:,} more"] if more else parts)
