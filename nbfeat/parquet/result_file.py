"""A result in a Parquet file: a table for any reader, with all that it takes to repeat it in the footer."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbfeat.errors import RequestError, listing, near, sentences
from nbfeat.extraction.packed import Failure, UnreadableError, pack, unpack
from nbfeat.extraction.recipe import Recipe
from nbfeat.parquet import sealed
from nbfeat.paths import file_written_whole

if TYPE_CHECKING:
    import pandas as pd

    from nbfeat.extraction.result import Result

KEY = b"nbfeat"  # an entry of the footer
SHOWN = 5
_ANEW = "Extract the features anew."


def write(
    path: str | Path, frame: pd.DataFrame, recipe: Recipe, failures: pd.DataFrame, without: Collection[Hashable] = ()
) -> None:
    """Write `frame`, its own columns as pandas writes them, with `recipe` and `failures`; whole or not at all."""
    import pyarrow as pa

    final = Path(path).expanduser().resolve()
    if not final.parent.is_dir():
        raise RequestError(f"There is no folder {final.parent}: make it first, or write elsewhere.")
    made = {name for part in recipe.parts for name in part.names}
    if lost := made.difference(frame.columns):
        raise RequestError(
            f"The frame has lost {len(lost):,} of its {len(made):,} features since they were made: extract again."
        )
    frame = _without(frame, without, made)
    _check_names(frame)
    rows = failures.assign(column=failures["column"].map(str)).itertuples(index=False)
    text = pack(recipe, [Failure(int(position), *rest) for position, *rest in rows]).encode()
    try:
        table = pa.Table.from_pandas(frame)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise _cannot_hold(frame, error) from error
    others = [name for name in table.column_names if name not in made]  # few features of a column are the same
    with (
        file_written_whole(final) as temporary,
        temporary.open("wb") as sink,
        sealed.writer(sink, table.schema, {KEY: text}, use_dictionary=others) as writer,
    ):
        writer.write_table(table)


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
    from nbfeat.parquet import dataset

    if dataset.is_dataset(path):
        return dataset.read(path, frame)
    result = _read_file(_file(path))
    return result if frame is None else dataset.attached(result, frame)


def _read_file(file: Path) -> Result:
    import pandas as pd
    import pyarrow as pa

    recipe, failures = _footer(file, whole=True)
    try:
        frame = pd.read_parquet(file)
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise RequestError(f"{file.name} has columns that cannot be read: {_first_line(error)}. {_ANEW}") from error
    _check_columns(file, recipe, list(frame.columns))
    odd = [name for part in recipe.parts for name in part.names if frame.dtypes[name] != np.float32]
    if odd or any(not 0 <= failure.position < len(frame) for failure in failures):
        what = f"column {odd[0]}, which is not float32" if odd else "failures of rows that it has not"
        raise RequestError(f"{file.name} has {what}: it was changed after nbfeat wrote it. {_ANEW}")
    table = pd.DataFrame(failures, columns=list(Failure._fields))
    table.index = frame.index.take(table["position"].to_numpy(int))
    from nbfeat.extraction.result import Result

    return Result(frame, table, recipe)


def read_recipe(path: str | Path) -> Recipe:
    """Read what it takes to repeat the result in a Parquet file, or in a folder of them, none of its rows."""
    from nbfeat.parquet import dataset

    if dataset.is_dataset(path):
        return dataset.read_recipe(path)
    return _footer(_file(path))[0]


def _file(path: str | Path) -> Path:
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        siblings = [one.name for one in file.parent.glob("*.parquet")] if file.parent.is_dir() else []
        way = near(file.name, siblings) or f"Relative paths start at {Path.cwd()}; check this one."
        raise RequestError(f"There is no file {os.fspath(path)!r}. {way}")
    return file


def _footer(file: Path, *, whole: bool = False) -> tuple[Recipe, list[Failure]]:
    """Read the footer, once it is sure to be what was written; with `whole`, all before it, too."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with file.open("rb") as opened:
            footer = sealed.footer(opened)
            with parquet.ParquetFile(sealed.alone(footer)) as read:
                entries, columns = read.metadata.metadata or {}, list(read.schema_arrow.names)
            is_whole = not whole or sealed.Body.of(entries, footer).is_in(opened)
    except sealed.UnsealedError as error:
        raise _unsealed(file.name, error) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RequestError(f"{file.name} cannot be read: {_first_line(error)}. {_ANEW}") from error
    if not is_whole:
        raise RequestError(f"{file.name} is damaged: its columns do not agree with their checksum. {_ANEW}")
    recipe, failures = believed(entries, file.name)
    _check_columns(file, recipe, columns)
    return recipe, failures


