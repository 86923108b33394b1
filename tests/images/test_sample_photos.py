"""The photographs to try things on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import nbfeat
from nbfeat import RequestError, __main__ as demo
from nbfeat.images import sample_photos as module

WITHOUT_NETWORK = """
import json, os, sys
def refuse(event, _):
    if event.startswith("socket."): raise AssertionError(event)
sys.addaudithook(refuse)
import nbfeat
frame = nbfeat.sample_photos()
loaded = [name for name in ("skimage", "sklearn", "pooch") if name in sys.modules]
print(json.dumps([frame["path"].tolist(), all(map(os.path.isfile, frame["path"])), loaded]))
"""


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBFEAT_HOME", str(tmp_path_factory.mktemp("samples", numbered=True)))
        os.chmod(os.environ["NBFEAT_HOME"], 0o700)
        return nbfeat.sample_photos()


def start(**environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_NETWORK]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


def told(process: subprocess.Popen[str]) -> Any:
    output, _ = process.communicate()
    assert not process.returncode
    return json.loads(output)


def test_there_are_forty_files_of_each_of_twelve_classes(samples: pd.DataFrame) -> None:
    assert list(samples.columns) == ["path", "label", "source"]
    assert samples["label"].value_counts().to_dict() == dict.fromkeys(module._PHOTOS, 40)
    assert samples["label"][:24].tolist() == [*module._PHOTOS] * 2
    assert samples["path"].is_unique
    assert all(Path(path).parent.name == label for path, label in zip(samples["path"], samples["label"], strict=True))
    assert samples.groupby("source")["label"].nunique().eq(1).all()
    assert samples["source"].nunique() == 12
    assert samples["source"].iloc[0] == "astronaut of skimage"
    assert nbfeat.thumbnails(samples, limit=2), "the column of images is not clear"
    assert sum(Path(path).stat().st_size for path in samples["path"]) < 1_500_000
    named = nbfeat.sample_photos.__doc__ or ""
    assert all(label in named for label in module._PHOTOS), "the terms of each"


def test_they_are_the_same_everywhere(samples: pd.DataFrame) -> None:
    again = nbfeat.sample_photos()
    assert not set(again["path"]) & set(samples["path"])
    pairs = zip(samples["path"], again["path"], strict=True)
    assert all(Path(one).read_bytes() == Path(other).read_bytes() for one, other in pairs)


def test_the_second_call_only_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    first = nbfeat.sample_photos()
    monkeypatch.setattr(module, "_cut", None)
    pd.testing.assert_frame_equal(nbfeat.sample_photos(), first)


def test_tiles_of_a_class_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZE", 32)
    row, column = np.indices((300, 400)) // 50
    Image.fromarray(np.dstack([20 + 25 * row, 20 + 20 * column, 0 * row]).astype(np.uint8)).save(tmp_path / "photo.png")
    module._cut(tmp_path / "photo.png", 50, tmp_path / "tiles")
    tiles = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "tiles").glob("*.jpg"))]
    assert len(tiles) == 40
    assert all(np.ptp(tile[4:-4, 4:-4, :2], axis=(0, 1)).max() < 8 for tile in tiles), "each from one place"


@pytest.mark.usefixtures("fake_network")
def test_one_is_damaged_and_six_are_there_twice(samples: pd.DataFrame) -> None:
    result = nbfeat.extract(samples, "MobileNet --weights random", images="path")
    (failure,) = result.failures.to_dict("records")
    assert Path(failure["image"]).parts[-2:] == ("rocket", "07.jpg")
    assert failure["reason"] == "damaged: the image file is truncated"
    found = nbfeat.duplicates(result, 0.0005).frame
    names = found.groupby("group")["path"].agg(list)
    assert names.map(len).tolist() == [2] * 6
    assert all(copy == one.replace(".jpg", "_copy.jpg") for one, copy in names)


def test_nothing_is_fetched_and_no_heavy_package_imported(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    paths, there, loaded = told(start(NBFEAT_HOME=str(tmp_path)))
    assert len(paths) == 480
    assert there
    assert loaded == []


def test_an_interrupted_call_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = module._cut

    def interrupted(photo: Path, side: int, target: Path) -> None:
        if target.name == "flower":
            raise KeyboardInterrupt
        cut(photo, side, target)

    monkeypatch.setattr(module, "_cut", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nbfeat.sample_photos()
    assert list((own_cache / "samples").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("NBFEAT_HOME", str(own_cache))
    assert len(nbfeat.sample_photos()) == 480


def test_half_a_folder_is_written_again(own_cache: Path) -> None:
    half = own_cache / "samples" / "photos-1" / "cat"
    half.mkdir(parents=True)
    for folder in (own_cache / "samples", half.parent):
        folder.chmod(0o700)
    (half / "00.jpg").write_bytes(b"")
    assert len(nbfeat.sample_photos()) == 480


@pytest.mark.slow
def test_two_processes_at_once_share_one_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    first, second = (told(one) for one in [start(NBFEAT_HOME=str(tmp_path)) for _ in range(2)])
    assert first == second
    assert first[1]
    assert [folder.name for folder in (tmp_path / "samples").iterdir()] == ["photos-1"]


@pytest.mark.slow
def test_without_a_home_they_last_as_long_as_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "tmp").mkdir()
    paths, there, _ = told(start(NBFEAT_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path / "tmp")))
    assert there
    assert all(path.startswith(str(tmp_path / "tmp")) for path in paths)
    assert list((tmp_path / "tmp").iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("NBFEAT_HOME", str(tmp_path / "file"))
    module._temporary.cache_clear()
    assert nbfeat.sample_photos()["path"].tolist() == nbfeat.sample_photos()["path"].tolist()


def test_clearing_all_deletes_them() -> None:
    frame = nbfeat.sample_photos()
    nbfeat.storage.clear()
    assert Path(frame["path"][0]).exists()
    nbfeat.storage.clear("all")
    assert not Path(frame["path"][0]).exists()


@pytest.mark.usefixtures("fake_network")
def test_without_scikit_image_there_is_a_next_step(
    own_cache: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(RequestError) as caught:
        nbfeat.sample_photos()
    way = "`sample_photos` needs scikit-image, which isn't installed: pip install 'nbfeat[samples]'."
    assert str(caught.value) == way
    assert list((own_cache / "samples").iterdir()) == []
    assert demo.main([]) == 1
    assert capsys.readouterr().out == f"{way} Or name a folder of photographs of yours: python -m nbfeat FOLDER\n"
    for number, picture in enumerate(sorted(pictures.iterdir())):
        target = tmp_path / f"kind {number % 2}" / picture.name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(picture)
    assert demo.main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "20 photographs, 2 classes" in output
    assert "20 rows of 2 classes" in output


@pytest.mark.slow
@pytest.mark.usefixtures("shared_data")
def test_backbones_and_layers_differ_on_them(samples: pd.DataFrame) -> None:
    small = "MobileNet --alpha 0.25 --size 64"
    result = nbfeat.extract(samples, "MobileNetV2", small, f"{small} --layer conv_pw_1_relu", images="path")
    large, end, early = nbfeat.compare(result, "label", speed=False).scores.loc[
        ["mobilenetv2", "mobilenet025", "mobilenet025_conv_pw_1_relu"]
    ].mean(axis=1)  # fmt: skip
    assert 0.85 < large < 0.97
    assert large - end >= 0.05
    assert end - early >= 0.1
    found = nbfeat.duplicates(result, features="mobilenetv2").frame["path"]
    copies = [path for path in samples["path"] if "_copy" in path]
    assert {*copies, *(copy.replace("_copy", "") for copy in copies)} <= {*found}
