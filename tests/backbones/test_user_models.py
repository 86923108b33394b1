"""Networks of the user's own: from a file, which may be hostile, and from a function."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import nbfeat
from nbfeat.backbones.catalog import CATALOG, find, register_backbone
from nbfeat.errors import NbfeatError, RequestError, WeightsError
from nbfeat.extraction.options import FeatureBlock
from nbfeat.extraction.request import network_spec
from nbfeat.jupyter.grammar import candidates
from tests.backbones import user_networks
from tests.backbones.user_networks import SIZE, frame_of

pytestmark = pytest.mark.slow
WEIGHTS = "model.weights.h5"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    user_networks.run("save", str(folder))
    return folder


@pytest.fixture(autouse=True)
def only_published() -> Iterator[None]:
    published = dict(CATALOG)
    yield
    CATALOG.clear()
    CATALOG.update(published)


def features(path: Path, options: str, size: int = SIZE) -> np.ndarray:
    block = FeatureBlock.parse(options, {"backbone": str(path)})
    return nbfeat.extract(frame_of(size), *block, images="image").features.to_numpy()


def refusal(path: Path, options: str = "--scaling none") -> str:
    with pytest.raises(NbfeatError) as told:
        features(path, options)
    return str(told.value)


@pytest.mark.parametrize(
    ("name", "options", "given", "size"),
    [
        ("plain", "--scaling tf", "tf", SIZE),
        ("plain", "--scaling none", "none", SIZE),
        ("plain", "--scaling tf --layer pool", "pool", SIZE),
        ("not_to_be_turned", "--scaling tf", "tf", 5),
        ("sequential", "--scaling none --size 24", "none", 24),
        ("nested", "--scaling none", "none", SIZE),
        ("nested_last", "--scaling none", "none", SIZE),
        ("nested_last", "--scaling none --layer inner", "none", SIZE),
        ("whole_pixels", "--scaling none", "none", SIZE),
        ("one_at_a_time", "--scaling tf", "tf", SIZE),
        ("half", "--scaling none", "none", SIZE),  # mixed precision, pooled in float32
    ],
)
def test_features_are_what_the_model_gives_in_keras(
    models: Path, name: str, options: str, given: str, size: int
) -> None:
    with np.load(models / f"{name}.npz") as saved:
        wanted = saved[given]
    wanted = wanted.mean(axis=(1, 2)) if wanted.ndim == 4 else wanted
    found, digits = features(models / f"{name}.keras", options, size), 1e-2 if name == "half" else 1e-4
    np.testing.assert_allclose(found, wanted, rtol=digits, atol=1e-4)
    assert wanted.std() > 0


def test_the_keras_engine_gives_the_same_and_only_what_does_is_turned_channels_first(models: Path) -> None:
    found = user_networks.run("in_keras", str(models))
    np.testing.assert_allclose(features(models / "plain.keras", "--scaling tf")[0], found["features"], atol=1e-5)
    assert "so Keras runs the network" in found["report"]
    found = user_networks.run("layouts", str(models), "plain:pool", "nested", "sequential", backend="openvino")
    assert found == {"plain:pool": True, "nested": False, "sequential": False}


def test_the_report_names_the_file_and_the_cache_its_content(models: Path, tmp_path: Path) -> None:
    other = tmp_path / "Été 2 (Kopie).keras"
    shutil.copyfile(models / "plain.keras", other)
    first = nbfeat.extract(frame_of(SIZE), f"{models / 'plain.keras'} --scaling tf", images="image")
    again = nbfeat.extract(frame_of(SIZE), f"'{other}' --scaling tf", images="image")
    assert (first.cached, again.cached) == (0, 1)
    assert again.columns == [f"été_2_kopie_000{number}" for number in range(4)]
    assert f"{SIZE} px squash → {other.name} → end 4" in repr(again)
    assert str(tmp_path) not in repr(again)
    assert "Keras model (plain.keras weights)" in repr(nbfeat.storage)
    other.unlink()
    assert other.name in again._repr_html_()  # the report does not look for it again


def test_a_file_is_known_by_its_content_and_any_name_makes_a_plain_prefix(models: Path, tmp_path: Path) -> None:
    path, keys = tmp_path / "model.keras", set()
    for name in ("plain", "nested"):
        shutil.copyfile(models / f"{name}.keras", path)
        keys.add(network_spec(FeatureBlock.parse(f"{path} --scaling none")[0], cuts=()).key())
    assert len(keys) == 2
    names = {"my_model": "my_model", "My Model-v2.1": "my_model_v2_1", "2024": "model_2024", "…": "model"}
    for stem, prefix in names.items():
        path = path.rename(tmp_path / f"{stem}.keras")
        assert find(str(path)).column == prefix


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("plain", "", "plain.keras doesn't say how to scale pixels: set `scaling` to tf"),
        ("plain", "--scaling tf --alpha 0.5", "plain.keras has no width multiplier: drop `alpha`."),
        ("plain", "--scaling tf -w random", "plain.keras has its own weights: drop `weights='random'`."),
        ("plain", "--scaling tf --size 64", "plain.keras takes images of 32 pixels: drop `size=64`."),
        ("plain", "--scaling tf -l poool", "has no layer 'poool'. Did you mean pool"),
        ("plain", "--scaling tf -p max", "already gives a vector of 4 features: drop `pooling`."),
        ("sequential", "--scaling none", "takes images of any size: set one, such as `size=224`."),
        ("oblong", "--scaling tf", "oblong.keras takes 32 × 64 × 3 inputs, not square RGB images"),
        ("gray", "--scaling tf", "gray.keras takes 32 × 32 × 1 inputs, not square RGB images"),
        ("two_inputs", "--scaling tf", "has 2 inputs. Save a model with one image input."),
        ("two_outputs", "--scaling tf", "has 2 outputs: set `layer` to choose where to cut it."),
        ("two_outputs", "--scaling tf -l shared", "has several outputs. Cut at a layer before or after it."),
        ("whole_pixels", "--scaling tf", "takes integer pixels 0 … 255 (uint8): use `scaling='none'`."),
        (
            "with_lambda",
            "--scaling tf",
            "has a Lambda layer 'twice', which would run code: replace it with a stock Keras layer.",
        ),
        ("with_code", "--scaling tf", "'Times', whose code is not in the file. Register the function"),
        ("with_own_activation", "--scaling tf", "a custom activation', whose code is not in the file."),
        ("pain", "--scaling tf", "Did you mean plain.keras"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(models: Path, name: str, options: str, sentence: str) -> None:
    assert sentence in refusal(models / f"{name}.keras", options)


def test_older_formats_are_refused_with_the_way(models: Path) -> None:
    for name, holds in (("plain.h5", "a model in the older format"), ("plain.weights.h5", "only weights")):
        told = refusal(models / name)
        assert f"{name} holds {holds}" in told
        assert told.endswith("Save it as .keras with model.save('model.keras').")


# What an attacker would send


def rewritten(path: Path, out: Path, **parts: bytes | Callable[[bytes], bytes]) -> Path:
    """Copy a ``.keras`` file with other parts; their names have __ for dots."""
    changes = {name.replace("__", "."): part for name, part in parts.items()}
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            change = changes.pop(name, None)
            data: bytes = source.read(name)
            target.writestr(name, data if change is None else change(data) if callable(change) else change)
        for name, added in changes.items():
            assert isinstance(added, bytes)
            target.writestr(name, added)
    return out


def linked_elsewhere(data: bytes) -> bytes:
    file = io.BytesIO(data)
    with h5py.File(file, "a") as weights:
        weights["layers/conv/vars/9"] = h5py.ExternalLink("/etc/passwd", "x")
    return file.getvalue()


def changed(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def work(data: bytes) -> bytes:
        told = json.loads(data)
        change(told)
        return json.dumps(told).encode()

    return work


def test_archives_that_are_more_than_a_model_are_refused(models: Path, tmp_path: Path) -> None:
    good, bad = models / "plain.keras", tmp_path / "bad.keras"
    told = refusal(rewritten(good, bad, **{"../../evil": b"x"}))
    assert "its part '../../evil' doesn't belong in a model of stock layers" in told
    told = refusal(rewritten(good, bad, config__json=lambda data: data + b" " * 50_000_000))
    assert "would expand more than 16 times" in told
    told = refusal(rewritten(good, bad, **{WEIGHTS.replace(".", "__"): linked_elsewhere}))
    assert "its link '9' points to another file" in told
    bad.write_bytes(good.read_bytes()[:-400])
    assert "bad.keras cannot be read as a Keras model" in refusal(bad)
    rewritten(good, bad, config__json=b"[" * 100_000)
    assert "corrupt" in refusal(bad)
    rewritten(good, bad, config__json=b'{"class_name": "Functional", "config": 3}')
    with pytest.raises((RequestError, WeightsError), match=r"bad\.keras"):
        find(str(bad))
    bad.unlink()
    os.mkfifo(bad)
    assert "isn't a regular file" in refusal(bad)
    bad.unlink()
    bad.symlink_to("/dev/zero")
    assert "isn't a regular file" in refusal(bad)
    bad.unlink()
    bad.symlink_to(good)
    assert find(str(bad)).size == find(str(good)).size


@pytest.mark.parametrize(
    "thing",
    [
        {"class_name": "Lambda", "module": "keras.layers", "config": {"name": "l"}},
        {"class_name": "__lambda__", "config": {"value": ["aGk=", None, None]}},
        {"class_name": "TFSMLayer", "module": "keras.layers", "config": {"filepath": "elsewhere"}},
        {"class_name": "StringLookup", "module": "keras.layers", "config": {"vocabulary": "/etc/passwd"}},
        {"class_name": "function", "module": "os", "config": "system", "registered_name": "function"},
        {"class_name": "function", "module": "keras.utils", "config": "get_file"},
        {"class_name": "function", "module": "keras.config", "config": "enable_unsafe_deserialization"},
        {"class_name": "Dense", "module": "keras.layers", "config": {}, "registered_name": "Custom>Dense"},
        {"class_name": "Popen", "module": "subprocess", "config": {}},
        {"class_name": "Mine", "module": None, "config": {}},
        {"class_name": "keras.layers", "module": "kerasevil.layers", "config": {}},
    ],
    ids=lambda thing: f"{thing['module']}.{thing['class_name']}" if "module" in thing else thing["class_name"],
)
def test_what_would_run_or_read_other_code_is_refused_wherever_it_is(
    models: Path, tmp_path: Path, thing: dict[str, Any]
) -> None:
    def hide(told: Any) -> None:
        told["config"]["layers"][1]["config"]["kernel_regularizer"] = {
            "class_name": "L2", "module": "keras.regularizers", "config": {"l2": [{"deep": thing}]},
        }  # fmt: skip

    path = rewritten(models / "plain.keras", tmp_path / "bad.keras", config__json=changed(hide))
    with pytest.raises(RequestError, match=r"bad\.keras (has|uses)"):
        find(str(path))


# In the notebook


def test_a_file_in_the_working_folder_in_the_magics(
    models: Path, shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(models / "plain.keras", tmp_path / "net: v1.keras")
    shell.reset(new_session=False)
    shell.user_ns["photos"] = frame_of(SIZE, 2)
    shell.run_cell_magic("extract", "photos --images image --quiet --scaling tf", "'net: v1.keras' --layer pool,conv\n")
    columns = list(shell.user_ns["photos"].columns)
    assert columns[1] == "net_v1_pool_0000"
    assert columns[-1] == "net_v1_conv_0005"
    shell.run_line_magic("extract", "photos 'net: v1.keras' --scaling tf --layer pool -i image -q")
    assert list(shell.user_ns["photos"].columns) == columns
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/net: v1.keras").name == str(tmp_path / "net: v1.keras")
    with pytest.raises(UsageError, match="scaling"):
        shell.run_line_magic("extract", "photos 'net: v1.keras' -i image -q")
    cell = "%extract photos net.keras --layer "
    shutil.copyfile(models / "plain.keras", tmp_path / "net.keras")
    assert candidates(cell, 0, cell, shell.user_ns) == ["conv", "norm", "side", "both", "pool", "flat", "classes"]


def test_an_empty_frame_gets_its_columns_a_clash_is_told_and_layers_are_shown(models: Path) -> None:
    found = nbfeat.layers(str(models / "plain.keras"))
    assert list(found.index) == ["conv", "norm", "side", "both", "pool", "flat", "classes"]
    assert found.loc["pool", "shape"] == "7 × 7 × 12"
    block = f"{models / 'plain.keras'} --scaling tf"
    empty = nbfeat.extract(frame_of(SIZE).iloc[:0], block, images="image")
    assert empty.frame.shape == (0, 5)
    taken = frame_of(SIZE).assign(plain_0001=1)
    with pytest.raises(RequestError, match="already has columns plain_0001"):
        nbfeat.extract(taken, block, images="image")


# Registered


def test_registered_networks_run_and_are_told_by_their_weights() -> None:
    found = user_networks.run("registered")
    assert max(found["differs"]) < 1e-4
    assert found["cached"] == [0, 3, 0]
    assert found["engines"][0].startswith("OpenVINO")
    assert "px squash → MyNet → end 30×30×4" in found["report"]
    # A layer whose code multiplies by two, and then by three.
    assert found["own"] == pytest.approx([2, 2, 3])
    assert found["own cached"] == [0, 3, 0]
    assert found["own engines"][0].startswith("Keras")
    assert (
        "The layer 'times' of Own uses 'Times', whose code is not in the file, so Keras runs it" in found["own report"]
    )
    assert found["policy"] == "mixed_bfloat16"
    assert found["state kept"]
    assert found["next"] == "activation_1"
    assert found["layers"] == ["conv", "relu"]
    assert found["listed"][0]["layers"] == "conv"
    assert found["Fails"].startswith("NetworkError: The function that builds Fails failed: ZeroDivisionError")
    assert found["None"].endswith("must return a Keras model, not NoneType.")
    assert "takes inputs of shape (8, 8, 3), not (32, 32, 3)" in found["Wrong"]


def test_what_openvino_cannot_run_keras_does_in_the_kernel() -> None:
    found = user_networks.run("without_openvino")
    assert "OpenVINO cannot run MyNet: no such operation, so Keras runs it in this process" in found["report"]
    assert found["cached"] == [0, 3]
    assert found["alone"] == ["conv:default"]
    assert found["differs"] < 1e-5


def never(size: int) -> Any:
    raise AssertionError(size)


def test_registering_shows_everywhere_and_builds_nothing(shell: InteractiveShell) -> None:
    register_backbone("MyNet", never, input_size=96, scaling="tf", layers=["a", "b"])
    listed: pd.DataFrame = shell.run_line_magic("backbones", "mynet")
    assert listed.loc["MyNet", "input size"] == 96
    assert listed["width"].isna().all()
    assert "MyNet" in (candidates("%extract photos My", 0, "%extract photos ", {}) or [])
    cell = "%extract photos MyNet --layer "
    assert candidates(cell, 0, cell, {}) == ["a", "b"]
    register_backbone("mynet", never, input_size=64, scaling="none")
    assert find("MYNET").size == 64
    assert "MyNet" not in CATALOG
    with pytest.raises(RequestError, match="has its own weights: drop `weights='random'`"):
        network_spec(FeatureBlock.parse("mynet --weights random")[0], cuts=())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"name": "resnet50"}, "ResNet50 is a published backbone. Choose another name"),
        ({"name": "my net"}, "must be a Python identifier"),
        ({"build": "ResNet50"}, "must be a function that takes the size"),
        ({"scaling": "0..1"}, "not '0..1'"),
        ({"input_size": 0}, "`input_size` must be an integer"),
        ({"layers": "conv"}, "`layers` must be a list of layer names"),
    ],
)
def test_what_cannot_be_registered_is_told(words: dict[str, Any], sentence: str) -> None:
    given = {"name": "MyNet", "build": never, "input_size": 96, "scaling": "tf", **words}
    with pytest.raises(RequestError, match=re.escape(sentence)):
        register_backbone(given.pop("name"), given.pop("build"), **given)
