"""Ray for as long as a run takes: the cluster that is there, or one of this machine alone that is stopped after it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from nbfeat.errors import NetworkError, RequestError
from nbfeat.extraction.ray_surroundings import (  # fmt: skip
    ENVIRONMENT,
    alone,
    environment,
    quietly,
    same_signals,
    undisturbed,
    without_greeting,
    without_statistics,
)
from nbfeat.inference.engines.cpu_count import available_cores

MOST_CORES = 4  # of a worker: with more, its one thread that is not decoding bounds it
STORE = 512 << 20  # bytes of shared memory of a cluster that is started here; beyond it, Ray writes to disk
DEATHS = (
    3  # of workers before they are ready, in a row; later ones are replaced without end, and their rows tried again
)
LOCAL = {"127.0.0.1", "localhost", "::1", "[::1]"}


@dataclass(frozen=True, slots=True)
class Share:
    """What each of so many workers gets."""

    workers: int
    cores: int
    gpus: int = 0

    @classmethod
    def of(cls, nodes: Sequence[Mapping[str, float]], *, gpu: bool) -> Self:
        """Share what `nodes` have: a worker for each GPU, else at least two on each node that has as many cores."""
        sizes = [(int(node.get("CPU", 0)), int(node.get("GPU", 0)) if gpu else 0) for node in nodes]
        sizes = [(cpus, gpus) for cpus, gpus in sizes if cpus and (gpus or not gpu)]
        if not sizes:
            raise RequestError(
                f"The Ray cluster has no {'GPU' if gpu else 'CPU'}. Use another --device, or leave --on away."
            )
        if gpu:
            return cls(sum(gpus for _, gpus in sizes), max(1, min(cpus // gpus for cpus, gpus in sizes)), 1)
        cores = max(1, min(MOST_CORES, min(cpus for cpus, _ in sizes) // 2))
        return cls(sum(cpus // cores for cpus, _ in sizes), cores)


class Session:
    """Ray, for the length of a block."""

    def __init__(self) -> None:
        self.is_own = False  # whether the cluster was started for this
        self._ray: Any = None
        self._undo = ExitStack()

    @staticmethod
    def check() -> None:
        """Raise RequestError where Ray is not installed."""
        if importlib.util.find_spec("ray") is None:
            raise RequestError("--on ray needs Ray Data, which is not installed: pip install 'nbfeat[ray]'.")

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.enter_context(without_statistics())
            with environment(ENVIRONMENT), undisturbed():
                self._ray = importlib.import_module("ray")
                importlib.import_module("ray.data")
                undo.enter_context(quietly())
                if not self._ray.is_initialized():
                    undo.enter_context(same_signals())
                    address = address_of_cluster()
                    with without_greeting():
                        if address:
                            self._join(address, undo)
                        else:
                            self._start(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _stop(self) -> None:
        with undisturbed():
            self._ray.shutdown()

    def _join(self, address: str, undo: ExitStack) -> None:
        """Connect to a cluster; it is left as it is at the end."""
        undo.callback(self._stop)
        host, _, port = address.rpartition(":")
        # Ray takes the address of this machine for the local one, where a cluster that is alone does not answer.
        is_alone = host in LOCAL and not _answers(f"{self._ray.util.get_node_ip_address()}:{port}")
        try:
            with alone() if is_alone else nullcontext():
                self._ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, self._ray.exceptions.RayError) as error:
            raise RequestError(
                f"The Ray cluster at {address} cannot be joined: {str(error).splitlines()[0]}. If it asks for a token, "
                "set RAY_AUTH_MODE=token; RAY_ADDRESS=local starts a cluster of this machine alone."
            ) from error

    def _start(self, undo: ExitStack) -> None:
        """Start a cluster of this machine alone, which sends no statistics and listens to nobody else."""
        # Ray's sockets lie in it, and the system allows their paths a hundred characters.
        short = "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108 - mkdtemp makes a private folder there
        folder = tempfile.mkdtemp(prefix="nbfeat-", dir=short)
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        undo.callback(self._stop)
        self.is_own = True
        try:
            with alone():
                self._ray.init(
                    address="local",
                    num_cpus=available_cores(),
                    object_store_memory=STORE,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=folder,
                )
        except Exception as error:  # Ray gives a machine that is busy half a minute, and raises nothing else then
            raise NetworkError(
                f"No Ray cluster could be started here: {_last(error)}. Run it again, or leave --on away."
            ) from error

    def share(self, *, gpu: bool) -> Share:
        """Share what the cluster has."""
        return Share.of([node["Resources"] for node in self._ray.nodes() if node["Alive"]], gpu=gpu)

    def told(self, share: Share) -> str:
        """Say where it ran."""
        machines = sum(bool(node["Alive"]) for node in self._ray.nodes())
        where = "started here" if self.is_own else f"of {machines:,} machine{'s' if machines > 1 else ''}"
        cores = f"{share.cores} core{'s' if share.cores > 1 else ''}"
        return f"Ran on Ray {version('ray')}, a cluster {where}: {share.workers:,} workers of {cores} each."

    def mapped(
        self, tables: Sequence[dict[str, Any]], worker: type, arguments: tuple[Any, ...], share: Share
    ) -> Generator[dict[str, Any], None, None]:
        """Yield what workers make of `tables`, in any order; close it to cancel what is under way."""
        data: Any = importlib.import_module("ray.data")
        arrow: Any = importlib.import_module("pyarrow")
        context = data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.max_consecutive_actor_init_deaths = DEATHS
        with data.DataContext.current(context):
            made = data.from_arrow([arrow.table(table) for table in tables]).map_batches(
                worker,
                fn_constructor_args=arguments,
                batch_size=None,
                batch_format="numpy",
                compute=data.ActorPoolStrategy(min_size=1, max_size=share.workers, initial_size=share.workers),
                num_cpus=share.cores,
                num_gpus=share.gpus,
            )
            batches = iter(made.iter_batches(batch_size=None, batch_format="numpy"))
        try:
            with closing(batches):
                yield from batches
        except (self._ray.exceptions.RayError, RuntimeError, OSError) as error:
            raise NetworkError(
                f"The Ray cluster gave up: {_last(error)}. Run it again to go on, or leave --on away."
            ) from error


class Stay:
    """Ray from when it is first needed to the end of the outermost of its blocks, however many runs there are."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._depth, self._is_told = 0, False

    def __enter__(self) -> Self:
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth and self._session is not None:
            session, self._session = self._session, None
            session.__exit__(*error)

    def session(self) -> Session:
        """Return the session, begun if it was not."""
        if self._session is None:
            self._session, self._is_told = Session().__enter__(), False
        return self._session

    def told(self, share: Share) -> str:
        """Say where it runs, once: a cluster may grow meanwhile."""
        told, self._is_told = "" if self._is_told else self.session().told(share), True
        return told


def address_of_cluster() -> str | None:
    """Return the address that RAY_ADDRESS names, or that of a cluster which this user began here with `ray start`.

    Others on this machine are not joined, as Ray's ``auto`` would: they were started by a program for itself, and may
    end with it.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named:
        if re.fullmatch(r"[^/]+:\d+", named) and not _answers(named):
            raise RequestError(
                f"Nothing answers at {named}, which RAY_ADDRESS names. Start Ray there, or unset RAY_ADDRESS."
            )
        return None if named == "local" else named  # Ray's word for a cluster of one's own
    file = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", "ray_current_cluster")  # noqa: S108 - Ray's own place
    try:
        written, is_own = file.read_text(encoding="utf-8").strip(), file.stat().st_uid == os.getuid()
    except (OSError, AttributeError):  # none, or no Unix
        return None
    return written if is_own and _answers(written) else None


def _last(error: Exception) -> str:
    """Return the last line of what an error of Ray's says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")


def _answers(address: str) -> bool:
    """Tell whether anybody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True
