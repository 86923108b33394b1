"""Read what was asked for, and check it before anything is started: frame, blocks, rows to learn from, and place."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.catalog import find
from nbfeat.errors import RequestError
from nbfeat.extraction.options import FeatureBlock, one_of
from nbfeat.images.formats import short

if TYPE_CHECKING:
    import pandas as pd
    from ray.data import Dataset

    from nbfeat.images.resize import PixelSpec
    from nbfeat.inference.spec import NetworkSpec

Blocks = str | FeatureBlock | Sequence[str | FeatureBlock]
Frame: TypeAlias = "pd.DataFrame | str | Path | Dataset"
_QUERY = "Compare a column with a value, as in \"split == 'train'\"."
PLACES = ("ray",)  # to compute at, beside this process


def read_blocks(blocks: Sequence[Blocks], defaults: Mapping[str, Any]) -> list[FeatureBlock]:
    """Read blocks from text, FeatureBlocks, and sequences of either."""
    found: list[FeatureBlock] = []
    for block in blocks:
        if isinstance(block, FeatureBlock):
            found.append(block)
        elif isinstance(block, str):
            found += FeatureBlock.parse(block, defaults)
        elif isinstance(block, Sequence):
            found += read_blocks(block, defaults)
        else:
            raise RequestError(
                f"A block is text such as 'ResNet50 --pooling max', or a FeatureBlock, not {type(block).__name__}."
            )
    if not found:
        found += FeatureBlock.from_options([], defaults)
    # The catalog's spelling, so that equal blocks are equal however they were written.
    return [replace(block, backbone=find(block.backbone).name) for block in found]


def read_frame(frame: Frame) -> pd.DataFrame:
    """Return the DataFrame that `frame` is, that a Parquet file or folder of this path holds, or a dataset of Ray's.

    Raises
    ------
    RequestError
        Where it is something else, or cannot be read.
    """
    if isinstance(frame, str | Path):
        frame = _read_parquet(frame)
    elif (ray := sys.modules.get("ray.data")) is not None and isinstance(frame, ray.Dataset):  # whoever has one has it
        frame = frame.to_pandas()
    check_frame(frame)
    return frame


def _read_parquet(path: str | Path) -> pd.DataFrame:
    import pyarrow as pa
    from pyarrow import parquet

    shown, way = short(str(path)), "Name one with the images in a column, or give a pandas DataFrame."
    if "://" in str(path):
        raise RequestError(
            f"A frame is read from a path of this machine, not from {shown}: give pandas.read_parquet(…) of it."
        )
    try:
        table = parquet.read_table(Path(path).expanduser())
        if table.column_names:
            frame: pd.DataFrame = table.to_pandas()
            return frame
        reason = "has no columns" if Path(path).expanduser().is_file() else "is a folder without Parquet files"
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"There is no Parquet file or folder {shown} to read the frame from. {way}") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        told = f"{error}".partition("\n")[0].partition(". ")[0].rstrip(".")
        reason = f"cannot be read as Parquet ({short(told)})"
    raise RequestError(f"{shown} {reason}. {way}")


def check_frame(frame: object) -> None:
    """Raise RequestError where `frame` is not a DataFrame that columns can be attached to."""
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        kind = f"{type(frame).__module__.partition('.')[0]}.{type(frame).__qualname__}".removeprefix("builtins.")
        way = "its .to_pandas()" if hasattr(frame, "to_pandas") else "pandas.DataFrame({'path': paths})"
        raise RequestError(f"The frame must be a pandas DataFrame, not {kind}: use {way}.")
    if frame.columns.nlevels > 1:
        way = "frame.columns = ['_'.join(map(str, names)) for names in frame.columns]"
        raise RequestError(f"The frame has MultiIndex columns: flatten them first, e.g. {way}.")


def rows_selected(frame: pd.DataFrame, fit_on: str | Sequence[bool]) -> NDArray[np.bool_]:
    """Return the mask of the rows that `fit_on` selects."""
    values: Any
    if isinstance(fit_on, str):
        try:
            values = frame.eval(fit_on, local_dict={}, global_dict={})
        except Exception as error:  # the query is the user's: whatever it raises is about it
            raise RequestError(f"--fit-on {fit_on!r} could not be evaluated on the frame: {error}. {_QUERY}") from error
    else:
        values = fit_on
    mask: NDArray[Any] = np.asarray(values)
    if mask.shape != (len(frame),) or mask.dtype != bool:
        given = f"{mask.dtype} of shape {mask.shape} for {len(frame):,} rows"
        raise RequestError(f"--fit-on must give one True or False per row; it gave {given}. {_QUERY}")
    if not mask.any():
        raise RequestError("--fit-on selects no row at all. Check the query against the frame's values.")
    return mask


def check_place(
    on: str | None, images: Sequence[object], networks: Sequence[tuple[NetworkSpec, PixelSpec]]
) -> str | None:
    """Return where to compute, or raise RequestError where that cannot be."""
    if on is None:
        return None
    one_of(PLACES, "--on")(on)
    from nbfeat.extraction import ray_workers

    ray_workers.check(images, networks)
    return on
