"""A folder of images → a frame of path and label."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nbfeat.errors import RequestError
from nbfeat.images.decode import SUFFIXES

if TYPE_CHECKING:
    import pandas as pd


def folder(path: str | Path, *, labels: bool = True) -> pd.DataFrame:
    """List the images under a folder as a frame of path and label, one row for each, ready for `extract`.

    The label is the name of the first folder under `path` that an image is in, however deep it lies; of an image that
    lies in `path` itself it is missing. Paths are absolute, so that they hold wherever the notebook goes on. Files are
    taken by the suffixes of the formats that are read, hidden ones left out, in the order in which people count
    (``2.jpg`` before ``10.jpg``). Linked files are taken; linked folders are not entered. Raises RequestError where
    there is no such folder, or no image in it.

    Parameters
    ----------
    path
        The folder; ``~`` is expanded.
    labels
        False for a frame of paths alone.

    Examples
    --------
    >>> photos = nbfeat.folder("photos")  # doctest: +SKIP
    >>> photos["label"].value_counts()  # doctest: +SKIP
    """
    import pandas as pd

    top = Path(path).expanduser().absolute()
    if not top.is_dir():
        what = "is a file, not a folder" if top.exists() else "is no folder on this machine"
        raise RequestError(f"{top} {what}. Name the folder that holds the images.")
    files = sorted((file.relative_to(top).parts for file in _images(top)), key=_counted)
    if not files:
        raise RequestError(
            f"{top} holds no image that can be read: files are taken by suffix, such as .jpg, .png or .webp."
        )
    table: dict[str, list[str | None]] = {"path": [str(top.joinpath(*parts)) for parts in files]}
    if labels:
        table["label"] = [parts[0] if len(parts) > 1 else None for parts in files]
    try:
        return pd.DataFrame(table)
    except UnicodeEncodeError:  # a name of bytes that are no text: pandas' own strings cannot hold it
        return pd.DataFrame(table, dtype=object)


def _images(top: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(top, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(place, name)


def _refuse(error: OSError) -> None:
    """Say which folder cannot be listed: its images would be lost without a word."""
    raise RequestError(
        f"{error.filename} cannot be listed: {error.strerror or error}. Make it readable, or move it away."
    ) from error


def _counted(parts: tuple[str, ...]) -> list[tuple[list[tuple[int, int, str]], str]]:
    """Return what sorts the parts of a path as people count; equal ones by their letters."""
    key = lambda piece: (0, int(piece), "") if piece.isdigit() else (1, 0, piece.casefold())
    return [(list(map(key, re.split(r"([0-9]+)", part))), part) for part in parts]
