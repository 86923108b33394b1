"""The table of options for feature blocks and runs, which every interface and the README use; and FeatureBlock."""

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
PLACES = ("ray",)  # where to compute other than in this process

_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001))))  # including those pasted from web pages
# Lone surrogates, which no text has, stand for characters of an inserted value.
_HIDE = {ord(one): 0xD800 + number for number, one in enumerate([*_BLANKS, *"'\"#-;=,${}"])}
_SHOW = {value: key for key, value in _HIDE.items()}
LARGEST_SIZE = 4096  # pixels; larger than any backbone was trained for: a batch of eight already takes 400 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option, with its spellings and checks for every interface."""

    name: str
    help: str
    short: str | None = None
    type: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    default: str = ""  # the default in words, for help and README
    metavar: str | None = None
    repeat: bool = False  # may be given several times
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
        return one_of(self.choices, self.name, value) if self.choices else self.type(value)


def one_of(choices: Sequence[str], what: str, value: str) -> str:
    """Return `value` if it is one of `choices`, or raise RequestError that names the option `what`."""
    if value in choices:
        return value
    problem = f"`{what}` must be {listing(choices, 'or')}, not {value!r}."
    raise RequestError(sentences(problem, near(str(value), choices)))


BLOCK_OPTIONS: tuple[Option, ...] = (
    Option(name="layer", short="-l", metavar="NAME[,NAME]", default="the end of the network",
           help="layer to cut the backbone at; several names make several blocks from one forward pass"),
    Option(name="pooling", short="-p", metavar="HOW", choices=POOLINGS, default="avg",
           help="how a feature map becomes a vector; gem is the generalized mean with p = 3"),
    Option(name="normalize", short="-n", metavar="HOW", choices=NORMALIZES, default="none",
           help="normalization of the features; whiten also needs a number of components"),
    Option(name="components", metavar="N", type=whole("components"), default="all",
           help="reduce the features to N columns by PCA, after normalization"),
    Option(name="weights", short="-w", metavar="WEIGHTS", default="the backbone's default",
           help="imagenet, random (seeded, for tests) or a file of weights"),
    Option(name="alpha", metavar="A", type=alpha_of, default="the backbone's default",
           help="width multiplier of MobileNet and MobileNetV2"),
    Option(name="scaling", metavar="MODE", choices=SCALINGS, default="the backbone's default",
           help="how pixels are scaled before the network: one of Keras' modes, or none"),
    Option(name="size", metavar="PIXELS", type=whole("size", LARGEST_SIZE), default="the backbone's default",
           help="side of the square that images are resized to, in pixels"),
    Option(name="resize", metavar="HOW", choices=RESIZES, default="squash",
           help="squash like Keras' load_img, crop the center, or pad with black"),
    Option(name="interpolation", metavar="HOW", choices=INTERPOLATIONS, default="bilinear",
           help="interpolation used for resizing; load_img defaults to nearest"),
    Option(name="prefix", short="-x", metavar="TEXT", default="from backbone, layer and pooling",
           help="first part of the column names"),
)  # fmt: skip

RUN_OPTIONS: tuple[Option, ...] = (
    Option(name="images", short="-i", metavar="COLUMN", repeat=True, default="the column that looks like images",
           help="column of the frame that holds images; repeat it for several columns"),
    Option(name="root", metavar="FOLDER", default="the notebook's folder", help="folder where relative paths start"),
    Option(name="fit_on", metavar="QUERY", default="all rows",
           help="rows used to fit normalization and PCA, e.g. \"split == 'train'\""),
    Option(name="like", metavar="RESULT",
           help="repeat an earlier result, given by name or Parquet file: same blocks, nothing is fitted"),
    Option(name="into", short="-o", metavar="NAME", default="FRAME",
           help="assign the new frame to NAME and leave FRAME unchanged"),
    Option(name="batch_size", short="-b", metavar="N", default="auto", help="images per batch"),
    Option(name="device", short="-d", metavar="DEVICE", default="auto", help="auto, cpu, gpu or gpu:1"),
    Option(name="precision", metavar="HOW", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
           help="number format that the network computes in; auto picks the fastest that agrees with float32"),
    Option(name="allow_remote", switch=True,
           help="fetch images from URLs (http, https, s3, gs, zip); for private hosts, set NBFEAT_REMOTE_PRIVATE=1"),
    Option(name="parquet", metavar="PATH",
           help="write Parquet files to this folder or URL, for results larger than memory; FRAME is unchanged, the "
                "cache is not used, and running the cell again resumes"),
    Option(name="on", metavar="WHERE", choices=PLACES, default="this process",
           help="compute on a Ray cluster, whose machines must see the images at the same paths"),
    Option(name="no_cache", switch=True, help="ignore the cache: compute every image and save no features"),
    Option(name="replace", switch=True,
           help="overwrite columns of the same names that no block made, or files written for a different request"),
    Option(name="quiet", short="-q", switch=True, help="show no progress"),
    Option(name="help", short="-h", switch=True, help="show this help"),
)  # fmt: skip
OPTIONS = (*BLOCK_OPTIONS, *RUN_OPTIONS)


