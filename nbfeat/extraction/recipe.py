"""Recipe: everything needed to repeat a result on other images, including its fitted normalization."""

import base64
import json
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np

from nbfeat.backbones.weights import Loaded
from nbfeat.errors import RequestError, format_bytes, listing
from nbfeat.extraction.network_state import NetworkState
from nbfeat.extraction.normalize import Normalizer
from nbfeat.extraction.options import FeatureBlock, column_names
from nbfeat.inference.engines.base import PRECISIONS, Precision
from nbfeat.parquet import dataset, result_file
from nbfeat.parquet.location import Location
from nbfeat.parquet.result_file import AGAIN, RECIPE, Failure
from nbfeat.paths import existing_file

FORMAT = 1  # raised whenever older versions of nbfeat would misread the recipe
LARGEST = 64_000_000  # bytes; Parquet readers refuse 100 million in one entry of the footer
# Fields that change the features only slightly (engine, machine, release); all others change them entirely.
SLIGHT = frozenset({"engine", "backend", "keras", "decoders", "cpu", "beside"})
_WORDS = {"engine": "", "backend": "", "keras": "Keras ", "decoders": ""}  # slight field → words before its value
_HASH = 64  # hexadecimal digits of a SHA-256


@dataclass(frozen=True, slots=True, eq=False)
class PartRecipe:
    """Everything needed to repeat the columns of one block for one image column."""

    block: FeatureBlock
    column: Hashable  # of images
    prefix: str
    width: int  # features per image before PCA
    weights: Loaded = field(repr=False)
    key_fields: Mapping[str, Any] = field(repr=False)  # everything that decides the raw features, as plain values
    normalizer: Normalizer = field(repr=False)

    @property
    def precision(self) -> Precision:
        """Number format that the network computed in."""
        return cast("Precision", self.key_fields["precision"])

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return column_names(self.prefix, self.block.components or self.width)

    def difference(self, network: NetworkState) -> str:
        """Say why `network` would give different features; empty if it wouldn't."""
        key = self.block.cut.key
        here = {**network.cache_keys[key].key_fields, "width": network.prepared.outputs[key].width}
        there = {**self.key_fields, "width": self.width}
        for name in sorted({*here, *there} - SLIGHT):
            if there.get(name) == here.get(name):
                continue
            was, now = _shown(there.get(name)), _shown(here.get(name))
            if name == "weights":
                was, now = f"{self.weights.name} ({was})", f"{network.prepared.weights.name} ({now})"
            return f"{self.prefix} was made with {name.replace('_', ' ')} {was}, but now has {now}"
        return ""

    def slight_differences(self, network: NetworkState) -> Iterator[str]:
        """Name the differences that change the numbers slightly."""
        here, there = network.cache_keys[self.block.cut.key].key_fields, self.key_fields
        for name, words in _WORDS.items():
            if name in there and name in here and there[name] != here[name]:
                yield f"{words}{there[name]} (here {here[name]})"
        if there.get("cpu") != here.get("cpu"):
            yield "a different CPU"


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """A recipe for `like`: parts with fitted normalization, and provenance for people."""

    parts: tuple[PartRecipe, ...]
    provenance: Mapping[str, Any] = field(repr=False)  # `Extraction.recipe`, plain values
    source: str = "the earlier result"  # its name in messages and reports

    @property
    def precision(self) -> str:
        """Number formats that the networks computed in, as text."""
        return listing(dict.fromkeys(part.precision for part in self.parts))

    @property
    def blocks(self) -> list[FeatureBlock]:
        """The feature blocks."""
        return list(dict.fromkeys(part.block for part in self.parts))

    @property
    def columns(self) -> list[Hashable]:
        """The image columns."""
        return list(dict.fromkeys(part.column for part in self.parts))

    def check(self, networks: list[NetworkState]) -> str:
        """Say what differs slightly in `networks`, one per part; raise RequestError if features would differ."""
        slight: dict[str, None] = {}
        for part, network in zip(self.parts, networks, strict=True):
            if difference := part.difference(network):
                way = "Restore the original, or extract both frames again."
                raise RequestError(f"{self.source} can't be repeated: {difference}. {way}")
            slight |= dict.fromkeys(part.slight_differences(network))
        here = "the same image may give slightly different numbers here"
        return f"{self.source} was made with {listing(slight)}: {here}." if slight else ""


def _shown(value: object) -> str:
    if isinstance(value, str) and len(value) == _HASH:
        return f"SHA-256 {value[:12]}…"
    return repr(value)[:_HASH] + ("…" if len(repr(value)) > _HASH else "")


Like = Any  # a finished result, a Recipe, or the path of a Parquet file


def to_repeat(
    like: Like | None, *, blocks: Sequence[object], fit_on: object, precision: str, defaults: Mapping[str, Any]
) -> Recipe | None:
    """Return the recipe to repeat, or None; raise RequestError for options that the recipe already decides."""
    if like is None:
        return None
    recipe = recipe_of(like)
    if blocks or defaults:
        named = listing(f"`{name}`" for name in [*blocks, *defaults])
        raise RequestError(f"`like` repeats the blocks of {recipe.source}: drop {named}.")
    if fit_on is not None:
        raise RequestError(f"`like` uses the fitted normalization of {recipe.source}: drop `fit_on`.")
    if precision not in {"auto", recipe.precision}:
        problem = f"was computed in {recipe.precision} and would give different features in {precision}"
        raise RequestError(f"{recipe.source} {problem}: drop `precision`, or extract both frames again.")
    return recipe


