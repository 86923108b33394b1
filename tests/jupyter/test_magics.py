"""The notebook's face: what is bound, shown, offered and taken back."""

from __future__ import annotations

import re
import shutil
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from nbfeat import Extraction, ExtractionError
from nbfeat.extraction.options import OPTIONS
from nbfeat.jupyter import grammar, progress
from nbfeat.jupyter.magics import TRAITS, ExtractMagics
from tests.faces import run_cell

pytestmark = pytest.mark.usefixtures("fake_network")


def magics_of(shell: InteractiveShell) -> ExtractMagics:
    magics = shell.magics_manager.registry["ExtractMagics"]
    assert isinstance(magics, ExtractMagics)
    return magics


def test_the_frame_is_rebound_and_other_references_keep_the_old_one(notebook: InteractiveShell) -> None:
    old = notebook.user_ns["photos"]
    run_cell(notebook, "%extract photos MobileNet --size 32 --into more")
    assert notebook.user_ns["photos"] is old
    assert notebook.user_ns["more"].shape == (20, 51)
    result = run_cell(notebook, "other = photos\n%extract photos MobileNet --size 32")
    assert isinstance(result, Extraction)
    assert notebook.user_ns["photos"] is result.frame
    assert notebook.user_ns["other"] is old
    assert old.shape == (20, 3)


def test_the_result_can_be_kept_and_silenced(notebook: InteractiveShell) -> None:
    run_cell(notebook, "result = %extract photos MobileNet --size 32")
    assert isinstance(notebook.user_ns["result"], Extraction)
    with capture_output() as output:
        notebook.run_cell("%extract photos MobileNet --size 32 --quiet;")
        notebook.run_cell("%%extract photos --quiet --size 32\nMobileNet --prefix silent;")
    assert output.stdout == ""
    assert "silent_0000" in notebook.user_ns["photos"]


