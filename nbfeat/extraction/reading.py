"""Results read back from Parquet: a file that a result was written to, or a dataset of many."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nbfeat.errors import RequestError, format_bytes, near
from nbfeat.extraction import memory
from nbfeat.extraction.columns import attach, place
from nbfeat.extraction.feature_table import Result
from nbfeat.extraction.packed import pack, unpack
from nbfeat.extraction.recipe import Recipe
from nbfeat.parquet import dataset, result_file
from nbfeat.parquet.location import Location
from nbfeat.parquet.result_file import AGAIN, RECIPE, Failure

if TYPE_CHECKING:
    import pandas as pd


def read(path: str | Path, frame: pd.DataFrame | None = None) -> Result:
    """Read a result that nbfeat wrote to a Parquet file, or to a folder of them.

    Parameters
    ----------
    path
        The file that ``result.to_parquet(path)`` wrote, or the folder or address that ``parquet=`` named. Nothing in
        it is run.
    frame
        The frame that it was made of, to attach the features to; by default the columns that are in the file.

    Returns
    -------
    Result
        With ``.frame``, ``.features``, ``["prefix"]``, ``.failures`` and ``.recipe`` as the Extraction had them, and
        ``.like(frame)`` to repeat it on other images.

    Raises
    ------
    RequestError
        Where the file is not there, is damaged, was not written by nbfeat, or by a newer one; where `frame` has other
        rows, or memory would not do.

    Examples
    --------
    >>> result = nbfeat.read("train.parquet")  # doctest: +SKIP
    >>> test = result.like(photos)  # doctest: +SKIP
    """
    if dataset.is_dataset(path):
        result = _read_dataset(Location.at(path), index_only=frame is not None)
    else:
        result = _read_file(_file(path))
    return result if frame is None else _attached(result, frame)


def read_recipe(path: str | Path) -> Recipe:
    """Read what it takes to repeat the result in a Parquet file, or in a folder of them, none of its rows."""
    if dataset.is_dataset(path):
        location = Location.at(path)
        return unpack(dataset.finished(location)[0].recipe, location.name)[0]
    return _described(_file(path))[0]


def write(
    path: str | Path, frame: pd.DataFrame, recipe: Recipe, failures: pd.DataFrame, without: Collection[Hashable] = ()
) -> None:
    """Write a result to a Parquet file, with all that it takes to repeat it."""
    rows = failures.assign(column=failures["column"].map(str)).itertuples(index=False)
    text = pack(recipe, [Failure(int(position), *rest) for position, *rest in rows])
    result_file.write(path, frame, text, {part.prefix: part.names for part in recipe.parts}, without)


def _read_file(file: Path) -> Result:
    recipe, failures = _described(file)
    frame = result_file.read(file, {part.prefix: part.names for part in recipe.parts})
    _check_columns(file, recipe, list(frame.columns))
    odd = [name for part in recipe.parts for name in part.names if frame.dtypes[name] != np.float32]
    if odd or any(not 0 <= failure.position < len(frame) for failure in failures):
        what = f"column {odd[0]}, which is not float32" if odd else "failures of rows that it has not"
        raise RequestError(f"{file.name} has {what}: it was changed after nbfeat wrote it. {AGAIN}")
    return Result(frame, _table(failures, frame.index), recipe)


def _described(file: Path) -> tuple[Recipe, list[Failure]]:
    footer = result_file.look(file)
    recipe, failures = unpack(footer.entries.get(RECIPE, b""), file.name)
    _check_columns(file, recipe, footer.columns)
    return recipe, failures


def _read_dataset(location: Location, *, index_only: bool) -> Result:
    import pandas as pd

    found = dataset.finished(location)
    recipe = unpack(found[0].recipe, location.name)[0]
    widths = {part.prefix: part.block.components or part.width for part in recipe.parts}
    rows, width = sum(part.rows for part in found), sum(widths.values())
    size, free = 4 * rows * width, memory.free_bytes()
    if free is not None and size > memory.SHARE * free:
        raise RequestError(
            f"{location.address} has {rows:,} rows × {width:,} features, {format_bytes(size)}, more than half of the "
            f"{format_bytes(free)} of free memory. Take what you need of it with polars.scan_parquet, DuckDB or "
            "pyarrow.dataset, or file by file with pandas.read_parquet."
        )
    own, matrices = dataset.read(location, found, widths, index_only=index_only)
    features = [
        pd.DataFrame(matrices[part.prefix], index=own.index, columns=part.names, copy=False) for part in recipe.parts
    ]
    starts = np.cumsum([0, *(part.rows for part in found)]).tolist()
    failures = [
        one._replace(position=start + one.position)
        for start, part in zip(starts, found, strict=False)
        for one in part.failures
    ]
    return Result(pd.concat([own, *features], axis=1), _table(failures, own.index), recipe)


def _table(failures: Sequence[Failure], index: pd.Index) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(failures, columns=list(Failure._fields))
    return table.set_axis(index.take(table["position"].to_numpy(int)))


def _file(path: str | Path) -> Path:
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        siblings = [one.name for one in file.parent.glob("*.parquet")] if file.parent.is_dir() else []
        way = near(file.name, siblings) or f"Relative paths start at {Path.cwd()}; check this one."
        raise RequestError(f"There is no file {os.fspath(path)!r}. {way}")
    return file


def _check_columns(file: Path, recipe: Recipe, columns: Sequence[str]) -> None:
    """Raise RequestError unless each of the recipe's columns is there once."""
    counts = Counter(columns)
    for part in recipe.parts:
        width = part.block.components or part.width
        # A width from elsewhere may be any number: look before so many names are made.
        if width > len(columns) or any(counts[name] != 1 for name in part.names):
            raise RequestError(
                f"{file.name} has not the {width:,} columns {part.prefix}_0000 … that it says it has: it was changed "
                f"after nbfeat wrote it. {AGAIN}"
            )


def _attached(result: Result, frame: pd.DataFrame) -> Result:
    """Return the features of a result beside the columns of `frame`, whose rows are the same."""
    if not frame.index.equals(result.frame.index):
        here, there = f"{len(frame):,} rows", f"{len(result.frame):,} rows"
        why = f"it has {here}, and {result.fitted.source} {there}" if here != there else "its index is another"
        raise RequestError(
            f"The frame is not the one that {result.fitted.source} was made of: {why}. Leave frame= away."
        )
    places = [place(frame, part.prefix, len(part.names), replace=False) for part in result.fitted.parts]
    blocks = [result[part.prefix].set_axis(frame.index) for part in result.fitted.parts]
    failures = result.failures.set_axis(frame.index.take(result.failures["position"].to_numpy(int)))
    return Result(attach(frame, blocks, places), failures, result.fitted)
