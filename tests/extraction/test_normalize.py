"""Normalization of rows that are known, by the book."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from threadpoolctl import threadpool_limits

from nbfeat import FeatureBlock, RequestError
from nbfeat.extraction import normalize
from nbfeat.extraction.normalize import Learner, Normalizer, learn

ROWS = np.random.default_rng(0).gamma(0.5, 9, (60, 7)).astype(np.float32)
ALL = np.ones(60, bool)


def block(options: str) -> FeatureBlock:
    return FeatureBlock.parse(f"MobileNet {options}")[0]


def test_rows_of_any_length_become_unit_rows_but_those_of_zeros() -> None:
    lengths = np.array([1e-12, 0.5, 1, 7, 1e12, 0])
    rows = (np.eye(6) * lengths).astype(np.float32)
    rows[:5, 5] = rows[:5].sum(axis=1)
    found = learn(block("--normalize l2"), rows, np.ones(6, bool)).applied_to(rows)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 1, 1, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("--normalize standard", [StandardScaler()]),
        ("--normalize minmax", [MinMaxScaler()]),
        ("--components 3", [PCA(3, random_state=0)]),
        ("--normalize whiten --components 3", [PCA(3, whiten=True, random_state=0)]),
        ("--normalize minmax --components 3", [MinMaxScaler(), PCA(3, random_state=0)]),
    ],
)
def test_it_is_what_scikit_learn_fits_on_the_chosen_rows(
    options: str, steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = np.arange(60) % 3 > 0
    normalizer = learn(block(options), ROWS, chosen)
    expected, fitted = ROWS, ROWS[chosen]
    for step in steps:
        step.fit(fitted)
        expected, fitted = step.transform(expected), step.transform(fitted)
    np.testing.assert_allclose(normalizer.applied_to(ROWS), expected, rtol=1e-4, atol=1e-4)
    assert normalizer.rank == (3 if "components" in options else 0)
    monkeypatch.setattr(normalize, "CHUNK", 7)
    np.testing.assert_array_equal(normalizer.apply(ROWS.copy()), normalizer.applied_to(ROWS))


def test_the_axes_of_many_rows_come_from_one_seed() -> None:
    rows = np.random.default_rng(0).normal(size=(501, 60)).astype(np.float32)  # for which scikit-learn draws lots
    normalizer = learn(block("--components 3"), rows, np.ones(501, bool))
    assert normalizer.axes is not None
    np.testing.assert_allclose(normalizer.axes, PCA(3, random_state=0).fit(rows).components_, rtol=1e-4, atol=1e-4)


def test_projections_do_not_depend_on_the_number_of_threads() -> None:
    axes, rows = (np.random.default_rng(0).normal(size=(n, 20_000)).astype(np.float32) for n in (33, 3))
    normalizer = Normalizer(center=np.zeros(20_000, np.float32), axes=axes)
    with threadpool_limits(1, "blas"):
        expected = [axes @ row for row in rows]
    for threads in (1, 2):
        with threadpool_limits(threads, "blas"):
            np.testing.assert_array_equal(normalizer.apply(rows), expected)


@pytest.mark.parametrize("name", ["standard", "minmax"])
def test_rows_that_come_in_chunks_are_fitted_as_those_that_come_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalize, "FITTED_AT_ONCE", 8)
    learner = Learner(block(f"--normalize {name}"), 7)
    with pytest.raises(RequestError, match="none of the rows to fit on has features"):
        learner.learned()
    for rows in (ROWS[:0], ROWS[:1], ROWS[1:33], ROWS[33:]):
        learner.see(rows)
    found, expected = learner.learned(), learn(block(f"--normalize {name}"), ROWS, ALL)
    np.testing.assert_allclose(found.applied_to(ROWS), expected.applied_to(ROWS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", ["none", "l2", "standard", "minmax", "whiten"])
def test_rows_without_variance_have_components_of_zero(normalize: str) -> None:
    for rows in (ROWS[:1], np.zeros((5, 7), np.float32)):
        learned = learn(block(f"--normalize {normalize} --components 1"), rows, np.full(len(rows), True))
        np.testing.assert_array_equal(learned.apply(rows.copy()), np.zeros((len(rows), 1)))
        assert np.isfinite(learned.apply(ROWS.copy())).all()


@pytest.mark.parametrize(("count", "width", "most"), [(5, 7, 5), (7, 6, 6), (9, 7, 7)])
def test_components_are_at_most_the_rows_and_the_features(count: int, width: int, most: int) -> None:
    rows, chosen = ROWS[:, :width], np.arange(60) < count
    assert learn(block(f"--components {most}"), rows, chosen).apply(rows).shape == (60, most)
    words = f"{most + 1}` is too many for {width} features of MobileNet and {count} rows .*components={most}`"
    with pytest.raises(RequestError, match=words):
        learn(block(f"--components {most + 1}"), rows, chosen)
