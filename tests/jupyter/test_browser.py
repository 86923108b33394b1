"""The panel as people see it: in JupyterLab, Notebook 7 and Voila, in a real browser, on photographs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbfeat.jupyter.panel.blocks import FIRST
from tests.jupyter import browser
from tests.jupyter.browser import Site, done_of, output, run_all, run_cell, wait_for_cells

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not browser.CHROMIUM, reason="no chromium on this machine: apt-get install chromium"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install '.[browser]'")
for module in ("jupyterlab", "notebook", "voila"):
    pytest.importorskip(module, reason=f"no {module} here: pip install '.[browser]'")

START = """%load_ext nbfeat
import time, pandas as pd
from pathlib import Path
from nbfeat.extraction import pipeline
files = sorted(Path({folder!r}).glob("*/*.jpg"))
photos = pd.DataFrame({{"path": [str(file) for file in files], "label": [file.parent.name for file in files]}})
read = pipeline.load_image
def slow(*given):  # a disk of a few hundred images a second at most, so that there is time to click
    time.sleep({seconds})
    return read(*given)
pipeline.load_image = slow
%config ExtractMagics.cache = {cache}"""
PANEL = "%extract_panel photos"
MOVING = "() => / [1-9]\\d* of 300/.test(document.querySelector('.nbfeat-progress').textContent)"
COUNT = """() => {
    clicks = 0
    const panel = document.querySelector('.nbfeat-panel')
    panel.addEventListener('click', () => clicks++, true)
    panel.addEventListener('change', (event) => { clicks += event.target.matches('select') }, true)
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=browser.CHROMIUM, args=list(browser.FLAGS))
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def server(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("lab")
    with browser.site("lab", folder, chromium, KERAS_HOME=str(folder / "keras")) as running:
        yield running


@pytest.fixture
def lab(server: Site) -> Iterator[Site]:
    yield server
    for context in server.browser.contexts:
        context.close()


def start(shared_data: Path, seconds: float = 0.05, *, cache: bool = False) -> str:
    return START.format(folder=str(shared_data / "photos" / "flowers5"), seconds=seconds, cache=cache)


def begin(lab: Site, name: str, first: str, *cells: str) -> tuple[Any, Any]:
    """Open a notebook of these cells, whose second one makes a panel, and choose EfficientNetLite0 in it."""
    page = lab.open(lab.write(name, first, PANEL, *cells))
    run_cell(page, 0)
    run_cell(page, 1)
    one = panel(page)
    choose(one)
    return page, one


def panel(page: Any, number: int = 0) -> Any:
    """Return a panel that is drawn, photographs too."""
    found = page.locator(".nbfeat-panel").nth(number)
    found.locator(".nbfeat-strip img").first.wait_for()
    return found


def choose(one: Any, backbone: str = "EfficientNetLite0") -> None:
    field = one.get_by_label("Backbone").first
    field.fill(backbone)
    field.press("Enter")
    one.locator(".nbfeat-code", has_text=backbone).wait_for()


def until(one: Any, word: str) -> None:
    one.locator(".nbfeat-progress b", has_text=word).wait_for()


def press(one: Any, name: str, end: str = "") -> None:
    one.get_by_role("button", name=name, exact=True).click()
    if end:
        until(one, end)


def test_choosing_running_cancelling_going_on_and_the_same_by_code(lab: Site, shared_data: Path) -> None:
    page, one = begin(lab, "story.ipynb", start(shared_data, cache=True), "photos.shape", "%extract_panel --code")
    one.get_by_label("Normalization", exact=True).select_option("l2")
    one.get_by_text("More options").click()
    one.get_by_label("Resize").select_option("crop")  # pixels that no other test has put into the cache
    assert "1,280 columns · 1.5 MB" in one.locator(".nbfeat-block").inner_text()
    press(one, "Extract")
    page.wait_for_function(MOVING)
    early = done_of(page)
    page.wait_for_function(
        f"() => Number(document.querySelector('.nbfeat-progress').textContent.match(/(\\d+) of 300/)[1]) > {early}"
    )
    assert "images/s" in one.locator(".nbfeat-progress").inner_text()
    press(one, "Cancel", "Cancelled")
    assert early < done_of(page) < 300
    run_cell(page, 2)
    assert output(page, 2) == "(300, 2)", "something was bound"
    press(one, "Extract", "Done")
    run_cell(page, 2)
    assert output(page, 2) == "(300, 1282)"
    assert "1,280 new columns from 300 images" in one.locator(".nbfeat-page").inner_text()
    # The code, in a cell below, gives the same columns.
    run_cell(page, 3)
    page.wait_for_function("() => document.querySelectorAll('.jp-Notebook .jp-Cell').length > 4")
    written = page.locator(".jp-Notebook .jp-Cell").nth(4).locator(".cm-content").inner_text()
    assert written.splitlines() == ["%%extract photos --images path", "EfficientNetLite0 --normalize l2 --resize crop"]
    run_cell(page, 4)
    assert "all from the cache" in output(page, 4)
    assert not page.errors


CHECK = """mine = photos
photos = photos[["path", "label"]]"""
SAME = "pd.testing.assert_frame_equal(photos, mine, check_exact=True); print('the same')"


def test_four_clicks_choose_a_network_a_layer_and_a_pooling_and_the_code_is_a_click_away(
    lab: Site, shared_data: Path
) -> None:
    page = lab.open(lab.write("four.ipynb", start(shared_data, 0), PANEL, CHECK, SAME, ""))
    run_cell(page, 0)
    run_cell(page, 1)
    one = panel(page)
    page.evaluate(COUNT)
    one.get_by_label("Backbone").first.click()
    page.keyboard.press("Control+a")
    page.keyboard.type(f"{FIRST.lower()}\n")
    page.wait_for_function(f"() => document.querySelector('.nbfeat-panel input').value === '{FIRST}'")
    one.get_by_label("Layer").select_option(index=1)
    one.get_by_label("Pooling").select_option("max")
    one.locator(".nbfeat-code", has_text="--pooling max").wait_for()
    press(one, "Extract", "Done")
    assert page.evaluate("() => clicks") == 4
    code = one.locator(".nbfeat-code pre")
    assert one.locator(".nbfeat-page").bounding_box()["y"] < code.bounding_box()["y"]
    text, cells = code.inner_text(), page.locator(".jp-Notebook .jp-Cell")
    run_cell(page, 2)
    press(one, "Insert below")
    one.get_by_text("Inserted", exact=True).wait_for()
    assert cells.nth(2).locator(".cm-content").inner_text() == text
    run_cell(page, 2)
    run_cell(page, 4)
    assert output(page, 4) == "the same"
    press(one, "Copy")
    one.get_by_text("Copied", exact=True).wait_for()
    cells.nth(5).locator(".cm-content").click()
    page.keyboard.press("Control+v")
    assert cells.nth(5).locator(".cm-content").inner_text() == text
    page.evaluate(
        "() => { navigator.clipboard.writeText = () => Promise.reject(); document.execCommand = () => false }"
    )
    press(one, "Copy")
    one.get_by_text("This browser forbids it. The code is selected: press Ctrl+C.").wait_for()
    assert page.evaluate("() => getSelection().toString()").strip() == text
    assert not page.errors


def test_clicks_are_answered_while_a_cell_runs_and_nothing_is_bound_under_it(lab: Site, shared_data: Path) -> None:
    busy = "before = photos\nwhile not Path('go').exists(): time.sleep(.1)\nprint(photos is before)"
    page, one = begin(lab, "busy.ipynb", start(shared_data, 0.02), busy, "photos.shape")
    run_cell(page, 2, wait=False)
    press(one, "Extract")
    page.wait_for_function(MOVING)
    press(one, "Cancel", "Cancelled")
    assert page.locator(".jp-InputPrompt", has_text="*").count() == 1, "it was answered after the cell alone"
    press(one, "Extract")
    one.get_by_text("everything is computed · waiting for the running cell to finish").wait_for()
    (lab.root / "go").touch()
    wait_for_cells(page)
    assert output(page, 2) == "True"
    until(one, "Done")
    run_cell(page, 3)
    assert output(page, 3) == "(300, 1282)"


def test_closing_the_browser_loses_nothing_and_the_panel_comes_back(lab: Site, shared_data: Path) -> None:
    page, one = begin(lab, "closed.ipynb", start(shared_data, 0.02), "photos.shape")
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    press(one, "Extract", "Running")
    page.context.close()
    page = lab.open("closed.ipynb")
    until(panel(page), "Done")
    run_cell(page, 2)
    assert output(page, 2) == "(300, 1282)"


def test_one_panel_shown_twice_and_a_second_one_and_a_new_kernel(lab: Site, shared_data: Path) -> None:
    other = "other = photos.head(40)\n%extract_panel other"
    page, first = begin(lab, "twice.ipynb", start(shared_data, 0), "_", other, "photos.shape, other.shape")
    run_cell(page, 2)
    run_cell(page, 3)
    again, second = panel(page, 1), panel(page, 2)
    assert again.get_by_label("Backbone").first.input_value() == "EfficientNetLite0"
    choose(second)
    press(again, "Extract")
    press(second, "Extract")
    for one in (first, again, second):
        until(one, "Done")
    run_cell(page, 4)
    assert output(page, 4) == "((300, 1282), (40, 1282))"
    # A new kernel knows nothing of the panels: the cells are run again.
    page.evaluate(
        "async () => { await jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.restart() }"
    )
    page.wait_for_function(browser.IDLE)
    run_cell(page, 0)
    run_cell(page, 1)
    page.locator(".nbfeat-progress b", has_text="Ready").first.wait_for()
    choose(panel(page))
    press(panel(page), "Extract", "Done")


def test_it_is_worked_with_the_keyboard_alone_and_every_field_has_a_label(lab: Site, shared_data: Path) -> None:
    page = lab.open(lab.write("keys.ipynb", start(shared_data), PANEL))
    run_all(page)
    one = panel(page)
    for field in one.locator("select, input").all():
        assert field.evaluate("one => [...one.labels].some(label => label.innerText.trim())")
    for button in one.locator("button").all():
        assert button.inner_text().strip()
    one.get_by_label("Dataframe", exact=True).focus()
    reached: list[str] = []
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("() => document.activeElement.labels?.[0]?.innerText ?? document.activeElement.innerText")
        )
        if reached[-1].endswith("options"):  # what they fold is passed over, or reached next
            assert one.get_by_label("Batch size").is_hidden()
            page.keyboard.press("Enter" if reached[-1].startswith("Run") else "Space")
        if reached[-1] == "Extract":
            break
    assert reached[-1] == "Extract", reached
    assert {"Image column", "Layer", "Pooling", "Normalization", "Prefix", "Add a block", "Batch size"} <= set(reached)
    assert {"More options", "Image size", "Run options", "New dataframe"} <= set(reached)
    page.keyboard.press("Enter")
    until(one, "Running")
    page.wait_for_function("() => document.activeElement.innerText === 'Cancel'")
    page.keyboard.press("Enter")
    until(one, "Cancelled")
    assert one.get_by_label("Batch size").is_visible(), "it is open no more"
    one.get_by_role("button", name="Copy").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.innerText") == "Insert below"
    page.keyboard.press("Enter")
    one.get_by_text("Inserted", exact=True).wait_for()


