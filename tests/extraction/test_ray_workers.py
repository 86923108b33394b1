"""Extraction on a Ray cluster: the same result as in this process, even if workers fail."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from pyarrow import parquet

import nbfeat
from nbfeat import Extraction, ExtractionError, NetworkError, RequestError, isolation
from nbfeat.backbones import catalog
from nbfeat.extraction import ray_workers, sink
from nbfeat.extraction.ray_workers import Found, RayExecutor, Share, Table, Worker
from nbfeat.images import fingerprint, public_hosts, remote
from nbfeat.images.remote import Limits
from nbfeat.inference.engines import cpu_count
from nbfeat.inference.spec import NetworkSpec
from tests.conftest import ROOT
from tests.extraction.ray_child import NOBODY, descendants
from tests.faces import CellMagic, same
from tests.fake import FakeEngine
from tests.web import Web

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'nbfeat[ray]'")
needs_proc = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets and processes are found in /proc")
# Ray's own modules raise deprecation warnings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
FLOAT32: dict[str, Any] = {"images": "path", "precision": "float32"}
Tables = list[Table]


# Without Ray: workers in this process


class Here(RayExecutor):
    """Stands in for Ray: one worker in this process computes the tables, and tests can change its answers."""

    opened = 0
    shares: ClassVar[list[Share]] = []  # for each run; the last one is repeated
    environment: ClassVar[dict[str, str]] = {}  # of workers
    differs: ClassVar[dict[str, str]] = {}  # there
    tables: Tables
    arranged: ClassVar[Callable[[Tables], Tables]]

    def _begin(self) -> None:
        type(self).opened += 1
        self._ray = "here"
        self.callback(setattr, self, "_ray", None)

    def share(self, *, gpu: bool) -> Share:
        assert not gpu
        return self.shares.pop(0) if len(self.shares) > 1 else self.shares[0]

    def describe(self, share: Share) -> str:
        return f"Ran with {share.workers} workers here."

    def mapped(self, tables: Sequence[Table], order: tuple[Any, ...], share: Share) -> Generator[Found, None, None]:
        networks, *others = order
        changed = [
            (*network, {key: fields | self.differs for key, fields in key_fields.items()})
            for *network, key_fields in networks
        ]
        type(self).tables = list(tables)
        with mock.patch.dict(os.environ, self.environment):
            worker = Worker(changed, *others)
        for table in type(self).arranged(list(tables)):
            with mock.patch.dict(os.environ, self.environment):
                answer = worker({"item": [table]})
            yield from answer["item"]


@pytest.fixture
def here(fake_network: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> type[Here]:  # what it is for
    """Replace Ray by a fake worker with a fake network."""
    Here.opened, Here.shares, Here.environment, Here.differs = 0, [Share(workers=2, cores=1)], {}, {}
    Here.arranged = staticmethod(lambda tables: tables)
    monkeypatch.setattr(ray_workers, "RayExecutor", Here)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: "found")
    monkeypatch.setattr(cpu_count, "_taken", [])
    monkeypatch.setattr(
        fingerprint, "SETTLED_AFTER_NS", 0
    )  # files are identified by their state, even very recent ones
    monkeypatch.setattr(sink, "MOST_ROWS", 6)  # of a part file: four for twenty photos
    monkeypatch.setattr(sink, "LARGER", 1)
    return Here


def test_the_result_is_the_one_of_this_process(
    photos: pd.DataFrame, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(photos["path"].iloc[0]).parent
    photos["path"] = [Path(path).name for path in photos["path"]]
    monkeypatch.chdir(folder.parent)
    frame = pd.concat([photos, photos.iloc[:3]]).sample(frac=1, random_state=0)
    frame.iloc[[2, 7], 0] = [None, "nosuch.png"]
    asked: dict[str, Any] = {"normalize": "standard", "fit_on": "split == 'train'", "images": "path", "cache": False}
    asked["root"] = folder.name
    local = nbfeat.extract(frame, "ResNet50", "ResNet50 --layer conv4 --prefix mid", **asked)
    there = nbfeat.extract(frame, "ResNet50", "ResNet50 --layer conv4 --prefix mid", on="ray", **asked)
    assert here.opened == 1
    same(there.frame, local.frame)
    same(there.failures, local.failures)
    assert there.progress.equal == local.progress.equal > 0
    assert there.recipe == local.recipe
    assert "Ran with 2 workers here." in there.notes
    assert cpu_count.available_cores() == here.shares[0].cores
    assert str(folder) in str(here.tables[0].images[0])


def test_only_rows_and_cells_travel_and_any_text_as_it_is(photos: pd.DataFrame, here: type[Here]) -> None:
    photos["path"] = photos["path"].astype(object)
    photos["content"] = [Path(path).read_bytes() for path in photos["path"]]
    photos.iloc[:3, 0] = ["a\udcff.png", "a\ud800.png", "a\0.png"]
    asked: dict[str, Any] = {"images": ["path", "content"], "cache": False}
    there = nbfeat.extract(photos, "ResNet50", **asked, on="ray")
    same(there.failures, nbfeat.extract(photos, "ResNet50", **asked).failures)
    assert len(there.failures) == 3
    assert [image for table in here.tables for image in table.images][-37:] == [
        *photos["path"].iloc[3:],
        *photos["content"],
    ]


def test_rows_that_come_twice_or_in_another_order_change_nothing(photos: pd.DataFrame, here: type[Here]) -> None:
    photos.iloc[[1, 19], 0] = "nosuch.png"
    photos.iloc[[5, 17], 0] = str(photos["path"].iloc[4])
    local = nbfeat.extract(photos, "ResNet50", images="path", cache=False)
    here.arranged = staticmethod(lambda tables: [*tables[::-1], tables[0], tables[-1]])
    there = Extraction(photos, "ResNet50", images="path", on="ray", cache=False)
    counts = [step.done for step in there.steps()]
    assert counts == sorted(counts)
    assert there.done == there.total == 20
    assert there.progress.equal == 2
    same(there.frame, local.frame)
    same(there.failures, local.failures)


def test_equal_images_within_tables_and_across_them(photos: pd.DataFrame, here: type[Here], tmp_path: Path) -> None:
    """A table may contain only duplicates; a duplicate of an image that fails also fails."""
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(Path(photos["path"].iloc[9]).read_bytes()[:200])
    other = tmp_path / "other.png"
    other.write_bytes(damaged.read_bytes())
    paths = [str(damaged), str(other), *photos["path"].iloc[[0, 0, 1, 1, 2, 2]]]
    paths += [str(other), *photos["path"].iloc[[2, 1, 0, 0, 1, 2, 2]], *photos["path"].iloc[[3, 0, 3]]]
    frame = pd.DataFrame({"path": paths})
    there = nbfeat.extract(frame, "ResNet50", "VGG16", images="path", on="ray")
    assert len(here.tables) == 3
    local = nbfeat.extract(frame, "ResNet50", "VGG16", images="path", cache=False)
    same(there.frame, local.frame)
    same(there.failures, local.failures)
    assert there.progress.equal == local.progress.equal == 12
    FakeEngine.computed = 0
    same(nbfeat.extract(frame, "ResNet50", "VGG16", images="path").frame, there.frame)
    assert not FakeEngine.computed


def test_rows_that_never_come_are_told(photos: pd.DataFrame, here: type[Here]) -> None:
    here.arranged = staticmethod(lambda tables: tables[1:])
    with pytest.raises(ExtractionError, match="8 of 20 rows"):
        nbfeat.extract(photos, "ResNet50", images="path", on="ray", cache=False)


def test_what_is_in_the_cache_does_not_travel(photos: pd.DataFrame, here: type[Here]) -> None:
    nbfeat.extract(photos.iloc[:12], "ResNet50", images="path")
    FakeEngine.computed = 0
    there = nbfeat.extract(photos, "ResNet50", "VGG16", images="path", on="ray")
    assert FakeEngine.computed == 28  # all for VGG16, the missing ones for ResNet50
    assert [done.tolist() for done in here.tables[0].done] == [[True] * 8, [False] * 8]
    same(there.frame, nbfeat.extract(photos, "ResNet50", "VGG16", images="path", cache=False).frame)
    FakeEngine.computed = 0
    again = nbfeat.extract(photos, "ResNet50", "VGG16", images="path")
    assert (FakeEngine.computed, again.cached) == (0, 20)
    assert here.opened == 1


def test_files_are_known_again_though_another_machine_read_them(
    photos: pd.DataFrame, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine the same file has a different device number, so a different state."""
    state, work = fingerprint.state, Worker.__call__

    def elsewhere(self: Worker, batch: dict[str, Any]) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, "state", lambda path, status: state(f"device {path}", status))
            return work(self, batch)

    monkeypatch.setattr(Worker, "__call__", elsewhere)
    touched, gone = photos["path"].iloc[3], Path(photos["path"].iloc[0]).with_name("gone.png")
    gone.write_bytes(Path(photos["path"].iloc[5]).read_bytes() + b"more")
    photos.iloc[5, 0] = str(gone)

    def edited(tables: Tables) -> Tables:  # after they were sent, and before they are read
        os.utime(touched)
        gone.unlink()
        return tables

    here.arranged = staticmethod(edited)
    assert list(nbfeat.extract(photos, "ResNet50", images="path", on="ray").failures["position"]) == [5]
    here.arranged = staticmethod(lambda tables: tables)
    steps = Extraction(photos, "ResNet50", images="path", on="ray").steps()
    assert max(step.cached for step in steps) == 18
    assert [image for table in here.tables for image in table.images] == [touched, str(gone)]


