"""A cell of the image column → bytes, an array or a PIL image, or the reason why not; and which column that is."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
from PIL import Image

from nbfeat.errors import ImageError, RequestError, listing, near, sentences
from nbfeat.images import fingerprint, public_hosts
from nbfeat.images.formats import SUFFIXES, kind_of, short
from nbfeat.images.public_hosts import redact_url, scheme_of

if TYPE_CHECKING:
    import pandas as pd

Source: TypeAlias = "bytes | npt.NDArray[np.generic] | Image.Image"
Fetch: TypeAlias = Callable[[str], bytes]  # an address → what is there; raises ImageError

# 178,956,970 pixels, the most that are decoded, are one gigabyte at 16 bits and three channels, uncompressed.
MOST_BYTES = 2 << 30


def load(value: object, root: Path, fetch: Fetch | None = None) -> tuple[Source, bytes | None]:
    """Return what the cell `value` stands for, files read whole; raise ImageError with the reason why not.

    With it comes the state of the file, where that is sure to change with the file (see `content`), else None.
    Without `fetch` nothing is read that an address names.
    """
    if fetch is not None and (address := address_of(value)) is not None:
        return fetch(address), None
    path = path_of(value, root)
    if path is not None:
        return _read_file(path)
    value = held(value)
    if is_missing(value):
        raise ImageError("the value is missing")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _not_empty(bytes(value), "the value holds no bytes"), None
    if isinstance(value, (Image.Image, np.ndarray)):
        return value, None
    raise ImageError(f"a value of type {type(value).__name__}: only paths, bytes, PIL images and uint8 arrays are read")


def path_of(value: object, root: Path) -> str | None:
    """Return the absolute path that the cell `value` stands for, None where it stands for something else.

    Raises ImageError for addresses, other than those of files.
    """
    value = held(value)
    if isinstance(value, (str, os.PathLike)) and not is_missing(value):
        return _local_path(_text_of(value), root)
    return None


def address_of(value: object) -> str | None:
    """Return the address that the cell `value` is, None where it is something else: a path, data, or no text."""
    value = held(value)
    if isinstance(value, (str, os.PathLike)) and ":" in (text := _text_of(value)):
        return text.strip() if scheme_of(text) not in {"", "file", "data"} else None
    return None


def hosts(values: Iterable[object]) -> set[str]:
    """Return the hosts and buckets that addresses among the cells `values` name."""
    found = (address_of(value) for value in values)
    fetched = (redact_url(address) for address in found if address and scheme_of(address) in public_hosts.FETCHED)
    return {address.partition("://")[2].partition("/")[0].lower() for address in fetched} - {""}


def held(value: object) -> object:
    """Return what a mapping of bytes and path holds; anything else as it is."""
    if isinstance(value, Mapping):
        return next((part for key in ("bytes", "path") if not is_missing(part := value.get(key))), None)
    return value


def is_missing(value: object) -> bool:
    """Tell whether `value` is None, NaN, pandas' NA or NaT, or blank text; without importing pandas."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (float, np.floating)):
        return math.isnan(value)
    return value is None or type(value).__name__ in {"NAType", "NaTType"}


def _text_of(path: str | os.PathLike[Any]) -> str:
    try:
        return os.fsdecode(path)
    except Exception:  # objects for remote paths have no local one, and say so each in their own way
        return str(path)


def _local_path(text: str, root: Path) -> str:
    if ":" in text and (scheme := scheme_of(text)):
        text = _path_of_url(text, scheme)
    # Not pathlib: a frame of cached images spends most of its time here. A "~somebody" who is no user stays as it is.
    return os.path.join(root, os.path.expanduser(text) if text[:1] == "~" else text)


def _path_of_url(text: str, scheme: str) -> str:
    if scheme == "data":
        raise ImageError("data: addresses are not read: decode them to bytes first")
    if scheme != "file":
        public_hosts.check(text)
        raise ImageError(public_hosts.NOT_ALLOWED)
    rest = text.partition(":")[2]
    host, path = rest[2:].partition("/")[::2] if rest.startswith("//") else ("", rest)
    if host.lower() not in {"", "localhost"}:
        raise ImageError("remote addresses are not read: download the file first")
    path = unquote(f"/{path}" if rest.startswith("//") else path, errors="surrogateescape")
    return path.lstrip("/") if os.name == "nt" else path


def _read_file(name: str) -> tuple[bytes, bytes | None]:
    path = Path(name)
    try:
        before = path.stat()
        _check_readable(before, path)
        data, after = _not_empty(path.read_bytes(), f"the file is empty: {path}"), path.stat()
        state = fingerprint.state(name, after)
        unchanged = state == fingerprint.state(name, before)
        return data, state if unchanged and fingerprint.is_settled(after) else None
    except (FileNotFoundError, NotADirectoryError):
        reason = "no such file"
    except PermissionError:
        reason = "permission denied"
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
    except ValueError:  # raised before the system is asked: a NUL, or a character that file names cannot hold
        reason = "the path holds a character that no file name can"
    raise ImageError(short(f"{reason}: {redact_url(name) if '://' in name else path}"))


