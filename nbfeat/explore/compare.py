"""Which backbone, which layer, is best: the cross-validated score of every block of a result."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.errors import RequestError, listing
from nbfeat.explore.comparison import Comparison, sorted_best_first, verdict
from nbfeat.explore.models import estimator_of, scorer_of, wants_classes, written
from nbfeat.explore.scoring import Folds, Target, column_of, drawn, folds_of, read_target
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.normalize import learn

if TYPE_CHECKING:
    import pandas as pd

    from nbfeat.extraction.columns import FeatureColumns

ROWS = 5000  # a support-vector machine's time grows with their square: 5,000 take minutes, 20,000 hours


def compare(
    result: Extraction,
    target: object,
    model: object = "svm",
    *,
    cv: object = 5,
    groups: object = None,
    scoring: object = None,
    rows: int | None = ROWS,
    speed: bool = True,
) -> Comparison:
    """Score every block of a result by cross-validation, best first.

    Each block is scored on the same rows in the same folds. What a block's normalization learns is learned from the
    training rows of each fold alone, whatever `fit_on` was.

    Parameters
    ----------
    result
        A finished Extraction.
    target
        What to predict: a column of the frame, or one value for each row. Text, booleans and categories are classes;
        fractions are a quantity; whole numbers are classes where they are 20 or fewer. Rows without one are left out.
    model
        ``"svm"``: ``SVC(C=10)``, or for a quantity ``SVR(C=10)`` of the standardized target; ``"logistic"``:
        LogisticRegression, or for a quantity RidgeCV; both after StandardScaler. ``"forest"``: a random forest, seeded.
        Or any estimator or pipeline of scikit-learn, which is cloned for each fold; a classifier or regressor decides
        what the target is.
    cv
        How many folds, shuffled (seeded), classes in proportion; or a splitter of scikit-learn. PredefinedSplit is of
        the rows of the frame.
    groups
        A column, or one value for each row: rows of one group are never on both sides of a fold.
    scoring
        A name or scorer of scikit-learn; by default the model's own: accuracy, or R² for a quantity.
    rows
        At most so many rows are scored, drawn with the classes in proportion (seeded); None for all.
    speed
        Measure images per second, about a second a block.

    Returns
    -------
    Comparison
        ``.table``, ``.scores`` (blocks × folds), ``.best`` and ``.plot()``.

    Raises
    ------
    RequestError
        Where something asked for cannot be.

    Examples
    --------
    >>> result = nbfeat.extract(photos, "ResNet50 --layer conv4_block6_out,conv5_block3_out")  # doctest: +SKIP
    >>> nbfeat.compare(result, "label")  # doctest: +SKIP
    >>> nbfeat.compare(result, "label").plot()  # doctest: +SKIP
    """
    if not isinstance(result, Extraction):
        raise RequestError(f"compare takes what %extract or nbfeat.extract returned, not {type(result).__name__}.")
    made = set(result.columns)
    frame = result.frame.loc[:, [column not in made for column in result.frame.columns]]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        wanted = read_target(frame, target, as_classes=wants_classes(model))
        estimator = estimator_of(model, is_classes=wanted.is_classes)
        name, scorer = scorer_of(estimator, scoring)
        matrices, ok, notes = _matrices(result)
        grouping = None if groups is None else column_of(frame, groups, "group")
        chosen, left_out = _chosen(wanted, ok, grouping, rows)
        folds = folds_of(cv, chosen, grouping, len(frame))
        scores = {
            part.prefix: _scores(part, matrices[part.prefix][chosen.rows], chosen.answers, folds, estimator, scorer)
            for part in result.parts
        }
    ordered = sorted_best_first(scores)
    rates = _rates(result.parts, result) if speed else {}
    return Comparison(
        table=_table(result, ordered, rates),
        scores=ordered,
        best=next(str(part.block) for part in result.parts if part.prefix == ordered.index[0]),
        target=chosen.name,
        score=name,
        setting=f"{written(estimator)}, {folds.told}, {_counted(chosen)}",
        notes=tuple(
            note
            for note in [
                verdict(ordered, name),
                *left_out,
                chosen.note,
                *notes,
                _about_normalization(result.parts),
                _about_warnings(warned),
                _about_speed(result) if speed else "",
            ]
            if note
        ),
    )


def _matrices(result: Extraction) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_], list[str]]:
    """Return features before what their normalization learned, the rows that have all of them, and what to tell."""
    learned = [part for part in result.parts if part.block.is_learned]
    found = {part.prefix: result[part.prefix].to_numpy() for part in result.parts if part not in learned}
    if not learned:
        return found, result.ok.to_numpy(), []
    before = result.before_normalization().run()
    raw = {(part.block, part.column): part for part in before.parts}
    for part in learned:
        same = raw[replace(part.block, normalize="none", components=None), part.column]
        if part.lane and same.lane and part.lane.weights.sha256 != same.lane.weights.sha256:
            name = part.block.backbone
            raise RequestError(
                f"The weights of {name} are others than when {part.prefix} was extracted: extract it again."
            )
        found[part.prefix] = before[same.prefix].to_numpy()
    again = f"{before.computed:,} images, which the cache did not have."
    notes = [f"Features before normalization were computed again for {again}"] if before.computed else []
    return found, result.ok.to_numpy() & before.ok.to_numpy(), notes


def _chosen(
    wanted: Target, ok: NDArray[np.bool_], groups: pd.Series | None, most: int | None
) -> tuple[Target, list[str]]:
    """Return the target of the rows that are scored, and say which are not."""
    kept = wanted.rows[ok[wanted.rows]]
    reasons = [(int((~ok).sum()), "without features"), (int(ok.sum()) - len(kept), f"without {wanted.name}")]
    if groups is not None:
        grouped = kept[groups.notna().to_numpy()[kept]]
        reasons.append((len(kept) - len(grouped), "without group"))
        kept = grouped
    told = []
    if lost := len(ok) - len(kept):
        why = listing(f"{count:,} {reason}" for count, reason in reasons if count)
        told.append(f"{lost:,} of {len(ok):,} rows are left out: {why}.")
    if not len(kept):
        raise RequestError(f"No row is left to score. {told[0]}")
    chosen = wanted.taken(kept)
    if most is not None and len(kept) > most:
        told.append(f"{most:,} of {len(kept):,} rows were drawn, always the same; rows=None takes all.")
        chosen = chosen.taken(kept[drawn(len(kept), most, chosen.answers if chosen.is_classes else None)])
    return chosen, told


def _scores(
    part: FeatureColumns,
    features: NDArray[np.float32],
    target: NDArray[Any],
    folds: Folds,
    estimator: Any,
    scorer: Any,
) -> list[float]:
    """Return a block's score of each fold; its normalization and the model learn from the training rows alone."""
    from sklearn.base import clone

    scores = []
    for train, test in folds.pairs:
        try:
            normalizer = learn(part.block, features[train], np.ones(len(train), bool))
            model = clone(estimator).fit(normalizer.apply(features[train]), target[train])
            scores.append(float(scorer(model, normalizer.apply(features[test]), target[test])))
        except RequestError as error:
            raise RequestError(f"{part.prefix}, in a fold: {error}") from error
        except (ValueError, TypeError) as error:
            raise RequestError(f"scikit-learn cannot score {part.prefix}: {error}") from error
    if np.isnan(scores).any():
        raise RequestError(
            f"The score of {part.prefix} is not defined in a fold: take fewer folds, so that each has more rows."
        )
    return scores