def recipe_of(like: object) -> Recipe:
    """Return the recipe of a finished result, or of a Parquet file that nbfeat wrote."""
    if isinstance(like, Recipe):
        return like
    if isinstance(like, str | os.PathLike):
        if not dataset.is_dataset(path := os.fspath(like)):
            return recipe_in(existing_file(path, "*.parquet"))[0]
        location = Location.at(path)
        return unpack(dataset.finished(location)[0].recipe, location.name)[0]
    if is_result(like):
        return cast("Recipe", like.fitted)
    what = f"a result of nbfeat or the path of a Parquet file that it wrote, not {type(like).__name__}"
    way = "Save a result with `result = %extract …` or `result = nbfeat.extract(…)`."
    raise RequestError(f"`like` must be {what}. {way}")


def is_result(value: object) -> TypeGuard[Any]:
    """Tell whether `value` is an Extraction or a Result."""
    return hasattr(type(value), "fitted") and type(value).__module__.startswith("nbfeat.")


def recipe_in(file: Path) -> tuple[Recipe, list[Failure]]:
    """Return the recipe and failures in a Parquet file that nbfeat wrote, after checking them."""
    footer = result_file.look(file)
    recipe, failures = unpack(footer.entries.get(RECIPE, b""), file.name)
    check_columns(file, recipe, footer.columns)
    return recipe, failures


def check_columns(file: Path, recipe: Recipe, columns: Sequence[str]) -> None:
    """Raise RequestError unless each of the recipe's columns exists exactly once."""
    counts = Counter(columns)
    for part in recipe.parts:
        width = part.block.components or part.width  # untrusted, so compare before making that many names
        if width > len(columns) or any(counts[name] != 1 for name in part.names):
            problem = f"{file.name} doesn't have the {width:,} columns {part.prefix}_0000 … that its recipe lists"
            raise RequestError(f"{problem}: it was changed after nbfeat wrote it. {AGAIN}")


class UnreadableError(ValueError):
    """A text that `pack` didn't write; the message names the invalid part."""


def pack(recipe: Recipe, failures: Iterable[Failure]) -> str:
    """Write a recipe and failures as text; raise RequestError if it is too long for a footer."""
    parts, lost = [_packed(part) for part in recipe.parts], list(failures)
    text = json.dumps({"format": FORMAT, "recipe": dict(recipe.provenance), "parts": parts, "failures": lost})
    if len(text) > LARGEST:
        sizes = {part["prefix"]: len(json.dumps(part)) for part in parts}
        largest = max(sizes, key=sizes.__getitem__)
        raise RequestError(
            f"The fitted normalization of {listing(sizes)} and {len(lost):,} failures take {format_bytes(len(text))} "
            f"({largest}: {format_bytes(sizes[largest])}), more than the {format_bytes(LARGEST)} that fit next to the "
            "columns of a Parquet file. Use fewer `components` or `pooling='avg'`, or write the frame without the "
            "recipe: `result.frame.to_parquet(path)`."
        )
    return text


def unpack(text: bytes | str, source: str) -> tuple[Recipe, list[Failure]]:
    """Read text that `pack` wrote to the file `source`; raise RequestError if any part of it is invalid."""
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
        reason = f"{error} can't have been written by nbfeat"
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"its recipe can't be read ({type(error).__name__})"
    raise RequestError(f"{source} can't be read as a result of nbfeat: {reason}. {way}")


def _packed(part: PartRecipe) -> dict[str, Any]:
    arrays = {name: getattr(part.normalizer, name) for name in ("shift", "stretch", "center", "axes")}
    return {
        "block": str(part.block), "images": str(part.column), "prefix": part.prefix, "width": part.width,
        "weights": {"name": part.weights.name, "sha256": part.weights.sha256}, "key_fields": dict(part.key_fields),
        "unit_length": part.normalizer.unit_length,
        "arrays": {
            name: {"shape": list(array.shape), "float32": base64.b64encode(array.astype("<f4").tobytes()).decode()}
            for name, array in arrays.items() if array is not None
        },
    }  # fmt: skip


def _unpacked(values: dict[str, Any]) -> PartRecipe:
    """Read a part; raise UnreadableError unless writing it gives the same values."""
    [block], width, key_fields = FeatureBlock.parse(values["block"]), values["width"], dict(values["key_fields"])
    shapes: dict[str, tuple[int, ...]] = {}
    if block.normalize in {"standard", "minmax"}:
        shapes.update(shift=(width,), stretch=(width,))
    if block.components is not None:
        shapes.update(center=(width,), axes=(block.components, width))
    data = {name: base64.b64decode(values["arrays"][name]["float32"], validate=True) for name in shapes}
    arrays = {name: np.frombuffer(data[name], "<f4").astype(np.float32).reshape(shapes[name]) for name in shapes}
    _expect(all(np.isfinite(array).all() for array in arrays.values()), f"the normalization of `{block}`")
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
