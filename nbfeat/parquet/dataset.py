"""A dataset: a folder of Parquet files, each with some of a frame's rows, that an interrupted run can resume.

A JSON manifest describes the dataset: in its own file until all parts exist, and permanently in each part. Features
wait in a hidden folder until the normalization is fitted on all of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import RequestError, listing
from nbfeat.images.sources import is_missing
from nbfeat.parquet import result_file
from nbfeat.parquet.location import LOCK, Location
from nbfeat.parquet.result_file import RECIPE, SHOWN, DamagedError, Failure, damage_as

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 3  # increased whenever older versions of nbfeat would misread the files
MANIFEST, RAW, FAILURE = ".nbfeat.json", ".raw", "failure"
PART = b"nbfeat.part"  # a metadata entry, next to RECIPE
LARGEST_COPY, REFERENCE = 100_000, "sha256 "  # a recipe of more bytes is only in the first part
_PART = re.compile(rf"part-\d{{5,}}\.parquet|{re.escape(RAW)}/part-\d{{5,}}\.npz")
_HALF = re.compile(rf"(?:{re.escape(RAW)}/)?\.(?:part-\d{{5,}}\.(?:parquet|npz)|\.nbfeat\.json)-[0-9a-f]{{8}}")
_MANIFEST: Mapping[str, type] = {"format": int, "made": str, "chunk": int, "request": dict}

Matrices = Mapping[str, NDArray[np.float32]]  # by prefix
Failures = Sequence[Failure]


@dataclass(frozen=True, slots=True)
class Part:
    """The metadata of one file of a dataset."""

    number: int
    manifest: Mapping[str, Any]  # of the dataset
    recipe: str  # JSON
    failures: Failures  # positions count from the part's first row
    rows: int
    files: str  # digest of the states of the image files
    is_raw: bool = False  # in the hidden folder

    @property
    def name(self) -> str:
        """The file's name in the dataset's folder."""
        return _raw_name(self.number) if self.is_raw else _name(self.number, _count(self.manifest))


class Dataset:
    """The parts of the dataset for `request` at `location`, whether already written or not."""

    def __init__(self, location: Location, request: Mapping[str, Any], *, replace: bool) -> None:
        self.location, self.request, self._starts_over = location, request, replace
        self._forget([])

    def _forget(self, useless: Sequence[str], *, replaces: bool = False) -> None:
        self._made = secrets.token_hex(8)  # an ID shared by all files of this dataset
        self.chunk = 0  # rows in every part but the last, once decided
        self.parts: dict[int, Part] = {}
        self.raw: dict[int, Part] = {}  # parts whose features are not yet normalized
        self._replaces, self._useless = replaces, list(useless)  # parts of a different request may be removed

    @property
    def _manifest(self) -> dict[str, Any]:
        return {"format": FORMAT, "made": self._made, "chunk": self.chunk, "request": dict(self.request)}

    @property
    def count(self) -> int:
        """The number of parts of the finished dataset: at least one, which may be empty."""
        return _count(self._manifest)

    @property
    def there(self) -> dict[int, Part]:
        """The existing parts, normalized or not."""
        return {**self.raw, **self.parts}

    @property
    def is_finished(self) -> bool:
        """Whether all parts exist."""
        return bool(self.parts) and len(self.parts) == self.count

    def rows(self, number: int) -> range:
        """Return the rows of a part."""
        return range(number * self.chunk, min(self.request["rows"], (number + 1) * self.chunk))

    def survey(self) -> None:
        """Inspect existing files; raise RequestError if they don't match and must not be replaced."""
        sizes = self.location.sizes([RAW])
        names = sorted(name for name in sizes if _PART.fullmatch(name))
        halves = [name for name in sizes if _HALF.fullmatch(name)]
        if foreign := [name for name in sizes if name not in {*names, *halves, MANIFEST, LOCK}]:
            raise _foreign(self.location, foreign)
        self._forget([*halves, *names])
        if not names:  # a manifest without parts doesn't matter
            return
        begun = _read_manifest(self.location) if MANIFEST in sizes else None
        found = _look(self.location, names, is_begun=begun is not None)
        if not begun and not any(found.values()):  # the one with their recipe is gone
            return
        manifest = begun or next(part.manifest for part in found.values() if part)
        try:
            difference = next(_differences(manifest["request"], self.request), "")
        except (LookupError, TypeError, ValueError, AttributeError):  # the file may contain anything
            difference = "it cannot be read"
        if difference:
            self.refuse(difference)
            return
        self._made, self.chunk, self._useless = manifest["made"], manifest["chunk"], halves
        self._replaces = begun is not None and begun["replaces"]
        for name, part in found.items():
            if part is None or (part.manifest != self._manifest and self._replaces):
                self._useless.append(name)  # damaged, or from an earlier dataset
            elif part.manifest != self._manifest or part.rows != len(self.rows(part.number)):
                raise _refusal(self.location, name)
            else:
                (self.raw if part.is_raw else self.parts)[part.number] = part
        if self.is_finished and not begun and self._starts_over:
            self._forget([*halves, *names], replaces=True)

    def refuse(self, difference: str) -> None:
        """Raise RequestError about the existing dataset, or replace it if requested."""
        if not self._starts_over:
            way = "Write to another folder, or replace this one with `replace=True`."
            raise RequestError(f"{self.location.address} was written for a different request: {difference}. {way}")
        self.drop([*self.there])
        self._forget(self._useless, replaces=True)

    def drop(self, numbers: Sequence[int]) -> None:
        """Forget parts, which are then written again."""
        gone = [parts.pop(number) for number in numbers for parts in (self.parts, self.raw) if number in parts]
        self._useless += [part.name for part in gone]

    def begin(self) -> None:
        """Write the manifest before the first part, and remove files that are no longer needed."""
        if not self.is_finished:
            with self.location.writing(MANIFEST) as sink:
                sink.write(json.dumps({**self._manifest, "replaces": self._replaces}).encode())
        for name in self._useless:
            self.location.remove(name)
        for number in set(self.raw) & set(self.parts):  # killed before the raw file was removed
            self.remove_raw(number)
        self._useless = []

    def write(self, number: int, own: Any, matrices: Matrices, recipe: str, failures: Failures, files: str) -> None:
        """Write a part: the frame's `own` columns, the features by prefix, and the reasons of failures."""
        import pyarrow as pa

        arrays = {name: own.column(name) for name in own.column_names}
        for prefix, matrix in matrices.items():
            arrays[prefix] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
        reasons: dict[int, str] = {}
        for position, column, _, reason in failures:
            text = f"{column}: {reason}" if len(self.request["images"]) > 1 else reason
            reasons[position] = f"{reasons[position]}; {text}" if position in reasons else text
        arrays[FAILURE] = pa.array(map(reasons.get, range(len(self.rows(number)))), pa.string())
        schema = pa.schema([(name, array.type) for name, array in arrays.items()], own.schema.metadata)
        table = pa.Table.from_arrays(list(arrays.values()), schema=schema)
        part = {**self._manifest, "number": number, "failures": failures, "files": files}
        copy = recipe if number == 0 or len(recipe) < LARGEST_COPY else _reference(recipe)
        entries = {RECIPE: copy.encode(), PART: json.dumps(part).encode()}
        made = Part(number, self._manifest, recipe, failures, table.num_rows, files)
        with self.location.writing(made.name) as sink:
            result_file.write_table(sink, table, entries, [[prefix] for prefix in matrices])
        self.parts[number] = made

    def write_raw(self, number: int, matrices: Matrices, recipe: str, failures: Failures, files: str) -> None:
        """Store features until they can be normalized."""
        made = Part(number, self._manifest, recipe, failures, len(self.rows(number)), files, is_raw=True)
        part = {"number": number, "failures": failures, "recipe": recipe, "rows": made.rows, "files": files}
        part |= self._manifest
        with self.location.writing(made.name) as sink:
            np.savez(sink, np.frombuffer(json.dumps(part).encode(), np.uint8), *matrices.values())
        self.raw[number] = made

    def read_raw(self, number: int, prefix: str) -> NDArray[np.float32]:
        """Read one block's features that are not yet normalized."""
        prefixes = [prefix for _, _, prefix in self.request["blocks"]]
        with _opened(self.location, _raw_name(number)) as file, np.load(file) as arrays:
            rows: NDArray[np.float32] = arrays[f"arr_{1 + prefixes.index(prefix)}"]
        return rows

    def remove_raw(self, number: int) -> None:
        """Remove the raw features of a part that is now normalized."""
        self.location.remove(self.raw.pop(number).name)

    def finish(self) -> tuple[int, int]:
        """Remove everything but the parts; return their number and total bytes."""
        self.location.remove_folder(RAW)
        self.location.remove(MANIFEST)
        return self.count, sum(size for name, size in self.location.sizes().items() if name != LOCK)

    def clear(self) -> None:
        """Remove the dataset."""
        self.drop([*self.there])
        for name in self._useless:
            self.location.remove(name)
        self.finish()
        self._forget([])


