"""A cell interrupted at any line, or a panel cancelled at any moment, can run again, and nothing is half attached."""

from __future__ import annotations

import random
import tempfile
import threading
import time

import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import nbfeat
from nbfeat import Panel
from nbfeat.jupyter.job import State
from tests.extraction.test_interrupts import Interrupted
from tests.memory import IN_MEMORY
from tests.mutations import TIMES

pytestmark = [pytest.mark.usefixtures("fake_network"), pytest.mark.slow]
BLOCKS = ("MobileNet --size 32 --normalize standard", "MobileNet --size 32 --layer x --prefix mean")
ROOMS = ("jupyter", "extraction")


def is_attached(frame: pd.DataFrame, given: pd.DataFrame, expected: pd.DataFrame) -> bool:
    """Return whether `frame` has all columns, or is the `given` one; fail if it is anything between."""
    if frame is given:
        assert list(given.columns) == ["path", "label", "split"]
        return False
    pd.testing.assert_frame_equal(frame, expected, rtol=1e-4, atol=1e-4)
    return True


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt in a finalizer
@pytest.mark.parametrize("option", ["", "--no-cache", "--into more"])
def test_a_cell_that_was_interrupted_at_any_line_runs_again(
    notebook: InteractiveShell, photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    generator, names = random.Random(7), notebook.user_ns
    name = "more" if "into" in option else "photos"
    expected = nbfeat.extract(photos, *BLOCKS, images="path", cache=False).frame

    def run(interrupt: Interrupted) -> None:
        with capture_output(), interrupt.here():
            line = f"photos --images path --batch-size 4 {option}"
            assert notebook.run_cell_magic("extract", line, "\n".join(BLOCKS)).frame is names[name]

    def interrupted(*at: int) -> int:
        names["photos"] = names["more"] = photos
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as home:
            monkeypatch.setenv("NBFEAT_HOME", home)
            for interrupt in [Interrupted(line, rooms=ROOMS) for line in at]:
                run(interrupt)
                is_attached(names[name], photos, expected)
            run(last := Interrupted(0, rooms=ROOMS))
            assert is_attached(names[name], photos, expected), at
            assert name == "photos" or names["photos"] is photos
        return last.lines

    lines = interrupted()
    for at in generator.sample(range(1, lines), 5 * TIMES):
        interrupted(at, generator.randrange(1, lines))


@pytest.mark.parametrize("cache", [True, False])
def test_a_panel_that_is_cancelled_at_random_moments_goes_on(
    notebook: InteractiveShell, photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, *, cache: bool
) -> None:
    generator, names = random.Random(11), notebook.user_ns
    monkeypatch.setattr(notebook.magics_manager.registry["ExtractMagics"], "cache", cache)
    expected = nbfeat.extract(photos, BLOCKS[0], images="path", cache=False).frame
    one, cancelled = Panel("photos"), 0
    card = one.blocks.cards[0]
    card.backbone.value, card.options["size"].value, card.options["normalize"].value = "MobileNet", 32, "standard"
    one.options["batch_size"].value = 1
    for _ in range(8 * TIMES):
        names["photos"] = photos
        for _ in range(generator.randrange(1, 5)):
            one.extract_button.click()
            time.sleep(generator.choice([0, 0.02]) * generator.random())
            one.cancel_button.click()
            is_attached(names["photos"], photos, expected)
            if generator.random() < 0.7:
                assert one.wait(30)
                cancelled += one.state is State.CANCELLED
        assert one.wait(30)
        is_attached(names["photos"], photos, expected)
        if one.state is not State.DONE:  # the last of the runs
            one.extract_button.click()
            assert one.wait(30)
        assert (one.state, one.problem) == (State.DONE, "")
        assert is_attached(names["photos"], photos, expected)
        assert one.result is not None
        assert one.result.done == len(photos)
        assert not np.isnan(one.result.features.to_numpy()).any()
    assert cancelled
    one.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "nbfeat-job"]
