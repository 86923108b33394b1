"""The grammar of the magics: parses a cell into a Request, and provides help and completion."""

import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from keyword import iskeyword
from pathlib import Path
from typing import Any

from IPython.utils.text import DollarFormatter

from nbfeat.backbones.catalog import CATALOG, find
from nbfeat.backbones.user_models import SUFFIXES
from nbfeat.cache.storage import KINDS
from nbfeat.errors import NbfeatError, RequestError, listing, near, sentences
from nbfeat.extraction import options
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.options import BLOCK_OPTIONS, OPTIONS, RUN_OPTIONS, FeatureBlock, quoted, split_words
from nbfeat.extraction.recipe import Recipe, is_result, recipe_of
from nbfeat.extraction.request import check_frame
from nbfeat.inference.layers import layer_names
from nbfeat.parquet.dataset import is_dataset

PARQUET = ".parquet"
CODE = "--code"  # of %extract_panel
_RUN_NAMES = {option.name for option in RUN_OPTIONS}
_BESIDE_LIKE = ("root", "batch_size", "device", "on")  # settings that don't affect what --like repeats
_MAGIC_ONLY = {"into", "no_cache", "quiet", "help"}  # options that Extraction doesn't have
# An option as a message names it in Python form: `size`, `size=224`.
_NAMED = re.compile(rf"`({'|'.join(option.name for option in OPTIONS)}|cache)(?:=([^`]*))?`")
_DOLLAR = re.compile(r"(.*?)\$(\$?[\w.]+)(?=([^']*'[^']*')*[^']*$)")  # as in DollarFormatter: not in single quotes
_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'?|"[^"]*"?)+""")  # its quotation marks may not be closed yet
# At the start of a line, or on the right of an assignment.
_MAGIC = re.compile(r"^(?:\s*[\w.]+\s*=)?\s*(%{1,2})(extract_cache|extract_panel|extract|backbones)\b")
# Offered by Tab, for options that accept more.
_VALUES = {"weights": ("imagenet", "random"), "device": ("auto", "cpu", "gpu"), "batch_size": ("auto",)}


@dataclass(frozen=True, slots=True)
class Request:
    """What a cell requests."""

    frame: str  # name of the frame
    blocks: tuple[FeatureBlock, ...]
    run: Mapping[str, Any]  # options of the run, by name

    @property
    def for_extraction(self) -> dict[str, Any]:
        """The options for Extraction."""
        given = {name: value for name, value in self.run.items() if name not in _MAGIC_ONLY}
        return {**given, "cache": False} if self.run.get("no_cache") else given


def read(line: str, body: str | None, defaults: Mapping[str, Any]) -> Request | None:
    """Read the words after ``%extract`` and the body of ``%%extract``; return None if help was requested."""
    # A block's own line overrides the first line, which overrides `defaults` (``%config ExtractMagics``).
    given, words = options.WordParser(OPTIONS).read(words_of(line))
    if given.get("help"):
        return None
    if not words:
        raise RequestError("%extract needs a dataframe and a backbone: %extract photos ResNet50. Try `%extract?`.")
    frame, *rest = words
    if not frame.isidentifier():
        typed = options.shown(line.split(maxsplit=1)[0])  # with its quotes
        raise RequestError(f"The frame must be a variable name, not {typed}. Give it a name first: train = {typed}.")
    if "like" in given:
        defaults = {name: value for name, value in defaults.items() if name in _BESIDE_LIKE}
    known = {**defaults, **given}
    run = {name: value for name, value in known.items() if name in _RUN_NAMES}
    block = {name: value for name, value in known.items() if name not in run}
    if not run.get("into", frame).isidentifier() or iskeyword(run.get("into", "")):
        raise RequestError(f"`into` must be a variable name, not {run['into']!r}. Choose one such as features.")
    if "parquet" in run and "into" in run:
        raise RequestError(f"With --parquet no dataframe is created. Drop --into {run['into']}.")
    lines = [text for text in _unsilenced(body or "").splitlines() if split_words(text)]  # neither blank nor comment
    if "like" in given:
        if extra := [*rest, *(f"--{name}" for name in block)] or (["the lines of the body"] if lines else []):
            raise RequestError(f"--like repeats the blocks of {given['like']}: drop {listing(extra)}.")
        return Request(frame, (), run)
    if lines and rest:  # the backbone of lines that name none
        block["backbone"] = FeatureBlock.from_options(rest, {})[0].backbone
    blocks = [_read_line(text, block) for text in lines] or [FeatureBlock.from_options(rest, block)]
    return Request(frame, tuple(chain.from_iterable(blocks)), run)