def believed(entries: Mapping[bytes, bytes], name: str) -> tuple[Recipe, list[Failure]]:
    """Return the recipe and the failures in the footer of the file `name`, checked; or raise RequestError."""
    try:
        recipe, failures = unpack(entries.get(KEY, b""), name)
    except UnreadableError as error:
        way = "Install that version to read it." if "newer" in str(error) else _ANEW
        raise RequestError(f"{name} cannot be read as a result of nbfeat: {error}. {way}") from error
    return recipe, failures


def _unsealed(name: str, error: sealed.UnsealedError) -> RequestError:
    if not error.is_parquet:
        return RequestError(f"{name} is not a Parquet file, or is damaged: its end is another. {_ANEW}")
    if not error.is_sealed:
        return RequestError(
            f"{name} was not written by nbfeat, or was written anew by something else since. Write a result with "
            "result.to_parquet(path)."
        )
    return RequestError(
        f"{name} is damaged, or was written anew by something else: its footer does not agree with its checksum. "
        f"{_ANEW}"
    )


def _check_columns(file: Path, recipe: Recipe, columns: Sequence[str]) -> None:
    """Raise RequestError unless each of the recipe's columns is there once."""
    counts = Counter(columns)
    for part in recipe.parts:
        width = part.block.components or part.width
        # A width from elsewhere may be any number: look before so many names are made.
        if width > len(columns) or any(counts[name] != 1 for name in part.names):
            raise RequestError(
                f"{file.name} has not the {width:,} columns {part.prefix}_0000 … that it says it has: it was changed "
                f"after nbfeat wrote it. {_ANEW}"
            )


def _without(frame: pd.DataFrame, without: Collection[Hashable], made: Collection[str]) -> pd.DataFrame:
    if isinstance(without, str):
        without = [without]
    for label in without:
        if label not in frame.columns or label in made:
            others = [str(column) for column in frame.columns if column not in made]
            why = "is a feature, and those are written whole" if label in made else "is not in the frame"
            raise RequestError(sentences(f"Column {label!r} cannot be left out: it {why}.", near(str(label), others)))
    return frame.drop(columns=list(without)) if without else frame


def _check_names(frame: pd.DataFrame) -> None:
    odd = [repr(label) for label in frame.columns if not isinstance(label, str)]
    twice = [repr(label) for label, count in Counter(frame.columns).items() if count > 1]
    if odd or twice:
        why = "only text names columns" if odd else "each name stands for one column"
        raise RequestError(
            f"Parquet cannot hold column {listing((odd or twice)[:SHOWN])}: {why}. Rename it in your frame and extract "
            "again, which takes the features from the cache; or leave it out with without=[…]."
        )


def _cannot_hold(frame: pd.DataFrame, error: Exception) -> RequestError:
    """Name the columns that Parquet cannot hold, by trying each."""
    import pyarrow as pa

    bad: list[str] = []
    for label in frame.columns:
        try:
            pa.array(frame[label], from_pandas=True)
        except (pa.ArrowException, ValueError, TypeError):
            bad.append(f"{label!r} ({_kind(frame[label])})")
    if not bad:
        return RequestError(f"Parquet cannot hold this frame: {_first_line(error)}. Change it and extract again.")
    first = bad[0].rpartition(" (")[0]
    return RequestError(
        f"Parquet cannot hold column {listing(bad[:SHOWN])}. Leave it out: to_parquet(path, without=[{first}]); or "
        "make it text or bytes in your frame, and extract again."
    )


def _kind(values: pd.Series) -> str:
    kinds: Any = Counter(type(value).__name__ for value in values.head(1000))
    return f"values of type {kinds.most_common(1)[0][0]}" if kinds else str(values.dtype)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__
