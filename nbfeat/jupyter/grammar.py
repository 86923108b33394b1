"""The grammar of the magics: the words of a cell → a Request, and back; help and Tab from the table of options."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from IPython.utils.text import DollarFormatter

from nbfeat.backbones.catalog import CATALOG, find
from nbfeat.backbones.user_models import SUFFIXES
from nbfeat.cache.storage import KINDS
from nbfeat.errors import NbfeatError, RequestError, listing, near, sentences
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.options import (
    BLOCK_OPTIONS,
    OPTIONS,
    RUN_OPTIONS,
    FeatureBlock,
    Option,
    WordParser,
    quoted,
    split_words,
    without_comment,
)
from nbfeat.extraction.recipe import Recipe, is_result, recipe_of
from nbfeat.extraction.request import check_frame
from nbfeat.inference.layers import layer_names
from nbfeat.parquet.dataset import is_dataset

PARQUET = ".parquet"
CODE = "--code"  # of %extract_panel
_RUN_NAMES = {option.name for option in RUN_OPTIONS}
_BESIDE_LIKE = ("root", "batch_size", "device", "on")  # settings that say nothing of what is repeated
_MAGIC_ONLY = {"into", "no_cache", "quiet", "help"}  # options that an Extraction has not
# An option as a message names it, in Python's way: `size`, `size=224`.
_NAMED = re.compile(rf"`({'|'.join(option.name for option in OPTIONS)}|cache)(?:=([^`]*))?`")
# What DollarFormatter takes for a name: not between single quotes.
_DOLLAR = re.compile(r"(.*?)\$(\$?[\w.]+)(?=([^']*'[^']*')*[^']*$)")
# Alone on a line, or on the right of an assignment.
_MAGIC = re.compile(r"^(?:\s*[\w.]+\s*=)?\s*(%{1,2})(extract_cache|extract_panel|extract|backbones)\b")
_VALUES = {  # that Tab offers of options that take more
    "weights": ("imagenet", "bundled", "random"),
    "device": ("auto", "cpu", "gpu"),
    "batch_size": ("auto",),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What a cell asked for."""

    frame: str  # name of the frame
    blocks: tuple[FeatureBlock, ...]
    run: Mapping[str, Any]  # options of the run, by name

    @property
    def for_extraction(self) -> dict[str, Any]:
        """The options that Extraction takes."""
        given = {name: value for name, value in self.run.items() if name not in _MAGIC_ONLY}
        return {**given, "cache": False} if self.run.get("no_cache") else given


def read(line: str, body: str | None, defaults: Mapping[str, Any]) -> Request | None:
    """Read the words after ``%extract``, and the body of ``%%extract``; None where help was asked for.

    `defaults` are the settings of ``%config ExtractMagics``. Words on the first line come before them, words of a
    block's own line before both.
    """
    given, words = WordParser(OPTIONS).read(words_of(line))
    if given.get("help"):
        return None
    if not words:
        raise RequestError(
            "%extract needs the name of a dataframe and a backbone: %extract photos ResNet50. `%extract?` tells more."
        )
    frame, *rest = words
    if not frame.isidentifier():
        typed = line.split(maxsplit=1)[0]  # with its quotes
        raise RequestError(f"The frame must be a name, not {typed}. Give it one first: train = {typed}.")
    if "like" in given:
        defaults = {name: value for name, value in defaults.items() if name in _BESIDE_LIKE}
    known = {**defaults, **given}
    run = {name: value for name, value in known.items() if name in _RUN_NAMES}
    block = {name: value for name, value in known.items() if name not in run}
    if not run.get("into", frame).isidentifier():
        raise RequestError(f"--into takes a name, not {run['into']!r}.")
    if "parquet" in run and "into" in run:
        into = f"--into {run['into']}"
        raise RequestError(f"--parquet binds nothing, so that there is nothing for {into}: leave it away.")
    lines = [text for text in _unsilenced(body or "").splitlines() if split_words(text)]  # neither blank nor comment
    if "like" in given:
        if extra := [*rest, *(f"--{name}" for name in block)] or (["the lines of the body"] if lines else []):
            raise RequestError(f"--like repeats the blocks of {given['like']}: leave {listing(extra)} away.")
        return Request(frame, (), run)
    return Request(frame, _read_blocks(rest, block, lines), run)


