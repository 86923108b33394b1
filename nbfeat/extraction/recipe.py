"""Recipe: all that it takes to repeat a result on other images, what its normalizations learned included.

What decides the numbers of a network is named by the fields of the cache's key; here they are compared.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.weights import Loaded
from nbfeat.errors import RequestError, format_bytes, listing, near
from nbfeat.extraction.network_state import NetworkState
from nbfeat.extraction.networks import cut_of
from nbfeat.extraction.normalize import Normalizer
from nbfeat.extraction.options import FeatureBlock, column_names
from nbfeat.inference.engines import PRECISIONS, Precision
from nbfeat.parquet import dataset, result_file
from nbfeat.parquet.location import Location
from nbfeat.parquet.result_file import AGAIN, RECIPE, Failure

FORMAT = 1  # raised whenever what older versions of nbfeat read would mean something else
LARGEST = 64_000_000  # bytes; readers of Parquet refuse 100 million in one entry of the footer
# Another engine, machine or release gives the same features up to small differences; anything else gives others.
SLIGHT = frozenset({"engine", "backend", "keras", "decoders", "cpu", "beside"})
_WORDS = {"engine": "", "backend": "", "keras": "Keras ", "decoders": ""}  # of those, with the words before the value
_HASH = 64  # hexadecimal digits of a SHA-256
_SHOWN = 12  # of them


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
        computed_in: Precision = self.key_fields["precision"]
        return computed_in

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return column_names(self.prefix, self.block.components or self.width)

    @property
    def key(self) -> str:
        """The name of the network's output."""
        return cut_of(self.block).key

    def check(self, lane: NetworkState, source: str) -> None:
        """Raise RequestError, naming the difference, where `lane` would give other features than those of `source`."""
        if difference := self.difference(lane):
            raise RequestError(
                f"{source} cannot be repeated: {difference}. Bring back what there was, or extract both frames anew."
            )

    def difference(self, lane: NetworkState) -> str:
        """Say why `lane` would give other features; an empty string where it would not."""
        here = {**lane.kept[self.key].key_fields, "width": lane.outputs[self.key].width}
        there = {**self.key_fields, "width": self.width}
        for name in sorted({*here, *there} - SLIGHT):
            if there.get(name) == here.get(name):
                continue
            was, now = _shown(there.get(name)), _shown(here.get(name))
            if name == "weights":
                was, now = f"{self.weights.name} ({was})", f"{lane.weights.name} ({now})"
            return f"{self.prefix} was made with {name.replace('_', ' ')} {was}, and here it would be {now}"
        return ""

    def slight_differences(self, lane: NetworkState) -> list[str]:
        """Say what is another here in ways that change the numbers slightly."""
        here, there = lane.kept[self.key].key_fields, self.key_fields
        changed = [
            f"{words}{there[name]} (here {here[name]})"
            for name, words in _WORDS.items()
            if name in there and name in here and there[name] != here[name]
        ]
        return [*changed, "another CPU"] if there.get("cpu") != here.get("cpu") else changed


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What an Extraction takes as `like`: parts with what they learned, and provenance for people."""

    parts: tuple[PartRecipe, ...]
    told: Mapping[str, Any]  # `Extraction.recipe`, plain values
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

    def check(self, lanes: list[NetworkState]) -> str:
        """Compare with the networks that are open here, one for each part; return what differs slightly, or "".

        Raises
        ------
        RequestError
            Where they would give other features, naming the difference.
        """
        differences: list[str] = []
        for part, lane in zip(self.parts, lanes, strict=True):
            part.check(lane, self.source)
            differences += part.slight_differences(lane)
        if not differences:
            return ""
        made = listing(dict.fromkeys(differences))
        return f"{self.source} was made with {made}: the same image may give slightly other numbers here."


def _shown(value: object) -> str:
    """Return a hash by its first digits, any other value as it is, unless it is long."""
    if isinstance(value, str) and len(value) == _HASH:
        return f"SHA-256 {value[:_SHOWN]}…"
    text = repr(value)
    return text if len(text) <= _HASH else text[:_HASH] + "…"


class Repeatable(Protocol):
    """A result that is done."""

    @property
    def fitted(self) -> Recipe:
        """What it takes to repeat it."""


Like: TypeAlias = "Repeatable | Recipe | str | Path"


def to_repeat(
    like: Like | None,
    *,
    blocks: Sequence[object],
    fit_on: object,
    precision: str,
    defaults: Mapping[str, Any],
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
        return read_recipe(os.fspath(like))
    if is_result(like):
        return like.fitted
    raise RequestError(
        f"--like takes a result of nbfeat, or a Parquet file that one was written to, not {type(like).__name__}. "
        "Keep a result with `result = %extract …` or `result = nbfeat.extract(…)`."
    )


def is_result(value: object) -> TypeGuard[Repeatable]:
    """Tell whether `value` is a result: an Extraction, or what `nbfeat.read` gives."""
    return hasattr(type(value), "fitted") and type(value).__module__.startswith("nbfeat.")


# In files


def read_recipe(path: str | Path) -> Recipe:
    """Read what it takes to repeat the result in a Parquet file, or in a folder of them, none of its rows."""
    if dataset.is_dataset(path):
        location = Location.at(path)
        return unpack(dataset.finished(location)[0].recipe, location.name)[0]
    return recipe_in(existing_file(path))[0]


def recipe_in(file: Path) -> tuple[Recipe, list[Failure]]:
    """Return what a Parquet file that nbfeat wrote says of its features, checked."""
    footer = result_file.look(file)
    recipe, failures = unpack(footer.entries.get(RECIPE, b""), file.name)
    check_columns(file, recipe, footer.columns)
    return recipe, failures


def existing_file(path: str | Path) -> Path:
    """Return the file of this path, or raise RequestError with near names."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        siblings = [one.name for one in file.parent.glob("*.parquet")] if file.parent.is_dir() else []
        way = near(file.name, siblings) or f"Relative paths start at {Path.cwd()}; check this one."
        raise RequestError(f"There is no file {os.fspath(path)!r}. {way}")
    return file


