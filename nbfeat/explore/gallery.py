"""A gallery of tiles, as html that a saved notebook keeps, and as a plot for print."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from nbfeat.explore.plots import plain
from nbfeat.explore.tile import SIDE, Picture, Tile, pictures, pixels
from nbfeat.html import Html, escape

if TYPE_CHECKING:
    from PIL import Image

SHOWN = 112  # pixels of a notebook's page; of SIDE that are kept
COLUMNS, PRINTED, INCHES = 6, 320, 1.7  # of a plot: tiles beside each other, pixels and inches of each
LETTERS = 24  # of a plot's caption, a line

# Inline blocks wrap in any width. JupyterLab's sanitizer, which notebooks of others go through, lets these styles stay;
# colors follow the theme. Every tile has the border, so that all stand in line.
_BORDERED = (
    f"display:inline-block;vertical-align:top;box-sizing:content-box;width:{SHOWN}px;padding:4px;margin:0 2px 5px 0;"
    "line-height:1.3;font-size:85%;border:2px solid"
)
_TILE, _MARKED = f"{_BORDERED} transparent", f"{_BORDERED} #1e88e5"
_FRAME = f"height:{SHOWN}px;line-height:{SHOWN}px;font-size:0;margin-bottom:4px"
_IMAGE = "display:inline-block;vertical-align:bottom;margin:0;max-width:none"
_FAILED = (
    f"min-height:{SHOWN}px;box-sizing:border-box;padding:.5em;margin-bottom:4px;"
    "border:1px dashed rgba(128,128,128,.8);font-size:90%;overflow-wrap:break-word"
)
_LINE = "overflow-wrap:break-word"
_GALLERY = "margin:.6em 0 0"
_GROUP = (
    "display:inline-block;vertical-align:top;max-width:100%;box-sizing:border-box;margin:0 1.2em .8em 0;"
    "padding-left:.8em;border-left:3px solid rgba(128,128,128,.4)"
)


def html(tiles: Sequence[Tile], root: Path) -> Html:
    """Draw tiles that wrap at any width; images are re-encoded small, never linked."""
    return Html(f'<div style="{_GALLERY}">{_tiles(tiles, root)}</div>')


def groups(groups: Sequence[Sequence[Tile]], root: Path) -> Html:
    """Draw numbered groups of tiles beside each other, as many as the width takes."""
    drawn = [
        f'<div style="{_GROUP}"><div style="font-size:85%;opacity:.65;margin-bottom:.3em">group {number + 1}</div>'
        f"{_tiles(group, root)}</div>"
        for number, group in enumerate(groups)
    ]
    return Html(f'<div style="{_GALLERY}">{"".join(drawn)}</div>')


def plot(tiles: Sequence[Tile], root: Path, title: str) -> NDArray[Any]:
    """Draw tiles on axes of a new figure of pyplot's, and return the axes."""
    from matplotlib import pyplot as plt

    columns = min(COLUMNS, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    lines = max(len(_wrapped(tile)) for tile in tiles)
    size = (INCHES * columns, (INCHES + 0.17 * lines) * rows + 0.4)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(plain("\n".join(textwrap.wrap(title, 20 * columns))), fontsize="medium")
    axes = grid.ravel()
    for ax, tile, image in zip(axes, tiles, pixels(tiles, root, PRINTED), strict=False):
        _draw(ax, tile, image)
    for ax in axes[len(tiles) :]:
        ax.remove()
    drawn: NDArray[Any] = axes[: len(tiles)]
    return drawn


def _tiles(tiles: Sequence[Tile], root: Path) -> str:
    return "".join(_tile(tile, picture) for tile, picture in zip(tiles, pictures(tiles, root), strict=True))


def _tile(tile: Tile, picture: Picture | str) -> str:
    lines = "".join(f'<div style="{_LINE}">{escape(line)}</div>' for line in tile.lines)
    if isinstance(picture, str):
        above = f'<div style="{_FAILED}">{escape(picture)}</div>'
    else:
        width, height = (max(1, round(side * SHOWN / SIDE)) for side in (picture.width, picture.height))
        said = escape(", ".join([*tile.lines, tile.name]))
        size = f'width="{width}" height="{height}"'
        image = f'<img src="{picture.address}" alt="{said}" {size} style="{_IMAGE};width:{width}px;height:{height}px">'
        above = f'<div style="{_FRAME}">{image}</div>'
    style = _MARKED if tile.marked else _TILE
    return f'<div style="{style}" title="{escape(tile.name)}">{above}{lines}</div>'


def _draw(ax: Any, tile: Tile, image: Image.Image | str) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.set_xlabel(plain("\n".join(_wrapped(tile))), fontsize="small", fontweight="bold" if tile.marked else None)
    for side in ax.spines.values():
        side.set_visible(isinstance(image, str) or tile.marked)
        side.set_linewidth(2 if tile.marked else 1)
    if isinstance(image, str):
        text = plain("\n".join(textwrap.wrap(image, LETTERS)))
        ax.text(0.5, 0.5, text, ha="center", va="center", fontsize="x-small", transform=ax.transAxes)
        ax.set_box_aspect(1)
    else:
        ax.imshow(image, interpolation="antialiased")


def _wrapped(tile: Tile) -> list[str]:
    return [part for line in tile.lines for part in textwrap.wrap(line, LETTERS) or [""]]