@pytest.mark.parametrize("order", [1, -1])
def test_equal_images_lend_each_other_no_gaps(
    photos: pd.DataFrame, tmp_path: Path, here: type[Here], order: int
) -> None:
    """Of two identical images, only one has cached features of a network."""
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(photos["path"].iloc[0]).read_bytes())
    nbfeat.extract(photos.iloc[:1], "ResNet50", images="path")
    frame = pd.DataFrame({"path": [str(copy), photos["path"].iloc[0]][::order]})
    there = nbfeat.extract(frame, "ResNet50", "VGG16", images="path", on="ray")
    assert here.opened == 1
    assert not there.features.isna().any(axis=None)
    same(there.frame, nbfeat.extract(frame, "ResNet50", "VGG16", images="path", cache=False).frame)


def test_stopping_keeps_what_is_there_and_going_on_completes_it(photos: pd.DataFrame, here: type[Here]) -> None:
    there = stopped(Extraction(photos, "ResNet50", images="path", on="ray"), 8)
    assert (there.state, there.keeps) == ("stopped", True)
    assert there.run().done == 20
    assert here.opened == 2
    same(there.frame, nbfeat.extract(photos, "ResNet50", images="path", cache=False).frame)


@pytest.mark.parametrize("to_files", [False, True])
def test_another_cpu_is_told_once_and_not_kept(
    photos: pd.DataFrame, tmp_path: Path, here: type[Here], *, to_files: bool
) -> None:
    here.differs = {"engine": "another engine", "cpu": "another"}
    where: dict[str, Any] = {"parquet": tmp_path / "there", "cache": True} if to_files else {}
    there = nbfeat.extract(photos, "ResNet50", images="path", on="ray", **where)
    assert sum("a different CPU and engine" in note for note in there.notes) == 1
    assert not there._run.keeps
    FakeEngine.computed = 0
    nbfeat.extract(photos, "ResNet50", images="path")
    assert FakeEngine.computed == 20


