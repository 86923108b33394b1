"""Damaged networks and weights of Keras are read or refused in a sentence, and run nothing; so are PyTorch's."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from tests.memory import IN_MEMORY
from tests.mutations import TIMES
from tests.robustness.tries import Trials, said_by

pytestmark = [pytest.mark.slow, pytest.mark.robustness]


def test_damaged_networks_and_weights_are_read_or_refused(trials: Trials) -> None:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        said = said_by("tests.robustness.networks", 150 * TIMES, folder=Path(folder))
    assert said["odd"] == []
    assert said["seen"] == []
    assert said["left"] == []
    trials.update(said["outcomes"])
    assert trials.total() == 150 * TIMES
    for kind in (".keras", ".weights.h5", ".h5"):
        assert trials[f"{kind} refused"] > trials.total() / 10
    assert any(re.search("loaded right", outcome) for outcome in trials)
