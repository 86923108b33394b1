"""Tile: an image with what is said of it, and the small picture of it that a saved notebook can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbfeat import isolation
from nbfeat.errors import ImageError
from nbfeat.explore.scoring import column_of
from nbfeat.explore.vectors import Images
from nbfeat.images.decode import short
from nbfeat.images.sources import is_missing, name_of, read_thumbnail
from nbfeat.inference.engines.cpu_count import available_cores

if TYPE_CHECKING:
    from collections.abc import Hashable

    import pandas as pd
    from PIL import Image

SIDE = 160  # pixels that are kept of a picture, which is shown a third smaller: sharp on fine screens, too
QUALITIES = (80, 60, 40, 20, 5)
MOST_BYTES = 8_000  # of a picture: two dozen then take less than 300 kB of a notebook
LONGEST = 60  # letters of a caption's line


@dataclass(frozen=True, slots=True)
class Tile:
    """An image and what is said of it."""

    image: object  # a cell of the image column
    lines: tuple[str, ...]  # below it
    name: str  # which row it is, and which file
    reason: str = ""  # why it is known not to be readable
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture."""

    address: str  # data:image/webp;base64,…
    width: int
    height: int


def tile(images: Images, position: int, captions: Sequence[Hashable], *extra: str) -> Tile:
    """Return the tile of a row: `extra` lines, then its values in the columns `captions`."""
    frame = images.frame
    values = [frame[column].iloc[position] for column in captions] if captions else [frame.index[position]]
    lines = [_said(value) for value in values]
    image = None if images.column is None else frame[images.column].iloc[position]
    label = short(str(frame.index[position]), LONGEST)
    label = f"row {label}" if label.isdecimal() else label
    name = label if images.column is None else f"{label}: {file_name(image)}"
    return Tile(image, (*extra, *lines), name, images.reasons.get(position, ""))


def caption_columns(frame: pd.DataFrame, caption: Hashable | Sequence[Hashable] | None) -> list[Hashable]:
    """Return the columns that captions are of: those asked for, else ``label`` where there is one, else none."""
    if caption is None:
        return ["label"] if "label" in frame.columns else []
    known: list[Hashable] = list(frame.columns)
    asked: Sequence[Hashable] = caption if isinstance(caption, list | tuple) and caption not in known else [caption]
    for column in asked:
        column_of(frame, column, "caption")
    return list(asked)


def pictures(tiles: Sequence[Tile], root: Path) -> list[Picture | str]:
    """Return the picture of each tile, or the reason why there is none; decoded in threads."""
    return _each(lambda image: _encoded(read_thumbnail(image, SIDE, root)), tiles)


def pixels(tiles: Sequence[Tile], root: Path, side: int) -> list[Image.Image | str]:
    """Return the image of each tile, at most `side` pixels wide and high, or the reason why there is none."""
    return _each(lambda image: read_thumbnail(image, side, root), tiles)


def _each(made: Any, tiles: Sequence[Tile]) -> list[Any]:
    def one(tile: Tile) -> Any:
        try:
            return tile.reason or made(tile.image)
        except ImageError as error:
            return str(error)

    with isolation.pillow_defaults(), ThreadPoolExecutor(available_cores()) as threads:
        return list(threads.map(one, tiles))


def _encoded(image: Image.Image) -> Picture:
    """Encode as WebP, which takes half the bytes of a JPEG; as well as fits."""
    for quality in QUALITIES:
        out = io.BytesIO()
        image.save(out, "WEBP", quality=quality)
        if out.tell() <= MOST_BYTES:
            break
    return Picture(f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode('ascii')}", *image.size)


def _said(value: object) -> str:
    if is_missing(value):
        return "missing"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    return short(str(value), LONGEST)


def file_name(image: object) -> str:
    """Name an image without its folders, which are nobody's business in a saved notebook."""
    name = name_of(image)
    return name if name.startswith("<") else short(name.replace("\\", "/").rpartition("/")[2], LONGEST)
