"""Repeating an earlier result on other images: bit-identical numbers, or a message that says what differs."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from threadpoolctl import threadpool_info, threadpool_limits

from nbfeat import Extraction, ExtractionError, RequestError, extract
from nbfeat.backbones.weights import Loaded
from nbfeat.extraction.normalize import Normalizer
from nbfeat.extraction.options import RUN_OPTIONS, spelled
from nbfeat.inference import prepared
from nbfeat.inference.spec import NUMERICS, Output
from nbfeat.jupyter import grammar
from tests import fake
from tests.faces import LineMagic, same

pytestmark = pytest.mark.usefixtures("fake_network")
BLOCK = "MobileNet --size 32"
NORMALIZATIONS = (
    "", "--normalize l2", "--normalize standard", "--normalize minmax", "--components 5",
    "--normalize l2 --components 1", "--normalize standard --components 13", "--normalize whiten --components 6",
)  # fmt: skip
Repeat = Callable[..., Extraction]


@pytest.fixture
def train(photos: pd.DataFrame) -> pd.DataFrame:
    return photos[photos["split"] == "train"]


@pytest.fixture
def test(photos: pd.DataFrame) -> pd.DataFrame:
    return photos[photos["split"] == "test"]


def by_method(frame: Any, like: Any, **options: Any) -> Extraction:
    result: Extraction = like.like(frame, **options)
    return result


def by_function(frame: Any, *blocks: str, like: Any, **options: Any) -> Extraction:
    return extract(frame, *blocks, like=like, **options)


def by_file(frame: Any, *blocks: str, like: Any, **options: Any) -> Extraction:
    like.to_parquet("earlier.parquet")
    return extract(frame, *blocks, like="earlier.parquet", **options)


class ByName(LineMagic):
    """``%extract test --like train_result``."""

    def __call__(self, frame: Any, *blocks: str, **options: Any) -> Extraction:
        self.shell.user_ns["train_result"] = options["like"]
        return super().__call__(frame, *blocks, **{**options, "like": "train_result"})


class ByPath(LineMagic):
    """``%extract test --like 'train result.parquet'``."""

    def __call__(self, frame: Any, *blocks: str, **options: Any) -> Extraction:
        options["like"].to_parquet("train result.parquet")
        return super().__call__(frame, *blocks, **{**options, "like": "train result.parquet"})


@pytest.fixture(params=[by_function, by_file, ByName, ByPath])
def repeat(
    request: pytest.FixtureRequest, shell: InteractiveShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Repeat:
    """Return each way of repeating a result in turn."""
    monkeypatch.chdir(tmp_path)
    shell.reset(new_session=False)
    way: Repeat = request.param(shell) if isinstance(request.param, type) else request.param
    return way


@pytest.fixture
def shell_here(shell: InteractiveShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InteractiveShell:
    monkeypatch.chdir(tmp_path)
    shell.reset(new_session=False)
    return shell


@pytest.mark.parametrize("repeat", [by_function, by_file], indirect=True)
@pytest.mark.parametrize("words", NORMALIZATIONS)
def test_features_are_those_of_one_run_over_both_frames(
    repeat: Repeat, photos: pd.DataFrame, train: pd.DataFrame, test: pd.DataFrame, words: str
) -> None:
    both = extract(photos, f"{BLOCK} {words}", images="path", fit_on="split == 'train'")
    result = extract(train, f"{BLOCK} {words}", images="path")
    same(result.features, both.features.loc[train.index])
    repeated = repeat(test, like=result)
    same(repeated.features, both.features.loc[test.index])
    same(repeated.frame[list(test.columns)], test)
    same(repeat(test.iloc[:1], like=result).features, repeated.features.iloc[:1])
    same(by_method(test, repeated).features, repeated.features)


@pytest.mark.parametrize("width", [3, 257, 8193, 60_001])
def test_a_row_is_projected_as_it_would_be_alone(width: int) -> None:
    generator = np.random.default_rng(width)
    rows = generator.normal(size=(37, width)).astype(np.float32)
    axes, center = generator.normal(size=(3, width)).astype(np.float32), rows[0] / 3
    normalizer = Normalizer(center=center, axes=axes)
    whole = normalizer.apply(rows)
    for start, end in ((0, 1), (5, 6), (3, 36), (36, 37)):
        np.testing.assert_array_equal(normalizer.apply(rows[start:end].copy()), whole[start:end])
    exact = (rows.astype(float) - center) @ axes.T.astype(float)
    np.testing.assert_allclose(whole, exact, atol=1e-5 * width**0.5)


def test_a_projection_is_the_same_in_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of joblib have one thread each, a notebook has several; some BLAS then add in a different order."""
    used, dot = set[int](), np.dot

    def watched(*arrays: Any, **options: Any) -> Any:
        used.update(one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas")
        return dot(*arrays, **options)

    monkeypatch.setattr(np, "dot", watched)
    generator = np.random.default_rng(0)
    rows, axes = (generator.normal(size=(count, 100_001)).astype(np.float32) for count in (5, 64))
    normalizer, found = Normalizer(center=rows[0] / 3, axes=axes), list[Any]()
    for threads in (1, 2, 4):
        with threadpool_limits(threads, "blas"):
            found.append(normalizer.apply(rows))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])
    assert used == {1}


