"""Measure several things in turn, round after round: machines drift, so only what one round has is compared."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from statistics import median

REASON_SHOWN = 160


class MissingError(Exception):
    """Raised by a way that cannot be measured here; says why."""


def progress(text: str) -> None:
    """Tell what is going on, apart from the results."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def why(error: Exception) -> str:
    """Say in one line why something could not be measured."""
    if isinstance(error, MissingError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    text = f"failed: {type(error).__name__}: {lines[0]}".rstrip(": ")
    return text if len(text) <= REASON_SHOWN else f"{text[: REASON_SHOWN - 1]}…"


class Found:
    """What was measured, a number for each way and round, and why some were not."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.missing: dict[str, str] = {}

    def has(self, *ways: str) -> bool:
        """Tell whether all of these were measured."""
        return all(way in self.values for way in ways)

    def typical(self, way: str) -> float:
        """Return the median."""
        return median(self.values[way])

    def ratio(self, way: str, to: str) -> float:
        """Return the median of the ratios within a round."""
        return median(mine / other for mine, other in zip(self.values[way], self.values[to], strict=True))


def in_rounds(ways: Mapping[str, Callable[[], float]], rounds: int) -> Found:
    """Measure every way once in each round; one that fails is left out from then on, and the others go on."""
    found = Found()
    for number in range(rounds):
        for way, measured in ways.items():
            if way in found.missing:
                continue
            progress(f"  round {number + 1} of {rounds}: {way}")
            try:
                found.values.setdefault(way, []).append(measured())
            except Exception as error:  # whatever it is, the row says it
                found.missing[way] = why(error)
                del found.values[way]
    return found
