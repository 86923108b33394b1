"""Sinks, where features go: MemorySink makes columns in memory, DatasetSink writes Parquet files part by part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import ExtractionError, RequestError, format_bytes
from nbfeat.extraction import normalize
from nbfeat.extraction.columns import FeatureColumns, attach, made_columns, normalized, places
from nbfeat.extraction.network_state import Batch
from nbfeat.extraction.recipe import Recipe, pack, unpack
from nbfeat.extraction.request import Request
from nbfeat.extraction.run import Run
from nbfeat.images.sources import digest_of, name_of, state_of
from nbfeat.parquet import dataset
from nbfeat.parquet.dataset import Dataset, Failures
from nbfeat.parquet.location import Location
from nbfeat.parquet.result_file import Failure, checksum

if TYPE_CHECKING:
    import pandas as pd

BYTES = 64_000_000  # of features in one part
LEAST_ROWS, MOST_ROWS = 512, 8192  # in one part; at most one part is lost if the process is killed
LARGER = 3  # times larger parts on a cluster, where each starts new workers, which takes seconds


class MemorySink:
    """Collects the features of all images of `run` in memory, then attaches them to the frame."""

    place = "of memory"  # where the features are, for messages
    kept_words = "from the cache"  # where existing features come from
    kept = 0  # number of images whose features it saves for another run
    held = nullcontext  # locks nothing: memory isn't shared
    frame: pd.DataFrame  # the given columns, then the features, once finished

    def __init__(self, run: Run, request: Request) -> None:
        self._run, self._request, self._parts = run, request, request.parts
        self._is_spoiled = self._is_attached = False  # raw features may be lost; the frame is complete

    def make_room(self) -> None:
        """Allocate memory for all features."""
        for part in self._parts:
            part.make_room(len(self._run.images))

    def batches(self) -> Generator[Batch, None, None]:
        """Work until all images are finished, yielding each batch."""
        if self._is_spoiled:
            self._run.forget()
            self._is_spoiled = False
        if not self._is_attached:  # else interrupted at the very end
            yield from self._run.batches()

    def finish(self) -> None:
        """Normalize the features and attach the columns."""
        with self._run.timings.adding("attaching"):
            if not self._is_attached:
                self.frame = self._attached()
                self._is_spoiled, self._is_attached = False, True
        for network in self._run.networks:
            network.features.clear()  # frees those that no part uses

    def _attached(self) -> pd.DataFrame:
        frame, good, fit_rows = self._request.frame, self._run.progress.ok, self._request.fit_rows
        raw = [part.raw(self._request.images_of(part.column)) for part in self._parts]
        for part, rows in zip(self._parts, raw, strict=True):
            chosen = good[self._request.images_of(part.column)]
            part.learn(rows, chosen if fit_rows is None else chosen & fit_rows)
        self._is_spoiled = True  # until the end, rows may already be normalized in place
        for part, rows in zip(self._parts, normalized(self._parts, raw), strict=True):
            part.rows = rows
        where = places(frame, self._parts, replace=self._request.replace)
        for part, there in zip(self._parts, where, strict=True):
            part.replaced = bool(there)
        return attach(frame, [part.frame(frame.index) for part in self._parts], where)


class DatasetSink:
    """Writes the features of `run` to files at `path`; raw features first if normalization is fitted on all rows."""

    kept_words = "already in files"

    def __init__(self, path: str | Path, run: Run, request: Request, describe: Callable[[], Mapping[str, Any]]) -> None:
        self._location, self._run, self._parts, self._describe = Location.at(path), run, request.parts, describe
        self._described: Mapping[str, Any] = {}
        self.address, self.place = self._location.address, f"in {self._location.address}"
        frame, self._columns = request.frame, request.columns
        learned = [part for part in self._parts if part.block.is_learned and not request.repeats]
        _check_learned(learned, self.address, len(frame))
        self._fit_on = request.fit_rows if learned else None
        prefixes = [part.prefix for part in self._parts]
        dropped = _made_before(frame, prefixes, replace=request.replace)
        self._own, note = dataset.own_columns(frame, images=self._columns, made=prefixes, dropped=dropped)
        self._dataset = Dataset(self._location, self._identity(len(frame), request.repeats), replace=request.replace)
        self._rows, self._now, self._files = len(frame), -1, ""  # the current part, and its image files
        self._read: tuple[str, Recipe | None] = "", None
        self._packed: dict[bool, str] = {}  # the recipe of raw parts, and of others
        self.was_finished, self.files, self.bytes = False, 0, 0
        with suppress(FileNotFoundError):  # another process is writing there, which `held` reports
            self._dataset.survey()
        run.note(note)

    def _identity(self, rows: int, repeats: Recipe | None) -> dict[str, Any]:
        table, images, fit_on = self._own, self._run.images, self._fit_on
        return {
            "rows": rows,
            "blocks": [[str(part.block), str(part.column), part.prefix] for part in self._parts],
            "images": [
                [str(column), digest_of(images[at * rows : (at + 1) * rows], self._run.root)]
                for at, column in enumerate(self._columns)
            ],
            "columns": [[name, checksum(table, [name])] for name in table.column_names],
            "fit_on": None if fit_on is None else hashlib.sha256(np.packbits(fit_on).tobytes()).hexdigest(),
            "like": repeats and hashlib.sha256(pack(Recipe(repeats.parts, {}), []).encode()).hexdigest(),
        }

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the location; look at existing files and use their precision."""
        with self._location.held():
            self._dataset.survey()
            if (recipe := self._recipe()) and not self._run.networks:
                if self._run.precision in {"auto", recipe.precision}:
                    pairs = zip(self._parts, recipe.parts, strict=True)
                    self._run.repeat({part.network_index: made.precision for part, made in pairs})
                else:
                    self._dataset.refuse(f"they were computed in {recipe.precision}, not {self._run.precision}")
            yield

    def _recipe(self) -> Recipe | None:
        first = next(iter([*self._dataset.parts.values(), *self._dataset.raw.values()]), None)
        if first and first.recipe != self._read[0]:  # it may be large, so read it once
            self._read = first.recipe, unpack(first.recipe, self._location.name)[0]
        return self._read[1] if first else None

    @property
    def kept(self) -> int:
        """Number of images whose features are in files."""
        there, columns = self._dataset.there.items(), len(self._columns)
        return sum(len(self._dataset.rows(number)) * columns - len(part.failures) for number, part in there)

    @property
    def sentence(self) -> str:
        """Where the written features are, and how to read them."""
        there = f"{self.files:,} {'file' if self.files == 1 else 'files'}, {format_bytes(self.bytes)}"
        was = " Everything was already computed." if self.was_finished else ""
        return f"Written to {self.address}: {there}.{was} Read it with `nbfeat.read({self.address!r})`."

    @property
    def frame(self) -> pd.DataFrame:
        """Raises ExtractionError: the frame isn't in memory."""
        way = f"Read them with `nbfeat.read({self.address!r})`."
        raise ExtractionError(f"The features are in {self.address}, not in memory. {way}")

    def make_room(self) -> None:
        """Do nothing: each part allocates its own memory."""

    finish = make_room  # everything is written

    def batches(self) -> Generator[Batch, None, None]:
        """Work until all files are written, yielding each batch."""
        self._begin()
        self.was_finished = self._dataset.is_finished
        if not self.was_finished:
            for number in range(self._dataset.count):
                if number not in self._dataset.there:
                    yield from self._compute(number)
                    self._keep(number)
            if self._run.images and len(self._run.progress.reasons) == len(self._run.images):
                self._dataset.clear()
                return
            if self._dataset.raw or any(part.normalizer is None for part in self._parts):
                yield from self._normalize()
        self.files, self.bytes = self._dataset.finish()

    def _begin(self) -> None:
        """Compare existing files with the networks, choose the rows per file and write the manifest."""
        if recipe := self._recipe():
            self._compare(recipe)  # may delete unusable files
        if not self._dataset.chunk:
            batch = max((network.prepared.batch_size for network in self._run.networks), default=1)
            widths = {part.source: part.raw_width for part in self._parts}.values()
            self._dataset.chunk = rows_together(widths, batch, on_cluster=self._run.executor.starts_workers)
        with self._explained():
            self._dataset.begin()
        if recipe and self._dataset.parts:  # use the normalizers that these were written with
            for part, made in zip(self._parts, recipe.parts, strict=True):
                part.normalizer = made.normalizer
        else:
            for part in self._parts:
                if part.repeats or not part.block.is_learned:  # which needs no fitting
                    part.learn(np.empty((1, part.raw_width), np.float32), np.ones(1, bool))
        self._described, self._packed = self._describe(), {}
        reasons: dict[int, str] = {}
        for number, file in self._dataset.there.items():
            start = self._dataset.rows(number).start
            places = {str(column): at * self._rows + start for at, column in enumerate(self._columns)}
            reasons |= {places[one.column] + one.position: one.reason for one in file.failures}
        if there := [self._images(number) for number in self._dataset.there]:
            self._run.finished_before(np.concatenate(there), reasons)

    def _compare(self, recipe: Recipe) -> None:
        networks = [part.network for part in self._parts if part.network]
        pairs = zip(recipe.parts, networks, strict=True)
        if difference := next(filter(None, (made.difference(network) for made, network in pairs)), ""):
            self._dataset.refuse(difference)
        elif not any(part.repeats for part in self._parts):  # for which it was already reported
            self._run.note(recipe.check(networks))
        if changed := [at for at, part in self._dataset.there.items() if part.files != self._files_of(at)]:
            self._dataset.drop(changed)
            many = f"{len(changed):,} of {self._dataset.count:,} files"
            self._run.note(f"Images in {many} changed: these are written again.")

    def _images(self, number: int) -> NDArray[np.int64]:
        rows = np.array(self._dataset.rows(number), np.int64)
        return np.concatenate([place * self._rows + rows for place in range(len(self._columns))])

    def _files_of(self, number: int) -> str:
        """Return a digest of the sizes and times of a part's image files, which also copies of them have."""
        images, root = (self._run.images[at] for at in self._images(number).tolist()), self._run.root
        return digest_of((state_of(image, root, shared=True) for image in images), root)

    def _compute(self, number: int) -> Generator[Batch, None, None]:
        if self._now != number:
            images = self._images(number)
            self._run.look_at(images)
            self._files = self._files_of(number)  # before they are read, so that no change is missed
            for part in self._parts:
                part.make_room(len(images))
            self._now = number
        yield from self._run.batches()

    def _keep(self, number: int) -> None:
        rows, reasons = self._dataset.rows(number), self._run.progress.reasons
        starts = [self._columns.index(part.column) * len(rows) for part in self._parts]
        raw = [part.raw(slice(start, start + len(rows))) for part, start in zip(self._parts, starts, strict=True)]
        failures = [
            Failure(row - rows.start, str(column), name_of(self._run.images[at]), reasons[at])
            for row in rows for place, column in enumerate(self._columns)
            if (at := place * self._rows + row) in reasons
        ]  # fmt: skip
        is_raw = any(part.normalizer is None for part in self._parts)
        # Normalize copies, so that a file that couldn't be written can be written after resuming.
        matrices = raw if is_raw else normalized(self._parts, [matrix.copy() for matrix in raw])
        self._write(number, matrices, failures, self._files, raw=is_raw)
        self._now = -1
        self._run.close_window()

    def _write(
        self, number: int, matrices: Sequence[NDArray[np.float32]], failures: Failures, files: str, *, raw: bool
    ) -> None:
        if raw not in self._packed:
            made = [part.recipe for part in self._parts]
            if raw:
                plain = normalize.Normalizer()
                made = [replace(one, block=replace(one.block, normalize="none"), normalizer=plain) for one in made]
            self._packed[raw] = pack(Recipe(tuple(made), self._described), [])
        by_prefix = {part.prefix: matrix for part, matrix in zip(self._parts, matrices, strict=True)}
        rows = self._dataset.rows(number)
        with self._explained(), self._run.timings.adding("attaching"):
            if raw:
                self._dataset.write_raw(number, by_prefix, self._packed[raw], failures, files)
            else:
                own = self._own.slice(rows.start, len(rows))
                self._dataset.write(number, own, by_prefix, self._packed[raw], failures, files)

    def _normalize(self) -> Iterator[Batch]:
        unknown = [part for part in self._parts if part.normalizer is None]
        learners = {part.prefix: normalize.Learner(part.block, part.raw_width) for part in unknown}
        for number in sorted(self._dataset.raw) if learners else ():
            with self._run.timings.adding("attaching"):
                for part in unknown:
                    learners[part.prefix].see(self._dataset.read_raw(number, part.prefix)[self._chosen(number, part)])
            yield Batch()
        for part in unknown:
            part.normalizer = learners[part.prefix].learned()
        for number, there in sorted(self._dataset.raw.items()):
            with self._run.timings.adding("attaching"):
                matrices = [part.normalized(self._dataset.read_raw(number, part.prefix)) for part in self._parts]
            self._write(number, matrices, there.failures, there.files, raw=False)
            self._dataset.remove_raw(number)
            yield Batch()

    def _chosen(self, number: int, part: FeatureColumns) -> NDArray[np.bool_]:
        rows = self._dataset.rows(number)
        chosen = np.ones(len(rows), bool) if self._fit_on is None else self._fit_on[rows.start : rows.stop].copy()
        chosen[[one.position for one in self._dataset.raw[number].failures if one.column == str(part.column)]] = False
        return chosen

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            there = f"{len(self._dataset.there):,} of {self._dataset.count:,} files are finished"
            way = f"{there}: free some space there, then run it again to resume."
            raise ExtractionError(f"{self.address} can't be written: {error.strerror or error}. {way}") from error