def test_nothing_is_learned_from_the_other_frame(train: pd.DataFrame, test: pd.DataFrame, tmp_path: Path) -> None:
    result = extract(train, f"{BLOCK} --normalize standard --components 4", images="path")
    learned, features = pickle.dumps(result.fitted.parts[0].normalizer), result.features.copy()
    first = result.like(test)
    Image.new("RGB", (40, 40), "white").save(tmp_path / "white.png")
    changed = test.assign(path=test["path"].mask(test.index == "row 15", str(tmp_path / "white.png")))
    second = result.like(changed)
    rows = test.index != "row 15"
    same(second.features[rows], first.features[rows])
    assert (second.features.loc["row 15"] != first.features.loc["row 15"]).any()
    assert pickle.dumps(second.fitted.parts[0].normalizer) == learned
    same(result.features, features)


def test_changing_rows_to_test_on_changes_nothing_of_the_others(photos: pd.DataFrame) -> None:
    def fitted(frame: pd.DataFrame) -> tuple[bytes, pd.DataFrame]:
        block = f"{BLOCK} --normalize whiten --components 4"
        result = extract(frame, block, images="path", fit_on="split == 'train'")
        return pickle.dumps(result.fitted.parts[0].normalizer), result.features[(frame["split"] == "train").to_numpy()]

    before = fitted(photos)
    others = photos["path"].mask(photos["split"] == "test", photos["path"].iloc[0])
    after = fitted(photos.assign(path=others))
    assert after[0] == before[0]
    same(after[1], before[1])


def test_the_report_says_what_was_repeated_and_that_nothing_was_learned(
    repeat: Repeat, train: pd.DataFrame, test: pd.DataFrame
) -> None:
    result = extract(train, BLOCK, f"{BLOCK} --layer conv1 --normalize minmax", images="path")
    told = repeat(test, like=result)
    name = {"ByName": "train_result", "ByPath": "train result.parquet", "by_file": "earlier.parquet"}.get(
        getattr(repeat, "__name__", type(repeat).__name__), "the earlier result"
    )
    fitted = "Normalization of mobilenet_conv1 was fitted there."
    sentence = f"Repeats {name}; nothing was fitted on these rows. {fitted}"
    assert sentence in repr(told)
    assert sentence in told._repr_html_()
    assert "fit_on" not in repr(told)
    assert json.dumps(dict(told.recipe)) == json.dumps(dict(result.recipe))


def test_failures_of_the_other_frame_are_its_own(repeat: Repeat, train: pd.DataFrame, test: pd.DataFrame) -> None:
    result = extract(train, f"{BLOCK} --normalize standard", images="path")
    broken = test.assign(path=test["path"].mask(test.index == "row 16"), extra=1)
    repeated = repeat(broken, like=result)
    same(repeat(test.iloc[::-1], like=result).features.loc[["row 15"]], repeated.features.loc[["row 15"]])
    assert list(repeated.failures.index) == ["row 16"]
    assert repeated.features.loc["row 16"].isna().all()
    same(repeated.features.drop("row 16"), repeat(test, like=result).features.drop("row 16"))
    again = repeat(repeated.frame, like=result)
    same(again.frame, repeated.frame)
    assert "(replaced)" in repr(again)
    with pytest.raises(RequestError, match=r"mobilenet_0000.*replace"):
        repeat(test.assign(mobilenet_0000="mine"), like=result)


