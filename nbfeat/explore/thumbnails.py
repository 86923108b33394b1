"""thumbnails: the images of a frame as a gallery."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from nbfeat.errors import RequestError
from nbfeat.explore import gallery
from nbfeat.explore.tile import Tile, caption_columns, tile
from nbfeat.explore.vectors import Made, images_of
from nbfeat.html import Html, paragraph
from nbfeat.images.sources import image_column, spread
from nbfeat.inference.spec import whole

if TYPE_CHECKING:
    import pandas as pd

LIMIT = 24


def thumbnails(
    frame: Made | pd.DataFrame,
    images: Hashable | None = None,
    caption: Hashable | Sequence[Hashable] | None = None,
    *,
    limit: int | None = LIMIT,
    root: str | Path | None = None,
) -> Thumbnails:
    """Show the images of a frame as a gallery.

    The pictures are read as for a network, upright, and kept small in the notebook: 24 take less than 300 kB. One that
    cannot be read is shown as the reason why.

    Parameters
    ----------
    frame
        A frame, or a result.
    images
        The column that holds images; by default the result's own, or the one that looks like images.
    caption
        The column, or columns, of the captions; by default ``label`` where there is one, else the index.
    limit
        At most so many, evenly spread over the frame, whose order they keep; None for all.
    root
        Where relative paths start; by default where those of the Extraction do, or the working folder.

    Examples
    --------
    >>> nbfeat.thumbnails(nbfeat.folder("photos"))  # doctest: +SKIP
    >>> nbfeat.thumbnails(result.failures, images="image", caption="position")  # doctest: +SKIP
    """
    found = images_of(frame, images, root)
    if found.column is None:
        image_column(found.frame, images)  # raises, and says which columns there are
    captions = caption_columns(found.frame, caption)
    total = len(found.frame)
    if not total:
        raise RequestError("The frame has no rows, so that there are no images to show.")
    positions = spread(total, total if limit is None else whole("limit")(limit))
    return Thumbnails(tuple(tile(found, at, captions) for at in positions), total, found.root)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Thumbnails:
    """Some of the images of a frame; a notebook shows the gallery, `plot()` draws it."""

    tiles: tuple[Tile, ...]
    total: int  # rows of the frame
    root: Path

    def plot(self) -> NDArray[Any]:
        """Draw the images on axes of a new figure of pyplot's, and return the axes."""
        return gallery.plot(self.tiles, self.root, repr(self))

    def __repr__(self) -> str:
        """Return one line of text."""
        return f"Thumbnails of {len(self.tiles):,} of {self.total:,} images"

    def _repr_html_(self) -> str:
        left = self.total - len(self.tiles)
        more = paragraph(f"… and {left:,} more; those shown are evenly spread") if left else ""
        return Html(gallery.html(self.tiles, self.root) + more)