def check_columns(file: Path, recipe: Recipe, columns: Sequence[str]) -> None:
    """Raise RequestError unless each of the recipe's columns is there once."""
    counts = Counter(columns)
    for part in recipe.parts:
        width = part.block.components or part.width
        # A width from elsewhere may be any number: look before so many names are made.
        if width > len(columns) or any(counts[name] != 1 for name in part.names):
            raise RequestError(
                f"{file.name} has not the {width:,} columns {part.prefix}_0000 … that it says it has: it was changed "
                f"after nbfeat wrote it. {AGAIN}"
            )


class UnreadableError(ValueError):
    """The text is not what `pack` writes; its message says what of it."""


def pack(recipe: Recipe, failures: Iterable[Failure]) -> str:
    """Write a recipe and failures as text.

    Raises
    ------
    RequestError
        Where it is too long for a footer, naming what takes most.
    """
    parts, lost = [_packed(part) for part in recipe.parts], list(failures)
    text = json.dumps({"format": FORMAT, "recipe": dict(recipe.told), "parts": parts, "failures": lost})
    if len(text) > LARGEST:
        sizes = {part["prefix"]: len(json.dumps(part)) for part in parts}
        largest = max(sizes, key=lambda prefix: sizes[prefix])
        raise RequestError(
            f"What {listing(sizes)} learned and {len(lost):,} failures take {format_bytes(len(text))} "
            f"({largest}: {format_bytes(sizes[largest])}), more than the {format_bytes(LARGEST)} that a Parquet file "
            f"should carry beside its columns. Use fewer --components, or --pooling avg; or write result.frame without "
            "the recipe: result.frame.to_parquet(path)."
        )
    return text


