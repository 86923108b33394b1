"""The panel: what it offers, writes, shows in every state, and leaves alone."""

from __future__ import annotations

import gc
import importlib.util
import random
import re
import threading
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from ipywidgets import HTML, Widget
from ipywidgets.widgets.widget import _instances
from jupyter_client.manager import start_new_kernel

import nbfeat
from nbfeat import Extraction, Panel, RequestError
from nbfeat.explore import scoring
from nbfeat.extraction.options import BLOCK_OPTIONS, RUN_OPTIONS
from nbfeat.html import Html
from nbfeat.images.sources import read_thumbnail
from nbfeat.jupyter import grammar
from nbfeat.jupyter.grammar import expand, literal
from nbfeat.jupyter.job import State
from nbfeat.jupyter.panel import panel, result, source
from nbfeat.jupyter.panel.blocks import FIRST
from nbfeat.jupyter.panel.result import LOOKS
from nbfeat.jupyter.panel.widgets import DEFAULT, tree
from tests.conftest import ROOT
from tests.faces import run_cell
from tests.fake import FakeEngine, Gate
from tests.look import detailed, difference, shown

pytestmark = pytest.mark.usefixtures("fake_network")
EVIL = "<img src=x onerror=alert(1)>"
SMALL = "MobileNet"
Open = Callable[..., Panel]


@pytest.fixture
def opened(notebook: InteractiveShell) -> Iterator[Open]:
    """Open panels that are closed after the test."""
    panels: list[Panel] = []

    def open_panel(frame: Any = "photos") -> Panel:
        panels.append(Panel(frame))
        card = panels[-1].blocks.cards[0]
        card.backbone.value, card.options["size"].value = SMALL, 32
        panels[-1].options["batch_size"].value = 4
        return panels[-1]

    yield open_panel
    for one in panels:
        one.close()
        assert one.wait(30)
    assert not [one for one in notebook.events.callbacks["post_run_cell"] if one.__name__ == "_after_a_cell"]


def settle() -> None:
    """Wait until what is shown is of what is chosen."""
    for thread in threading.enumerate():
        if thread.name in {"nbfeat-look", "nbfeat-page"}:
            thread.join(30)


def finished(one: Panel) -> Panel:
    one.extract_button.click()
    assert one.wait(30)
    return one


def values_of(dropdown: Any) -> list[Any]:
    return [value for _, value in dropdown.options]


def show_page(one: Panel, page: str) -> str:
    one.results.pages.value = page
    settle()
    return str(one.results.page.value)


# States


def check_look(one: Panel, state: State) -> None:
    sign, word, _ = LOOKS[state]
    assert one.state is state
    assert one.extract_button.disabled is (state in {State.RUNNING, State.CANCELLING})
    assert one.cancel_button.disabled is (state is not State.RUNNING)
    assert f"{sign} {word}" in one._progress.value
    assert word in one._spoken.value
    assert ("height:6px" in one._progress.value) is (state not in {State.IDLE, State.FAILED})
    assert bool(one.results.box.children) is (state is State.DONE)
    assert state.value in repr(one)


def test_every_state_and_transition_as_it_is_clicked(opened: Open, notebook: InteractiveShell, gate: Gate) -> None:
    assert set(LOOKS) == set(State)
    assert len({sign for sign, _, _ in LOOKS.values()}) == len({word for _, word, _ in LOOKS.values()}) == len(State)
    before = notebook.user_ns["photos"]
    one = opened()
    check_look(one, State.IDLE)
    one.cancel_button.click()
    check_look(one, State.IDLE)
    one.extract_button.click()
    check_look(one, State.RUNNING)
    one.extract_button.click()  # a second click that was on its way
    one.cancel_button.click()
    check_look(one, State.CANCELLING)
    gate.open()
    assert one.wait(30)
    check_look(one, State.CANCELLED)
    assert "photos is unchanged · press Extract to resume (finished features are cached)" in one._progress.value
    assert notebook.user_ns["photos"] is before
    first = one.job
    check_look(finished(one), State.DONE)
    assert one.job is first, "it did not go on"
    assert "photos has 48 new columns · 20 of 20 images" in one._progress.value
    assert notebook.user_ns["photos"].shape == (20, 51)
    assert before.shape == (20, 3)
    check_look(finished(one), State.DONE)  # again: its own columns are replaced
    assert notebook.user_ns["photos"].shape == (20, 51)
    assert "(replaced)" in one.results.page.value
    one.extract()
    one.cancel()
    assert one.wait(30)
    second = one.job
    one.blocks.cards[0].options["prefix"].value = "other"  # another choice after cancelling: it starts from scratch
    assert finished(one).job is not second
    assert one.result is not None
    assert one.result.columns[0] == "other_0000"


