"""The parts of a comparison: target, rows, folds, model and score."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nbfeat.errors import RequestError, listing, near, sentences
from nbfeat.explore.vectors import Rows, contents_of
from nbfeat.extraction.normalize import learn
from nbfeat.extraction.options import FeatureBlock
from nbfeat.inference.spec import whole

MODELS = ("svm", "forest", "logistic")
MOST_CLASSES = 20  # of whole numbers; with more distinct values they are a quantity
IMAGES = "different images"
RARE_SHOWN, COLUMNS_SHOWN, LETTERS_SHOWN = 3, 20, 110

Folds: TypeAlias = list[tuple[NDArray[np.int_], NDArray[np.int_]]]  # training rows and test rows


@dataclass(frozen=True, slots=True)
class Target:
    """The values to predict, for the rows that have one."""

    name: str
    answers: NDArray[Any]
    rows: NDArray[np.int_]  # their positions in the frame
    is_classes: bool
    note: str = ""

    def __str__(self) -> str:
        classes = f" of {len(np.unique(self.answers)):,} classes" if self.is_classes else ""
        return f"{len(self.rows):,} rows{classes}"

    def taken(self, rows: NDArray[np.int_]) -> Target:
        """Return the target of `rows`, which must all have one."""
        return Target(self.name, self.answers[np.searchsorted(self.rows, rows)], rows, self.is_classes, self.note)


def column_of(frame: pd.DataFrame, given: object, what: str) -> pd.Series:
    """Return the column of `frame` named `given`, or the values `given`; a Series is aligned by its index."""
    if isinstance(given, pd.Series):
        if given.index.equals(frame.index):
            return given
        if given.index.is_unique and len(given) == len(frame) and frame.index.isin(given.index).all():
            return given.reindex(frame.index)
        problem = f"The index of the {what} differs from the frame's: {len(given):,} values for {len(frame):,} rows."
        raise RequestError(f"{problem} Use a Series with the same index, or its `.to_numpy()` to match by position.")
    if isinstance(given, Hashable):
        if (count := sum(column == given for column in frame.columns)) == 1:
            return frame[given]
        names = [str(name) for name in frame.columns]
        hint = near(str(given), names) or f"Its columns: {listing(names[:COLUMNS_SHOWN])}."
        found = f"{count} columns" if count else "no column"
        raise RequestError(sentences(f"The frame has {found} {given!r} for the {what}.", hint))
    values = np.asarray(given)
    if values.shape != (len(frame),):
        raise RequestError(f"The {what} must have one value per row, not shape {values.shape} for {len(frame):,} rows.")
    return pd.Series(values, index=frame.index, name=what)


def read_task(frame: pd.DataFrame, target: object, model: object) -> tuple[Target, Any]:
    """Read the target (classes if the model is a classifier) and make the estimator for it."""
    found = read_target(frame, target, as_classes=_wants_classes(model))
    return found, _estimator(model, is_classes=found.is_classes)


def read_target(frame: pd.DataFrame, given: object, *, as_classes: bool | None) -> Target:
    """Read the target of the rows that have one; `as_classes` is None unless the model decides."""
    column = column_of(frame, given, "target")
    name = str(column.name) if column.name is not None else "target"
    rows = np.flatnonzero(column.notna().to_numpy())
    if not len(rows):
        raise RequestError(f"All values of {name!r} are missing. Name a column with values.")
    values, are_words = _values(name, column.iloc[rows])
    is_quantity, note = (False, "") if are_words else _quantity(name, values)
    if as_classes is None:
        return Target(name, values, rows, not is_quantity, note)
    if not as_classes and are_words:
        raise RequestError(f"{name!r} has classes, which regressors can't predict. Use a classifier or another target.")
    if as_classes and is_quantity and (values % 1).any():
        way = "Use a regressor, or make classes with `pandas.cut`."
        raise RequestError(f"{name!r} has fractions, which classifiers can't predict. {way}")
    return Target(name, values, rows, as_classes)


def _values(name: str, column: pd.Series) -> tuple[NDArray[Any], bool]:
    """Return the values as scikit-learn expects them, and whether they can only be classes."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return _values(name, column.astype(column.cat.categories.dtype))[0], True
    column = column.infer_objects()
    if pd.api.types.is_bool_dtype(column):
        return column.to_numpy(bool), True
    if pd.api.types.is_any_real_numeric_dtype(column):
        return column.to_numpy(float if pd.api.types.is_float_dtype(column) else int), False
    kinds = {type(value).__name__ for value in column}
    if kinds == {"str"}:
        return column.to_numpy(str), True
    problem = f"{name!r} has values of type {listing(sorted(kinds))}, but needs one class or number per row."
    raise RequestError(f"{problem} For classes, use `.astype(str)`.")


