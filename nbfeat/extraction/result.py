"""Result: an extraction read back from Parquet; and `read`."""

from pathlib import Path, PurePath

import numpy as np
import pandas as pd

from nbfeat.errors import RequestError, format_bytes, listing
from nbfeat.extraction import columns, report
from nbfeat.extraction.columns import attach, places
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.feature_table import FeatureTable, failure_table
from nbfeat.extraction.recipe import check_columns, recipe_in, unpack
from nbfeat.images.sources import is_missing, name_of
from nbfeat.parquet import dataset, result_file
from nbfeat.parquet.location import Location
from nbfeat.parquet.result_file import AGAIN
from nbfeat.paths import existing_file


class Result(FeatureTable):
    """A finished extraction that `nbfeat.read` has read from Parquet: its features, failures and recipe."""

    like = Extraction.like

    def _report(self) -> report.Report:
        width, rows, source = len(self.columns), len(self.frame), self.fitted.source
        return report.Report(
            headline=f"{width:,} feature columns of {rows:,} rows, read from {source}",
            blocks=[report.read_row(part) for part in self.fitted.parts],
            footer=f"engine: {listing(self.recipe['engines']) or 'none'} · {self.fitted.precision}",
            total=rows * len(self.fitted.columns), failures=self.failures,
        )  # fmt: skip


def read(path: str | Path, frame: pd.DataFrame | None = None) -> Result:
    """Read a result that nbfeat wrote to a Parquet file or folder.

    Parameters
    ----------
    path : str or Path
        File from ``result.to_parquet(path)``, or folder or URL from ``parquet=``. No code in it is run.
    frame : DataFrame, optional
        Frame that the features were extracted from, to attach them to. By default the columns in the file.

    Returns
    -------
    Result
        With ``.frame``, ``.features``, ``["prefix"]``, ``.failures`` and ``.recipe`` like the Extraction, and
        ``.like(frame)`` to repeat it on other images.

    Raises
    ------
    RequestError
        The file doesn't exist, is damaged, or wasn't written by this version of nbfeat or an older one; the rows of
        `frame` differ; or the features don't fit into memory.

    Examples
    --------
    >>> result.to_parquet("features.parquet")
    >>> nbfeat.read("features.parquet").columns == result.columns
    True
    """
    if dataset.is_dataset(path):
        result = _read_dataset(Location.at(path), is_attached=frame is not None)
    else:
        result = _read_file(existing_file(path, "*.parquet"))
    return result if frame is None else _attached(result, frame)


def _read_file(file: Path) -> Result:
    recipe, failures = recipe_in(file)
    frame = result_file.read(file, {part.prefix: part.names for part in recipe.parts})
    check_columns(file, recipe, list(frame.columns))
    odd = [name for part in recipe.parts for name in part.names if frame.dtypes[name] != np.float32]
    if odd or any(not 0 <= failure.position < len(frame) for failure in failures):
        what = f"column {odd[0]}, which isn't float32" if odd else "failures of rows that don't exist"
        raise RequestError(f"{file.name} has {what}: it was changed after nbfeat wrote it. {AGAIN}")
    return Result(frame, failure_table(failures, frame.index), recipe)


def _read_dataset(location: Location, *, is_attached: bool) -> Result:
    found = dataset.finished(location)
    recipe = unpack(found[0].recipe, location.name)[0]
    widths = {part.prefix: part.block.components or part.width for part in recipe.parts}
    rows, width = sum(part.rows for part in found), sum(widths.values())
    size, free = 4 * rows * width, columns.free_bytes()
    if free is not None and size > columns.SHARE * free:
        raise RequestError(
            f"{location.address} has {rows:,} rows × {width:,} features, {format_bytes(size)}, more than half of the "
            f"{format_bytes(free)} of free memory. Use polars.scan_parquet, DuckDB or pyarrow.dataset to read a part "
            "of it, or pandas.read_parquet to read it file by file."
        )
    own, matrices = dataset.read(location, found, widths, recipe.columns if is_attached else None)
    features = [pd.DataFrame(matrices[part.prefix], own.index, part.names, copy=False) for part in recipe.parts]
    starts = np.cumsum([0, *(part.rows for part in found)]).tolist()
    with_starts = zip(starts, found, strict=False)
    failures = [one._replace(position=at + one.position) for at, part in with_starts for one in part.failures]
    return Result(pd.concat([own, *features], axis=1), failure_table(failures, own.index), recipe)


def _attached(result: Result, frame: pd.DataFrame) -> Result:
    if why := _difference(frame, result):
        source = result.fitted.source
        raise RequestError(f"{source} was extracted from a different frame: {why}. Pass that frame, or drop `frame`.")
    where = places(frame, result.fitted.parts, replace=False)
    blocks = [result[part.prefix].set_axis(frame.index) for part in result.fitted.parts]
    failures = result.failures.set_axis(frame.index.take(result.failures["position"].to_numpy(int)))
    return Result(attach(frame, blocks, where), failures, result.fitted)


def _difference(frame: pd.DataFrame, result: Result) -> str:
    if len(frame) != len(result.frame):
        return f"this one has {len(frame):,} rows, not {len(result.frame):,}"
    if not frame.index.equals(result.frame.index):
        return "the index differs"
    for column in map(str, result.fitted.columns):
        if column in result.frame.columns and list(frame.columns).count(column) == 1:
            for at, (here, there) in enumerate(zip(frame[column], result.frame[column], strict=True)):
                if not is_same(here, there):
                    return f"row {at:,} of {column} is {name_of(here)}, not {name_of(there)}"
    return ""


def is_same(image: object, other: object) -> bool:
    """Return whether two cells hold the same image, or none."""
    if isinstance(image, str | PurePath) and isinstance(other, str):
        return str(image) == other
    if image is other or is_missing(image) or is_missing(other):  # which can't be compared
        return is_missing(image) == is_missing(other)
    return np.array_equal(np.array(image, object), np.array(other, object))
