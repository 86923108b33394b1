"""Recipe: all that it takes to repeat a result on other images, what its normalizations learned included."""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np

from nbfeat.backbones.weights import Loaded
from nbfeat.errors import RequestError, format_bytes, listing, near
from nbfeat.extraction.network_state import NetworkState
from nbfeat.extraction.normalize import Normalizer
from nbfeat.extraction.options import FeatureBlock, column_names
from nbfeat.inference.engines.base import PRECISIONS, Precision
from nbfeat.parquet import dataset, result_file
from nbfeat.parquet.location import Location
from nbfeat.parquet.result_file import AGAIN, RECIPE, Failure

FORMAT = 1  # raised whenever what older versions of nbfeat read would mean something else
LARGEST = 64_000_000  # bytes; readers of Parquet refuse 100 million in one entry of the footer
# Another engine, machine or release gives the same features up to small differences; anything else gives others.
SLIGHT = frozenset({"engine", "backend", "keras", "decoders", "cpu", "beside"})
_WORDS = {"engine": "", "backend": "", "keras": "Keras ", "decoders": ""}  # of those, with the words before the value
_HASH = 64  # hexadecimal digits of a SHA-256


@dataclass(frozen=True, slots=True, eq=False)
class PartRecipe:
    """What it takes to repeat the columns that one block made of one image column."""

    block: FeatureBlock
    column: Hashable  # of images
    prefix: str
    width: int  # features per image before a projection
    weights: Loaded
    key_fields: Mapping[str, Any]  # everything that decides the features before any normalization, as plain values
    normalizer: Normalizer

    @property
    def precision(self) -> Precision:
        """What the network computed in."""
        return cast("Precision", self.key_fields["precision"])

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return column_names(self.prefix, self.block.components or self.width)

    def difference(self, network: NetworkState) -> str:
        """Say why `network` would give other features; an empty string where it would not."""
        key = self.block.cut.key
        here = {**network.cache_keys[key].key_fields, "width": network.outputs[key].width}
        there = {**self.key_fields, "width": self.width}
        for name in sorted({*here, *there} - SLIGHT):
            if there.get(name) == here.get(name):
                continue
            was, now = _shown(there.get(name)), _shown(here.get(name))
            if name == "weights":
                was, now = f"{self.weights.name} ({was})", f"{network.weights.name} ({now})"
            return f"{self.prefix} was made with {name.replace('_', ' ')} {was}, and here it would be {now}"
        return ""

    def slight_differences(self, network: NetworkState) -> Iterator[str]:
        """Say what is another here in ways that change the numbers slightly."""
        here, there = network.cache_keys[self.block.cut.key].key_fields, self.key_fields
        for name, words in _WORDS.items():
            if name in there and name in here and there[name] != here[name]:
                yield f"{words}{there[name]} (here {here[name]})"
        if there.get("cpu") != here.get("cpu"):
            yield "another CPU"


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What an Extraction takes as `like`: parts with what they learned, and provenance for people."""

    parts: tuple[PartRecipe, ...]
    provenance: Mapping[str, Any]  # `Extraction.recipe`, plain values
    source: str = "the earlier result"  # what it is called in messages and reports

    @property
    def precision(self) -> str:
        """What was computed in, in words where networks differ."""
        return listing(dict.fromkeys(part.precision for part in self.parts))

    @property
    def blocks(self) -> list[FeatureBlock]:
        """What was extracted."""
        return list(dict.fromkeys(part.block for part in self.parts))

    @property
    def columns(self) -> list[Hashable]:
        """The image columns."""
        return list(dict.fromkeys(part.column for part in self.parts))

    def check(self, networks: list[NetworkState]) -> str:
        """Say what differs slightly in `networks`, the open network of each part; raise RequestError for more."""
        slight: dict[str, None] = {}
        for part, network in zip(self.parts, networks, strict=True):
            if difference := part.difference(network):
                raise RequestError(
                    f"{self.source} cannot be repeated: {difference}. Bring back what there was, or extract both "
                    "frames anew."
                )
            slight |= dict.fromkeys(part.slight_differences(network))
        here = "the same image may give slightly other numbers here"
        return f"{self.source} was made with {listing(slight)}: {here}." if slight else ""


def _shown(value: object) -> str:
    """Return a hash by its first digits, any other value as it is, unless it is long."""
    if isinstance(value, str) and len(value) == _HASH:
        return f"SHA-256 {value[:12]}…"
    return repr(value)[:_HASH] + ("…" if len(repr(value)) > _HASH else "")


Like = Any  # a result that is done, a Recipe, or the path of a Parquet file


def to_repeat(
    like: Like | None, *, blocks: Sequence[object], fit_on: object, precision: str, defaults: Mapping[str, Any]
) -> Recipe | None:
    """Return the recipe that is to be repeated, or None; nothing else may be asked for that the recipe decides."""
    if like is None:
        return None
    recipe = recipe_of(like)
    if blocks or defaults:
        named = listing([*map(str, blocks), *(f"--{name.replace('_', '-')}" for name in defaults)])
        raise RequestError(f"--like repeats the blocks of {recipe.source}: leave {named} away.")
    if fit_on is not None:
        raise RequestError(f"--like repeats what {recipe.source} learned, and learns nothing: leave --fit-on away.")
    if precision not in {"auto", recipe.precision}:
        raise RequestError(
            f"{recipe.source} was computed in {recipe.precision}, and would give other features in {precision}: "
            "leave --precision away, or extract both frames anew."
        )
    return recipe


def recipe_of(like: object) -> Recipe:
    """Return the recipe of a result that is done, or of one in a Parquet file that nbfeat wrote."""
    if isinstance(like, Recipe):
        return like
    if isinstance(like, str | os.PathLike):
        if not dataset.is_dataset(path := os.fspath(like)):
            return recipe_in(existing_file(path))[0]
        location = Location.at(path)
        return unpack(dataset.finished(location)[0].recipe, location.name)[0]
    if is_result(like):
        return cast("Recipe", like.fitted)
    raise RequestError(
        f"--like takes a result of nbfeat, or a Parquet file that one was written to, not {type(like).__name__}. "
        "Keep a result with `result = %extract …` or `result = nbfeat.extract(…)`."
    )


def is_result(value: object) -> TypeGuard[Any]:
    """Tell whether `value` is a result: an Extraction, or what `nbfeat.read` gives."""
    return hasattr(type(value), "fitted") and type(value).__module__.startswith("nbfeat.")


def recipe_in(file: Path) -> tuple[Recipe, list[Failure]]:
    """Return what a Parquet file that nbfeat wrote says of its features, checked."""
    footer = result_file.look(file)
    recipe, failures = unpack(footer.entries.get(RECIPE, b""), file.name)
    check_columns(file, recipe, footer.columns)
    return recipe, failures


def existing_file(path: str | Path) -> Path:
    """Return the file of this path, or raise RequestError with near names."""
    file = Path(path).expanduser().absolute()
    if file.is_file():
        return file
    siblings = (one.name for one in file.parent.glob("*.parquet"))
    way = near(file.name, siblings) or f"Relative paths start at {Path.cwd()}; check this one."
    raise RequestError(f"There is no file {os.fspath(path)!r}. {way}")


def check_columns(file: Path, recipe: Recipe, columns: Sequence[str]) -> None:
    """Raise RequestError unless each of the recipe's columns is there once."""
    counts = Counter(columns)
    for part in recipe.parts:
        width = part.block.components or part.width  # which may be any number: look before so many names are made
        if width > len(columns) or any(counts[name] != 1 for name in part.names):
            raise RequestError(
                f"{file.name} has not the {width:,} columns {part.prefix}_0000 … that it says it has: it was changed "
                f"after nbfeat wrote it. {AGAIN}"
            )


