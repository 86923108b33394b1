"""Where the time of a run went: seconds of each kind of work, and the sentence that says which of them bounds it."""

from __future__ import annotations

import time
from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nbfeat.html import Html, paragraph, table, text_table

Bottleneck = Literal["reading", "decoding", "network"]
CLEARLY_MORE = 2  # of small files both take little, and mostly wait for a processor
_SENTENCES = {
    None: "Nothing had to be computed.",
    "reading": "Reading is the bottleneck: the network had no images {}. A disk that is nearer or faster would help.",
    "decoding": "Decoding is the bottleneck: the network had no images {}. More cores would help, or smaller images.",
    "network": "The network is the bottleneck: decoded images waited for it {}. A GPU, more cores or a smaller "
    "backbone would help.",
}
_WORK = {
    "preparing": "building or loading networks, comparing precisions",
    "reading": "files, summed over threads",
    "decoding": "and resizing, summed over threads",
    "network": "at work, beside the threads",
    "cache": "taking features from it, and keeping new ones",
    "attaching": "normalizing, and attaching the columns or writing them",
    "total": "from start to end",
}


@dataclass(slots=True)
class Timings:
    """What a run measures as it goes, in seconds."""

    preparing: float = 0.0
    recalling: float = 0.0  # taking features from the cache before anything is read
    reading: float = 0.0  # summed over threads
    decoding: float = 0.0  # and resizing, summed over threads
    network: float = 0.0  # in which an engine was at work
    waiting_for_images: float = 0.0  # the network had nothing to do
    waiting_for_network: float = 0.0  # decoded images had to wait
    keeping: float = 0.0  # writing to the cache
    attaching: float = 0.0

    @contextmanager
    def while_attaching(self) -> Iterator[None]:
        """Count the block as `attaching`."""
        start = time.perf_counter()
        yield
        self.attaching += time.perf_counter() - start

    @property
    def bottleneck(self) -> Bottleneck:
        """What more of would make the run faster."""
        if self.waiting_for_network >= self.waiting_for_images:
            return "network"
        return "reading" if self.reading > CLEARLY_MORE * self.decoding else "decoding"


class Profile(UserDict[str, Any]):
    """Seconds of a run by kind of work, its ``"total"``, and its ``"bottleneck"``; shown as a table and a sentence.

    Images are read and decoded while the network is at work, so that the parts are more than the total.
    """

    def __init__(self, timings: Timings, *, seconds: float, computed: bool) -> None:
        bottleneck = timings.bottleneck if computed else None
        work = {**asdict(timings), "cache": timings.recalling + timings.keeping, "total": seconds}
        super().__init__({name: work[name] for name in _WORK}, bottleneck=bottleneck)
        self._waited = timings.waiting_for_network if bottleneck == "network" else timings.waiting_for_images

    @property
    def sentence(self) -> str:
        """What bounds the speed, how it shows, and what would help."""
        return _SENTENCES[self["bottleneck"]].format(f"in {self._waited:,.1f} of {self['total']:,.1f} s")

    def _rows(self, space: str) -> list[tuple[str, str, str]]:
        """Return the rows of the table; `space` before shorter numbers sets the points below each other."""
        seconds = {name: f"{self[name]:,.2f}" for name in _WORK}
        width = max(len("seconds"), *map(len, seconds.values()))
        return [(name, seconds[name].rjust(width, space), what) for name, what in _WORK.items()]

    def __repr__(self) -> str:
        return f"{text_table(self._rows(' '), ('work', 'seconds', ''))}\n{self.sentence}"

    def _repr_html_(self) -> str:
        rows = self._rows("\N{FIGURE SPACE}")  # which html keeps, as wide as a digit
        return Html(table(rows, ("work", "seconds", "")) + paragraph(self.sentence))