def _quantity(name: str, values: NDArray[Any]) -> tuple[bool, str]:
    """Return whether numbers are a quantity rather than classes, and a note if that is a guess."""
    from sklearn.utils.multiclass import type_of_target

    if not np.isfinite(values).all():
        raise RequestError(f"{name!r} has infinite values. Set them to NaN to leave their rows out.")
    if type_of_target(values) == "continuous":
        return True, ""
    count = len(np.unique(values))
    numbers = f"{name} has {count:,} distinct whole numbers and was treated as"
    if count > MOST_CLASSES:
        return True, f"{numbers} a quantity. For classes, use `.astype(str)`."
    return False, f"{numbers} classes. For a quantity, pass a regressor: `model=SVR()`." if count > 2 else ""


def drawn(total: int, count: int, classes: NDArray[Any] | None, least: int = 0) -> NDArray[np.intp]:
    """Sample `count` of `total` positions, in proportion to `classes`, at least `least` of each, with a fixed seed."""
    order = np.random.default_rng(0).permutation(total)
    if classes is not None:
        kinds = pd.Series(classes[order])
        within = kinds.groupby(kinds.to_numpy())
        share = (within.cumcount() + 0.5) / within.transform("size") - (within.cumcount() < least)
        order = order[np.argsort(share.to_numpy(), kind="stable")]
    return np.sort(order[:count])


def selected(
    wanted: Target, ok: NDArray[np.bool_], groups: pd.Series | None, rows: object, cv: object
) -> tuple[Target, list[str]]:
    """Return the target of the rows to score, and notes on the rows left out."""
    kept = wanted.rows[ok[wanted.rows]]
    reasons = [(int((~ok).sum()), "without features"), (int(ok.sum()) - len(kept), f"without {wanted.name}")]
    if groups is not None:
        grouped = kept[groups.notna().to_numpy()[kept]]
        reasons.append((len(kept) - len(grouped), "without group"))
        kept = grouped
    notes = []
    if lost := len(ok) - len(kept):
        why = listing(f"{count:,} {reason}" for count, reason in reasons if count)
        notes.append(f"{lost:,} of {len(ok):,} rows were left out: {why}.")
    if not len(kept):
        raise RequestError(f"No rows are left to score. {notes[0]} Use rows that have all of these.")
    chosen, most = wanted.taken(kept), len(kept) if rows is None else whole("rows")(rows)
    if len(kept) > most:
        least = int(cv) if _is_count(cv) else 1
        if least > 1:  # before sampling, which would hide that a class is rare
            _check(least, chosen, None if groups is None else groups.iloc[kept])
        if chosen.is_classes and most < (needed := least * len(np.unique(chosen.answers))):
            raise RequestError(f"`rows={most}` is too few for {least} rows of each class. Use `rows={needed}` or more.")
        notes.append(f"{most:,} of {len(kept):,} rows were scored (a seeded sample). For all, set `rows=None`.")
        chosen = chosen.taken(kept[drawn(len(kept), most, chosen.answers if chosen.is_classes else None, least)])
    return chosen, notes


