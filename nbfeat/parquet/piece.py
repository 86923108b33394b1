"""One file of a dataset: some rows of the frame, a list of numbers for each block, and in the footer what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import RequestError
from nbfeat.extraction.packed import Failure, pack
from nbfeat.extraction.recipe import Recipe
from nbfeat.parquet import sealed
from nbfeat.parquet.carried import FAILURE
from nbfeat.parquet.location import Shelf
from nbfeat.parquet.result_file import KEY, believed

FORMAT = 1  # raised whenever what older versions of nbfeat read would mean something else
ABOUT = b"nbfeat.part"  # an entry of the footer, beside KEY
RAW = ".raw"  # the folder of those that are not normalized yet


class ForeignError(ValueError):
    """The file is not one that nbfeat wrote as a part of a dataset."""


@dataclass(frozen=True, slots=True)
class About:
    """Which part of which dataset a file is."""

    made: str  # the same in all files of one dataset, and in those of no other
    number: int
    of: int  # how many there are
    chunk: int  # rows in each but the last
    raw: bool  # whether its features are to be normalized still
    request: Mapping[str, Any]  # what the dataset is of

    @property
    def name(self) -> str:
        """The name of the file."""
        return file_name(self.number, raw=self.raw)


@dataclass(frozen=True, slots=True)
class Piece:
    """What the footer of a file says."""

    about: About
    recipe: Recipe
    failures: Sequence[Failure]  # positions count from the first row of the file
    rows: int
    body: sealed.Body | None = None  # what comes before the footer; None where that was just written


def file_name(number: int, *, raw: bool = False) -> str:
    """Return the name of a part: names in their order are rows in their order."""
    return f"{RAW}/part-{number:05d}.parquet" if raw else f"part-{number:05d}.parquet"


def write(
    shelf: Shelf,
    about: About,
    own: Any,
    recipe: Recipe,
    matrices: Sequence[NDArray[np.float32]],
    failures: Sequence[Failure],
) -> None:
    """Write a part: the `own` columns, the matrix of each part of the recipe, and reasons of failures."""
    import pyarrow as pa

    arrays = {name: own.column(name) for name in own.column_names}
    for part, matrix in zip(recipe.parts, matrices, strict=True):
        arrays[part.prefix] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
    arrays[FAILURE] = pa.array(_reasons(failures, len(matrices[0]), recipe), pa.string())
    schema = pa.schema([(name, array.type) for name, array in arrays.items()], own.schema.metadata)
    table = pa.Table.from_arrays(list(arrays.values()), schema=schema)
    text, told = pack(recipe, failures).encode(), json.dumps({"format": FORMAT, **asdict(about)}).encode()
    others = [name for name in arrays if name not in {part.prefix for part in recipe.parts}]
    with (
        shelf.writing(about.name) as sink,
        sealed.writer(
            sink, schema, {KEY: text, ABOUT: told}, use_dictionary=others, write_page_checksum=True
        ) as writer,
    ):
        writer.write_table(table)


def look(shelf: Shelf, name: str) -> Piece | None:
    """Read what the footer of a file says; None where it was cut short, or is no Parquet file at all.

    Raises
    ------
    ForeignError
        Where nbfeat did not write it as a part.
    RequestError
        Where nbfeat wrote it, and it was changed since.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with shelf.opened(name) as file:
            footer = sealed.footer(file)
        with parquet.ParquetFile(sealed.alone(footer)) as opened:
            entries, schema, rows = opened.metadata.metadata or {}, opened.schema_arrow, opened.metadata.num_rows
    except sealed.UnsealedError as error:
        if not error.is_parquet:
            return None
        raise (changed(shelf, name) if error.is_sealed else ForeignError(name)) from error
    except (pa.ArrowException, ValueError) as error:
        raise changed(shelf, name) from error
    if ABOUT not in entries:
        raise ForeignError(name)
    about = _about(shelf, name, entries[ABOUT])
    recipe, failures = believed(entries, name)
    for part in recipe.parts:
        places = schema.get_all_field_indices(part.prefix)
        if len(places) != 1 or not _holds(schema.field(places[0]).type, part.block.components or part.width):
            raise changed(shelf, name)
    if about.name != name or any(not 0 <= failure.position < rows for failure in failures):
        raise changed(shelf, name)
    return Piece(about, recipe, failures, rows, sealed.Body.of(entries, footer))


