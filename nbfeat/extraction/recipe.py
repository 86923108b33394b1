"""Recipe: all that it takes to repeat a result on other images, what its normalizations learned included.

What decides the numbers of a network is named by the fields of the cache's key; here they are compared.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeGuard

from nbfeat.backbones.weights import Loaded
from nbfeat.errors import RequestError, listing
from nbfeat.extraction.network_state import NetworkState
from nbfeat.extraction.networks import cut_of
from nbfeat.extraction.normalize import Normalizer
from nbfeat.extraction.options import FeatureBlock, column_names
from nbfeat.inference.engines.base import Precision

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
        from nbfeat.parquet.result_file import read_recipe

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
