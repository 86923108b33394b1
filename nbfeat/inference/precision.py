"""Choose the precision of a network by measuring similarity to float32 and speed on the user's own images.

At lower precision some networks give the same features twice as fast, but others give different features. So a lower
precision is used only if every image and output agrees with float32 and it is faster on this machine.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock

from nbfeat.errors import ExtractionError, ImageError, NetworkError
from nbfeat.images.remote import Access, Fetcher
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import Fetch, digest_of, read_pixels, spread, state_of
from nbfeat.inference.engines.base import Asked, Engine, Pixels, Precision, Vectors
from nbfeat.inference.engines.cpu_count import available_cores
from nbfeat.inference.engines.devices import timed
from nbfeat.inference.prepared import PreparedNetwork, vectors_of
from nbfeat.inference.spec import NUMERICS
from nbfeat.paths import HomeError, home, keep, write_whole

AGREES = 0.999  # lowest cosine similarity to float32, for the worst image and output
IS_FASTER = 1.1  # times as fast as float32; less is not worth a change of values
MOST_IMAGES = 64
FIRST_IMAGES = 16  # if these disagree, more would not help
FOLDER, OTHERS = "precisions", "-any.json"  # in the home folder; the end of a check's name, for any images
PATIENCE = 60.0  # seconds to wait for another process to finish measuring
FROM_IMAGES = 128  # with fewer images, comparing takes longer than it saves
ROUNDS = 3  # the fastest counts, because other work on the machine disturbed it least
SECONDS = 0.5  # a round of this length is enough
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class PrecisionCheck:
    """A comparison of a precision with float32."""

    precision: Precision
    images: int  # 0 if the hardware doesn't support it
    agreement: float  # cosine similarity of the worst image and output
    speedup: float  # times as fast as float32; 0 if not measured
    day: str = ""  # when it was measured on other images: only the speed if it is better, else everything

    @property
    def is_better(self) -> bool:
        """Whether it gives the same features faster."""
        return bool(self.images) and self.agreement >= AGREES and self.speedup >= IS_FASTER

    def suffices(self, images: int, *, is_open: bool) -> bool:
        """Tell whether the check is based on enough images for a run over `images`."""
        # Up to half of the sampled images may have been unreadable.
        if is_open:  # a few images are enough to reject, or to confirm what was measured on others
            return self.agreement < AGREES or bool(self.day) or 2 * self.images >= MOST_IMAGES
        return 2 * self.images >= min(images, MOST_IMAGES)

    def message(self, title: str, *, asked: bool) -> str:
        """Say which precision the network `title` runs in, and why; "" if there was no choice."""
        if not self.images:
            return ""
        others = f"other images on {self.day}" if self.day else ""
        whose = others if others and not self.is_better else "of your images"
        images = f"{self.images:,} {whose}"
        similarity = f"{math.floor(self.agreement * 1e4 + 0.02) / 1e4:.4f} on {images}"  # rounded down: "at least"
        runs = f"{title} runs in {self.precision}{', as requested' if asked else ''}"
        if self.agreement < 0:
            why = f"it gives infinite or NaN values for some {whose}"
            if asked:
                return f"{runs}, but {why}."
        elif asked or self.is_better:
            faster = "" if asked else f", {self.speedup:.1f} times as fast" + (f" (on {others})" if others else "")
            return f"{runs}: similarity to float32 is at least {similarity}{faster}."
        elif self.agreement < AGREES:
            why = f"similarity {similarity} is below the {AGREES} threshold"
        else:
            why = f"it is only {self.speedup:.2f} times as fast as float32 (similarity {similarity})"
        return f"{self.precision} was rejected: {why}, so {title} runs in float32."


def choose_precision(
    network: PreparedNetwork, spec: PixelSpec, asked: Asked, images: Sequence[object], root: Path, remote: Access | None
) -> Generator[str, None, tuple[Precision, Engine | None, str]]:
    """Choose the precision of `network`; return it with its engine, if started, and a sentence for the report."""
    # ``auto`` compares once, if there are enough images. A requested precision is always used, but also compared.
    is_open, message = asked == "auto", ""
    candidates: tuple[Precision, ...] = network.faster if asked == "auto" else () if asked == "float32" else (asked,)
    exact = functools.cache(lambda: network.start("float32"))
    sample = functools.cache(lambda most: _sample(spec, images, root, remote, most))  # one for all candidates
    some = [images[at] for at in spread(len(images), MOST_IMAGES)] if candidates else []
    these = digest_of([*some, *(state_of(image, root) for image in some)], root)[:16]
    for precision in candidates:
        key = _key(network, spec, precision)
        names = f"{key}-{these}.json", f"{key}{OTHERS}"  # of the checks on these images, and on any
        known, other = functools.partial(_known, precision=precision, images=len(images), is_open=is_open), None
        if (check := known(names[0])) is None:
            if len(images) < (FROM_IMAGES if is_open else 1) and not known(names[1]):
                continue
            yield f"comparing {precision} with float32 on some of your images"
            with ExitStack() as stack:
                with suppress(OSError, NotImplementedError):  # the other process hangs, or files can't be locked here
                    # Two that measure at once would both be slow, and the second can use what the first finds.
                    stack.enter_context(FileLock(keep(FOLDER) / ".lock", timeout=PATIENCE))
                try:
                    check, other = _decided(network, precision, names, known, exact, sample, is_open=is_open)
                except ExtractionError:
                    if not is_open:
                        raise
                    message = f"{precision} was not compared with float32: there is not enough memory for both."
                    continue
        message = check.message(network.spec.network.title, asked=not is_open) or message
        if check.is_better or not is_open:
            return precision, other, message
    return "float32" if asked == "auto" else asked, exact() if exact.cache_info().currsize else None, message


def _decided(
    network: PreparedNetwork, precision: Precision, names: tuple[str, str],
    known: Callable[[str], PrecisionCheck | None], exact: Callable[[], Engine], sample: Callable[[int], Pixels], *,
    is_open: bool,
) -> tuple[PrecisionCheck, Engine | None]:  # fmt: skip
    """Return the check for these images, and the engine if one was started; confirm what was measured on others."""
    if found := known(names[0]):  # by another process, just now
        return found, None
    if (before := known(names[1]) if is_open else None) and not before.is_better:
        return before, None
    pixels = sample(FIRST_IMAGES if before else MOST_IMAGES)
    check, other = _compared(network, precision, exact(), pixels, is_open=is_open, is_timed=not before)
    if before and check.agreement >= AGREES:
        check = replace(check, speedup=before.speedup, day=before.day)
    if check.images or other is None:  # else no image could be read, which the run reports
        with suppress(HomeError, OSError):  # the next run compares again
            for name in names[: 1 if check.day else 2]:
                write_whole(keep(FOLDER) / name, json.dumps(asdict(check)))
    return check, other


def _compared(
    network: PreparedNetwork, precision: Precision, exact: Engine, pixels: Pixels, *, is_open: bool, is_timed: bool
) -> tuple[PrecisionCheck, Engine | None]:
    """Compare on the first images of the sample and, if those agree, on the rest; then time both engines."""
    try:
        other = network.start(precision)
    except NetworkError:  # the hardware doesn't support it
        if not is_open:
            raise
        return PrecisionCheck(precision, 0, 0.0, 0.0), None
    agreement, seen, speedup = 1.0, 0, 0.0
    first = FIRST_IMAGES if is_open else len(pixels)
    try:
        for some in (pixels[:first], pixels[first:]):
            if agreement >= AGREES and len(some):
                agreement = min(agreement, agreement_of(vectors_of(exact, some), vectors_of(other, some)))
                seen += len(some)
        if agreement >= AGREES and seen and is_timed:
            speedup = _speedup(exact, other, pixels)
    except NetworkError:  # float16 overflowed
        if not is_open:
            raise
        agreement, seen = -1.0, len(pixels)
    finally:
        exact.close()
        other.close()
    return PrecisionCheck(precision, seen, agreement, speedup), other


def _speedup(exact: Engine, other: Engine, pixels: Pixels) -> float:
    """Return the speed of `other` relative to `exact`, from the best of alternating rounds."""
    times: list[list[float]] = []
    while len(times) < ROUNDS and (not times or sum(times[-1]) < SECONDS):
        times.append([timed(functools.partial(vectors_of, engine, pixels))[1] for engine in (exact, other)])
    return min(slow for slow, _ in times) / min(fast for _, fast in times)


def agreement_of(exact: Vectors, other: Vectors) -> float:
    """Return the lowest cosine of any image and output (1 for two zero vectors), or -1 if a value is not finite."""
    least = 1.0
    for key in exact:
        one, two = exact[key].astype(float), other[key].astype(float)
        if not (np.isfinite(one).all() and np.isfinite(two).all()):
            return -1.0
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
        alike = (one * two).sum(axis=1) / np.where(lengths, lengths, 1.0)
        least = min(least, float(np.where(lengths, alike, (one == two).all(axis=1)).min()))
    return least


def _sample(spec: PixelSpec, images: Sequence[object], root: Path, remote: Access | None, most: int) -> Pixels:
    found = readable_sample(images, lambda image, fetch: read_pixels(image, [spec], root, fetch)[0], root, remote, most)
    order = np.random.default_rng(0).permutation(len(found))  # so that the first ones are spread over the frame, too
    return np.stack([found[at] for at in order]) if found else np.empty((0,), np.uint8)


def readable_sample(
    images: Sequence[object], read: Callable[[object, Fetch | None], Read], root: Path, remote: Access | None,
    most: int = MOST_IMAGES,
) -> list[Read]:  # fmt: skip
    """Return the results of `read` for up to `most` evenly sampled `images`, without those that cannot be read."""

    def read_one(image: object) -> list[Read]:
        try:
            return [read(image, fetch)]
        except ImageError:
            return []

    some = [images[at] for at in spread(len(images), most)]
    threads = available_cores() + (remote.limits.at_once if remote else 0)
    fetcher = Fetcher(root, remote) if remote else nullcontext()
    with ThreadPoolExecutor(threads, thread_name_prefix="nbfeat-decode") as pool, fetcher as fetch:
        return [one for found in pool.map(read_one, some) for one in found]


def _known(name: str, *, precision: Precision, images: int, is_open: bool) -> PrecisionCheck | None:
    """Return a cached check; None if there is none, it is damaged, or it is based on too few images."""
    with suppress(OSError, ValueError, TypeError):
        path = home() / FOLDER / name
        found = PrecisionCheck(**json.loads(path.read_text(encoding="utf-8")))
        numbers = type(found.images) is int and type(found.agreement) is type(found.speedup) is float
        if numbers and found.precision == precision and found.suffices(images, is_open=is_open):
            day = datetime.fromtimestamp(path.stat().st_mtime).astimezone().date()
            return replace(found, day=str(day)) if name.endswith(OTHERS) else found
    return None


def _key(network: PreparedNetwork, pixels: PixelSpec, precision: Precision) -> str:
    """Name the cached checks by network, outputs, pixels, engine and CPU."""
    spec = {**asdict(network.spec), "weights": network.weights.sha256}
    rest = {"spec": spec, "pixels": asdict(pixels), "precision": precision, "numerics": NUMERICS}
    return hashlib.sha256(json.dumps({**network.numbers, **rest}, sort_keys=True).encode()).hexdigest()[:40]