def _read_line(text: str, defaults: Mapping[str, Any]) -> tuple[FeatureBlock, ...]:
    """Read one line of the body, or raise an error that explains what the body must be."""
    words = split_words(text)
    for flag in (word.partition("=")[0] for word in words):
        if any(flag in option.flags for option in RUN_OPTIONS):
            raise RequestError(f"{flag} applies to the whole run. Move it to the first line, after %%extract.")
    first, *others = words
    is_file = first.endswith(SUFFIXES)  # and may have any character in its name
    is_code = bool(re.search(r"[()\[\]{}=:;]", first)) or first in {"import", "from", "def", "for", "print"}
    second_is_plain = bool(others) and not others[0].startswith("-")
    if not first.startswith("-") and (second_is_plain or (is_code and not is_file)):
        way = "Write e.g. `ResNet50 --pooling max`."
        raise RequestError(f"The body must be one feature block per line, not {options.shown(text).strip()!r}. {way}")
    given, rest = options.WordParser(BLOCK_OPTIONS).read(words)
    return FeatureBlock.from_options(rest, {**defaults, **given})


def words_of(line: str) -> list[str]:
    """Split a line into words, without its final semicolon."""
    return split_words(_unsilenced(line))


def is_silenced(text: str) -> bool:
    """Return whether a line or body ends with a semicolon, ignoring comments."""
    return _unsilenced(text) != text


def _unsilenced(text: str) -> str:
    """Remove a final semicolon, which only silences the output."""
    lines = text.splitlines(keepends=True)
    for number in reversed(range(len(lines))):
        if words := options.without_comment(lines[number]).rstrip():
            if words.endswith(";"):
                lines[number] = words.removesuffix(";") + lines[number][len(words) :]
            break
    return "".join(lines)


class _Formatter(DollarFormatter):
    """Inserts values so that each is part of one word, even with spaces or dashes."""

    def format_field(self, value: Any, format_spec: str) -> str:
        return options.hidden(str(super().format_field(value, format_spec)))


def expand(text: str, names: Mapping[str, Any]) -> str:
    """Expand ``$name`` and ``{expression}``; ``$$`` and ``{{ }}`` are literal, unknown names are errors."""
    if "$" not in text and "{" not in text:
        return text
    try:
        return str(_Formatter().vformat(text, (), names))
    except Exception as error:  # the user's expression may raise anything
        what = f"{text.strip()!r} could not be expanded ({type(error).__name__}: {error})."
        raise RequestError(f"{what} Write $$ or {{{{ }}}} for literal characters.") from error


def literal(text: str) -> str:
    """Escape `text` so that `expand` returns it unchanged."""
    if "$" not in text and "{" not in text:
        return text
    pieces = re.split(r"(?<=[{}])", text)  # string.Formatter splits at braces, then finds $name in each piece
    return "".join(re.sub(r"([{}])", r"\1\1", _DOLLAR.sub(r"\1$$\2", piece)) for piece in pieces)


def flag(name: str, value: str) -> str:
    """Spell an option that a message names: ``--size 224``."""
    switch = name == "cache" or value in {"", "True"}
    spelling = "--no-cache" if name == "cache" else f"--{name.replace('_', '-')}"
    return spelling if switch else f"{spelling} {quoted(value)}"


def respelled(message: str, spell: Callable[[str, str], str] = flag) -> str:
    """Replace the options that a message names for Python callers by what `spell` makes of each name and value."""
    return _NAMED.sub(lambda found: spell(found[1], (found[2] or "").strip("'\"")), message)


def usage() -> str:
    """Return the help text that `%extract?` and ``-h`` show."""
    lines = [
        "%extract   FRAME BACKBONE [options]",
        "%%extract  FRAME [BACKBONE] [options]     then one feature block per line: BACKBONE [block options]",
        "",
        "Extract features of the images in the dataframe FRAME, and attach them as new columns.",
        "",
        "  %extract photos ResNet50 --images path",
        "  %extract photos VGG16 --layer block4_pool --pooling max --normalize l2",
        "  %extract others --like result",
        "",
    ]
    for head, table in (("Options of a feature block", BLOCK_OPTIONS), ("Options of the run", RUN_OPTIONS)):
        lines.append(f"{head}:")
        for option in table:
            choices = f" ({', '.join(option.choices)})" if option.choices else ""
            default = f" [{option.default}]" if option.default else ""
            spelling = ", ".join(option.flags) + ("" if option.switch else f" {option.metavar}")
            lines.append(f"  {spelling:<26} {option.help}{choices}{default}")
        lines.append("")
    return "\n".join(lines)


