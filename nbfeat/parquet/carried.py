"""The columns of the user's frame that go into every part of a dataset, and what tells them from others."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from nbfeat.errors import RequestError, listing
from nbfeat.extraction.columns import own_columns
from nbfeat.images import fingerprint
from nbfeat.images.sources import is_missing, path_of

if TYPE_CHECKING:
    import pandas as pd

FAILURE = "failure"
SHOWN = 5
LONGEST = 10_000  # characters of a path
ROWS = 65_536  # that are looked at together


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """The frame's own columns as a table of Arrow, the index among them, and what was left out."""

    table: Any
    note: str

    def digests(self) -> list[list[str]]:
        """Return, for each column, its name and what tells its values from others."""
        return [[name, _digest(self.table.column(name))] for name in self.table.column_names]


def carried(frame: pd.DataFrame, *, images: Collection[Hashable], prefixes: Sequence[str], replace: bool) -> Carried:
    """Take the columns that Parquet can hold; of those with `images`, the ones that are text.

    Features that blocks of these `prefixes` made before are left out, since they are made anew.

    Raises
    ------
    RequestError
        Where a column has the name of one that is made, or Parquet cannot hold the index.
    """
    import pyarrow as pa

    made = {*prefixes, FAILURE}
    again = _made_before(frame, prefixes, replace=replace)
    counts = Counter(frame.columns)
    kept, lost = [], {}
    for position, label in enumerate(frame.columns):
        if position in again or (replace and label in made):
            continue
        reason = _why_not(frame.iloc[:, position], label, is_image=label in images, twice=counts[label] > 1)
        if reason:
            lost[repr(label)] = reason
        else:
            kept.append(position)
    _check_names([*(frame.columns[position] for position in kept), *frame.index.names], made)
    try:
        table = pa.Table.from_pandas(frame.iloc[:, kept])
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise RequestError(
            f"Parquet cannot hold the frame's index: {error}. Use frame.reset_index(drop=True)."
        ) from error
    shown = [f"{label} ({reason})" for label, reason in lost.items()]
    more = [f"{len(shown) - SHOWN:,} more"] if len(shown) > SHOWN else []
    return Carried(table, f"Left out of the files: {listing([*shown[:SHOWN], *more])}." if lost else "")


def digest_of_images(values: Iterable[object], root: Path) -> str:
    """Return what tells these cells of an image column from others: paths by where they lead, others by content."""
    told = hashlib.sha256()
    for value in values:
        one = _told(value, root)
        told.update(b"%d:%b" % (len(one), one))
    return told.hexdigest()


def _told(value: object, root: Path) -> bytes:
    text = ""
    try:
        source = value.get("bytes") if isinstance(value, Mapping) else value
        if (path := path_of(value, root)) is not None:
            text = path
        elif isinstance(source, bytes | bytearray | memoryview):
            return fingerprint.digest(bytes(source))
        elif isinstance(source, np.ndarray | Image.Image):
            return fingerprint.digest(source)
        elif not is_missing(source):
            text = f"{type(source).__name__} {source!r}"
    except Exception:  # an address that is not read, or an image that is broken in one of many ways
        text = str(value)
    return text[:LONGEST].encode(errors="surrogatepass")


def _made_before(frame: pd.DataFrame, prefixes: Sequence[str], *, replace: bool) -> set[int]:
    positions = {position for prefix in prefixes for position in own_columns(frame, prefix)}
    if replace:
        names = re.compile(rf"(?:{'|'.join(map(re.escape, prefixes))})_\d{{4,}}")
        positions |= {
            position
            for position, label in enumerate(frame.columns)
            if isinstance(label, str) and names.fullmatch(label)
        }
    return positions


def _why_not(values: pd.Series, label: Hashable, *, is_image: bool, twice: bool) -> str:
    """Say why a column cannot be carried; an empty string where it can."""
    import pyarrow as pa

    if not isinstance(label, str):
        return "only text names columns"
    if twice:
        return "each name stands for one column"
    if is_image and not all(isinstance(value, str) or is_missing(value) for value in values):
        return "images that are no text"
    try:
        pa.array(values, from_pandas=True)
    except (pa.ArrowException, ValueError, TypeError):
        kinds = Counter(type(value).__name__ for value in values.head(1000)).most_common(1)
        return f"values of type {kinds[0][0]}" if kinds else str(values.dtype)
    return ""


def _check_names(names: Iterable[Hashable], made: Collection[str]) -> None:
    taken = [name for name in names if name in made]
    if FAILURE in taken:
        raise RequestError(
            f"The frame has a column or index {FAILURE!r}, and so have the files: rename it, or use --replace."
        )
    if taken:
        raise RequestError(
            f"The frame has a column or index {taken[0]!r}, and so would the files have, for features: choose another "
            "name with --prefix, or overwrite it with --replace."
        )


def _digest(column: Any) -> str:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    told = hashlib.sha256(str(column.type).encode())
    for start in range(0, len(column), ROWS):
        some = pa.table({"": column.slice(start, ROWS)})
        for batch in some.combine_chunks().to_batches():
            told.update(memoryview(batch.serialize()))
    return told.hexdigest()
