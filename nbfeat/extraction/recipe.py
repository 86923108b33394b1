"""Recipe: all that it takes to repeat a result on other images, what its normalizations learned included."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nbfeat.backbones.weights import Loaded
from nbfeat.errors import RequestError, listing
from nbfeat.extraction.columns import names
from nbfeat.extraction.networks import cut_of
from nbfeat.extraction.normalize import Normalizer
from nbfeat.extraction.options import FeatureBlock
from nbfeat.inference.engines.base import Precision

if TYPE_CHECKING:
    from nbfeat.extraction.extraction import Extraction
    from nbfeat.extraction.lane import NetworkState
    from nbfeat.extraction.part import FeatureColumns

# Another engine, machine or release gives the same features up to small differences; anything else gives others.
SLIGHT = frozenset({"engine", "backend", "keras", "decoders", "cpu", "beside"})
_TOLD = {"engine": "", "backend": "", "keras": "Keras ", "decoders": ""}  # of those, with the words before the value
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
        return names(self.prefix, self.block.components or self.width)

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
        told = [
            f"{words}{there[name]} (here {here[name]})"
            for name, words in _TOLD.items()
            if name in there and name in here and there[name] != here[name]
        ]
        return [*told, "another CPU"] if there.get("cpu") != here.get("cpu") else told


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What an Extraction takes as `like`: parts with what they learned, and what is told to people."""

    parts: tuple[PartRecipe, ...]
    told: Mapping[str, Any]  # `Extraction.recipe`, plain values
    source: str = "the earlier result"  # what it is called in messages and reports

    @classmethod
    def of(cls, extraction: Extraction, source: str = "the earlier result") -> Recipe:
        """Take the recipe of an Extraction that is done.

        Raises
        ------
        RequestError
            Where it is not done, or had no images, so that nothing was learned.
        """
        if extraction.state != "done":
            raise RequestError(
                f"{source} cannot be repeated: its state is {extraction.state!r}, {extraction.done:,} of "
                f"{extraction.total:,} images. Let it come to its end first, with its .run()."
            )
        if any(part.normalizer is None for part in extraction.parts):
            raise RequestError(
                f"{source} cannot be repeated: its frame has no rows, so that nothing was learned. "
                "Extract features of some images first."
            )
        return cls(tuple(map(of_part, extraction.parts)), extraction.recipe, source)

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


def of_part(part: FeatureColumns) -> PartRecipe:
    """Take the recipe of a part whose network is open; what it learns need not be known yet."""
    if part.repeats is not None:  # whatever it ran on, it repeated this
        return replace(part.repeats, column=part.column)
    assert part.lane is not None
    key_fields, learned = part.lane.kept[part.key].key_fields, part.normalizer or Normalizer()
    return PartRecipe(part.block, part.column, part.prefix, part.raw_width, part.lane.weights, key_fields, learned)


def _shown(value: object) -> str:
    """Return a hash by its first digits, any other value as it is, unless it is long."""
    if isinstance(value, str) and len(value) == _HASH:
        return f"SHA-256 {value[:_SHOWN]}…"
    text = repr(value)
    return text if len(text) <= _HASH else text[:_HASH] + "…"