def test_what_goes_wrong_in_a_worker_is_told_in_its_words(
    photos: pd.DataFrame, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: FakeEngine) -> None:
        raise NetworkError("The network burned down.")

    monkeypatch.setattr(FakeEngine, "collect", fails)
    with pytest.raises(NetworkError, match=r"The network burned down\. \(on "):
        nbfeat.extract(photos, "ResNet50", images="path", on="ray")
    here.differs = {"weights": "others"}
    with pytest.raises(NetworkError, match=r"it has weights '0+', not 'others'.*files on all machines\. \(on "):
        nbfeat.extract(photos, "ResNet50", images="path", on="ray")


ARRAY = np.zeros((8, 8, 3), np.uint8)
UNMOVABLE = {
    "PIL image 8×8 RGB. Save the images as files": Image.new("RGB", (8, 8)),
    "array 8×8×3 uint8. Save the images as files": ARRAY,
    "not array 8×8×3 uint8": {"bytes": ARRAY},
    "an open file. Save the images as files": io.BytesIO(b"image"),
    "1 kB of images can't be sent to workers: the limit is 1 kB": bytes(1200),
}


@pytest.mark.parametrize(("words", "value"), UNMOVABLE.items())
def test_images_that_cannot_travel_are_refused(
    words: str, value: object, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "MOST_BYTES", 1000)
    frame = pd.DataFrame({"image": pd.Series(["a.png", value], dtype=object)})
    with pytest.raises(RequestError, match=words):
        Extraction(frame, "ResNet50", images="image", on="ray")
    assert not here.opened


def test_what_cannot_be_is_refused_before(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="`on` must be ray, not 'dask'"):
        Extraction(photos, "ResNet50", images="path", on="dask")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else find(name, *more))
    with pytest.raises(RequestError, match=r"pip install 'nbfeat\[ray\]'"):
        Extraction(photos, "ResNet50", images="path", on="ray")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: "found")
    built = replace(catalog.find("ResNet50"), package="registered")
    monkeypatch.setattr(NetworkSpec, "network", property(lambda _: built))
    with pytest.raises(RequestError, match=r"ResNet50 is built by a function in this process.*\.keras"):
        Extraction(photos, "ResNet50", images="path", on="ray")


