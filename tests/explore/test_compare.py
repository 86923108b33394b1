"""Which block is best: the scores, that nothing leaks, what is said of them, and the plot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, KFold, LeaveOneOut, PredefinedSplit, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler
from sklearn.svm import SVC, SVR

import nbfeat
from nbfeat import Extraction, ExtractionError, FeatureBlock, RequestError
from nbfeat.backbones.weights import Loaded
from nbfeat.explore import scoring as module
from nbfeat.explore.compare import Comparison, verdict
from nbfeat.explore.scoring import copies_in, drawn, folds_of, read_target
from nbfeat.extraction.pipeline import images_per_second
from nbfeat.inference import prepared
from tests.fake import FakeEngine
from tests.look import HOSTILE

pytestmark = pytest.mark.usefixtures("fake_network")
REAL_NETWORK = prepared.PreparedNetwork
END = "MobileNet --size 32"
MEANS = "MobileNet --size 32 --layer conv1_relu"
FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)
DATA: list[tuple[bytes, bytes]] = []


@pytest.fixture(autouse=True)
def no_window() -> Iterator[None]:
    mpl.use("Agg")
    yield
    plt.close("all")


@pytest.fixture
def extracted(photos: pd.DataFrame) -> Extraction:
    """Return two blocks of a pretended network."""
    return nbfeat.extract(photos, END, MEANS, images="path")


# The scores


NORMALIZED: list[tuple[str, list[Any]]] = [
    ("", []),
    ("--normalize l2", [Normalizer()]),
    ("--normalize standard", [StandardScaler()]),
    ("--normalize minmax", [MinMaxScaler()]),
    ("--normalize standard --components 4", [StandardScaler(), PCA(4, random_state=0)]),
    ("--normalize whiten --components 4", [PCA(4, whiten=True, random_state=0)]),
]


@pytest.mark.parametrize(("options", "steps"), NORMALIZED)
def test_scores_are_those_of_a_loop_written_by_hand(photos: pd.DataFrame, options: str, steps: list[Any]) -> None:
    result = nbfeat.extract(photos, f"{END} {options}", MEANS, images="path")
    found = nbfeat.compare(result, "label", speed=False)
    raw = nbfeat.extract(photos, END, images="path").features
    by_hand = cross_val_score(make_pipeline(*steps, StandardScaler(), SVC(C=10)), raw, photos["label"], cv=FOLDS)
    np.testing.assert_allclose(found.scores.loc["mobilenet"], by_hand)
    assert found.table.loc["mobilenet", "score"] == pytest.approx(by_hand.mean())
    assert found.table.loc["mobilenet", "spread"] == pytest.approx(by_hand.std(ddof=1))
    assert by_hand.mean() > 0.5


def test_the_table_and_its_texts_have_the_best_first_and_what_it_costs(
    extracted: Extraction, photos: pd.DataFrame
) -> None:
    found = nbfeat.compare(extracted, "label")
    table = found.table
    assert list(table.columns) == ["block", "score", "spread", "width", "images_per_second", "bytes"]
    assert table["score"].is_monotonic_decreasing
    assert dict(table["width"]) == {"mobilenet": 48, "mobilenet_conv1_relu": 3}
    assert dict(table["bytes"]) == {"mobilenet": 48 * 4 * 20, "mobilenet_conv1_relu": 3 * 4 * 20}
    assert (table["images_per_second"] > 0).all()
    text, html = repr(found), found._repr_html_().replace("\N{NO-BREAK SPACE}", " ")
    for words in (*found.notes, *table["block"], "accuracy ± sd", "images/s", "20 rows of 4 classes"):
        assert words in text
        assert words in html
    assert "without the cache, measured just now on up to 64" in text

    best = found.table.index[0]
    assert FeatureBlock.parse(found.best) == (next(part.block for part in extracted.parts if part.prefix == best),)
    again = nbfeat.extract(photos, found.best, images="path")
    pd.testing.assert_frame_equal(again.features, extracted[best])


def test_models_by_name_and_estimators(extracted: Extraction, photos: pd.DataFrame) -> None:
    search = GridSearchCV(SVC(), {"C": [1, 10]}, cv=2)
    forest = RandomForestClassifier(2)
    for model in ("logistic", forest, search):
        found = nbfeat.compare(extracted, "label", model=model, cv=2, speed=False)
        assert found.score == "accuracy"
        assert found.scores.shape == (2, 2)
    assert not hasattr(search, "best_estimator_"), "the user's own was fitted"
    assert "GridSearchCV" in found.setting
    search = GridSearchCV(SVC(), {"C": [1, 10]}, cv=2, scoring="f1_macro")
    assert nbfeat.compare(extracted, "label", model=search, cv=2, speed=False).score == "score"  # not called accuracy
    ours = nbfeat.compare(extracted, "label", model=SVC(C=3), scoring="f1_macro", cv=FOLDS, speed=False)
    by_hand = cross_val_score(SVC(C=3), extracted["mobilenet"], photos["label"], cv=FOLDS, scoring="f1_macro")
    np.testing.assert_allclose(ours.scores.loc["mobilenet"], by_hand)
    assert ours.score == "f1_macro"
    assert "StratifiedKFold, 5 folds" in repr(ours)


def test_a_quantity_is_learned_by_regression(extracted: Extraction) -> None:
    numbers = np.arange(20) % 4 * 10.5 + 0.25  # which the colors of a picture tell
    for name in ("svm", "logistic", "forest"):
        found = nbfeat.compare(extracted, numbers, model=name, cv=2, speed=False)
        assert found.score == "R²"
        assert found.table["score"].iloc[0] > 0.3
    small, large = (nbfeat.compare(extracted, scale * numbers, speed=False).scores for scale in (1, 1000.1))
    np.testing.assert_allclose(small, large, atol=1e-3)
    folds = KFold(5, shuffle=True, random_state=0)
    by_hand = cross_val_score(Ridge(), extracted["mobilenet"], numbers, cv=folds, scoring="r2")
    found = nbfeat.compare(extracted, numbers, model=Ridge(), speed=False)
    np.testing.assert_allclose(found.scores.loc["mobilenet"], by_hand)


@pytest.mark.parametrize(("target", "scoring"), [("label", "neg_log_loss"), (np.arange(20) / 7, None)])
def test_a_forest_grows_the_same_trees_each_time(photos: pd.DataFrame, target: Any, scoring: str | None) -> None:
    result = nbfeat.extract(photos, MEANS, images="path")
    first, again = (nbfeat.compare(result, target, "forest", cv=2, scoring=scoring, speed=False) for _ in range(2))
    pd.testing.assert_frame_equal(first.scores, again.scores, check_exact=True)


# Nothing leaks


class Spy(ClassifierMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """A classifier that writes down what it learns from and what it is asked."""

    def fit(self, rows: np.ndarray, target: np.ndarray) -> Spy:
        self.classes_, self.learned = np.unique(target), rows.tobytes()
        return self

    def predict(self, rows: np.ndarray) -> np.ndarray:
        DATA.append((self.learned, rows.tobytes()))
        return np.repeat(self.classes_[:1], len(rows))


@pytest.mark.parametrize("options", [options for options, _ in NORMALIZED])
def test_other_test_images_change_nothing_that_a_fold_learns(
    photos: pd.DataFrame, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[dict[str, Any]] = []

    def watched(*arguments: Any) -> Any:
        normalizer = learn(*arguments)
        learned.append({name: getattr(normalizer, name) for name in ("shift", "stretch", "center", "axes")})
        return normalizer

    learn = module.learn  # type: ignore[attr-defined] # what is watched
    monkeypatch.setattr(module, "learn", watched)
    fold = 2
    train, test = list(FOLDS.split(photos, photos["label"]))[fold]
    corrupted = photos.copy()
    others = np.random.default_rng(2).integers(0, 255, (len(test), 32, 32, 3), dtype=np.uint8)
    corrupted["path"] = corrupted["path"].astype(object)
    corrupted.iloc[test, 0] = pd.Series([Image.fromarray(pixels) for pixels in others], dtype=object).array

    def seen(frame: pd.DataFrame) -> tuple[Extraction, tuple[bytes, bytes], dict[str, Any]]:
        DATA.clear()
        learned.clear()
        result = nbfeat.extract(frame, f"{END} {options}", images="path")
        nbfeat.compare(result, "label", model=Spy(), speed=False)
        assert len(DATA) == len(learned) == 5
        return result, DATA[fold], learned[fold]

    before, (fitted, asked), normalizer = seen(photos)
    after, (fitted_again, asked_again), normalizer_again = seen(corrupted)
    assert fitted_again == fitted
    assert asked_again != asked
    for name, value in normalizer.items():
        np.testing.assert_array_equal(normalizer_again[name], value)
    whole = [result.features.to_numpy()[train].tobytes() for result in (before, after)]
    # The columns of the result themselves were learned from all rows: to score those would have leaked.
    assert (whole[0] != whole[1]) == before.parts[0].block.is_learned


def test_features_before_normalization_come_from_the_cache(photos: pd.DataFrame) -> None:
    result = nbfeat.extract(photos, f"{END} --normalize standard", MEANS, images="path")
    computed = FakeEngine.computed
    found = nbfeat.compare(result, "label", speed=False)
    assert FakeEngine.computed == computed
    assert "recomputed" not in repr(found)
    assert "mobilenet: normalization was fitted in each fold" in repr(found)
    raw = result.before_normalization().run()
    assert raw._run.specs == result._run.specs  # with every cut, since the cache may keep features by them all
    expected = nbfeat.extract(photos, END, images="path").features.reset_index(drop=True)
    pd.testing.assert_frame_equal(raw["mobilenet"], expected)
    computed = FakeEngine.computed
    result = nbfeat.extract(photos, f"{END} --normalize standard", images="path", cache=False)
    photos["path"] = "gone"  # what the result was made of is what counts
    found = nbfeat.compare(result, "label", speed=False)
    assert FakeEngine.computed == computed + 40
    assert "recomputed for 20 images" in repr(found)


def test_a_result_that_repeats_another_is_compared_as_if_it_were_the_first(photos: pd.DataFrame) -> None:
    photos["back"] = list(photos["path"])[::-1]
    first = nbfeat.extract(photos.iloc[:10], f"{END} --normalize standard", images=["path", "back"])
    renamed = photos.rename(columns={"path": "front", "back": "rear"})
    again = first.like(renamed, images=["front", "rear"])
    found = nbfeat.compare(again, "label", speed=False)
    direct = nbfeat.extract(photos, f"{END} --normalize standard", images=["path", "back"])
    pd.testing.assert_frame_equal(found.scores, nbfeat.compare(direct, "label", speed=False).scores)
    assert set(found.table.index) == {"path_mobilenet", "back_mobilenet"}
    assert found.scores.loc["path_mobilenet"].mean() > 0.5


def test_a_network_that_changed_meanwhile_is_told(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    result = nbfeat.extract(photos, f"{END} --normalize standard", images="path")
    monkeypatch.setattr("tests.fake.Loaded", lambda name, _: Loaded(name, "1" * 64))
    with pytest.raises(RequestError, match="The weights of MobileNet have changed since mobilenet was extracted"):
        nbfeat.compare(result, "label")


# Rows and folds


def test_rows_without_features_or_target_are_left_out_of_every_block(photos: pd.DataFrame, tmp_path: Path) -> None:
    photos.iloc[3, 0] = str(tmp_path / "gone.png")
    photos.iloc[[4, 8], 1] = None
    result = nbfeat.extract(photos, END, f"{MEANS} --normalize standard", images="path")
    found = nbfeat.compare(result, "label", cv=3, speed=False)
    assert "3 of 20 rows were left out: 1 without features and 2 without label." in repr(found)
    kept, folds = np.delete(np.arange(20), [3, 4, 8]), StratifiedKFold(3, shuffle=True, random_state=0)
    rows, labels = result["mobilenet"].iloc[kept], photos["label"].iloc[kept]
    by_hand = cross_val_score(make_pipeline(StandardScaler(), SVC(C=10)), rows, labels, cv=folds)
    np.testing.assert_allclose(found.scores.loc["mobilenet"], by_hand)


def test_groups_are_never_on_both_sides_of_a_fold(extracted: Extraction, photos: pd.DataFrame) -> None:
    photos["patient"] = [f"patient {number % 10}" for number in range(20)]
    photos.loc["row 7", "patient"] = None
    photos["weight"] = np.arange(20) / 7
    for name in ("label", "weight"):
        target = read_target(photos, name, as_classes=None).taken(np.delete(np.arange(20), 7))
        folds, _ = folds_of(3, target, photos["patient"], 20)
        for train, test in folds:
            sides = [set(photos["patient"].iloc[target.rows[side]]) for side in (train, test)]
            assert not sides[0] & sides[1], name
    found = nbfeat.compare(extracted, "label", groups=photos["patient"], cv=3, speed=False)
    assert "1 without group" in repr(found)
    assert "groups kept together" in repr(found)
    assert nbfeat.compare(extracted, photos["weight"], groups=photos["patient"], cv=3, speed=False).score == "R²"
    with pytest.raises(RequestError, match=r"10 groups are too few for 11 folds. Use `cv=10`"):
        nbfeat.compare(extracted, "label", groups=photos["patient"], cv=11)


def test_copies_of_an_image_are_never_on_both_sides_of_a_fold(photos: pd.DataFrame) -> None:
    """With random labels, a model can only recognize copies, so any score above chance would be a leak."""
    thrice = pd.concat([photos] * 3, ignore_index=True).assign(label=np.tile(["a", "b", "b", "a"], 15)[:60])
    thrice["label"] = np.tile(np.random.default_rng(1).permutation(["a", "b"] * 10), 3)
    result = nbfeat.extract(thrice, END, MEANS, images="path")
    target = read_target(thrice, "label", as_classes=None)
    copies, note = copies_in([result["mobilenet"].to_numpy()], target, 5)
    assert note == "60 of 60 rows have the same image as another row (equal features): copies were kept in one fold."
    for train, test in folds_of(5, target, copies, 60)[0]:
        assert not set(train % 20) & set(test % 20)
    found = nbfeat.compare(result, "label", speed=False)
    assert note in found.notes
    assert found.table["score"].max() <= 0.75
    split = nbfeat.compare(result, "label", cv=FOLDS, speed=False)  # a splitter is obeyed
    assert split.table["score"].max() > 0.85
    assert any("`cv` may put copies on both sides of a fold" in note for note in split.notes)
    together = nbfeat.compare(result, "label", groups=np.arange(60) // 20, cv=3, speed=False)  # asked for, so obeyed
    assert together.table["score"].max() > 0.85
    assert note not in together.notes
    apart = nbfeat.compare(result, np.arange(60) / 7, speed=False)
    assert (apart.score, note in apart.notes) == ("R²", True)
    with pytest.raises(RequestError, match=r"20 different images are too few for 21 folds\. Use `cv=20` or less"):
        nbfeat.compare(result, "label", cv=21, speed=False)
    once = nbfeat.compare(nbfeat.extract(photos, END, images="path"), "label", cv=3, speed=False)
    assert not any("same image" in note for note in once.notes)


def test_a_predefined_split_is_of_the_rows_of_the_frame(extracted: Extraction, photos: pd.DataFrame) -> None:
    labels = photos["label"].where(photos.index != "row 2")
    split = PredefinedSplit(np.where(photos["split"] == "test", 0, -1))
    ((train, test),), _ = folds_of(split, read_target(photos, labels, as_classes=None), None, 20)
    assert list(test) == [13, 14, 15, 16, 17, 18]  # of the rows that are left
    assert list(train) == list(range(13))
    found = nbfeat.compare(extracted, labels, cv=split, speed=False)
    assert found.scores.shape == (2, 1)
    assert "A single fold doesn't show" in repr(found)
    assert "±" not in repr(found).split("\n")[2]


def test_many_rows_are_drawn_in_proportion_and_a_series_goes_by_its_index(
    extracted: Extraction, photos: pd.DataFrame
) -> None:
    labels = np.repeat(["rare", "common"], [100, 900])
    rows = drawn(1000, 50, labels)
    assert list(np.unique(labels[rows], return_counts=True)[1]) == [45, 5]
    np.testing.assert_array_equal(drawn(1000, 50, labels), rows)
    assert len(drawn(30, 7, None)) == 7
    found = nbfeat.compare(extracted, "label", rows=12, cv=3, speed=False)
    assert "12 of 20 rows were scored" in repr(found)
    assert "12 rows of 4 classes" in repr(found)
    assert "sample" not in repr(nbfeat.compare(extracted, "label", rows=None, speed=False))

    found = nbfeat.compare(extracted, photos["label"].sample(frac=1, random_state=0), speed=False)
    pd.testing.assert_frame_equal(found.scores, nbfeat.compare(extracted, "label", speed=False).scores)
    with pytest.raises(RequestError, match=r"differs from the frame's.*\.to_numpy\(\)"):
        nbfeat.compare(extracted, photos["label"].reset_index(drop=True))


@pytest.mark.parametrize(
    ("values", "is_classes"),
    [(["a", "b"] * 15, True), ([True, False] * 15, True), (pd.Categorical([1.5, 2.5] * 15), True),
     (pd.array([1, 2, None] * 10, "Int64"), True), ([1.0, 2.0, None] * 10, True), (list(range(30)), False),
     ([0.5, 1.5] * 15, False), (np.array([0.5, 1, None] * 10, dtype=object), False)],
    ids=["text", "booleans", "categories", "few integers", "whole floats", "many integers", "fractions", "objects"],
)  # fmt: skip
def test_what_a_target_is(values: Any, is_classes: bool) -> None:
    frame = pd.DataFrame({"y": values})
    target = read_target(frame, "y", as_classes=None)
    assert target.is_classes == is_classes
    np.testing.assert_array_equal(target.rows, np.flatnonzero(frame["y"].notna()))
    assert len(target.answers) == len(target.rows)
    assert target.answers.dtype.kind in "ifbU"


def test_what_a_target_is_taken_for_is_said_where_it_is_a_guess(extracted: Extraction) -> None:
    assert "treated as classes" in repr(nbfeat.compare(extracted, np.arange(20) % 3, speed=False))
    forced = nbfeat.compare(extracted, np.arange(20) % 3, model=SVR(), speed=False)
    assert forced.score == "R²"
    assert "treated as" not in repr(forced)
    assert not read_target(pd.DataFrame({"y": [0, 1]}), "y", as_classes=None).note
    assert "treated as a quantity" in read_target(pd.DataFrame({"y": range(40)}), "y", as_classes=None).note


# What cannot be


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("lable", {}, r"The frame has no column 'lable' for the target. Did you mean label"),
        (["a"] * 3, {}, r"shape \(3,\) for 20 rows"),
        (["a"] * 20, {}, r"All 20 rows have the same target, 'a'.*two classes"),
        (["a"] * 18 + ["b"] * 2, {}, r"'b' \(2\). Use `cv=2`, or set them to None"),
        ([None] * 20, {}, r"All values of 'target' are missing"),
        ([[1], [2]] * 10, {}, r"shape \(20, 1\)"),
        (pd.date_range("2026-01-01", periods=20), {}, r"values of type Timestamp"),
        ([1.5, np.inf] * 10, {}, r"infinite"),
        ("label", {"model": "svn"}, r"`model='svn'`. Did you mean svm"),
        ("label", {"model": SVC}, r"not a class: pass SVC\(\)"),
        ("label", {"model": 3}, r"a scikit-learn estimator, not 3"),
        ("label", {"model": SVR()}, r"has classes, which regressors can't predict"),
        ("label", {"cv": 1}, r"at least 2 folds, not 1"),
        ("label", {"cv": "five"}, r"a number of folds.*not 'five'"),
        ("label", {"cv": StratifiedKFold(9)}, r"StratifiedKFold failed to split the 20 rows: n_splits=9"),
        ("label", {"cv": PredefinedSplit([0, -1])}, r"must cover the frame's 20 rows, not 2"),
        ("label", {"scoring": "acuracy"}, r"not 'acuracy'. Did you mean accuracy"),
        ("label", {"scoring": "f1"}, r"scikit-learn failed to score mobilenet.*(multiclass|pos_label)"),
        ("label", {"rows": 8}, r"`rows=8` is too few.*`rows=20`"),
        (np.arange(20) / 7, {"cv": 15}, r"20 rows are too few for 15 folds.*Use `cv=10`"),
        (np.arange(20) / 7, {"model": SVC()}, r"has fractions, which classifiers can't predict"),
        ("label", {"cv": PredefinedSplit(np.where(np.arange(20) % 4, 0, -1))}, r"A fold has only one class of label"),
        (np.arange(20) / 7, {"cv": LeaveOneOut()}, r"undefined in a fold. Use fewer folds"),
    ],
)
@pytest.mark.filterwarnings("ignore:R.2 score is not well-defined")  # scikit-learn's, and seen by the user
def test_what_cannot_be_is_said_with_the_next_step(
    extracted: Extraction, target: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        nbfeat.compare(extracted, target, speed=False, **options)


def test_only_a_finished_extraction_can_be_compared_and_a_fold_may_have_too_few_rows(photos: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match="must be an Extraction, not DataFrame"):
        nbfeat.compare(photos, "label")  # type: ignore[arg-type] # as people do
    with pytest.raises(ExtractionError, match="isn't finished"):
        nbfeat.compare(Extraction(photos, END, images="path"), "label")
    result = nbfeat.extract(photos, f"{END} --components 18", images="path")
    with pytest.raises(RequestError, match=r"in one fold: .*components=18.* 48 features of MobileNet and 16 rows"):
        nbfeat.compare(result, "label", speed=False)


# What is said, and what is left alone


def test_whether_there_is_a_winner_goes_by_what_the_lead_varies() -> None:
    def told(*rows: list[float]) -> str:
        return verdict(pd.DataFrame(list(rows), index=list("abcdefg"[: len(rows)])), "accuracy", 1 / 2)

    assert told([0.9, 0.8, 0.85], [0.8, 0.7, 0.74]).startswith(
        "a is best: it leads b by 0.103 ± 0.006 accuracy across folds"
    )
    no_winner = told([0.9, 0.7, 0.8], [0.7, 0.8, 0.8])
    assert no_winner.startswith("No clear winner between a and b: a leads b by 0.033 ± 0.1")
    three = told([0.9, 0.7, 0.8], [0.88, 0.68, 0.79], [0.7, 0.8, 0.8])
    assert three == "No clear winner between a and c: a leads b by 0.017 ± 0.006 accuracy across folds."
    assert "a, b, c, d and 2 more" in told(*[[0.5, 0.6]] * 6)
    assert told([0.9, 0.8]) == ""
    assert "A single fold" in told([0.9], [0.8])


@pytest.mark.parametrize("cv", [2, 3, 5, 10])
def test_equally_good_blocks_rarely_have_a_winner_at_any_number_of_folds(cv: int) -> None:
    # Leads of equally good blocks: as folds share training rows, their leads correlate.
    random, trials, found, correlation = np.random.default_rng(cv), 1000, 0, 1 / cv
    for _ in range(trials):
        leads = np.sqrt(correlation) * random.normal() + np.sqrt(1 - correlation) * random.normal(size=cv)
        scores = pd.DataFrame(
            [0.5 + abs(leads.mean()) / leads.mean() * leads / 100, np.full(cv, 0.5)], index=["a", "b"]
        )
        found += verdict(scores, "accuracy", 1 / (cv - 1)).startswith("a is best")
    assert 0.05 < found / trials < 0.14  # either of the two may lead: about twice 5 %


@pytest.mark.parametrize(("lead", "words"), [(1.40, "No clear winner"), (1.46, "mobilenet is best")])
def test_the_verdict_allows_for_the_training_rows_that_folds_share(
    extracted: Extraction, lead: float, words: str
) -> None:
    """By the book, a lead over 5 folds must be t.ppf(.95, 4) · sqrt(1/5 + 1/4) = 1.43 standard deviations."""
    scores = iter(0.5 + 0.1 * (lead + np.arange(-2, 3) / np.sqrt(2.5)))
    found = nbfeat.compare(
        extracted, "label", scoring=lambda _, rows, __: next(scores) if rows.shape[1] == 48 else 0.5, speed=False
    )
    assert found.notes[0].startswith(words)


def test_a_rare_class_is_drawn_or_named(photos: pd.DataFrame) -> None:
    labels = np.repeat(["rare", "common"], [40, 5960])
    assert np.count_nonzero(labels[drawn(6000, 300, labels, 5)] == "rare") == 5
    photos["label"] = ["rare"] * 3 + ["common"] * (len(photos) - 3)
    result = nbfeat.extract(photos, END, images="path")
    assert nbfeat.compare(result, "label", rows=8, cv=2, speed=False).scores.shape == (1, 2)
    with pytest.raises(RequestError, match=r"fewer rows than the 5 folds: 'rare' \(3\)"):
        nbfeat.compare(result, "label", rows=8, speed=False)
    with pytest.raises(RequestError, match=r"rows=3.*rows=4"):
        nbfeat.compare(result, "label", rows=3, cv=2, speed=False)


@pytest.mark.parametrize(
    "options",
    [{"rows": -1}, {"rows": 0}, {"rows": "x"}, {"scoring": "roc_auc_ovr"}, {"groups": [1, "a", 2.5, None] * 5}],
)
def test_what_cannot_be_scored_is_one_sentence(extracted: Extraction, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"rows|roc_auc|score|split|groups"):
        nbfeat.compare(extracted, "label", speed=False, **options)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (
            LogisticRegression(max_iter=1),
            "10 of 10 fits may not have converged. Use a model with a higher `max_iter`.",
        ),
        (make_pipeline(StandardScaler(), LogisticRegression(max_iter=1)), "10 of 10 fits may"),
        ("logistic", ""),
        ("svm", ""),
        (SVC(max_iter=-1), ""),
        (RidgeClassifier(max_iter=1), ""),  # which has a solver without iterations
        pytest.param(HistGradientBoostingClassifier(max_iter=2), "", marks=pytest.mark.slow),  # it means to use them up
    ],
)
def test_fits_that_did_not_converge_are_counted_and_warnings_are_left_to_the_user(
    extracted: Extraction, model: Any, found: str
) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        text = repr(nbfeat.compare(extracted, "label", model=model, speed=False))
        assert warnings.filters == before or "Boosting" in text  # whose threads add one of joblib's
    assert bool(found) is bool(seen) is ("converged" in text)
    assert found in text
    assert {one.category for one in seen} <= {ConvergenceWarning}


def test_what_comes_from_data_is_escaped(photos: pd.DataFrame) -> None:
    photos[HOSTILE] = photos["label"].str.replace("kind", HOSTILE)
    found = nbfeat.compare(nbfeat.extract(photos, f"{END} --prefix '<b>$x$'", images="path"), HOSTILE, speed=False)
    assert "<img" not in found._repr_html_()
    assert "<b>" not in found._repr_html_()
    assert "&lt;img src=x" in found._repr_html_()
    found.plot().figure.canvas.draw()

    block = "'/a folder/mine.keras' --layer conv --scaling none --prefix mine"
    found = made([block, "EfficientNetLite0"])
    for text in (repr(found), found._repr_html_()):
        assert "mine.keras --layer conv --scaling none --prefix mine" in text
        assert "folder" not in text
    assert found.table["block"].tolist() == [block, "EfficientNetLite0"]


def test_nothing_global_is_changed(extracted: Extraction) -> None:
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 7}):
        before, state = dict(mpl.rcParams), np.random.get_state()[1].copy()  # type: ignore[index]
        options = pd.describe_option("", _print_desc=False)
        nbfeat.compare(extracted, "label", speed=False).plot()
        assert dict(mpl.rcParams) == before
        assert (np.random.get_state()[1] == state).all()  # type: ignore[index]
        assert pd.describe_option("", _print_desc=False) == options


# Speed


def test_speed_is_measured_once_for_each_source_and_only_where_asked(photos: pd.DataFrame, tmp_path: Path) -> None:
    blocks = [END, f"{END} --normalize standard --prefix standard", MEANS]
    result = nbfeat.extract(photos, blocks, images="path")
    opened, computed = FakeEngine.opened, FakeEngine.computed
    assert "images_per_second" not in nbfeat.compare(result, "label", speed=False).table
    assert (FakeEngine.opened, FakeEngine.computed) == (opened, computed)
    speed = nbfeat.compare(result, "label").table["images_per_second"]
    assert FakeEngine.opened == opened + 2
    assert FakeEngine.computed > computed
    assert speed["mobilenet"] == speed["standard"]
    part = result.parts[0]
    assert part.network is not None
    assert np.isnan(images_per_second(part.network, part.block.cut.key, [str(tmp_path / "gone.png")], tmp_path))


@pytest.mark.slow
def test_one_output_of_a_real_network_alone_gives_the_same(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "PreparedNetwork", REAL_NETWORK)
    result = nbfeat.extract(photos[:2], "EfficientNetLite0 --layer block2b_add,block3b_add", images="path")
    part = result.parts[0]
    assert part.network is not None
    alone, whole = part.network.prepared.start("float32", part.block.cut.key), part.network.prepared.start("float32")
    vectors = []
    for engine in (alone, whole):
        buffer = engine.buffer()
        buffer[:] = np.random.default_rng(0).integers(0, 255, buffer.shape)
        engine.submit(buffer, len(buffer))
        vectors.append(engine.collect())
    assert set(vectors[0]) == set(alone.outputs) == {part.block.cut.key}
    assert len(vectors[1]) == 2
    np.testing.assert_array_equal(vectors[0][part.block.cut.key], vectors[1][part.block.cut.key])
    assert result.speed_of(part) > 0


# The plot


def made(blocks: list[str], folds: int = 5, target: str = "label") -> Comparison:
    generator = np.random.default_rng(0)
    index = [FeatureBlock.parse(block)[0].prefix or block for block in blocks]
    scores = pd.DataFrame(generator.uniform(0.4, 1, (len(blocks), folds)), index=index)
    table = pd.DataFrame({"block": blocks, "score": scores.mean(axis=1), "spread": scores.std(axis=1)}, index=index)
    table["width"], table["images_per_second"], table["bytes"] = 1280, 123.4, 4 * 1280 * 300
    return Comparison(table, scores, blocks[0], target, "accuracy", "StandardScaler → SVC(C=10), 5 folds, 300 rows", ())


SIX = [
    f"{network} --prefix {network.lower()}_{layer}"
    for network in ("ResNet50", "MobileNetV2")
    for layer in ("end", "block_13_expand_relu", "a_rather_long_name_of_a_layer_in_a_deep_network_relu")
]


@pytest.mark.parametrize(
    "comparison",
    [made(SIX), made(SIX[:1]), made(SIX[:2], folds=1), made([f"VGG16 --prefix p{number}" for number in range(30)]),
     made([f"ResNet{n}{v} --prefix r{n}{v}" for n in (50, 101, 152) for v in ("", "V2")]
          + [f"DenseNet{n} --prefix d{n}" for n in (121, 169, 201)] + ["VGG16", "VGG19", "NASNetMobile"])],
    ids=["six", "one", "one fold", "thirty", "more networks than colors"],
)  # fmt: skip
def test_nothing_in_the_plot_is_cut_or_overlaps(comparison: Comparison) -> None:
    ax = comparison.plot()
    figure = ax.figure
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    legend = ax.get_legend()
    assert legend is not None
    boxes = [
        text.get_window_extent()
        for text in [*ax.get_yticklabels(), ax.xaxis.label, ax.title, ax._left_title, *legend.get_texts()]  # type: ignore[attr-defined]
        if text.get_text()
    ]
    for box in boxes:
        assert figure.bbox.padded(1).contains(box.x0, box.y0)
        assert figure.bbox.padded(1).contains(box.x1, box.y1)
    for one, other in combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))
    assert not legend.get_window_extent().overlaps(ax.get_window_extent())
    assert ax.get_window_extent().width > 0.3 * figure.bbox.width


def test_the_plot_names_everything_with_the_best_on_top() -> None:
    mine = Figure().subplots()
    ax = made(SIX, target="$a$ of $b").plot(mine)
    assert ax is mine
    assert not plt.get_fignums()
    assert ax.get_xlabel() == "accuracy of each fold"
    assert ax.get_title(loc="left").startswith(r"accuracy of predicting \$a\$ of \$b")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [  # type: ignore[union-attr]
        "ResNet50", "MobileNetV2", "mean ± standard deviation",
    ]  # fmt: skip
    assert ax.get_yticklabels()[0].get_text() == "resnet50_end\n1,280 wide, 120 images/s"
    bottom, top = ax.get_ylim()
    assert bottom > top, "the first block is on top"
    assert sum(np.shape(points.get_offsets())[0] for points in ax.collections) == 6 * 5
    made(SIX).plot()
    assert len(plt.get_fignums()) == 1


# With real weights


@pytest.mark.slow
@pytest.mark.usefixtures("keras_home")
def test_six_blocks_of_two_networks_on_photographs(flowers: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "PreparedNetwork", REAL_NETWORK)
    blocks = [
        "MobileNetV2", "MobileNetV2 --pooling max", "MobileNetV2 --layer block_13_expand_relu",
        "MobileNet --alpha 0.25", "MobileNet --alpha 0.25 --layer conv_pw_11_relu",
        "MobileNet --alpha 0.25 --layer conv_pw_6_relu --normalize standard --components 32",
    ]  # fmt: skip
    result = nbfeat.extract(flowers, blocks, images="path")
    found = nbfeat.compare(result, "label")
    raw = result.before_normalization().run()

    for part in result.parts:
        learned = [StandardScaler(), PCA(32, random_state=0)] if part.block.is_learned else []
        model = make_pipeline(*learned, StandardScaler(), SVC(C=10))
        rows = (raw if learned else result)[part.prefix]
        score = cross_val_score(model, rows, flowers["label"], cv=FOLDS).mean()
        assert found.table.loc[part.prefix, "score"] == pytest.approx(score, abs=0.02)

    assert len(found.table) == 6
    assert found.table["score"].iloc[0] > 0.8
    speed = found.table["images_per_second"]
    assert speed["mobilenet025"] > speed["mobilenetv2"]
