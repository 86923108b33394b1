"""Request: the arguments of an extraction, read and checked before anything is started."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones import user_models, weights
from nbfeat.backbones.catalog import find
from nbfeat.errors import RequestError, first_line
from nbfeat.extraction.columns import FeatureColumns, places, plan, plan_again
from nbfeat.extraction.options import FeatureBlock
from nbfeat.extraction.recipe import Like, Recipe, to_repeat
from nbfeat.images.decode import short
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import image_column
from nbfeat.inference.engines import devices as hardware
from nbfeat.inference.engines.base import Asked
from nbfeat.inference.spec import Cut, NetworkSpec, whole
from nbfeat.paths import absolute

if TYPE_CHECKING:
    import pandas as pd
    from ray.data import Dataset

Blocks = str | FeatureBlock | Sequence[str | FeatureBlock]
Frame: TypeAlias = "pd.DataFrame | str | Path | Dataset"
_QUERY = "Compare a column with a value, as in \"split == 'train'\"."
LARGEST_BATCH = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """The checked arguments of an extraction."""

    frame: pd.DataFrame
    blocks: list[FeatureBlock]
    columns: list[Hashable]  # of images
    parts: list[FeatureColumns]  # for each block and image column
    specs: list[tuple[NetworkSpec, PixelSpec]]
    images: list[object]  # the cells of the first image column, then those of the next
    fit_rows: NDArray[np.bool_] | None  # used to fit normalization; None for all
    repeats: Recipe | None
    root: Path
    replace: bool
    batch_size: int | None
    device: str
    precision: Asked
    on: str | None
    remote: bool

    @property
    def fit_count(self) -> int | None:
        """Number of rows used to fit normalization; None for all."""
        return None if self.fit_rows is None else int(self.fit_rows.sum())

    def images_of(self, column: Hashable) -> slice:
        """Return the positions of the images of `column` among all images."""
        start = self.columns.index(column) * len(self.frame)
        return slice(start, start + len(self.frame))


def read_request(
    frame: Frame, blocks: Sequence[Blocks], defaults: Mapping[str, Any], *,
    images: Hashable | Sequence[Hashable] | None, fit_on: str | Sequence[bool] | None, like: Like | None,
    root: str | Path | None, replace: bool, batch_size: int | str, device: str, precision: str, on: str | None,
    remote: bool,
) -> Request:  # fmt: skip
    """Read and check the arguments of an extraction; nothing is started."""
    frame, checked = read_frame(frame), hardware.check_precision(precision)
    repeats = to_repeat(like, blocks=blocks, fit_on=fit_on, precision=precision, defaults=defaults)
    of_blocks = repeats.blocks if repeats else read_blocks(blocks, defaults)
    given = images if isinstance(images, list | tuple) else [images]
    columns = [image_column(frame, column) for column in (repeats.columns if repeats and images is None else given)]
    parts = plan_again(repeats, columns) if repeats else plan(of_blocks, columns)
    networks = networks_of(of_blocks)
    places(frame, [part for part in parts if part.is_sized], replace=replace)
    for part in parts:
        part.network_index = next(number for number, group in enumerate(networks.values()) if part.block in group)
    return Request(
        frame=frame, blocks=of_blocks, columns=columns, parts=parts, specs=list(networks), repeats=repeats,
        images=[value for column in columns for value in frame[column].tolist()],
        fit_rows=None if fit_on is None else rows_selected(frame, fit_on),
        root=absolute(root or ""), replace=replace,
        batch_size=None if batch_size == "auto" else whole("batch_size", LARGEST_BATCH)(batch_size),
        device=hardware.check_device(device), precision=checked, on=on, remote=remote,
    )  # fmt: skip


def read_blocks(blocks: Sequence[Blocks], defaults: Mapping[str, Any]) -> list[FeatureBlock]:
    """Read blocks from text, FeatureBlocks and sequences of them."""
    found: list[FeatureBlock] = []
    for block in blocks:
        if isinstance(block, FeatureBlock):
            found.append(block)
        elif isinstance(block, str):
            found += FeatureBlock.parse(block, defaults)
        elif isinstance(block, Sequence):
            found += read_blocks(block, defaults)
        else:
            kind = type(block).__name__
            raise RequestError(f"A block must be text like 'ResNet50 --pooling max' or a FeatureBlock, not {kind}.")
    found = found or [*FeatureBlock.from_options([], defaults)]
    # Use the catalog's spelling, so that equal blocks compare equal.
    return [replace(block, backbone=find(block.backbone).name) for block in found]


def read_frame(frame: Frame) -> pd.DataFrame:
    """Return `frame` as a DataFrame: itself, read from a Parquet file or folder, or from a Ray dataset."""
    if isinstance(frame, str | Path):
        frame = _read_parquet(frame)
    elif (ray := sys.modules.get("ray.data")) is not None and isinstance(frame, ray.Dataset):
        frame = frame.to_pandas()
    check_frame(frame)
    return frame


def _read_parquet(path: str | Path) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    shown, file = short(str(path)), Path(path).expanduser()
    way = "Pass the path of one with a column of images, or a pandas DataFrame."
    if "://" in str(path):
        raise RequestError(f"A frame can't be read from the URL {shown}. Pass `pandas.read_parquet(…)` of it.")
    try:
        if (table := parquet.read_table(file)).column_names:
            return table.to_pandas()
        reason = "has no columns" if file.is_file() else "is a folder without Parquet files"
    except (FileNotFoundError, NotADirectoryError):  # of a pipe or device, too
        reason = "isn't a regular file or a folder" if file.exists() else "doesn't exist"
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = f"can't be read as Parquet ({short(first_line(error).partition('. ')[0])})"
    raise RequestError(f"{shown} {reason}. {way}")


def check_frame(frame: object) -> None:
    """Raise RequestError unless `frame` is a DataFrame that columns can be attached to."""
    import pandas as pd

    if not isinstance(frame, pd.DataFrame):
        kind = f"{type(frame).__module__.partition('.')[0]}.{type(frame).__qualname__}".removeprefix("builtins.")
        way = "its .to_pandas()" if hasattr(frame, "to_pandas") else "pandas.DataFrame({'path': paths})"
        raise RequestError(f"The frame must be a pandas DataFrame, not {kind}: use {way}.")
    if frame.columns.nlevels > 1:
        way = "frame.columns = ['_'.join(map(str, names)) for names in frame.columns]"
        raise RequestError(f"The frame has MultiIndex columns. Flatten them first, e.g. {way}.")


def rows_selected(frame: pd.DataFrame, fit_on: str | Sequence[bool]) -> NDArray[np.bool_]:
    """Return the mask of the rows that `fit_on` selects."""
    try:
        mask = np.asarray(_evaluated(frame, fit_on) if isinstance(fit_on, str) else fit_on)
    except Exception as error:  # the user's query may raise anything
        raise RequestError(f"`fit_on` {fit_on!r} can't be evaluated on the frame: {error}. {_QUERY}") from error
    if mask.shape != (len(frame),) or mask.dtype != bool:
        given = f"{mask.dtype} of shape {mask.shape} for {len(frame):,} rows"
        raise RequestError(f"`fit_on` must give True or False for each row, not {given}. {_QUERY}")
    if not mask.any():
        raise RequestError("`fit_on` selects no rows. Compare the query with the values in the frame.")
    return mask


def _evaluated(frame: pd.DataFrame, query: str) -> Any:
    """Evaluate a query without calls and attributes, which pandas would run as code."""
    plain = re.sub(r"('[^']*'|\"[^\"]*\")|`[^`]*`", lambda found: found[1] or "column", query)  # `names` aren't code
    if any(isinstance(node, ast.Call | ast.Attribute) for node in ast.walk(ast.parse(plain.strip(), mode="eval"))):
        raise ValueError("it must only compare columns; for anything else, pass a mask")
    return frame.eval(query, local_dict={}, global_dict={})


def networks_of(blocks: Sequence[FeatureBlock]) -> dict[tuple[NetworkSpec, PixelSpec], list[FeatureBlock]]:
    """Group blocks by network and pixels: blocks that differ only in cut, normalization and prefix run as one."""
    groups: dict[tuple[NetworkSpec, PixelSpec], list[FeatureBlock]] = {}
    for block in blocks:
        pixels = PixelSpec(block.size or find(block.backbone).size, block.resize, block.interpolation)
        groups.setdefault((network_spec(block), pixels), []).append(block)
    return {
        (replace(spec, cuts=tuple(sorted({block.cut for block in group}))), pixels): group
        for (spec, pixels), group in groups.items()
    }


def network_spec(block: FeatureBlock, cuts: tuple[Cut, ...] = ()) -> NetworkSpec:
    """Describe the network of `block`, cut at `cuts`; raise RequestError if it isn't available with these options."""
    backbone = find(block.backbone)
    alpha = None if backbone.alphas and block.alpha == 1 else block.alpha  # the same network, so one key in the cache
    scaling, is_file = block.scaling or backbone.scaling, backbone.package == "file"
    if backbone.is_user_model:
        given = {name: getattr(block, name) for name in ("size", "alpha", "weights", "scaling")}
        size, alpha = user_models.check(backbone, **given), None
        chosen = backbone.name if is_file else backbone.default_weights
    else:
        chosen = block.weights or backbone.default_weights
        chosen = chosen if chosen in weights.NAMED else str(weights.weights_file(chosen))
        size = block.size or backbone.size
        backbone.check(size=size, alpha=alpha, weights=chosen)
    name = user_models.NAME if is_file else backbone.name
    return NetworkSpec(backbone=name, alpha=alpha, weights=chosen, scaling=scaling, size=size, cuts=cuts)
