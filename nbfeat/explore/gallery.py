"""thumbnails: a gallery as HTML (small enough to save in a notebook) or as a plot; and what all plots share."""

from __future__ import annotations

import base64
import io
import math
import re
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nbfeat import isolation
from nbfeat.errors import ImageError, RequestError
from nbfeat.explore.scoring import column_of
from nbfeat.explore.vectors import Data, Images, images_of
from nbfeat.extraction.report import indented
from nbfeat.html import Html, escape, paragraph
from nbfeat.images.decode import short
from nbfeat.images.sources import image_column, is_missing, name_of, read_thumbnail, spread
from nbfeat.inference.engines.cpu_count import available_cores
from nbfeat.inference.spec import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

LIMIT = 24
SIDE = 160  # stored pixels per side; shown smaller, so pictures are sharp on high-density screens
SHOWN = 112  # CSS pixels per side
QUALITIES = (80, 60, 40, 20, 5)
MOST_BYTES = 8_000  # per picture, so 24 of them add less than 300 kB to a notebook
LONGEST = 60  # characters of a caption line
COLUMNS, PRINTED, INCHES = 6, 320, 1.7  # of a plot: tiles per row, pixels and inches per tile
LETTERS = 24  # per caption line in a plot
COLORS = 10  # in seaborn's colorblind palette; more would repeat

# Inline blocks wrap at any width, JupyterLab's sanitizer keeps these styles, and a border on every tile aligns them.
_TILE = (
    f"display:inline-block;vertical-align:top;box-sizing:content-box;width:{SHOWN}px;padding:4px;margin:0 2px 5px 0;"
    "line-height:1.3;font-size:85%;border:2px solid"
)
_FRAME = f"height:{SHOWN}px;line-height:{SHOWN}px;font-size:0;margin-bottom:4px"
_IMAGE = "display:inline-block;vertical-align:bottom;margin:0;max-width:none"
_FAILED = (
    f"min-height:{SHOWN}px;box-sizing:border-box;padding:.5em;margin-bottom:4px;"
    "border:1px dashed rgba(128,128,128,.8);font-size:90%;overflow-wrap:break-word"
)
_GALLERY = "margin:.6em 0 0"
_GROUP = (
    "display:inline-block;vertical-align:top;max-width:100%;box-sizing:border-box;margin:0 1.2em .8em 0;"
    "padding-left:.8em;border-left:3px solid rgba(128,128,128,.4)"
)


@dataclass(frozen=True, slots=True)
class Tile:
    """An image and its caption."""

    image: object  # a cell of the image column
    lines: tuple[str, ...]  # of the caption
    name: str  # row and file name
    reason: str = ""  # why it can't be read, if known
    marked: bool = False


def thumbnails(
    frame: Data, images: Hashable | None = None, caption: Hashable | Sequence[Hashable] | None = None, *,
    limit: int | None = LIMIT, root: str | Path | None = None,
) -> Thumbnails:  # fmt: skip
    """Show the images of a frame as a gallery.

    Images are shown upright and saved small: 24 add less than 300 kB to a notebook. An unreadable image is replaced by
    the reason.

    Parameters
    ----------
    frame : DataFrame, Extraction or Result
        The rows to show.
    images : str, optional
        The column with images; by default the result's own, or the one that looks like images.
    caption : str or list of str, optional
        The column or columns to show as captions; by default ``label`` if it exists, else the index.
    limit : int or None, default 24
        The most images to show, evenly sampled in the frame's order; None for all.
    root : str or Path, optional
        The folder that relative paths start from; by default the Extraction's own, or the working folder.

    Returns
    -------
    Thumbnails
        The gallery, which a notebook shows; ``.plot()`` draws it.

    Examples
    --------
    >>> nbfeat.thumbnails(photos, limit=6)
    Thumbnails of 6 of 12 images
    """
    found = images_of(frame, images, root)
    if found.column is None:
        image_column(found.frame, images)  # raises, and lists the columns
    captions = caption_columns(found.frame, caption)
    total = len(found.frame)
    if not total:
        raise RequestError("The frame has no rows, so it has no images to show. Pass a frame with rows.")
    positions = spread(total, total if limit is None else whole("limit")(limit))
    return Thumbnails(tuple(tile(found, at, captions) for at in positions), total, found.root)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Thumbnails:
    """Images of a frame as a gallery, which a notebook shows."""

    tiles: tuple[Tile, ...]
    total: int  # rows of the frame
    root: Path

    def plot(self) -> NDArray[Any]:
        """Draw the images on a new pyplot figure and return an array of its axes, one per image."""
        return plot(self.tiles, self.root, repr(self))

    def __repr__(self) -> str:
        return f"Thumbnails of {len(self.tiles):,} of {self.total:,} images"

    def _repr_html_(self) -> str:
        left = self.total - len(self.tiles)
        more = paragraph(f"… and {left:,} more; the images shown are evenly sampled") if left else ""
        return Html(html(self.tiles, self.root) + more)


