"""The benchmark's own work on a pretended network: what its rows say, not how fast anything is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.benchmarks import accuracy, fresh, others, ways
from tests.benchmarks.measure import MissingError, Setting, Table, in_rounds
from tests.benchmarks.processes import Child
from tests.benchmarks.speed import printed
from tests.benchmarks.ways import Limit, Ours
from tests.fake import FakeEngine


def fixed(*values: float) -> Callable[[], float]:
    """Return what measures these values, round after round."""
    left = list(values)
    return lambda: left.pop(0)


def failing(error: Exception) -> Callable[[], float]:
    def measured() -> float:
        raise error

    return measured


def test_ratios_are_taken_within_a_round_and_a_failing_way_stops_no_other() -> None:
    found = in_rounds({"slow": fixed(1, 2, 4), "odd": failing(ValueError("no\nmore")), "fast": fixed(3, 8, 8)}, 3)
    assert found.typical("fast") == 8
    assert found.ratio("fast", "slow") == 3  # of 3, 4 and 2; of the medians it would be 4
    assert found.missing == {"odd": "failed: ValueError: no"}
    assert not found.has("slow", "odd")


def test_a_way_that_fails_in_a_later_round_has_no_figure() -> None:
    found = in_rounds({"late": fixed(1.0), "good": fixed(1, 1)}, 2)
    assert list(found.values) == ["good"]
    assert "IndexError" in found.missing["late"]


def test_rows_compare_each_way_with_the_loop_and_the_limit_of_its_precision() -> None:
    measured = {
        ways.LOOP: fixed(10),
        "PyTorch, bfloat16": fixed(40),
        "gone": failing(MissingError("not installed: timm")),
        "limit, float32": fixed(50),
        "limit, bfloat16": fixed(80),
        "**nbfeat, auto** (here float32)": fixed(45),
    }
    assert ways.shown(in_rounds(measured, 1), list(measured)) == [
        (ways.LOOP, "10.0", "1.00×", "20%"),
        ("PyTorch, bfloat16", "40.0", "4.0×", "50%"),
        ("gone", "not installed: timm"),
        ("**nbfeat, auto** (here float32)", "45.0", "4.5×", "90%"),
        ("limit, float32", "50.0", "5.0×", ""),
        ("limit, bfloat16", "80.0", "8.0×", ""),
    ]


def test_nbfeat_is_measured_through_an_extraction(fake_network: type[FakeEngine], pictures: Path) -> None:
    ours = Ours(sorted(map(str, pictures.glob("*.png"))), "ResNet50", "auto")
    with pytest.raises(MissingError):
        ours.whole()
    assert ours.steady() >= ours.whole() > 0
    assert ours.precision == "float32"
    ours.steady()
    assert fake_network.computed == 40, "the cache was used"


def test_the_cache_is_measured_empty_and_full(
    fake_network: type[FakeEngine], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limit, "rate", staticmethod(failing(MissingError("not here"))))
    setting = Setting(tmp_path, rounds=2)
    setting.files = sorted(map(str, pictures.glob("*.png")))
    without, first, again, limit = ways.cache_rows(setting)
    assert (without[2], limit) == ("1.00×", (ways.BEST, "not here"))
    assert first[0] == ways.FIRST
    assert again[3] == ""
    assert fake_network.computed == 20 * (1 + 2 + 2), "of seven runs and more, those with a full cache compute nothing"


def test_a_table_is_github_markdown() -> None:
    table = Table("Title", ("way", "rate"), [("a|b", "1"), ("gone",)], "A note.")
    assert table.markdown() == "### Title\n\n| way | rate |\n| --- | ---: |\n| a\\|b | 1 |\n| gone |  |\n\nA note."


def test_a_section_that_cannot_run_says_why() -> None:
    def tables() -> Iterator[Table]:
        yield Table("One", ("a",), [])
        raise MissingError("no photographs here")

    first, second = printed("accuracy", tables())
    assert first.startswith("### One")
    assert second == "### accuracy\n\nNot measured: no photographs here."


def test_the_images_that_growth_draws_are_all_different(tmp_path: Path) -> None:
    fresh.draw(tmp_path / "small", 500)
    files = sorted((tmp_path / "small").iterdir())
    assert [file.name for file in files[:2]] == ["000000.jpg", "000001.jpg"]
    assert len({file.read_bytes() for file in files}) == len(files) == 500


def test_growth_tells_a_bend_and_memory_that_grows() -> None:
    straight = {size: 2 + size / 500 for size in fresh.SIZES}
    flat = dict.fromkeys(straight, 100.0)
    assert {row[4] for row in fresh.growth_rows(straight, straight, flat, flat)} <= {"+0.0%", "-0.0%"}
    assert "at most 0.0% beside" in fresh.growth_note(straight, flat, flat)
    assert "+0.0 MB from 1,000 to 100,000 images" in fresh.growth_note(straight, flat, flat)
    bent = {**straight, 100_000: 400.0}
    assert "at most 0.0% beside" not in fresh.growth_note(bent, flat, flat)
    assert "+99.0 MB" in fresh.growth_note(straight, {size: size / 1_000 for size in straight}, flat)


def test_accuracy_says_which_precision_auto_chose(fake_network: type[FakeEngine], pictures: Path) -> None:
    assert fake_network
    files = sorted(map(str, pictures.glob("*.png")))
    frame = pd.DataFrame({"path": files, "label": [str(number % 4) for number in range(20)]})
    rows, _ = accuracy.of_network(frame, "Some", "ResNet50", {})
    assert [row[1] for row in rows] == ["float32", "auto: float32", "bfloat16"]
    assert rows[1][3:] == ("+0.000 ± 0.000", "1.0000", "1.0000")


def test_precisions_are_compared_fold_by_fold() -> None:
    exact = np.eye(4, dtype=np.float32)
    other = exact.copy()
    other[0] = [1, 1, 0, 0]
    told = accuracy.compared(other, np.array([0.5, 0.7]), exact, np.array([0.6, 0.6]))
    assert told == ("+0.000 ± 0.100", "0.7071", "0.9268")


def test_a_way_answers_with_seconds_or_what_it_lacks_and_warms_up_once() -> None:
    given: list[list[str]] = []

    def way(files: list[str], precision: str) -> others.Answer:
        given.append(files)
        if precision == "none":
            raise ImportError("", name="timm")
        return {"torch": precision + " 3"}

    warm: set[str] = set()
    request = {"way": "way", "files": ["a", "b"], "first": 1, "precision": "float32"}
    answers = [others.answer({"way": way}, dict(request), warm) for _ in range(2)]
    assert given == [["a"], ["a", "b"], ["a", "b"]]
    assert all(answer["torch"] == "float32 3" and answer["seconds"] >= 0 for answer in answers)
    assert others.answer({"way": way}, {**request, "precision": "none"}, warm) == {"missing": "timm"}


@pytest.mark.slow
def test_a_process_that_ends_is_a_row_that_says_so() -> None:
    child = Child("no_such_module")
    with pytest.raises(MissingError, match="failed: its process ended with 1"):
        child.rate("way", ["a"])
    assert json.dumps(child.told) == "{}"
