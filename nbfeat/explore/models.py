"""The models that features are tried with, by name or as scikit-learn's own, and what scores them."""

from __future__ import annotations

from typing import Any

from nbfeat.errors import RequestError, listing, near, sentences

MODELS = ("svm", "forest", "logistic")
WORDS_SHOWN = 110


def wants_classes(model: object) -> bool | None:
    """Tell whether `model` is a classifier; None where the target key_fields."""
    from sklearn.base import is_classifier, is_regressor

    if isinstance(model, str):
        if model not in MODELS:
            raise RequestError(
                sentences(
                    f"There is no model {model!r}.",
                    near(model, MODELS),
                    f"Name {listing(map(repr, MODELS), 'or')}, or give an estimator of scikit-learn.",
                )
            )
        return None
    if isinstance(model, type) or not all(hasattr(model, method) for method in ("fit", "get_params")):
        shown = f"the class {model.__name__}: make one, {model.__name__}()" if isinstance(model, type) else repr(model)
        raise RequestError(
            f"The model must be {listing(map(repr, MODELS), 'or')}, or an estimator of scikit-learn, not {shown}."
        )
    return True if is_classifier(model) else False if is_regressor(model) else None


def estimator_of(model: object, *, is_classes: bool) -> Any:
    """Return the estimator that `model` names, or `model` itself."""
    from sklearn import ensemble, linear_model, svm
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not isinstance(model, str):
        return model
    classifiers = {
        "svm": svm.SVC(C=10),
        "logistic": linear_model.LogisticRegression(max_iter=1000),
        "forest": ensemble.RandomForestClassifier(random_state=0),
    }
    regressors = {
        # Its tolerance is in units of the target, so that a target in thousands would not be learned.
        "svm": TransformedTargetRegressor(svm.SVR(C=10), transformer=StandardScaler()),
        "logistic": linear_model.RidgeCV(alphas=(1, 10, 100, 1000, 10000)),
        "forest": ensemble.RandomForestRegressor(random_state=0),
    }
    chosen = (classifiers if is_classes else regressors)[model]
    return chosen if model == "forest" else make_pipeline(StandardScaler(), chosen)


def scorer_of(estimator: Any, scoring: Any) -> tuple[str, Any]:
    """Return what the score is called, and what gives it."""
    from sklearn.base import is_classifier, is_regressor
    from sklearn.metrics import check_scoring, get_scorer_names

    if scoring is not None and not callable(scoring) and scoring not in get_scorer_names():
        raise RequestError(
            sentences(
                f"scoring takes a name or a scorer of scikit-learn, not {scoring!r}.",
                near(str(scoring), get_scorer_names()),
            )
        )
    try:
        scorer = check_scoring(estimator, scoring=scoring)
    except TypeError as error:
        raise RequestError(
            f"{type(estimator).__name__} has no score of its own: name one with scoring=, e.g. 'accuracy'."
        ) from error
    if scoring is not None:
        return scoring if isinstance(scoring, str) else getattr(scoring, "__name__", "score"), scorer
    own = any(name.split("__")[-1] == "scoring" and value for name, value in estimator.get_params().items())
    name = "score" if own else "accuracy" if is_classifier(estimator) else "R²" if is_regressor(estimator) else "score"
    return name, scorer


def written(estimator: Any) -> str:
    """Write an estimator in one line."""
    steps = [step for _, step in getattr(estimator, "steps", [("", estimator)])]
    text = " → ".join(" ".join(repr(step).split()).removesuffix("()") for step in steps)
    return text if len(text) <= WORDS_SHOWN else text[: WORDS_SHOWN - 1] + "…"
