"""Store a result in a Parquet file that any reader can open, with its recipe and checksums in the metadata."""

from __future__ import annotations

import errno
import hashlib
import io
import json
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np

from nbfeat.errors import RequestError, first_line, listing, near, sentences
from nbfeat.paths import file_written_whole

if TYPE_CHECKING:
    import pandas as pd

RECIPE, CHECKSUMS = b"nbfeat", b"nbfeat.sha256"  # metadata entries
START = b"PAR1" + RECIPE  # of each file; readers skip what belongs to no column
SHOWN = 5
ROWS, ROWS_OF_OBJECTS = 65_536, 1024  # hashed at a time
LARGE = 1_000_000  # bytes of metadata
AGAIN = "Extract the features again."
_REFUSALS = {
    "cut": "is not a Parquet file, or is damaged: its footer is corrupt.",
    "foreign": "was not written by nbfeat, or was rewritten by another program. Write a result with "
    "result.to_parquet(path).",
    "footer": "is damaged, or was rewritten by another program: its footer doesn't match its checksum.",
    "columns": "is damaged: its columns don't match their checksum.",
}
Damage = Literal["cut", "foreign", "footer", "columns"]


class Failure(NamedTuple):
    """An image that gave no features."""

    position: int
    column: str
    image: str
    reason: str

    @classmethod
    def read(cls, values: Sequence[Any]) -> Failure:
        """Read a failure from JSON values; raise ValueError if they are not one."""
        if [type(value) for value in values] != [int, str, str, str]:
            raise ValueError("not a failure")
        return cls(*values)


class DamagedError(ValueError):
    """A file differs from what nbfeat wrote: it is truncated or foreign, or its footer or columns changed."""

    def __init__(self, kind: Damage, reason: str = "") -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Footer:
    """The metadata of a file, verified with its checksums."""

    entries: Mapping[bytes, bytes]
    columns: Sequence[str]
    rows: int
    checksums: Mapping[str, str]  # of columns; a group of columns is named by its first


def write_table(sink: BinaryIO, table: Any, entries: Mapping[bytes, bytes], groups: Sequence[Sequence[str]]) -> None:
    """Write a table with `entries` in its metadata; each group of feature columns in `groups` gets one checksum."""
    import pyarrow as pa
    from pyarrow import parquet

    others = [name for name in table.column_names if name not in {name for names in groups for name in names}]
    metadata = table.schema.metadata or {}
    described = {**entries, b"pandas": metadata.get(b"pandas", b"")}
    checksums = {
        "entries": {name.decode(): hashlib.sha256(value).hexdigest() for name, value in described.items()},
        "columns": {names[0]: checksum(table, names) for names in [*groups, *([name] for name in others)]},
    }
    more = {**entries, CHECKSUMS: json.dumps(checksums).encode()}
    is_large = sum(map(len, more.values())) > LARGE
    if not is_large:  # other tools preserve schema metadata, but the file stores it twice
        table = table.replace_schema_metadata({**metadata, **more})
    # Features rarely repeat, so dictionary encoding would not help.
    out = pa.PythonFile(sink, "w")
    with parquet.ParquetWriter(out, table.schema, use_dictionary=others, write_page_checksum=True) as writer:
        out.write(START[out.tell() :])
        writer.write_table(table)
        if is_large:
            writer.add_key_value_metadata(more)


def read_footer(file: Any) -> Footer:
    """Read the metadata of an open file; raise DamagedError if it isn't what nbfeat wrote."""
    from pyarrow import parquet

    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 8))
    if (tail := bytes(file.read(8)))[4:] != b"PAR1" or int.from_bytes(tail[:4], "little") > size - 12:
        raise DamagedError("cut")
    with damage_as("footer"):
        opened = parquet.ParquetFile(file)
        if CHECKSUMS not in (entries := opened.metadata.metadata or {}):
            raise DamagedError("foreign")
        checksums = json.loads(entries[CHECKSUMS])
        for name, value in {"pandas": "", RECIPE.decode(): "", **checksums["entries"]}.items():
            if hashlib.sha256(entries.get(name.encode(), b"")).hexdigest() != value:
                raise DamagedError("footer")
        return Footer(entries, opened.schema_arrow.names, opened.metadata.num_rows, dict(checksums["columns"]))


def read_table(file: Any, groups: Sequence[Sequence[str]]) -> Any:
    """Read all columns of an open file; raise DamagedError if they don't match their checksums."""
    from pyarrow import parquet

    footer = read_footer(file)
    with damage_as("columns"):
        table = parquet.ParquetFile(file, page_checksum_verification=True).read()
        together = {names[0]: names for names in groups}
        for name in {**footer.checksums, **together}:
            if checksum(table, together.get(name, [name])) != footer.checksums[name]:
                raise DamagedError("columns", f"column {name} doesn't match its checksum")
    return table


@contextmanager
def damage_as(kind: Damage) -> Iterator[None]:
    """Turn any error that a library raises for damaged bytes into DamagedError."""
    try:
        yield
    except Exception as error:
        is_of_disk = isinstance(error, OSError) and error.errno not in {None, errno.EINVAL}
        if is_of_disk or isinstance(error, DamagedError | MemoryError):  # the bytes aren't damaged, or it was said
            raise
        raise DamagedError(kind, first_line(error)[:100]) from error


def checksum(table: Any, names: Sequence[str]) -> str:
    """Return the SHA-256 of columns' values, which other tools don't change when they rewrite the file."""
    hasher = hashlib.sha256()
    for name in names:
        for some in _bytes_of(table.column(name)):
            hasher.update(some)
    return hasher.hexdigest()


