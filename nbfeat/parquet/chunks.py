"""Results larger than memory: the frame is worked through in chunks of rows, each of which becomes a file.

What is in files is not computed again, whatever stopped the run before. Standardization and min-max, which learn from
all rows, take two passes: features as the network gives them go into a hidden folder first, and then, normalized, to
their place.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import ExtractionError, format_bytes
from nbfeat.extraction import normalize
from nbfeat.extraction.columns import FeatureColumns
from nbfeat.extraction.network_state import Batch
from nbfeat.extraction.packed import Failure
from nbfeat.extraction.recipe import Recipe
from nbfeat.extraction.run import Run
from nbfeat.images.sources import name_of
from nbfeat.parquet import piece
from nbfeat.parquet.location import LOCK, Shelf
from nbfeat.parquet.piece import RAW, About, Piece
from nbfeat.parquet.survey import MANIFEST, Survey, refusal, survey, write_manifest
from nbfeat.parquet.tally import Split, rows_together

if TYPE_CHECKING:
    from nbfeat.parquet.carried import Carried


class Chunks:
    """The work of an extraction whose features go to `shelf`, never all of them in memory.

    `run` has all images and opens the networks; `own` are the frame's columns; `request` says what the files are of;
    `told` what their recipes tell people; `fit_on` are the rows to learn from, or None for all.
    """

    def __init__(
        self,
        shelf: Shelf,
        run: Run,
        parts: Sequence[FeatureColumns],
        own: Carried,
        request: Mapping[str, Any],
        *,
        fit_on: NDArray[np.bool_] | None,
        told: Callable[[], Mapping[str, Any]],
        starts_anew: bool,
    ) -> None:
        self.shelf, self._run, self._parts, self._own = shelf, run, parts, own
        self._request, self._fit_on, self._told, self._starts_anew = request, fit_on, told, starts_anew
        self._columns: list[Hashable] = list(dict.fromkeys(part.column for part in parts))
        self._rows: int = request["rows"]
        self._now: int | None = None  # the chunk that is worked on
        self._found, self.was_finished = Survey(), False
        with suppress(FileNotFoundError):  # another process is at work there, of which `held` tells
            survey(shelf, request, replace=starts_anew)
        self.files, self.bytes = 0, 0  # when all is written
        shelf.check()
        run.note(own.note)

    # What is there

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from writing for the block; look at what is there, and obey what it was computed in."""
        with self.shelf.held():
            self._found = survey(self.shelf, self._request, replace=self._starts_anew)
            self.was_finished = self._found.is_finished
            first = self._found.first
            if first and not self._run.lanes:
                self._obey(first)
            yield

    def _obey(self, first: Piece) -> None:
        recipe = first.recipe
        if self._run.precision not in {"auto", recipe.precision}:
            self._refuse(f"they were computed in {recipe.precision}, and {self._run.precision} is asked for")
            return
        earlier = {part.network: made.precision for part, made in zip(self._parts, recipe.parts, strict=True)}
        self._run.repeat([earlier[number] for number in range(len(self._run.networks))])

    def _refuse(self, difference: str) -> None:
        """Refuse what is there, or make it anew where that is wanted."""
        if not self._starts_anew:
            raise refusal(self.shelf, difference)
        there = [*self._found.parts.values(), *self._found.raw.values()]
        useless = [*self._found.useless, *(one.about.name for one in there)]
        self._found, self.was_finished = Survey(replaces=True, useless=useless), False

    @property
    def kept(self) -> int:
        """How many images have their features in files."""
        if self._found.chunk is None:
            return 0
        reasons, split, numbers = self._run.progress.reasons, self._split, self._there
        images = [at for number in numbers for at in split.images(number)] if reasons else []
        total = sum(split.size(number) for number in numbers) * len(self._columns)
        return total - sum(at in reasons for at in images)

    @property
    def sentence(self) -> str:
        """Say where the features are, when all is written, and how to read them."""
        there = f"{self.files:,} {'file' if self.files == 1 else 'files'}, {format_bytes(self.bytes)}"
        was = " All was there, and nothing was computed." if self.was_finished else ""
        return f"In {self.shelf.shown}: {there}.{was} nbfeat.read({self.shelf.shown!r}) reads it."

    @property
    def _there(self) -> set[int]:
        return {*self._found.parts, *self._found.raw}

    @property
    def _split(self) -> Split:
        assert self._found.chunk is not None
        return Split(self._rows, self._columns, self._found.chunk)

    kept_words = "in files already"

    @property
    def place(self) -> str:
        return f"in {self.shelf.shown}"

    @property
    def frame(self) -> Any:
        shown = self.shelf.shown
        raise ExtractionError(f"The features are in {shown}, none in memory: nbfeat.read({shown!r}) reads them.")

    def make_room(self) -> None:
        """It is made for each chunk."""

    def finish(self) -> None:
        """All is there."""

    # Working

    def batches(self) -> Generator[Batch, None, None]:
        """Work until all files are there, and yield each batch; ask no more to stop."""
        self._begin()
        if not self._found.is_finished:
            for number in range(self._split.count):
                if number not in self._there:
                    yield from self._compute(number)
                    self._keep(number)
            if self._rows and len(self._run.progress.reasons) == len(self._run.images):
                self._clear()  # there is nothing to keep
                return
            if self._is_staged:
                yield from self._normalize()
        self._end()

    def _begin(self) -> None:
        """Compare with the networks that are open, decide how many rows a file has, and write the manifest."""
        if first := self._found.first:
            self._compare(first.recipe)
        found = self._found
        if found.chunk is None:
            batch = max((lane.batch_size for lane in self._run.lanes), default=1)
            widths = {part.source: part.raw_width for part in self._parts}.values()
            found.chunk = rows_together(widths, batch, on_cluster=self._run.executor.starts_workers)
        if not found.is_finished:
            with self._explained():
                write_manifest(self.shelf, found, self._request)
        for number in set(found.raw) & set(found.parts):  # killed between writing the one and removing the other
            found.useless.append(found.raw.pop(number).about.name)
        for name in found.useless:
            self.shelf.remove(name)
        found.useless = []
        self._take_normalizers()
        for number, one in {**found.raw, **found.parts}.items():
            self._finished_before(number, one.failures)

    def _compare(self, recipe: Recipe) -> None:
        lanes = [part.lane for part in self._parts if part.lane]
        pairs = zip(recipe.parts, lanes, strict=True)
        if difference := next(filter(None, (made.difference(lane) for made, lane in pairs)), ""):
            self._refuse(difference)
        elif not any(part.repeats for part in self._parts):  # of which that was told already
            self._run.note(recipe.check(lanes))

    def _take_normalizers(self) -> None:
        """Take what is known without learning, or was learned when files were written."""
        if self._found.parts:
            recipe = next(iter(self._found.parts.values())).recipe
            for part, made in zip(self._parts, recipe.parts, strict=True):
                part.normalizer = made.normalizer
            return
        for part in self._parts:
            if part.repeats or not part.block.is_learned:
                part.learn(np.empty((1, part.raw_width), np.float32), np.ones(1, bool))

    @property
    def _is_staged(self) -> bool:
        """Whether there are features that wait for what is to be learned from all."""
        return bool(self._found.raw) or any(part.normalizer is None for part in self._parts)

    def _compute(self, number: int) -> Generator[Batch, None, None]:
        """Work through one chunk, or go on with it."""
        if self._now != number:
            self._run.look_at(np.array(self._split.images(number), np.int64))
            self._now = number
            for part in self._parts:
                part.make_room(self._split.size(number) * len(self._columns))
        yield from self._run.batches()

    def _keep(self, number: int) -> None:
        """Write the file of a chunk that is computed."""
        raw = [part.raw(self._split.within(number, part.column)) for part in self._parts]
        is_raw = any(part.normalizer is None for part in self._parts)
        matrices = (
            raw if is_raw else [part.normalized(rows.copy()) for part, rows in zip(self._parts, raw, strict=True)]
        )
        self._write(number, matrices, self._failures(number), raw=is_raw)
        for lane in self._run.lanes:
            lane.features.clear()
        self._now = None

    def _failures(self, number: int) -> list[Failure]:
        """Return the failures of a chunk in the order of its rows."""
        reasons, split, (start, stop) = self._run.progress.reasons, self._split, self._split.bounds(number)
        return [
            Failure(row - start, str(column), name_of(self._run.images[at]), reasons[at])
            for row in range(start, stop)
            for place, column in enumerate(self._columns)
            if (at := place * split.rows + row) in reasons
        ]

    def _finished_before(self, number: int, failures: Sequence[Failure]) -> None:
        """Count a chunk that an earlier run has finished."""
        images, start = np.array(self._split.images(number), np.int64), self._split.bounds(number)[0]
        places = {str(column): at * self._rows + start for at, column in enumerate(self._columns)}
        self._run.finished_before(images, {places[one.column] + one.position: one.reason for one in failures})

    def _write(
        self, number: int, matrices: Sequence[NDArray[np.float32]], failures: Sequence[Failure], *, raw: bool
    ) -> None:
        made = [part.recipe for part in self._parts]
        if raw:
            plain = normalize.Normalizer()
            made = [replace(one, block=replace(one.block, normalize="none"), normalizer=plain) for one in made]
        recipe = Recipe(tuple(made), self._told(), self.shelf.name)
        split = self._split
        about = About(self._found.made, number, split.count, split.chunk, raw, self._request)
        start, stop = split.bounds(number)
        with self._explained(), self._run.timings.while_attaching():
            piece.write(self.shelf, about, self._own.table.slice(start, stop - start), recipe, matrices, failures)
        there = self._found.raw if raw else self._found.parts
        there[number] = Piece(about, recipe, failures, stop - start)

    def _normalize(self) -> Iterator[Batch]:
        """Learn from the features in the hidden folder, and write them normalized."""
        unknown = [part for part in self._parts if part.normalizer is None]
        learners = {part.prefix: normalize.Learner(part.block, part.raw_width) for part in unknown}
        for number in sorted(self._found.raw) if learners else ():
            with self._run.timings.while_attaching():
                for part in unknown:
                    learners[part.prefix].see(self._raw(number, part)[self._chosen(number, part)])
            yield Batch()
        for part in unknown:
            part.normalizer = learners[part.prefix].learned()
        for number, there in sorted(self._found.raw.items()):
            with self._run.timings.while_attaching():
                matrices = [part.normalized(self._raw(number, part)) for part in self._parts]
            self._write(number, matrices, there.failures, raw=False)
            self.shelf.remove(there.about.name)
            del self._found.raw[number]
            yield Batch()

    def _raw(self, number: int, part: FeatureColumns) -> NDArray[np.float32]:
        rows = piece.rows_of(self.shelf, piece.file_name(number, raw=True), part.prefix, part.raw_width)
        return rows.copy()  # which may be written

    def _chosen(self, number: int, part: FeatureColumns) -> NDArray[np.bool_]:
        start, stop = self._split.bounds(number)
        chosen = np.ones(stop - start, bool) if self._fit_on is None else self._fit_on[start:stop].copy()
        column = str(part.column)
        chosen[[one.position for one in self._found.raw[number].failures if one.column == column]] = False
        return chosen

    def _end(self) -> None:
        """Leave nothing but the parts."""
        self.shelf.remove_folder(RAW)
        self.shelf.remove(MANIFEST)
        sizes = self.shelf.sizes()
        self.files = self._split.count
        self.bytes = sum(size for name, size in sizes.items() if name not in {LOCK, MANIFEST})
        for lane in self._run.lanes:
            lane.features.clear()

    def _clear(self) -> None:
        for there in [*self._found.parts.values(), *self._found.raw.values()]:
            self.shelf.remove(there.about.name)
        self._found = Survey()
        self.shelf.remove_folder(RAW)
        self.shelf.remove(MANIFEST)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of a failing disk what is there, and how to go on."""
        try:
            yield
        except OSError as error:
            there = f"{len(self._there):,} of {self._split.count:,} files are finished and stay"
            raise ExtractionError(
                f"{self.shelf.shown} could not be written: {error.strerror or error}. {there}: make room there, and "
                "run the same again to go on."
            ) from error