class UnreadableError(ValueError):
    """A text is not what `pack` writes; the message names what of it."""


def pack(recipe: Recipe, failures: Iterable[Failure]) -> str:
    """Write a recipe and failures as text; raise RequestError where it is too long for a footer."""
    parts, lost = [_packed(part) for part in recipe.parts], list(failures)
    text = json.dumps({"format": FORMAT, "recipe": dict(recipe.provenance), "parts": parts, "failures": lost})
    if len(text) > LARGEST:
        sizes = {part["prefix"]: len(json.dumps(part)) for part in parts}
        largest = max(sizes, key=sizes.__getitem__)
        raise RequestError(
            f"What {listing(sizes)} learned and {len(lost):,} failures take {format_bytes(len(text))} "
            f"({largest}: {format_bytes(sizes[largest])}), more than the {format_bytes(LARGEST)} that a Parquet file "
            f"should carry beside its columns. Use fewer --components, or --pooling avg; or write result.frame without "
            "the recipe: result.frame.to_parquet(path)."
        )
    return text


def unpack(text: bytes | str, source: str) -> tuple[Recipe, list[Failure]]:
    """Read what `pack` wrote, from the file `source`; raise RequestError where anything of it is not so."""
    way = AGAIN
    try:
        whole = json.loads(text)
        number = whole["format"]
        _expect(type(number) is int and number > 0, "its format")
        if number == FORMAT:
            parts, provenance = tuple(map(_unpacked, whole["parts"])), whole["recipe"]
            _expect(bool(parts) and len({part.prefix for part in parts}) == len(parts), "the prefixes of its blocks")
            _expect(all(isinstance(engine, str) for engine in provenance["engines"]), "its engines")
            return Recipe(parts, provenance, source), [Failure.read(values) for values in whole["failures"]]
        reason = f"it was written by a newer nbfeat (format {number}, this one reads {FORMAT})"
        way = "Install that version to read it."
    except UnreadableError as error:
        reason = f"{error} cannot be what nbfeat wrote"
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"what it says of its features cannot be read ({type(error).__name__})"
    raise RequestError(f"{source} cannot be read as a result of nbfeat: {reason}. {way}")


