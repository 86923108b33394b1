"""The one table of options, of a feature block and of a run; and FeatureBlock, one set of features from one backbone.

The table feeds everything: the words of the magics, the keywords of `extract`, the traits of `%config`, completion, the
panel and the README. A block goes to text and back: ``FeatureBlock.parse(str(block)) == (block,)``.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn, Self, get_args

from nbfeat.backbones.backbone import SCALINGS, Scaling
from nbfeat.errors import RequestError, listing, near, sentences
from nbfeat.images.resize import INTERPOLATIONS, RESIZES, Interpolation, Resize
from nbfeat.inference.spec import Cut, Pooling, alpha_of, whole

Normalize = Literal["none", "l2", "standard", "minmax", "whiten"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
NORMALIZES: tuple[Normalize, ...] = get_args(Normalize)
PLACES = ("ray",)  # to compute at, beside this process

_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001))))  # those that come along from web pages, too
LARGEST_SIZE = 4096  # pixels; a batch of eight is then 400 MB, beyond what any backbone was trained for


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option, as every face spells it."""

    name: str
    help: str
    short: str | None = None
    type: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    default: str = ""  # the default in words, for help and README
    metavar: str | None = None
    repeat: bool = False  # given again for a second value
    switch: bool = False  # takes no value

    @property
    def flag(self) -> str:
        """The long spelling, e.g. ``--fit-on``."""
        return "--" + self.name.replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        """All spellings, the short one first."""
        return (self.short, self.flag) if self.short else (self.flag,)

    def check(self, value: Any) -> Any:
        """Return `value` as this option's type, or raise RequestError."""
        if self.switch:
            return value
        if self.repeat and isinstance(value, list):
            return [self.check(one) for one in value]
        return one_of(self.choices, self.flag, value) if self.choices else self.type(value)


def one_of(choices: Sequence[str], what: str, value: str) -> str:
    """Return `value` if it is one of `choices`, or raise RequestError."""
    if value in choices:
        return value
    hint = near(str(value), choices) or f"Choose {listing(choices, 'or')}."
    raise RequestError(f"{what} cannot be {value!r}. {hint}")