def tile(images: Images, position: int, captions: Sequence[Hashable], *extra: str) -> Tile:
    """Return the tile of a row, captioned with the `extra` lines and its values in the columns `captions`."""
    frame, label = images.frame, images.frame.index[position]
    values = [frame[column].iloc[position] for column in captions] if captions else [label]
    image = None if images.column is None else frame[images.column].iloc[position]
    name = short(str(label), LONGEST)
    name = f"row {name}" if name.isdecimal() else name
    name = name if images.column is None else f"{name}: {file_name(image)}"
    return Tile(image, (*extra, *map(_caption, values)), name, images.reasons.get(position, ""))


def caption_columns(frame: pd.DataFrame, caption: Hashable | Sequence[Hashable] | None) -> list[Hashable]:
    """Return the caption columns: the requested ones, else ``label`` if it exists, else none."""
    if caption is None:
        return ["label"] if "label" in frame.columns else []
    known: list[Hashable] = list(frame.columns)
    wanted: Sequence[Hashable] = caption if isinstance(caption, list | tuple) and caption not in known else [caption]
    for column in wanted:
        column_of(frame, column, "caption")
    return list(wanted)


def _caption(value: object) -> str:
    if is_missing(value):
        return "missing"
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else short(str(value), LONGEST)


def file_name(image: object) -> str:
    """Return an image's name without its folders, which don't belong in a saved notebook."""
    name = name_of(image)  # with escapes such as \x1b and \u202e
    return name if name[:1] == "<" else short(re.sub(r".*(/|\\(?!x[0-9a-f]{2}|u[0-9a-f]{4}))", "", name), LONGEST)


def html(tiles: Sequence[Tile], root: Path) -> Html:
    """Draw tiles that wrap at any width; images are re-encoded small, never linked."""
    return Html(f'<div style="{_GALLERY}">{_tiles(tiles, root)}</div>')


def groups(groups: Sequence[Sequence[Tile]], root: Path) -> Html:
    """Draw numbered groups of tiles next to each other, wrapping at any width."""
    drawn = [
        f'<div style="{_GROUP}"><div style="font-size:85%;opacity:.65;margin-bottom:.3em">group {number + 1}</div>'
        f"{_tiles(group, root)}</div>"
        for number, group in enumerate(groups)
    ]
    return Html(f'<div style="{_GALLERY}">{"".join(drawn)}</div>')


