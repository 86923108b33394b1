"""The part of a result that one block makes of one image column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.catalog import find
from nbfeat.errors import RequestError
from nbfeat.features import memory, normalize
from nbfeat.features.block import FeatureBlock
from nbfeat.features.columns import Place, names, place, prefix_of
from nbfeat.features.network import Output, cut_of
from nbfeat.features.pipeline import Lane

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import pandas as pd


@dataclass(slots=True, eq=False)
class Part:
    """The columns of one block for one image column: first their names, then raw features, then normalized ones."""

    block: FeatureBlock
    column: Hashable  # of the frame
    prefix: str
    lane: Lane | None = None  # where its features come from, once there is a network
    rows: NDArray[np.float32] | None = None
    normalizer: normalize.Normalizer | None = None
    replaced: bool = False  # whether the columns stood in the frame before

    @property
    def key(self) -> str:
        """The name of the network's output."""
        return cut_of(self.block).key

    @property
    def output(self) -> Output | None:
        """What the cut turned out to be; None where no network was needed (an empty frame)."""
        return self.lane.engine.outputs[self.key] if self.lane else None

    @property
    def raw_width(self) -> int:
        """Features per image before a projection."""
        return self.output.width if self.output else find(self.block.backbone).width_at(self.block.alpha)

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return names(self.prefix, self.block.components or self.raw_width)

    def place_in(self, frame: pd.DataFrame, *, replace: bool) -> Place:
        """Find where the columns go in `frame`."""
        return place(frame, self.prefix, len(self.names), replace=replace)

    def make_room(self, rows: int) -> None:
        """Take memory for `rows` images, all NaN."""
        self.rows = memory.matrix(rows, self.raw_width, str(self.block))

    def normalized(self, chosen: NDArray[np.bool_]) -> None:
        """Turn raw features into normalized ones, learning from the `chosen` rows."""
        if self.rows is None or not len(self.rows):
            self.rows = np.empty((0, len(self.names)), np.float32)
            return
        self.normalizer = normalize.learn(self.block, self.rows, chosen)
        self.rows = self.normalizer.apply(self.rows)

    def frame(self, index: pd.Index) -> pd.DataFrame:
        """Return the columns as a frame that shares this part's memory."""
        import pandas as pd  # noqa: PLC0415 - `import nbfeat` stays light

        return pd.DataFrame(self.rows, index=index, columns=self.names, copy=False)


def plan(blocks: Sequence[FeatureBlock], image_columns: Sequence[Hashable]) -> list[Part]:
    """Return the parts that `blocks` make of `image_columns`; two with one prefix are an error."""
    several = len(image_columns) > 1
    parts: list[Part] = []
    for block in blocks:
        for column in image_columns:
            prefix = prefix_of(block, block.backbone, str(column) if several else None)
            if other := next((part for part in parts if part.prefix == prefix), None):
                message = (
                    f"Two blocks would make columns {prefix}_0000 …: `{other.block}` and `{block}`. "
                    "Give one of them a --prefix."
                )
                raise RequestError(message)
            parts.append(Part(block, column, prefix))
    return parts
