"""Extraction: the loop behind every interface, from a checked request to a result, batch by batch."""

from __future__ import annotations

import inspect
import time
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nbfeat import isolation
from nbfeat.errors import ExtractionError, NbfeatError, RequestError, format_bytes, listing
from nbfeat.extraction import normalize, report
from nbfeat.extraction.columns import FeatureColumns, places
from nbfeat.extraction.feature_table import FeatureTable, block_called, failure_table
from nbfeat.extraction.pipeline import LocalExecutor, images_per_second
from nbfeat.extraction.profile import Profile
from nbfeat.extraction.ray_workers import executor_for
from nbfeat.extraction.recipe import Like, Recipe
from nbfeat.extraction.request import Blocks, Frame, read_request
from nbfeat.extraction.run import Run, Step
from nbfeat.extraction.sink import DatasetSink, MemorySink
from nbfeat.images.sources import hosts, name_of
from nbfeat.inference.engines.devices import is_out_of_memory
from nbfeat.inference.spec import NUMERICS

if TYPE_CHECKING:
    import pandas as pd

State = Literal["new", "running", "stopped", "failed", "done"]
LIBRARIES = ("nbfeat", "keras", "openvino", "pillow", "simplejpeg", "numpy", "scikit-learn")


class Extraction(FeatureTable):
    """Features of the images in a dataframe column, extracted batch by batch.

    Creating one only checks the request. `steps` or `run` does the work; then read the result.

    Parameters
    ----------
    frame : DataFrame, str, Path or ray.data.Dataset
        Dataframe with a column of images; it is never changed. A path is that of a Parquet file or folder to read.
    *blocks : str, FeatureBlock or list of them
        What to extract, e.g. ``"ResNet50"`` or ``"VGG16 --layer block4_pool --pooling max"``.
    images : column name or list of column names, optional
        Columns that hold images. By default the column that looks like images.
    fit_on : str or array of bool, optional
        Rows used to fit normalization and PCA: a query for ``frame.eval``, or one bool per row. By default all rows.
    like : Extraction, Result, str or Path, optional
        Earlier result to repeat, or the path of a Parquet file or folder that nbfeat wrote. Its blocks, image columns,
        precision, fitted normalization and column names are used; nothing is fitted. `images` may name other columns.
    root : str or Path, optional
        Folder that relative paths start from. By default the working directory.
    replace : bool, default False
        Overwrite columns of the same names that no block made and, with `parquet`, files from a different request.
    batch_size : int or "auto", default "auto"
        Images per batch, 1 to 4,096.
    device : str, default "auto"
        ``"cpu"``, ``"gpu"``, a numbered GPU such as ``"gpu:1"``, or ``"auto"``: all GPUs if there are any, else CPU.
    precision : {"auto", "float32", "bfloat16", "float16"}, default "auto"
        Number format that the network computes in. ``"auto"`` picks the fastest that agrees with float32.
    on : {"ray"}, optional
        Compute on a Ray cluster: the current one or, if none exists, one started on this machine for the run. All
        machines must see the images at the same paths. By default in this process.
    allow_remote : bool, default False
        Fetch images from URLs: ``https://…``, ``s3://…``, ``gs://…``, or ``zip://image::archive`` for a local archive.
        Hosts on private networks also need the environment variable ``NBFEAT_REMOTE_PRIVATE=1``.
    parquet : str or Path, optional
        Folder or URL, e.g. ``"s3://bucket/features"``, to write Parquet files to while computing, for results larger
        than memory. `nbfeat.read` reads them.
    cache : bool, optional
        Whether to use cached features and save new ones. By default True, but False with `parquet`, where the same
        call resumes from its files.
    **defaults
        Fields of FeatureBlock for blocks that don't set them, e.g. ``pooling="max"``.

    Attributes
    ----------
    blocks : list of FeatureBlock
        What is extracted.
    total : int
        Number of images: rows × image columns.
    state : {"new", "running", "stopped", "failed", "done"}
        How far it is. One that was stopped or failed can be resumed.
    seconds : float
        Working time so far.

    Raises
    ------
    RequestError
        The request is invalid; nothing was started.

    Examples
    --------
    >>> extraction = nbfeat.Extraction(photos, "EfficientNetLite0", images="path")
    >>> for step in extraction.steps():
    ...     done, failed = step.done, step.failed
    >>> extraction.state
    'done'
    """

    def __init__(
        self, frame: Frame, *blocks: Blocks, images: Hashable | Sequence[Hashable] | None = None,
        fit_on: str | Sequence[bool] | None = None, like: Like | None = None, root: str | Path | None = None,
        replace: bool = False, batch_size: int | str = "auto", device: str = "auto", precision: str = "auto",
        on: str | None = None, allow_remote: bool = False, parquet: str | Path | None = None,
        cache: bool | None = None, **defaults: Any,
    ) -> None:  # fmt: skip
        self.request = request = read_request(
            frame, blocks, defaults, images=images, fit_on=fit_on, like=like, root=root, replace=replace,
            batch_size=batch_size, device=device, precision=precision, on=on, remote=allow_remote,
        )  # fmt: skip
        self.blocks, self.parts, self.repeats = request.blocks, request.parts, request.repeats
        self.root, self.total = request.root, len(request.images)  # of images: rows × image columns
        self.state: State = "new"
        self.seconds, self._is_prepared = 0.0, False
        executor = executor_for(on, request.images, request.specs) or LocalExecutor()
        self._run = Run(request, executor, cache=parquet is None if cache is None else cache)
        self.progress, self.timings, self.notes = self._run.progress, self._run.timings, self._run.notes
        self.written = None if parquet is None else DatasetSink(parquet, self._run, request, lambda: self.recipe)
        self._sink = self.written or MemorySink(self._run, request)

    def steps(self) -> Generator[Step, None, None]:
        """Work batch by batch; stop iterating or close the generator to stop, and call this again to resume.

        Yields
        ------
        Step
            Progress after each batch: ``done``, ``total``, ``failed``, ``cached``, ``seconds``, ``images_per_second``,
            ``seconds_left``, ``bottleneck``; and before the first batch ``note``, what is being prepared.

        Raises
        ------
        NbfeatError
            The run cannot continue, e.g. ExtractionError if every image failed.
        """
        if self.state == "running":
            raise ExtractionError("This extraction is already running: wait for it, or create another one.")
        if self.state == "done":
            return
        try:
            self.state, started = "running", time.perf_counter() - self.seconds
            with isolation.pillow_defaults(), self._run.caching(), self._sink.held(), self._run.executor:
                for note in self._prepare():
                    self.seconds = time.perf_counter() - started
                    yield self._step(note)
                with closing(self._sink.batches()) as batches:
                    for _ in batches:
                        self.seconds = time.perf_counter() - started
                        yield self._step()
            self._run.check_some_succeeded(self.request.columns)
            self._sink.finish()
            self.seconds = time.perf_counter() - started
            self.state = "done"
        except BaseException as error:
            self.state = "stopped" if isinstance(error, GeneratorExit | KeyboardInterrupt) else "failed"
            if not isinstance(error, NbfeatError) and (is_out_of_memory(error) or "open files" in str(error)):
                way = f"({error or 'no more memory'}). Close other notebooks or raise its limits, and run it again."
                raise ExtractionError(f"This process ran out of memory, threads or open files {way}") from error
            raise

    def run(self) -> Extraction:
        """Work to the end; raises the same errors as `steps`.

        Returns
        -------
        Extraction
            This object, finished.
        """
        for _ in self.steps():
            pass
        return self

    def like(self: FeatureTable, frame: Frame, **options: Any) -> Extraction:
        """Repeat this on another frame with the same blocks, precision and fitted normalization.

        Parameters
        ----------
        frame : DataFrame, str, Path or ray.data.Dataset
            Frame of other images; the features get the same column names.
        **options
            Other parameters of Extraction, e.g. ``root``, or ``images`` if the column has a different name.

        Returns
        -------
        Extraction
            Finished. An image gets the same features as in this result, bit for bit on the CPU of one machine.

        Raises
        ------
        RequestError
            This isn't finished, or something that decides the features has changed, e.g. the weights.

        Examples
        --------
        >>> train = nbfeat.extract(photos[::2], "EfficientNetLite0", normalize="standard")
        >>> test = train.like(photos[1::2])
        """
        return Extraction(frame, like=self, **options).run()

    def _prepare(self) -> Iterator[str]:
        if not self.request.images and all(part.is_sized for part in self.parts) and not self.written:
            return
        if not self._run.networks:
            yield from self._run.open()
        if not self._is_prepared:
            if self.repeats:
                self._run.note(self.repeats.check([self._run.networks[part.network_index] for part in self.parts]))
            for part in self.parts:
                part.network = self._run.networks[part.network_index]
                if part.block.is_learned and not self.repeats and self.total:
                    count = self.request.fit_count
                    normalize.check(part.block, part.raw_width, len(self.request.frame) if count is None else count)
            places(self.request.frame, self.parts, replace=self.request.replace)
            self._sink.make_room()
            self._is_prepared = True
            yield self._coming()

    @property
    def done(self) -> int:
        """Number of finished images, including failed and cached ones."""
        return self.progress.done

    @property
    def cached(self) -> int:
        """Number of images whose features all came from the cache."""
        return self.progress.cached

    @property
    def computed(self) -> int:
        """Number of images whose features were computed, including duplicates that share them."""
        return self.done - self.cached - len(self.progress.reasons)

    @property
    def kept(self) -> int:
        """Number of images that another run need not compute because their features are in the cache or in files."""
        return self.done - len(self.progress.reasons) if self._run.keeps else self._sink.kept

    @property
    def keeps(self) -> bool:
        """Whether finished features are in the cache or in files, from which another run resumes."""
        return self._run.keeps or bool(self.kept)

    @property
    def profile(self) -> Profile:
        """Seconds by kind of work, and the bottleneck; print it or show it in a notebook."""
        return Profile(self.timings, seconds=self.seconds, computed=bool(self.computed))

    @property
    def engines(self) -> list[str]:
        """Names of the engines that run the networks, e.g. OpenVINO with its version."""
        return list(dict.fromkeys(network.prepared.name for network in self._run.networks))

    @property
    def precision(self) -> str:
        """Number format that the networks compute in; before they are loaded, the requested one."""
        settled = listing(dict.fromkeys(network.precision for network in self._run.networks))
        return settled or (self.repeats.precision if self.repeats else self.request.precision)

    @property
    def rate(self) -> float:
        """Images per second so far, without cached images, loading networks and attaching columns."""
        apart = self.timings.preparing + self.timings.recalling + self.timings.attaching
        worked, working = self.done - self.cached, self.seconds - apart
        return worked / working if worked and working > 0 else 0.0

    def _step(self, note: str = "") -> Step:
        rate = self.rate
        left = (self.total - self.done) / rate if rate else None
        counts = self.done, self.total, len(self.progress.reasons), self.cached
        return Step(*counts, self.seconds, rate, left, self.profile["bottleneck"], note, self._sink.kept_words)

    def _coming(self) -> str:
        width = sum(len(part.names) for part in self.parts)
        size = format_bytes(4 * len(self.request.frame) * sum(part.raw_width for part in self.parts))
        weights = listing(dict.fromkeys(network.prepared.weights.name for network in self._run.networks))
        matrix = f"{len(self.request.frame):,} rows × {width:,} columns ({size} {self._sink.place})"
        count = len(hosts(self.request.images)) if self.request.remote else 0
        fetched = f" · fetching images from {count:,} host{'s' if count > 1 else ''}" if count else ""
        return f"{matrix} · {weights} weights · {listing(self.engines)} · {self.precision}{fetched}"

    @property
    def frame(self) -> pd.DataFrame:
        """The given columns, then the features, with the same rows and index."""
        self._check_finished()
        return self._sink.frame

    def _check_finished(self) -> None:
        if self.state != "done":
            there = f"{self.done:,} of {self.total:,} images"
            raise ExtractionError(f"This extraction isn't finished: {there}. Call its `run()` first.")

    @property
    def columns(self) -> list[str]:
        """Names of the new columns."""
        self._check_finished()
        return [name for part in self.parts for name in part.names]

    def __getitem__(self, prefix: str) -> pd.DataFrame:
        """Return one block's columns by their prefix, without copying."""
        index, parts = self.frame.index, {part.prefix: part for part in self.parts}
        return parts[block_called(prefix, parts)].frame(index)

    @property
    def failures(self) -> pd.DataFrame:
        """Images without features: position (row number), column, image and reason, indexed like the frame."""
        request, count, reasons = self.request, len(self.request.frame), self.progress.reasons
        found = sorted(reasons, key=lambda row: (row % count, row))
        rows = [(at % count, request.columns[at // count], name_of(request.images[at]), reasons[at]) for at in found]
        return failure_table(rows, request.frame.index)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Everything needed to repeat this result: blocks, versions, weight hashes, engines and precision."""
        return {
            "blocks": [str(part.block) for part in self.parts],
            "images": [str(part.column) for part in self.parts],
            "weights": [part.network.prepared.weights.sha256 if part.network else "" for part in self.parts],
            "engines": self.engines, "precision": self.precision, "numerics": NUMERICS,
            "versions": {name: isolation.version_of(name) for name in LIBRARIES},
        }  # fmt: skip

    def to_recipe(self, source: str = "the earlier result") -> Recipe:
        """Return `fitted`, called `source` in messages; raise RequestError if unfinished or without rows."""
        problem = f"{source} can't be repeated:"
        if self.state != "done":
            there = f"its state is {self.state!r}, {self.done:,} of {self.total:,} images"
            raise RequestError(f"{problem} {there}. Call its `run()` first.")
        if any(part.normalizer is None for part in self.parts):
            raise RequestError(f"{problem} its frame has no rows to fit on. Extract features of some images first.")
        return Recipe(tuple(part.recipe for part in self.parts), self.recipe, source)

    @property
    def fitted(self) -> Recipe:
        """The recipe that `like` repeats: blocks, fitted normalization and everything that decides the features."""
        return self.to_recipe()

    def _report(self) -> report.Report:
        finished = self.state == "done"
        subject = f"{len(self.columns):,} new columns from" if finished else f"{self.state}: {self.done:,} of"
        count = self.progress.equal
        equal = [f"{count:,} images are identical to others and share their features."] if count else []
        written = [self.written.sentence] if self.written and finished else []
        limit = f" · bottleneck: {bottleneck}" if (bottleneck := self.profile["bottleneck"]) else ""
        fitted = report.normalization_notes(self.parts, repeats=self.repeats, fit_rows=self.request.fit_count)
        return report.Report(
            headline=report.headline(subject, self._step(), self.timings.preparing),
            blocks=[report.made_row(part, self.cached) for part in self.parts] if finished else [],
            planned=[] if finished else [report.briefly(block) for block in self.blocks],
            total=self.total, failures=self.failures, notes=[*self.notes, *written, *equal, *fitted],
            footer=f"{listing(self.engines) or 'no network was run'} · {self.precision}{limit}",
        )  # fmt: skip

    def before_normalization(self) -> Extraction:
        """Return a new Extraction with the same images, precision and fitted blocks, but without normalization."""
        import pandas as pd

        # All blocks of these networks, because an engine may distinguish cached features by all outputs of a network.
        indices = {part.network_index for part in self.parts if part.block.is_learned}
        asked = dict.fromkeys(part.block for part in self.parts if part.network_index in indices)
        blocks = [replace(block, normalize="none", components=None) for block in asked]
        images = {column: self.images_in(column) for column in self.request.columns}
        raw = Extraction(
            pd.DataFrame(images, dtype=object), blocks, images=self.request.columns, root=self.request.root,
            replace=True, batch_size=self._run.batch_size or "auto", device=self._run.device, on=self.request.on,
            allow_remote=self.request.remote, cache=self._run.uses_cache,
        )  # fmt: skip
        in_order = dict.fromkeys(part.network_index for part in self.parts if part.network_index in indices)
        raw._run.repeat(dict(enumerate(self._run.networks[number].precision for number in in_order)))
        return raw

    def speed_of(self, part: FeatureColumns) -> float:
        """Measure images per second of one of `parts`, from file to features, without the cache."""
        assert part.network is not None
        images = self.request.images_of(part.column)
        some = [self.request.images[images.start + at] for at in np.flatnonzero(self.progress.ok[images])]
        return images_per_second(part.network, part.block.cut.key, some, self.root, remote=self._run.remote)

    def images_in(self, column: Hashable) -> list[object]:
        """Return the cells of an image column as they were when this was created."""
        return self.request.images[self.request.images_of(column)]


def extract(frame: Frame, *blocks: Blocks, **options: Any) -> Extraction:
    """Extract features from the images in a dataframe column.

    Returns
    -------
    Extraction
        Finished: ``.frame`` is the frame with the new columns, ``.features`` has only the new columns, and
        ``.failures`` lists the images without features.

    Raises
    ------
    RequestError
        The request is invalid; nothing was started.
    ExtractionError
        Every image failed.

    Examples
    --------
    >>> result = nbfeat.extract(photos, "EfficientNetLite0", images="path")
    >>> result.frame.shape
    (12, 1282)
    """
    return Extraction(frame, *blocks, **options).run()


# `nbfeat.extract?` shows the parameters of Extraction.
extract.__signature__ = inspect.signature(Extraction).replace(return_annotation="Extraction")  # type: ignore[attr-defined]
_parameters = inspect.cleandoc(Extraction.__doc__ or "").partition("Parameters\n")[2].partition("Attributes\n")[0]
extract.__doc__ = inspect.cleandoc(extract.__doc__ or "").replace("Returns\n", f"Parameters\n{_parameters}Returns\n", 1)