def test_a_result_is_repeated_there(photos: pd.DataFrame, here: type[Here]) -> None:
    first = nbfeat.extract(photos.iloc[:12], "ResNet50", images="path", normalize="standard", cache=False)
    there = first.like(photos.iloc[12:], on="ray", cache=False)
    assert here.opened == 1
    same(there.frame, first.like(photos.iloc[12:], cache=False).frame)


def test_workers_share_the_cores_of_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    def share(*nodes: dict[str, float], gpu: bool = False) -> Share:
        executor, alive = RayExecutor(), [{"Resources": node, "Alive": True} for node in nodes]
        executor._ray = SimpleNamespace(nodes=lambda: [*alive, {"Resources": {"CPU": 1.0}, "Alive": False}])
        return executor.share(gpu=gpu)

    assert share({"CPU": 1}) == Share(workers=1, cores=1)
    assert share({"CPU": 2}) == Share(workers=2, cores=1)
    assert share({"CPU": 8}, {"CPU": 6}) == Share(workers=4, cores=3)  # at least two each, so one can die
    assert share({"CPU": 64}, {"CPU": 64}) == Share(workers=32, cores=4)
    nodes: list[dict[str, float]] = [{"CPU": 16, "GPU": 2}, {"CPU": 8, "GPU": 2}, {"CPU": 32}, {}]
    assert share(*nodes, gpu=True) == Share(workers=4, cores=4, gpus=1)
    with pytest.raises(RequestError, match="has no GPU"):
        share({"CPU": 2}, gpu=True)
    monkeypatch.setattr(cpu_count, "_taken", [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cpu_count, "quotas", lambda: iter([]))
    cpu_count.take(3)
    assert cpu_count.available_cores() == 3


# Results larger than memory, and images from URLs


def written(frame: pd.DataFrame, folder: Path, **options: Any) -> Extraction:
    """Return an Extraction, not yet run, that writes to `folder` in batches of three."""
    block = options.pop("block", "ResNet50 --normalize standard")
    return Extraction(frame, block, images="path", batch_size=3, parquet=folder, **options)


def stopped(extraction: Extraction, done: int) -> Extraction:
    """Run until this many images are done, then stop."""
    steps = extraction.steps()
    while next(steps).done < done:
        pass
    steps.close()
    return extraction


def same_files(one: Path, other: Path) -> None:
    """Assert that two datasets and their files are bit-identical."""
    rows = [
        {str(file.relative_to(folder)): parquet.read_metadata(file).num_rows for file in folder.rglob("*.parquet")}
        for folder in (one, other)
    ]
    assert rows[0] == rows[1]
    left, right = nbfeat.read(one), nbfeat.read(other)
    same(left.frame, right.frame)
    assert left.features.to_numpy().tobytes() == right.features.to_numpy().tobytes()
    same(left.failures, right.failures)


@pytest.mark.parametrize("normalize", ["l2", "standard"])
def test_files_are_those_of_this_process(
    photos: pd.DataFrame, tmp_path: Path, here: type[Here], normalize: str
) -> None:
    photos.iloc[[2, 7, 11], 0] = [None, "nosuch.png", photos["path"].iloc[10]]
    asked: dict[str, Any] = {"block": f"ResNet50 --normalize {normalize}", "fit_on": "split == 'train'"}
    local = written(photos, tmp_path / "local", **asked).run()
    here.shares = [Share(workers=workers, cores=1) for workers in (2, 3, 4, 5)]  # it grows
    there = written(photos, tmp_path / "there", **asked, on="ray").run()
    assert here.opened == 1, "one cluster for all files"
    assert len(list((tmp_path / "there").iterdir())) == 4
    same_files(tmp_path / "there", tmp_path / "local")
    assert [note for note in there.notes if note.startswith("Ran with")] == ["Ran with 2 workers here."]
    assert (there.done, there.cached, there.progress.equal) == (20, 0, local.progress.equal) == (20, 0, 1)
    same(there.failures, local.failures)
    FakeEngine.computed = 0
    assert written(photos, tmp_path / "there", **asked, on="ray").run().cached == 18
    assert (FakeEngine.computed, here.opened) == (0, 1)


@pytest.mark.parametrize(
    ("first", "then", "done"), [("ray", None, 14), (None, "ray", 14), ("ray", "ray", 14), ("ray", "the same", 8)]
)
def test_what_was_stopped_goes_on_elsewhere(
    photos: pd.DataFrame, tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch, first: str | None,
    then: str | None, done: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(ray_workers, "FEWEST_AT_ONCE", 2)
    photos.iloc[4, 0] = "nosuch.png"
    begun = stopped(written(photos, tmp_path / "there", on=first), done)
    assert (begun.state, begun.kept, begun.done >= done) == ("stopped", 11 if done == 14 else 5, True)
    FakeEngine.computed = 0
    (begun if then == "the same" else written(photos, tmp_path / "there", on=then)).run()
    assert FakeEngine.computed == (12 if then == "the same" else 8)  # otherwise a whole unfinished file
    written(photos, tmp_path / "local").run()
    same_files(tmp_path / "there", tmp_path / "local")
    assert here.opened == [first, then].count("ray") + (then == "the same")


def test_files_have_more_rows_where_each_has_workers_of_its_own(
    photos: pd.DataFrame, tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sink.rows_together([1280], 8, on_cluster=True) * 4 * 1280 <= sink.LARGER * sink.BYTES
    monkeypatch.setattr(sink, "MOST_ROWS", 3)
    monkeypatch.setattr(sink, "LARGER", 3)
    for on, files in ((None, 7), ("ray", 3)):
        assert written(photos, tmp_path / str(files), on=on).run().written.files == files  # type: ignore[union-attr]
    assert here.opened == 1


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """Run a web server on 127.0.0.1 that this process may connect to."""
    pytest.importorskip("aiohttp", reason="no aiohttp here: pip install '.[remote]'")
    monkeypatch.setenv(public_hosts.PRIVATE, "1")
    with Web() as server:
        yield server


def addressed(photos: pd.DataFrame, web: Web, folder: Path) -> pd.DataFrame:
    """Put half of the photos on a web server and in an archive in `folder`; some are missing."""
    paths = photos["path"].tolist()
    with zipfile.ZipFile(folder / "some.zip", "w") as archive:
        for path in paths[:4]:
            archive.write(path, f"in/{Path(path).name}")
    cells = [f"zip://in/{Path(path).name}::some.zip" for path in paths[:4]]
    cells += [web.put(f"/{Path(path).name}?a=1", Path(path).read_bytes()) for path in paths[4:8]]
    cells += [
        f" {web.url('/gone.png')} ",
        "zip://in/gone.png::some.zip",
        "zip://in/gone.png",
        "ftp://example.org/a.png",
    ]
    return photos.assign(path=[*cells, *paths[12:]])


def test_addresses_are_fetched_by_workers(photos: pd.DataFrame, tmp_path: Path, here: type[Here], web: Web) -> None:
    frame = addressed(photos, web, tmp_path)
    asked: dict[str, Any] = {"root": tmp_path, "allow_remote": True, "cache": False}
    local = nbfeat.extract(frame, "ResNet50", images="path", **asked)
    asked_before = sorted(web.asked)
    web.asked.clear()
    here.environment = {public_hosts.PRIVATE: ""}
    there = nbfeat.extract(frame, "ResNet50", images="path", **asked, on="ray")
    assert sorted(web.asked) == asked_before
    same(there.frame, local.frame)
    same(there.failures, local.failures)
    assert list(local.failures["position"]) == [8, 9, 10, 11]
    assert f"zip://in/00.png::{tmp_path / 'some.zip'}" in [image for table in here.tables for image in table.images]
    written(frame, tmp_path / "local", **asked).run()
    written(frame, tmp_path / "there", **asked, on="ray").run()
    same_files(tmp_path / "there", tmp_path / "local")


def test_workers_obey_the_limits_of_this_process_and_no_others(
    photos: pd.DataFrame, here: type[Here], web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos.iloc[3, 0] = web.put("/a.png", Path(photos["path"].iloc[3]).read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(remote, "LIMITS", Limits(size=1000, tries=1))
        there = Extraction(photos, "ResNet50", images="path", allow_remote=True, on="ray")
    assert "larger than 0.001 MB" in there.run().failures["reason"].iloc[0]
    web.asked.clear()
    monkeypatch.delenv(public_hosts.PRIVATE)
    here.environment = {public_hosts.PRIVATE: "1"}
    result = nbfeat.extract(photos, "ResNet50", images="path", allow_remote=True, on="ray")
    assert [reason[:30] for reason in result.failures["reason"]] == ["127.0.0.1 is a private address"]
    result = nbfeat.extract(photos, "ResNet50", images="path", on="ray", cache=False)
    assert [reason[:15] for reason in result.failures["reason"]] == ["image URLs are "]
    assert not web.asked


def test_archives_are_named_so_that_any_process_finds_them(tmp_path: Path) -> None:
    for text in ("zip://a/b.png", "zip://b::c::d", "zip://b::s3://c", "https://x/b::c", "/a::b"):
        assert remote.absolute(text, tmp_path) == text
    home = os.path.expanduser("~")
    assert remote.absolute("ZIP://a b::~/c.zip", tmp_path) == f"zip://a b::{home}/c.zip"
    assert remote.absolute("zip://a::/c.zip", tmp_path) == "zip://a::/c.zip"


def test_archives_in_folders_whose_names_look_like_chains_are_read_there(
    photos: pd.DataFrame, tmp_path: Path, here: type[Here]
) -> None:
    root = tmp_path / "a::b"
    root.mkdir()
    frame = photos.assign(path=[f"zip://{Path(path).name}::some.zip" for path in photos["path"]])
    with zipfile.ZipFile(root / "some.zip", "w") as archive:
        for path in photos["path"]:
            archive.write(path, Path(path).name)
    asked: dict[str, Any] = {"images": "path", "root": root, "allow_remote": True, "cache": False}
    there = nbfeat.extract(frame, "ResNet50", **asked, on="ray")
    assert (here.opened, len(there.failures)) == (1, 0)
    same(there.frame, nbfeat.extract(frame, "ResNet50", **asked).frame)


# Which cluster


def test_the_cluster_is_the_one_that_is_named_or_was_started_to_be_joined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_workers.address_of_cluster() is None
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert ray_workers.address_of_cluster() == address
        with monkeypatch.context() as patch:
            patch.setattr(os, "getuid", lambda: -1)
            assert ray_workers.address_of_cluster() is None  # another user's
            patch.setenv("RAY_ADDRESS", address)
            assert ray_workers.address_of_cluster() == address
            patch.setenv("RAY_ADDRESS", "local")
            assert ray_workers.address_of_cluster() is None
    assert ray_workers.address_of_cluster() is None  # it no longer exists
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RequestError, match=f"Nothing responds at RAY_ADDRESS={address}.*unset RAY_ADDRESS"):
        ray_workers.address_of_cluster()


@needs_ray
@pytest.mark.parametrize("way", ["start", "join"])
def test_a_cluster_that_cannot_be_had_is_told(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray: Any = importlib.import_module("ray")

    folders: list[Path] = []

    def busy(**options: Any) -> None:
        os.environ["RAY_AUTH_MODE"] = "token"  # like Ray
        folders.extend(Path(options[name]).parent for name in ["_temp_dir"] if name in options)
        assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
        raise Exception("The current node timed out.\nAnd more.")  # noqa: TRY002 - as Ray does

    monkeypatch.setattr(ray, "init", busy)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "local" if way == "start" else "ray://nobody")
    before = dict(os.environ)
    error = NetworkError if way == "start" else RequestError
    words = (
        r"didn't start: And more\. Run"
        if way == "start"
        else r"connect to the Ray cluster at ray://nobody: The .* timed out\. If"
    )
    with pytest.raises(error, match=words), RayExecutor() as executor:
        executor._begin()
    assert dict(os.environ) == before
    assert [folder.exists() for folder in folders] == ([False] if way == "start" else [])


FAILS = """
import os, sys, time
from nbfeat import NetworkError
from nbfeat.extraction import ray_workers
from tests.extraction.ray_child import descendants
ray_workers.STORE = 1 << 50  # which Ray notices when its first processes have started
end = ray_workers.RayExecutor._end

def ended(executor):
    global folder
    folder = executor._folder
    before = " ".join(descendants().values())
    end(executor)
    print(folder in before, folder in " ".join(descendants().values()), os.path.exists(folder))

ray_workers.RayExecutor._end = ended
try:
    with ray_workers.RayExecutor() as executor:
        executor._begin()
except NetworkError as error:
    print("object_store_memory" in str(error))
deadline = time.monotonic() + 30
while descendants() and time.monotonic() < deadline:
    time.sleep(0.1)
print([*descendants().values()], os.path.exists(folder))
"""


@needs_ray
@needs_proc
@pytest.mark.slow
def test_a_cluster_that_cannot_start_leaves_nothing() -> None:
    child = subprocess.run(
        [sys.executable, "-c", FAILS], env={**os.environ, "RAY_ADDRESS": "local"}, cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert child.stdout.splitlines() == ["True False False", "True", "[] False"], child.stderr


@needs_ray
def test_an_interrupt_waits_and_a_second_one_does_not() -> None:
    before, ends = signal.signal(signal.SIGINT, signal.default_int_handler), threading.Event()

    def work(interrupts: int) -> None:
        for _ in range(interrupts):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
        ends.wait(0.2 if interrupts == 1 else 10)

    try:
        with isolation.quiet_ray() as (_, call):
            start = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                call(work, 1)
            assert time.monotonic() - start > 0.3
            with pytest.raises(KeyboardInterrupt):
                call(work, 2)
            assert time.monotonic() - start < 5
            ends.set()
    finally:
        signal.signal(signal.SIGINT, before)


# With Ray


@pytest.fixture(scope="module")
def ray(own_home: Path) -> Iterator[Any]:  # workers build networks there
    """Start a cluster with two cores and 100 MB of shared memory, like a user."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'nbfeat[ray]'")
    before, found = isolation.ray_variables(), importlib.import_module("ray")
    os.environ.update(isolation.RAY_ENVIRONMENT)
    # Not one of pytest's folders, whose names are too long for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        for left in (2, 1, 0):
            try:
                found.init(
                    address="local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False,
                    log_to_driver=False, configure_logging=False, _node_ip_address="127.0.0.1", _temp_dir=folder,
                )  # fmt: skip
                break
            except Exception:  # Ray waits half a minute on a busy machine
                found.shutdown()
                if not left:
                    raise
        yield found
        found.shutdown(wait_for_processes=True)
    isolation.put_ray_variables_back(before)


def workers() -> list[int]:
    """Return the processes that run networks on the cluster of this process."""
    return sorted(pid for pid, command in descendants().items() if "MapWorker" in command)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_on_ray_the_result_is_the_same_to_the_bit(
    photos: pd.DataFrame, shell: InteractiveShell, ray: Any, precision: str
) -> None:
    frame = pd.concat([photos] * 3).sample(frac=1, random_state=0)
    frame.iloc[[5, 17], 0] = [None, "nosuch.png"]
    asked: dict[str, Any] = {"images": "path", "precision": precision, "cache": False, "normalize": "standard"}
    blocks = ["EfficientNetLite0 --size 32", "EfficientNetLite0 --size 64 --pooling max --prefix small"]
    try:
        local = nbfeat.extract(frame, *blocks, **asked)
    except NetworkError as error:
        pytest.skip(str(error))
    face = CellMagic(shell) if precision == "auto" else nbfeat.extract
    there = face(frame, *blocks, **asked, on="ray")
    same(there.frame, local.frame)
    same(there.failures, local.failures)
    assert there.progress.equal == local.progress.equal
    assert there.precision == local.precision
    assert ray.is_initialized()
    note = next(note for note in there.notes if note.startswith("Ran on a Ray "))
    assert note.endswith("cluster of 1 machine: 2 workers with 1 core each.")


@needs_ray
@needs_proc
@pytest.mark.slow
def test_closing_cancels_and_workers_that_are_killed_lose_and_double_nothing(tmp_path: Path, ray: Any) -> None:
    generator, paths = np.random.default_rng(0), [str(tmp_path / f"{number}.png") for number in range(2500)]
    for path in paths:
        Image.fromarray(generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(path)
    crowd = pd.DataFrame({"path": paths})
    begun = stopped(Extraction(crowd, "EfficientNetLite0 --size 32", **FLOAT32, on="ray"), 100)
    assert 100 <= begun.done < 2500
    deadline = time.monotonic() + 60
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers()
    assert ray.is_initialized()
    there = Extraction(crowd, "EfficientNetLite0 --size 32", **FLOAT32, on="ray")
    killed: set[int] = set()
    seen = []
    for step in there.steps():
        seen.append(step.done)
        if len(killed) < 2 and step.done > begun.done + 300 * (len(killed) + 1):
            killed.add(min(set(workers()) - killed))
            os.kill(max(killed), signal.SIGKILL)
    assert len(killed) == 2
    assert len(seen) > 20
    assert seen == sorted(seen)
    assert there.cached >= begun.done
    assert not len(there.failures)
    assert ray.cluster_resources()["object_store_memory"] == 100_000_000  # all rows pass through little memory
    assert nbfeat.extract(crowd, "EfficientNetLite0 --size 32", **FLOAT32).cached == 2500
    same(there.frame, nbfeat.extract(crowd, "EfficientNetLite0 --size 32", **FLOAT32, cache=False).frame)


WRITES = """
import sys, nbfeat
from nbfeat.extraction import sink
sink.MOST_ROWS, sink.LARGER = 12, 1
frame, root, folder = sys.argv[1:]
asked = {"images": "path", "precision": "float32", "allow_remote": True, "root": root, "batch_size": 3}
block = "EfficientNetLite0 --size 32 --normalize standard"
extraction = nbfeat.Extraction(frame, block, on="ray", parquet=folder, **asked)
for step in extraction.steps():
    print(step.done, *extraction.notes, flush=True)
"""


@needs_ray
@pytest.mark.slow
def test_another_process_joins_is_killed_and_gone_on_from(
    photos: pd.DataFrame, tmp_path: Path, ray: Any, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "MOST_ROWS", 12)
    monkeypatch.setattr(sink, "LARGER", 1)
    frame = addressed(photos, web, tmp_path).reset_index(drop=True)
    frame.iloc[[13, 15], 0] = [None, frame["path"].iloc[14]]
    frame.to_parquet(tmp_path / "frame.parquet")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_TMPDIR": str(tmp_path), "RAY_AUTH_MODE": "token"}  # Ray has one in the home folder
    with subprocess.Popen(
        [sys.executable, "-c", WRITES, str(tmp_path / "frame.parquet"), str(tmp_path), str(tmp_path / "there")],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        lines = iter(child.stdout)
        last = next(line for line in lines if int(line.split()[0]) > 12)
        child.kill()
    assert "cluster of 1 machine: 2 workers" in last
    assert (tmp_path / "there").is_dir()
    asked: dict[str, Any] = {
        "block": "EfficientNetLite0 --size 32 --normalize standard",
        "precision": "float32",
        "root": tmp_path,
    }
    local = written(frame, tmp_path / "local", allow_remote=True, **asked).run()
    there = written(ray.data.from_pandas(frame), tmp_path / "there", allow_remote=True, **asked, on="ray").run()
    assert there.cached == 8  # of twelve in the first file, since four fail
    assert len([note for note in there.notes if note.startswith("Ran on a Ray ")]) == 1
    assert ray.is_initialized()
    read = nbfeat.read(tmp_path / "there")
    assert read.features.to_numpy().tobytes() == nbfeat.read(tmp_path / "local").features.to_numpy().tobytes()
    assert list(there.failures["position"]) == [8, 9, 10, 11, 13]
    assert there.failures["reason"].tolist() == local.failures["reason"].tolist()


@pytest.fixture(scope="module")
def own_clusters(pictures: Path) -> list[dict[str, Any]]:
    """Return what three runs on clusters of their own, in another process, report."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.extraction.ray_child", str(pictures)],
        env={**os.environ, "RAY_ADDRESS": "local"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    *said, found = child.stdout.splitlines()
    assert not [line for line in said if "(raylet)" not in line]  # Ray's own messages about workers that ended
    assert not [line for line in child.stderr.splitlines() if "RAY_BACKEND_LOG_LEVEL" not in line]  # said of obeying it
    return cast("list[dict[str, Any]]", json.loads(found))


@needs_ray
@needs_proc
@pytest.mark.slow
def test_clusters_of_its_own_keep_to_themselves_and_leave_nothing_whenever_an_interrupt_comes(
    own_clusters: list[dict[str, Any]],
) -> None:
    starting, stopping, at_work = own_clusters
    for told in own_clusters:
        assert (told["interrupted"], told["left"], told["restored"]) == (True, [], True)
        assert told["state"] == "stopped"
    assert starting["done"] == 0
    for told in (stopping, at_work):
        # 127.0.0.1, and as IPv6 writes it
        assert told["listening"]
        assert set(told["listening"]) <= {"0100007F", "0000000000000000FFFF00000100007F"}
        assert "RAY_USAGE_STATS_ENABLED=0" in told["statistics"]
        assert set(told["statistics"]) <= {"RAY_USAGE_STATS_ENABLED=0", "nothing"}
        assert told["running"] > 4
        assert told["modes"] == [0o700]
        assert any("cluster started on this machine: " in note for note in told["notes"])
    assert (stopping["done"], stopping["same"]) == (100, True)
    assert 0 < at_work["done"] <= 2000


@needs_ray
@needs_proc
@pytest.mark.skipif(os.getuid() != 0, reason="only root can look as another user")
@pytest.mark.slow
def test_no_other_user_reaches_anything_of_a_cluster_of_its_own(own_clusters: list[dict[str, Any]]) -> None:
    for told in own_clusters[1:]:
        assert told["reached"] == [f"as {NOBODY}"]
