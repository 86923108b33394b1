"""The faces of extraction, all with one signature: what is promised of one is promised of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import pandas as pd
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import nbfeat
from nbfeat import Extraction, RequestError
from nbfeat.features.block import quoted


class Face(Protocol):
    """Extract `blocks` of `frame`; bad usage raises RequestError, whatever the face makes of it for people."""

    def __call__(self, frame: Any, *blocks: str, **options: Any) -> Extraction: ...


def python(frame: Any, *blocks: str, **options: Any) -> Extraction:
    return nbfeat.extract(frame, *blocks, **options)


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
