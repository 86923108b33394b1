"""Promises of the whole package, tested with a real network (random weights unless a test says otherwise)."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import PIL.ImageFile
import pytest

import nbfeat
from nbfeat import RequestError, WeightsError
from tests.faces import Face, every_face, same

SMALL = "MobileNet --alpha 0.25 --size 64 --weights random"


def child(code: str, **environment: str) -> dict[str, Any]:
    """Run a program in a fresh process and return the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert not done.returncode, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@every_face
def test_a_real_network_gives_the_same_through_every_face(extract: Face, photos: pd.DataFrame) -> None:
    result = extract(photos, SMALL, images="path")
    assert result.features.shape == (20, 256)
    assert "OpenVINO" in repr(result)
    same(result.features, nbfeat.extract(photos, SMALL, images="path", cache=False).features)
    shuffled = photos.sample(frac=1, random_state=1)
    again = extract(shuffled, SMALL, images="path", batch_size=3, cache=False).features
    same(again.loc[photos.index], result.features)


def test_an_unknown_layer_comes_with_near_names(extract: Face, photos: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match=r"no layer 'conv_pw5_relu'. Did you mean conv_pw_5_relu"):
        extract(photos, f"{SMALL} --layer conv_pw5_relu", images="path")


def test_layers_show_where_to_cut() -> None:
    table = nbfeat.layers("VGG16")
    assert table.loc["block4_pool", "shape"] == "14 × 14 × 512"
    assert table.loc["block4_pool", "flatten"] == 14 * 14 * 512
    assert table.loc["block4_pool", "bytes"] == 4 * 512
    assert not table["negative"].any()
    assert table["customary"].sum() == 5
    same(table, nbfeat.layers("vgg16"))


