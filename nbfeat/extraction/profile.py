"""Timings of a run by kind of work, and the bottleneck."""

import time
from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nbfeat.html import Html, paragraph, table, text_table

Bottleneck = Literal["reading", "decoding", "network"]
CLEARLY_MORE = 2  # small files take little time to read and mostly wait for a core
_SENTENCES = {
    None: "Nothing had to be computed.",
    "reading": "Reading is the bottleneck: the network waited for images {}. Try a faster or local disk.",
    "decoding": "Decoding is the bottleneck: the network waited for images {}. Try more cores or smaller images.",
    "network": "The network is the bottleneck: images waited for it {}. Try a GPU, more cores or a smaller backbone.",
}
_WORK = {
    "preparing": "building or loading networks, comparing precisions",
    "reading": "reading files, summed over threads",
    "decoding": "decoding and resizing, summed over threads",
    "network": "running networks, in parallel with the threads",
    "cache": "reading cached features and saving new ones",
    "attaching": "normalizing, then attaching or writing columns",
    "total": "from start to end",
}


@dataclass(slots=True)
class Timings:
    """Timings that a run measures as it goes, in seconds."""

    preparing: float = 0.0
    recalling: float = 0.0  # looking in the cache before any file is read
    reading: float = 0.0  # summed over threads
    decoding: float = 0.0  # including resizing, summed over threads
    network: float = 0.0  # while an engine was working
    waiting_for_images: float = 0.0  # while the network was idle
    waiting_for_network: float = 0.0  # while decoded images waited
    keeping: float = 0.0  # saving to the cache
    attaching: float = 0.0

    @contextmanager
    def adding(self, kind: str) -> Iterator[None]:
        """Add the time in the block to that of this kind of work, unless it fails."""
        start = time.perf_counter()
        yield
        setattr(self, kind, getattr(self, kind) + time.perf_counter() - start)

    @property
    def bottleneck(self) -> Bottleneck:
        """The kind of work that limits the speed."""
        if self.waiting_for_network >= self.waiting_for_images:
            return "network"
        return "reading" if self.reading > CLEARLY_MORE * self.decoding else "decoding"


class Profile(UserDict[str, Any]):
    """Seconds of a run by kind of work, e.g. ``profile["decoding"]``; printed as a table and a sentence.

    Keys are ``"preparing"``, ``"reading"``, ``"decoding"``, ``"network"``, ``"cache"``, ``"attaching"``, ``"total"``,
    and ``"bottleneck"``: ``"reading"``, ``"decoding"``, ``"network"``, or None if nothing was computed. Images are read
    and decoded while the network runs, so the times can add up to more than the total.

    Examples
    --------
    >>> result.profile["bottleneck"] in {"reading", "decoding", "network", None}
    True
    """

    def __init__(self, timings: Timings, *, seconds: float, computed: bool) -> None:
        bottleneck = timings.bottleneck if computed else None
        work = {**asdict(timings), "cache": timings.recalling + timings.keeping, "total": seconds}
        super().__init__({name: work[name] for name in _WORK}, bottleneck=bottleneck)
        self._waited = timings.waiting_for_network if bottleneck == "network" else timings.waiting_for_images

    @property
    def sentence(self) -> str:
        """The bottleneck, the time that it cost, and what would help."""
        return _SENTENCES[self["bottleneck"]].format(f"in {self._waited:,.1f} of {self['total']:,.1f} s")

    def _rows(self, space: str) -> list[tuple[str, str, str]]:
        seconds = {name: f"{self[name]:,.2f}" for name in _WORK}
        width = max(len("seconds"), *map(len, seconds.values()))
        return [(name, seconds[name].rjust(width, space), what) for name, what in _WORK.items()]

    def __repr__(self) -> str:
        return f"{text_table(self._rows(' '), ('work', 'seconds', ''))}\n{self.sentence}"

    def _repr_html_(self) -> str:
        rows = self._rows("\N{FIGURE SPACE}")  # as wide as a digit, and not collapsed by HTML
        return Html(table(rows, ("work", "seconds", "")) + paragraph(self.sentence))
