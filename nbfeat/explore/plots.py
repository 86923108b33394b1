"""What plots share: axes to draw on, colors that everyone can tell apart, names as they are written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Color = tuple[float, float, float]
COLORS = 10  # in seaborn's palette for the color-blind; more would repeat


def axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return `ax`, or axes of a new figure of `width` × `height` inches that nothing is cut from.

    The figure is pyplot's, so that a notebook shows it. Its style is the user's.
    """
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    _, new = plt.subplots(figsize=(width, height), layout="constrained")
    return new


def colors(names: Iterable[object]) -> dict[object, Color] | None:
    """Return a color for each of `names`, in order; None where there are too many to tell apart."""
    import seaborn as sns

    known = list(dict.fromkeys(names))
    return dict(zip(known, sns.color_palette("colorblind", len(known)), strict=True)) if len(known) <= COLORS else None


def plain(text: object) -> str:
    """Return `text` so that matplotlib shows it as it is: between two dollars it would read a formula."""
    return str(text).replace("$", r"\$")