def test_weights_that_cannot_be_had_are_one_sentence_with_file_address_and_place(
    photos: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(WeightsError) as caught:
        nbfeat.extract(photos, "DenseNet121 --size 64", images="path")
    text = str(caught.value)
    assert "densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5" in text
    assert "https://storage.googleapis.com/" in text
    assert str(tmp_path / "models") in text
    assert "weights='random'" in text
    assert not list((tmp_path / "models").glob("*.h5"))


def test_a_file_that_holds_no_weights_is_refused(photos: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="or an existing file"):
        nbfeat.extract(photos, "MobileNet --weights nosuch.h5", images="path")
    for name in ("pipe.h5", "pipe.keras", "pipe.pth"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(RequestError, match="isn't a regular file"):
            nbfeat.extract(photos, f"AlexNet --weights {tmp_path / name}", images="path")
    (tmp_path / "x.weights.h5").write_bytes(b"not hdf5")
    with pytest.raises(WeightsError, match=r"x\.weights\.h5 cannot be read as weights in HDF5"):
        nbfeat.extract(photos, f"MobileNet --size 64 --weights {tmp_path / 'x.weights.h5'}", images="path")


@pytest.mark.slow
def test_a_file_of_weights_is_taken(photos: pd.DataFrame, keras_home: Path) -> None:
    file = keras_home / "models" / "mobilenet_2_5_224_tf_no_top.h5"
    if not file.exists():
        pytest.skip("no real weights on this machine")
    named = nbfeat.extract(photos, f"MobileNet --alpha 0.25 --weights {file}", images="path").features
    same(named, nbfeat.extract(photos, "MobileNet --alpha 0.25", images="path", cache=False).features)


@pytest.mark.parametrize("kind", ["a file", pytest.param("open to others", marks=pytest.mark.slow)])
def test_a_home_folder_that_cannot_be_used_is_told_and_the_run_goes_on(
    photos: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    home = tmp_path / "home"
    if kind == "a file":
        home.write_text("in the way")
    else:
        home.mkdir()
        home.chmod(0o777)
    before = nbfeat.extract(photos, SMALL, images="path")
    monkeypatch.setenv("NBFEAT_HOME", str(home))
    result = nbfeat.extract(photos, SMALL, images="path")
    same(result.features, before.features)
    assert "built only for this run" in repr(result)
    assert home.is_file() or not list(home.iterdir())


@pytest.mark.slow
def test_a_map_that_is_too_large_to_flatten_is_refused_with_the_way_out(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbfeat.extraction.columns.free_bytes", lambda: 1_000_000)
    with pytest.raises(RequestError, match=r"16,384 features per image.*1.3 MB.*pooling='avg'"):
        nbfeat.extract(photos, f"{SMALL} --layer conv_pw_1_relu --pooling flatten", images="path")


def test_nothing_global_decides_a_result_and_nothing_global_stays_changed(
    photos: pd.DataFrame, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = pictures.parent / "cut.png"
    cut.write_bytes((pictures / "00.png").read_bytes()[:-40])
    photos.loc["row 5", "path"] = str(cut)
    normal = nbfeat.extract(photos, SMALL, images="path", cache=False)
    assert len(normal.failures) == 1
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1)
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    random.seed(3)
    np.random.seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filters = list(warnings.filters)
        hostile = nbfeat.extract(photos, SMALL, images="path", cache=False)
        assert warnings.filters == filters
    same(hostile.features, normal.features)
    assert np.nextafter(0, 1) > 0, "this thread takes tiny numbers for zero now"
    assert (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES) == (1, True)
    assert os.environ["ONEDNN_DEFAULT_FPMATH_MODE"] == "BF16"
    drawn = random.random(), np.random.random()
    random.seed(3)
    np.random.seed(3)
    assert drawn == (random.random(), np.random.random())


def test_no_thread_is_left_behind(photos: pd.DataFrame) -> None:
    before = {thread.name for thread in threading.enumerate()}
    extraction = nbfeat.Extraction(photos, SMALL, images="path", batch_size=2)
    steps = extraction.steps()
    for _ in range(4):
        next(steps)
    steps.close()
    assert {thread.name for thread in threading.enumerate()} == before
    assert extraction.run().done == 20


@pytest.mark.usefixtures("fake_network")
def test_every_odd_file_is_a_row_or_a_reason(
    shared_data: Path, extract: Face, capfd: pytest.CaptureFixture[str]
) -> None:
    files = sorted(file for file in (shared_data / "odd").rglob("*") if file.suffix not in {".tsv", "", ".md"})
    frame = pd.DataFrame({"path": [str(file) for file in files]})
    result = extract(frame, "MobileNet --size 32", images="path")
    assert len(result.frame) == len(files)
    assert set(result.failures["position"]) == set(np.flatnonzero(~result.ok))
    assert result.failures["reason"].str.len().between(10, 250).all()
    assert result.features[result.ok].notna().all(axis=None)
    assert 100 < result.ok.sum() < len(files)
    capfd.readouterr()  # libtiff writes its warnings to the file descriptor


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_images(many: list[str], tmp_path: Path) -> None:
    nbfeat.extract(pd.DataFrame({"path": many[:2]}), SMALL, images="path", cache=False)
    pd.DataFrame({"path": many}).to_pickle(tmp_path / "many.pickle")
    code = """
import json, re, sys
from pathlib import Path
import pandas as pd, nbfeat
frame = pd.read_pickle({frame!r}).iloc[:{count}]
result = nbfeat.extract(frame, {block!r}, images="path")
assert result.computed == len(frame)
# Not `ru_maxrss`, which begins with what the parent had when it forked.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({{"peak": peak, "matrix": result.features.to_numpy().nbytes / 2**20, "heavy": [
    name for name in ("tensorflow", "keras") if name in sys.modules]}}))
"""
    frame = str(tmp_path / "many.pickle")
    small = child(code.format(frame=frame, count=1000, block=SMALL))
    large = child(code.format(frame=frame, count=len(many), block=SMALL), NBFEAT_HOME=str(tmp_path / "another"))
    assert large["peak"] - large["matrix"] - small["peak"] < 60, "all pixels would be 86 MB"
    assert small["peak"] < 240  # two engines exist briefly while precisions are compared
    assert small["heavy"] == large["heavy"] == []


@pytest.mark.slow
def test_the_main_job_on_photographs(flowers: pd.DataFrame, extract: Face) -> None:
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    result = extract(flowers, "MobileNetV2", images="path")
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), SVC(C=10))
    score = cross_val_score(model, result.features, flowers["label"], cv=folds).mean()
    assert abs(score - 0.82) <= 0.02
    assert Counter(result.ok) == {True: 300}


@pytest.mark.slow
def test_the_demo_runs_without_internet(tmp_path: Path) -> None:
    environment = {
        "NBFEAT_HOME": str(tmp_path / "nbfeat"), "KERAS_HOME": str(tmp_path / "keras"), "HOME": str(tmp_path),
        "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9",
    }  # fmt: skip
    environment |= {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-W", "error", "-m", "nbfeat"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert not done.returncode, done.stderr
    assert "? building EfficientNetLite0 (only once; it is then cached)" in done.stdout
    assert "EfficientNetLite0 (imagenet weights)" in done.stdout
    assert "480 photographs, 12 classes" in done.stdout
    assert re.search(r"07.jpg +damaged: the image file is truncated", done.stdout)
    assert "accuracy of StandardScaler ? SVC(C=10), 5 folds, 479 rows of 12 classes" in done.stdout
    assert "6 groups of nearly identical images: 12 of 479 rows" in done.stdout
    assert done.stderr == ""
