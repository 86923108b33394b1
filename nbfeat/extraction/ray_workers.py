"""Runs on a Ray cluster: Ray Data schedules and retries; workers load the networks once and compute tables of rows."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nbfeat import errors, isolation
from nbfeat.cache.database import Cache
from nbfeat.errors import ExtractionError, ImageError, NbfeatError, NetworkError, RequestError, first_line, listing
from nbfeat.extraction.network_state import Batch, NetworkState
from nbfeat.extraction.options import PLACES, one_of
from nbfeat.extraction.pipeline import Pipeline
from nbfeat.extraction.profile import Timings
from nbfeat.extraction.recipe import SLIGHT
from nbfeat.extraction.run import Run
from nbfeat.images import fingerprint, remote, sources
from nbfeat.inference import prepared
from nbfeat.inference.engines import cpu_count, devices as hardware

ROWS_AT_ONCE = 128  # with fewer, workers wait more often; with more, steps are rare
FETCHED_AT_ONCE = 512  # for remote images, since each table opens its own connections
FEWEST_AT_ONCE = 8
ROUNDS = 4  # minimum number of tables per worker, so that all finish at about the same time
BYTES_AT_ONCE = 32 << 20  # of features
MOST_BYTES = 1 << 30  # of images sent by content
MOST_CORES = 4  # per worker; with more, its one thread that doesn't decode is the bottleneck
STORE = 512 << 20  # bytes of shared memory of a cluster started here; beyond that, Ray writes to disk
DEATHS = 3  # of workers in a row before they are ready; later ones are always replaced and their rows retried


def executor_for(on: str | None, images: Sequence[object], networks: Sequence[tuple[Any, Any]]) -> RayExecutor | None:
    """Return the executor for a Ray cluster, or None for this process; raise RequestError if Ray can't be used."""
    if on is None:
        return None
    one_of(PLACES, "on", on)
    if importlib.util.find_spec("ray") is None:
        raise RequestError("`on='ray'` needs Ray Data, which isn't installed: pip install 'nbfeat[ray]'.")
    if title := next((spec.network.title for spec, _ in networks if spec.network.package == "registered"), None):
        way = "Save it as a .keras file that all machines can read and use its path, or drop `on`."
        raise RequestError(f"{title} is built by a function in this process, which workers don't have. {way}")
    size = 0
    for image in map(sources.held, images):
        if (is_file := hasattr(image, "read")) or isinstance(image, (Image.Image, np.ndarray)):
            what = "an open file" if is_file else sources.name_of(image).strip("<>")
            way = "Save the images as files that all machines can read and use their paths, or drop `on`."
            raise RequestError(f"Only paths and bytes can be sent to workers, not {what}. {way}")
        size += len(image) if isinstance(image, (bytes, bytearray, memoryview)) else 0
    if size > MOST_BYTES:
        sent, most = map(errors.format_bytes, (size, MOST_BYTES))
        problem = f"{sent} of images can't be sent to workers: the limit is {most}."
        raise RequestError(f"{problem} Save them as files that all machines can read, and use their paths.")
    return RayExecutor()


class Share(NamedTuple):
    """The number of workers, and the cores and GPUs of each."""

    workers: int
    cores: int
    gpus: int = 0