def _rates(parts: Sequence[FeatureColumns], result: Extraction) -> dict[str, float]:
    """Measure each source of features once: parts of one source differ in normalization alone."""
    measured: dict[Any, float] = {}
    for part in parts:
        if part.source not in measured:
            measured[part.source] = result.speed_of(part)
    return {part.prefix: measured[part.source] for part in parts}


def _table(result: Extraction, scores: pd.DataFrame, rates: Mapping[str, float]) -> pd.DataFrame:
    import pandas as pd

    parts = {part.prefix: part for part in result.parts}
    table = pd.DataFrame(
        {
            "block": [str(parts[prefix].block) for prefix in scores.index],
            "score": scores.mean(axis=1),
            "spread": scores.std(axis=1, ddof=1),
            "width": [len(parts[prefix].names) for prefix in scores.index],
            "images_per_second": [rates.get(prefix, np.nan) for prefix in scores.index],
        },
        index=scores.index,
    )
    table["bytes"] = 4 * table["width"] * len(result.frame)
    return table if rates else table.drop(columns="images_per_second")


def _counted(target: Target) -> str:
    rows = f"{len(target.rows):,} rows"
    return f"{rows} of {len(np.unique(target.answers)):,} classes" if target.is_classes else rows


def _about_normalization(parts: Sequence[FeatureColumns]) -> str:
    learned = [part.prefix for part in parts if part.block.is_learned]
    return f"{listing(learned)}: normalization learned in each fold, from its training rows alone." if learned else ""


def _about_warnings(warned: Sequence[warnings.WarningMessage]) -> str:
    if not warned:
        return ""
    counts = Counter(warning.category.__name__ for warning in warned)
    first = str(warned[0].message).strip().splitlines()[0]
    return f"Warnings: {listing(f'{count:,} × {name}' for name, count in counts.items())}. The first: {first}"


def _about_speed(result: Extraction) -> str:
    return (
        "images/s: from file to features, each block alone, without the cache, measured just now on up to 64 of the "
        f"images ({listing(result.engines)}, {result.precision})."
    )