def unpack(text: bytes | str, source: str) -> tuple[Recipe, list[Failure]]:
    """Read what `pack` wrote, from the file `source`.

    Raises
    ------
    RequestError
        Where anything of it is not so: nothing of a text from elsewhere is taken on trust.
    """
    try:
        whole = json.loads(text)
        _check_format(whole["format"])
        parts = tuple(map(_unpacked, whole["parts"]))
        _expect(bool(parts) and len({part.prefix for part in parts}) == len(parts), "the prefixes of its blocks")
        told = whole["recipe"]
        _expect(isinstance(told, dict) and _are(told["engines"], str), "its engines")
        return Recipe(parts, told, source), [Failure.read(values) for values in whole["failures"]]
    except UnreadableError as error:
        reason = str(error)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"what it says of its features cannot be read ({type(error).__name__})"
    way = "Install that version to read it." if "newer" in reason else AGAIN
    raise RequestError(f"{source} cannot be read as a result of nbfeat: {reason}. {way}")


def _check_format(number: object) -> None:
    _expect(type(number) is int and number > 0, "its format")
    if number != FORMAT:
        raise UnreadableError(f"it was written by a newer nbfeat (format {number}, this one reads {FORMAT})")


def _packed(part: PartRecipe) -> dict[str, Any]:
    arrays = {field.name: getattr(part.normalizer, field.name) for field in fields(Normalizer)}
    unit_length = arrays.pop("unit_length")
    return {
        "block": str(part.block),
        "images": str(part.column),
        "prefix": part.prefix,
        "width": part.width,
        "weights": {"name": part.weights.name, "sha256": part.weights.sha256},
        "key_fields": dict(part.key_fields),
        "unit_length": unit_length,
        "arrays": {name: _text_of(array) for name, array in arrays.items() if array is not None},
    }


def _unpacked(values: dict[str, Any]) -> PartRecipe:
    blocks = FeatureBlock.parse(values["block"])
    prefix, width, column, key_fields = values["prefix"], values["width"], values["images"], values["key_fields"]
    _expect(len(blocks) == 1 and _are([prefix, column], str), "one of its blocks")
    _expect(type(width) is int and width > 0, "the width of a block")
    weights = Loaded(**values["weights"])
    _expect(_are([weights.name, weights.sha256], str) and isinstance(key_fields, dict), "the weights of a block")
    _expect(key_fields["precision"] in PRECISIONS, "the precision of a block")
    normalizer = _normalizer(blocks[0], width, values["unit_length"], values["arrays"])
    return PartRecipe(blocks[0], column, prefix, width, weights, key_fields, normalizer)


def _normalizer(block: FeatureBlock, width: int, unit_length: object, arrays: dict[str, Any]) -> Normalizer:
    """Read what a block learned; the arrays are those that `normalize.learn` makes for it, and of its width."""
    shapes: dict[str, tuple[int, ...]] = {}
    if block.normalize in {"standard", "minmax"}:
        shapes.update(shift=(width,), stretch=(width,))
    if block.components is not None:
        shapes.update(center=(width,), axes=(block.components, width))
    _expect(unit_length is (block.normalize == "l2"), f"the normalization of `{block}`")
    _expect(arrays.keys() == shapes.keys(), f"what `{block}` learned")
    read = {name: _array_of(arrays[name], shape, f"{name} of `{block}`") for name, shape in shapes.items()}
    return Normalizer(unit_length=block.normalize == "l2", **read)


def _text_of(array: NDArray[np.floating[Any]]) -> dict[str, Any]:
    data = np.ascontiguousarray(array, "<f4").tobytes()
    return {"shape": list(array.shape), "float32": base64.b64encode(data).decode("ascii")}


def _array_of(values: dict[str, Any], shape: tuple[int, ...], what: str) -> NDArray[np.float32]:
    _expect(values["shape"] == list(shape), f"the shape of {what}")
    try:
        data = base64.b64decode(values["float32"], validate=True)
    except binascii.Error:
        data = b""
    _expect(len(data) == 4 * prod(shape), f"the numbers in {what}")
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)


def _are(values: Iterable[object], kind: type) -> bool:
    return all(isinstance(value, kind) for value in values)


def _expect(fits: bool, what: str) -> None:
    if not fits:
        raise UnreadableError(f"{what} cannot be what nbfeat wrote")