def _read_blocks(words: list[str], defaults: dict[str, Any], lines: list[str]) -> tuple[FeatureBlock, ...]:
    """Read the backbone on the first line and the blocks of the body, whose default it is where there are any."""
    if not lines:
        return FeatureBlock.from_options(words, defaults)
    if words:
        defaults = {**defaults, "backbone": FeatureBlock.from_options(words, {})[0].backbone}
    return tuple(block for line in lines for block in _read_line(line, defaults))


def _read_line(text: str, defaults: Mapping[str, Any]) -> tuple[FeatureBlock, ...]:
    """Read one line of the body; what is neither block nor comment gets an error that says what the body is."""
    words = split_words(text)
    for flag in (word.partition("=")[0] for word in words):
        if any(flag in option.flags for option in RUN_OPTIONS):
            raise RequestError(f"{flag} is an option of the whole run: move it to the first line, after %%extract.")
    first, *others = words
    is_file = first.endswith(SUFFIXES)  # which may have any sign in its name
    is_code = bool(re.search(r"[()\[\]{}=:;]", first)) or first in {"import", "from", "def", "for", "print"}
    second_is_plain = bool(others) and not others[0].startswith("-")
    if not first.startswith("-") and (second_is_plain or (is_code and not is_file)):
        raise RequestError(
            f"The body is one feature block per line, not code: {text.strip()!r}. Write e.g. `ResNet50 --pooling max`."
        )
    given, rest = WordParser(BLOCK_OPTIONS).read(words)
    return FeatureBlock.from_options(rest, {**defaults, **given})


def words_of(line: str) -> list[str]:
    """Split a line, without a semicolon at its end."""
    return split_words(_unsilenced(line))


def is_silenced(text: str) -> bool:
    """Tell whether a line or a body ends with a semicolon, comments aside."""
    return _unsilenced(text) != text


def _unsilenced(text: str) -> str:
    """Take off a semicolon at the end, which only silences the output."""
    lines = text.splitlines(keepends=True)
    for number in reversed(range(len(lines))):
        if words := without_comment(lines[number]).rstrip():
            if words.endswith(";"):
                lines[number] = words.removesuffix(";") + lines[number][len(words) :]
            break
    return "".join(lines)


def expand(text: str, names: Mapping[str, Any]) -> str:
    """Put values in for ``$name`` and ``{expression}``; ``$$`` and ``{{ }}`` are literal, unknown names an error."""
    if "$" not in text and "{" not in text:
        return text
    try:
        return str(DollarFormatter().vformat(text, (), names))
    except Exception as error:  # an expression of the user's: whatever it raises is about it
        what = f"{text.strip()!r} could not be expanded ({type(error).__name__}: {error})."
        raise RequestError(f"{what} Write $$ or {{{{ }}}} for plain signs.") from error


def literal(text: str) -> str:
    """Write `text` so that `expand` gives it back, whatever signs it holds."""
    if "$" not in text and "{" not in text:
        return text
    pieces = re.split(r"(?<=[{}])", text)  # as string.Formatter takes text apart at braces, and finds $name in each
    return "".join(re.sub(r"([{}])", r"\1\1", _DOLLAR.sub(r"\1$$\2", piece)) for piece in pieces)


def flag(name: str, value: str) -> str:
    """Spell an option that a message names: ``--size 224``."""
    switch = name == "cache" or value in {"", "True"}
    spelling = "--no-cache" if name == "cache" else f"--{name.replace('_', '-')}"
    return spelling if switch else f"{spelling} {quoted(value)}"


def respelled(message: str, spell: Callable[[str, str], str] = flag) -> str:
    """Replace the options that a message names for Python callers by what `spell` makes of each name and value."""
    return _NAMED.sub(lambda found: spell(found[1], (found[2] or "").strip("'\"")), message)


def default_of(name: str, value: Any) -> Any:
    """Check a setting of ``%config ExtractMagics`` as the option's own value would be."""
    option = next(option for option in OPTIONS if option.name == name)
    given, _ = WordParser([option]).read([f"{option.flag}={value}"])
    return given[name]