class RayExecutor(ExitStack):
    """Computes rows with workers; joins or starts Ray when first needed, and leaves it on exit."""

    starts_workers = True
    _ray: Any = None
    _folder = ""  # of a cluster started here

    def run(self, run: Run, rows: Sequence[int]) -> Generator[Batch, None, None]:
        """Yield batches until all `rows` are finished; close it to cancel."""
        cells, failures = _cells(run, rows)
        if failures:
            yield Batch(failures=failures)
        if not cells:
            return
        start, is_cpu, is_new = time.perf_counter(), run.networks[0].prepared.device == "cpu", self._ray is None
        if is_new:
            self._begin()
        share = self.share(gpu=not is_cpu)
        run.note(self.describe(share) if is_new else "")  # a cluster may grow later
        run.timings.preparing += time.perf_counter() - start
        order = [
            (*spec, network.precision, {key: dict(kept.key_fields) for key, kept in network.cache_keys.items()})
            for spec, network in zip(run.specs, run.networks, strict=True)
        ]
        device = "cpu" if is_cpu else "gpu:0"  # the only one that Ray shows the worker
        left, arguments = set(cells), (order, device, run.batch_size, share.cores, run.remote)
        with closing(self.mapped(list(_tables(run, cells, share)), arguments, share)) as answers:
            for found in answers:
                if left.issuperset(found.rows):  # otherwise a repeat after a retry
                    left.difference_update(found.rows)
                    yield from _batches(run, found, share)
        if left:
            raise ExtractionError(f"Ray didn't return {len(left):,} of {len(cells):,} rows. Run it again to resume.")

    def _begin(self) -> None:
        """Join the existing cluster, or start a private one."""
        self._ray, call = self.enter_context(isolation.quiet_ray())
        self.callback(setattr, self, "_ray", None)
        if self._ray.is_initialized():
            return
        address = address_of_cluster()
        options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "configure_logging": False}
        if not address:
            # Private, because Ray's own folder is open to all; short, because paths of sockets have a length limit.
            short = "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108 - mkdtemp makes a private folder there
            self._folder = tempfile.mkdtemp(prefix="nbfeat-", dir=short)
            options |= {"num_cpus": cpu_count.available_cores(), "object_store_memory": STORE}
            options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "_temp_dir": f"{self._folder}/ray"}
        self.callback(call, self._end)
        try:
            call(self._ray.init, **options)
        except Exception as error:  # Ray raises a plain Exception if a busy machine takes over half a minute
            if address:
                raise RequestError(
                    f"Can't connect to the Ray cluster at {address}: {first_line(error)}. If it requires a token, set "
                    "RAY_AUTH_MODE=token; set RAY_ADDRESS=local to start a cluster on this machine only."
                ) from error
            raise NetworkError(f"Ray didn't start: {first_line(error, -1)}. Run it again, or drop `on`.") from error

    def _end(self) -> None:
        self._ray.shutdown(wait_for_processes=True)  # leaves an existing cluster running
        if self._folder:  # Ray forgets the processes of a cluster that could not start
            psutil: Any = importlib.import_module("psutil")  # a part of Ray
            kept = [one for one in psutil.process_iter(["cmdline", "ppid"]) if one.info["ppid"] == os.getpid()]
            kept = [one for one in kept if self._folder in " ".join(one.info["cmdline"] or ())]
            for one in kept:
                with suppress(psutil.Error):
                    one.kill()
            psutil.wait_procs(kept, timeout=10)
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = ""

    def share(self, *, gpu: bool) -> Share:
        """Divide the cluster: one worker per GPU, or at least two per node if it has two cores."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        sizes = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
        sizes = [(cpus, gpus) for cpus, gpus in sizes if cpus and (gpus or not gpu)]
        if not sizes:
            raise RequestError(f"The Ray cluster has no {'GPU' if gpu else 'CPU'}. Change `device`, or drop `on`.")
        if gpu:
            return Share(sum(gpus for _, gpus in sizes), max(1, min(cpus // gpus for cpus, gpus in sizes)), 1)
        cores = max(1, min(MOST_CORES, min(cpus for cpus, _ in sizes) // 2))
        return Share(sum(cpus // cores for cpus, _ in sizes), cores)

    def describe(self, share: Share) -> str:
        """Describe the cluster for the report."""
        machines = sum(bool(node["Alive"]) for node in self._ray.nodes())
        where = "started on this machine" if self._folder else f"of {machines:,} machine{'s' if machines > 1 else ''}"
        cores = f"{share.cores} core{'s' if share.cores > 1 else ''}"
        return f"Ran on a Ray {self._ray.__version__} cluster {where}: {share.workers:,} workers with {cores} each."

    def mapped(self, tables: Sequence[Table], order: tuple[Any, ...], share: Share) -> Generator[Found, None, None]:
        """Yield the findings of workers about `tables`, in any order; close it to cancel."""
        made = self._ray.data.from_items(tables, override_num_blocks=len(tables)).map_batches(
            Worker, fn_constructor_args=order, batch_size=1, num_cpus=share.cores, num_gpus=share.gpus,
            compute=self._ray.data.ActorPoolStrategy(min_size=1, max_size=share.workers, initial_size=share.workers),
        )  # fmt: skip
        made.context.enable_progress_bars = False
        made.context.max_consecutive_actor_init_deaths = DEATHS
        try:
            with closing(iter(made.iter_batches(batch_size=None))) as batches:
                for batch in batches:
                    yield from batch["item"]
        except (self._ray.exceptions.RayError, RuntimeError, OSError) as error:
            way = "Run it again to resume, or drop `on`."
            raise NetworkError(f"The Ray cluster failed: {first_line(error, -1)}. {way}") from error


def address_of_cluster() -> str | None:
    """Return the address in RAY_ADDRESS, or that of a cluster that this user started here with `ray start`."""
    # Other clusters on this machine belong to a program and may end with it.
    if named := os.environ.get("RAY_ADDRESS", ""):
        if re.fullmatch(r"[^/]+:\d+", named) and not _answers(named):
            raise RequestError(f"Nothing responds at RAY_ADDRESS={named}. Start Ray there, or unset RAY_ADDRESS.")
        return None if named == "local" else named  # Ray's word for a new cluster
    file = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster")  # written by Ray
    with suppress(OSError, AttributeError):  # no cluster, or not Unix
        if file.stat().st_uid == os.getuid() and _answers(written := file.read_text(encoding="utf-8").strip()):
            return written
    return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError, ValueError, OverflowError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
        return True
    return False


@dataclass(slots=True)
class Table:
    """A few rows: absolute paths, URLs or the content of images."""

    rows: list[int]
    images: list[str | bytes]
    files: list[bytes]  # fingerprint of the file of a path on the sending machine, else b""
    done: list[NDArray[np.bool_]]  # for each network, the rows that it can skip


def _cells(run: Run, rows: Sequence[int]) -> tuple[dict[int, tuple[str | bytes, bytes]], dict[int, str]]:
    """Return images as they are sent, each with the fingerprint of its file; and failures of others."""
    cells: dict[int, tuple[str | bytes, bytes]] = {}
    failures = {}
    for row in rows:
        image = run.images[row]
        try:
            if run.remote and (address := sources.address_of(image)) is not None:
                cells[row] = remote.absolute(address, run.root), b""
            elif (path := sources.path_of(image, run.root)) is not None:
                cells[row] = path, fingerprint.seen(path)
            else:
                cells[row] = cast("bytes", sources.load(image, run.root)[0]), b""
        except ImageError as error:
            failures[row] = str(error)
    return cells, failures


def _tables(run: Run, cells: Mapping[int, tuple[str | bytes, bytes]], share: Share) -> Iterator[Table]:
    width = sum(output.width for network in run.networks for output in network.prepared.outputs.values())
    most = min(FETCHED_AT_ONCE if run.remote else ROWS_AT_ONCE, BYTES_AT_ONCE // (4 * width))
    count = max(1, min(max(FEWEST_AT_ONCE, len(cells) // (ROUNDS * share.workers)), most))
    rows = list(cells)
    for some in (rows[start : start + count] for start in range(0, len(rows), count)):
        images, files = zip(*(cells[row] for row in some), strict=True)
        yield Table(some, list(images), list(files), [network.done[some] for network in run.networks])


@dataclass(slots=True)
class Found:
    """The findings of a worker about the rows of a table: batches, each with the index of its network."""

    rows: list[int]
    differs: list[str]  # names of what differs between the worker and this machine
    error: NbfeatError | None = None  # that stops the run; Ray would restart a worker that raises
    timings: Timings = field(default_factory=Timings)
    batches: list[tuple[int | None, Batch]] = field(default_factory=list)


def _batches(run: Run, found: Found, share: Share) -> Iterator[Batch]:
    """Yield the batches that were `found`, without duplicates of images from other tables."""
    if found.error:
        raise found.error
    if found.differs:
        run.note(
            f"Workers have a different {listing(found.differs)} from this machine: the same image may give slightly "
            "different numbers here, and their features are not cached."
        )
    for name, seconds in asdict(found.timings).items():
        setattr(run.timings, name, getattr(run.timings, name) + seconds / share.workers)
    firsts: dict[int, int] = {}
    for _, batch in found.batches:
        firsts |= {row: run.seen.setdefault(image, row) for row, image in zip(batch.rows, batch.images, strict=True)}
    equal = {row: first for row, first in firsts.items() if first != row}
    for place, batch in found.batches:
        batch.equal, equal = {row: firsts.get(first, first) for row, first in batch.equal.items()} | equal, {}
        kept = [at for at, row in enumerate(batch.rows) if firsts[row] == row]
        batch.network = None if place is None or not kept else run.networks[place]
        batch.rows, batch.images = [batch.rows[at] for at in kept], [batch.images[at] for at in kept]
        batch.vectors = {key: vectors[kept] for key, vectors in batch.vectors.items()}
        if found.differs:
            batch.computed_elsewhere, batch.undecodable = True, {}
        yield batch


class Worker:
    """Computes tables of rows with `networks`: for each, spec, pixels, precision, and cache-key fields of the run."""

    def __init__(
        self, networks: Sequence[Any], device: str, batch_size: int | None, cores: int, access: remote.Access | None
    ) -> None:
        cpu_count.take(cores)
        self._access = access  # from the machine of the run, not from the environment here
        self._networks, self._differs = list[NetworkState](), dict[str, None]()
        self._error: NbfeatError | None = None
        try:
            devices = hardware.choose_devices(device)
            for spec, pixels, precision, key_fields in networks:
                ready = prepared.PreparedNetwork(spec, devices=devices, batch_size=batch_size)
                deque(ready, maxlen=0)
                self._networks.append(network := NetworkState(spec, pixels, ready, np.zeros(0, bool)))
                network.set_precision(precision)
                for key, fields in key_fields.items():
                    self._compare(network, network.cache_keys[key].key_fields, fields)
        except NbfeatError as error:
            self._error = error

    def _compare(self, network: NetworkState, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
        """Record differences that change numbers slightly; raise NetworkError for others."""
        here, there = json.loads(json.dumps([dict(here), there]))  # lists, not tuples
        for name in sorted(name for name in {*here, *there} if here.get(name) != there.get(name)):
            if name not in SLIGHT:
                raise NetworkError(
                    f"{network.spec.network.title} would give different features on a worker: it has {name} "
                    f"{here.get(name)!r}, not {there.get(name)!r}. Install the same nbfeat and files on all machines."
                )
            self._differs[{"cpu": "CPU", "backend": "Keras backend", "keras": "Keras"}.get(name, name)] = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Compute the one table in `batch`."""
        table: Table = batch["item"][0]
        found = Found(table.rows, list(self._differs))
        try:
            if self._error:
                raise self._error
            self._compute(table, found)
        except NbfeatError as error:
            found.error = NetworkError(f"{error} (on {socket.gethostname()})")
        return {"item": np.array([found], object)}

    def _compute(self, table: Table, found: Found) -> None:
        rows, length, there = table.rows, fingerprint.LENGTH, {}
        for image, file in zip(table.images, table.files, strict=True):
            here = fingerprint.seen(str(image)) if file else b""
            if here[length:] == file[length:]:  # the same file, though its state differs between machines
                there[here[:length]] = file[:length]
        for network, done in zip(self._networks, table.done, strict=True):
            network.done = done
        pipe = Pipeline(table.images, self._networks, Path("/"), found.timings, Cache(None), {}, remote=self._access)
        with isolation.pillow_defaults(), closing(pipe.run(range(len(rows)))) as batches:
            for batch in batches:
                place = None if batch.network is None else self._networks.index(batch.network)
                batch.network, batch.rows = None, [rows[at] for at in batch.rows]
                batch.failures = {rows[at]: reason for at, reason in batch.failures.items()}
                batch.equal = {rows[at]: rows[first] for at, first in batch.equal.items()}
                batch.files = {there[state]: image for state, image in batch.files.items() if state in there}
                found.batches.append((place, batch))