def copies_in(blocks: Collection[Rows], target: Target, cv: object) -> tuple[pd.Series | None, str]:
    """Return groups of rows with equal features, if `cv` is a number and there are any, and a note on them."""
    _, numbers, counts = np.unique(contents_of(blocks, target.rows), return_inverse=True, return_counts=True)
    if len(counts) == len(numbers):
        return None, ""
    some = f"{int((counts[numbers] > 1).sum()):,} of {len(numbers):,} rows have the same image as another row"
    if not _is_count(cv):
        return None, f"{some} (equal features): `cv` may put copies on both sides of a fold."
    groups = pd.Series(numbers, target.rows, name=IMAGES).reindex(range(target.rows[-1] + 1), fill_value=-1)
    return groups, f"{some} (equal features): copies were kept in one fold."


def _is_count(cv: object) -> TypeGuard[int]:
    return isinstance(cv, int | np.integer) and not isinstance(cv, bool)


def folds_of(cv: Any, target: Target, groups: pd.Series | None, frame_rows: int) -> tuple[Folds, str]:
    """Split `target` into folds, given as positions in it, by a number or a splitter; also describe them."""
    from sklearn import model_selection as ms

    held = None if groups is None else groups.iloc[target.rows]
    is_count = _is_count(cv)
    if is_count:
        _check(int(cv), target, held)
        kinds = (ms.KFold, ms.StratifiedKFold) if held is None else (ms.GroupKFold, ms.StratifiedGroupKFold)
        kind = kinds[target.is_classes]
        splitter = kind(cv) if kind is ms.GroupKFold else kind(cv, shuffle=True, random_state=0)
    elif hasattr(cv, "split") and not isinstance(cv, str):
        splitter = cv
        if isinstance(cv, ms.PredefinedSplit):  # it covers all rows of the frame
            if (count := len(cv.test_fold)) != frame_rows:
                raise RequestError(f"The PredefinedSplit must cover the frame's {frame_rows:,} rows, not {count:,}.")
            splitter = ms.PredefinedSplit(np.asarray(cv.test_fold)[target.rows])
    else:
        raise RequestError(f"`cv` must be a number of folds or a splitter such as GroupKFold(), not {cv!r}.")
    try:
        folds = list(splitter.split(np.zeros((len(target.answers), 1)), target.answers, held))
    except (ValueError, TypeError) as error:
        kind = type(splitter).__name__
        raise RequestError(f"{kind} failed to split the {len(target.answers):,} rows: {error}") from error
    if target.is_classes and any(len(np.unique(target.answers[train])) == 1 for train, _ in folds):
        raise RequestError(f"A fold has only one class of {target.name} to train on. Use fewer folds or other groups.")
    name = f"{cv} folds" if is_count else f"{type(cv).__name__}, {len(folds)} fold{'s' if len(folds) > 1 else ''}"
    return folds, f"{name}, groups kept together" if is_count and held is not None and held.name != IMAGES else name


def _check(cv: int, target: Target, groups: pd.Series | None) -> None:
    """Raise if the rows can't be split into `cv` folds, and say why."""
    if cv < 2:
        raise RequestError(f"`cv` must be at least 2 folds, not {cv}.")
    total = len(target.answers)
    kinds, counts = np.unique(target.answers, return_counts=True)
    if target.is_classes and len(kinds) == 1:
        problem = f"All {total:,} rows have the same {target.name}, {kinds[0].item()!r}."
        raise RequestError(f"{problem} Name a target with at least two classes.")
    if target.is_classes and groups is None and counts.min() < cv:
        rare = [f"{kind.item()!r} ({count:,})" for kind, count in zip(kinds, counts, strict=True) if count < cv]
        more = f" and {len(rare) - RARE_SHOWN:,} more" if len(rare) > RARE_SHOWN else ""
        way = f"Use `cv={counts.min()}`, or set" if counts.min() > 1 else "Set"
        problem = f"Classes of {target.name} with fewer rows than the {cv} folds: {listing(rare[:RARE_SHOWN])}{more}."
        raise RequestError(f"{problem} {way} them to None to leave them out.")
    if not target.is_classes and total < 2 * cv:
        raise RequestError(f"{total:,} rows are too few for {cv} folds of at least two rows. Use `cv={total // 2}`.")
    if groups is not None and (count := groups.nunique()) < cv:
        kind = IMAGES if groups.name == IMAGES else "groups"
        raise RequestError(f"{count:,} {kind} are too few for {cv} folds. Use `cv={count}` or less.")