def test_other_image_columns_are_taken_in_order(repeat: Repeat, train: pd.DataFrame, test: pd.DataFrame) -> None:
    result = extract(train, f"{BLOCK} --normalize standard", images="path")
    renamed = test.rename(columns={"path": "file"})
    repeated = repeat(renamed, like=result, images="file")
    same(repeated.features, repeat(test, like=result).features)
    assert repeated.fitted.columns == ["file"]
    with pytest.raises(RequestError, match=r"no column path"):
        repeat(renamed.drop(columns="file"), like=result)
    two = extract(train.assign(back=list(train["path"])[::-1]), BLOCK, images=["path", "back"])
    turned = test.assign(left=list(test["path"])[::-1])
    straight, crossed = (repeat(turned, like=two, images=names) for names in (["path", "left"], ["left", "path"]))
    np.testing.assert_array_equal(straight["back_mobilenet"], crossed["path_mobilenet"])
    np.testing.assert_array_equal(straight["path_mobilenet"], crossed["back_mobilenet"])
    with pytest.raises(RequestError, match=r"path and back, but .*images.* names 1\. Name 2 columns"):
        repeat(test, like=two, images="path")


def test_an_empty_frame_gets_its_columns(repeat: Repeat, train: pd.DataFrame, test: pd.DataFrame) -> None:
    result = extract(train, f"{BLOCK} --layer conv1 --normalize standard", images="path")
    empty = repeat(test.iloc[:0], like=result)
    assert empty.columns == result.columns
    assert (empty.features.dtypes == np.float32).all()
    same(repeat(test, like=empty).features, repeat(test, like=result).features)


# What cannot be repeated


@pytest.mark.parametrize(
    ("blocks", "options", "words"),
    [
        (["ResNet50"], {}, r"like.* repeats the blocks of .*: drop `?ResNet50"),
        ([], {"pooling": "max"}, r"repeats the blocks of .*: drop .*pooling"),
        ([], {"fit_on": "split == 'test'"}, r"uses the fitted normalization of .*: drop .*fit.on"),
        ([], {"precision": "bfloat16"}, r"computed in float32.*in bfloat16: drop .*precision"),
    ],
)
def test_what_the_earlier_result_decides_is_not_asked_for_again(
    repeat: Repeat, train: pd.DataFrame, test: pd.DataFrame, blocks: list[str], options: dict[str, Any], words: str
) -> None:
    result = extract(train, BLOCK, images="path")
    with pytest.raises(RequestError, match=words):
        repeat(test, *blocks, like=result, **options)
    assert fake.FakeEngine.opened == 1


def test_a_result_that_is_not_done_is_refused(repeat: Repeat, train: pd.DataFrame, test: pd.DataFrame) -> None:
    unfinished = Extraction(train, BLOCK, images="path", batch_size=3)
    not_done = RequestError if repeat is by_function or isinstance(repeat, ByName) else ExtractionError
    with pytest.raises(not_done, match=r"'new', 0 of 14 images.*`run\(\)`|isn't finished: 0 of 14"):
        repeat(test, like=unfinished)
    steps = unfinished.steps()
    list(islice(steps, 4))
    steps.close()
    with pytest.raises(not_done, match=r"'stopped', \d+ of 14 images|isn't finished"):
        repeat(test, like=unfinished)
    failed = Extraction(train.assign(path="gone.png"), BLOCK, images="path")
    with pytest.raises(ExtractionError, match="None of the 14"):
        failed.run()
    with pytest.raises(not_done, match=r"'failed', 14 of 14 images|isn't finished"):
        repeat(test, like=failed)
    nothing = extract(train.iloc[:0], f"{BLOCK} --normalize standard", images="path")
    with pytest.raises(RequestError, match=r"no rows to fit on"):
        repeat(test, like=nothing)


class OtherWeights(fake.FakeNetwork):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weights = Loaded("imagenet", "12" * 32)


class OtherWidth(fake.FakeNetwork):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.outputs = {key: Output(6, "avg", (2, 2, 6), negative=False) for key in self.outputs}


class OtherMachine(fake.FakeNetwork):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.numbers = {"engine": "fake 2", "cpu": "another", "beside": ["end"]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            OtherWeights,
            r"mobilenet was made with weights random \(SHA-256 0{12}…\), but now has imagenet \(SHA-256 1212",
        ),
        (OtherWidth, r"mobilenet was made with width 48, but now has 6\."),
    ],
)
def test_another_network_is_refused_before_any_image_is_read(
    repeat: Repeat, train: pd.DataFrame, test: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, changed: Any, words: str
) -> None:
    result = extract(train, BLOCK, images="path")
    computed = fake.FakeEngine.computed
    monkeypatch.setattr(prepared, "PreparedNetwork", changed)
    with pytest.raises(RequestError, match=words):
        repeat(test, like=result)
    again = Extraction(test, like=result)
    for _ in range(2):  # a second attempt is refused too
        with pytest.raises(RequestError, match=words):
            again.run()
    assert fake.FakeEngine.computed == computed


