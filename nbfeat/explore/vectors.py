"""A result, or a frame with feature columns → its features as rows of numbers, and the columns that are not."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import RequestError, listing
from nbfeat.extraction.columns import FeatureColumns, made_columns
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.feature_table import block_called
from nbfeat.extraction.recipe import PartRecipe
from nbfeat.extraction.request import check_frame
from nbfeat.extraction.result import Result
from nbfeat.images.sources import image_column

if TYPE_CHECKING:
    import pandas as pd

Made: TypeAlias = Extraction | Result
Rows: TypeAlias = NDArray[np.floating[Any]]
CHUNK = 4096  # rows looked at a time, so that no second matrix of full height is needed


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """The frame's own columns, without features, and which of them holds images."""

    frame: pd.DataFrame
    column: Hashable | None  # None where no column looks like images
    root: Path  # where relative paths start
    reasons: Mapping[int, str]  # by position: why an extraction could not read an image

    def cells(self) -> list[Any]:
        """Return the cells of the image column, or as many times None."""
        return [None] * len(self.frame) if self.column is None else self.frame[self.column].tolist()


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """Features as one matrix for each block, a row for each row of the frame."""

    images: Images
    blocks: Mapping[str, Rows]  # by prefix
    ok: NDArray[np.bool_]  # which rows have features in every block
    made: Made | None  # the result they are of, where it is known

    @property
    def positions(self) -> NDArray[np.intp]:
        """Where the rows with features are."""
        return np.flatnonzero(self.ok)

    @property
    def left_out(self) -> str:
        """Say how many rows have no features; empty where all have."""
        count = len(self.ok) - int(self.ok.sum())
        return f"{count:,} {'row' if count == 1 else 'rows'} without features left out" if count else ""

    @property
    def title(self) -> str:
        """Name the blocks."""
        return listing(self.blocks)


def parts_of(made: Made) -> Sequence[FeatureColumns | PartRecipe]:
    """Return what a result is made of, in the order of its columns."""
    return made.parts if isinstance(made, Extraction) else made.fitted.parts


def images_of(data: Made | pd.DataFrame, images: Hashable | None = None, root: str | Path | None = None) -> Images:
    """Read which images `data` has.

    A result knows its image column, and an Extraction where its paths start; of a frame the column that looks like
    images is taken, if there is one.
    """
    if isinstance(data, Made):
        frame, column, reasons = _own(data.frame), parts_of(data)[0].column, data.failures
        column = column if images is None else image_column(frame, images)
        failed = reasons[reasons["column"] == column]
        told = dict(zip(failed["position"].tolist(), failed["reason"].tolist(), strict=True))
        start = data.root if root is None and isinstance(data, Extraction) else _absolute(root or "")
        return Images(frame, column, start, told)
    check_frame(data)
    frame = _own(data)
    try:
        found: Hashable | None = image_column(frame, images)
    except RequestError:
        if images is not None:
            raise
        found = None
    return Images(frame, found, _absolute(root or ""), {})


def vectors_of(
    data: Made | pd.DataFrame,
    features: str | None = None,
    images: Hashable | None = None,
    root: str | Path | None = None,
) -> Vectors:
    """Read the features of `data`: all its blocks, or the one of prefix `features`.

    The matrices are views of the frame's memory wherever pandas can give one.

    Raises
    ------
    RequestError
        Where there is no such block, none at all, or no row has features.
    """
    if not isinstance(data, Made):
        check_frame(data)
        blocks = _blocks_of_frame(data, features)
    else:
        prefixes = [part.prefix for part in parts_of(data)] if features is None else [features]
        blocks = {prefix: data[prefix].to_numpy() for prefix in prefixes}
        if images is None:
            images = next(part.column for part in parts_of(data) if part.prefix in blocks)
    ok = np.logical_and.reduce([_finite(rows) for rows in blocks.values()])
    if not ok.any():
        raise RequestError(f"None of the {len(ok):,} rows has features in {listing(blocks)}.")
    return Vectors(images_of(data, images, root), blocks, ok, data if isinstance(data, Made) else None)


def _blocks_of_frame(frame: pd.DataFrame, features: str | None) -> dict[str, Rows]:
    made = made_columns(frame)
    if not made:
        raise RequestError(
            "The frame has no columns of features, such as resnet50_0000 … resnet50_2047 in float32. "
            "Extract some first: nbfeat.extract(frame, 'ResNet50')."
        )
    wanted = made if features is None else {features: made[block_called(features, made)]}
    return {prefix: frame.iloc[:, positions].to_numpy() for prefix, positions in wanted.items()}


def _own(frame: pd.DataFrame) -> pd.DataFrame:
    """Leave out the columns of features."""
    features = {position for positions in made_columns(frame).values() for position in positions}
    return frame.iloc[:, [position for position in range(frame.shape[1]) if position not in features]]


def _finite(rows: Rows) -> NDArray[np.bool_]:
    good = np.empty(len(rows), bool)
    for start in range(0, len(rows), CHUNK):
        good[start : start + CHUNK] = np.isfinite(rows[start : start + CHUNK]).all(axis=1)
    return good


def _absolute(root: str | Path) -> Path:
    return Path(root).expanduser().absolute()
