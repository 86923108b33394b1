"""Where the features of a run go that are never all in memory: a frame is worked through part by part, each a file.

What is in files is not computed again, whatever stopped the run before. Standardization and min-max, which learn from
all rows, take two passes: features as the network gives them are set aside first, and then normalized.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import ExtractionError, RequestError, format_bytes
from nbfeat.extraction import normalize
from nbfeat.extraction.batch import Batch
from nbfeat.extraction.columns import own_columns
from nbfeat.extraction.packed import pack, unpack
from nbfeat.extraction.part import FeatureColumns, normalized
from nbfeat.extraction.recipe import Recipe, of_part
from nbfeat.extraction.windows import Windows
from nbfeat.images import fingerprint
from nbfeat.images.sources import held, is_missing, path_of
from nbfeat.parquet import dataset
from nbfeat.parquet.dataset import Dataset
from nbfeat.parquet.location import Location
from nbfeat.parquet.result_file import Failure, checksum

if TYPE_CHECKING:
    import pandas as pd

    from nbfeat.extraction.run import Run

BYTES = 64_000_000  # of features in one part
LEAST_ROWS, MOST_ROWS = 512, 8192  # in one part, which is what is lost at most when a process is killed
LARGER = 3  # times as much in one part on a cluster, where each has new workers, which take seconds to start
LONGEST = 10_000  # characters of a path


class DatasetSink:
    """The work of an extraction of `parts` whose features go to files at `path`.

    `run` has all images and opens the networks; `repeats` is an earlier result to repeat; `fit_on` are the rows to
    learn from, or None for all; `describe` gives what recipes tell people. With `starts_over`, what another request
    left, or what is finished, is made anew. Nothing is written yet; RequestError says what cannot be.
    """

    def __init__(
        self,
        path: str | Path,
        frame: pd.DataFrame,
        run: Run,
        parts: Sequence[FeatureColumns],
        *,
        repeats: Recipe | None,
        fit_on: NDArray[np.bool_] | None,
        describe: Callable[[], Mapping[str, Any]],
        starts_over: bool,
    ) -> None:
        self._location, self._run, self._parts, self._describe = Location.at(path), run, parts, describe
        self._described: Mapping[str, Any] = {}
        learned = [part for part in parts if part.block.is_learned and not repeats]
        _check_learned(learned, self.address, len(frame))
        self._fit_on = fit_on if learned else None
        self._columns: list[Hashable] = list(dict.fromkeys(part.column for part in parts))
        prefixes = [part.prefix for part in parts]
        dropped = _made_before(frame, prefixes, replace=starts_over)
        self._own, note = dataset.own_columns(frame, images=self._columns, made=prefixes, dropped=dropped)
        self._dataset = Dataset(self._location, self._request(len(frame), repeats), replace=starts_over)
        self._windows = Windows(run, self._columns, len(frame))
        self.was_finished, self.files, self.bytes = False, 0, 0  # those when all is written
        with suppress(FileNotFoundError):  # another process is at work there, of which `held` tells
            self._dataset.survey()
        run.note(note)

    def _request(self, rows: int, repeats: Recipe | None) -> dict[str, Any]:
        """Return what tells a dataset from others, as plain values."""
        table, images, fit_on = self._own, self._run.images, self._fit_on
        return {
            "rows": rows,
            "blocks": [[str(part.block), str(part.column), part.prefix] for part in self._parts],
            "images": [
                [str(column), _digest_of_images(images[at * rows : (at + 1) * rows], self._run.root)]
                for at, column in enumerate(self._columns)
            ],
            "columns": [[name, checksum(table, [name])] for name in table.column_names],
            "fit_on": None if fit_on is None else hashlib.sha256(np.packbits(fit_on).tobytes()).hexdigest(),
            "like": repeats and hashlib.sha256(pack(Recipe(repeats.parts, {}), []).encode()).hexdigest(),
        }

    # What is there

    @property
    def address(self) -> str:
        """The folder or address, as it was named."""
        return self._location.address

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from writing for the block; look at what is there, and obey what it was computed in."""
        with self._location.held():
            self._dataset.survey()
            if (recipe := self._recipe()) and not self._run.lanes:
                self._obey(recipe)
            yield

    def _recipe(self) -> Recipe | None:
        """Return the recipe of what is there."""
        first = next(iter([*self._dataset.parts.values(), *self._dataset.raw.values()]), None)
        return unpack(first.recipe, self._location.name)[0] if first else None

    def _obey(self, recipe: Recipe) -> None:
        if self._run.precision not in {"auto", recipe.precision}:
            self._dataset.refuse(f"they were computed in {recipe.precision}, and {self._run.precision} is asked for")
            return
        earlier = {part.network: made.precision for part, made in zip(self._parts, recipe.parts, strict=True)}
        self._run.repeat([earlier[number] for number in range(len(self._run.networks))])

    @property
    def kept(self) -> int:
        """How many images have their features in files."""
        there, columns = self._dataset.there.items(), len(self._columns)
        return sum(len(self._dataset.rows(number)) * columns - len(part.failures) for number, part in there)

    @property
    def sentence(self) -> str:
        """Say where the features are, when all is written, and how to read them."""
        there = f"{self.files:,} {'file' if self.files == 1 else 'files'}, {format_bytes(self.bytes)}"
        was = " All was there, and nothing was computed." if self.was_finished else ""
        return f"In {self.address}: {there}.{was} nbfeat.read({self.address!r}) reads it."

    # Working

    def batches(self) -> Generator[Batch, None, None]:
        """Work until all files are there, and yield each batch; ask no more to stop."""
        self._begin()
        self.was_finished = self._dataset.is_finished
        if not self.was_finished:
            with self._run.stay:  # on one cluster for all parts
                for number in range(self._dataset.count):
                    if number not in self._dataset.there:
                        yield from self._windows.compute(number, self._dataset.rows(number), self._parts)
                        self._keep(number)
            if self._run.images and len(self._run.progress.reasons) == len(self._run.images):
                self._dataset.clear()  # there is nothing to keep
                return
            if self._dataset.raw or any(part.normalizer is None for part in self._parts):
                yield from self._normalize()
        self.files, self.bytes = self._dataset.finish()
        for lane in self._run.lanes:
            lane.features.clear()

    def _begin(self) -> None:
        """Compare with the networks that are open, decide how many rows a file has, and write the manifest."""
        if recipe := self._recipe():
            self._compare(recipe)
        if not self._dataset.chunk:
            batch = max((lane.batch_size for lane in self._run.lanes), default=1)
            widths = {part.source: part.raw_width for part in self._parts}.values()
            self._dataset.chunk = rows_together(widths, batch, on_cluster=self._run.on is not None)
        with self._explained():
            self._dataset.begin()
        self._take_normalizers()
        self._described = self._describe()
        there = self._dataset.there.items()
        self._windows.recount({number: (self._dataset.rows(number), part.failures) for number, part in there})

    def _compare(self, recipe: Recipe) -> None:
        lanes = [part.lane for part in self._parts if part.lane]
        pairs = zip(recipe.parts, lanes, strict=True)
        if difference := next(filter(None, (made.difference(lane) for made, lane in pairs)), ""):
            self._dataset.refuse(difference)
        elif not any(part.repeats for part in self._parts):  # of which that was told already
            self._run.note(recipe.check(lanes))

    def _take_normalizers(self) -> None:
        """Take what is known without learning, or was learned when files were written."""
        recipe = self._recipe()
        if recipe and self._dataset.parts:
            for part, made in zip(self._parts, recipe.parts, strict=True):
                part.normalizer = made.normalizer
            return
        for part in self._parts:
            if part.repeats or not part.block.is_learned:
                part.learn(np.empty((1, part.raw_width), np.float32), np.ones(1, bool))

    def _keep(self, number: int) -> None:
        """Write the file of a part that is computed."""
        rows = self._dataset.rows(number)
        raw, failures = self._windows.take(rows, self._parts)  # from here on they may be half normalized, in place
        is_raw = any(part.normalizer is None for part in self._parts)
        self._write(number, raw if is_raw else normalized(self._parts, raw), failures, raw=is_raw)
        for lane in self._run.lanes:
            lane.features.clear()

    def _write(
        self, number: int, matrices: Sequence[NDArray[np.float32]], failures: Sequence[Failure], *, raw: bool
    ) -> None:
        made = [of_part(part) for part in self._parts]
        if raw:
            plain = normalize.Normalizer()
            made = [replace(one, block=replace(one.block, normalize="none"), normalizer=plain) for one in made]
        recipe = pack(Recipe(tuple(made), self._described), [])
        by_prefix = {part.prefix: matrix for part, matrix in zip(self._parts, matrices, strict=True)}
        rows = self._dataset.rows(number)
        with self._explained(), self._run.timings.while_attaching():
            if raw:
                self._dataset.write_raw(number, by_prefix, recipe, failures)
            else:
                self._dataset.write(number, self._own.slice(rows.start, len(rows)), by_prefix, recipe, failures)

    def _normalize(self) -> Iterator[Batch]:
        """Learn from the features that were set aside, and write them normalized."""
        unknown = [part for part in self._parts if part.normalizer is None]
        learners = {part.prefix: normalize.Learner(part.block, part.raw_width) for part in unknown}
        for number in sorted(self._dataset.raw) if learners else ():
            with self._run.timings.while_attaching():
                for part in unknown:
                    rows = self._dataset.read_raw(number, part.prefix)
                    learners[part.prefix].see(rows[self._chosen(number, part)])
            yield Batch()
        for part in unknown:
            part.normalizer = learners[part.prefix].learned()
        for number, there in sorted(self._dataset.raw.items()):
            with self._run.timings.while_attaching():
                matrices = [part.normalized(self._dataset.read_raw(number, part.prefix)) for part in self._parts]
            self._write(number, matrices, there.failures, raw=False)
            self._dataset.remove_raw(number)
            yield Batch()

    def _chosen(self, number: int, part: FeatureColumns) -> NDArray[np.bool_]:
        rows = self._dataset.rows(number)
        chosen = np.ones(len(rows), bool) if self._fit_on is None else self._fit_on[rows.start : rows.stop].copy()
        column = str(part.column)
        chosen[[one.position for one in self._dataset.raw[number].failures if one.column == column]] = False
        return chosen

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of a failing disk what is there, and how to go on."""
        try:
            yield
        except OSError as error:
            there = f"{len(self._dataset.there):,} of {self._dataset.count:,} files are finished and stay"
            raise ExtractionError(
                f"{self.address} could not be written: {error.strerror or error}. {there}: make room there, and "
                "run the same again to go on."
            ) from error


def rows_together(widths: Iterable[int], batch: int, *, on_cluster: bool = False) -> int:
    """Return how many rows make a part of features of these `widths`: whole batches."""
    times = LARGER if on_cluster else 1
    rows = min(max(times * BYTES // (4 * sum(widths)), LEAST_ROWS), times * MOST_ROWS)
    return max(1, rows // batch) * batch


# What tells a dataset from others


def _check_learned(learned: Sequence[FeatureColumns], address: str, rows: int) -> None:
    if any(part.block.components for part in learned):
        raise RequestError(
            "--components learns from all rows at once, which --parquet never has. Extract a sample of the rows "
            f"without --parquet, and repeat it on all: --like sample --parquet {address}; or leave --components away."
        )
    if learned and not rows:
        raise RequestError(
            f"--normalize {learned[0].block.normalize} has no rows to learn from: the frame is empty. Leave it away, "
            "or extract features of some images first."
        )


def _made_before(frame: pd.DataFrame, prefixes: Sequence[str], *, replace: bool) -> set[int]:
    """Return the positions of columns that the blocks of these `prefixes` make anew."""
    positions = {position for prefix in prefixes for position in own_columns(frame, prefix)}
    if replace:
        names = re.compile(rf"(?:{'|'.join(map(re.escape, prefixes))})(?:_\d{{4,}})?|{dataset.FAILURE}")
        positions |= {at for at, label in enumerate(frame.columns) if names.fullmatch(str(label))}
    return positions


def _digest_of_images(values: Iterable[object], root: Path) -> str:
    """Return what tells these cells of an image column from others: paths by where they lead, others by content."""
    hasher = hashlib.sha256()
    for value in values:
        try:
            if (text := path_of(value, root)) is None:
                source = held(value)
                content: Any = bytes(source) if isinstance(source, bytearray | memoryview) else source
                text = "" if is_missing(source) else fingerprint.digest(content).hex()
        except Exception:  # an address that is not read, or an image that is broken in one of many ways
            text = str(value)
        data = text[:LONGEST].encode(errors="surrogatepass")
        hasher.update(b"%d:%b" % (len(data), data))
    return hasher.hexdigest()