def rows_together(widths: Iterable[int], batch: int, *, on_cluster: bool = False) -> int:
    """Return the number of rows per part for features of these `widths`, in whole batches."""
    times = LARGER if on_cluster else 1
    rows = min(max(times * BYTES // (4 * sum(widths)), LEAST_ROWS), times * MOST_ROWS)
    return max(1, rows // batch) * batch


def _check_learned(learned: Sequence[FeatureColumns], address: str, rows: int) -> None:
    if any(part.block.components for part in learned):
        raise RequestError(
            "`components` must be fitted on all rows at once, but `parquet` never has them all in memory. Extract a "
            f"sample without `parquet`, then repeat it on all rows with `like=sample` and `parquet={address!r}`; or "
            "drop `components`."
        )
    if learned and not rows:
        how = learned[0].block.normalize
        raise RequestError(f"`normalize={how!r}` has no rows to fit on: the frame is empty. Drop `normalize`.")


def _made_before(frame: pd.DataFrame, prefixes: Sequence[str], *, replace: bool) -> set[int]:
    made = made_columns(frame)
    positions = {position for prefix in prefixes for position in made.get(prefix, ())}
    if replace:
        names = re.compile(rf"(?:{'|'.join(map(re.escape, prefixes))})(?:_\d{{4,}})?|{dataset.FAILURE}")
        positions |= {at for at, label in enumerate(frame.columns) if names.fullmatch(str(label))}
    return positions
