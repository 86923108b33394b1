"""What Tab offers in %extract and %%extract, from the same table as everything else; it never imports Keras."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher
from IPython.core.interactiveshell import InteractiveShell

from nbfeat.backbones.catalog import CATALOG, find
from nbfeat.cache.storage import KINDS
from nbfeat.errors import NbfeatError
from nbfeat.extraction.options import BLOCK_OPTIONS, OPTIONS, Option, quoted
from nbfeat.inference.layers import layer_names
from nbfeat.jupyter.grammar import CODE, PARQUET, frames_in, results_among

_NAME = "nbfeat"
# Alone on a line, or on the right of an assignment.
_MAGIC = re.compile(r"^(?:\s*[\w.]+\s*=)?\s*(%{1,2})(extract_cache|extract_panel|extract|backbones)\b")
_VALUES = {
    "weights": ("imagenet", "bundled", "random"),
    "device": ("auto", "cpu", "gpu"),
    "batch_size": ("auto",),
}


def candidates(cell: str, line: int, before: str, names: Mapping[str, Any]) -> list[str] | None:
    """Return what can stand at the cursor, or None where the cell is not ours.

    `before` is the text of the cursor's line up to the cursor, without the word that is being written.
    """
    head = cell.partition("\n")[0]
    in_body = line > 0 and head.lstrip().startswith("%%extract ")
    match = _MAGIC.match(head if in_body else before)
    if match is None:
        return None
    offered = {
        "backbones": list(CATALOG),
        "extract_cache": list(KINDS) if "clear" in before else ["clear"],
        "extract_panel": [*frames_in(names), CODE],
    }
    if match[2] in offered:
        return offered[match[2]]
    first = (head if in_body else before)[match.end() :].split()
    words, known = (before.split(), BLOCK_OPTIONS) if in_body else (first, OPTIONS)
    option = next((one for one in known if words and words[-1] in one.flags and not one.switch), None)
    if option is not None:
        return _values_of(option, words if in_body else words[1:], first, names)
    plain, flags = _count_plain(words, known), [one.flag for one in known]
    if not in_body and not plain:
        return list(frames_in(names))
    return flags if plain > (not in_body) else [*CATALOG, *flags]


def _values_of(option: Option, words: list[str], first: list[str], names: Mapping[str, Any]) -> list[str]:
    if option.choices:
        return list(option.choices)
    frame = frames_in(names).get(first[0]) if first else None
    if option.name == "images" and frame is not None:
        return [quoted(str(column)) for column in frame.select_dtypes(exclude="number").columns]
    if option.name == "layer":
        return _layers([*words, *first])
    if option.name == "like":
        return [*results_among(names), *(quoted(file.name) for file in sorted(Path().glob(f"*{PARQUET}")))]
    return list(_VALUES.get(option.name, ()))


def _layers(words: list[str]) -> list[str]:
    """Return all layers of the backbone named, where they were looked at before; else the customary ones."""
    for word in words:
        with suppress(NbfeatError):
            return layer_names(find(word))
    return []


def _count_plain(words: Sequence[str], known: Iterable[Option]) -> int:
    """Count the words that are neither options nor their values."""
    take_value = {flag for option in known if not option.switch for flag in option.flags}
    return sum(not word.startswith("-") and before not in take_value for before, word in pairwise(["", *words]))


def _matcher(shell: InteractiveShell) -> Any:
    @context_matcher(identifier=_NAME, priority=100)  # type: ignore[untyped-decorator]
    def match(context: CompletionContext) -> SimpleMatcherResult:
        text = context.text_until_cursor
        word = re.split(r"[\s,]", text)[-1]  # layers may be listed with commas
        before = text.removesuffix(re.split(r"\s", text)[-1])
        found = candidates(context.full_text, context.cursor_line, before, shell.user_ns) or []
        fitting = [SimpleCompletion(text=one, type="nbfeat") for one in found if one.startswith(word)]
        return {"completions": fitting, "matched_fragment": word, "suppress": bool(found)}

    return match


def load(shell: InteractiveShell) -> None:
    """Add the matcher."""
    if completer := getattr(shell, "Completer", None):
        completer.custom_matchers.append(_matcher(shell))


def unload(shell: InteractiveShell) -> None:
    """Take the matcher back."""
    if completer := getattr(shell, "Completer", None):
        kept = [one for one in completer.custom_matchers if getattr(one, "matcher_identifier", "") != _NAME]
        completer.custom_matchers[:] = kept