def state_of(value: object, root: Path) -> bytes | None:
    """Return the state of the file that the cell `value` names, without opening it; None where that cannot be had."""
    try:
        path = path_of(value, root)
        return None if path is None else fingerprint.state(path, os.stat(path))
    except (ImageError, OSError, ValueError):
        return None


def _check_readable(status: os.stat_result, path: Path) -> None:
    # Opening a pipe waits for its other end for ever, and opening a device may do anything.
    if stat.S_ISDIR(status.st_mode):
        reason = f"a folder, not a file: {path}"
    elif not stat.S_ISREG(status.st_mode):
        reason = f"a pipe, socket or device, not a file: {path}"
    elif not status.st_size:
        reason = f"the file is empty: {path}"
    elif status.st_size > MOST_BYTES:
        reason = f"too large for an image ({status.st_size:,} bytes): {path}"
    else:
        return
    raise ImageError(short(reason))


def _not_empty(data: bytes, reason: str) -> bytes:
    if not data:
        raise ImageError(short(reason))
    return data


def name_of(value: object) -> str:
    """Return a short text for `value`: its path, or what it is; never raises.

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
    """Return up to `most` positions, evenly spread over `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.intp))


def image_column(frame: pd.DataFrame, asked: Hashable | None) -> Hashable:
    """Return the label of the column `asked` for, or of the one column that looks like images.

    A column looks like images where at least 9 of 10 do among 50 values spread over the frame, missing ones aside.

    Raises
    ------
    RequestError
        Where there is no such column, or none or several look like images; it names them with their first values.
    """
    if asked is not None:
        return _asked(frame, asked)
    likely = likely_columns(frame)
    if len(likely) == 1:
        return _asked(frame, frame.columns[likely[0]])
    redact_url = _described(frame, likely or list(range(frame.shape[1])))
    if likely:
        message = f"{len(likely)} columns look like images: {redact_url}. Name one with --images COLUMN."
    elif len(frame):
        message = (
            f"No column looks like images: {redact_url or 'there is none'}. Name the right one with --images COLUMN."
        )
    else:
        message = "The frame has no rows to tell the image column by. Name it with --images COLUMN."
    raise RequestError(message)


def likely_columns(frame: pd.DataFrame) -> list[int]:
    """Return the positions of the columns that look like images."""
    return [place for place in possible_columns(frame) if _look_like_images(_sample(frame, place))]


def possible_columns(frame: pd.DataFrame) -> list[int]:
    """Return the positions of the columns that can hold images: those that are no numbers, truths or times."""
    return [place for place, dtype in enumerate(frame.dtypes) if getattr(dtype, "kind", "O") not in "biufcmM"]


def _asked(frame: pd.DataFrame, asked: Hashable) -> Hashable:
    same = [label for label in frame.columns if label == asked]
    same = same or [label for label in frame.columns if str(label) == str(asked)]
    if len(same) == 1:
        return same[0]
    if same:
        raise RequestError(f"{len(same)} columns are called {asked!s}: rename all but one.")
    names = [str(label) for label in frame.columns]
    likely = likely_columns(frame)
    known = _described(frame, likely or list(range(len(names)))) or "none"
    which = "Columns that look like images" if likely else "Its columns"
    raise RequestError(sentences(f"The frame has no column {asked!s}.", near(str(asked), names), f"{which}: {known}."))


def _sample(frame: pd.DataFrame, place: int) -> list[object]:
    """Return up to 50 values of a column, evenly spread, missing ones left out unless all are."""
    rows = spread(len(frame), 50)
    values = frame.iloc[rows, place].tolist()
    return [value for value in values if not is_missing(value)]


def _look_like_images(values: list[object]) -> bool:
    return bool(values) and sum(map(_looks_like_image, values)) >= 0.9 * len(values)


def _looks_like_image(value: object) -> bool:
    if isinstance(value, (str, os.PathLike)):
        text = _text_of(value)
        scheme = scheme_of(text)
        return scheme == "file" or (
            scheme in {"", *public_hosts.PROTOCOLS} and public_hosts.suffix(text, scheme).lower() in SUFFIXES
        )
    if isinstance(value, (bytes, bytearray, memoryview)):
        return kind_of(bytes(value)) is not None
    if isinstance(value, np.ndarray):
        return value.dtype == np.uint8 and value.ndim in {2, 3}
    return isinstance(value, Image.Image) or (isinstance(value, Mapping) and bool({"bytes", "path"} & set(value)))


def _described(frame: pd.DataFrame, places: list[int], most: int = 10) -> str:
    """Name columns with the first value of each, as a sentence does."""
    parts = [f"{frame.columns[place]!s} ({_first_value(frame, place)})" for place in places[:most]]
    more = len(places) - len(parts)
    return listing([*parts, f"{more:,} more"] if more else parts)


def _first_value(frame: pd.DataFrame, place: int) -> str:
    values = frame.iloc[:, place]
    present = values[values.notna()].iloc[:1].tolist()
    if not present:
        return "missing"
    return short(repr(redact_url(present[0])) if isinstance(present[0], str) else name_of(present[0]), 60)