def plot(tiles: Sequence[Tile], root: Path, title: str) -> NDArray[Any]:
    """Draw tiles on a new pyplot figure and return its axes."""
    from matplotlib import pyplot as plt

    columns = min(COLUMNS, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    captions = [[part for line in tile.lines for part in textwrap.wrap(line, LETTERS) or [""]] for tile in tiles]
    size = (INCHES * columns, (INCHES + 0.17 * max(map(len, captions))) * rows + 0.4)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(plain("\n".join(textwrap.wrap(title, 20 * columns))), fontsize="medium")
    images = _read(tiles, root, PRINTED, lambda image: image)
    drawn: NDArray[Any] = grid.ravel()[: len(tiles)]
    for ax, tile, image, lines in zip(drawn, tiles, images, captions, strict=True):
        ax.set(xticks=[], yticks=[])
        ax.grid(visible=False)
        ax.set_xlabel(plain("\n".join(lines)), fontsize="small", fontweight="bold" if tile.marked else None)
        for side in ax.spines.values():
            side.set(visible=isinstance(image, str) or tile.marked, linewidth=2 if tile.marked else 1)
        if isinstance(image, str):
            reason = plain("\n".join(textwrap.wrap(image, LETTERS)))
            ax.text(0.5, 0.5, reason, ha="center", va="center", fontsize="x-small", transform=ax.transAxes)
            ax.set_box_aspect(1)
        else:
            ax.imshow(image, interpolation="antialiased")
    for ax in grid.ravel()[len(tiles) :]:
        ax.remove()
    return drawn


def _read(tiles: Sequence[Tile], root: Path, side: int, make: Callable[[Image.Image], Any]) -> list[Any]:
    """Read images in threads, at most `side` pixels wide and high, and apply `make`; return a reason for failures."""

    def one(tile: Tile) -> Any:
        try:
            return tile.reason or make(read_thumbnail(tile.image, side, root))
        except ImageError as error:
            return str(error)

    with isolation.pillow_defaults(), ThreadPoolExecutor(available_cores()) as threads:
        return list(threads.map(one, tiles))


def encoded(image: Image.Image) -> tuple[str, tuple[int, int]]:
    """Encode as WebP (half the size of JPEG) in the best quality that fits; return a data URL and the image's size."""
    for quality in QUALITIES:
        out = io.BytesIO()
        image.save(out, "WEBP", quality=quality)
        if out.tell() <= MOST_BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode('ascii')}", image.size


def _tiles(tiles: Sequence[Tile], root: Path) -> str:
    return "".join(map(_tile, tiles, _read(tiles, root, SIDE, encoded)))


def _tile(tile: Tile, picture: tuple[str, tuple[int, int]] | str) -> str:
    lines = "".join(f'<div style="overflow-wrap:break-word">{escape(line)}</div>' for line in tile.lines)
    if isinstance(picture, str):
        above = f'<div style="{_FAILED}">{escape(picture)}</div>'
    else:
        url, sides = picture
        width, height = (max(1, round(side * SHOWN / max(sides))) for side in sides)
        alt = escape(", ".join([*tile.lines, tile.name]))
        size = f'width="{width}" height="{height}"'
        image = f'<img src="{url}" alt="{alt}" {size} style="{_IMAGE};width:{width}px;height:{height}px">'
        above = f'<div style="{_FRAME}">{image}</div>'
    border = "#1e88e5" if tile.marked else "transparent"
    return f'<div style="{_TILE} {border}" title="{escape(tile.name)}">{above}{lines}</div>'


def axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return `ax`, or axes of a new pyplot figure of `width` × `height` inches, with nothing cut off."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def colors(names: Iterable[object]) -> dict[object, tuple[float, float, float]] | None:
    """Return a color for each name, in order; None if there are too many to tell apart."""
    import seaborn as sns

    known = list(dict.fromkeys(names))
    return dict(zip(known, sns.color_palette("colorblind", len(known)), strict=True)) if len(known) <= COLORS else None


def plain(text: object) -> str:
    """Escape `text` for matplotlib, which reads text between two dollar signs as a formula."""
    return str(text).replace("$", r"\$")


def text(heading: str, table: str, *notes: str) -> str:
    """Return the plain-text view of a result."""
    return "\n".join(filter(None, [heading, indented(table), *notes]))


def page(heading: str, body: str, *notes: str) -> Html:
    """Return the notebook view of a result."""
    return Html("".join([paragraph(heading, strong=True), body, *map(paragraph, filter(None, notes))]))
