"""Decide what a network computes in by what is measured on the user's own images, once, and tell it.

In fewer bits some networks give the same features twice as fast, and others give other features: which, cannot be told
from the network. So a faster precision is taken only if every image and every output agrees with float32, and if it is
faster on this machine. What was measured is kept, by network, engine and CPU.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from nbfeat.errors import ImageError, NetworkError
from nbfeat.images.remote import Access, Fetcher
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import Fetch, read_pixels, spread
from nbfeat.inference.engines.base import Asked, Engine, Pixels, Precision, Vectors
from nbfeat.inference.engines.cpu_count import available_cores
from nbfeat.inference.engines.devices import timed
from nbfeat.inference.prepared import PreparedNetwork, vectors_of
from nbfeat.inference.spec import NUMERICS
from nbfeat.paths import HomeError, home, keep, write_whole

AGREES = 0.999  # cosine with float32, of the worst image and output
IS_FASTER = 1.1  # times as fast as float32: less is not worth other numbers
MOST_IMAGES = 64
FIRST_IMAGES = 16  # where these disagree, more would not help
FOLDER = "precisions"  # of the home folder
FROM_IMAGES = 128  # for fewer, to compare takes longer than it saves
ROUNDS = 3  # the fastest counts: other work on the machine disturbed it least
SECONDS = 0.5  # a round that takes as long needs no other
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class PrecisionCheck:
    """What was measured of a precision beside float32."""

    precision: Precision
    images: int  # 0 where the hardware does not compute in it
    agreement: float  # cosine of the worst image and output
    speedup: float  # times as fast as float32; 0 where it was not measured

    @property
    def is_better(self) -> bool:
        """Whether it gives the same features faster."""
        return bool(self.images) and self.agreement >= AGREES and self.speedup >= IS_FASTER

    def suffices(self, images: int, *, is_open: bool) -> bool:
        """Tell whether what was found need not be found again, for a run over so many `images`."""
        # Half of those that were tried may have been unreadable.
        if is_open:  # what few images refuse is refused
            return self.agreement < AGREES or 2 * self.images >= MOST_IMAGES
        return 2 * self.images >= min(images, MOST_IMAGES)

    def message(self, *, asked: bool) -> str:
        """Say in a few words what a network computes in and why; "" where there was nothing to choose."""
        if not self.images:
            return ""
        if self.agreement < 0:
            numbers = f"{self.precision} gives numbers without end for some of your images"
            return f"{self.precision}, as asked for, though {numbers}" if asked else f"float32: {numbers}"
        digits = 4 if self.agreement < 0.99995 or self.agreement > 0.99999 else 5  # as many as tell it from 1
        agrees, images = f"to {self.agreement:.{digits}f}", f"on {self.images:,} of your images"
        if asked:
            return f"{self.precision}, as asked for, which agrees with float32 {agrees} {images}"
        if self.is_better:
            return f"{self.precision}, which agrees with float32 {agrees} {images}, {self.speedup:.1f} times as fast"
        if self.agreement < AGREES:
            return f"float32: {self.precision} agrees with it only {agrees} {images}, and {AGREES} is asked for"
        slow = f"but is only {self.speedup:.2f} times as fast"
        return f"float32: {self.precision} would agree {agrees} {images}, {slow}"


def choose_precision(
    network: PreparedNetwork, spec: PixelSpec, asked: Asked, images: Sequence[object], root: Path, remote: Access | None
) -> Generator[str, None, tuple[Precision, Engine | None, str]]:
    """Choose what `network` computes in, with the engine where one was started for that and a sentence for the report.

    ``auto`` compares where there are enough images, once. What is asked for is obeyed, and compared all the same.
    """
    is_open, message = asked == "auto", ""
    exact: Engine | None = None
    sample = functools.cache(lambda: _sample(spec, images, root, remote))  # once for all that are compared
    candidates: tuple[Precision, ...] = network.faster if asked == "auto" else () if asked == "float32" else (asked,)
    for precision in candidates:
        file = _file(network, spec, precision)
        check, other = _known(file, precision), None
        if check is None or not check.suffices(len(images), is_open=is_open):
            if len(images) < (FROM_IMAGES if is_open else 1):
                continue
            yield f"comparing {precision} with float32 on some of your images"
            exact = exact or network.start("float32")
            check, other = _compared(network, precision, exact, sample, is_open=is_open)
            if check.images or other is None:  # else no image could be read, which is told in its place
                with suppress(HomeError, OSError):  # then it will be compared again
                    write_whole(keep(FOLDER) / file, json.dumps(asdict(check)))
        if said := check.message(asked=not is_open):
            message = f"{network.spec.network.title} computes in {said}."
        if check.is_better or not is_open:
            return precision, other, message
    return "float32" if asked == "auto" else asked, exact, message


def _compared(
    network: PreparedNetwork, precision: Precision, exact: Engine, sample: Callable[[], Pixels], *, is_open: bool
) -> tuple[PrecisionCheck, Engine | None]:
    """Compare on the first images of the sample, and, where those agree, on the others; time both engines then."""
    try:
        other = network.start(precision)
    except NetworkError:  # the hardware does not compute in it
        if not is_open:
            raise
        return PrecisionCheck(precision, 0, 0.0, 0.0), None
    pixels, agreement, seen, speedup = sample(), 1.0, 0, 0.0
    first = FIRST_IMAGES if is_open else len(pixels)
    try:
        for some in (pixels[:first], pixels[first:]):
            if agreement >= AGREES and len(some):
                agreement = min(agreement, agreement_of(vectors_of(exact, some), vectors_of(other, some)))
                seen += len(some)
        if agreement >= AGREES and seen:
            speedup = _speedup(exact, other, pixels)
    except NetworkError:  # its numbers grew too large
        if not is_open:
            raise
        agreement, seen = -1.0, len(pixels)
    finally:
        exact.close()
        other.close()
    return PrecisionCheck(precision, seen, agreement, speedup), other


def _speedup(exact: Engine, other: Engine, pixels: Pixels) -> float:
    """Return how many times as fast as `exact` the `other` is, in turn and at their best."""
    times: list[list[float]] = []
    while len(times) < ROUNDS and (not times or sum(times[-1]) < SECONDS):
        times.append([timed(functools.partial(vectors_of, engine, pixels))[1] for engine in (exact, other)])
    return min(slow for slow, _ in times) / min(fast for _, fast in times)


def agreement_of(exact: Vectors, other: Vectors) -> float:
    """Return the least cosine of any image and output, 1 for two vectors of zeros; -1 where something is no number."""
    least = 1.0
    for key in exact:
        one, two = exact[key].astype(float), other[key].astype(float)
        if not (np.isfinite(one).all() and np.isfinite(two).all()):
            return -1.0
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
        alike = (one * two).sum(axis=1) / np.where(lengths, lengths, 1.0)
        least = min(least, float(np.where(lengths, alike, (one == two).all(axis=1)).min()))
    return least


def _sample(spec: PixelSpec, images: Sequence[object], root: Path, remote: Access | None) -> Pixels:
    found = readable_sample(images, lambda image, fetch: read_pixels(image, [spec], root, fetch)[0], root, remote)
    # In another order the first ones, which may suffice, are spread, too.
    order = np.random.default_rng(0).permutation(len(found))
    return np.stack([found[at] for at in order]) if found else np.empty((0,), np.uint8)


def readable_sample(
    images: Sequence[object], read: Callable[[object, Fetch | None], Read], root: Path, remote: Access | None
) -> list[Read]:
    """Return what `read` makes of up to 64 of `images`, spread over them; those that cannot be read are left out."""

    def read_one(image: object) -> list[Read]:
        try:
            return [read(image, fetch)]
        except ImageError:
            return []

    some = [images[at] for at in spread(len(images), MOST_IMAGES)]
    threads = available_cores() + (remote.limits.at_once if remote else 0)
    fetcher = Fetcher(root, remote) if remote else nullcontext()
    with ThreadPoolExecutor(threads, thread_name_prefix="nbfeat-decode") as pool, fetcher as fetch:
        return [one for found in pool.map(read_one, some) for one in found]


def _known(file: str, precision: Precision) -> PrecisionCheck | None:
    """Return what was found before; None where nothing was, or what is kept of it is damaged."""
    with suppress(OSError, ValueError, TypeError):
        found = PrecisionCheck(**json.loads((home() / FOLDER / file).read_text(encoding="utf-8")))
        numbers = type(found.images) is int and type(found.agreement) is type(found.speedup) is float
        return found if numbers and found.precision == precision else None
    return None


def _file(network: PreparedNetwork, pixels: PixelSpec, precision: Precision) -> str:
    """Name what is kept by the network with its outputs, the pixels it takes, the engine and the CPU."""
    spec = {**asdict(network.spec), "weights": network.weights.sha256}
    rest = {"pixels": asdict(pixels), "precision": precision, "numerics": NUMERICS}
    decided = json.dumps({**network.numbers, "spec": spec, **rest}, sort_keys=True)
    return f"{hashlib.sha256(decided.encode()).hexdigest()[:40]}.json"