def test_bad_usage_is_usage_error_itself_and_binds_nothing(notebook: InteractiveShell) -> None:
    before = notebook.user_ns["photos"]
    for line, words in (
        ("%extract foto MobileNet", r"'foto' is not defined.*photos"),
        ("%extract photos MobilNet", "not found"),
        ("%backbones Nothing*", "Nothing"),
        ("%extract_cache wipe", "alone or with clear"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            run_cell(notebook, line)
        assert type(caught.value) is UsageError
    assert notebook.user_ns["photos"] is before
    assert list(run_cell(notebook, "%backbones VGG*").index) == ["VGG16", "VGG19"]


def test_failing_work_is_one_line_and_still_an_error(
    notebook: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook.user_ns["photos"] = notebook.user_ns["photos"].assign(path="gone.png")
    for is_short in (True, False):
        monkeypatch.setattr(magics_of(notebook), "short_errors", is_short)
        with capture_output() as output:
            outcome = notebook.run_cell("%extract photos MobileNet --size 32 --images path")
        assert isinstance(outcome.error_in_exec, ExtractionError)
        last = output.stdout.strip().splitlines()[-1]
        assert re.sub("\\x1b\\[[0-9;]*m", "", last).startswith("ExtractionError: None of the 20 images")
        assert ("Traceback" not in output.stdout) is is_short
    assert list(notebook.user_ns["photos"].columns) == ["path", "label", "split"]


def test_an_interrupt_binds_nothing_says_how_far_it_came_and_stops(
    notebook: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Extraction.steps

    def interrupted(self: Extraction) -> Any:
        yield from islice(original(self), 3)
        raise KeyboardInterrupt

    before = notebook.user_ns["photos"]
    monkeypatch.setattr(Extraction, "steps", interrupted)
    with capture_output() as output:
        outcome = notebook.run_cell("%extract photos MobileNet --size 32")
    assert isinstance(outcome.error_in_exec, KeyboardInterrupt)
    assert "8 of 20 images are saved. Run the cell again to continue." in output.stdout
    assert notebook.user_ns["photos"] is before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nbfeat")]


def test_names_and_expressions_are_expanded_and_unknown_ones_are_errors(notebook: InteractiveShell) -> None:
    notebook.user_ns |= {"name": "MobileNet", "sizes": [32, 64]}
    result = run_cell(notebook, "%extract photos $name --size {sizes[0]} --prefix {{x}}$$y")
    assert result.parts[0].prefix == "{x}$y"
    assert result.blocks[0].size == 32
    assert run_cell(notebook, "%%extract photos\n$name --size {sizes[1]}").blocks[0].size == 64
    for line in ("%extract photos $nosuch", "%%extract photos\n{nosuch}"):
        with pytest.raises(UsageError, match="nosuch"):
            run_cell(notebook, line)


@pytest.mark.parametrize(
    "name",
    [
        "my photos",
        "path --into stolen --no-cache",
        "it's",
        '"quoted"',
        "#1",
        "a\nb",
        "-n",
        "--no-cache",
        "{x}$y;",
        "ü ñ",
    ],
)
def test_an_expanded_value_is_one_word_whatever_it_holds(notebook: InteractiveShell, tmp_path: Path, name: str) -> None:
    photos = notebook.user_ns["photos"]
    folder = tmp_path / "a folder; with --quiet"
    shutil.copytree(Path(photos["path"].iloc[0]).parent, folder)
    relative = [Path(path).name for path in photos["path"]]
    notebook.user_ns |= {"photos": photos.assign(**{name: relative}).drop(columns="path"), "name": name, "root": folder}
    for cell in (
        "%extract photos MobileNet --size 32 -i $name --root $root",
        "%%extract photos --images={name} --root {root}\nMobileNet --size 32 --prefix=$name",
    ):
        result = run_cell(notebook, cell)
        assert result.request.columns == [name]
        assert result.failures.empty
    assert result.parts[0].prefix == name
    assert "stolen" not in notebook.user_ns
    with pytest.raises(UsageError) as error:
        run_cell(notebook, "%extract photos $name")
    assert name.split(maxsplit=1)[0] in str(error.value)
    assert str(error.value).isprintable()


def test_settings_are_the_defaults_of_cells_and_are_checked(notebook: InteractiveShell) -> None:
    magics = magics_of(notebook)
    run_cell(notebook, "%config ExtractMagics.pooling = 'max'\n%config ExtractMagics.backbone = 'MobileNet'")
    try:
        assert run_cell(notebook, "%extract photos --size 32").blocks[0].pooling == "max"
        assert run_cell(notebook, "%extract photos VGG16 --size 32 -p gem").blocks[0].pooling == "gem"
        run_cell(notebook, "%config ExtractMagics.pooling = 'average'")
        assert magics.trait_values()["pooling"] == "max"
    finally:
        magics.set_trait("pooling", "")
        magics.set_trait("backbone", "")
        notebook.config.pop("ExtractMagics", None)  # IPython keeps the setting that was refused there
    assert set(TRAITS) <= {option.name for option in OPTIONS}
    assert all(magics.trait_metadata(name, "config") for name in TRAITS)


def test_help_is_one_text(notebook: InteractiveShell) -> None:
    with capture_output() as output:
        notebook.run_cell("%extract -h")
    assert output.stdout.strip() == grammar.usage().strip()
    assert ExtractMagics.extract.__doc__ == grammar.usage()


def offered(notebook: InteractiveShell, cell: str) -> list[str]:
    """Return what of ours Tab offers at the end of a cell."""
    with provisionalcompleter():
        return [one.text for one in notebook.Completer.completions(cell, len(cell)) if one.type == "nbfeat"]


@pytest.mark.parametrize(
    ("cell", "first"),
    [
        ("%extract ", "photos"),
        ("%extract pho", "photos"),
        ("%extract_panel pho", "photos"),
        ("%extract_panel --c", "--code"),
        ("%extract_cache clear feat", "features"),
        ("%extract photos ResNet5", "ResNet50 ResNet50V2"),
        ("%extract photos VGG16 --lay", "--layer"),
        ("%extract photos VGG16 --layer block5_", "block5_pool"),
        ("%extract photos VGG16 --layer block4_pool,block5_", "block5_pool"),
        ("%extract photos VGG16 -p ", "avg max gem flatten"),
        ("%extract photos VGG16 --images ", "path label split"),
        ("%extract photos VGG16 --precision b", "bfloat16"),
        ("%extract photos VGG16 --precision float32 -w ran", "random"),
        ("%%extract photos -i path\nVGG1", "VGG16 VGG19"),
        ("%%extract photos VGG16\n--layer block5_", "block5_pool"),
        ("%%extract photos\nVGG16 --qui", ""),
        ("x = 1\n%extract photos VGG1", "VGG16 VGG19"),
        ("%backbones Xz", ""),
        ("result = %extract photos VGG1", "VGG16 VGG19"),
        ("%backbones Xce", "Xception"),
        ("photos.sha", ""),
    ],
)
def test_tab_offers_what_can_stand_there_and_leaves_other_cells_alone(
    notebook: InteractiveShell, cell: str, first: str
) -> None:
    found, expected = set(offered(notebook, cell)), set(first.split())
    assert found == expected or (expected and expected <= found and cell[-1] in "_ ")


def test_tab_offers_names_of_python_in_its_own_cells_alone(notebook: InteractiveShell) -> None:
    notebook.user_ns["VGG_mine"] = 1
    for cell, (ours, mine) in {"VGG": (False, True), "%extract photos VGG": (True, False)}.items():
        with provisionalcompleter():
            found = [one.text for one in notebook.Completer.completions(cell, len(cell))]
        assert ("VGG16" in found, "VGG_mine" in found) == (ours, mine)


def completed(notebook: InteractiveShell, line: str) -> set[str]:
    """Return what a line becomes by each of all completions where it has a bar."""
    before, _, after = line.partition("|")
    with provisionalcompleter():
        found = list(notebook.Completer.completions(before + after, len(before)))
    return {before[: one.start] + one.text + before[one.end :] + after for one in found}


@pytest.mark.parametrize("typed", ["-i m|", "--images 'm|", "--images 'my c|", '-i "my c|', "--images=my|", "-i='my |"])
@pytest.mark.parametrize("mark", ["", "'"])
def test_tab_completes_columns_that_need_quotation_marks(
    notebook: InteractiveShell, photos: pd.DataFrame, typed: str, mark: str
) -> None:
    notebook.user_ns["photos"] = photos.rename(columns={"path": "my col"})
    # Some editors close quotation marks as soon as they are opened.
    mark = mark and next((one for one in ("'", '"') if one in typed), "")
    (line,) = completed(notebook, f"%extract photos VGG16 {typed}{mark}")
    request = grammar.read(line.removeprefix("%extract "), None, {})
    assert request is not None
    assert request.run["images"] == ["my col"]
    assert f"{line} --size 32".count("my col") == 1
    notebook.user_ns["photos"] = photos.rename(columns={"path": "a"})


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("%extract photos VGG16 --pooling=|", ["avg", "max", "gem", "flatten"]),
        ("%extract photos VGG16 --pooling=m|", ["max"]),
        ("%extract photos VGG16 -p=f|", ["flatten"]),
        ("%extract photos --images 'path' --pooling=m|", ["max"]),
        ("%%extract photos --pooling=m|\nVGG16", ["max"]),
        ("%extract photos VGG16 --layer=block4_pool,block5_p|", ["block5_pool"]),
        ("%extract photos VGG16 --images it|", ['"it\'s"']),
        ("%extract photos VGG16 --images 'it|", ['"it\'s"']),
        ("%extract photos VGG16 --images {|", ["{{x}}"]),
        ("%extract photos VGG16 --images \"it's\" --images $|", ["$$y"]),
        ("%extract photos --images 'a b' VGG1|", ["VGG16", "VGG19"]),
        ("%%extract photos\n--prefix 'a b' VGG1|", ["VGG16", "VGG19"]),
    ],
)  # fmt: skip
def test_tab_offers_what_fits_and_nothing_else(notebook: InteractiveShell, line: str, lines: list[str]) -> None:
    frame = notebook.user_ns["photos"]
    notebook.user_ns["photos"] = frame.assign(**{"it's": "a", "{x}": "b", "$y": "c"})
    notebook.user_ns |= {"maximum": 1, "mine": 2, "itself": 3, "block5_p1": 4, "results": 5}
    before, _, after = line.partition("|")
    start = re.split(r"[\s=,]", before)[-1]
    assert completed(notebook, line) == {before.removesuffix(start) + one + after for one in lines}


def test_a_line_with_an_unclosed_quotation_mark_stops_no_completion(notebook: InteractiveShell) -> None:
    assert completed(notebook, "%%extract photos --images 'path\nphot|") == {"%%extract photos --images 'path\nphotos"}


def test_two_reloads_leave_one_of_each_and_unloading_leaves_none(notebook: InteractiveShell) -> None:
    def counts() -> tuple[int, ...]:
        matchers = [getattr(one, "matcher_identifier", "") for one in notebook.Completer.custom_matchers]
        settings = [type(one).__name__ for one in notebook.configurables]
        tables = notebook.magics_manager.magics
        return (
            matchers.count("nbfeat"),
            settings.count("ExtractMagics"),
            "ExtractMagics" in notebook.magics_manager.registry,
            "extract" in tables["line"] and "extract" in tables["cell"],
            "backbones" in tables["line"],
        )

    for _ in range(2):
        notebook.run_line_magic("reload_ext", "nbfeat")
    assert counts() == (1, 1, True, True, True)
    notebook.run_line_magic("unload_ext", "nbfeat")
    assert counts() == (0, 0, False, False, False)
    notebook.run_line_magic("load_ext", "nbfeat")
    assert counts() == (1, 1, True, True, True)


def test_progress_is_one_display_and_its_last_text_is_the_end(
    photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles: list[dict[str, str]] = []

    class Handle:
        def update(self, bundle: dict[str, str], **_: Any) -> None:
            bundles.append(bundle)

    def display(bundle: dict[str, str], **_: Any) -> Handle:
        assert not bundles, "a second display"
        bundles.append(bundle)
        return Handle()

    monkeypatch.setattr(progress, "display", display)
    steps = Extraction(photos, "MobileNet --size 32", images="path", batch_size=1).steps()
    progress.follow("photos", steps)
    assert len(bundles) <= 4
    assert bundles[-1]["text/plain"].splitlines()[-1].startswith("done · 20 of 20 images")
    assert all("<div" in bundle["text/html"] for bundle in bundles)


def test_durations_read_as_people_write_them() -> None:
    texts = {0.4: "0 s", 59.4: "59 s", 59.6: "1:00 min", 125: "2:05 min", 4210: "1:10 h"}
    assert {seconds: progress.clock(seconds) for seconds in texts} == texts