def usage() -> str:
    """Return what `%extract?` and ``-h`` show."""
    lines = [
        "%extract   FRAME BACKBONE [options]",
        "%%extract  FRAME [BACKBONE] [options]     then one feature block per line: BACKBONE [block options]",
        "",
        "Attach features of the images in a column of the dataframe FRAME as new columns.",
        "",
        "  %extract photos ResNet50 --images path",
        "  %extract photos VGG16 --layer block4_pool --pooling max --normalize l2",
        "  %extract others --like result",
        "",
    ]
    for head, options in (("Options of a feature block", BLOCK_OPTIONS), ("Options of the run", RUN_OPTIONS)):
        lines.append(f"{head}:")
        for option in options:
            choices = f" ({', '.join(option.choices)})" if option.choices else ""
            default = f" [{option.default}]" if option.default else ""
            spelling = ", ".join(option.flags) + ("" if option.switch else f" {option.metavar}")
            lines.append(f"  {spelling:<26} {option.help}{choices}{default}")
        lines.append("")
    return "\n".join(lines)


def frames_in(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dataframes of a notebook by name, hidden ones left out."""
    pandas = sys.modules.get("pandas")  # whoever has a frame has imported it
    frames = {name: value for name, value in names.items() if pandas and isinstance(value, pandas.DataFrame)}
    return {name: frame for name, frame in frames.items() if name.isidentifier() and not name.startswith("_")}


def frame_called(name: str, known: Mapping[str, Any]) -> Any:
    """Return the dataframe that has this `name` in a notebook, or say that it has none."""
    if name not in known:
        frames = frames_in(known)
        hint = near(name, frames) or (f"Dataframes here: {', '.join(sorted(frames))}." if frames else "")
        raise RequestError(
            sentences(f"There is no {name!r} in this notebook.", hint, "Name a dataframe with a column of images.")
        )
    check_frame(known[name])
    return known[name]


def result_called(name: str, known: Mapping[str, Any]) -> Recipe:
    """Return the recipe of the result that has this `name` in a notebook, or of the Parquet file of that name."""
    if name in known and is_result(known[name]):
        value = known[name]
        return value.to_recipe(name) if isinstance(value, Extraction) else replace(value.fitted, source=name)
    if name.endswith(PARQUET) or (name not in known and is_dataset(name)):
        return recipe_of(name)
    results = results_among(known)
    hint = near(name, results) or (f"Results here: {listing(results)}." if results else "")
    what = f"There is no {name!r} in this notebook."
    if name in known:
        what = f"{name} is a {type(known[name]).__name__}, not a result."
    gave = "the name that `result = %extract …` gave"
    way = f"--like takes {gave}, or a .parquet file or a folder that a result was written to."
    raise RequestError(sentences(what, hint, way))


def results_among(known: Mapping[str, Any]) -> list[str]:
    """Return the names of results in a notebook."""
    return sorted(name for name, value in known.items() if is_result(value) and not name.startswith("_"))


def candidates(cell: str, line: int, before: str, names: Mapping[str, Any]) -> list[str]:
    """Return what Tab offers at the cursor; nothing where the cell is not ours. It never imports Keras.

    `before` is the text of the cursor's line up to the cursor, without the word that is being written.
    """
    head = cell.partition("\n")[0]
    in_body = line > 0 and head.lstrip().startswith("%%extract ")
    match = _MAGIC.match(head if in_body else before)
    if match is None:
        return []
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
    take_value = {flag for one in known if not one.switch for flag in one.flags}
    # How many words are neither options nor their values.
    plain = sum(not word.startswith("-") and last not in take_value for last, word in pairwise(["", *words]))
    flags = [one.flag for one in known]
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
        for word in (*words, *first):
            with suppress(NbfeatError):  # all layers of the backbone, if they were looked at before
                return layer_names(find(word))
    if option.name == "like":
        return [*results_among(names), *(quoted(file.name) for file in sorted(Path().glob(f"*{PARQUET}")))]
    return list(_VALUES.get(option.name, ()))
