"""Read what a result is to be like, and refuse what would make it another."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeGuard

from nbfeat.errors import RequestError, listing
from nbfeat.extraction.recipe import Recipe


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
    """Return the recipe that is to be repeated, or None; nothing else may be asked for that the recipe key_fields."""
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
        from nbfeat.extraction.reading import read_recipe

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
