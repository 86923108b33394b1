"""The part of a result that one block makes of one image column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.catalog import find
from nbfeat.errors import RequestError, listing
from nbfeat.extraction import memory, normalize
from nbfeat.extraction.columns import Place, names, place, prefix_of
from nbfeat.extraction.lane import NetworkState
from nbfeat.extraction.networks import cut_of
from nbfeat.extraction.options import FeatureBlock
from nbfeat.extraction.recipe import PartRecipe, Recipe
from nbfeat.inference.spec import Output

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import pandas as pd


@dataclass(slots=True, eq=False)
class FeatureColumns:
    """The columns of one block for one image column: first their names, then normalized features."""

    block: FeatureBlock
    column: Hashable  # of the frame
    prefix: str
    network: int = 0  # which of the networks of the run its features come from
    lane: NetworkState | None = None  # that network, once it is open
    repeats: PartRecipe | None = None  # of an earlier result, whose normalizer it takes
    normalizer: normalize.Normalizer | None = None
    rows: NDArray[np.float32] | None = None  # normalized
    replaced: bool = False  # whether the columns stood in the frame before

    @property
    def key(self) -> str:
        """The name of the network's output."""
        return cut_of(self.block).key

    @property
    def output(self) -> Output | None:
        """What the cut turned out to be; None where no network was needed (an empty frame)."""
        return self.lane.outputs[self.key] if self.lane else None

    @property
    def raw_width(self) -> int:
        """Features per image before a projection."""
        if self.output:
            return self.output.width
        return self.repeats.width if self.repeats else find(self.block.backbone).width_at(self.block.alpha)

    @property
    def is_sized(self) -> bool:
        """Whether its width is known, as it is not of a network of the user's own before that is built."""
        return bool(self.lane or self.repeats) or not find(self.block.backbone).is_own

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return names(self.prefix, self.block.components or self.raw_width)

    def place_in(self, frame: pd.DataFrame, *, replace: bool) -> Place:
        """Find where the columns go in `frame`."""
        return place(frame, self.prefix, len(self.names), replace=replace)

    def make_room(self, images: int) -> None:
        """Take memory for the features of all `images` of the run, unless another part that reads them did."""
        if self.lane is not None and self.key not in self.lane.features:
            self.lane.features[self.key] = memory.matrix(images, self.raw_width, str(self.block))

    @property
    def source(self) -> tuple[int, str, Hashable]:
        """What its raw features are: parts of one source differ in normalization alone."""
        return self.network, self.key, self.column

    def raw(self, images: slice) -> NDArray[np.float32]:
        """Return the features as the network gave them, of these `images` of its lane: a view."""
        return self.lane.features[self.key][images] if self.lane else np.empty((0, self.raw_width), np.float32)

    def learn(self, rows: NDArray[np.float32], chosen: NDArray[np.bool_]) -> None:
        """Learn the normalization from the `chosen` ones of the raw `rows`, or take what was learned before."""
        if self.repeats:
            self.normalizer = self.repeats.normalizer
        else:
            self.normalizer = normalize.learn(self.block, rows, chosen) if len(rows) else None

    def normalized(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the raw `rows` normalized, in their own memory where the width stays."""
        return self.normalizer.apply(rows) if self.normalizer else np.empty((0, len(self.names)), np.float32)

    def frame(self, index: pd.Index) -> pd.DataFrame:
        """Return the columns as a frame that shares this part's memory."""
        import pandas as pd

        return pd.DataFrame(self.rows, index=index, columns=self.names, copy=False)


def normalized(parts: Sequence[FeatureColumns], raw: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Return the `raw` rows of all parts normalized, in their own memory where no later part needs them."""
    sources = [part.source for part in parts]
    return [
        part.normalized(rows.copy() if part.source in sources[number + 1 :] else rows)
        for number, (part, rows) in enumerate(zip(parts, raw, strict=True))
    ]


def plan(blocks: Sequence[FeatureBlock], image_columns: Sequence[Hashable]) -> list[FeatureColumns]:
    """Return the parts that `blocks` make of `image_columns`; two with one prefix are an error."""
    several = len(image_columns) > 1
    parts: list[FeatureColumns] = []
    for block in blocks:
        for column in image_columns:
            prefix = prefix_of(block, find(block.backbone).column, str(column) if several else None)
            if other := next((part for part in parts if part.prefix == prefix), None):
                raise RequestError(
                    f"Two blocks would make columns {prefix}_0000 …: `{other.block}` and `{block}`. "
                    "Give one of them a --prefix."
                )
            parts.append(FeatureColumns(block, column, prefix))
    return parts


def plan_again(recipe: Recipe, image_columns: Sequence[Hashable]) -> list[FeatureColumns]:
    """Return the parts of an earlier result, made of `image_columns` in place of its own, in their order."""
    if len(image_columns) != len(recipe.columns):
        raise RequestError(
            f"{recipe.source} has features of {listing(map(str, recipe.columns))}, and {len(image_columns):,} columns "
            f"are named: give --images {len(recipe.columns):,} times, in that order."
        )
    now = dict(zip(recipe.columns, image_columns, strict=True))
    return [FeatureColumns(part.block, now[part.column], part.prefix, repeats=part) for part in recipe.parts]
