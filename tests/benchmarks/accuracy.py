"""``accuracy``: what a precision does to a classifier of five kinds of flowers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from nbfeat import Extraction
from tests.benchmarks.measure import MissingError, Row, Setting, Table, progress, weights_of, why
from tests.conftest import DATA

NETWORKS = (("MobileNetV2", None), ("MobileNet", 0.25), ("MobileNet", 0.5), ("MobileNet", 0.75))
PRECISIONS = ("float32", "auto", "bfloat16")
FOLDS, REPEATS = 5, 3
HEAD = ("network", "precision", "accuracy", "against float32", "cosine to float32, least", "mean")


def tables(setting: Setting) -> Iterator[Table]:
    """Measure every network whose weights are here."""
    folder = DATA / "photos" / "flowers5"
    files = sorted(folder.glob("*/*.jpg"))
    if not files:
        raise MissingError(f"no photographs at {folder}: set NBFEAT_TEST_DATA to a folder that has them")
    frame = pd.DataFrame({"path": [str(file) for file in files], "label": [file.parent.name for file in files]})
    if setting.quick:
        frame = frame.iloc[::4]
    rows: list[Row] = []
    sentences: list[str] = []
    for backbone, alpha in NETWORKS:
        name = backbone if alpha is None else f"{backbone} {alpha:g}"
        if weights_of(backbone, alpha or 1.0) != "imagenet":
            rows.append((name, "", "no ImageNet weights on this machine"))
            continue
        options: dict[str, Any] = {"weights": "imagenet"} if alpha is None else {"weights": "imagenet", "alpha": alpha}
        made, told = of_network(frame, name, backbone, options)
        rows += made
        sentences += told
    note = (
        f"{len(frame)} photographs of five kinds; `StandardScaler`, `SVC(C=10)`, {FOLDS} folds × {REPEATS} repeats, "
        "the same for all; ± is the standard error of the difference over folds."
    )
    yield Table("Accuracy by precision", HEAD, rows, " ".join([note, *sentences]))


def of_network(frame: pd.DataFrame, name: str, backbone: str, options: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """Measure one network in each precision; return rows, and what `auto` says of its choice."""
    rows: list[Row] = []
    sentences: list[str] = []
    first: tuple[np.ndarray, np.ndarray] | None = None
    for precision in PRECISIONS:
        progress(f"accuracy: {name}, {precision}")
        try:
            result = Extraction(frame, backbone, images="path", precision=precision, cache=False, **options).run()
            features = result.features.to_numpy()
            scores = cross_validated(features, frame["label"].to_numpy())
        except Exception as error:  # a CPU may not have a precision; the row says it
            rows.append((name, precision, why(error)))
            continue
        shown = precision
        if precision == "auto":
            shown = f"auto: {result.precision}"
            sentences += [f"{name}: {text}" for text in said(result)]
        first = first or (features, scores)
        rows.append((name, shown, f"{scores.mean():.3f}", *compared(features, scores, *first)))
    return rows, sentences


def said(result: Extraction) -> list[str]:
    notes = result._report().notes
    return [note for note in notes if any(word in note for word in ("float32", "bfloat16", "float16"))]


def cross_validated(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    folds = RepeatedStratifiedKFold(n_splits=FOLDS, n_repeats=REPEATS, random_state=0)
    return np.asarray(cross_val_score(make_pipeline(StandardScaler(), SVC(C=10)), features, labels, cv=folds))


def compared(
    features: np.ndarray, scores: np.ndarray, exact: np.ndarray, exact_scores: np.ndarray
) -> tuple[str, str, str]:
    """Compare with float32: accuracy in the same folds, and the features themselves."""
    if features is exact:
        return "", "", ""
    differences = scores - exact_scores
    error = differences.std(ddof=1) / len(differences) ** 0.5
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(exact, axis=1)
    cosines = np.sum(features * exact, axis=1, dtype=np.float64) / lengths
    return f"{differences.mean():+.3f} ± {error:.3f}", f"{cosines.min():.4f}", f"{cosines.mean():.4f}"
