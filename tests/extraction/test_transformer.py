"""ImageFeatures follows the conventions of scikit-learn and of nbfeat."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted

import nbfeat
from nbfeat import Extraction, ExtractionError, FeatureBlock, ImageFeatures, RequestError
from nbfeat.backbones.weights import Loaded
from nbfeat.extraction import network_state
from nbfeat.extraction.sink import MemorySink
from nbfeat.inference import prepared, spec as networks
from nbfeat.inference.engines import cpu_count as engine_cores
from tests.conftest import ROOT
from tests.extraction import in_workers
from tests.extraction.in_workers import Watched
from tests.fake import FakeEngine, FakeNetwork

pytestmark = pytest.mark.usefixtures("fake_network")
BLOCK = "MobileNet --size 32"
REAL_NETWORK = prepared.PreparedNetwork
NORMALIZED: list[dict[str, Any]] = [
    {}, *({"normalize": name} for name in ("l2", "standard", "minmax")),
    {"normalize": "whiten", "components": 4}, {"normalize": "standard", "components": 3},
]  # fmt: skip


@pytest.fixture
def workers() -> Iterator[None]:
    """Start joblib workers in this test, with its home folder, and end them with it."""
    get_reusable_executor().shutdown(wait=True)
    yield
    get_reusable_executor().shutdown(wait=True)


# scikit-learn's own checks


class OnPaths(ImageFeatures):
    """For checks with numeric X: the numbers in the first column name real pictures."""

    pictures: list[str] = []  # noqa: RUF012 - scikit-learn clones by the constructor, and checks that it sets no more

    def fit(self, X: Any, y: object = None) -> OnPaths:
        super().fit(self.named(X), y)
        return self

    def fit_transform(self, X: Any, y: object = None) -> Any:
        return super().fit_transform(self.named(X), y)

    def transform(self, X: Any) -> Any:
        return super().transform(self.named(X))

    def named(self, X: Any) -> Any:
        if isinstance(X, pd.DataFrame):
            return pd.DataFrame(self.named(X.to_numpy()), columns=X.columns, index=X.index)
        table = np.array(X, dtype=object)
        if table.ndim != 2:
            return X
        table[:, 0] = [None if pd.isna(v) else self.pictures[int(abs(v) * 1000) % 20] for v in table[:, 0]]
        return table


# scikit-learn has these for transformers but does not yield them for all.
MORE_CHECKS = (
    "check_dataframe_column_names_consistency", "check_estimator_cloneable", "check_get_feature_names_out_error",
    "check_global_output_transform_pandas", "check_inplace_ensure_writeable", "check_set_output_transform",
    "check_set_output_transform_pandas", "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
)  # fmt: skip
LEFT_OUT = {
    "check_complex_data": "complex numbers are no images, like all numbers: they fail by the row, with that reason",
    "check_estimators_empty_data_messages": "wants check_array's words; that X is empty is told in others (own test)",
    "check_fit1d": "wants X of one dimension refused; a list of paths is one",
    "check_fit2d_predict1d": "as before",
}


def test_the_checks_of_scikit_learn_hold_on_real_paths(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnPaths, "pictures", list(photos["path"]))
    estimator = OnPaths(BLOCK, normalize="standard")
    with warnings.catch_warnings():
        # Some checks fit frames and transform arrays, so scikit-learn warns.
        warnings.filterwarnings("ignore", "X (has|does not have valid) feature names", UserWarning)
        options = {"expected_failed_checks": LEFT_OUT, "on_skip": None, "on_fail": None}
        results = estimator_checks.check_estimator(estimator, **options)
        for name in MORE_CHECKS:
            getattr(estimator_checks, name)("ImageFeatures", estimator)
    named = {status: {r["check_name"] for r in results if r["status"] == status} for status in ("xfail", "skipped")}
    assert not [result["exception"] for result in results if result["status"] == "failed"]
    assert named["xfail"] == set(LEFT_OUT)
    assert named["skipped"] <= {"check_array_api_input"}
    assert sum(result["status"] == "passed" for result in results) + len(MORE_CHECKS) >= 45


# What X can be


def test_images_may_come_as_a_frame_a_series_an_array_or_a_list(photos: pd.DataFrame) -> None:
    paths, model = list(photos["path"]), ImageFeatures(BLOCK, normalize="standard")
    expected = nbfeat.extract(photos, BLOCK, images="path", normalize="standard").features.to_numpy()
    array = np.array(paths, dtype=object)
    pixels = [np.asarray(Image.open(path)) for path in paths]
    kinds: list[Any] = [
        photos[["path"]], photos["path"], array, array[:, None], np.array(paths), paths, tuple(paths), photos,
        [[path] for path in paths], list(map(Path, paths)), pixels, list(map(Image.open, paths)),
    ]  # fmt: skip
    for images in kinds:
        rows = model.fit_transform(images)
        assert rows.dtype == np.float32
        assert rows.flags.writeable
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(model.transform(images[:3]), rows[:3])
    np.testing.assert_array_equal(model.fit(photos["path"]).transform(paths), expected)
    assert model.transform([]).shape == (0, 48)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("cat.jpg", r"X must be a list of images, not str: use \[X\]"),
        (Path("cat.jpg"), r"must be a list of images"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"numpy.ndarray of shape \(2, 8, 8, 3\)\. Pass .*list\(X\)"),
        ([], "X has no rows"),
        (pd.DataFrame({"path": []}), "X has no rows"),
        (pd.DataFrame({"a": [1], "b": [2]}), r"No column looks like images: a \(1\) and b \(2\)"),
        (pd.DataFrame({"a": ["1.jpg"], "b": ["2.jpg"]}), "2 columns look like images"),
        (pd.DataFrame([["1.jpg"]], columns=pd.MultiIndex.from_tuples([("a", "b")])), "MultiIndex"),
    ],
)
def test_what_cannot_be_images_is_one_sentence(images: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ImageFeatures(BLOCK).fit(images)
    assert FakeEngine.opened == 0


def test_columns_are_those_of_fit(photos: pd.DataFrame) -> None:
    photos["back"] = list(photos["path"])[::-1]
    both = ImageFeatures(BLOCK, images=["path", "back"]).fit(photos)
    assert both.n_features_in_ == 4
    assert list(both.feature_names_in_) == ["path", "label", "split", "back"]
    assert both.get_feature_names_out()[[0, -1]].tolist() == ["path_mobilenet_0000", "back_mobilenet_0047"]
    rows = both.transform(photos)
    np.testing.assert_array_equal(rows[:, :48], rows[::-1, 48:])
    with pytest.raises(ValueError, match="same order as they were in fit"):
        both.transform(photos[photos.columns[::-1]])
    with pytest.raises(ValueError, match="unseen at fit time"):
        both.transform(photos.rename(columns={"back": "rear"}))
    with (
        pytest.warns(UserWarning, match="X does not have valid feature names"),
        pytest.raises(ValueError, match="X has 1 features, but ImageFeatures is expecting 4"),
    ):
        both.transform(photos[["path"]].to_numpy())
    with pytest.raises(RequestError, match=r"no column pth.*Did you mean path"):
        ImageFeatures(BLOCK, images="pth").fit(photos)
    with pytest.raises(RequestError, match="no column path"):
        ImageFeatures(BLOCK, images="path").fit(photos[["path"]].set_axis([0], axis=1))
    for images in ("path", ["path"]):  # only a frame has column names
        without_names = ImageFeatures(BLOCK, images=images).fit(photos["path"].rename(("a", "b")))
        np.testing.assert_array_equal(without_names.transform(list(photos["path"])), rows[:, :48])


# Parameters


def test_parameters_are_defaults_of_blocks_that_do_not_say_otherwise(photos: pd.DataFrame) -> None:
    blocks: Any = [BLOCK, f"{BLOCK} --pooling avg --prefix mine", FeatureBlock(backbone="VGG16", size=32)]
    model = ImageFeatures(blocks, pooling="max", normalize="l2").fit(photos["path"])
    said = [(block.pooling, block.normalize) for block in model.recipe_.blocks]
    assert said == [("max", "l2"), ("avg", "l2"), (None, "none")]
    prefixes = {name.rpartition("_")[0] for name in model.get_feature_names_out()}
    assert prefixes == {"mobilenet_max", "mine", "vgg16"}
    # Default pooling is not passed on, because a layer that is already a vector would refuse it.
    assert ImageFeatures(BLOCK).fit(photos["path"]).recipe_.blocks[0].pooling is None
    layers = ImageFeatures(BLOCK, layer=["conv1_relu", "conv_pw_3_relu"], components=2).fit(photos["path"])
    assert len(layers.get_feature_names_out()) == 4


@pytest.mark.parametrize(
    "parameters",
    [{"blocks": "Mobilnet"}, {"pooling": "mean"}, {"normalize": "whiten"}, {"components": 0}, {"on_failure": "drop"},
     {"precision": "int8"}, {"device": "tpu"}, {"batch_size": 0}, {"blocks": 7}, {"blocks": []}, {"components": 21}],
)  # fmt: skip
def test_parameters_are_checked_by_fit_alone(photos: pd.DataFrame, parameters: dict[str, Any]) -> None:
    model = clone(ImageFeatures(**{"blocks": BLOCK, **parameters}))
    with pytest.raises(RequestError) as caught:
        model.fit(photos["path"])
    assert isinstance(caught.value, ValueError)
    with pytest.raises(NotFittedError):
        check_is_fitted(model, "recipe_")


def test_a_fit_that_fails_leaves_what_an_earlier_one_made(photos: pd.DataFrame) -> None:
    model = ImageFeatures(BLOCK, normalize="standard").fit(photos[["path"]])
    before, features = (
        {name: vars(model)[name] for name in vars(model) if name.endswith("_")},
        model.transform(photos[["path"]]),
    )
    model.set_params(images="path", cache=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeEngine, "submit", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.fit(photos[["label", "path"]])
    model.set_params(images=None, cache=True)
    assert all(vars(model)[name] is value for name, value in before.items())
    np.testing.assert_array_equal(model.transform(photos[["path"]]), features)


# Fitting on the rows of fit only


@pytest.mark.parametrize("options", NORMALIZED)
def test_what_is_tested_on_never_changes_what_was_trained_on(
    photos: pd.DataFrame, options: dict[str, Any], tmp_path: Path
) -> None:
    bright = tmp_path / "bright.png"
    Image.new("RGB", (48, 48), "white").save(bright)
    train = list(photos["path"][:14])
    model = ImageFeatures(BLOCK, **options)
    rows = model.fit_transform(train)
    everything = nbfeat.extract(photos, BLOCK, images="path", fit_on="split == 'train'", **options)
    np.testing.assert_array_equal(model.transform(photos["path"]), everything.features.to_numpy())
    for other in (str(bright), None):
        np.testing.assert_array_equal(model.transform([*train, other, other])[:14], rows)
    # A leak would be detected.
    if options.get("normalize", "l2") != "l2":
        assert (ImageFeatures(BLOCK, **options).fit_transform([*train, str(bright)])[:14] != rows).any()


def test_transform_learns_nothing_and_changes_nothing(photos: pd.DataFrame) -> None:
    model = ImageFeatures(BLOCK, normalize="standard").fit(photos["path"][:14])
    before = pickle.dumps(model)
    one_by_one = np.concatenate([model.transform([path]) for path in photos["path"][11:17]])
    np.testing.assert_array_equal(model.transform(photos["path"])[11:17], one_by_one)
    assert pickle.dumps(model) == before


# Failures


def test_images_that_fail_are_rows_of_nan_and_a_table(photos: pd.DataFrame) -> None:
    photos.loc[["row 3", "row 15"], "path"] = ["gone.png", None]
    model = ImageFeatures(BLOCK, normalize="standard").fit(photos[["path"]])
    rows = model.transform(photos[["path"]])
    assert list(np.flatnonzero(np.isnan(rows).any(axis=1))) == [3, 15]
    np.testing.assert_array_equal(model.fit_transform(photos[["path"]]), rows)
    assert list(model.failures_.index) == ["row 3", "row 15"]
    assert list(model.failures_.columns) == ["position", "column", "image", "reason"]
    only_bad = model.transform(photos[["path"]].iloc[[3]])
    assert only_bad.shape == (1, 48)
    assert np.isnan(only_bad).all()
    scored = make_pipeline(model, HistGradientBoostingClassifier(max_iter=2, min_samples_leaf=1))
    assert len(scored.fit(photos[["path"]], photos["label"]).predict(photos[["path"]])) == 20


def test_images_that_fail_raise_where_that_is_asked_for(photos: pd.DataFrame) -> None:
    model = ImageFeatures(BLOCK, on_failure="raise").fit(photos["path"])
    assert model.failures_.empty
    photos.loc[["row 3", "row 5", "row 7", "row 9"], "path"] = ["a.png", "b.png", "c.png", "d.png"]
    for work in (model.fit, model.transform):
        with pytest.raises(ExtractionError) as caught:
            work(photos["path"])
        text = str(caught.value)
        assert text.startswith("4 of the 20 images gave no features. a.png: no such file")
        assert "c.png" in text
        assert "d.png" not in text
        assert "on_failure='nan'" in text
        assert str(Path.cwd()) in text


def test_nothing_is_learned_where_every_image_fails_and_other_errors_are_told(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing: list[Any] = ["nan", "raise"]
    for on_failure in failing:
        with pytest.raises(ExtractionError, match=r"^2 of the 2 images gave no features. a.png: no such file"):
            ImageFeatures(BLOCK, on_failure=on_failure).fit(["a.png", "b.png"])

    def fail(_: Extraction) -> None:
        raise ExtractionError("it broke")

    model = ImageFeatures(BLOCK).fit(photos["path"])
    monkeypatch.setattr(MemorySink, "finish", fail)
    with pytest.raises(ExtractionError, match="it broke"):
        model.transform(photos["path"])


# As a step of a pipeline


def test_frames_keep_their_index(photos: pd.DataFrame) -> None:
    model = ImageFeatures(BLOCK, normalize="l2").set_output(transform="pandas")
    for images in (photos[["path"]], photos["path"]):
        rows = model.fit_transform(images)
        pd.testing.assert_index_equal(rows.index, photos.index)
        assert list(rows.columns) == list(model.get_feature_names_out())
        assert (rows.dtypes == np.float32).all()
        pd.testing.assert_frame_equal(model.transform(images), rows, check_exact=True)
    photos.index = pd.Index(["same"] * 20)
    assert list(model.fit_transform(photos[["path"]]).index) == ["same"] * 20


@pytest.mark.parametrize("column", ["path", ["path"], ["path", "label"]])
@pytest.mark.parametrize("output", ["default", "pandas"])
def test_a_column_transformer_gives_it_its_columns(photos: pd.DataFrame, column: Any, output: str) -> None:
    photos["weight"] = np.arange(20.0)
    both = ColumnTransformer([("image", ImageFeatures(BLOCK), column), ("number", StandardScaler(), ["weight"])])
    rows = both.set_output(transform=output).fit_transform(photos.iloc[::-1])
    assert rows.shape == (20, 49)
    names = ["image__mobilenet_0000", "number__weight"]
    assert both.get_feature_names_out()[[0, -1]].tolist() == names
    features = ImageFeatures(BLOCK).fit_transform(photos["path"])
    if output == "pandas":
        pd.testing.assert_index_equal(rows.index, photos.index[::-1])
    np.testing.assert_array_equal(np.asarray(rows)[::-1, :48], features)


def test_a_grid_search_decodes_each_image_once(photos: pd.DataFrame) -> None:
    search = GridSearchCV(pipeline_of(Watched(BLOCK)), classifiers(), cv=StratifiedKFold(3))
    search.fit(photos[["path"]], photos["label"])
    assert len(search.cv_results_["params"]) == 5
    assert not np.isnan(search.cv_results_["mean_test_score"]).any()
    seen = in_workers.decoded()
    assert len(seen) == 20
    assert set(seen.values()) == {1}
    assert search.predict(photos[["path"]]).shape == (20,)
    assert in_workers.decoded() == seen


def test_options_can_be_searched_over(photos: pd.DataFrame) -> None:
    grid = [
        {"images__blocks": [BLOCK, [BLOCK, "VGG16 --size 32"]], "images__pooling": ["avg", "max"]},
        {"images__layer": [None, "conv1_relu"], "images__normalize": ["none", "standard"], "images__components": [2]},
    ]
    search = GridSearchCV(pipeline_of(ImageFeatures(BLOCK)), grid, cv=2, error_score="raise")
    search.fit(photos["path"], photos["label"])
    assert len(search.cv_results_["params"]) == 8
    assert FakeEngine.computed == 3 * 20  # the ends of both and one layer, since the fake network has one pooling


def test_the_search_in_the_guide_decodes_each_image_once_for_each_network(photos: pd.DataFrame) -> None:
    page = (ROOT / "notebooks" / "guide" / "scikit-learn.md").read_text(encoding="utf-8")
    code = page.partition("```python")[2].partition("```")[0]
    known: dict[str, Any] = {"photos": photos, "nbfeat": nbfeat}
    exec(code, known)  # noqa: S102 - our own
    assert 0.25 < known["search"].best_score_ <= 1
    assert known["search"].best_params_["images__blocks"] in {"EfficientNetLite0", "MobileNetV2"}
    assert FakeEngine.computed == 2 * 20


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_workers_share_the_cache_and_the_cores(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    search = GridSearchCV(pipeline_of(Watched(BLOCK)), classifiers(), cv=StratifiedKFold(3), n_jobs=2)
    search.fit(photos[["path"]], photos["label"])
    assert not np.isnan(search.cv_results_["mean_test_score"]).any()
    seen = in_workers.decoded()
    assert len({image for _, image in seen}) == 20
    assert set(seen.values()) == {1}, "a worker decoded an image twice"
    mine = max(1, engine_cores.available_cores() // 2)
    told = Parallel(n_jobs=2)(
        delayed(in_workers.cores_and_engine)(ImageFeatures("EfficientNetLite0"), list(photos["path"][:2]))
        for _ in range(2)
    )
    threads = f"{mine} thread{'s' if mine > 1 else ''}"
    assert [(cores, name.rpartition(", ")[2]) for cores, name in told] == [(mine, threads)] * 2


def test_workers_in_threads_share_the_cores(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(engine_cores, "quotas", lambda: iter([]))
    seen: list[int] = []

    class Counting(ImageFeatures):
        def _run(self, *args: Any, **options: Any) -> Extraction:
            seen.append(engine_cores.available_cores())
            return super()._run(*args, **options)

    model, both = make_pipeline(Counting(BLOCK), GaussianNB()), threading.Barrier(2)
    with parallel_config("threading"):
        scores = cross_val_score(model, photos[["path"]], photos["label"], cv=StratifiedKFold(4), n_jobs=2)
        nested = Parallel(n_jobs=2)(
            delayed(
                lambda: (both.wait(30), Parallel(n_jobs=2)(delayed(engine_cores.available_cores)() for _ in "ab"))
            )()
            for _ in range(2)
        )
    assert not np.isnan(scores).any()
    assert seen == [4] * 8
    assert {cores for _, found in nested for cores in found} <= {1, 2}, "more threads than cores"
    with ThreadPool(3) as idle:
        idle.map(abs, [1, 2, 3])
        assert engine_cores.available_cores() == 8


def test_variables_for_other_libraries_are_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = engine_cores.available_cores()
    for number in (cores + 1, 1):
        monkeypatch.setenv("OMP_NUM_THREADS", str(number))
        assert engine_cores.available_cores() == cores


# Pickling


def test_a_pickle_holds_no_images_and_no_network(photos: pd.DataFrame) -> None:
    photos.loc["row 3", "path"] = "secret.png"
    model = ImageFeatures(BLOCK, normalize="standard").fit(photos[["path"]])
    written = pickle.dumps(model)
    assert len(written) < 5_000
    for word in (b"secret", b".png", b"pandas", b"FakeEngine", b"Extraction", b"row 3"):
        assert word not in written, word
    again = pickle.loads(written)  # noqa: S301 - our own
    assert not hasattr(again, "failures_")
    np.testing.assert_array_equal(again.transform(photos[["path"]]), model.transform(photos[["path"]]))
    assert list(again.get_feature_names_out()) == list(model.get_feature_names_out())


@pytest.mark.slow
def test_another_process_transforms_to_the_same_bits(
    photos: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "PreparedNetwork", REAL_NETWORK)
    model = ImageFeatures("EfficientNetLite0", normalize="standard", components=5).fit(photos["path"][:14])
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    (tmp_path / "paths.pickle").write_bytes(pickle.dumps(list(photos["path"])))
    code = (
        "import pickle, sys; from pathlib import Path; import numpy as np; folder = Path(sys.argv[1])\n"
        "model, paths = (pickle.loads((folder / f'{name}.pickle').read_bytes()) for name in ('model', 'paths'))\n"
        "np.save(folder / 'rows.npy', model.set_params(cache=False, batch_size=3).transform(paths))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), model.transform(photos["path"]))


@pytest.mark.parametrize("change", ["weights", "numerics"])
def test_a_network_that_gives_other_features_is_refused(
    photos: pd.DataFrame, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ImageFeatures(BLOCK, normalize="standard").fit(photos["path"])
    if change == "numerics":
        monkeypatch.setattr(network_state, "NUMERICS", networks.NUMERICS + 1)
    else:
        made = FakeNetwork.__init__

        def other(self: FakeNetwork, *args: Any, **options: Any) -> None:
            made(self, *args, **options)
            self.weights = Loaded("random", "1" * 64)

        monkeypatch.setattr(FakeNetwork, "__init__", other)
    computed = FakeEngine.computed
    with pytest.raises(RequestError, match=rf"The fitted ImageFeatures can't be repeated.* mobilenet.* {change}"):
        model.transform(photos["path"])
    assert FakeEngine.computed == computed
    assert model.fit(photos["path"]).transform(photos["path"]).shape == (20, 48)


def test_transform_keeps_to_what_was_fitted(photos: pd.DataFrame) -> None:
    model = ImageFeatures(BLOCK, cache=False)
    rows = model.fit_transform(photos["path"])
    assert FakeEngine.computed == 20
    np.testing.assert_array_equal(model.transform(photos["path"]), rows)
    assert FakeEngine.computed == 40, "without the cache each run computes its images"
    model = ImageFeatures(BLOCK, precision="bfloat16").fit(photos["path"])
    before = model.transform(photos["path"])
    model.set_params(blocks="VGG16", precision="float32", pooling="max")
    np.testing.assert_array_equal(model.transform(photos["path"]), before)
    assert model.recipe_.precision == "bfloat16"


def pipeline_of(images: ImageFeatures) -> Pipeline:
    return Pipeline([("images", images), ("scale", StandardScaler()), ("classify", SVC())])


def classifiers() -> dict[str, list[Any]]:
    five = [SVC(), RidgeClassifier(), KNeighborsClassifier(2), GaussianNB(), LogisticRegression()]
    return {"classify": five}