def _packed(part: PartRecipe) -> dict[str, Any]:
    arrays = {name: getattr(part.normalizer, name) for name in ("shift", "stretch", "center", "axes")}
    return {
        "block": str(part.block),
        "images": str(part.column),
        "prefix": part.prefix,
        "width": part.width,
        "weights": {"name": part.weights.name, "sha256": part.weights.sha256},
        "key_fields": dict(part.key_fields),
        "unit_length": part.normalizer.unit_length,
        "arrays": {
            name: {"shape": list(array.shape), "float32": base64.b64encode(array.astype("<f4").tobytes()).decode()}
            for name, array in arrays.items()
            if array is not None
        },
    }


def _unpacked(values: dict[str, Any]) -> PartRecipe:
    """Read a part, whose arrays are those that `normalize.learn` makes for its block; all has to be as written."""
    [block], width, key_fields = FeatureBlock.parse(values["block"]), values["width"], dict(values["key_fields"])
    shapes: dict[str, tuple[int, ...]] = {}
    if block.normalize in {"standard", "minmax"}:
        shapes.update(shift=(width,), stretch=(width,))
    if block.components is not None:
        shapes.update(center=(width,), axes=(block.components, width))
    data = {name: base64.b64decode(values["arrays"][name]["float32"], validate=True) for name in shapes}
    arrays = {name: np.frombuffer(data[name], "<f4").astype(np.float32).reshape(shapes[name]) for name in shapes}
    weights = Loaded(**{name: str(text) for name, text in values["weights"].items()})
    normalizer = Normalizer(block.normalize == "l2", **arrays)
    part = PartRecipe(block, str(values["images"]), str(values["prefix"]), width, weights, key_fields, normalizer)
    _expect(type(width) is int and width > 0 and part.precision in PRECISIONS, f"`{block}`")
    written = {**_packed(part), "block": values["block"]}
    given = {name: values[name] for name in written}
    _expect(json.dumps(written, sort_keys=True) == json.dumps(given, sort_keys=True), f"`{block}`")
    return part


def _expect(fits: bool, what: str) -> None:
    if not fits:
        raise UnreadableError(what)