def _name(number: int, count: int) -> str:
    """Return the file name of a part out of `count`; sorting the names sorts the rows."""
    return f"part-{number:0{max(5, len(str(count - 1)))}d}.parquet"


def _raw_name(number: int) -> str:
    return f"{RAW}/part-{number:05d}.npz"


def _count(manifest: Mapping[str, Any]) -> int:
    return max(1, -(-int(manifest["request"]["rows"]) // int(manifest["chunk"])))


def _reference(recipe: str) -> str:
    """Return what stands for a large recipe in all parts but the first."""
    return REFERENCE + hashlib.sha256(recipe.encode()).hexdigest()


def _look(location: Location, names: Sequence[str], *, is_begun: bool) -> dict[str, Part | None]:
    """Return the metadata of each part, None for a damaged one; raise RequestError if none may be ours."""
    found = {name: _look_at(location, name) for name in names}
    others = [] if is_begun or any(found.values()) else [name for name in names if not _is_rest(location, name)]
    if others:
        raise _foreign(location, others)
    recipes = {_reference(part.recipe): part.recipe for part in found.values() if part}
    manifests: dict[str, Any] = {}
    for name, part in found.items():
        if part:
            recipe = recipes.get(part.recipe if part.recipe.startswith(REFERENCE) else _reference(part.recipe))
            manifest = manifests.setdefault(json.dumps(part.manifest), part.manifest)
            # Shared, because fitted parameters may be large. Without its recipe, a part can't be used.
            found[name] = replace(part, manifest=manifest, recipe=recipe) if recipe else None
    return found


def _is_rest(location: Location, name: str) -> bool:
    """Tell whether a file that was cut short was one of ours, or holds nothing: zeros, after a power failure."""
    with location.opened(name) as file:
        head, rest = bytes(file.read(len(result_file.START))), iter(lambda: bytes(file.read(1 << 20)), b"")
        return result_file.START.startswith(head) or not (head.strip(b"\0") or any(some.strip(b"\0") for some in rest))


def _look_at(location: Location, name: str) -> Part | None:
    """Return the metadata of a part; None if the file is truncated."""
    is_raw = name.startswith(RAW)
    with location.opened(name) as file:
        try:
            if is_raw:
                with damage_as("cut"), np.load(file) as arrays:
                    values = json.loads(arrays["arr_0"].tobytes())
            else:
                footer = result_file.read_footer(file)
                with damage_as("foreign"):
                    values = json.loads(footer.entries[PART])
                    values |= {"recipe": footer.entries[RECIPE].decode(), "rows": footer.rows}
        except DamagedError as error:
            if error.kind == "cut":
                return None
            raise (_foreign(location, [name]) if error.kind == "foreign" else _refusal(location, name)) from error
    of_part = {"number": int, "failures": list, "recipe": str, "rows": int, "files": str}
    _check(location, name, values, {**_MANIFEST, **of_part})
    try:
        failures = [Failure.read(values) for values in values["failures"]]
    except (TypeError, ValueError) as error:
        raise _refusal(location, name) from error
    manifest, rows = {key: values[key] for key in _MANIFEST}, values["rows"]
    part = Part(values["number"], manifest, values["recipe"], failures, rows, values["files"], is_raw)
    if name != part.name or any(not 0 <= failure.position < rows for failure in failures):
        raise _refusal(location, name)
    return part


def _read_manifest(location: Location) -> dict[str, Any]:
    try:
        with location.opened(MANIFEST) as file:
            values = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise _refusal(location, MANIFEST) from error
    return _check(location, MANIFEST, values, {**_MANIFEST, "replaces": bool})


def _check(location: Location, name: str, values: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    found: dict[str, Any] = values if isinstance(values, dict) else {}
    if type(found.get("format")) is int and found["format"] != FORMAT:
        version = f"another version of nbfeat (format {found['format']}, this one reads {FORMAT})"
        way = "Install that version, or write to another folder."
        raise RequestError(f"{location.name}{name} was written by {version}. {way}")
    are_known = {key: type(value) for key, value in found.items()} == kinds
    if not are_known or found["chunk"] <= 0 or type(found["request"].get("rows")) is not int:
        raise _refusal(location, name)
    return found


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    if there["blocks"] != here["blocks"]:
        both = there["blocks"], here["blocks"]
        found, asked = (_some([f"`{one[0]}`" + (f" of {one[1]}" if len(of) > 1 else "") for one in of]) for of in both)
        yield f"it has features of {found}, but the request is for {asked}"
    if there["rows"] != here["rows"]:
        yield f"it has {there['rows']:,} rows, but the frame has {here['rows']:,}"
    for what, sentence in (("images", "different images"), ("columns", "different values")):
        was, now = dict(there[what]), dict(here[what])
        yield from (f"it has a column {name}, but the frame doesn't" for name in was if name not in now)
        yield from (f"the frame has a column {name}, but the dataset doesn't" for name in now if name not in was)
        yield from (f"column {name} now has {sentence}" for name in now if was[name] != now[name])
        if there[what] != here[what]:
            yield "its columns are in a different order"
    if there["like"] != here["like"]:
        yield "it repeats a different result (`like`), or none"
    if there != here:
        yield "its normalization was fitted on different rows (`fit_on`)"


def _some(names: Sequence[str]) -> str:
    return listing([*names[:SHOWN], *([f"{len(names) - SHOWN:,} more"] if len(names) > SHOWN else [])])


def _foreign(location: Location, names: Sequence[str]) -> RequestError:
    problem = f"{location.address} has files that don't belong to an nbfeat dataset: {_some(names)}."
    return RequestError(f"{problem} Use an empty or new folder.")


def _refusal(location: Location, name: str, damage: DamagedError | None = None) -> RequestError:
    what = f"is damaged ({damage})" if damage else "was changed after nbfeat wrote it"
    more = "; only its rows are computed again" if damage else ""
    return RequestError(f"{location.name}{name} {what}: remove that file, and rerun the extraction{more}.")


@contextmanager
def _opened(location: Location, name: str) -> Iterator[Any]:
    """Open a part to read its columns; raise RequestError if they are damaged."""
    try:
        with location.opened(name) as file, damage_as("columns"):
            yield file
    except DamagedError as error:
        raise _refusal(location, name, error) from error


def is_dataset(path: object) -> bool:
    """Tell whether `path` may hold a dataset: an existing folder, or a URL."""
    return "://" in str(path) or Path(str(path)).expanduser().is_dir()


def finished(location: Location) -> list[Part]:
    """Return the parts of a finished dataset in order; raise RequestError if some or all are missing."""
    sizes = location.sizes()
    if not (names := sorted(name for name in sizes if _PART.fullmatch(name))) and MANIFEST not in sizes:
        raise RequestError(f"{location.address} has no nbfeat dataset: part-00000.parquet is missing. Check the path.")
    found = _look(location, names, is_begun=MANIFEST in sizes)
    parts = [part for part in found.values() if part]
    if not parts or MANIFEST in sizes or len(parts) != _count(parts[0].manifest):
        there = f"it has {len(parts):,} of {_count(parts[0].manifest):,} files" if parts else "it has no files"
        raise RequestError(f"{location.address} is not finished: {there}. Rerun its extraction to resume it.")
    if odd := [part for part in parts if part.manifest != parts[0].manifest]:
        raise _refusal(location, odd[0].name)
    return parts


def read(
    location: Location, parts: Sequence[Part], widths: Mapping[str, int], only: Collection[object] | None = None
) -> tuple[pd.DataFrame, dict[str, NDArray[np.float32]]]:
    """Read the features, by prefix in `widths`, and the frame's own columns: all, or `only` these and the index."""
    import pyarrow as pa

    rows = sum(part.rows for part in parts)
    matrices = {prefix: np.empty((rows, width), np.float32) for prefix, width in widths.items()}
    tables, start = [], 0
    for part in parts:
        with _opened(location, part.name) as file:
            table = result_file.read_table(file, [[prefix] for prefix in widths])
            for prefix, matrix in matrices.items():
                numbers = table.column(prefix).combine_chunks().flatten().to_numpy()
                matrix[start : start + part.rows] = numbers.reshape(part.rows, widths[prefix])
        index = (table.schema.pandas_metadata or {}).get("index_columns", [])  # names, or dicts for ranges
        own = [name for name in table.column_names if name not in {*widths, FAILURE}]
        own = own if only is None else [name for name in own if name in index or name in only]
        tables.append(table.select([*own, FAILURE]))  # a table without columns would have no rows
        start += part.rows
    frame: pd.DataFrame = pa.concat_tables(tables).to_pandas().drop(columns=FAILURE)
    return frame, matrices


def own_columns(
    frame: pd.DataFrame, *, images: Collection[Hashable], made: Collection[str], dropped: Collection[int]
) -> tuple[Any, str]:
    """Return a table of the columns that Parquet can store, without `dropped` positions, and a note on the others."""
    import pyarrow as pa

    counts, kept, lost = Counter(frame.columns), [], []
    for position, label in enumerate(frame.columns):
        if position in dropped:
            continue
        if reason := _why_not(frame.iloc[:, position], label, is_image=label in images, twice=counts[label] > 1):
            lost.append(f"{label!r} ({reason})")
        else:
            kept.append(position)
    if FAILURE in (names := [*(frame.columns[position] for position in kept), *frame.index.names]):
        way = "rename it, or use `replace=True`"
        raise RequestError(f"The frame has a column or index {FAILURE!r}, which the files need: {way}.")
    if taken := [name for name in names if name in made]:
        way = "choose another `prefix`, or overwrite it with `replace=True`"
        raise RequestError(f"The frame has a column or index {taken[0]!r}, which the files need for features: {way}.")
    try:
        table = pa.Table.from_pandas(frame.iloc[:, kept])
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        advice = "Use frame.reset_index(drop=True)."
        raise RequestError(f"Parquet cannot store the frame's index: {error}. {advice}") from error
    return table, f"Not written to the files: {_some(lost)}." if lost else ""


def _why_not(values: pd.Series, label: Hashable, *, is_image: bool, twice: bool) -> str:
    """Say why a column cannot be stored; an empty string if it can."""
    if not isinstance(label, str):
        return "column names must be text"
    if twice:
        return "column names must be unique"
    if is_image and not all(isinstance(value, str) or is_missing(value) for value in values):
        return "images that are not text"
    return result_file.unholdable(values)
