"""Extraction on a Ray cluster: the same result as here, whatever happens to the workers."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from pyarrow import parquet

import nbfeat
from nbfeat import Extraction, ExtractionError, NetworkError, RequestError
from nbfeat.extraction import ray_session, ray_surroundings, ray_workers, sink, worker
from nbfeat.extraction.ray_session import Share
from nbfeat.images import archives, fingerprint, public_hosts, remote
from nbfeat.images.download import Limits
from nbfeat.inference.engines import cpu_count
from nbfeat.inference.model import NetworkSpec
from tests.conftest import ROOT
from tests.extraction.cluster_child import descendants
from tests.faces import LineMagic, same
from tests.fake import FakeEngine
from tests.web import Web

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'nbfeat[ray]'")
# Ray's own parts warn of each other's future when they are imported and used.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
FLOAT32: dict[str, Any] = {"images": "path", "precision": "float32"}


# Without Ray: workers in this process


class HereSession:
    """Stand in for Ray: one worker in this process takes tables in turn, and a test may change what it gives back."""

    share_ = Share(workers=2, cores=1)
    opened = 0
    environment: ClassVar[dict[str, str]] = {}  # of workers
    tables: list[dict[str, Any]]
    workers: list[Any]

    def __enter__(self) -> Self:
        type(self).opened += 1
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @staticmethod
    def check() -> None:
        pass

    def share(self, *, gpu: bool) -> Share:
        assert not gpu
        return self.share_

    def told(self, share: Share) -> str:
        return f"Ran with {share.workers} workers here."

    def mapped(self, tables: Sequence[dict[str, Any]], worker: type, arguments: Any, share: Share) -> Iterator[Any]:
        assert share is self.share_
        type(self).tables = list(tables)
        with ray_surroundings.environment(self.environment):
            made = worker(*arguments)
        for table in self.arranged(list(tables)):
            with ray_surroundings.environment(self.environment):
                found = made({**table, "row": np.array(table["row"])})
            yield {name: np.asarray(column) for name, column in found.items()}

    @staticmethod
    def arranged(tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return tables


@pytest.fixture
def here(fake_network: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> type[HereSession]:  # what it is for
    """Let pretended workers with a pretended network take the place of Ray."""
    HereSession.opened = 0
    monkeypatch.setattr(HereSession, "arranged", staticmethod(lambda tables: tables))
    monkeypatch.setattr(ray_session, "Session", HereSession)
    monkeypatch.setattr(cpu_count, "_taken", [])
    return HereSession


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files be known by their state, however young they are."""
    monkeypatch.setattr(fingerprint, "SETTLED_AFTER_NS", 0)


def test_the_result_is_the_one_of_this_process(photos: pd.DataFrame, here: type[HereSession]) -> None:
    frame = pd.concat([photos, photos.iloc[:3]]).sample(frac=1, random_state=0)
    frame.iloc[[2, 7], 0] = [None, "nosuch.png"]
    asked: dict[str, Any] = {"normalize": "standard", "fit_on": "split == 'train'", "images": "path", "cache": False}
    local = nbfeat.extract(frame, "ResNet50", "ResNet50 --layer conv4 --prefix mid", **asked)
    there = nbfeat.extract(frame, "ResNet50", "ResNet50 --layer conv4 --prefix mid", on="ray", **asked)
    assert here.opened == 1
    same(there.frame, local.frame)
    same(there.failures, local.failures)
    assert there.equal == local.equal > 0
    assert there.recipe == local.recipe
    assert "Ran with 2 workers here." in there.notes
    assert cpu_count.available_cores() == here.share_.cores


def test_only_rows_and_cells_travel(photos: pd.DataFrame, here: type[HereSession]) -> None:
    photos["content"] = [Path(path).read_bytes() for path in photos["path"]]
    nbfeat.extract(photos, "ResNet50", images=["path", "content"], on="ray", cache=False)
    assert {name for table in here.tables for name in table} == {"row", "image", "is_text", "file", "lacks"}
    sent = [image for table in here.tables for image in table["image"]]
    assert sent == [*map(os.fsencode, photos["path"]), *photos["content"]]