class WordParser(argparse.ArgumentParser):
    """argparse that raises RequestError, never exits, and never abbreviates: a saved notebook keeps its meaning."""

    def __init__(self, options: Iterable[Option]) -> None:
        super().__init__(prog="", add_help=False, allow_abbrev=False)
        self.options = tuple(options)
        for option in self.options:
            # Options that are not given must be absent, so that defaults can be layered.
            action = "store_true" if option.switch else "append" if option.repeat else "store"
            self.add_argument(*option.flags, dest=option.name, action=action, default=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Raise RequestError instead of exiting."""
        raise RequestError(f"{message[:1].upper()}{message[1:]}. `%extract?` lists the options and their values.")

    def read(self, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Split words into options and remaining words."""
        found, rest = self.parse_known_intermixed_args(words)
        if flag := next((word.partition("=")[0] for word in rest if word.startswith("-") and word != "-"), ""):
            hint = near(flag, [spelling for option in self.options for spelling in option.flags])
            raise RequestError(sentences(f"Unknown option {flag}.", hint, "`%extract?` lists all options."))
        # Checked here because argparse would replace the messages with its own.
        given = {name: [*map(shown, one)] if isinstance(one, list) else shown(one) for name, one in vars(found).items()}
        known = {option.name: option.check(given[option.name]) for option in self.options if option.name in given}
        return known, [*map(shown, rest)]


def hidden(text: str) -> str:
    """Return `text` with other characters wherever it would split a line or begin an option; WordParser shows it."""
    return text.translate(_HIDE)


def shown(text: Any) -> Any:
    """Return what `hidden` was given; anything but text unchanged."""
    return text.translate(_SHOW) if isinstance(text, str) else text


def split_words(text: str) -> list[str]:
    """Split a line like a shell, but keep backslashes (Windows paths); ``#`` at the start of a word is a comment."""
    lexer = shlex.shlex(without_comment(text), posix=True)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters, lexer.escape = _BLANKS, True, "", ""
    try:
        return list(lexer)
    except ValueError as error:
        way = "Close it, or write a word that contains one in quotation marks of the other kind."
        raise RequestError(f"Unclosed quotation mark in {shown(text).strip()!r}. {way}") from error


def without_comment(text: str) -> str:
    """Remove a comment: a ``#`` at the start of a word and everything after it."""
    # Quoted text, a # in a word, or other characters.
    return str(re.findall(r"""(?:'[^']*'|"[^"]*"|(?<=\S)#|[^#])*""", text)[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureBlock:
    """A feature block: a backbone, the layer to cut it at, and how to pool and normalize its features.

    Parameters
    ----------
    backbone : str
        Name of a backbone, as in `nbfeat.backbones`, or the path of a ``.keras`` file.
    layer : str, optional
        Layer to cut the backbone at. By default its last layer without the classifier.
    pooling : {"avg", "max", "gem", "flatten"}, optional
        How a feature map (height × width × channels) becomes a vector: ``"flatten"`` keeps every value, the others
        give one per channel. By default ``"avg"``; only feature maps are pooled.
    normalize : {"none", "l2", "standard", "minmax", "whiten"}, default "none"
        Normalization of the features. ``"l2"`` scales each row to length 1; ``"standard"``, ``"minmax"`` and
        ``"whiten"`` are fitted on rows. ``"whiten"`` also needs `components`.
    components : int, optional
        Number of columns to reduce the features to by PCA, after normalization. By default no PCA.
    weights : str, optional
        ``"imagenet"``, ``"random"`` or a file of weights. By default the backbone's.
    alpha : float, optional
        Width multiplier of MobileNet and MobileNetV2, e.g. 0.5. By default the backbone's.
    scaling : {"caffe", "tf", "torch", "none"}, optional
        How pixels are scaled before the network. By default as the backbone was trained.
    size : int, optional
        Side of the square that images are resized to, in pixels, 1 to 4,096. By default the backbone's.
    resize : {"squash", "crop", "pad"}, default "squash"
        How an image is made square: squash it, crop the center, or pad it with black.
    interpolation : {"bilinear", "nearest", "bicubic", "lanczos"}, default "bilinear"
        Interpolation used for resizing.
    prefix : str, optional
        First part of the column names. By default made from backbone, layer and pooling.

    Raises
    ------
    RequestError
        A value is invalid.

    Examples
    --------
    >>> block = nbfeat.FeatureBlock(backbone="EfficientNetLite0", normalize="l2")
    >>> str(block)
    'EfficientNetLite0 --normalize l2'
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
        for option in BLOCK_OPTIONS:
            if (value := getattr(self, option.name)) is not None:
                object.__setattr__(self, option.name, option.check(value))
        if self.normalize == "whiten" and self.components is None:
            why = "without a limit, new images get values in the millions"
            raise RequestError(f"`normalize='whiten'` needs `components=N`: {why}.")

    @classmethod
    def parse(cls, text: str, defaults: Mapping[str, Any] | None = None) -> tuple[Self, ...]:
        """Read blocks from text; several layers make several blocks.

        Parameters
        ----------
        text : str
            ``BACKBONE [options]``, e.g. ``"VGG16 --layer block4_pool,block5_pool --pooling max"``.
        defaults : mapping, optional
            Values of fields that `text` doesn't set; `text` may omit the backbone if they include it.

        Returns
        -------
        tuple of FeatureBlock
            One block per layer.

        Raises
        ------
        RequestError
            The text or a value is invalid.

        Examples
        --------
        >>> nbfeat.FeatureBlock.parse("EfficientNetLite0 --pooling max")[0].pooling
        'max'
        """
        given, words = WordParser(BLOCK_OPTIONS).read(split_words(text))
        return cls.from_options(words, {**(defaults or {}), **given})

    @classmethod
    def from_options(cls, words: Sequence[str], options: Mapping[str, Any]) -> tuple[Self, ...]:
        """Make blocks from options and at most one word, the backbone; several layers make several blocks.

        Parameters
        ----------
        words : sequence of str
            The name of the backbone, or nothing if `options` include it.
        options : mapping
            Values of other fields by name; ``layer`` may hold several names, separated by commas or in a list.
        """
        if len(words) > 1:
            raise RequestError(f"A feature block takes one backbone, not {listing(words)}. Write one block per line.")
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            hint = near(unknown[0], known) or f"Feature blocks take {listing(known)}."
            raise RequestError(f"Unknown option `{unknown[0]}`. {hint}")
        values = {**options, **({"backbone": words[0]} if words else {})}
        if not values.get("backbone"):
            raise RequestError(
                "No backbone was named. Try `EfficientNetLite0` (no download) or `ResNet50` (standard); "
                "`nbfeat.backbones()` lists all."
            )
        layers = values.pop("layer", None)
        names = layers.split(",") if isinstance(layers, str) else layers or [None]
        return tuple(cls(**values, layer=name.strip() if name else None) for name in names)

    def __repr__(self) -> str:
        return f"FeatureBlock.parse({str(self)!r})[0]"

    def __str__(self) -> str:
        """Return text that `parse` reads back as this block."""
        given = {one.name: value for one in fields(self) if (value := getattr(self, one.name)) != one.default}
        return " ".join([quoted(self.backbone), *spelled(BLOCK_OPTIONS, given)])

    @property
    def cut(self) -> Cut:
        """Layer and pooling: the network output that this block reads."""
        return Cut(self.layer or "", self.pooling or "")

    @property
    def is_learned(self) -> bool:
        """Whether normalization or PCA is fitted on rows."""
        return self.normalize not in {"none", "l2"} or self.components is not None


def spelled(options: Iterable[Option], values: Mapping[str, Any]) -> list[str]:
    """Write options and their values as words that `split_words` and WordParser read back."""
    words = []
    for option in (option for option in options if option.name in values):
        given = values[option.name]
        if option.switch:
            words += [option.flag] if given else []
        else:
            texts = map(str, given if option.repeat else [given])
            words += [f"{option.flag}{'=' if text.startswith('-') else ' '}{quoted(text)}" for text in texts]
    return words


def quoted(word: str) -> str:
    """Quote a word so that `split_words` returns it, even with a semicolon, which at the end of a cell hides output."""
    if word and not re.search(r"[\s'\"#;]", word):
        return word
    return '"' + word.replace('"', '"\'"\'"') + '"' if "'" in word else f"'{word}'"


def column_prefix(block: FeatureBlock, backbone: str, image_column: str | None = None) -> str:
    """Return the prefix of a block's column names: ``[image column_]backbone[alpha][_layer][_pooling]``."""
    alpha = "" if block.alpha is None else f"{block.alpha:.2f}".replace(".", "")
    pooling = "" if block.pooling == "avg" else block.pooling
    name = "_".join(part for part in (backbone.lower() + alpha, block.layer, pooling) if part)
    name = name if block.prefix is None else block.prefix
    return f"{image_column}_{name}" if image_column is not None else name


def column_names(prefix: str, width: int) -> list[str]:
    """Return `width` column names with zero-padded numbers, starting at ``prefix_0000``."""
    digits = max(4, len(str(width - 1)))  # so that names of blocks with different widths look and sort alike
    return [f"{prefix}_{number:0{digits}d}" for number in range(width)]
