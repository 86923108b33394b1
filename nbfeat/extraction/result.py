"""Result: an extraction that was read back from Parquet, and `read`, which makes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd

from nbfeat.errors import RequestError, format_bytes, listing
from nbfeat.extraction import columns, report
from nbfeat.extraction.columns import attach, places
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.feature_table import FeatureTable
from nbfeat.extraction.recipe import check_columns, existing_file, recipe_in, unpack
from nbfeat.extraction.request import Frame
from nbfeat.images.sources import is_missing, name_of
from nbfeat.parquet import dataset, result_file
from nbfeat.parquet.location import Location
from nbfeat.parquet.result_file import AGAIN, Failure


class Result(FeatureTable):
    """What an Extraction made, read from the Parquet file that it was written to; `nbfeat.read` makes it."""

    def like(self, frame: Frame, **options: Any) -> Extraction:
        """Repeat this on another frame, to the end, as `Extraction.like` does."""
        return Extraction(frame, like=self, **options).run()

    def _report(self) -> report.Report:
        width, rows, source = len(self.columns), len(self.frame), self.fitted.source
        return report.Report(
            headline=f"{width:,} columns of features of {rows:,} rows, read from {source}",
            blocks=[report.read_row(part) for part in self.fitted.parts],
            total=rows * len(self.fitted.columns),
            failures=self.failures,
            footer=f"made by {listing(self.recipe['engines']) or 'nothing'} · {self.fitted.precision}",
        )


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
        result = _read_dataset(Location.at(path), is_attached=frame is not None)
    else:
        result = _read_file(existing_file(path))
    return result if frame is None else _attached(result, frame)


def _read_file(file: Path) -> Result:
    recipe, failures = recipe_in(file)
    frame = result_file.read(file, {part.prefix: part.names for part in recipe.parts})
    check_columns(file, recipe, list(frame.columns))
    odd = [name for part in recipe.parts for name in part.names if frame.dtypes[name] != np.float32]
    if odd or any(not 0 <= failure.position < len(frame) for failure in failures):
        what = f"column {odd[0]}, which is not float32" if odd else "failures of rows that it has not"
        raise RequestError(f"{file.name} has {what}: it was changed after nbfeat wrote it. {AGAIN}")
    return Result(frame, _table(failures, frame.index), recipe)


def _read_dataset(location: Location, *, is_attached: bool) -> Result:
    found = dataset.finished(location)
    recipe = unpack(found[0].recipe, location.name)[0]
    widths = {part.prefix: part.block.components or part.width for part in recipe.parts}
    rows, width = sum(part.rows for part in found), sum(widths.values())
    size, free = 4 * rows * width, columns.free_bytes()
    if free is not None and size > columns.SHARE * free:
        raise RequestError(
            f"{location.address} has {rows:,} rows × {width:,} features, {format_bytes(size)}, more than half of the "
            f"{format_bytes(free)} of free memory. Take what you need of it with polars.scan_parquet, DuckDB or "
            "pyarrow.dataset, or file by file with pandas.read_parquet."
        )
    own, matrices = dataset.read(location, found, widths, recipe.columns if is_attached else None)
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
    table = pd.DataFrame(failures, columns=list(Failure._fields))
    return table.set_axis(index.take(table["position"].to_numpy(int)))


def _attached(result: Result, frame: pd.DataFrame) -> Result:
    """Return the features of a result beside the columns of `frame`, whose rows are the same."""
    if why := _difference(frame, result):
        source = result.fitted.source
        raise RequestError(f"The frame is not the one that {source} was made of: {why}. Leave frame= away.")
    where = places(frame, result.fitted.parts, replace=False)
    blocks = [result[part.prefix].set_axis(frame.index) for part in result.fitted.parts]
    failures = result.failures.set_axis(frame.index.take(result.failures["position"].to_numpy(int)))
    return Result(attach(frame, blocks, where), failures, result.fitted)


def _difference(frame: pd.DataFrame, result: Result) -> str:
    if len(frame) != len(result.frame):
        return f"it has {len(frame):,} rows, and {result.fitted.source} {len(result.frame):,} rows"
    if not frame.index.equals(result.frame.index):
        return "its index is another"
    for column in map(str, result.fitted.columns):
        if column in result.frame.columns and list(frame.columns).count(column) == 1:
            for at, (here, there) in enumerate(zip(frame[column], result.frame[column], strict=True)):
                if not _is_same(here, there):
                    return f"row {at:,} of {column} is {name_of(here)}, and there {name_of(there)}"
    return ""


def _is_same(image: object, other: object) -> bool:
    if isinstance(image, str | PurePath) and isinstance(other, str):
        return str(image) == other
    return np.array_equal(np.array(image, object), np.array(other, object)) or (is_missing(image) and is_missing(other))