@pytest.mark.parametrize("name", ["nbfeat.extraction.network_state.NUMERICS", "nbfeat.images.resize.LEAST_REDUCED"])
def test_other_computation_is_refused(
    repeat: Repeat, train: pd.DataFrame, test: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    result = extract(train, BLOCK, images="path")
    monkeypatch.setattr(name, NUMERICS + 9)
    made, here = NUMERICS, NUMERICS + 9
    with pytest.raises(RequestError, match=rf"was made with (numerics {made}|least reduced 4), but now has {here}"):
        repeat(test, like=result)


def test_another_engine_is_told_in_one_sentence(
    repeat: Repeat, train: pd.DataFrame, test: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = extract(train, BLOCK, f"{BLOCK} --layer conv1", images="path")
    monkeypatch.setattr(prepared, "PreparedNetwork", OtherMachine)
    monkeypatch.setattr("nbfeat.extraction.network_state.decoders", lambda: "pillow 0")
    told = repeat(test, like=result)
    sentences = [note for note in told.notes if "slightly different numbers" in note]
    assert len(sentences) == 1
    assert "was made with fake (here fake 2), pillow " in sentences[0]
    assert "(here pillow 0) and a different CPU: the same image" in sentences[0]
    assert not [note for note in result.like(train).notes if "Keras" in note]


# In the notebook


def test_names_that_are_no_results_come_with_near_ones(shell_here: InteractiveShell, train: pd.DataFrame) -> None:
    names = shell_here.user_ns
    names["photos"], names["train_result"] = train, extract(train, BLOCK, images="path")
    names["number"] = 3
    for line, words in {
        "photos --like train_reslt": r"'train_reslt' is not defined in this notebook\. Did you mean train_result\?",
        "photos --like xyz": r"'xyz' is not defined in this notebook\. Results here: train_result\.",
        "photos --like number": r"number must be a result, not int\..*result = %extract",
        "photos --like gone.parquet": r"File not found: 'gone\.parquet'\. Check the path; relative paths start at",
    }.items():
        with pytest.raises(UsageError, match=words):
            shell_here.run_line_magic("extract", line)
    os.mkfifo("pipe.parquet")
    with pytest.raises(UsageError, match=r"'pipe\.parquet' isn't a regular file\. Check the path"):
        shell_here.run_line_magic("extract", "photos --like pipe.parquet")
    with pytest.raises(UsageError, match="drop the lines of the body"):
        shell_here.run_cell_magic("extract", "photos --like train_result", "ResNet50")
    with pytest.raises(UsageError, match="--like applies to the whole run"):
        shell_here.run_cell_magic("extract", "photos", f"{BLOCK} --like train_result")
    assert names["photos"] is train


def test_settings_of_the_notebook_do_not_change_what_is_repeated(
    shell_here: InteractiveShell, train: pd.DataFrame, test: pd.DataFrame
) -> None:
    names = shell_here.user_ns
    names["test"], names["first"] = test, extract(train, BLOCK, images="path")
    magics = shell_here.magics_manager.registry["ExtractMagics"]
    settings = {"backbone": "ResNet50", "pooling": "max", "precision": "bfloat16", "images": "label"}
    try:
        for name, value in settings.items():
            magics.set_trait(name, value)
        result = shell_here.run_line_magic("extract", "test --like first --into repeated")
    finally:
        for name in settings:
            magics.set_trait(name, "")
    same(result.features, names["first"].like(test).features)
    assert not magics.has_trait("like")
    assert names["test"] is test
    assert names["repeated"] is result.frame


def test_the_cell_that_repeats_reads_back_from_its_text() -> None:
    request = grammar.read("photos --like 'last week.parquet' --into more --root '~/my photos'", None, {})
    assert request is not None
    line = " ".join([request.frame, *spelled(RUN_OPTIONS, request.run)])
    assert line == "photos --root '~/my photos' --like 'last week.parquet' --into more"
    assert grammar.read(line, "", {}) == request


def test_tab_offers_results_and_their_files(shell_here: InteractiveShell, train: pd.DataFrame) -> None:
    names = shell_here.user_ns
    names["photos"], names["mine"], names["_hidden"] = train, extract(train, BLOCK, images="path"), 1
    names["mine"].to_parquet("last week.parquet")
    names["mine"].to_parquet("march.parquet")
    cell = "%extract photos --like "
    with provisionalcompleter():
        found = {one.text for one in shell_here.Completer.completions(cell, len(cell)) if one.type == "nbfeat"}
    assert found == {"mine", "march.parquet", "'last week.parquet'"}


def test_another_thing_than_a_result_is_refused(train: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match=r"must be a result of nbfeat or the path of a Parquet file.*not DataFrame"):
        extract(train, like=train)