def matrices_of(shelf: Shelf, there: Piece, recipe: Recipe) -> list[NDArray[np.float32]]:
    """Read the features of all blocks from a file, every byte of which is compared with what was written."""
    import pyarrow as pa

    name = there.about.name
    with shelf.opened(name) as file:
        whole = pa.BufferReader(file.read_buffer())
    if there.body and not there.body.is_in(whole):
        raise _damaged(shelf, name, "its columns do not agree with their checksum")
    table = _columns_of(whole, shelf, name, [part.prefix for part in recipe.parts])
    return [_rows_in(table, shelf, name, part.prefix, len(part.names)) for part in recipe.parts]


def rows_of(shelf: Shelf, name: str, prefix: str, width: int) -> NDArray[np.float32]:
    """Read the features of one block from a file."""
    return _rows_in(columns_of(shelf, name, [prefix]), shelf, name, prefix, width)


def _rows_in(table: Any, shelf: Shelf, name: str, prefix: str, width: int) -> NDArray[np.float32]:
    lists = table.column(prefix).combine_chunks()
    numbers = lists.flatten()  # lists that are null have none
    if len(numbers) != table.num_rows * width or numbers.null_count:
        raise changed(shelf, name)
    rows: NDArray[np.float32] = numbers.to_numpy(zero_copy_only=False).reshape(-1, width)
    return rows


def columns_of(shelf: Shelf, name: str, columns: Sequence[str]) -> Any:
    """Read columns of a file as a table; pages whose checksums are wrong are an error."""
    with shelf.opened(name) as file:
        return _columns_of(file, shelf, name, columns)


def _columns_of(file: Any, shelf: Shelf, name: str, columns: Sequence[str]) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            table = opened.read(columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        if getattr(error, "errno", None):
            raise
        raise _damaged(shelf, name, str(error).splitlines()[0][:100]) from error
    return table.select(list(columns))  # a name with dots may have brought others along


def _damaged(shelf: Shelf, name: str, reason: str) -> RequestError:
    return RequestError(
        f"{shelf.name}{name} is damaged ({reason}): remove that file, and run again what wrote it; only its rows are "
        "computed anew."
    )


def changed(shelf: Shelf, name: str) -> RequestError:
    """Return the error of a file that is not as nbfeat wrote it."""
    return RequestError(
        f"{shelf.name}{name} was changed after nbfeat wrote it: remove that file, and run again what wrote it."
    )


def _about(shelf: Shelf, name: str, text: bytes) -> About:
    try:
        values = json.loads(text)
        number = values.pop("format")
        about = About(**values)
        fits = (
            isinstance(about.made, str)
            and all(type(value) is int for value in (number, about.number, about.of, about.chunk))
            and 0 <= about.number < about.of
            and about.chunk > 0
            and isinstance(about.raw, bool)
            and isinstance(about.request, dict)
        )
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise changed(shelf, name) from error
    if not fits:
        raise changed(shelf, name)
    if number != FORMAT:
        raise RequestError(
            f"{shelf.name}{name} was written by a newer nbfeat (format {number}, this one reads {FORMAT}). Install "
            "that version to read it."
        )
    return about


def _holds(kind: Any, width: int) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_fixed_size_list(kind) and kind.list_size == width and kind.value_type == pa.float32())


def _reasons(failures: Sequence[Failure], rows: int, recipe: Recipe) -> list[str | None]:
    several = len(recipe.columns) > 1
    found: dict[int, list[str]] = {}
    for failure in failures:
        told = f"{failure.column}: {failure.reason}" if several else failure.reason
        found.setdefault(failure.position, []).append(told)
    return ["; ".join(found[row]) if row in found else None for row in range(rows)]
