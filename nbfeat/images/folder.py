"""A folder of images → a frame with path and label."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nbfeat.errors import RequestError
from nbfeat.images.decode import SUFFIXES
from nbfeat.paths import absolute

if TYPE_CHECKING:
    import pandas as pd


def folder(path: str | Path, *, labels: bool = True) -> pd.DataFrame:
    """List the images in a folder as a frame with one row per image, ready for `extract`.

    Files are selected by suffix; hidden files are left out, and linked folders aren't entered.

    Parameters
    ----------
    path : str or Path
        The folder; ``~`` is expanded.
    labels : bool, default True
        Whether to add the column ``label``.

    Returns
    -------
    DataFrame
        ``path``: absolute paths in natural order (``2.jpg`` before ``10.jpg``). ``label``: the first folder below
        `path`, missing for images directly in `path`.

    Raises
    ------
    RequestError
        The folder doesn't exist or has no images.

    Examples
    --------
    >>> nbfeat.folder("photos")["label"].value_counts().to_dict()
    {'cat': 6, 'dog': 6}
    """
    import pandas as pd

    top = absolute(path)
    if not top.is_dir():
        what = "is a file, not a folder" if top.exists() else "doesn't exist"
        raise RequestError(f"{top} {what}. Name the folder that holds the images.")
    if not (files := sorted((file.relative_to(top).parts for file in _images(top)), key=_counted)):
        raise RequestError(f"{top} has no images. Name a folder with files such as .jpg, .png or .webp.")
    table: dict[str, list[str | None]] = {"path": [str(top.joinpath(*parts)) for parts in files]}
    if labels:
        table["label"] = [parts[0] if len(parts) > 1 else None for parts in files]
    try:
        return pd.DataFrame(table)
    except UnicodeEncodeError:  # a file name that isn't valid text, which pandas' own strings can't hold
        return pd.DataFrame(table, dtype=object)


def _images(top: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(top, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(place, name)


def _refuse(error: OSError) -> None:
    """Name the folder that can't be listed, instead of silently losing its images."""
    reason = error.strerror or error
    raise RequestError(f"{error.filename} can't be listed: {reason}. Make it readable, or move it.") from error


def _counted(parts: tuple[str, ...]) -> list[tuple[list[tuple[int, int, str]], str]]:
    """Return a sort key in natural order."""
    key = lambda piece: (0, int(piece), "") if piece.isdigit() else (1, 0, piece.casefold())
    return [(list(map(key, re.split(r"([0-9]+)", part))), part) for part in parts]
