"""The profile of a run, and its sentence about the bottleneck."""

from __future__ import annotations

import re
import time
from typing import Any

import pandas as pd
import pytest

import nbfeat
from nbfeat.extraction import pipeline
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.profile import Profile, Timings
from nbfeat.extraction.report import headline, pace
from nbfeat.extraction.run import Step
from nbfeat.jupyter.progress import progress
from tests.fake import FakeEngine

BLOCK = "MobileNet --size 32"


def run(frame: pd.DataFrame) -> Extraction:
    return nbfeat.extract(frame, BLOCK, images="path")


def slowed(function: Any) -> Any:
    def slow(*args: Any, **options: Any) -> Any:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass  # busy, not sleeping
        return function(*args, **options)

    return slow


@pytest.mark.usefixtures("fake_network")
def test_slow_decoding_is_found_to_be_the_bottleneck(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbfeat.extraction.pipeline.pixels_of", slowed(pipeline.__dict__["pixels_of"]))
    extraction = Extraction(photos, BLOCK, images="path")
    steps = list(extraction.steps())
    assert "bottleneck: decoding images" in progress(steps[-1])
    assert extraction.profile["decoding"] >= 20 * 0.02
    assert extraction.profile.sentence.startswith("Decoding is the bottleneck: the network waited for images in ")
    assert "bottleneck: decoding" in repr(extraction)


@pytest.mark.usefixtures("fake_network")
def test_slow_files_are_found_to_be_the_bottleneck(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    load = pipeline.__dict__["load_image"]

    def far(*given: Any) -> Any:
        time.sleep(0.02)
        return load(*given)

    monkeypatch.setattr("nbfeat.extraction.pipeline.load_image", far)
    profile = run(photos).profile
    assert profile["reading"] >= 20 * 0.02
    assert profile.sentence.startswith("Reading is the bottleneck: the network waited for images in ")


@pytest.mark.usefixtures("fake_network")
def test_a_slow_network_is_found_to_be_the_bottleneck(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = FakeEngine.collect

    def slow(engine: FakeEngine) -> Any:
        time.sleep(0.1)
        engine.work.seconds += 0.1
        return collect(engine)

    monkeypatch.setattr(FakeEngine, "collect", slow)
    profile = run(photos).profile
    assert profile["network"] == pytest.approx(0.3)  # three batches
    assert profile.sentence.startswith("The network is the bottleneck: images waited for it in ")


@pytest.mark.usefixtures("fake_network")
def test_where_all_is_in_the_cache_nothing_is_the_bottleneck(photos: pd.DataFrame) -> None:
    run(photos)
    profile = run(photos).profile
    assert profile["decoding"] == profile["network"] == 0
    assert profile["cache"] > 0
    assert profile["bottleneck"] is None
    assert profile.sentence == "Nothing had to be computed."


@pytest.mark.slow
def test_a_real_engine_says_how_long_it_was_at_work(photos: pd.DataFrame) -> None:
    result = nbfeat.extract(photos, "MobileNet --alpha 0.25 --size 64 --weights random", images="path")
    profile = result.profile
    assert 0 < profile["network"] <= profile["total"]
    assert all(profile[name] > 0 for name in ("preparing", "reading", "decoding", "cache", "attaching"))


def test_it_reads_as_a_table_and_a_sentence() -> None:
    timings = Timings(preparing=1.25, reading=0.5, decoding=3, network=2, recalling=0.25, keeping=0.5, attaching=0.125,
                      waiting_for_images=2.5, waiting_for_network=0.1)  # fmt: skip
    profile = Profile(timings, seconds=6, computed=True)
    assert dict(profile) == {
        "preparing": 1.25, "reading": 0.5, "decoding": 3, "network": 2, "cache": 0.75, "attaching": 0.125, "total": 6,
        "bottleneck": "decoding",
    }  # fmt: skip
    lines = repr(profile).splitlines()
    assert lines[0].split() == ["work", "seconds"]
    assert lines[3].startswith("decoding      3.00  decoding and resizing, summed over threads")
    told = "Decoding is the bottleneck: the network waited for images in 2.5 of 6.0 s."
    assert lines[-1] == profile.sentence == f"{told} Try more cores or smaller images."
    assert "<td" in profile._repr_html_()
    assert "waited for images in 2.5 of 6.0 s" in profile._repr_html_()


@pytest.mark.parametrize(
    ("rate", "told"), [(0.034, "0.034"), (0.5, "0.5"), (2.0, "2"), (2.04, "2"), (12.4, "12"), (1234.5, "1,234")]
)
def test_a_slow_run_is_not_told_as_none_a_second(rate: float, told: str) -> None:
    assert pace(rate) == f"{told} images/s"
    step = Step(2, 2, 0, 0, 60, rate, None, None)
    assert headline("5 new columns from", step, 0) == f"5 new columns from 2 images in 60.0 s ({told} images/s)"


def test_seconds_are_set_with_their_points_below_each_other() -> None:
    profile = Profile(Timings(network=12_345, reading=0.5), seconds=12_345.5, computed=True)
    lines = [line for line in repr(profile).splitlines() if re.search(r"\d\.\d\d ", line)]
    assert len(lines) == 7
    assert {line.index(".") for line in lines} == {lines[0].index(".")}
    shown = re.findall(r">([\d,.\N{FIGURE SPACE}]+\.\d\d)<", profile._repr_html_())
    assert [len(number) for number in shown] == [9] * 7
