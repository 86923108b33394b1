"""Feature columns: their names, position in the frame, memory and normalization."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.catalog import find
from nbfeat.errors import RequestError, format_bytes, listing
from nbfeat.extraction import normalize
from nbfeat.extraction.network_state import NetworkState
from nbfeat.extraction.options import FeatureBlock, column_names, column_prefix
from nbfeat.extraction.recipe import PartRecipe, Recipe
from nbfeat.inference.engines.cpu_count import GROUPS, ROOT, control_groups
from nbfeat.inference.spec import Output

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 3
SHARE = 0.5  # of free memory; the rest is for the resulting frame and for other programs
_MADE = re.compile(r"(.*)_(\d{4,})", re.DOTALL)


@dataclass(slots=True, eq=False)
class FeatureColumns:
    """The columns of one block for one image column: at first only their names, later normalized features."""

    block: FeatureBlock
    column: Hashable  # of the frame
    prefix: str
    network_index: int = 0  # index of its network in the run
    network: NetworkState | None = None  # that network, once it is loaded
    repeats: PartRecipe | None = None  # the part of an earlier result whose normalizer is used
    normalizer: normalize.Normalizer | None = None
    rows: NDArray[np.float32] | None = None  # normalized
    replaced: bool = False  # whether the frame already had these columns

    @property
    def output(self) -> Output | None:
        """The output of the network; None if no network was needed (empty frame)."""
        return self.network.prepared.outputs[self.block.cut.key] if self.network else None

    @property
    def raw_width(self) -> int:
        """Features per image before PCA."""
        if self.output:
            return self.output.width
        return self.repeats.width if self.repeats else find(self.block.backbone).width_at(self.block.alpha)

    @property
    def is_sized(self) -> bool:
        """Whether its width is known; that of a layer or a user's network is known only once the network is built."""
        return bool(self.network or self.repeats) or not (self.block.layer or find(self.block.backbone).is_user_model)

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return column_names(self.prefix, self.block.components or self.raw_width)

    @property
    def source(self) -> tuple[int, str, Hashable]:
        """Identity of its raw features: parts with the same source differ only in normalization."""
        return self.network_index, self.block.cut.key, self.column

    @property
    def recipe(self) -> PartRecipe:
        """The recipe to repeat these columns, available once the network is loaded, even before fitting."""
        if self.repeats is not None:  # even if it ran on a different engine
            return replace(self.repeats, column=self.column)
        assert self.network is not None
        weights, fitted = self.network.prepared.weights, self.normalizer or normalize.Normalizer()
        fields = self.network.cache_keys[self.block.cut.key].key_fields
        return PartRecipe(self.block, self.column, self.prefix, self.raw_width, weights, fields, fitted)

    def make_room(self, images: int) -> None:
        """Allocate memory for the features of `images`, unless columns of the same source already did."""
        if self.network is not None and self.block.cut.key not in self.network.features:
            size, free = 4 * images * self.raw_width, free_bytes()
            if free is not None and size > SHARE * free:
                problem = f"`{self.block}` gives {self.raw_width:,} features per image: {images:,} images take"
                limit = f"{format_bytes(size)}, more than half of the {format_bytes(free)} of free memory"
                way = "Use `pooling='avg'` or `pooling='max'`, cut at a later layer, or extract fewer rows."
                raise RequestError(f"{problem} {limit}. {way}")
            self.network.features[self.block.cut.key] = np.full((images, self.raw_width), np.nan, np.float32)

    def raw(self, images: slice) -> NDArray[np.float32]:
        """Return a view of the network's features for these `images` of its window."""
        none = np.empty((0, self.raw_width), np.float32)
        return self.network.features[self.block.cut.key][images] if self.network else none

    def learn(self, rows: NDArray[np.float32], chosen: NDArray[np.bool_]) -> None:
        """Fit the normalization on the `chosen` raw `rows`, or use the one of the repeated result."""
        if self.repeats:
            self.normalizer = self.repeats.normalizer
        else:
            self.normalizer = normalize.learn(self.block, rows, chosen) if len(rows) else None

    def normalized(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the raw `rows` normalized, in place unless the width changes."""
        return self.normalizer.apply(rows) if self.normalizer else np.empty((0, len(self.names)), np.float32)

    def frame(self, index: pd.Index) -> pd.DataFrame:
        """Return the columns as a frame without copying."""
        import pandas as pd

        return pd.DataFrame(self.rows, index=index, columns=self.names, copy=False)


def plan(blocks: Sequence[FeatureBlock], image_columns: Sequence[Hashable]) -> list[FeatureColumns]:
    """Plan the columns of `blocks` for `image_columns`; raise RequestError if two get the same prefix."""
    several = len(image_columns) > 1
    planned: dict[str, FeatureColumns] = {}
    for block in blocks:
        for column in image_columns:
            label = str(column).encode(errors="replace").decode() if several else None  # it may be half a character
            prefix = column_prefix(block, find(block.backbone).column, label)
            if prefix in planned:
                both = f"`{planned[prefix].block}` and `{block}`. Set a different `prefix` for one of them."
                raise RequestError(f"Two blocks would make the same columns {prefix}_0000 …: {both}")
            planned[prefix] = FeatureColumns(block, column, prefix)
    return list(planned.values())


def plan_again(recipe: Recipe, image_columns: Sequence[Hashable]) -> list[FeatureColumns]:
    """Plan the columns of an earlier result, with `image_columns` instead of its own in the same order."""
    if len(image_columns) != len(recipe.columns):
        problem = f"{recipe.source} has features of {listing(map(str, recipe.columns))}, but `images` names"
        way = f"Name {len(recipe.columns):,} columns, in that order."
        raise RequestError(f"{problem} {len(image_columns):,}. {way}")
    now = dict(zip(recipe.columns, image_columns, strict=True))
    return [FeatureColumns(part.block, now[part.column], part.prefix, repeats=part) for part in recipe.parts]


def normalized(parts: Sequence[FeatureColumns], raw: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Return the `raw` rows of all parts normalized, in place unless a later part needs them."""
    sources = [part.source for part in parts]
    return [
        part.normalized(rows.copy() if part.source in sources[number + 1 :] else rows)
        for number, (part, rows) in enumerate(zip(parts, raw, strict=True))
    ]


def places(frame: pd.DataFrame, parts: Iterable[FeatureColumns | PartRecipe], *, replace: bool) -> list[list[int]]:
    """Return the positions that the columns of `parts` replace; `replace` includes columns that no block made."""
    made, found = made_columns(frame), []
    for part in parts:
        own, names = set(made.get(part.prefix, ())), set(part.names)
        taken = {at for at, column in enumerate(frame.columns) if isinstance(column, str) and column in names} - own
        if taken and not replace:
            shown = listing(frame.columns[sorted(taken)[:SHOWN]])
            more = f" and {len(taken) - SHOWN:,} more" if len(taken) > SHOWN else ""
            problem = f"The frame already has columns {shown}{more}, which this block didn't make."
            way = "Set a different `prefix`, or pass `replace=True` to overwrite them."
            raise RequestError(f"{problem} {way}")
        found.append(sorted(own | taken))
    return found


def made_columns(frame: pd.DataFrame) -> dict[str, list[int]]:
    """Return the positions of complete sets of feature columns by prefix: 0 … width-1, each once, float32."""
    found: dict[str, list[tuple[int, int]]] = {}
    for position, (column, kind) in enumerate(zip(frame.columns, frame.dtypes, strict=True)):
        if isinstance(column, str) and (match := _MADE.fullmatch(column)):
            number = int(match[2]) if kind == np.float32 else -1  # -1, so that no block made this set
            found.setdefault(match[1], []).append((number, position))
    made = {}
    for prefix, numbered in found.items():
        positions = [position for _, position in sorted(numbered)]
        if min(numbered)[0] == 0 and list(frame.columns[positions]) == column_names(prefix, len(positions)):
            made[prefix] = positions
    return made


def attach(frame: pd.DataFrame, blocks: Sequence[pd.DataFrame], places: Sequence[Sequence[int]]) -> pd.DataFrame:
    """Return a new frame with `blocks` in place of the columns at `places`, or at its end."""
    import pandas as pd

    gone, start, end = {at for place in places for at in place}, 0, frame.shape[1]
    pieces: list[pd.DataFrame] = []
    arriving = [(min(place, default=end), block) for block, place in zip(blocks, places, strict=True)]
    for at, block in [*sorted(arriving, key=lambda pair: pair[0]), (end, frame.iloc[:, :0])]:
        pieces += [frame.iloc[:, [position for position in range(start, at) if position not in gone]], block]
        start = at
    joined = pd.concat(pieces, axis=1, ignore_index=True)  # which would turn None into NaN, and fail on odd labels
    labels = [label for piece in pieces for label in piece.columns]
    kind = object if frame.columns.dtype == object else None
    joined.columns = pd.Index(labels, dtype=kind, name=frame.columns.name, tupleize_cols=False)
    joined.attrs = deepcopy(frame.attrs)
    return joined


def _left_in_groups(root: Path, groups: Path) -> Iterator[int]:
    """Yield what the memory limits of the control groups leave; cached files can be dropped, so they don't count."""
    for kind, limit, used, cached in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in control_groups(kind, root, groups):
            with suppress(OSError, ValueError):  # no such group, or "max": no limit
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                most, taken = (int((folder / name).read_text()) for name in (limit, used))
                yield max(0, most - taken + int(statistics.get(cached, 0)))


def free_bytes(root: Path = ROOT, groups: Path = GROUPS) -> int | None:
    """Return the memory available without swapping, of the machine or the container; None if the system doesn't say."""
    with suppress(OSError, ValueError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        if available := re.search(r"^MemAvailable:\s*(\d+)", text, re.MULTILINE):
            return min([1024 * int(available[1]), *_left_in_groups(root, groups)])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # macOS: half of physical memory
    except (AttributeError, ValueError, OSError):
        return None