def _wants_classes(model: object) -> bool | None:
    """Return whether `model` is a classifier; None if the target decides."""
    from sklearn.base import is_classifier, is_regressor

    names = listing(map(repr, MODELS), "or")
    if isinstance(model, str):
        if model in MODELS:
            return None
        way = f"Use {names}, or a scikit-learn estimator."
        raise RequestError(sentences(f"Unknown `model={model!r}`.", near(model, MODELS), way))
    if isinstance(model, type) or not all(hasattr(model, method) for method in ("fit", "get_params")):
        given = f"a class: pass {model.__name__}()" if isinstance(model, type) else repr(model)
        raise RequestError(f"`model` must be {names}, or a scikit-learn estimator, not {given}.")
    return True if is_classifier(model) else False if is_regressor(model) else None


def _estimator(model: object, *, is_classes: bool) -> Any:
    from sklearn import compose, ensemble, linear_model, pipeline, preprocessing, svm

    if not isinstance(model, str):
        return model
    scale, ridge = preprocessing.StandardScaler, linear_model.RidgeCV(alphas=(1, 10, 100, 1000, 10000))
    regressor, classifier = {
        # SVR's tolerance is in units of the target, so an unscaled target would be fitted badly.
        "svm": (compose.TransformedTargetRegressor(svm.SVR(C=10), transformer=scale()), svm.SVC(C=10)),
        "logistic": (ridge, linear_model.LogisticRegression(max_iter=1000)),
        "forest": (ensemble.RandomForestRegressor(random_state=0), ensemble.RandomForestClassifier(random_state=0)),
    }[model]
    chosen = classifier if is_classes else regressor
    return chosen if model == "forest" else pipeline.make_pipeline(scale(), chosen)


def scorer_of(estimator: Any, scoring: Any) -> tuple[str, Any]:
    """Return the name of the score, and the scorer."""
    from sklearn import base, metrics

    if scoring is not None and not callable(scoring) and scoring not in metrics.get_scorer_names():
        given = f"`scoring` must be a scikit-learn scorer or its name, not {scoring!r}."
        raise RequestError(sentences(given, near(str(scoring), metrics.get_scorer_names())))
    try:
        scorer = metrics.check_scoring(estimator, scoring=scoring)
    except TypeError as error:
        kind = type(estimator).__name__
        raise RequestError(f"{kind} has no default score. Name one, such as `scoring='accuracy'`.") from error
    if scoring is not None:
        return scoring if isinstance(scoring, str) else getattr(scoring, "__name__", "score"), scorer
    if any(name.split("__")[-1] == "scoring" and value for name, value in estimator.get_params().items()):
        return "score", scorer  # the search's own
    return "accuracy" if base.is_classifier(estimator) else "R²" if base.is_regressor(estimator) else "score", scorer


def written(estimator: Any) -> str:
    """Describe an estimator in one line."""
    steps = [step for _, step in getattr(estimator, "steps", [("", estimator)])]
    text = " → ".join(" ".join(repr(step).split()).removesuffix("()") for step in steps)
    return text if len(text) <= LETTERS_SHOWN else text[: LETTERS_SHOWN - 1] + "…"


def scores_of(
    block: FeatureBlock, prefix: str, rows: NDArray[Any], target: Target, folds: Folds, estimator: Any, scorer: Any
) -> list[float]:
    """Return a block's score in each fold; normalization and model are fitted on the training rows only."""
    from sklearn.base import clone

    features, answers, scores = rows[target.rows], target.answers, []
    for train, test in folds:
        try:
            normalizer = learn(block, features[train], np.ones(len(train), bool))
            model = clone(estimator).fit(normalizer.apply(features[train]), answers[train])
            scores.append(float(scorer(model, normalizer.apply(features[test]), answers[test])))
        except RequestError as error:
            raise RequestError(f"{prefix}, in one fold: {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise RequestError(f"scikit-learn failed to score {prefix}: {error}") from error
    if np.isnan(scores).any():
        raise RequestError(f"The score of {prefix} is undefined in a fold. Use fewer folds, with more rows each.")
    return scores
