"""A run on a Ray cluster: rows and cells go out to workers, and what comes back is what a pipeline here would give.

Ray Data owns scheduling, retries and back-pressure. A `Cluster` takes the place of a `Pipeline`: both give batches of
rows with their features. Each worker opens the networks once and runs its rows as a `Run` of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from nbfeat.errors import ExtractionError, ImageError, NetworkError, RequestError, format_bytes, listing
from nbfeat.extraction import ray_session
from nbfeat.extraction.batch import Batch
from nbfeat.extraction.ray_session import Share
from nbfeat.extraction.worker import AS_BYTES, Order, Table, Worker
from nbfeat.images import archives, fingerprint, sources

if TYPE_CHECKING:
    from nbfeat.extraction.run import Run
    from nbfeat.images.remote import Access
    from nbfeat.images.resize import PixelSpec
    from nbfeat.inference.spec import NetworkSpec

Cell = tuple[bytes, bool, bytes]  # text or what an image holds, whether it is text, and which file that was here
ROWS_AT_ONCE = 128  # fewer, and a worker waits more often; more, and a step comes seldom
FETCHED_AT_ONCE = 512  # where images are fetched, for which each table opens connections of its own
FEWEST_AT_ONCE = 8
ROUNDS = 4  # so many batches for each worker at least, so that the last ones are not waited for alone
BYTES_AT_ONCE = 32 << 20  # of features
MOST_BYTES = 1 << 30  # of images that travel themselves


def check(images: Sequence[object], networks: Sequence[tuple[NetworkSpec, PixelSpec]]) -> None:
    """Raise RequestError where Ray is not installed, or where images or networks cannot travel to other machines."""
    ray_session.Session.check()
    for spec, _ in networks:
        if spec.is_registered:
            raise RequestError(
                f"{spec.title} is built by a function in this process, which workers do not have: save it as a .keras "
                "file that all machines can read, and name that, or leave --on away."
            )
    size = 0
    for image in map(sources.held, images):
        if isinstance(image, (Image.Image, np.ndarray)) or hasattr(image, "read"):
            what = "an open file" if hasattr(image, "read") else sources.name_of(image).strip("<>")
            raise RequestError(
                f"Only paths and bytes travel to workers, and there is {what}: save the images as files that all "
                "machines can read, and give their paths, or leave --on away."
            )
        size += len(image) if isinstance(image, (bytes, bytearray, memoryview)) else 0
    if size > MOST_BYTES:
        raise RequestError(
            f"{format_bytes(size)} of images would have to travel to workers, and {format_bytes(MOST_BYTES)} is the "
            "most: save them as files that all machines can read, and give their paths."
        )


class Cluster:
    """The rest of a `run`, by workers on a Ray cluster; `seen` remembers which row had a content first."""

    def __init__(self, run: Run, seen: dict[bytes, int]) -> None:
        self._run, self._seen = run, seen
        self._returned = np.zeros(len(run.images), bool)
        self._share = Share(workers=1, cores=1)

    def run(self, rows: Sequence[int]) -> Generator[Batch, None, None]:
        """Yield batches until every row was in one for each lane that lacks it, or has failed, or equals another.

        Close it to cancel what is under way; a cluster that was started for it is stopped then, unless the stay of the
        run goes on.
        """
        cells, failures = self._cells(rows)
        if failures:
            yield Batch(failures=failures)
        if not cells:
            return
        start = time.perf_counter()
        with self._run.stay as stay:
            session = stay.session()
            self._run.timings.preparing += time.perf_counter() - start
            is_cpu = self._run.lanes[0].opening.device == "cpu"
            self._share = session.share(gpu=not is_cpu)
            self._run.note(stay.told(self._share))
            order = Order(
                self._run.networks,
                "cpu" if is_cpu else "gpu:0",  # the one that Ray lets the worker see
                [lane.precision for lane in self._run.lanes],
                self._run.batch_size,
                [{key: dict(kept.key_fields) for key, kept in lane.kept.items()} for lane in self._run.lanes],
                self._share.cores,
                self._run.remote,
            )
            with closing(session.mapped(list(self._blocks(cells)), Worker, (order,), self._share)) as tables:
                for table in tables:
                    yield from self._batches(table)
        if missing := [row for row in cells if not self._returned[row]]:
            raise ExtractionError(
                f"Ray gave back {len(cells) - len(missing):,} of {len(cells):,} rows. Run it again to go on."
            )

    # Out

    def _cells(self, rows: Sequence[int]) -> tuple[dict[int, Cell], dict[int, str]]:
        """Return what travels of each row, and why others need not travel."""
        cells, failures = {}, {}
        for row in rows:
            try:
                cells[row] = _cell(self._run.images[row], self._run.root, self._run.remote)
            except ImageError as error:
                failures[row] = str(error)
        return cells, failures

    def _blocks(self, cells: dict[int, Cell]) -> Iterator[Table]:
        """Yield tables of a few rows, all of which lack the features of the same networks."""
        lanes = self._run.lanes
        lacking: dict[tuple[bool, ...], list[int]] = {}
        for row in cells:
            lacking.setdefault(tuple(not lane.done[row] for lane in lanes), []).append(row)
        width = sum(output.width for lane in lanes for output in lane.outputs.values())
        fair = len(cells) // (ROUNDS * self._share.workers)
        most = FETCHED_AT_ONCE if self._run.remote else ROWS_AT_ONCE
        count = max(1, min(max(FEWEST_AT_ONCE, fair), most, BYTES_AT_ONCE // (4 * width)))
        for lacks, rows in lacking.items():
            for start in range(0, len(rows), count):
                some = rows[start : start + count]
                yield {
                    "row": some,
                    "image": [cells[row][0] for row in some],
                    "is_text": [cells[row][1] for row in some],
                    "file": [cells[row][2] for row in some],
                    "lacks": [bytes(lacks)] * len(some),
                }

    # And back

    def _batches(self, table: Table) -> Iterator[Batch]:
        """Make batches of what a worker found out; rows that are there already came again after a retry."""
        settled, computed_elsewhere = Batch(), False
        for text in filter(None, table["told"]):
            computed_elsewhere |= self._take_down(json.loads(text), settled)
        new = [at for at, row in enumerate(table["row"]) if not self._returned[row]]
        self._returned[table["row"]] = True
        good = []
        for at in new:
            row, reason = int(table["row"][at]), str(table["reason"][at])
            if reason:
                settled.failures[row] = reason
            elif (first := self._seen.setdefault(bytes(table["content"][at]), row)) != row:
                settled.equal[row] = first
            else:
                good.append(at)
        for number, lane in enumerate(self._run.lanes):
            chosen = [at for at in good if not lane.done[table["row"][at]]]
            if not chosen:
                continue
            batch = Batch(lane, table["row"][chosen].tolist(), computed_elsewhere=computed_elsewhere)
            batch.images = [bytes(table["content"][at]) for at in chosen]
            batch.vectors = {key: table[f"{number} {key}"][chosen] for key in lane.outputs}
            yield batch.beside(settled)
            settled = Batch()
        if settled:
            yield settled

    def _take_down(self, told: dict[str, Any], settled: Batch) -> bool:
        """Take down what a worker tells of its rows together; return whether something is another there than here."""
        if told["problem"]:
            raise NetworkError(told["problem"])
        if differs := told["differs"]:
            self._run.note(
                f"Workers have another {listing(differs)} than this machine: the same image may give slightly other "
                "numbers here, and what they computed is not kept in the cache."
            )
        settled.files |= {bytes.fromhex(state): bytes.fromhex(image) for state, image in told["files"].items()}
        if not differs:
            settled.undecodable |= {bytes.fromhex(image): reason for image, reason in told["undecodable"].items()}
        for name, seconds in told["timings"].items():
            timings = self._run.timings
            setattr(timings, name, getattr(timings, name) + seconds / self._share.workers)
        return bool(differs)


def _cell(image: object, root: Path, remote: Access | None) -> Cell:
    """Return an absolute path, an address or what an image holds; raise ImageError where it need not travel."""
    if remote and (address := sources.address_of(image)) is not None:
        return archives.absolute(address, root).encode(*AS_BYTES), True, b""
    path = sources.path_of(image, root)
    if path is not None:
        return path.encode(*AS_BYTES), True, fingerprint.seen(path)
    data, _ = sources.load(image, root)
    assert isinstance(data, bytes)
    return data, False, b""