def _bytes_of(column: Any) -> Iterator[Any]:
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if hasattr(column.type, "storage_type"):  # an extension type, which other processes may lack
        column = column.cast(column.type.storage_type)
    yield str(getattr(column.type, "tz", "")).encode()
    column = _as_numbers(column)
    is_list = types.is_fixed_size_list(column.type)
    kind = column.type.value_type if is_list else column.type
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    step = ROWS if is_number else ROWS_OF_OBJECTS
    for start in range(0, len(column), step):
        some = column.slice(start, step).combine_chunks()
        if is_number:
            some = some.flatten() if is_list else some
            yield np.packbits(some.is_null().to_numpy(zero_copy_only=False))
            yield np.ascontiguousarray(some.drop_null().to_numpy(zero_copy_only=False))
        else:
            plain = lambda value: hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
            yield json.dumps(some.to_pylist(), default=plain).encode()


def _as_numbers(column: Any) -> Any:
    """Return dates and times as numbers, because Parquet has no unit of seconds and stores dates only as days."""
    import pyarrow as pa
    from pyarrow import compute, types

    unit = getattr(column.type, "unit", "")
    if types.is_date(column.type):
        column = column.cast(pa.date32())
    elif not unit:
        return column
    column = column.cast(pa.int32() if column.type.bit_width == 32 else pa.int64()).cast(pa.int64())
    return compute.multiply(column, 1000) if unit == "s" else column


def write(
    path: str | Path, frame: pd.DataFrame, recipe: str, blocks: Mapping[str, Sequence[str]],
    without: Collection[Hashable] = (),
) -> None:  # fmt: skip
    """Write `frame` like pandas, with `recipe`; `blocks` maps prefixes to the names of feature columns."""
    import pyarrow as pa

    if not (final := Path(path).expanduser().resolve()).parent.is_dir():
        raise RequestError(f"The folder {final.parent} doesn't exist: create it, or write elsewhere.")
    made = {name for names in blocks.values() for name in names}
    if lost := made.difference(frame.columns):
        raise RequestError(f"The frame is missing {len(lost):,} of its {len(made):,} feature columns: extract again.")
    for label in (without := [without] if isinstance(without, str) else list(without)):
        if label not in frame.columns or label in made:
            others = [str(column) for column in frame.columns if column not in made]
            why = "is a feature, and features are always written" if label in made else "is not in the frame"
            raise RequestError(sentences(f"Column {label!r} cannot be left out: it {why}.", near(str(label), others)))
    frame = frame.drop(columns=without) if without else frame
    _check_names(frame)
    try:
        table = pa.Table.from_pandas(frame)
        with file_written_whole(final) as temporary, temporary.open("wb") as sink:
            write_table(sink, table, {RECIPE: recipe.encode()}, list(blocks.values()))
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise _cannot_hold(frame, error) from error


def look(file: Path) -> Footer:
    """Read the metadata of a result file."""
    with _refused(file), file.open("rb") as opened:
        return read_footer(opened)


def read(file: Path, blocks: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Read the frame of a result; `blocks` maps prefixes to the names of feature columns."""
    with _refused(file), file.open("rb") as opened:
        table = read_table(opened, list(blocks.values()))
    try:
        frame: pd.DataFrame = table.to_pandas()
    except Exception as error:
        raise RequestError(f"{file.name} has columns that cannot be read: {first_line(error)}. {AGAIN}") from error
    return frame


@contextmanager
def _refused(file: Path) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        way = "" if error.kind == "foreign" else AGAIN
        raise RequestError(sentences(f"{file.name} {_REFUSALS[error.kind]}", way)) from error
    except OSError as error:
        raise RequestError(f"{file.name} cannot be read: {first_line(error)}. {AGAIN}") from error


def _check_names(frame: pd.DataFrame) -> None:
    odd = [repr(label) for label in frame.columns if not isinstance(label, str)]
    twice = [repr(label) for label, count in Counter(frame.columns).items() if count > 1]
    if odd or twice:
        why = f"{listing((odd or twice)[:SHOWN])}: column names must be {'text' if odd else 'unique'}"
        way = "extract again, which uses the cached features; or leave it out with `without=[…]`"
        raise RequestError(f"Parquet cannot store column {why}. Rename it in your frame and {way}.")


def _cannot_hold(frame: pd.DataFrame, error: Exception) -> RequestError:
    if not (bad := {repr(label): kind for label in frame.columns if (kind := unholdable(frame[label]))}):
        return RequestError(f"Parquet cannot store this frame: {first_line(error)}. Change it and extract again.")
    problem = f"Parquet cannot store column {listing([f'{label} ({kind})' for label, kind in bad.items()][:SHOWN])}."
    way = f"Leave it out with to_parquet(path, without=[{next(iter(bad))}]); or convert it to text or bytes"
    return RequestError(f"{problem} {way} in your frame and extract again.")


def unholdable(values: pd.Series) -> str:
    """Describe values that Parquet cannot store; an empty string if it can."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        kind = pa.array(values, from_pandas=True).type
        parquet.ParquetWriter(pa.BufferOutputStream(), pa.schema([("", kind)])).close()  # Arrow has types without data
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        kinds = Counter(type(value).__name__ for value in values.head(1000)).most_common(1)
        return f"values of type {kinds[0][0]}" if kinds else str(values.dtype)
    return ""