def test_the_saved_notebook_shows_the_report_without_a_kernel(lab: Site, shared_data: Path) -> None:
    page, one = begin(lab, "saved.ipynb", start(shared_data, 0))
    assert page.get_by_text("hasn't run yet").is_hidden()
    press(one, "Extract", "Done")
    page.wait_for_function(
        "() => /1,280 new columns/.test(document.querySelector('[class^=nbfeat-still]').textContent)"
    )
    page.evaluate("async () => { await jupyterapp.commands.execute('docmanager:save') }")
    saved = (lab.root / "saved.ipynb").read_text()
    assert '"widgets"' not in saved
    assert len(saved) < 20_000
    # Another reader's computer has not seen this notebook run, and trusts nothing in it.
    (lab.root / "sent.ipynb").write_text(saved.replace("photos", "pictures"))
    page.context.close()
    page = lab.open("sent.ipynb")
    page.get_by_text(re.compile("1,280 new columns from 300 images")).wait_for()
    assert page.get_by_text("%%extract pictures --images path").is_visible()
    assert not page.locator(".nbfeat-panel").count()


@pytest.mark.parametrize("kind", ["notebook", "voila"])
def test_it_works_elsewhere_too(kind: str, chromium: Any, shared_data: Path, tmp_path: Path) -> None:
    with browser.site(kind, tmp_path / kind, chromium) as running:
        page = running.open(running.write("panel.ipynb", start(shared_data, 0.01), PANEL), dark=True)
        if kind == "notebook":
            run_all(page)
        one = panel(page)
        page.evaluate(COUNT)
        press(one, "Extract", "Done")
        assert page.evaluate("() => clicks") == 1
        press(one, "Copy")
        one.get_by_text("Copied", exact=True).wait_for()
        assert one.get_by_role("button", name="Insert below").is_visible() is (kind == "notebook")
        assert "1,280 new columns from 300 images" in one.locator(".nbfeat-page").inner_text()
        background = one.evaluate("one => getComputedStyle(one).backgroundColor.match(/\\d+/g).map(Number)")
        assert max(background) < 80, "not dark"
        assert not [error for error in page.errors if "schema" not in error]  # Notebook's own, with stock settings
        page.context.close()
