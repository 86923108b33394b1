"""What runs in each process of a cluster: networks that are opened once, and rows that come in tables."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbfeat import isolation
from nbfeat.errors import NbfeatError, NetworkError
from nbfeat.extraction.recipe import SLIGHT
from nbfeat.extraction.run import Run
from nbfeat.images import fingerprint
from nbfeat.inference.engines import cpu_count
from nbfeat.inference.engines.base import Precision

if TYPE_CHECKING:
    from nbfeat.images.remote import Access
    from nbfeat.images.resize import PixelSpec
    from nbfeat.inference.spec import NetworkSpec

Table = dict[str, Any]  # of columns, as NumPy arrays
AS_BYTES = "utf-8", "surrogatepass"  # how any text travels


@dataclass(frozen=True, slots=True)
class Order:
    """What each worker is told once."""

    networks: Sequence[tuple[NetworkSpec, PixelSpec]]
    device: str
    precisions: Sequence[Precision]
    batch_size: int | None
    key_fields: Sequence[dict[str, dict[str, Any]]]  # of each network and output, as here: see `Lane.kept`
    cores: int  # of each worker
    remote: Access | None  # what it may fetch, whatever its own environment says


class Worker:
    """What runs in each worker: networks that are opened once, and rows that come in tables."""

    def __init__(self, order: Order) -> None:
        cpu_count.take(order.cores)
        self._order, self._problem, self._differs = order, "", list[str]()
        self._run = Run(
            [], Path("/"), order.networks, device=order.device, precision="auto", batch_size=order.batch_size,
            cache=False, remote=order.remote,
        )  # fmt: skip
        self._run.repeat(order.precisions)
        with self._telling():
            for _ in self._run.open():
                pass
            self._differs = self._compared()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Take down what goes wrong, to be told with the rows: a worker that raises would be started again."""
        try:
            yield
        except NbfeatError as error:
            self._problem = f"{error} (on {socket.gethostname()})"

    def _compared(self) -> list[str]:
        """Name what is another here in ways that change numbers slightly; raise NetworkError for all else."""
        differs: list[str] = []
        for lane, key_fields in zip(self._run.lanes, self._order.key_fields, strict=True):
            for key, there in key_fields.items():
                here = json.loads(json.dumps(dict(lane.kept[key].key_fields)))
                there = json.loads(json.dumps(there))  # noqa: PLW2901 - as lists, both
                names = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
                for name in names:
                    if name not in SLIGHT:
                        raise NetworkError(
                            f"{lane.spec.title} would give other features on a worker, whose {name} is "
                            f"{here.get(name)!r}, not {there.get(name)!r}. Give all machines the same nbfeat and files."
                        )
                differs += [name for name in names if name not in differs]
        return [{"cpu": "CPU", "backend": "Keras backend", "keras": "Keras"}.get(name, name) for name in differs]

    def __call__(self, table: Table) -> Table:
        """Return what is found out about the rows of `table`."""
        images = [
            image.decode(*AS_BYTES) if is_text else image
            for image, is_text in zip(table["image"], table["is_text"], strict=True)
        ]
        found: Table = {name: np.full(len(images), empty, object) for name, empty in (("content", b""), ("reason", ""))}
        told: dict[str, Any] = {"files": {}, "undecodable": {}, "timings": {}}
        with self._telling():
            if not self._problem:
                found |= self._worked(images, table, found, told)
        texts = np.full(len(images), "", object)
        texts[0] = json.dumps({**told, "problem": self._problem, "differs": self._differs})
        return {"row": table["row"], **found, "told": texts}

    def _worked(self, images: list[object], table: Table, found: Table, told: dict[str, Any]) -> Table:
        """Run `images` through the networks that lack them; fill in what is `found` and `told`, and return vectors."""
        run = self._run.apart(images)
        for number, lane in enumerate(run.lanes):
            lane.done[:] = not any(row[number] for row in table["lacks"])
        equal: dict[int, int] = {}
        files: dict[bytes, bytes] = {}
        with isolation.pillow_defaults(), closing(run.batches()) as batches:
            for batch in batches:
                for row, image in zip(batch.rows, batch.images, strict=True):
                    found["content"][row] = image
                equal |= batch.equal
                files |= batch.files
                told["undecodable"] |= {image.hex(): reason for image, reason in batch.undecodable.items()}
        for row, first in equal.items():
            found["content"][row] = found["content"][first]
        for row, reason in run.progress.reasons.items():
            found["reason"][row] = reason
        told["timings"], told["files"] = asdict(run.timings), _known(images, table["file"], files)
        return {f"{at} {key}": rows for at, lane in enumerate(run.lanes) for key, rows in lane.features.items()}


def _known(images: Sequence[object], sent: Sequence[bytes], files: dict[bytes, bytes]) -> dict[str, str]:
    """Return what files hold by their states on the machine that `sent` them, where they are the same ones here."""
    known = {}
    for image, file in zip(images, sent, strict=True):
        here = fingerprint.seen(image) if file and isinstance(image, str) else b""
        if here and here[fingerprint.LENGTH :] == file[fingerprint.LENGTH :] and here[: fingerprint.LENGTH] in files:
            known[file[: fingerprint.LENGTH].hex()] = files[here[: fingerprint.LENGTH]].hex()
    return known
