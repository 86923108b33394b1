"""Read what was asked for, and check it before anything is started: frame, blocks, rows to learn from, and place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.catalog import find
from nbfeat.errors import RequestError
from nbfeat.features.block import FeatureBlock, one_of

if TYPE_CHECKING:
    import pandas as pd

    from nbfeat.features.fit import PixelSpec
    from nbfeat.features.network import NetworkSpec

Blocks = str | FeatureBlock | Sequence[str | FeatureBlock]
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
            message = (
                f"A block is text such as 'ResNet50 --pooling max', or a FeatureBlock, not {type(block).__name__}."
            )
            raise RequestError(message)
    if not found:
        found += FeatureBlock.from_options([], defaults)
    # The catalog's spelling, so that equal blocks are equal however they were written.
    return [replace(block, backbone=find(block.backbone).name) for block in found]


def check_frame(frame: object) -> None:
    """Raise RequestError where `frame` is not a DataFrame that columns can be attached to."""
    import pandas as pd  # noqa: PLC0415 - `import nbfeat` stays light

    if not isinstance(frame, pd.DataFrame):
        kind = f"{type(frame).__module__.partition('.')[0]}.{type(frame).__qualname__}".removeprefix("builtins.")
        way = "its .to_pandas()" if hasattr(frame, "to_pandas") else "pandas.DataFrame({'path': paths})"
        message = f"The frame must be a pandas DataFrame, not {kind}: use {way}."
        raise RequestError(message)
    if frame.columns.nlevels > 1:
        way = "frame.columns = ['_'.join(map(str, names)) for names in frame.columns]"
        message = f"The frame has MultiIndex columns: flatten them first, e.g. {way}."
        raise RequestError(message)


def rows_selected(frame: pd.DataFrame, fit_on: str | Sequence[bool]) -> NDArray[np.bool_]:
    """Return the mask of the rows that `fit_on` selects."""
    values: Any
    if isinstance(fit_on, str):
        try:
            values = frame.eval(fit_on, local_dict={}, global_dict={})
        except Exception as error:  # the query is the user's: whatever it raises is about it
            message = f"--fit-on {fit_on!r} could not be evaluated on the frame: {error}. {_QUERY}"
            raise RequestError(message) from error
    else:
        values = fit_on
    mask: NDArray[Any] = np.asarray(values)
    if mask.shape != (len(frame),) or mask.dtype != bool:
        given = f"{mask.dtype} of shape {mask.shape} for {len(frame):,} rows"
        message = f"--fit-on must give one True or False per row; it gave {given}. {_QUERY}"
        raise RequestError(message)
    if not mask.any():
        message = "--fit-on selects no row at all. Check the query against the frame's values."
        raise RequestError(message)
    return mask


def check_place(
    on: str | None,
    images: Sequence[object],
    networks: Sequence[tuple[NetworkSpec, PixelSpec]],
    *,
    parquet: bool,
    remote: bool,
) -> str | None:
    """Return where to compute, or raise RequestError where that cannot be."""
    if on is None:
        return None
    one_of(PLACES, "--on")(on)
    if parquet or remote:
        why = "features come back to this process" if parquet else "workers fetch no images by address"
        message = f"With --on {on} {why}: leave --on away, or {'--parquet' if parquet else '--allow-remote'}."
        raise RequestError(message)
    from nbfeat.features import cluster  # noqa: PLC0415 - only where it is needed

    cluster.check(images, networks)
    return on