def test_a_run_that_fails_says_why_and_the_next_may_not(
    opened: Open, notebook: InteractiveShell, photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: FakeEngine) -> None:
        raise OSError(f"loose {EVIL}")

    lost = photos.assign(path="gone.png")
    notebook.user_ns["photos"] = lost
    one = finished(opened())
    check_look(one, State.FAILED)
    assert "None of the 20 images could be read" in one._progress.value
    assert notebook.user_ns["photos"] is lost
    notebook.user_ns["photos"] = photos
    check_look(finished(one), State.DONE)
    notebook.user_ns["photos"] = lost
    check_look(finished(one), State.FAILED)  # without the result of an earlier run
    notebook.user_ns["photos"] = photos
    one.options["no_cache"].value = True
    monkeypatch.setattr(FakeEngine, "collect", broken)
    check_look(finished(one), State.FAILED)
    assert "OSError: loose &lt;img" in one._progress.value


def test_while_it_runs_one_widget_changes_a_few_times_and_the_last_state_is_shown(
    opened: Open, notebook: InteractiveShell, photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many steps there are: above 1,000 messages a second the server drops some, perhaps the last."""
    notebook.user_ns["photos"] = pd.concat([photos] * 15, ignore_index=True)
    one = opened()
    one.options["batch_size"].value = 1
    settle()
    monkeypatch.setattr(panel, "SECONDS_BETWEEN", 1e9)
    changed: list[str] = []
    for widget in tree(one.box):
        if widget.has_trait("value") or widget.has_trait("disabled"):
            widget.observe(lambda change: changed.append(change["name"]), ["value", "disabled"])
    check_look(finished(one), State.DONE)
    assert one.job is not None
    assert one.job.step is not None
    assert one.job.step.done == 300
    assert len(changed) < 25


# Names


def test_the_new_frame_gets_the_name_that_is_typed(opened: Open, notebook: InteractiveShell, gate: Gate) -> None:
    before = notebook.user_ns["photos"]
    one = opened()
    assert one.options["into"].placeholder == "photos"
    one.options["into"].value = "two words"
    assert "“New dataframe” must be a variable name" in one._problem.value
    one.options["into"].value = "more"
    assert one.code == "%%extract photos --images path --into more --batch-size 4\nMobileNet --size 32"
    one.extract_button.click()
    one.cancel_button.click()
    gate.open()
    assert one.wait(30)
    assert "photos is unchanged" in one._progress.value
    check_look(finished(one), State.DONE)
    assert "more has 48 new columns" in one._progress.value
    assert notebook.user_ns["more"].shape == (20, 51)
    assert notebook.user_ns["photos"] is before


def test_the_frame_is_bound_between_cells(opened: Open, notebook: InteractiveShell) -> None:
    notebook.user_ns["one"] = one = opened()
    cell = """
before = photos
one.extract()
while not one.job.is_binding: pass
assert photos is before
"""
    with capture_output():
        assert notebook.run_cell(cell).success
    assert one.wait(30)
    check_look(one, State.DONE)
    assert notebook.user_ns["photos"].shape == (20, 51)
    assert notebook.user_ns["before"].shape == (20, 3)
    assert "photos · 20 × 51" in [label for label, _ in one.source.frame.options]


def test_a_cell_that_waits_binds_the_frame_itself(opened: Open, notebook: InteractiveShell, gate: Gate) -> None:
    """Its own end, between cells, is what it would wait for else."""
    notebook.user_ns["one"] = one = opened()
    assert run_cell(notebook, "one.extract(); one.wait(0)") is False
    run_cell(notebook, "one.cancel()")
    gate.open()
    assert run_cell(notebook, "one.wait(30), photos.shape, one.state.value") == (True, (20, 3), "cancelled")
    assert run_cell(notebook, "one.extract(); one.wait(30), photos.shape") == (True, (20, 51))
    assert run_cell(notebook, "one.wait()") is True, "it waited for what has ended"
    check_look(one, State.DONE)
    bound = notebook.user_ns["photos"]
    notebook.run_cell("1")
    assert notebook.user_ns["photos"] is bound, "it was bound a second time"


def test_a_frame_that_changes_meanwhile_keeps_its_changes_and_a_deleted_one_is_not_brought_back(
    opened: Open, notebook: InteractiveShell, gate: Gate, photos: pd.DataFrame
) -> None:
    one = opened()
    one.extract()
    photos["new"] = 1
    gate.let(5)
    assert one.wait(30)
    assert list(notebook.user_ns["photos"].columns[:5]) == ["path", "label", "split", "new", "mobilenet_0000"]
    one.blocks.cards[0].options["size"].value = 64
    one.extract()
    frame = notebook.user_ns.pop("photos")
    gate.open()
    assert one.wait(30)
    check_look(one, State.FAILED)
    assert "photos no longer exists" in one._progress.value
    assert "photos" not in notebook.user_ns
    notebook.run_cell("1")
    assert "have a dataframe yet" in one.source.missing.value
    assert one.extract_button.disabled
    notebook.user_ns["photos"] = frame
    notebook.run_cell("1")
    check_look(finished(one), State.DONE)
    assert FakeEngine.computed == 40, "what was kept was computed again"


def test_a_choice_made_while_another_thread_fills_the_widgets_counts(
    opened: Open, notebook: InteractiveShell, photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook.user_ns["others"] = photos.iloc[:5].copy()
    one = opened()
    is_filling, go_on = threading.Event(), threading.Event()

    def queries(_: pd.DataFrame) -> list[str]:
        is_filling.set()
        assert go_on.wait(30)
        return []

    monkeypatch.setattr(source, "queries", queries)
    filling = threading.Thread(target=one.source.refresh)
    choosing = threading.Thread(target=lambda: setattr(one.source.frame, "value", "others"))
    filling.start()
    assert is_filling.wait(30)
    choosing.start()
    choosing.join(0.2)  # it may wait for its turn, but must not be forgotten
    go_on.set()
    filling.join(30)
    choosing.join(30)
    assert "%%extract others" in one.code


def test_frames_that_cells_make_are_offered_and_two_panels_run_at_once(
    opened: Open, notebook: InteractiveShell, gate: Gate
) -> None:
    one = opened()
    notebook.run_cell("more = photos.iloc[:7]; _hidden = photos; deep = photos.copy()")
    assert values_of(one.source.frame) == ["photos", "more", "deep"]
    deep = notebook.user_ns["deep"]
    deep.columns = pd.MultiIndex.from_product([["a"], deep.columns])
    one.source.frame.value = "deep"
    assert "MultiIndex columns" in one._problem.value
    one.source.frame.value = "more"
    assert not one.problem
    assert "%%extract more" in one.code
    two = opened("photos")
    two.blocks.cards[0].options["prefix"].value = "two"
    one.extract()
    two.extract()
    assert one.state is two.state is State.RUNNING
    gate.open()
    assert one.wait(30)
    assert two.wait(30)
    assert notebook.user_ns["more"].shape == (7, 51)
    assert list(notebook.user_ns["photos"].columns[3:5]) == ["two_0000", "two_0001"]


def test_the_frame_may_be_given_itself_by_name_or_not_at_all(
    opened: Open, notebook: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = notebook.user_ns["photos"]
    notebook.user_ns |= {"a": pd.DataFrame({"n": [1]}), "_hidden": photos.copy(), "a" * 300: photos.iloc[:3]}
    for given in (None, "photos", photos):
        assert opened(given).source.frame.value == "photos"
    assert repr(opened("photos")) == "Panel(photos, idle)"
    assert len(repr(opened("a" * 300))) <= 110
    for wrong, words in (
        (photos.copy(), "Give it one first"), ("_hidden", "Give it one first"), ("foto", "'foto' is not def.*photos"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            Panel(wrong)
    monkeypatch.setattr(panel, "get_ipython", lambda: None)
    with pytest.raises(RequestError, match=r"works only in a notebook.*nbfeat\.extract"):
        nbfeat.Panel()


# The code


def request_of(code: str, settings: dict[str, Any]) -> grammar.Request:
    """Read a cell as the magic does."""
    head, *body = [expand(line, {}) for line in code.split("\n")]
    request = grammar.read(head.removeprefix("%%extract "), "\n".join(body), settings)
    assert request is not None
    return request


def test_the_table_of_options_is_what_the_panel_offers(opened: Open) -> None:
    one = opened()
    assert list(one.blocks.cards[0].options) == [option.name for option in BLOCK_OPTIONS]
    elsewhere_or_free_text = {"images", "fit_on", "root", "like", "parquet"}
    no_matter_here = {"quiet", "help", "on"}
    run = {option.name for option in RUN_OPTIONS}
    assert run - set(one.options) == elsewhere_or_free_text | no_matter_here
    for option in (*BLOCK_OPTIONS, *(option for option in RUN_OPTIONS if option.name in one.options)):
        widget = {**one.blocks.cards[0].options, **one.options}[option.name]
        if option.choices:
            assert set(values_of(widget)) - {DEFAULT} <= set(option.choices)
            assert len(widget.options) == len(option.choices) + (option.default not in option.choices)
        assert option.help == widget.tooltip
        assert widget.description


def test_the_code_reads_back_to_what_was_chosen(opened: Open) -> None:
    chance, one, understood = random.Random(0), opened(), 0
    one.blocks.add()
    prefixes = ["", "a b", "-x", "{y}", "$path", "it's", '"', "#1", "é;", "a;"]
    for _ in range(12):
        for card in one.blocks.cards:
            card.backbone.value = chance.choice(["VGG16", "MobileNetV2", "EfficientNetLite0", "ResNet50"])
        with one._kit.filling():  # all at once
            for widgets in (*(card.options for card in one.blocks.cards), one.options, {"fit_on": one.source.rows}):
                for name, widget in widgets.items():
                    others = {"prefix": prefixes, "into": ["", "more", "a b", "--x"]}.get(name, [True, False])
                    widget.value = chance.choice(values_of(widget) if hasattr(widget, "options") else others)
        one._changed()
        if one._request is None:
            assert one.problem
            assert one.extract_button.disabled
            continue
        understood += 1
        read = request_of(one.code, {})
        assert read == one._request
        assert read.frame == "photos"
        for card, block in zip(one.blocks.cards, read.blocks, strict=True):
            for option in BLOCK_OPTIONS:
                chosen = card.options[option.name].value
                assert chosen == DEFAULT or str(getattr(block, option.name)) == str(chosen)
        assert read.run.get("fit_on", DEFAULT) == one.source.rows.value
    assert understood >= 4


def test_columns_of_any_name_are_written_so_that_the_magic_finds_them(
    opened: Open, notebook: InteractiveShell, photos: pd.DataFrame
) -> None:
    one = opened()
    for column in ("a b", "it's", '"', "$path", "{x}", "-v", "#", "é;", EVIL, "$a {b} 'c' $d", 7):
        notebook.user_ns["photos"] = photos.rename(columns={"path": column})
        one._after_a_cell()
        assert one.source.images.value == (column,)
        assert run_cell(notebook, one.code).parts[0].column == column
    for text in ("plain", "$", "$$", "$$x", "{", "}}", "{{x}}", "'$a' $b", "a$ {$b} '", "}"):
        assert expand(literal(text), {}) == text


def test_running_the_code_gives_the_same_columns(opened: Open, notebook: InteractiveShell) -> None:
    one = opened()
    one.blocks.add().options["size"].value = 32
    one.blocks.cards[1].options["normalize"].value = "standard"
    one.source.rows.value = "split == 'train'"
    finished(one)
    mine = notebook.user_ns["photos"]
    run_cell(notebook, one.code)
    pd.testing.assert_frame_equal(notebook.user_ns["photos"], mine, check_exact=True)


def test_settings_are_obeyed_and_shown(notebook: InteractiveShell, opened: Open) -> None:
    magics: Any = notebook.magics_manager.registry["ExtractMagics"]
    magics.pooling, magics.precision = "max", "bfloat16"
    try:
        one = opened()
        pooling = one.blocks.cards[0].options["pooling"]
        assert pooling.options[0] == ("max (your setting)", DEFAULT)
        finished(one)
        assert one.result is not None
        assert one.result.precision == "bfloat16"
        assert one.result.blocks[0].pooling == "max"
        magics.pooling = "gem"
        notebook.run_cell("1")
        assert pooling.options[0] == ("gem (your setting)", DEFAULT)
        assert one._request is not None
        assert one._request.blocks[0].pooling == "gem"
        pooling.value = "max"
        magics.pooling = "avg"
        notebook.run_cell("1")
        assert pooling.value == "max"
        pooling.value = "gem"
        assert request_of(one.code, magics.defaults()).blocks[0].pooling == "gem"
    finally:
        magics.pooling = magics.precision = ""


def test_the_code_goes_to_a_new_cell(notebook: InteractiveShell) -> None:
    magics: Any = notebook.magics_manager.registry["ExtractMagics"]
    magics._panel = None
    with pytest.raises(UsageError, match="No panel is open"):
        notebook.run_line_magic("extract_panel", "--code")
    one = notebook.run_line_magic("extract_panel", "photos")
    try:
        notebook.run_line_magic("extract_panel", "--code")
        assert notebook.rl_next_input == one.code
    finally:
        one.close()
        notebook.rl_next_input = None
    for line, words in (
        ("foto", "'foto' is not defined"),
        ("photos VGG16", "needs the name of a dataframe"),
        ("a.b", "name"),
    ):
        with pytest.raises(UsageError, match=words):
            notebook.run_line_magic("extract_panel", line)


# What is said before it runs


def test_width_and_memory_and_what_cannot_be_are_said_before_anything_runs(
    opened: Open, photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = opened()
    card = one.blocks.cards[0]
    assert "<b>1,024 columns</b> · 82 kB · <code>mobilenet_0000 … 1023</code>" in card.expected.value
    card.options["components"].value = 8
    assert "<b>8 columns</b> · 640 bytes" in card.expected.value
    card.options["components"].value = DEFAULT
    card.options["pooling"].value = "flatten"
    assert "<b>about 1,024 columns</b>" in card.expected.value
    monkeypatch.setattr("nbfeat.extraction.columns.free_bytes", lambda: 100_000)
    card.options["pooling"].value = DEFAULT
    assert "⚠ more than half of the 100 kB of free memory" in card.expected.value
    assert one.problem == ""
    card.options["normalize"].value = "whiten"
    assert "whiten needs " in one._problem.value
    assert one.extract_button.disabled
    one.extract()
    assert one.state is State.IDLE
    card.options["components"].value = 8
    assert not one.problem
    card.backbone.value = "Mobilnet"
    assert "Did you mean MobileNet" in one._problem.value
    card.backbone.value = SMALL
    photos["mobilenet_0003"] = "mine"
    one._after_a_cell()
    assert "mobilenet_0003" in one._problem.value
    one.options["replace"].value = True
    assert not one.extract_button.disabled


def test_blocks_are_added_and_removed_down_to_one_and_offer_what_the_backbone_has(opened: Open) -> None:
    one = opened()
    first = one.blocks.cards[0]
    assert first.remove.disabled
    first.remove.click()
    one.blocks.more.click()
    second = one.blocks.cards[1]
    assert second.options["layer"].value != first.options["layer"].value
    assert not one.problem
    assert one.blocks.total.value == "1,536 new columns · 123 kB"  # 1,024 and 512, for 20 rows
    assert len(one.code.splitlines()) == 3
    first.remove.click()
    assert one.blocks.cards == [second]
    assert second.remove.disabled
    assert values_of(second.options["alpha"]) == [DEFAULT, 0.25, 0.5, 0.75, 1.0]
    second.backbone.value = "VGG16"
    assert "block4_pool" in values_of(second.options["layer"])
    assert second.options["alpha"].disabled
    second.options["layer"].value = "block4_pool"
    second.backbone.value = "EfficientNetLite0"
    assert second.options["layer"].value == DEFAULT
    assert values_of(second.options["weights"]) == [DEFAULT, "imagenet", "random"]


def test_the_list_of_backbones_says_their_size_and_what_is_downloaded_and_takes_a_plain_name(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("KERAS_HOME", "NBFEAT_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    one = opened()
    field = one.blocks.cards[0].backbone
    assert "VGG16 · 14.7 M parameters · width 512" in field.options
    first = next(label for label in field.options if label.startswith(f"{FIRST} · "))
    assert first.endswith(" · installed"), "one click must do, without a download"
    kept = tmp_path / "models" / "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
    kept.parent.mkdir()
    kept.touch()
    finished(one)  # which may have fetched them
    label = "VGG16 · 14.7 M parameters · width 512 · downloaded"
    assert [label] == [known for known in field.options if known.endswith("downloaded")]
    for chosen in (label, "vgg16", "VGG16"):
        field.value = "ResNet50"
        assert "\nResNet50 " in one.code
        field.value = chosen
        assert field.value == "VGG16"
        assert "\nVGG16 " in one.code
        assert "block4_pool" in values_of(one.blocks.cards[0].options["layer"])


# The source


def test_thumbnails_and_what_is_missing_are_shown(
    opened: Open, notebook: InteractiveShell, photos: pd.DataFrame
) -> None:
    photos.iloc[0, 0] = None
    photos.iloc[1, 0] = "gone.png"
    one = opened()
    settle()
    assert one.source.strip.value.count('<img src="data:image/webp') == 11
    assert one.source.strip.value.count("nbfeat-lost") == 1
    assert one.source.missing.value == "20 images · ⚠ 1 without a value · ⚠ 1 file not found"
    notebook.user_ns["photos"] = photos.iloc[2:]
    one._after_a_cell()
    settle()
    assert one.source.missing.value == "18 images · none missing"


def test_a_thumbnail_is_sharp_and_colorful() -> None:
    image = detailed()
    (saved,) = shown(source.thumbnail(image, Path()))
    assert difference(saved, read_thumbnail(image, source.SIDE, Path())) < 5


def test_columns_that_may_hold_images_and_rows_to_learn_from_are_offered(opened: Open, photos: pd.DataFrame) -> None:
    photos["back"], photos["number"], photos["two\nlines"] = photos["path"], 1.5, photos["path"]
    photos["is_train"] = np.arange(20) < 9
    one = opened()
    assert values_of(one.source.images) == [("path",), ("back",), ("path", "back"), ("label",), ("split",)]
    one.source.images.value = ("path", "back")
    assert "· 164 kB ·" in one.blocks.cards[0].expected.value
    one.blocks.add()
    assert one.blocks.total.value == "3,072 new columns · 246 kB"
    one.blocks.remove(one.blocks.cards[1])
    assert one.blocks.total.value == ""
    finished(one)
    assert one.result is not None
    assert one.result.columns[0] == "path_mobilenet_0000"
    photos["class"], photos["odd one"], photos["text"] = "a", "b", [f"t{number}" for number in range(20)]
    photos["quote"] = ["it's", "b"] * 10
    queries = source.queries(photos)
    assert {"split == 'train'", "is_train"} <= set(queries)
    assert not [query for query in queries if query.startswith(("class", "odd", "text", "quote"))]


# The result


def test_failures_scatter_and_comparison_are_one_click_away(opened: Open, notebook: InteractiveShell) -> None:
    photos = notebook.user_ns["photos"] = pd.concat([notebook.user_ns["photos"]] * 2)
    photos.iloc[3, 0] = "gone.png"
    one = finished(opened())
    results = one.results
    assert [label for label, _ in results.pages.options] == ["Report", "Failures (1)", "Scatter", "Comparison"]
    assert values_of(results.column) == ["label", "split"]
    assert "48 new columns" in results.page.value
    failures, comparison = show_page(one, "Failures"), show_page(one, "Comparison")
    assert "no such file" in failures
    assert "row 3" in failures
    assert "data:image/png" in show_page(one, "Scatter")
    assert results._choice.children == (results.column, results.method), "there is one block"
    assert one.result is not None
    for score in nbfeat.compare(one.result, "label", speed=False).table["score"]:
        assert re.search(rf">{score:.3f}[^>]*±[^>]*<", comparison)
    assert "label: accuracy of" in comparison
    results.column.value = "split"
    assert "split: accuracy" in show_page(one, "Comparison")
    results.column.value = "label"  # made before: shown at once
    assert results.page.value == comparison


def test_the_scatter_has_methods_and_blocks_to_choose_from(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    given, real = list[tuple[object, ...]](), nbfeat.scatter

    def scatter(of: Extraction, color: object, method: str, *, features: str | None) -> Any:
        given.append((color, method, features))
        return real(of, color, features=features)

    monkeypatch.setattr("nbfeat.explore.scatter.scatter", scatter)
    one = opened()
    one.blocks.add().options["size"].value = 32
    results = finished(one).results
    umap = ["umap"] if importlib.util.find_spec("umap") else []
    assert values_of(results.method) == ["pca", "tsne", *umap]
    both = show_page(one, "Scatter")
    assert "Principal components of mobilenet and mobilenet_" in both
    assert results._choice.children == (results.column, results.method, results.block)
    results.block.value = second = values_of(results.block)[2]
    settle()
    assert f"Principal components of {second}" in results.page.value
    results.method.value = "tsne"
    settle()
    assert given == [("label", "pca", None), ("label", "pca", second), ("label", "tsne", second)]
    results.method.value, results.block.value = "pca", DEFAULT
    assert results.page.value == both, "it was made again"
    show_page(one, "Comparison")
    assert results._choice.children == (results.column,)
    finished(one)
    assert results.block.value == DEFAULT
    show_page(one, "Report")
    assert results._choice not in results.box.children


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> dict[Extraction, threading.Event]:
    """Hold the pages of each run until its event is set; they name their run."""
    let: dict[Extraction, threading.Event] = defaultdict(threading.Event)

    def drawn(of: Extraction, page: str, *_: object) -> Html:
        assert let[of].wait(30)
        return Html(f"{page} of {id(of)}")

    monkeypatch.setattr(result, "_drawn", drawn)
    return let


def test_a_page_of_an_earlier_run_never_shows_as_a_later_ones(
    opened: Open, pages: dict[Extraction, threading.Event]
) -> None:
    one = finished(opened())
    assert one.result is not None
    first = one.result
    one.results.pages.value = "Comparison"
    finished(one)
    assert one.result is not first
    one.results.pages.value = "Comparison"  # the same page, of the other run
    preparing = one.results.page.value
    threads = [thread for thread in threading.enumerate() if thread.name == "nbfeat-page"]
    assert len(threads) == 2
    pages[first].set()
    threads[0].join(30)
    assert one.results.page.value == preparing
    pages[one.result].set()
    assert show_page(one, "Comparison") == f"Comparison of {id(one.result)}"
    show_page(one, "Report")
    assert show_page(one, "Comparison") == f"Comparison of {id(one.result)}", "the earlier run's was kept"


def test_a_page_that_is_ready_late_does_not_replace_the_one_asked_for_since(
    opened: Open, pages: dict[Extraction, threading.Event]
) -> None:
    one = finished(opened())
    assert one.result is not None
    one.results.pages.value = "Comparison"
    one.results.pages.value = "Report"
    report = one.results.page.value
    pages[one.result].set()
    settle()
    assert one.results.page.value == report
    one.results.pages.value = "Comparison"
    assert one.results.page.value == f"Comparison of {id(one.result)}", "it was not kept"


def test_no_run_starts_between_a_look_at_which_run_a_page_is_of_and_its_showing(
    opened: Open, pages: dict[Extraction, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = finished(opened())
    assert one.result is not None
    turn, is_made, shown = one._kit.turn, threading.Event(), list[str]()

    def watched() -> Any:
        if threading.current_thread().name == "nbfeat-page":
            is_made.set()
        return turn()

    monkeypatch.setattr(one._kit, "turn", watched)
    one.results.page.observe(lambda change: shown.append(change["new"]), "value")
    one.results.pages.value = "Comparison"
    with turn():
        pages[one.result].set()
        assert is_made.wait(10), "it takes no turn"
        one.extract()  # while the page waits for its turn
    assert one.wait(30)
    settle()
    assert not [text for text in shown if text.startswith("Comparison of")]


def test_a_page_is_shown_in_a_turn_of_its_own(opened: Open) -> None:
    """Of the comparison as of the thumbnails: whatever else is clicked comes before or after."""
    one, turns = opened(), list[bool]()

    def another_has_a_turn() -> None:
        turns.append(one._kit._lock.acquire(blocking=False))
        if turns[-1]:
            one._kit._lock.release()

    def during(_: object) -> None:
        if threading.current_thread().name in {"nbfeat-look", "nbfeat-page"}:
            other = threading.Thread(target=another_has_a_turn)
            other.start()
            other.join(30)

    settle()
    for widget in (one.source.strip, one.source.missing, one.results.page):
        widget.value = ""
        widget.observe(during, "value")
    one.source._seen = ()  # look again
    one.source.refresh()
    settle()
    show_page(finished(one), "Comparison")
    assert len(turns) >= 3
    assert not any(turns)


def test_what_other_cells_warn_of_and_set_is_theirs_while_the_panel_compares(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_comparing, go_on, learn = threading.Event(), threading.Event(), scoring.learn  # type: ignore[attr-defined]

    def held(*given: Any) -> Any:
        is_comparing.set()
        assert go_on.wait(30)
        return learn(*given)

    monkeypatch.setattr(scoring, "learn", held)
    one = finished(opened())
    one.results.pages.value = "Comparison"
    assert is_comparing.wait(30)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        one.results.column.value = "split"  # another comparison, which begins now
        for number in range(3):
            warnings.warn(f"mine {number}", stacklevel=1)
        warnings.simplefilter("error")
        go_on.set()
        settle()
        with pytest.raises(UserWarning, match="an error by now"):
            warnings.warn("an error by now", stacklevel=1)
    assert [str(one.message) for one in seen] == ["mine 0", "mine 1", "mine 2"]
    assert "accuracy" in one.results.page.value
    assert "mine" not in one.results.page.value


@pytest.mark.parametrize("has_label", [True, False])
def test_a_page_that_cannot_be_made_says_why(opened: Open, notebook: InteractiveShell, has_label: bool) -> None:
    frame = notebook.user_ns["photos"][["path"]]
    notebook.user_ns["photos"] = frame.assign(only="one") if has_label else frame
    page = show_page(finished(opened()), "Comparison")
    assert page.count("⚠") == 1 if has_label else "no column to predict" in page


# What is left of it


def test_it_is_shown_with_a_report_that_stays_when_it_is_gone(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[dict[str, str], Any]] = []

    class Handle:
        def update(self, bundle: dict[str, str], **_: Any) -> None:
            seen.append((bundle, "update"))

        def display(self, bundle: dict[str, str], **_: Any) -> None:
            seen.append((bundle, True))

    def display(bundle: dict[str, str], *, display_id: bool = False, **_: Any) -> Handle | None:
        seen.append((bundle, display_id))
        return Handle() if display_id else None

    monkeypatch.setattr(panel, "display", display)
    one = opened()
    one._ipython_display_()
    one._ipython_display_()  # shown twice
    assert [kind for _, kind in seen] == [False, True, False, True]
    assert "while the notebook is running" in seen[0][0]["text/plain"]
    assert "idle" not in seen[0][0]["text/plain"], "what was so when it was shown is saved, and soon wrong"
    assert f"nbfeat-still-{one.box.model_id}" in seen[1][0]["text/html"]
    assert f".nbfeat-still-{one.box.model_id}{{display:none}}" in one._style.value
    finished(one)
    bundle, kind = seen[-1]
    assert kind == "update"
    assert "48 new columns from 20 images" in bundle["text/html"]
    assert "48 new columns from 20 images" in bundle["text/plain"]
    assert "%%extract photos" in bundle["text/plain"]
    assert "<script" not in bundle["text/html"]


def test_whatever_comes_from_data_is_escaped(opened: Open, notebook: InteractiveShell, photos: pd.DataFrame) -> None:
    photos.iloc[0, 0] = f"{EVIL}.jpg"
    photos[EVIL] = [EVIL, "b"] * 10
    notebook.user_ns["photos"] = photos.rename(columns={"path": f"{EVIL}path"})
    one = opened()
    one.blocks.cards[0].options["prefix"].value = EVIL
    finished(one)
    drawn = [widget.value for widget in tree(one.box) if isinstance(widget, HTML)]
    drawn += [show_page(one, page) for page in values_of(one.results.pages)]
    assert EVIL not in " ".join(drawn)
    assert "&lt;img" in " ".join(drawn)


# Opened again

Run = Callable[..., Any]


@pytest.fixture
def run_as(notebook: InteractiveShell, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run the cell of an id, as front ends do; its output is kept, as IPython does."""
    numbers, outputs = count(), list[object]()

    def run(sent: dict[str, Any], code: str) -> Any:
        parent = {"header": {"msg_id": str(next(numbers))}, "metadata": sent}
        monkeypatch.setattr(notebook, "get_parent", lambda: parent, raising=False)
        outputs.append(run_cell(notebook, code))
        return outputs[-1]

    yield run
    for one in [hook.__self__ for hook in notebook.events.callbacks["post_run_cell"] if hasattr(hook, "__self__")]:
        if isinstance(one, Panel):
            one.close()


def extracted(one: Panel, size: int) -> weakref.ref[Extraction]:
    card = one.blocks.cards[0]
    card.backbone.value, card.options["size"].value = SMALL, size
    finished(one)
    assert one.result is not None
    return weakref.ref(one.result)


def is_live(one: Panel) -> bool:
    return all(widget.comm is not None and widget.model_id in _instances for widget in tree(one.box))


def test_a_cell_that_opens_a_panel_again_replaces_it_and_lets_its_result_go(
    run_as: Run, notebook: InteractiveShell
) -> None:
    first, other = {"cellId": "a"}, {"colab": {"cell_id": "b"}}  # as front ends send it
    beside = run_as(other, "%extract_panel photos")
    results, widgets = [], []
    for size in (32, 64):
        one = run_as(first, "%extract_panel photos")
        results.append(extracted(one, size))
        widgets.append(len(_instances))
        assert is_live(one)
    show_page(one, "Comparison")
    gc.collect()
    assert [found() is None for found in results] == [True, False], "what each run made is still there"
    assert len(set(widgets)) == 1, "widgets are left over"
    assert is_live(beside)
    kept = extracted(beside, 128)  # it works as before
    run_as(other, "%extract_panel photos;")  # not shown, and the one before is gone
    settle()
    gc.collect()
    assert kept() is None
    assert not is_live(beside)
    assert is_live(one)
    assert one.result is results[-1]()
    assert notebook.user_ns["photos"].shape[1] > 3


def test_panels_of_one_run_and_of_cells_without_an_id_stay(run_as: Run) -> None:
    both = run_as({"cellId": "a"}, "import nbfeat\nboth = [nbfeat.Panel(photos), nbfeat.Panel('photos')]\nboth")
    run_as({"cellId": "b"}, "1")
    unknown = [run_as({}, "%extract_panel photos") for _ in range(2)]
    assert all(map(is_live, [*both, *unknown]))
    run_as({"cellId": "a"}, "1")  # another text in the same cell: their output is gone
    assert [is_live(one) for one in (*both, *unknown)] == [False, False, True, True]


def test_a_run_of_a_replaced_panel_stops_and_binds_nothing(run_as: Run, notebook: InteractiveShell, gate: Gate) -> None:
    one = run_as({"cellId": "a"}, "%extract_panel photos")
    card = one.blocks.cards[0]
    card.backbone.value, card.options["size"].value = SMALL, 32
    one.extract_button.click()
    job = one.job
    assert one.state is State.RUNNING
    before = notebook.user_ns["photos"]
    run_as({"cellId": "a"}, "%extract_panel photos")
    gate.open()
    assert job is not None
    assert job.wait(30)
    assert job.state is State.CANCELLED
    assert notebook.user_ns["photos"] is before
    assert one.result is None
    assert one.wait(0)


@pytest.mark.parametrize("how", ["closed", "all widgets closed"])
def test_a_panel_that_was_closed_and_is_not_referred_to_is_freed(
    run_as: Run, notebook: InteractiveShell, how: str
) -> None:
    notebook.run_cell("panel = %extract_panel photos")
    one = notebook.user_ns["panel"]
    found = extracted(one, 32)
    panel_itself = weakref.ref(one)
    if how == "closed":
        one.close()
        assert one.result is found(), "it may still be wanted"
    else:
        Widget.close_all()
    del one, notebook.user_ns["panel"]
    settle()
    notebook.run_cell("1")
    gc.collect()
    assert found() is None
    assert panel_itself() is None
    with pytest.raises(UsageError, match="No panel is open"):
        notebook.run_line_magic("extract_panel", "--code")


IN_A_KERNEL = """
import gc, sys, threading
sys.path.insert(0, {root!r})
from ipywidgets.widgets import widget
from nbfeat import Extraction
from nbfeat.inference import prepared
from tests.fake import FakeNetwork
import numpy as np, pandas as pd
prepared.PreparedNetwork = FakeNetwork
photos = pd.DataFrame({{"image": list(np.zeros((8, 8, 8, 3), np.uint8))}})
%load_ext nbfeat
"""
THEN = """
one = Out[max(Out)]
one.blocks.cards[0].options["size"].value = {size}
one.extract()
assert one.wait(60) and one.result is not None, one.problem
del one
for thread in threading.enumerate():
    if thread.name == "nbfeat-look":
        thread.join(30)
gc.collect()
print(len(widget._instances), sum(isinstance(found, Extraction) for found in gc.get_objects()))
"""


@pytest.mark.slow
def test_in_a_kernel_that_keeps_all_outputs_one_panel_and_one_result_are_left() -> None:
    printed: list[str] = []
    manager, client = start_new_kernel(kernel_name="python3")

    def run(code: str, cell: str = "") -> None:
        """Run a cell, and say which as front ends do."""
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
        sent = client.session.msg("execute_request", content, metadata={"cellId": cell})
        client.shell_channel.send(sent)
        while (message := client.get_iopub_msg(timeout=120))["content"].get("execution_state") != "idle" or (
            message["parent_header"]["msg_id"] != sent["header"]["msg_id"]
        ):
            assert message["msg_type"] != "error", message["content"]
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                printed.append(message["content"]["text"])

    try:
        run(IN_A_KERNEL.format(root=str(ROOT)))
        for size in (32, 64, 96):
            run("%extract_panel photos", "panel")
            run(THEN.format(size=size), "run")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert len(printed) == 3
    assert len(set(printed)) == 1
    assert printed[0].split()[1] == "1"