BLOCK_OPTIONS: tuple[Option, ...] = (
    Option(name="layer", short="-l", metavar="NAME[,NAME]", default="the end",
           help="cut the backbone here; several names make several blocks from one forward pass"),
    Option(name="pooling", short="-p", metavar="HOW", choices=POOLINGS, default="avg",
           help="how a feature map becomes a vector; gem is the generalized mean with p = 3"),
    Option(name="normalize", short="-n", metavar="HOW", choices=NORMALIZES, default="none",
           help="normalization of the features; whiten needs --components"),
    Option(name="components", metavar="N", type=whole("--components"), default="all",
           help="PCA to N columns, after the normalization"),
    Option(name="weights", short="-w", metavar="WEIGHTS", default="the backbone's own",
           help="imagenet, bundled (Pocket's), random (seeded, for tests) or a file of Keras weights"),
    Option(name="alpha", metavar="A", type=alpha_of, default="the backbone's own",
           help="width multiplier of MobileNet and MobileNetV2"),
    Option(name="scaling", metavar="MODE", choices=SCALINGS, default="the backbone's own",
           help="how pixels are scaled before the network: Keras' modes, or none"),
    Option(name="size", metavar="PIXELS", type=whole("--size", LARGEST_SIZE), default="the backbone's own",
           help="side of the square that images are resized to"),
    Option(name="resize", metavar="HOW", choices=RESIZES, default="squash",
           help="squash as Keras' load_img does, crop the centre, or pad with black"),
    Option(name="interpolation", metavar="HOW", choices=INTERPOLATIONS, default="bilinear",
           help="how pixels are interpolated; load_img's own default is nearest"),
    Option(name="prefix", short="-x", metavar="TEXT", default="from backbone, layer and pooling",
           help="first part of the column names"),
)  # fmt: skip

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
    Option(name="precision", metavar="HOW", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
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
OPTIONS = (*BLOCK_OPTIONS, *RUN_OPTIONS)


class WordParser(argparse.ArgumentParser):
    """argparse that raises RequestError, never exits, and never abbreviates: a saved notebook keeps its meaning."""

    def __init__(self, options: Iterable[Option]) -> None:
        super().__init__(prog="", add_help=False, allow_abbrev=False)
        self.options = tuple(options)
        for option in self.options:
            # One that is not given is absent from the result, so that defaults can be layered.
            action = "store_true" if option.switch else "append" if option.repeat else "store"
            self.add_argument(*option.flags, dest=option.name, action=action, default=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Raise RequestError in place of argparse's exit."""
        raise RequestError(f"{message[:1].upper()}{message[1:]}. `%extract?` lists the options and what they take.")

    def read(self, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Split words into the options given and the words that belong to none."""
        found, rest = self.parse_known_intermixed_args(words)
        if flag := next((word.partition("=")[0] for word in rest if word.startswith("-") and word != "-"), ""):
            hint = near(flag, [spelling for option in self.options for spelling in option.flags])
            raise RequestError(sentences(f"There is no option {flag}.", hint, "`%extract?` lists them."))
        # argparse would turn the sentence of a check into one of its own.
        given = vars(found)
        return {option.name: option.check(given[option.name]) for option in self.options if option.name in given}, rest


def split_words(text: str) -> list[str]:
    """Split a line as a shell does, but a backslash is plain text (Windows paths); ``#`` before a word is a comment."""
    lexer = shlex.shlex(without_comment(text), posix=True)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters, lexer.escape = _BLANKS, True, "", ""
    try:
        return list(lexer)
    except ValueError as error:
        raise RequestError(
            f"A quotation mark is not closed in {text.strip()!r}. Close it, or put a word that has one between marks "
            "of the other kind."
        ) from error


def without_comment(text: str) -> str:
    """Return a line without what follows a ``#`` that begins a word."""
    before = re.match(r"""(?:'[^']*'|"[^"]*"|(?<=\S)#|[^#])*""", text)  # quoted, a # in a word, or any other sign
    return before[0] if before else text


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureBlock:
    """One set of features: a backbone, where it is cut, how maps are pooled, how features are normalized.

    Fields left at None take the backbone's own value (the end of the network, ``avg`` for feature maps, its weights,
    scaling and input size).
    """

    backbone: str
    layer: str | None = None
    pooling: Pooling | None = None
    normalize: Normalize = "none"
    components: int | None = None
    weights: str | None = None
    alpha: float | None = None
    scaling: Scaling | None = None
    size: int | None = None
    resize: Resize = "squash"
    interpolation: Interpolation = "bilinear"
    prefix: str | None = None

    def __post_init__(self) -> None:
        """Check every value against the table."""
        for option in BLOCK_OPTIONS:
            if (value := getattr(self, option.name)) is not None:
                object.__setattr__(self, option.name, option.check(value))
        if self.normalize == "whiten" and self.components is None:
            raise RequestError(
                "--normalize whiten needs --components N: without a limit, new images get values in the millions."
            )

    @classmethod
    def parse(cls, text: str, defaults: Mapping[str, Any] | None = None) -> tuple[Self, ...]:
        """Read ``BACKBONE [options]``; several layers make several blocks.

        Parameters
        ----------
        text
            The words of the line magic, e.g. ``"VGG16 --layer block4_pool,block5_pool --pooling max"``.
        defaults
            Options for what `text` does not say; ``backbone`` among them lets the line begin with options.
        """
        given, words = WordParser(BLOCK_OPTIONS).read(split_words(text))
        return cls.from_options(words, {**(defaults or {}), **given})

    @classmethod
    def from_options(cls, words: Sequence[str], options: Mapping[str, Any]) -> tuple[Self, ...]:
        """Make blocks from the words left beside the options, and the options."""
        if len(words) > 1:
            raise RequestError(
                f"One backbone a block, but {listing(words)} were given. Write one feature block per line."
            )
        known = {field.name for field in fields(cls)}
        if unknown := [name for name in options if name not in known]:
            raise RequestError(
                sentences(f"{unknown[0]!r} is not an option of a feature block.", near(unknown[0], known))
            )
        values = {**options, **({"backbone": words[0]} if words else {})}
        if not values.get("backbone"):
            raise RequestError(
                "No backbone was named. Try `Pocket` (at once, without a download), `MobileNetV2` (light) or "
                "`ResNet50` (usual); `%backbones` lists all."
            )
        layers = values.pop("layer", None)
        names = layers.split(",") if isinstance(layers, str) else layers or [None]
        return tuple(cls(**values, layer=name.strip() if name else None) for name in names)

    def __str__(self) -> str:
        """Return the words that `parse` reads back to this block."""
        defaults = type(self).__dataclass_fields__
        values = [(option.name, getattr(self, option.name)) for option in BLOCK_OPTIONS]
        given = {name: value for name, value in values if value != defaults[name].default}
        return " ".join([quoted(self.backbone), *spelled(BLOCK_OPTIONS, given)])

    @property
    def cut(self) -> Cut:
        """The output of the network that it reads."""
        return Cut(self.layer or "", self.pooling or "")

    @property
    def is_learned(self) -> bool:
        """Whether the normalization learns from rows."""
        return self.normalize not in {"none", "l2"} or self.components is not None


def spelled(options: Iterable[Option], values: Mapping[str, Any]) -> list[str]:
    """Write those of `options` that have values, as `split_words` and WordParser read them back."""
    words = []
    for option in (option for option in options if option.name in values):
        given = values[option.name]
        if option.switch:
            words += [option.flag] if given else []
        else:
            for value in map(str, given if option.repeat else [given]):
                words.append(f"{option.flag}{'=' if value.startswith('-') else ' '}{quoted(value)}")
    return words


def quoted(word: str) -> str:
    """Quote a word so that `split_words` gives it back, at the end of a line, too, where a semicolon would silence."""
    if word and not re.search(r"[\s'\"#;]", word):
        return word
    return '"' + word.replace('"', '"\'"\'"') + '"' if "'" in word else f"'{word}'"


def column_prefix(block: FeatureBlock, backbone: str, image_column: str | None = None) -> str:
    """Return the first part of a block's column names: ``[image column_]backbone[alpha][_layer][_pooling]``."""
    alpha = "" if block.alpha is None else f"{block.alpha:.2f}".replace(".", "")
    pooling = "" if block.pooling == "avg" else block.pooling
    name = "_".join(part for part in (backbone.lower() + alpha, block.layer, pooling) if part)
    name = name if block.prefix is None else block.prefix
    return f"{image_column}_{name}" if image_column is not None else name


def column_names(prefix: str, width: int) -> list[str]:
    """Return the names of `width` columns, numbers padded with zeros, from ``prefix_0000`` on."""
    digits = max(4, len(str(width - 1)))  # so that blocks of different widths sort and read alike
    return [f"{prefix}_{number:0{digits}d}" for number in range(width)]