def test_relative_paths_start_at_the_root_of_this_process(
    photos: pd.DataFrame, here: type[HereSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(photos["path"].iloc[0]).parent
    photos["path"] = [Path(path).name for path in photos["path"]]
    monkeypatch.chdir(folder.parent)
    result = nbfeat.extract(photos, "ResNet50", root=folder.name, images="path", on="ray", cache=False)
    assert not len(result.failures)
    assert os.fsencode(folder) in here.tables[0]["image"][0]


def test_rows_that_come_twice_or_in_another_order_change_nothing(
    photos: pd.DataFrame, here: type[HereSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos.iloc[[1, 19], 0] = "nosuch.png"
    photos.iloc[[5, 17], 0] = str(photos["path"].iloc[4])
    local = nbfeat.extract(photos, "ResNet50", images="path", cache=False)
    monkeypatch.setattr(here, "arranged", staticmethod(lambda tables: [*tables[::-1], tables[0], tables[-1]]))
    there = Extraction(photos, "ResNet50", images="path", on="ray", cache=False)
    counts = [step.done for step in there.steps()]
    assert counts == sorted(counts)
    assert there.done == there.total == 20
    assert there.equal == 2
    same(there.frame, local.frame)
    same(there.failures, local.failures)


def test_equal_images_beside_each_other(photos: pd.DataFrame, here: type[HereSession]) -> None:
    frame = photos.iloc[[0, 0, 1, 1, 2, 2, 2, 3]]
    there = nbfeat.extract(frame, "ResNet50", images="path", on="ray")
    assert len(here.tables) == 1
    assert there.equal == 4
    same(there.frame, nbfeat.extract(frame, "ResNet50", images="path", cache=False).frame)
    FakeEngine.computed = 0
    same(nbfeat.extract(photos.iloc[:4], "ResNet50", images="path").frame, there.frame.iloc[[0, 2, 4, 7]])
    assert not FakeEngine.computed


def test_a_file_that_changed_on_its_way_is_not_taken_for_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"before")
    sent = fingerprint.seen(str(path))
    assert len(sent) == 2 * fingerprint.LENGTH
    files = {sent[: fingerprint.LENGTH]: b"content"}
    assert worker._known([str(path)], [sent], files) == {sent[: fingerprint.LENGTH].hex(): b"content".hex()}
    path.write_bytes(b"after it")
    files = {fingerprint.seen(str(path))[: fingerprint.LENGTH]: b"other content"}
    assert worker._known([str(path)], [sent], files) == {}
    assert worker._known([b"bytes", str(tmp_path / "gone.png")], [b"", sent], files) == {}
    assert fingerprint.seen(str(tmp_path / "gone.png")) == fingerprint.seen("no\0name") == b""


def test_rows_that_never_come_are_told(
    photos: pd.DataFrame, here: type[HereSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "arranged", staticmethod(lambda tables: tables[1:]))
    with pytest.raises(ExtractionError, match="12 of 20 rows"):
        nbfeat.extract(photos, "ResNet50", images="path", on="ray", cache=False)


@pytest.mark.usefixtures("settled")
def test_what_is_in_the_cache_does_not_travel(photos: pd.DataFrame, here: type[HereSession]) -> None:
    nbfeat.extract(photos.iloc[:6], "ResNet50", images="path")
    nbfeat.extract(photos.iloc[6:12], "ResNet50", images="path")
    FakeEngine.computed = 0
    there = nbfeat.extract(photos, "ResNet50", "VGG16", images="path", on="ray")
    assert FakeEngine.computed == 28  # of VGG16 all, of ResNet50 what is not there
    lacks = [lacking for table in here.tables for lacking in table["lacks"]]
    assert sorted(lacks) == [b"\0\1"] * 12 + [b"\1\1"] * 8
    same(there.frame, nbfeat.extract(photos, "ResNet50", "VGG16", images="path", cache=False).frame)
    FakeEngine.computed = 0
    again = nbfeat.extract(photos, "ResNet50", "VGG16", images="path")
    assert (FakeEngine.computed, again.cached) == (0, 20)
    assert here.opened == 1


@pytest.mark.usefixtures("settled")
def test_files_are_known_again_though_another_machine_read_them(
    photos: pd.DataFrame, here: type[HereSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file has another device number there, and with it another state."""
    state, work = fingerprint.state, worker.Worker.__call__

    def elsewhere(self: worker.Worker, table: worker.Table) -> worker.Table:
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, "state", lambda path, status: state(f"device {path}", status))
            return work(self, table)

    monkeypatch.setattr(worker.Worker, "__call__", elsewhere)
    changed = photos["path"].iloc[3]

    def edited(tables: list[worker.Table]) -> list[worker.Table]:
        Path(changed).touch()  # after it was sent, and before it is read
        return tables

    monkeypatch.setattr(here, "arranged", staticmethod(edited))
    nbfeat.extract(photos, "ResNet50", images="path", on="ray")
    steps = Extraction(photos, "ResNet50", images="path", on="ray").steps()
    assert max(step.cached for step in steps) == 19
    assert [os.fsdecode(image) for table in here.tables for image in table["image"]] == [changed]


@pytest.mark.usefixtures("settled")
def test_equal_images_lend_each_other_no_gaps(photos: pd.DataFrame, tmp_path: Path, here: type[HereSession]) -> None:
    """One of two equal images has a network's features from the cache, the other one is in no cache yet."""
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(photos["path"].iloc[0]).read_bytes())
    nbfeat.extract(photos.iloc[:1], "ResNet50", images="path")
    frame = pd.DataFrame({"path": [str(copy), photos["path"].iloc[0]]})
    for rows in (frame, frame.iloc[::-1]):
        there = nbfeat.extract(rows, "ResNet50", "VGG16", images="path", on="ray")
        assert not there.features.isna().any(axis=None)
        same(there.frame, nbfeat.extract(rows, "ResNet50", "VGG16", images="path", cache=False).frame)
        nbfeat.storage.clear()
        nbfeat.extract(photos.iloc[:1], "ResNet50", images="path")
    assert here.opened == 2


def test_stopping_keeps_what_is_there_and_going_on_completes_it(photos: pd.DataFrame, here: type[HereSession]) -> None:
    there = Extraction(photos, "ResNet50", images="path", on="ray")
    steps = there.steps()
    while next(steps).done < 8:
        pass
    steps.close()
    assert (there.state, there.keeps) == ("stopped", True)
    assert there.run().done == 20
    assert here.opened == 2
    same(there.frame, nbfeat.extract(photos, "ResNet50", images="path", cache=False).frame)


def test_another_cpu_is_told_and_not_kept(
    photos: pd.DataFrame, here: type[HereSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, engine="another engine", cpu="another")
    there = nbfeat.extract(photos, "ResNet50", images="path", on="ray")
    assert any("another CPU and engine" in note for note in there.notes)
    assert not there.keeps
    FakeEngine.computed = 0
    nbfeat.extract(photos, "ResNet50", images="path")
    assert FakeEngine.computed == 20
    assert here.opened == 1


def test_other_weights_on_a_worker_are_an_error(
    photos: pd.DataFrame, here: type[HereSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, weights="others")
    with pytest.raises(NetworkError, match=r"weights is 'others'.*same nbfeat and files"):
        nbfeat.extract(photos, "ResNet50", images="path", on="ray")
    assert here.opened == 1


def test_what_goes_wrong_in_a_worker_is_told_in_its_words(
    photos: pd.DataFrame, here: type[HereSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: FakeEngine) -> None:
        raise NetworkError("The network burned down.")

    monkeypatch.setattr(FakeEngine, "collect", fails)
    with pytest.raises(NetworkError, match=r"The network burned down\. \(on "):
        nbfeat.extract(photos, "ResNet50", images="path", on="ray")
    assert here.opened == 1


def change(monkeypatch: pytest.MonkeyPatch, **other: str) -> None:
    """Let the worker find that something is another there."""
    compared = worker.Worker._compared

    def changed(self: worker.Worker) -> list[str]:
        for lane in self._run.lanes:
            for kept in lane.kept.values():
                kept.key_fields.update(other)  # type: ignore[attr-defined]  # a dict
        return compared(self)

    monkeypatch.setattr(worker.Worker, "_compared", changed)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Image.new("RGB", (8, 8)), "PIL image 8×8 RGB"),
        (np.zeros((8, 8, 3), np.uint8), "array 8×8×3 uint8"),
        ({"bytes": np.zeros((8, 8, 3), np.uint8)}, "array 8×8×3 uint8"),
        (io.BytesIO(b"image"), "an open file"),
    ],
)
def test_images_that_cannot_travel_are_refused(value: object, words: str, here: type[HereSession]) -> None:
    frame = pd.DataFrame({"image": pd.Series(["a.png", value], dtype=object)})
    with pytest.raises(RequestError, match=f"{words}: save the images as files"):
        Extraction(frame, "ResNet50", images="image", on="ray")
    assert not here.opened


def test_more_bytes_than_should_travel_are_refused(
    photos: pd.DataFrame, here: type[HereSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "MOST_BYTES", 1000)
    photos["content"] = [bytes(600)] * 20
    with pytest.raises(RequestError, match="12 kB of images would have to travel to workers, and 1 kB is the most"):
        Extraction(photos, "ResNet50", images="content", on="ray")
    assert not here.opened


@pytest.mark.usefixtures("here")
def test_networks_that_a_function_builds_are_refused(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetworkSpec, "is_registered", property(lambda _: True))
    with pytest.raises(RequestError, match=r"ResNet50 is built by a function in this process.*\.keras"):
        Extraction(photos, "ResNet50", images="path", on="ray")


def test_a_result_is_repeated_there(photos: pd.DataFrame, here: type[HereSession]) -> None:
    first = nbfeat.extract(photos.iloc[:12], "ResNet50", images="path", normalize="standard", cache=False)
    there = first.like(photos.iloc[12:], on="ray", cache=False)
    assert here.opened == 1
    same(there.frame, first.like(photos.iloc[12:], cache=False).frame)


def test_other_places_are_refused(photos: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match="--on cannot be 'dask'"):
        Extraction(photos, "ResNet50", images="path", on="dask")


def test_without_ray_the_message_says_how_to_get_it(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else find(name, *more))
    with pytest.raises(RequestError, match=r"pip install 'nbfeat\[ray\]'"):
        Extraction(photos, "ResNet50", images="path", on="ray")


def test_workers_share_the_cores_of_all_machines() -> None:
    def share(*cpus: int) -> Share:
        return Share.of([{"CPU": count} for count in cpus], gpu=False)

    assert share(1) == Share(workers=1, cores=1)
    assert share(2) == Share(workers=2, cores=1)
    assert share(8, 6) == Share(workers=4, cores=3)  # machines have at least two, so that one may die
    assert share(64, 64) == Share(workers=32, cores=4)
    nodes: list[dict[str, float]] = [{"CPU": 16, "GPU": 2}, {"CPU": 8, "GPU": 2}, {"CPU": 32}, {}]
    assert Share.of(nodes, gpu=True) == Share(workers=4, cores=4, gpus=1)
    with pytest.raises(RequestError, match="has no GPU"):
        Share.of([{"CPU": 2}], gpu=True)


def test_a_worker_takes_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_count, "_taken", [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cpu_count, "quotas", lambda: iter([]))
    cpu_count.take(3)
    assert cpu_count.available_cores() == 3


# Results larger than memory, and images by address


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files have six rows: four files for twenty photos."""
    monkeypatch.setattr(sink, "MOST_ROWS", 6)
    monkeypatch.setattr(sink, "LARGER", 1)


def written(frame: pd.DataFrame, folder: Path, **options: Any) -> Extraction:
    """Return what writes to `folder`, in batches of three, not yet run."""
    block = options.pop("block", "ResNet50 --normalize standard")
    return Extraction(frame, block, images="path", batch_size=3, parquet=folder, **options)


def stopped(extraction: Extraction, done: int) -> Extraction:
    """Run until so many images are done, and stop."""
    steps = extraction.steps()
    while next(steps).done < done:
        pass
    steps.close()
    return extraction


def same_files(one: Path, other: Path) -> None:
    """Assert that two datasets are equal to the bit, and so are their files."""
    rows = [
        {str(file.relative_to(folder)): parquet.read_metadata(file).num_rows for file in folder.rglob("*.parquet")}
        for folder in (one, other)
    ]
    assert rows[0] == rows[1]
    left, right = nbfeat.read(one), nbfeat.read(other)
    same(left.frame, right.frame)
    assert left.features.to_numpy().tobytes() == right.features.to_numpy().tobytes()
    same(left.failures, right.failures)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("normalize", ["none", "l2", "standard", "minmax"])
def test_files_are_those_of_this_process(
    photos: pd.DataFrame, tmp_path: Path, here: type[HereSession], monkeypatch: pytest.MonkeyPatch, normalize: str
) -> None:
    photos.iloc[[2, 7, 11], 0] = [None, "nosuch.png", photos["path"].iloc[10]]
    asked: dict[str, Any] = {"block": f"ResNet50 --normalize {normalize}", "fit_on": "split == 'train'"}
    local = written(photos, tmp_path / "local", **asked).run()
    shares = iter([Share(workers=workers, cores=1) for workers in (2, 3, 4, 5)])

    def grown(self: HereSession, *, gpu: bool) -> Share:
        assert not gpu
        self.share_ = next(shares)
        return self.share_

    monkeypatch.setattr(here, "share", grown)
    there = written(photos, tmp_path / "there", **asked, on="ray").run()
    assert here.opened == 1, "one cluster for all files"
    assert len(list((tmp_path / "there").iterdir())) == 4
    same_files(tmp_path / "there", tmp_path / "local")
    assert [note for note in there.notes if note.startswith("Ran with")] == ["Ran with 2 workers here."]
    assert (there.done, there.cached, there.equal) == (20, 0, local.equal) == (20, 0, 1)
    same(there.failures, local.failures)
    FakeEngine.computed = 0
    assert written(photos, tmp_path / "there", **asked, on="ray").run().cached == 18
    assert (FakeEngine.computed, here.opened) == (0, 1)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("ways", [("ray", None), (None, "ray"), ("ray", "ray")])
def test_what_was_stopped_goes_on_elsewhere(
    photos: pd.DataFrame, tmp_path: Path, here: type[HereSession], ways: tuple[str | None, str | None]
) -> None:
    photos.iloc[4, 0] = "nosuch.png"
    begun = stopped(written(photos, tmp_path / "there", on=ways[0]), 14)
    assert (begun.state, begun.kept) == ("stopped", 11)
    FakeEngine.computed = 0
    written(photos, tmp_path / "there", on=ways[1]).run()
    assert FakeEngine.computed == 8
    written(photos, tmp_path / "local").run()
    same_files(tmp_path / "there", tmp_path / "local")
    assert here.opened == len([way for way in ways if way])


@pytest.mark.usefixtures("small_files")
def test_the_same_extraction_goes_on_in_the_middle_of_a_file(
    photos: pd.DataFrame, tmp_path: Path, here: type[HereSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "FEWEST_AT_ONCE", 2)
    there = stopped(written(photos, tmp_path / "there", on="ray"), 8)
    assert there.done == 8
    FakeEngine.computed = 0
    there.run()
    assert FakeEngine.computed == 12
    assert here.opened == 2
    written(photos, tmp_path / "local").run()
    same_files(tmp_path / "there", tmp_path / "local")


def test_files_have_more_rows_where_each_has_workers_of_its_own(
    photos: pd.DataFrame, tmp_path: Path, here: type[HereSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sink.rows_together([1280], 8, on_cluster=True) * 4 * 1280 <= sink.LARGER * sink.BYTES
    monkeypatch.setattr(sink, "MOST_ROWS", 3)
    for on, files in ((None, 7), ("ray", 3)):
        assert written(photos, tmp_path / str(files), on=on).run().written.files == files  # type: ignore[union-attr]
    assert here.opened == 1


@pytest.mark.usefixtures("small_files")
def test_files_that_another_cpu_computed_are_told_and_not_in_the_cache(
    photos: pd.DataFrame, tmp_path: Path, here: type[HereSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, cpu="another")
    there = written(photos, tmp_path / "there", on="ray", cache=True).run()
    assert sum("another CPU" in note for note in there.notes) == 1
    assert not there._run.keeps
    assert here.opened == 1


@pytest.fixture
def web() -> Iterator[Web]:
    """Serve at 127.0.0.1."""
    pytest.importorskip("aiohttp", reason="no aiohttp here: pip install '.[remote]'")
    with Web() as server:
        yield server


def addressed(photos: pd.DataFrame, web: Web, folder: Path) -> pd.DataFrame:
    """Put half of the photos into a web server and an archive in `folder`, among them some that are not there."""
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


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("parquet", [False, True])
def test_addresses_are_fetched_by_workers(
    photos: pd.DataFrame, tmp_path: Path, here: type[HereSession], web: Web, monkeypatch: pytest.MonkeyPatch,
    *, parquet: bool,
) -> None:  # fmt: skip
    frame = addressed(photos, web, tmp_path)
    asked: dict[str, Any] = {"root": tmp_path, "allow_remote": True, "cache": False}
    monkeypatch.setenv(public_hosts.PRIVATE, "1")
    if parquet:
        written(frame, tmp_path / "local", **asked).run()
    local = nbfeat.extract(frame, "ResNet50", images="path", **asked)
    asked_before = sorted(web.asked[: len(web.asked) // (2 if parquet else 1)])
    web.asked.clear()
    monkeypatch.setattr(here, "environment", {public_hosts.PRIVATE: ""})
    if parquet:
        written(frame, tmp_path / "there", **asked, on="ray").run()
        same_files(tmp_path / "there", tmp_path / "local")
    else:
        there = nbfeat.extract(frame, "ResNet50", images="path", **asked, on="ray")
        same(there.frame, local.frame)
        same(there.failures, local.failures)
        sent = {image for table in here.tables for image in table["image"]}
        assert f"zip://in/00.png::{tmp_path / 'some.zip'}".encode() in sent
    assert list(local.failures["position"]) == [8, 9, 10, 11]
    assert sorted(web.asked) == asked_before


def test_the_environment_of_a_worker_allows_nothing(
    photos: pd.DataFrame, here: type[HereSession], web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos.iloc[3, 0] = web.put("/a.png", Path(photos["path"].iloc[3]).read_bytes())
    monkeypatch.delenv(public_hosts.PRIVATE, raising=False)
    monkeypatch.setattr(here, "environment", {public_hosts.PRIVATE: "1"})
    result = nbfeat.extract(photos, "ResNet50", images="path", allow_remote=True, on="ray")
    assert [reason[:30] for reason in result.failures["reason"]] == ["127.0.0.1 is a private address"]
    result = nbfeat.extract(photos, "ResNet50", images="path", on="ray", cache=False)
    assert [reason[:15] for reason in result.failures["reason"]] == ["images by addre"]
    assert not web.asked
    assert here.opened == 2


def test_workers_obey_the_limits_of_this_process(
    photos: pd.DataFrame, here: type[HereSession], web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos.iloc[3, 0] = web.put("/a.png", Path(photos["path"].iloc[3]).read_bytes())
    monkeypatch.setenv(public_hosts.PRIVATE, "1")
    with monkeypatch.context() as patch:
        patch.setattr(remote, "LIMITS", Limits(size=1000, tries=1))
        there = Extraction(photos, "ResNet50", images="path", allow_remote=True, on="ray")
    assert "larger than 0.001 MB" in there.run().failures["reason"].iloc[0]
    assert here.opened == 1


def test_archives_are_named_so_that_any_process_finds_them(tmp_path: Path) -> None:
    for text in ("zip://a/b.png", "zip://b::c::d", "zip://b::s3://c", "https://x/b::c", "/a::b"):
        assert archives.absolute(text, tmp_path) == text
    home = os.path.expanduser("~")
    assert archives.absolute("ZIP://a b::~/c.zip", tmp_path) == f"zip://a b::{home}/c.zip"
    assert archives.absolute("zip://a::/c.zip", tmp_path) == "zip://a::/c.zip"


def test_any_text_arrives_as_it_is(photos: pd.DataFrame, here: type[HereSession]) -> None:
    photos["path"] = photos["path"].astype(object)
    photos.iloc[:3, 0] = ["a\udcff.png", "a\ud800.png", "a\0.png"]
    local = nbfeat.extract(photos, "ResNet50", images="path", cache=False)
    there = nbfeat.extract(photos, "ResNet50", images="path", cache=False, on="ray")
    same(there.failures, local.failures)
    assert len(there.failures) == 3
    assert here.opened == 1


# With Ray


@pytest.fixture(scope="module")
def ray(own_home: Path) -> Iterator[Any]:  # workers build networks there
    """Start a cluster of two cores and 100 MB of shared memory, as a user would."""
    found: Any = pytest.importorskip("ray", reason="Ray is not installed: pip install 'nbfeat[ray]'")
    # Not one of pytest's folders, whose names are too long for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        with ray_surroundings.environment(ray_surroundings.ENVIRONMENT), ray_surroundings.alone():
            for left in (2, 1, 0):
                try:
                    found.init(
                        address="local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False,
                        log_to_driver=False, configure_logging=False, _node_ip_address="127.0.0.1", _temp_dir=folder,
                    )  # fmt: skip
                    break
                except Exception:  # Ray gives a machine that is busy half a minute
                    found.shutdown()
                    if not left:
                        raise
        with ray_surroundings.without_statistics():
            yield found
        found.shutdown()


@pytest.fixture
def crowd(many: list[str]) -> pd.DataFrame:
    """Return a frame of 5,000 images."""
    return pd.DataFrame({"path": many[:5000]})


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_ray_the_result_is_the_same_to_the_bit(photos: pd.DataFrame, ray: Any, precision: str) -> None:
    frame = pd.concat([photos] * 3).sample(frac=1, random_state=0)
    frame.iloc[[5, 17], 0] = [None, "nosuch.png"]
    asked: dict[str, Any] = {"images": "path", "precision": precision, "cache": False, "normalize": "standard"}
    try:
        local = nbfeat.extract(frame, "Pocket", "Pocket --size 64 --pooling max --prefix small", **asked)
    except NetworkError as error:
        pytest.skip(str(error))
    there = nbfeat.extract(frame, "Pocket", "Pocket --size 64 --pooling max --prefix small", on="ray", **asked)
    same(there.frame, local.frame)
    same(there.failures, local.failures)
    assert there.equal == local.equal
    assert there.precision == local.precision == precision
    assert ray.is_initialized()
    note = next(note for note in there.notes if note.startswith("Ran on Ray"))
    assert note.endswith("a cluster of 1 machine: 2 workers of 1 core each.")


@needs_ray
@pytest.mark.slow
def test_what_is_settled_here_is_obeyed_there(crowd: pd.DataFrame, ray: Any) -> None:  # what it runs on
    frame = crowd.iloc[:200]
    local = nbfeat.extract(frame, "Pocket", cache=False)
    there = nbfeat.extract(frame, "Pocket", cache=False, on="ray")
    assert there.precision == local.precision
    same(there.frame, local.frame)


@needs_ray
@pytest.mark.slow
def test_many_rows_pass_through_little_shared_memory_and_into_the_cache(crowd: pd.DataFrame, ray: Any) -> None:
    there = Extraction(crowd, "Pocket", **FLOAT32, on="ray")
    steps = list(there.steps())
    assert len(steps) > 20
    assert steps[-1].images_per_second > 0
    assert ray.cluster_resources()["object_store_memory"] == 100_000_000
    local = nbfeat.extract(crowd, "Pocket", **FLOAT32)
    assert local.cached == 5000
    same(there.frame, local.frame)
    apart = nbfeat.extract(crowd.iloc[::50], "Pocket", **FLOAT32, cache=False)
    same(apart.features, there.features.iloc[::50])


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_a_worker_that_is_killed_loses_and_doubles_nothing(crowd: pd.DataFrame, ray: Any) -> None:
    there = Extraction(crowd, "Pocket", **FLOAT32, on="ray", cache=False)
    killed: set[int] = set()
    seen = []
    for step in there.steps():
        seen.append(step.done)
        if len(killed) < 2 and step.done > 500 * (len(killed) + 1):
            victim = min(set(workers()) - killed)
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
    assert len(killed) == 2
    assert seen == sorted(seen)
    assert there.done == 5000
    assert not len(there.failures)
    same(there.frame, nbfeat.extract(crowd, "Pocket", **FLOAT32, cache=False).frame)


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_closing_cancels_and_leaves_a_cluster_that_was_there(crowd: pd.DataFrame, ray: Any) -> None:
    there = Extraction(crowd, "Pocket", **FLOAT32, on="ray")
    steps = there.steps()
    while next(steps).done < 100:
        pass
    assert workers()
    steps.close()
    done = there.done
    assert 100 <= done < 5000
    assert ray.is_initialized()
    deadline = time.monotonic() + 60
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers()
    again = Extraction(crowd.iloc[:1500], "Pocket", **FLOAT32, on="ray")
    assert again.run().cached > 0
    same(again.frame, nbfeat.extract(crowd.iloc[:1500], "Pocket", **FLOAT32, cache=False).frame)


@needs_ray
@pytest.mark.slow
def test_the_line_magic_runs_on_ray(photos: pd.DataFrame, shell: InteractiveShell, ray: Any) -> None:
    shell.reset(new_session=False)
    result = LineMagic(shell)(photos, "Pocket", **FLOAT32, on="ray", cache=False)
    assert any(note.startswith("Ran on Ray") for note in result.notes)
    same(result.frame, nbfeat.extract(photos, "Pocket", **FLOAT32, cache=False).frame)


@needs_ray
@pytest.mark.slow
def test_on_ray_files_and_addresses_are_those_of_this_process(
    photos: pd.DataFrame, tmp_path: Path, ray: Any, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "MOST_ROWS", 12)
    monkeypatch.setattr(sink, "LARGER", 1)
    monkeypatch.setenv(public_hosts.PRIVATE, "1")  # of this process: workers were started without
    frame = addressed(photos, web, tmp_path)
    frame.iloc[[13, 15], 0] = [None, frame["path"].iloc[14]]
    asked: dict[str, Any] = {"block": "Pocket --normalize standard", "precision": "float32", "root": tmp_path}
    local = written(frame, tmp_path / "local", allow_remote=True, **asked).run()
    there = written(ray.data.from_pandas(frame), tmp_path / "there", allow_remote=True, **asked, on="ray").run()
    read = nbfeat.read(tmp_path / "there")
    assert read.features.to_numpy().tobytes() == nbfeat.read(tmp_path / "local").features.to_numpy().tobytes()
    assert list(there.failures["position"]) == [8, 9, 10, 11, 13]
    assert there.failures["reason"].tolist() == local.failures["reason"].tolist()
    assert there.equal == local.equal == 1
    assert there.written is not None
    assert there.written.files == 2
    assert len([note for note in there.notes if note.startswith("Ran on Ray")]) == 1
    assert ray.is_initialized()


WRITES = """
import sys, nbfeat, pandas as pd
from nbfeat.extraction import sink
sink.MOST_ROWS, sink.LARGER = 8, 1
frame = pd.DataFrame({"path": sys.argv[2:]})
extraction = nbfeat.Extraction(frame, "Pocket", precision="float32", on="ray", parquet=sys.argv[1], batch_size=4)
for step in extraction.steps():
    print(step.done, flush=True)
"""


@needs_ray
@pytest.mark.slow
def test_files_of_a_process_that_was_killed_are_gone_on_from(photos: pd.DataFrame, tmp_path: Path, ray: Any) -> None:
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}
    with subprocess.Popen(
        [sys.executable, "-c", WRITES, str(tmp_path / "there"), *photos["path"]],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert any(int(line) > 8 for line in child.stdout)
        child.kill()
    assert (tmp_path / "there" / "part-00000.parquet").exists()
    frame = photos[["path"]].reset_index(drop=True)
    goes_on = Extraction(frame, "Pocket", **FLOAT32, parquet=tmp_path / "there").run()
    assert 8 <= goes_on.cached < 20
    same(nbfeat.read(tmp_path / "there").frame, nbfeat.extract(frame, "Pocket", **FLOAT32, cache=False).frame)


def workers() -> list[int]:
    """Return the processes that run networks on the cluster of this process."""
    return sorted(pid for pid, command in descendants().items() if "MapWorker" in command)


JOINS = """
import sys, nbfeat, pandas as pd
result = nbfeat.extract(pd.DataFrame({"path": sys.argv[1:]}), "Pocket", precision="float32", on="ray", cache=False)
print(len(result.failures), *result.notes)
"""


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("way", ["named", "started"])
def test_a_cluster_that_is_there_is_joined_and_left(way: str, photos: pd.DataFrame, ray: Any, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if name not in {"RAY_ADDRESS", "TMPDIR"}}
    environment["RAY_AUTH_MODE"] = "token"  # which Ray's own clusters ask for, and it is in the home folder
    if way == "named":
        environment["RAY_ADDRESS"] = address
    else:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        environment["RAY_TMPDIR"] = str(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", JOINS, *photos["path"]],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.stdout.startswith("0 Ran on Ray"), child.stderr
    assert "a cluster of 1 machine: 2 workers" in child.stdout
    assert ray.is_initialized()
    assert nbfeat.extract(photos, "Pocket", **FLOAT32, on="ray", cache=False).done == 20


def test_an_address_where_nobody_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert ray_session.address_of_cluster() == address
    with pytest.raises(RequestError, match=f"Nothing answers at {address}.*unset RAY_ADDRESS"):
        ray_session.address_of_cluster()


@needs_ray
def test_a_cluster_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ray: Any = importlib.import_module("ray")

    def busy(**_: object) -> None:
        raise Exception("The current node timed out.")  # noqa: TRY002 - as Ray does

    monkeypatch.setattr(ray, "init", busy)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    before = dict(os.environ)
    with pytest.raises(NetworkError, match=r"could be started here: The current node timed out\. Run it again"):
        ray_session.Session().__enter__()
    assert dict(os.environ) == before


def test_only_a_cluster_that_was_started_to_be_joined_is_joined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_session.address_of_cluster() is None
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert ray_session.address_of_cluster() == address
        with monkeypatch.context() as patch:
            patch.setattr(os, "getuid", lambda: -1)
            assert ray_session.address_of_cluster() is None  # somebody else's
        with monkeypatch.context() as patch:
            patch.setenv("RAY_ADDRESS", "local")
            assert ray_session.address_of_cluster() is None
    assert ray_session.address_of_cluster() is None  # it has gone


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets and processes are found in /proc")
@pytest.mark.parametrize("how", ["through", "close", "interrupt", "starting", "stopping"])
def test_a_cluster_of_its_own_keeps_to_itself_and_leaves_nothing(how: str, pictures: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tests.extraction.cluster_child", how, str(pictures)],
        env={**os.environ, "RAY_ADDRESS": "local"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert child.stderr == ""
    assert (told["left"], told["folders_left"], told["changed"]) == ([], [], [])
    assert told["restored"]
    if how == "starting":
        assert (told["state"], told["done"], told["interrupted"]) == ("stopped", 0, True)
        return
    assert told["listening"]
    assert set(told["listening"]) <= {
        "0100007F",
        "0000000000000000FFFF00000100007F",
    }  # 127.0.0.1, and as IPv6 writes it
    assert "RAY_USAGE_STATS_ENABLED=0" in told["statistics"]
    assert set(told["statistics"]) <= {"RAY_USAGE_STATS_ENABLED=0", "nothing"}
    assert told["running"] > 4
    assert told["collecting"] == []
    assert told["folders"]
    assert any("a cluster started here: " in note for note in told["notes"])
    if how == "through":
        assert (told["state"], told["done"], told["same"]) == ("done", 2000, True)
    else:
        assert told["state"] == "stopped"
        assert told["done"] <= 2000
        assert told.get("interrupted", False) == (how != "close")


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, as in a kernel, whatever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_waits_and_a_second_one_does_not() -> None:
    reached = []

    def work(interrupts: int) -> None:
        with ray_surroundings.undisturbed():
            for _ in range(interrupts):
                signal.raise_signal(signal.SIGINT)
            reached.append(interrupts)

    for interrupts in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            work(interrupts)
    assert reached == [1]
