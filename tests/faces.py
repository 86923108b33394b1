"""The faces of extraction, all with one signature: what is promised of one is promised of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pandas as pd
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import nbfeat
from nbfeat import Extraction, Panel, RequestError
from nbfeat.extraction.options import BLOCK_OPTIONS, WordParser, quoted, split_words
from nbfeat.jupyter.panel.widgets import DEFAULT


def run_cell(shell: InteractiveShell, cell: str) -> Any:
    """Run a cell as a notebook does and return its result, or raise what stopped it."""
    with capture_output():
        outcome = shell.run_cell(cell)
    outcome.raise_error()
    return outcome.result


class Face(Protocol):
    """Extract `blocks` of `frame`; bad usage raises RequestError, whatever the face makes of it for people."""

    def __call__(self, frame: Any, *blocks: str, **options: Any) -> Extraction: ...


class LineMagic:
    """``%extract``: several blocks are run one after the other, as a person would."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell

    def __call__(self, frame: Any, *blocks: str, **options: Any) -> Extraction:
        return self.run("line", frame, f"{' '.join(blocks)} {words(options)}")

    def run(self, kind: str, frame: Any, line: str, body: str = "") -> Extraction:
        self.shell.user_ns["photos"] = frame
        try:
            if kind == "line":
                result = self.shell.run_line_magic("extract", f"photos {line}")
            else:
                result = self.shell.run_cell_magic("extract", f"photos {line}", body)
        except UsageError as error:
            raise RequestError(str(error)) from None
        bound = self.shell.user_ns["photos"]
        assert isinstance(result, Extraction)
        assert bound is result.frame
        return result


class CellMagic(LineMagic):
    """``%%extract``, one block per line."""

    def __call__(self, frame: Any, *blocks: str, **options: Any) -> Extraction:
        return self.run("cell", frame, words(options), "\n".join([*blocks, "", "# that is all"]))


class PanelFace:
    """The panel, driven by the traits of its widgets, as clicks do.

    What it offers no choice for, the test offers first: what becomes of it is the same as of any other choice.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell

    def __call__(self, frame: Any, *blocks: str, **options: Any) -> Extraction:
        self.shell.user_ns["photos"] = frame
        magics = self.shell.magics_manager.registry["ExtractMagics"]
        magics.root = str(options.pop("root", ""))
        panel = Panel("photos")
        try:
            self.choose(panel, blocks, options)
            if panel.problem:
                raise RequestError(panel.problem)
            panel.extract()
            assert panel.wait(60)
            assert panel.job is not None
            if panel.job.error is not None:
                raise panel.job.error
            assert panel.result is not None
            same(self.shell.user_ns["photos"], panel.result.frame)
            return panel.result
        finally:
            panel.close()
            magics.root = ""

    def choose(self, panel: Panel, blocks: Sequence[str], options: dict[str, Any]) -> None:
        images = options.pop("images", None)
        labels = images if isinstance(images, list) else [images]
        pick(panel.source.images, None if images is None else tuple(labels))
        pick(panel.source.rows, options.pop("fit_on", DEFAULT))
        panel.options["no_cache"].value = not options.pop("cache", True)
        for name in set(options) & set(panel.options):
            pick(panel.options[name], options.pop(name))
        panel.blocks.cards[0].backbone.value = ""
        for number, block in enumerate(blocks or [""]):
            card = panel.blocks.add() if number else panel.blocks.cards[0]
            given, words = WordParser(BLOCK_OPTIONS).read(split_words(block))
            card.backbone.value = words[0] if words else ""
            for name, widget in card.options.items():
                pick(widget, {**options, **given}.get(name, DEFAULT))


FACES: dict[str, Callable[[InteractiveShell], Face]] = {
    "python": lambda _: nbfeat.extract, "line magic": LineMagic, "cell magic": CellMagic, "panel": PanelFace,
}  # fmt: skip
# For tests of what faces do: read words, bind, show and report. Without it the fixture `extract` is Python's face.
every_face = pytest.mark.parametrize("extract", FACES, indirect=True)


def pick(widget: Any, value: Any) -> None:
    """Choose `value`, offering it first where it is none of the choices."""
    if hasattr(widget, "options") and value is not None and value not in [known for _, known in widget.options]:
        widget.options = [*widget.options, (str(value), value)]
    widget.value = value


def words(options: dict[str, Any]) -> str:
    """Write options as the grammar spells them."""
    out = []
    for name, value in options.items():
        if name == "cache":
            out += [] if value else ["--no-cache"]
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            out.append(flag)
            continue
        values: Sequence[Any] = value if isinstance(value, list) else [value]
        out += [f"{flag}={quoted(str(one))}" for one in values]
    return " ".join(out)


def same(left: pd.DataFrame, right: pd.DataFrame) -> None:
    """Assert that two frames are equal to the bit."""
    pd.testing.assert_frame_equal(left, right, check_exact=True)
