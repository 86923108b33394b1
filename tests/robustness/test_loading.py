"""Loading, using and unloading the extension again and again leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mutations import TIMES
from tests.robustness.tries import Trials, said_by

pytestmark = [pytest.mark.slow, pytest.mark.robustness]


def test_loading_and_unloading_again_and_again_leaves_nothing_behind(tmp_path: Path, trials: Trials) -> None:
    said = said_by("tests.unload_child", 20 * TIMES, folder=tmp_path)
    assert said["after"] == said["before"]
    assert "ExtractMagics" not in said["after"]["registry"]
    assert said["bytes"] < 20_000_000 * TIMES
    trials["loaded and unloaded"] = 20 * TIMES
    print(json.dumps(said))
