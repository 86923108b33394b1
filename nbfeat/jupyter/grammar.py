"""The grammar of the magics: one table of options → arguments, help and defaults → a Request.

::

    %extract   FRAME BACKBONE [options]
    %extract   FRAME --like RESULT
    %%extract  FRAME [BACKBONE] [options]     and one feature block per line of the body
    %extract_panel [FRAME | --code]
    %extract_cache [clear [features|networks|weights|precisions|all]]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nbfeat.backbones.model_file import SUFFIXES
from nbfeat.cache.storage import KINDS
from nbfeat.errors import RequestError, listing, near, sentences
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.like import is_result, recipe_of
from nbfeat.extraction.options import (
    BLOCK_OPTIONS,
    FeatureBlock,
    Option,
    WordParser,
    spelled,
    split_words,
    without_comment,
)
from nbfeat.extraction.recipe import Recipe
from nbfeat.extraction.request import PLACES
from nbfeat.inference.engines.base import PRECISIONS
from nbfeat.parquet.dataset import is_dataset

RUN_OPTIONS: tuple[Option, ...] = (
    Option(name="images", short="-i", metavar="COLUMN", repeat=True, default="the one that looks like images",
           help="column of the frame that holds images; give it again for a second one"),
    Option(name="root", metavar="FOLDER", default="the notebook's folder", help="where relative paths start"),
    Option(name="fit_on", metavar="QUERY", default="all rows",
           help="rows that learned normalizations learn from, e.g. \"split == 'train'\""),
    Option(name="like", metavar="RESULT",
           help="repeat an earlier result, by its name or its Parquet file: same blocks, nothing is learned"),
    Option(name="into", short="-o", metavar="NAME", default="FRAME",
           help="bind the new frame to NAME and leave FRAME as it is"),
    Option(name="batch_size", short="-b", metavar="N", default="auto", help="images per batch"),
    Option(name="device", short="-d", metavar="DEVICE", default="auto", help="auto, cpu, gpu or gpu:1"),
    Option(name="precision", metavar="HOW", choices=("auto", *PRECISIONS), default="auto",
           help="number format that the network computes in; auto is the fastest that agrees with float32"),
    Option(name="allow_remote", switch=True,
           help="fetch images by address (http, https, s3, gs, zip); private machines: set NBFEAT_REMOTE_PRIVATE=1"),
    Option(name="parquet", metavar="PATH",
           help="write to Parquet files in this folder or at this address, as results larger than memory need; nothing "
                "is bound, the cache is not used, and the same cell goes on where it was stopped"),
    Option(name="on", metavar="WHERE", choices=PLACES, default="this process",
           help="compute on a Ray cluster, whose machines must see the images at the same paths"),
    Option(name="no_cache", switch=True, help="compute every image again, and keep nothing"),
    Option(name="replace", switch=True,
           help="overwrite columns of the same names that no block made, or files of another request"),
    Option(name="quiet", short="-q", switch=True, help="show no progress"),
    Option(name="help", short="-h", switch=True, help="show this"),
)  # fmt: skip

PARQUET = ".parquet"
CODE = "--code"  # of %extract_panel
OPTIONS = (*BLOCK_OPTIONS, *RUN_OPTIONS)
_BLOCK_NAMES = {option.name for option in BLOCK_OPTIONS}
_BESIDE_LIKE = ("root", "batch_size", "device", "on")  # settings that say nothing of what is repeated
_FOR_EXTRACTION = (
    "images", "root", "fit_on", "like", "batch_size", "device", "precision", "on", "allow_remote", "replace", "parquet",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """What a cell asked for."""

    frame: str  # name of the frame
    blocks: tuple[FeatureBlock, ...]
    run: Mapping[str, Any]  # options of the run, by name
    quiet: bool = False

    @property
    def into(self) -> str:
        """The name that the new frame is bound to."""
        return str(self.run.get("into", self.frame))

    @property
    def for_extraction(self) -> dict[str, Any]:
        """The options that Extraction takes."""
        given = {name: self.run[name] for name in _FOR_EXTRACTION if name in self.run}
        return {**given, **({"cache": False} if self.run.get("no_cache") else {})}

    def __str__(self) -> str:
        """Return the cell that reads back to this request."""
        return written(self.frame, {**self.run, "quiet": self.quiet}, map(str, self.blocks))


def written(frame: str, run: Mapping[str, Any], blocks: Iterable[str]) -> str:
    """Write the cell of a frame's name, options of the run, and a line for each block."""
    return "\n".join([" ".join(["%%extract", frame, *spelled(RUN_OPTIONS, run)]), *blocks])


def read(line: str, body: str | None, defaults: Mapping[str, Any]) -> Request | None:
    """Read the words after ``%extract``, and the body of ``%%extract``; None where help was asked for.

    `defaults` are the settings of ``%config ExtractMagics``. Words on the first line come before them, words of a
    block's own line before both.
    """
    given, words = WordParser(OPTIONS).read(_words(line))
    if given.pop("help", False):
        return None
    quiet = bool(given.pop("quiet", False))
    if not words:
        raise RequestError(
            "%extract needs the name of a dataframe and a backbone: %extract photos ResNet50. `%extract?` tells more."
        )
    frame, *rest = words
    if not frame.isidentifier():
        written = line.split(maxsplit=1)[0]  # with its quotes
        raise RequestError(f"The frame must be a name, not {written}. Give it one first: train = {written}.")
    if "like" in given:
        defaults = {name: value for name, value in defaults.items() if name in _BESIDE_LIKE}
    known = {**defaults, **given}
    run = {name: value for name, value in known.items() if name not in _BLOCK_NAMES and name != "backbone"}
    if not run.get("into", frame).isidentifier():
        raise RequestError(f"--into takes a name, not {run['into']!r}.")
    if "parquet" in run and "into" in run:
        raise RequestError(
            f"--parquet binds nothing, so that there is nothing for --into {run['into']}: leave it away."
        )
    block = {name: value for name, value in known.items() if name not in run}
    lines = [text for text in _unsilenced(body or "").splitlines() if split_words(text)]  # neither blank nor comment
    if "like" in given:
        _refuse_beside_like(str(given["like"]), [*rest, *(f"--{name}" for name in block)], lines)
        return Request(frame, (), run, quiet)
    if not lines:
        return Request(frame, FeatureBlock.from_options(rest, block), run, quiet)
    if rest:
        block["backbone"] = FeatureBlock.from_options(rest, {})[0].backbone
    return Request(frame, tuple(found for text in lines for found in read_line(text, block)), run, quiet)


