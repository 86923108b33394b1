"""Read what a result is to be like, and refuse what would make it another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from nbfeat.errors import RequestError, listing
from nbfeat.features.recipe import Recipe

if TYPE_CHECKING:
    from nbfeat.features.extraction import Extraction

Like: TypeAlias = "Recipe"


def to_repeat(
    like: Extraction | Like | None,
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
        message = f"--like repeats the blocks of {recipe.source}: leave {named} away."
        raise RequestError(message)
    if fit_on is not None:
        message = f"--like repeats what {recipe.source} learned, and learns nothing: leave --fit-on away."
        raise RequestError(message)
    if precision not in {"auto", recipe.precision}:
        message = (
            f"{recipe.source} was computed in {recipe.precision}, and would give other features in {precision}: "
            "leave --precision away, or extract both frames anew."
        )
        raise RequestError(message)
    return recipe


def recipe_of(like: Extraction | Like) -> Recipe:
    """Return the recipe of an Extraction that is done."""
    if isinstance(like, Recipe):
        return like
    if hasattr(like, "steps"):
        return Recipe.of(like)
    message = f"--like takes an Extraction that is done, or a Recipe, not {type(like).__name__}."
    raise RequestError(message)
