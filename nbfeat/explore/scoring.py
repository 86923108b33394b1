"""What features are scored by: the target of the rows that have one, the folds, the model, and what scores it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nbfeat.errors import RequestError, listing, near, sentences
from nbfeat.extraction.normalize import learn
from nbfeat.extraction.options import FeatureBlock
from nbfeat.inference.spec import whole

MODELS = ("svm", "forest", "logistic")
MOST_CLASSES = 20  # that whole numbers stand for; more of them are a quantity
RARE_SHOWN, COLUMNS_SHOWN, LETTERS_SHOWN = 3, 20, 110

Folds: TypeAlias = list[tuple[NDArray[np.int_], NDArray[np.int_]]]  # rows to learn from and to be scored on


@dataclass(frozen=True, slots=True)
class Target:
    """Classes or numbers, one for each row that has one."""

    name: str
    answers: NDArray[Any]
    rows: NDArray[np.int_]  # which rows of the frame they are of
    is_classes: bool
    note: str = ""

    def __str__(self) -> str:
        classes = f" of {len(np.unique(self.answers)):,} classes" if self.is_classes else ""
        return f"{len(self.rows):,} rows{classes}"

    def taken(self, rows: NDArray[np.int_]) -> Target:
        """Return the target of some `rows` of the frame, all of which have one."""
        return Target(self.name, self.answers[np.searchsorted(self.rows, rows)], rows, self.is_classes, self.note)


def column_of(frame: pd.DataFrame, given: object, what: str) -> pd.Series:
    """Return the column of `frame` that `given` names, or `given` itself, one value for each row.

    A Series goes by its index where that has the frame's labels in another order.
    """
    if isinstance(given, pd.Series):
        if given.index.equals(frame.index):
            return given
        if given.index.is_unique and len(given) == len(frame) and frame.index.isin(given.index).all():
            return given.reindex(frame.index)
        raise RequestError(
            f"The {what} is a Series whose index is not the frame's: {len(given):,} values for {len(frame):,} rows. "
            "Take a Series of the same index, or its .to_numpy() to go by position."
        )
    if isinstance(given, Hashable):
        if sum(column == given for column in frame.columns) == 1:
            return frame[given]
        names = [str(name) for name in frame.columns]
        hint = near(str(given), names) or f"Its columns: {listing(names[:COLUMNS_SHOWN])}."
        raise RequestError(sentences(f"The {what} {given!r} is not one column of the frame.", hint))
    values = np.asarray(given)
    if values.shape != (len(frame),):
        raise RequestError(f"The {what} must be one value a row: it has shape {values.shape} for {len(frame):,} rows.")
    return pd.Series(values, index=frame.index, name=what)


def read_task(frame: pd.DataFrame, target: object, model: object) -> tuple[Target, Any]:
    """Read the target, which is classes where the model is a classifier, and make the estimator for it."""
    found = read_target(frame, target, as_classes=_wants_classes(model))
    return found, _estimator(model, is_classes=found.is_classes)


def read_target(frame: pd.DataFrame, given: object, *, as_classes: bool | None) -> Target:
    """Read the target of the rows that have one; `as_classes` says what it is where the model decides that."""
    column = column_of(frame, given, "target")
    name = str(column.name) if column.name is not None else "target"
    rows = np.flatnonzero(column.notna().to_numpy())
    if not len(rows):
        raise RequestError(f"No row has a {name}: name a column with values.")
    values, are_words = _values(name, column.iloc[rows])
    is_quantity, note = (False, "") if are_words else _quantity(name, values)
    if as_classes is None:
        return Target(name, values, rows, not is_quantity, note)
    if not as_classes and are_words:
        why = "classes, which a regressor cannot learn: take a classifier, or another target."
        raise RequestError(f"{name!r} holds {why}")
    if as_classes and is_quantity and (values % 1).any():
        why = "fractions, which a classifier cannot learn: take a regressor, or make classes of them with pandas.cut."
        raise RequestError(f"{name!r} holds {why}")
    return Target(name, values, rows, as_classes)


def _values(name: str, column: pd.Series) -> tuple[NDArray[Any], bool]:
    """Return the values as scikit-learn takes them, and whether they can be nothing but classes."""
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
    raise RequestError(
        f"{name!r} holds values of type {listing(sorted(kinds))}: a target is one class or number a row. "
        "For classes, give it as text: .astype(str)."
    )


def _quantity(name: str, values: NDArray[Any]) -> tuple[bool, str]:
    """Tell whether numbers are a quantity rather than classes, and say so where that is a guess."""
    from sklearn.utils.multiclass import type_of_target

    if not np.isfinite(values).all():
        raise RequestError(f"{name!r} holds infinite numbers: make them NaN, and their rows are left out.")
    if type_of_target(values) == "continuous":
        return True, ""
    count = len(np.unique(values))
    numbers = f"The {count:,} whole numbers of {name} are taken for"
    if count > MOST_CLASSES:
        return True, f"{numbers} a quantity; for classes, give it as .astype(str)."
    return False, f"{numbers} classes; for a quantity, give a regressor: model=SVR()." if count > 2 else ""


def drawn(total: int, count: int, classes: NDArray[Any] | None, least: int = 0) -> NDArray[np.intp]:
    """Draw `count` of `total` positions with a fixed seed, classes in proportion, at least `least` of each."""
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
    """Return the target of the rows that are scored, and say which are not."""
    kept = wanted.rows[ok[wanted.rows]]
    reasons = [(int((~ok).sum()), "without features"), (int(ok.sum()) - len(kept), f"without {wanted.name}")]
    if groups is not None:
        grouped = kept[groups.notna().to_numpy()[kept]]
        reasons.append((len(kept) - len(grouped), "without group"))
        kept = grouped
    notes = []
    if lost := len(ok) - len(kept):
        why = listing(f"{count:,} {reason}" for count, reason in reasons if count)
        notes.append(f"{lost:,} of {len(ok):,} rows are left out: {why}.")
    if not len(kept):
        raise RequestError(f"No row is left to score. {notes[0]}")
    chosen, most = wanted.taken(kept), len(kept) if rows is None else whole("rows")(rows)
    if len(kept) > most:
        least = cv if isinstance(cv, int) and cv > 1 else 1
        if least > 1:  # before the draw, which would hide that a class is rare
            _check(least, chosen, None if groups is None else groups.iloc[kept].to_numpy())
        if chosen.is_classes and most < (needed := least * len(np.unique(chosen.answers))):
            raise RequestError(f"rows={most:,} is too few for {least} rows of each class. Use rows={needed:,} or more.")
        notes.append(f"{most:,} of {len(kept):,} rows were drawn, always the same; rows=None takes all.")
        chosen = chosen.taken(kept[drawn(len(kept), most, chosen.answers if chosen.is_classes else None, least)])
    return chosen, notes


def folds_of(cv: Any, target: Target, groups: pd.Series | None, frame_rows: int) -> tuple[Folds, str]:
    """Split the rows of `target` into folds, as positions in it: so many, seeded, or by a splitter; and name these."""
    from sklearn import model_selection as ms

    held = None if groups is None else groups.iloc[target.rows].to_numpy()
    is_count = isinstance(cv, int | np.integer) and not isinstance(cv, bool)
    if is_count:
        _check(int(cv), target, held)
        kinds = (ms.KFold, ms.StratifiedKFold) if held is None else (ms.GroupKFold, ms.StratifiedGroupKFold)
        kind = kinds[target.is_classes]
        splitter = kind(cv) if kind is ms.GroupKFold else kind(cv, shuffle=True, random_state=0)
    elif hasattr(cv, "split") and not isinstance(cv, str):
        splitter = cv
        if isinstance(cv, ms.PredefinedSplit):  # it is of all rows of the frame
            if (count := len(cv.test_fold)) != frame_rows:
                raise RequestError(f"The PredefinedSplit is of {count:,} rows, not of the frame's {frame_rows:,}.")
            splitter = ms.PredefinedSplit(np.asarray(cv.test_fold)[target.rows])
    else:
        raise RequestError(
            f"cv takes a number of folds from 2, or a splitter such as GroupKFold() or PredefinedSplit, not {cv!r}."
        )
    try:
        folds = list(splitter.split(np.zeros((len(target.answers), 1)), target.answers, held))
    except (ValueError, TypeError) as error:
        kind = type(splitter).__name__
        raise RequestError(f"{kind} could not split the {len(target.answers):,} rows: {error}") from error
    if target.is_classes and any(len(np.unique(target.answers[train])) == 1 for train, _ in folds):
        alone = f"A fold has one class alone of {target.name} to learn from"
        raise RequestError(f"{alone}: take fewer folds, or other groups.")
    name = f"{cv} folds" if is_count else f"{type(cv).__name__}, {len(folds)} fold{'s' if len(folds) > 1 else ''}"
    return folds, f"{name}, groups kept whole" if is_count and held is not None else name


def _check(cv: int, target: Target, groups: NDArray[Any] | None) -> None:
    """Say why the rows cannot be split into `cv` folds, where they cannot."""
    if cv < 2:
        raise RequestError(f"cv takes a number of folds from 2, not {cv}.")
    total = len(target.answers)
    kinds, counts = np.unique(target.answers, return_counts=True)
    if target.is_classes and len(kinds) == 1:
        raise RequestError(
            f"All {total:,} rows have the {target.name} {kinds[0].item()!r}: there is nothing to tell apart. "
            "Name a target of two classes or more."
        )
    if target.is_classes and groups is None and counts.min() < cv:
        rare = [f"{kind.item()!r} ({count:,})" for kind, count in zip(kinds, counts, strict=True) if count < cv]
        more = f" and {len(rare) - RARE_SHOWN:,} more" if len(rare) > RARE_SHOWN else ""
        way = f"Take cv={counts.min()}, or make" if counts.min() > 1 else "Make"
        raise RequestError(
            f"Classes of {target.name} with fewer rows than the {cv} folds: {listing(rare[:RARE_SHOWN])}{more}. "
            f"{way} them None to leave them out."
        )
    if not target.is_classes and total < 2 * cv:
        raise RequestError(f"{total:,} rows are too few for {cv} folds of at least two. Take cv={total // 2}.")
    if groups is not None and (count := pd.Series(groups).nunique()) < cv:
        raise RequestError(f"There are {count:,} groups, fewer than {cv} folds. Take cv={count} or less.")


def _wants_classes(model: object) -> bool | None:
    """Tell whether `model` is a classifier; None where the target decides."""
    from sklearn.base import is_classifier, is_regressor

    names = listing(map(repr, MODELS), "or")
    if isinstance(model, str):
        if model in MODELS:
            return None
        way = f"Name {names}, or give an estimator of scikit-learn."
        raise RequestError(sentences(f"There is no model {model!r}.", near(model, MODELS), way))
    if isinstance(model, type) or not all(hasattr(model, method) for method in ("fit", "get_params")):
        given = f"the class {model.__name__}: make one, {model.__name__}()" if isinstance(model, type) else repr(model)
        raise RequestError(f"The model must be {names}, or an estimator of scikit-learn, not {given}.")
    return True if is_classifier(model) else False if is_regressor(model) else None


def _estimator(model: object, *, is_classes: bool) -> Any:
    from sklearn import ensemble, linear_model, svm
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not isinstance(model, str):
        return model
    regressor, classifier = {
        # SVR's tolerance is in units of the target, so that a target in thousands would not be learned.
        "svm": (TransformedTargetRegressor(svm.SVR(C=10), transformer=StandardScaler()), svm.SVC(C=10)),
        "logistic": (
            linear_model.RidgeCV(alphas=(1, 10, 100, 1000, 10000)),
            linear_model.LogisticRegression(max_iter=1000),
        ),
        "forest": (ensemble.RandomForestRegressor(random_state=0), ensemble.RandomForestClassifier(random_state=0)),
    }[model]
    chosen = classifier if is_classes else regressor
    return chosen if model == "forest" else make_pipeline(StandardScaler(), chosen)


def scorer_of(estimator: Any, scoring: Any) -> tuple[str, Any]:
    """Return what the score is called, and what gives it."""
    from sklearn.base import is_classifier, is_regressor
    from sklearn.metrics import check_scoring, get_scorer_names

    if scoring is not None and not callable(scoring) and scoring not in get_scorer_names():
        given = f"scoring takes a name or a scorer of scikit-learn, not {scoring!r}."
        raise RequestError(sentences(given, near(str(scoring), get_scorer_names())))
    try:
        scorer = check_scoring(estimator, scoring=scoring)
    except TypeError as error:
        kind = type(estimator).__name__
        raise RequestError(f"{kind} has no score of its own: name one with scoring=, e.g. 'accuracy'.") from error
    if scoring is not None:
        return scoring if isinstance(scoring, str) else getattr(scoring, "__name__", "score"), scorer
    if any(name.split("__")[-1] == "scoring" and value for name, value in estimator.get_params().items()):
        return "score", scorer  # its own
    return "accuracy" if is_classifier(estimator) else "R²" if is_regressor(estimator) else "score", scorer


def written(estimator: Any) -> str:
    """Write an estimator in one line."""
    steps = [step for _, step in getattr(estimator, "steps", [("", estimator)])]
    text = " → ".join(" ".join(repr(step).split()).removesuffix("()") for step in steps)
    return text if len(text) <= LETTERS_SHOWN else text[: LETTERS_SHOWN - 1] + "…"


def scores_of(
    block: FeatureBlock, prefix: str, rows: NDArray[Any], target: Target, folds: Folds, estimator: Any, scorer: Any
) -> list[float]:
    """Return a block's score of each fold; its normalization and the model learn from the training rows alone."""
    from sklearn.base import clone

    features, answers, scores = rows[target.rows], target.answers, []
    for train, test in folds:
        try:
            normalizer = learn(block, features[train], np.ones(len(train), bool))
            model = clone(estimator).fit(normalizer.apply(features[train]), answers[train])
            scores.append(float(scorer(model, normalizer.apply(features[test]), answers[test])))
        except RequestError as error:
            raise RequestError(f"{prefix}, in a fold: {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise RequestError(f"scikit-learn cannot score {prefix}: {error}") from error
    if np.isnan(scores).any():
        way = "take fewer folds, so that each has more rows."
        raise RequestError(f"The score of {prefix} is not defined in a fold: {way}")
    return scores
