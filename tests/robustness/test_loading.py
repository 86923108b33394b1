"""Loading, using and unloading the extension a hundred times leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mutations import TIMES
from tests.robustness.tries import Trials, said_by

pytestmark = [pytest.mark.slow, pytest.mark.robustness]


def test_loading_and_unloading_a_hundred_times_leaves_nothing_behind(tmp_path: Path, trials: Trials) -> None:
    said = said_by("tests.unload_child", 100 * TIMES, folder=tmp_path)
    assert said["after"] == said["before"]
    assert "ExtractMagics" not in said["after"]["registry"]
    assert said["bytes"] < 20_000_000 * TIMES
    trials["loaded and unloaded"] = 100 * TIMES
    print(json.dumps(said))