def _refuse_beside_like(like: str, words: list[str], lines: list[str]) -> None:
    if words or lines:
        named = listing(words) if words else "the lines of the body"
        raise RequestError(f"--like repeats the blocks of {like}: leave {named} away.")


def read_line(text: str, defaults: Mapping[str, Any]) -> tuple[FeatureBlock, ...]:
    """Read one line of the body; what is neither block nor comment gets an error that says what the body is."""
    parser = WordParser(BLOCK_OPTIONS)
    words = split_words(text)
    for word in words:
        flag = word.partition("=")[0]
        if any(flag in option.flags for option in RUN_OPTIONS):
            raise RequestError(f"{flag} is an option of the whole run: move it to the first line, after %%extract.")
    second_is_plain = len(words) > 1 and not words[1].startswith("-")
    is_file = words[0].endswith(SUFFIXES)  # which may have any sign in its name
    if not words[0].startswith("-") and (second_is_plain or (_is_code(words[0]) and not is_file)):
        line = text.strip()
        raise RequestError(
            f"The body is one feature block per line, not code: {line!r}. Write e.g. `ResNet50 --pooling max`."
        )
    given, rest = parser.read(words)
    return FeatureBlock.from_options(rest, {**defaults, **given})


def _is_code(word: str) -> bool:
    return any(sign in word for sign in "()[]{}=:;") or word in {"import", "from", "def", "for", "print"}


def _words(line: str) -> list[str]:
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


def cache_words(line: str) -> str | None:
    """Read the words after ``%extract_cache``: what to clear, or None."""
    match _words(line):
        case []:
            return None
        case ["clear"]:
            return "features"
        case ["clear", what]:
            return what
    raise RequestError(f"%extract_cache takes nothing, or clear [{'|'.join(KINDS)}], not {line.strip()!r}.")


def panel_words(line: str) -> str | None:
    """Read the words after ``%extract_panel``: the name of a frame, CODE, or None."""
    match _words(line):
        case []:
            return None
        case [word] if word == CODE or word.isidentifier():
            return word
    raise RequestError(f"%extract_panel takes the name of a dataframe, or {CODE}, not {line.strip()!r}.")


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
        lines += [_usage_of(option) for option in options]
        lines.append("")
    return "\n".join(lines)


def _usage_of(option: Option) -> str:
    spelled = ", ".join(option.flags) + ("" if option.switch else f" {option.metavar}")
    choices = f" ({', '.join(option.choices)})" if option.choices else ""
    default = f" [{option.default}]" if option.default else ""
    return f"  {spelled:<26} {option.help}{choices}{default}"


def markdown() -> str:
    """Return the table of options for the README; a test compares them."""
    rows = ["| option | of | meaning | default |", "|---|---|---|---|"]
    for scope, options in (("block", BLOCK_OPTIONS), ("run", RUN_OPTIONS)):
        for option in options:
            value = "" if option.switch else f" {option.metavar}"
            spelled = "`" + ", ".join(option.flags) + value + "`"
            choices = ": " + " ".join(f"`{choice}`" for choice in option.choices) if option.choices else ""
            rows.append(f"| {spelled} | {scope} | {option.help}{choices} | {option.default} |")
    return "\n".join(rows)


def check_name(name: str, known: Mapping[str, Any]) -> Any:
    """Return the value that `name` has in a notebook, or say that it has none."""
    if name not in known:
        frames = [
            key for key, value in known.items() if type(value).__name__ == "DataFrame" and not key.startswith("_")
        ]
        hint = near(name, frames) or (f"Dataframes here: {', '.join(sorted(frames))}." if frames else "")
        raise RequestError(
            sentences(f"There is no {name!r} in this notebook.", hint, "Name a dataframe with a column of images.")
        )
    return known[name]


def result_called(name: str, known: Mapping[str, Any]) -> Recipe:
    """Return the recipe of the result that has this `name` in a notebook, or of the Parquet file of that name."""
    if name in known and is_result(known[name]):
        value = known[name]
        return Recipe.of(value, name) if isinstance(value, Extraction) else replace(value.fitted, source=name)
    if name.endswith(PARQUET) or (name not in known and is_dataset(name)):
        return recipe_of(name)
    results = results_among(known)
    hint = near(name, results) or (f"Results here: {listing(results)}." if results else "")
    what = f"{name} is a {type(known[name]).__name__}, not a result." if name in known else ""
    what = what or f"There is no {name!r} in this notebook."
    way = (
        "--like takes the name that `result = %extract …` gave, or a .parquet file or a folder that a result was "
        "written to."
    )
    raise RequestError(sentences(what, hint, way))


def results_among(known: Mapping[str, Any]) -> list[str]:
    """Return the names of results in a notebook."""
    return sorted(name for name, value in known.items() if is_result(value) and not name.startswith("_"))
