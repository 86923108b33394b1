"""Extraction: from a request to a result, batch by batch; the one loop behind every face.

An Extraction that was just made has done nothing. Ask `steps()` for the next Step to work; stop asking to stop; call it
again to go on. Read the result when it is done.
"""

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
from nbfeat.errors import ExtractionError, RequestError, format_bytes, listing
from nbfeat.extraction import normalize, report
from nbfeat.extraction.columns import FeatureColumns, places
from nbfeat.extraction.feature_table import FeatureTable, block_called
from nbfeat.extraction.pipeline import LocalExecutor, images_per_second
from nbfeat.extraction.profile import Profile
from nbfeat.extraction.ray_workers import executor_for
from nbfeat.extraction.recipe import Like, Recipe
from nbfeat.extraction.request import Blocks, Frame, read_request
from nbfeat.extraction.run import Run, Step
from nbfeat.extraction.sink import DatasetSink, MemorySink
from nbfeat.images.sources import hosts, name_of
from nbfeat.inference.spec import NUMERICS

if TYPE_CHECKING:
    import pandas as pd

State = Literal["new", "running", "stopped", "failed", "done"]
LIBRARIES = ("nbfeat", "keras", "openvino", "pillow", "simplejpeg", "numpy", "scikit-learn")


class Extraction(FeatureTable):
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
        self.request = request = read_request(
            frame, blocks, defaults, images=images, fit_on=fit_on, like=like, root=root, replace=replace,
            batch_size=batch_size, device=device, precision=precision, on=on, remote=allow_remote,
        )  # fmt: skip
        self.blocks, self.parts, self.repeats = request.blocks, request.parts, request.repeats
        self.root, self.total = request.root, len(request.images)  # of images: rows × image columns
        self.state: State = "new"
        self.seconds = 0.0
        executor = executor_for(on, request.images, request.specs) or LocalExecutor()
        self._run = Run(request, executor, cache=parquet is None if cache is None else cache)
        self.progress, self.timings, self.notes = self._run.progress, self._run.timings, self._run.notes
        self.written = None
        if parquet is not None:
            self.written = DatasetSink(parquet, self._run, request, lambda: self.recipe)
        self._sink = self.written or MemorySink(self._run, request)

    def steps(self) -> Generator[Step, None, None]:
        """Work: one Step after each batch. Stop asking, or close the generator, to stop; call again to go on."""
        if self.state == "running":
            raise ExtractionError("This extraction is already running: wait for it, or make another one.")
        if self.state == "done":
            return
        self.state, started = "running", time.perf_counter() - self.seconds
        try:
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
        if not self.request.images and all(part.is_sized for part in self.parts) and not self.written:
            return
        if not self._run.networks:
            yield from self._run.open()
        if self.parts[-1].network is None:
            if self.repeats:
                self._run.note(self.repeats.check([self._run.networks[part.network_index] for part in self.parts]))
            for part in self.parts:
                part.network = self._run.networks[part.network_index]
                if part.block.is_learned and not self.repeats and self.total:
                    count = self.request.fit_count
                    normalize.check(part.block, part.raw_width, len(self.request.frame) if count is None else count)
            places(self.request.frame, self.parts, replace=self.request.replace)
            self._sink.make_room()
            yield self._coming()

    @property
    def done(self) -> int:
        """How many images are finished, failed ones and those from the cache too."""
        return self.progress.done

    @property
    def cached(self) -> int:
        """How many images have all their features from the cache."""
        return self.progress.cached

    @property
    def computed(self) -> int:
        """How many images a network ran over, or share the features of one."""
        return self.done - self.cached - len(self.progress.reasons)

    @property
    def kept(self) -> int:
        """How many images another run need not compute, since they are in the cache or in files."""
        return self.done - len(self.progress.reasons) if self._run.keeps else self._sink.kept

    @property
    def keeps(self) -> bool:
        """Whether what is finished is in the cache or in files, so that another run goes on from there."""
        return self._run.keeps or bool(self.kept)

    @property
    def profile(self) -> Profile:
        """Seconds by kind of work, and which of them bounds the speed; print it, or show it in a notebook."""
        return Profile(self.timings, seconds=self.seconds, computed=bool(self.computed))

    @property
    def engines(self) -> list[str]:
        """What runs the networks."""
        return list(dict.fromkeys(network.prepared.name for network in self._run.networks))

    @property
    def precision(self) -> str:
        """What the networks compute in; before they are ready, what is asked for."""
        settled = listing(dict.fromkeys(network.precision for network in self._run.networks))
        return settled or (self.repeats.precision if self.repeats else self.request.precision)

    @property
    def rate(self) -> float:
        """Images per second so far; those from the cache, preparing networks and attaching columns apart."""
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
        weights = listing(dict.fromkeys(network.weights.name for network in self._run.networks))
        matrix = f"{len(self.request.frame):,} rows × {width:,} columns ({size} {self._sink.place})"
        count = len(hosts(self.request.images)) if self.request.remote else 0
        fetched = f" · images are fetched from {count:,} host{'s' if count > 1 else ''}" if count else ""
        return f"{matrix} · {weights} weights · {listing(self.engines)} · {self.precision}{fetched}"

    @property
    def frame(self) -> pd.DataFrame:
        """The given columns, then the features: same index, same order, same rows."""
        self._check_finished()
        return self._sink.frame

    def _check_finished(self) -> None:
        if self.state != "done":
            raise ExtractionError(
                f"This extraction is not finished: {self.done:,} of {self.total:,} images. Ask `steps()` for more."
            )

    @property
    def columns(self) -> list[str]:
        """The names of all new columns."""
        self._check_finished()
        return [name for part in self.parts for name in part.names]

    def __getitem__(self, prefix: str) -> pd.DataFrame:
        """Return one block's columns, which share the memory of what was extracted."""
        index, parts = self.frame.index, {part.prefix: part for part in self.parts}
        return parts[block_called(prefix, parts)].frame(index)

    @property
    def failures(self) -> pd.DataFrame:
        """The images that gave no features: position, column, image and reason, indexed like the frame."""
        import pandas as pd

        count = len(self.request.frame)
        found = sorted(self.progress.reasons, key=lambda row: (row % count, row))
        positions = [row % count for row in found]
        table = {
            "position": positions,
            "column": [self.request.columns[row // count] for row in found],
            "image": [name_of(self.request.images[row]) for row in found],
            "reason": [self.progress.reasons[row] for row in found],
        }
        return pd.DataFrame(table, index=self.request.frame.index.take(np.array(positions, int)))

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Everything needed to repeat this result: blocks, versions, hashes of weights, precision, decoding."""
        return {
            "blocks": [str(part.block) for part in self.parts],
            "images": [str(part.column) for part in self.parts],
            "weights": [part.network.weights.sha256 if part.network else "" for part in self.parts],
            "engines": self.engines,
            "precision": self.precision,
            "numerics": NUMERICS,
            "versions": {name: isolation.version_of(name) for name in LIBRARIES},
        }

    def to_recipe(self, source: str = "the earlier result") -> Recipe:
        """Return what `like` repeats, called `source` in messages.

        Raises
        ------
        RequestError
            Where this is not done, or had no images, so that nothing was learned.
        """
        if self.state != "done":
            raise RequestError(
                f"{source} cannot be repeated: its state is {self.state!r}, {self.done:,} of {self.total:,} images. "
                "Let it come to its end first, with its .run()."
            )
        if any(part.normalizer is None for part in self.parts):
            raise RequestError(
                f"{source} cannot be repeated: its frame has no rows, so that nothing was learned. "
                "Extract features of some images first."
            )
        return Recipe(tuple(part.recipe for part in self.parts), self.recipe, source)

    @property
    def fitted(self) -> Recipe:
        """What `like` repeats: the blocks with all that decides their numbers, and what they learned."""
        return self.to_recipe()

    def _report(self) -> report.Report:
        finished = self.state == "done"
        subject = f"{len(self.columns):,} new columns from" if finished else f"{self.state}: {self.done:,} of"
        count = self.progress.equal
        equal = [f"{count:,} images are equal to others and share their features."] if count else []
        written = [self.written.sentence] if self.written and finished else []
        return report.Report(
            headline=report.headline(subject, self._step(), self.timings.preparing),
            blocks=[report.made_row(part, self.cached) for part in self.parts] if finished else [],
            planned=[] if finished else [report.briefly(block) for block in self.blocks],
            total=self.total,
            failures=self.failures,
            notes=[
                *self.notes,
                *written,
                *equal,
                *report.normalization_notes(self.parts, repeats=self.repeats, fit_rows=self.request.fit_count),
            ],
            footer=report.footer(self.engines, self.precision, self.profile["bottleneck"]),
        )

    def before_normalization(self) -> Extraction:
        """Return an Extraction, not yet run, of the same images and the blocks that learn a normalization, without it.

        What can be comes from the cache, since features are kept as they are before any normalization. Blocks beside
        those in one network come along, since an engine may keep features by all that a network gives.
        """
        import pandas as pd

        indices = {part.network_index for part in self.parts if part.block.is_learned}
        asked = dict.fromkeys(part.block for part in self.parts if part.network_index in indices)
        blocks = [replace(block, normalize="none", components=None) for block in asked]
        images = {column: self.images_in(column) for column in self.request.columns}
        raw = Extraction(
            pd.DataFrame(images, dtype=object),
            blocks,
            images=self.request.columns,
            root=self.request.root,
            replace=True,
            batch_size=self._run.batch_size or "auto",
            device=self._run.device,
            allow_remote=self.request.remote,
            cache=self._run.uses_cache,
            on=self.request.on,
        )
        in_order = dict.fromkeys(part.network_index for part in self.parts if part.network_index in indices)
        raw._run.repeat(dict(enumerate(self._run.networks[number].precision for number in in_order)))
        return raw

    def speed_of(self, part: FeatureColumns) -> float:
        """Measure how many images per second go from file to features of `part` alone, without the cache."""
        assert part.network is not None
        images = self.request.images_of(part.column)
        good = np.flatnonzero(self.progress.ok[images])
        some = [self.request.images[images.start + at] for at in good]
        return images_per_second(part.network, part.block.cut.key, some, self.root, remote=self._run.remote)

    def images_in(self, column: Hashable) -> list[object]:
        """Return the cells of an image column as they were when this was made."""
        return self.request.images[self.request.images_of(column)]


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