def frames_in(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dataframes of a notebook by name, except hidden ones."""
    pandas = sys.modules.get("pandas")  # imported if any frame exists
    frames = {name: value for name, value in names.items() if pandas and isinstance(value, pandas.DataFrame)}
    return {name: frame for name, frame in frames.items() if name.isidentifier() and not name.startswith("_")}


def frame_called(name: str, known: Mapping[str, Any]) -> Any:
    """Return the dataframe called `name` in a notebook, or raise."""
    if name not in known:
        frames = frames_in(known)
        hint = near(name, frames) or (f"Dataframes here: {', '.join(sorted(frames))}." if frames else "")
        problem = f"{name!r} is not defined in this notebook."
        raise RequestError(sentences(problem, hint, "Name a dataframe with a column of images."))
    check_frame(known[name])
    return known[name]


def result_called(name: str, known: Mapping[str, Any]) -> Recipe:
    """Return the recipe of the result called `name` in a notebook, or of the Parquet file with that name."""
    if name in known and is_result(known[name]):
        value = known[name]
        return value.to_recipe(name) if isinstance(value, Extraction) else replace(value.fitted, source=name)
    if name.endswith(PARQUET) or (name not in known and is_dataset(name)):
        return recipe_of(name)
    results = results_among(known)
    hint = near(name, results) or (f"Results here: {listing(results)}." if results else "")
    what = f"{name!r} is not defined in this notebook."
    if name in known:
        what = f"{name} must be a result, not {type(known[name]).__name__}."
    way = "Give --like the name of a result (`result = %extract …`), or the .parquet file or folder of one."
    raise RequestError(sentences(what, hint, way))


def results_among(known: Mapping[str, Any]) -> list[str]:
    """Return the names of results in a notebook."""
    return sorted(name for name, value in known.items() if is_result(value) and not name.startswith("_"))


def completions(cell: str, line: int, column: int, names: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return what is typed before the cursor, and what can replace it, with the quotation marks that it needs."""
    text = cell.split("\n")[line]
    before, after = text[:column], text[column:]
    typed = _WORD.findall(f"{before}.")[-1][:-1]  # the dot makes a word even of nothing
    before = before.removesuffix(typed)
    flag, equals, value = typed.partition("=")
    if equals and any(flag in option.flags for option in OPTIONS):
        before, typed = f"{before}{flag} ", value
    with suppress(RequestError):  # the line before has an unclosed quotation mark
        found = candidates(cell, line, before, names)
        for word in (typed, typed.rpartition(",")[2]):  # layers may be listed with commas
            mark = word[:1] if word[:1] in {"'", '"'} else ""
            if fitting := [one for one in found if one.startswith(word.removeprefix(mark).removesuffix(mark))]:
                marked = [f"{mark}{one}{mark}" if mark and mark not in one else quoted(one) for one in fitting]
                return word, [literal(one.removesuffix(mark) if after.startswith(mark) else one) for one in marked]
    return typed, []


def candidates(cell: str, line: int, before: str, names: Mapping[str, Any]) -> list[str]:
    """Return what can follow `before` on a line of `cell`, without importing Keras."""
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
    first = words_of((head if in_body else before)[match.end() :])
    words, known = (words_of(before), BLOCK_OPTIONS) if in_body else (first, OPTIONS)
    take_value = {flag: one for one in known if not one.switch for flag in one.flags}
    if words and words[-1] in take_value:
        return _values_of(take_value[words[-1]], words, first, names)
    # Words that are neither options nor their values.
    plain = sum(not word.startswith("-") and last not in take_value for last, word in pairwise(["", *words]))
    flags = [one.flag for one in known]
    if not in_body and not plain:
        return list(frames_in(names))
    return flags if plain > (not in_body) else [*CATALOG, *flags]


def _values_of(option: options.Option, words: list[str], first: list[str], names: Mapping[str, Any]) -> list[str]:
    if option.choices:
        return list(option.choices)
    if option.name == "images" and first and first[0] in (frames := frames_in(names)):
        return [str(column) for column in frames[first[0]].select_dtypes(exclude="number").columns]
    if option.name == "layer":
        for word in (*words, *first):
            with suppress(NbfeatError):  # all layers of the backbone, if already listed
                return layer_names(find(word))
    if option.name == "like":
        return [*results_among(names), *(file.name for file in sorted(Path().glob(f"*{PARQUET}")))]
    return list(_VALUES.get(option.name, ()))
