"""Extraction: the one loop behind every face.

An Extraction that was just made has done nothing. Ask `steps()` for the next Step to work; stop asking to stop; call it
again to go on. Read the result when it is done.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Collection, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nbfeat import isolation
from nbfeat.backbones.catalog import find
from nbfeat.errors import ExtractionError, format_bytes, listing, sentences
from nbfeat.extraction.columns import attach, block_called
from nbfeat.extraction.like import Like, to_repeat
from nbfeat.extraction.options import FeatureBlock, whole
from nbfeat.extraction.part import normalized, plan, plan_again
from nbfeat.extraction.profile import Bottleneck, Profile, Timings
from nbfeat.extraction.recipe import Recipe
from nbfeat.extraction.request import Blocks, Frame, check_place, read_blocks, read_frame, rows_selected
from nbfeat.extraction.run import Run
from nbfeat.extraction.sink import DatasetSink
from nbfeat.images.public_hosts import NOT_ALLOWED
from nbfeat.images.remote import Access
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import hosts, image_column, name_of
from nbfeat.inference import engines, model

if TYPE_CHECKING:
    import pandas as pd

    from nbfeat.extraction.part import FeatureColumns

State = Literal["new", "running", "stopped", "failed", "done"]
LARGEST_BATCH = 4096
FIRST_REASONS = 3
LIBRARIES = ("nbfeat", "keras", "openvino", "pillow", "simplejpeg", "numpy", "scikit-learn")


@dataclass(frozen=True, slots=True)
class Step:
    """How far a run is, after one batch of images."""

    done: int  # images finished, failed ones and those from the cache too
    total: int
    failed: int
    cached: int  # images whose features came from the cache, or were in files already
    seconds: float  # of work so far
    images_per_second: float
    seconds_left: float | None
    bottleneck: Bottleneck | None
    note: str = ""  # what is being prepared, before the first batch
    kept: str = "from the cache"  # where the cached ones were


class Extraction:
    """Features of the images in a frame's column: `steps()` to work, then read it for the result.

    Parameters
    ----------
    frame
        A pandas DataFrame with a column of images, which is never changed; or a path of a Parquet file or folder, or a
        ``ray.data.Dataset``, which are read into one.
    *blocks
        What to extract: ``"ResNet50"``, ``"VGG16 --layer block4_pool --pooling max"``, or FeatureBlocks.
    images
        The column that holds images, or several; by default the one that looks like images.
    fit_on
        Rows that learned normalizations learn from: a query for ``frame.eval``, or a mask; by default all rows.
    like
        An earlier Extraction that is done, or a Parquet file or folder that nbfeat wrote: its blocks, image columns,
        precision and normalizations are repeated, and nothing is learned. `images` may name other columns; the columns
        that are made keep their names.
    root
        Where relative paths start; by default the working folder.
    replace
        Overwrite columns of the same names that no block made; with `parquet`, files of another request, too.
    batch_size, device, precision
        ``"auto"``, or a number of images; ``"cpu"``, ``"gpu"``, ``"gpu:1"``; ``"float32"``, ``"bfloat16"``,
        ``"float16"``.
    on
        ``"ray"`` to compute on a Ray cluster: the one that is there, else one started here for the run; by default
        in this process. Other machines must find the images at the same paths.
    allow_remote
        Fetch images by address: ``https://…``, ``s3://…``, ``gs://…``, and ``zip://image::archive`` of a local
        archive. Private machines are only connected to where the environment has ``NBFEAT_REMOTE_PRIVATE=1``.
    parquet
        Write to Parquet files in this folder, or at an address such as ``"s3://bucket/features"``, as features are
        computed, and hold none of them: for results larger than memory. `nbfeat.read` reads them.
    cache
        Take features from the cache, and keep new ones there; False for neither. By default True, and with `parquet`
        False: the same call goes on where its files end.
    **defaults
        Block options for blocks that do not say otherwise, e.g. ``pooling="max"``.

    Raises
    ------
    RequestError
        Where something asked for cannot be; nothing was started then.
    """

    def __init__(
        self,
        frame: Frame,
        *blocks: Blocks,
        images: Hashable | Sequence[Hashable] | None = None,
        fit_on: str | Sequence[bool] | None = None,
        like: Like | None = None,
        root: str | Path | None = None,
        replace: bool = False,
        batch_size: int | str = "auto",
        device: str = "auto",
        precision: str = "auto",
        on: str | None = None,
        allow_remote: bool = False,
        parquet: str | Path | None = None,
        cache: bool | None = None,
        **defaults: Any,
    ) -> None:
        frame = read_frame(frame)
        self._frame, self._replace = frame, replace
        self._root = Path(root or "").expanduser().absolute()
        self._precision = engines.check_precision(precision)
        self.repeats = to_repeat(like, blocks=blocks, fit_on=fit_on, precision=precision, defaults=defaults)
        asked = images if isinstance(images, list | tuple) else [images]
        if self.repeats is None:
            self.blocks = read_blocks(blocks, defaults)
            self._columns = [image_column(frame, column) for column in asked]
            self.parts = plan(self.blocks, self._columns)
        else:
            self.blocks = self.repeats.blocks
            asked = self.repeats.columns if images is None else asked
            self._columns = [image_column(frame, column) for column in asked]
            self.parts = plan_again(self.repeats, self._columns)
        self._fit_on = None if fit_on is None else rows_selected(frame, fit_on)
        groups = model.group(self.blocks, _network_and_pixels)
        networks = [(model.NetworkSpec.of(group), _pixels(group[0])) for group in groups]
        for part in self.parts:
            if part.is_sized:
                part.place_in(frame, replace=replace)
            part.network = next(number for number, group in enumerate(groups) if part.block in group)

        self.state: State = "new"
        self.seconds = 0.0
        self._images = [value for column in self._columns for value in frame[column].tolist()]
        self.allow_remote = allow_remote
        self._run = Run(
            self._images,
            self._root,
            networks,
            device=engines.check_device(device),
            precision=self._precision,
            batch_size=None if batch_size == "auto" else whole("--batch-size", LARGEST_BATCH)(batch_size),
            cache=parquet is None if cache is None else cache,
            remote=Access.here() if allow_remote else None,
            on=check_place(on, self._images, networks),
        )
        if self.repeats is not None:
            earlier = {part.network: part.repeats.precision for part in self.parts if part.repeats}
            self._run.repeat([earlier[number] for number in range(len(networks))])
        self._result: pd.DataFrame | None = None
        self.written = None
        if parquet is not None:
            self.written = DatasetSink(
                parquet, frame, self._run, self.parts, repeats=self.repeats, fit_on=self._fit_on,
                describe=lambda: self.recipe, starts_over=replace,
            )  # fmt: skip

    # Working

    def steps(self) -> Generator[Step, None, None]:
        """Work: one Step after each batch. Stop asking, or close the generator, to stop; call again to go on."""
        if self.state == "running":
            raise ExtractionError("This extraction is already running: wait for it, or make another one.")
        if self.state == "done":
            return
        self.state, started = "running", time.perf_counter() - self.seconds
        try:
            with (
                isolation.pillow_defaults(),
                self._run.caching(),
                self.written.held() if self.written else nullcontext(),
            ):
                for note in self._prepare():
                    self.seconds = time.perf_counter() - started
                    yield self._step(note)
                with closing((self.written or self._run).batches()) as batches:
                    for _ in batches:
                        self.seconds = time.perf_counter() - started
                        yield self._step()
            self._finish()
            self.seconds = time.perf_counter() - started
            self.state = "done"
        except (GeneratorExit, KeyboardInterrupt):
            self.state = "stopped"
            raise
        except BaseException:
            self.state = "failed"
            raise

    def run(self) -> Extraction:
        """Work to the end and return this Extraction."""
        for _ in self.steps():
            pass
        return self

    def like(self, frame: Frame, **options: Any) -> Extraction:
        """Repeat this on another frame, to the end: the same blocks and precision, normalized by what was learned here.

        Parameters
        ----------
        frame
            The frame of the other images; its features get the same names.
        **options
            Options of the run, e.g. ``root``, ``batch_size``, or ``images`` where the column has another name.

        Returns
        -------
        Extraction
            Finished, as `extract` returns it. Features of an image are those that it would have had beside the rows
            that were learned from: on the CPU of one machine, to the bit.

        Raises
        ------
        RequestError
            Where this is not done, or cannot be repeated here, e.g. with other weights; it names the difference.

        Examples
        --------
        >>> train = nbfeat.extract(frame, "ResNet50", normalize="standard")  # doctest: +SKIP
        >>> test = train.like(other)  # doctest: +SKIP
        """
        return Extraction(frame, like=self, **options).run()

    def _prepare(self) -> Iterator[str]:
        """Make the networks ready, and room for what they give; now that widths are known, clashes are told."""
        if not self._images and all(part.is_sized for part in self.parts) and not self.written:
            return
        if not self._run.lanes:
            yield from self._run.open()
        if self.parts[-1].lane is None:
            if self.repeats:
                self._run.note(self.repeats.check([self._run.lanes[part.network] for part in self.parts]))
            for part in self.parts:
                part.lane = self._run.lanes[part.network]
                part.place_in(self._frame, replace=self._replace)
                if self.written is None:
                    part.make_room(len(self._images))
            yield self._coming()

    def _finish(self) -> None:
        """Normalize, and attach the columns."""
        start = time.perf_counter()
        self._check_some_succeeded()
        if self.written:
            return
        raw = [part.raw(self._images_of(part.column)) for part in self.parts]
        for part, rows in zip(self.parts, raw, strict=True):
            good = self._ok_in(part.column)
            part.learn(rows, good if self._fit_on is None else good & self._fit_on)
        try:
            self._attach(raw)
        except BaseException:
            self._run.forget()  # rows may be half normalized, in place
            raise
        self._run.timings.attaching += time.perf_counter() - start

    def _attach(self, raw: Sequence[NDArray[np.float32]]) -> None:
        for part, rows in zip(self.parts, normalized(self.parts, raw), strict=True):
            part.rows = rows
        places = [part.place_in(self._frame, replace=self._replace) for part in self.parts]
        for part, there in zip(self.parts, places, strict=True):
            part.replaced = bool(there.replaced)
        self._result = attach(self._frame, [part.frame(self._frame.index) for part in self.parts], places)
        for lane in self._run.lanes:
            lane.features.clear()  # what no part holds may go

    def _check_some_succeeded(self) -> None:
        reasons = self._run.progress.reasons
        if not self._images or len(reasons) < len(self._images):
            return
        first = list(reasons.items())[:FIRST_REASONS]
        shown = "; ".join(f"{name_of(self._images[row])}: {reason}" for row, reason in first)
        way = f"Check the values of column {listing(map(repr, self._columns))}."
        if all(reason.startswith("no such file") for reason in reasons.values()):
            way = f"Relative paths start at {self._root}: set another folder with --root."
        if set(reasons.values()) == {NOT_ALLOWED}:
            way = "Say so where they are addresses that you trust."
        raise ExtractionError(sentences(f"None of the {len(self._images):,} images could be read. {shown}.", way))

    # How far it is

    @property
    def done(self) -> int:
        """How many images are finished, failed ones and those from the cache too."""
        return self._run.progress.done

    @property
    def cached(self) -> int:
        """How many images have all their features from the cache."""
        return self._run.progress.cached

    @property
    def total(self) -> int:
        """How many images there are: rows × image columns."""
        return len(self._images)

    @property
    def computed(self) -> int:
        """How many images a network ran over, or share the features of one."""
        return self.done - self.cached - len(self._run.progress.reasons)

    @property
    def equal(self) -> int:
        """How many images share the features of another of the same content."""
        return self._run.progress.equal

    @property
    def keeps(self) -> bool:
        """Whether what is finished is in the cache or in files, so that another run goes on from there."""
        return self._run.keeps or bool(self.kept)

    @property
    def where_kept(self) -> str:
        """Where those are that need not be computed, in words."""
        return "in files already" if self.written else "from the cache"

    @property
    def kept(self) -> int:
        """How many images another run need not compute."""
        if self._run.keeps:
            return self.done - len(self._run.progress.reasons)
        return self.written.kept if self.written else 0

    @property
    def notes(self) -> list[str]:
        """What went another way than asked for."""
        return self._run.notes

    @property
    def timings(self) -> Timings:
        """Where the time went."""
        return self._run.timings

    @property
    def rate(self) -> float:
        """Images per second so far; those from the cache, preparing networks and attaching columns apart."""
        apart = self._run.timings.preparing + self._run.timings.recalling + self._run.timings.attaching
        worked, working = self.done - self.cached, self.seconds - apart
        return worked / working if worked and working > 0 else 0.0

    @property
    def engines(self) -> list[str]:
        """What runs the networks."""
        return list(dict.fromkeys(lane.name for lane in self._run.lanes))

    @property
    def precision(self) -> str:
        """What the networks compute in; before they are ready, what is asked for."""
        settled = listing(dict.fromkeys(lane.precision for lane in self._run.lanes))
        return settled or (self.repeats.precision if self.repeats else self._precision)

    @property
    def fit_rows(self) -> int | None:
        """How many rows `fit_on` selects, or None where all are learned from."""
        return None if self._fit_on is None else int(self._fit_on.sum())

    def _step(self, note: str = "") -> Step:
        left = (self.total - self.done) / self.rate if self.rate else None
        failed = len(self._run.progress.reasons)
        counts = self.done, self.total, failed, self.cached
        return Step(*counts, self.seconds, self.rate, left, self.bottleneck, note, self.where_kept)

    def _coming(self) -> str:
        """Say what is coming, before it comes."""
        width = sum(len(part.names) for part in self.parts)
        size = format_bytes(4 * len(self._frame) * sum(part.raw_width for part in self.parts))
        weights = listing(dict.fromkeys(lane.weights.name for lane in self._run.lanes))
        where = f"in {self.written.address}" if self.written else "of memory"
        matrix = f"{len(self._frame):,} rows × {width:,} columns ({size} {where})"
        count = len(hosts(self._images)) if self.allow_remote else 0
        fetched = f" · images are fetched from {count:,} host{'s' if count > 1 else ''}" if count else ""
        return f"{matrix} · {weights} weights · {listing(self.engines)} · {self.precision}{fetched}"

    # The result

    @property
    def frame(self) -> pd.DataFrame:
        """The given columns, then the features: same index, same order, same rows."""
        self._check_finished()
        if self.written:
            shown = self.written.address
            raise ExtractionError(f"The features are in {shown}, none in memory: nbfeat.read({shown!r}) reads them.")
        assert self._result is not None
        return self._result

    def _check_finished(self) -> None:
        if self.state != "done":
            raise ExtractionError(
                f"This extraction is not finished: {self.done:,} of {self.total:,} images. Ask `steps()` for more."
            )

    @property
    def root(self) -> Path:
        """Where relative paths start."""
        return self._root

    @property
    def features(self) -> pd.DataFrame:
        """Only the new columns, float32; rows that failed are NaN."""
        return self.frame.loc[:, self.columns]

    @property
    def columns(self) -> list[str]:
        """The names of all new columns."""
        self._check_finished()
        return [name for part in self.parts for name in part.names]

    def __getitem__(self, prefix: str) -> pd.DataFrame:
        """Return one block's columns."""
        index = self.frame.index
        parts = {part.prefix: part for part in self.parts}
        return parts[block_called(prefix, parts)].frame(index)

    @property
    def ok(self) -> pd.Series:
        """Whether a row has all its features; indexed like the frame."""
        import pandas as pd

        good = np.logical_and.reduce([self._ok_in(column) for column in self._columns])
        return pd.Series(good, index=self.frame.index, name="ok")

    @property
    def failures(self) -> pd.DataFrame:
        """The images that gave no features: position, column, image and reason, indexed like the frame."""
        import pandas as pd

        count = len(self._frame)
        found = sorted(self._run.progress.reasons, key=lambda row: (row % count, row))
        positions = [row % count for row in found]
        table = {
            "position": positions,
            "column": [self._columns[row // count] for row in found],
            "image": [name_of(self._images[row]) for row in found],
            "reason": [self._run.progress.reasons[row] for row in found],
        }
        return pd.DataFrame(table, index=self._frame.index.take(np.array(positions, int)))

    def before_normalization(self) -> Extraction:
        """Return an Extraction, not yet run, of the same images and the blocks that learn a normalization, without it.

        What can be comes from the cache, since features are kept as they are before any normalization. Blocks beside
        those in one network come along, since an engine may keep features by all that a network gives.
        """
        import pandas as pd

        networks = {part.network for part in self.parts if part.block.is_learned}
        asked = dict.fromkeys(part.block for part in self.parts if part.network in networks)
        blocks = [replace(block, normalize="none", components=None) for block in asked]
        images = {column: self._images[self._images_of(column)] for column in self._columns}
        raw = Extraction(
            pd.DataFrame(images, dtype=object),
            blocks,
            images=self._columns,
            root=self._root,
            replace=True,
            batch_size=self._run.batch_size or "auto",
            device=self._run.device,
            allow_remote=self.allow_remote,
            cache=self._run.uses_cache,
            on=self._run.on,
        )
        in_order = dict.fromkeys(part.network for part in self.parts if part.network in networks)
        raw._run.repeat([self._run.lanes[number].precision for number in in_order])
        return raw

    def speed_of(self, part: FeatureColumns) -> float:
        """Measure how many images per second go from file to features of `part` alone, without the cache."""
        from nbfeat.extraction.speed import images_per_second

        good = np.flatnonzero(self._ok_in(part.column)) + self._images_of(part.column).start
        assert part.lane is not None
        return images_per_second(
            part.lane, part.key, [self._images[at] for at in good], self._root, remote=self._run.remote
        )

    @property
    def profile(self) -> Profile:
        """Seconds by kind of work, and which of them bounds the speed; print it, or show it in a notebook."""
        return Profile(self.timings, seconds=self.seconds, computed=bool(self.computed))

    @property
    def bottleneck(self) -> Bottleneck | None:
        """What bounds the speed; None where nothing had to be computed."""
        return self.timings.bottleneck if self.computed else None

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Everything needed to repeat this result: blocks, versions, hashes of weights, precision, decoding."""
        return {
            "blocks": [str(part.block) for part in self.parts],
            "images": [str(part.column) for part in self.parts],
            "weights": [part.lane.weights.sha256 if part.lane else "" for part in self.parts],
            "engines": self.engines,
            "precision": self.precision,
            "numerics": model.NUMERICS,
            "versions": {name: version(name) for name in LIBRARIES},
        }

    @property
    def fitted(self) -> Recipe:
        """What `like` repeats: the blocks with all that decides their numbers, and what they learned."""
        return Recipe.of(self)

    def to_parquet(self, path: str | Path, without: Collection[Hashable] = ()) -> None:
        """Write the frame to a Parquet file, with the recipe and what was learned, so that it can be repeated.

        Any reader of Parquet reads it as a table; `nbfeat.read` and `like` read the rest, too. It is written whole or
        not at all.

        Parameters
        ----------
        path
            The file; one that is there is replaced.
        without
            Columns of the given frame to leave out, e.g. one of PIL images, which Parquet cannot hold.

        Raises
        ------
        RequestError
            Where Parquet cannot hold a column, naming it, or what was learned is too large to travel.

        Examples
        --------
        >>> result.to_parquet("train.parquet")  # doctest: +SKIP
        >>> nbfeat.extract(others, like="train.parquet")  # doctest: +SKIP
        """
        from nbfeat.extraction.reading import write

        write(path, self.frame, self.fitted, self.failures, without)

    def __repr__(self) -> str:
        """Return the report as text."""
        from nbfeat.extraction import report

        return report.text(report.summarize(self))

    def _repr_html_(self) -> str:
        from nbfeat.extraction import report

        return report.html(report.summarize(self))

    def images_in(self, column: Hashable) -> list[object]:
        """Return the cells of an image column as they were when this was made."""
        return self._images[self._images_of(column)]

    def _images_of(self, column: Hashable) -> slice:
        """Return which of all images are those of `column`."""
        start = self._columns.index(column) * len(self._frame)
        return slice(start, start + len(self._frame))

    def _ok_in(self, column: Hashable) -> NDArray[np.bool_]:
        good = np.ones(len(self._images), bool)
        good[list(self._run.progress.reasons)] = False
        return good[self._images_of(column)]


def extract(frame: Frame, *blocks: Blocks, **options: Any) -> Extraction:
    """Extract features of the images in a frame's column, to the end.

    Takes what Extraction takes and returns it finished: ``.frame`` is the frame with the new columns, ``.features``
    the new columns alone, ``.failures`` the images that gave none.

    Examples
    --------
    >>> result = nbfeat.extract(photos, "ResNet50", images="path")  # doctest: +SKIP
    >>> result.frame.shape  # doctest: +SKIP
    (300, 2050)
    """
    return Extraction(frame, *blocks, **options).run()


# What `extract?` and an editor show are Extraction's own parameters.
extract.__signature__ = inspect.signature(Extraction).replace(return_annotation="Extraction")  # type: ignore[attr-defined]


def _network_and_pixels(block: FeatureBlock) -> tuple[object, ...]:
    return replace(model.NetworkSpec.of([block]), cuts=()), _pixels(block)


def _pixels(block: FeatureBlock) -> PixelSpec:
    return PixelSpec(block.size or find(block.backbone).size, block.resize, block.interpolation)
