"""How fast one cut of an open network is, from files to features, measured on some of the user's own images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from nbfeat import isolation
from nbfeat.cache.database import Cache
from nbfeat.errors import ImageError
from nbfeat.extraction.network_state import NetworkState
from nbfeat.extraction.pipeline import Pipeline
from nbfeat.extraction.profile import Timings
from nbfeat.images.remote import Access, Fetcher
from nbfeat.images.sources import Fetch, address_of, load_image, spread

MOST_IMAGES = 64
FIRST_IMAGES = 8  # that warm up, and tell how many can be afforded
ROUNDS = 3  # the fastest counts: other work on the machine disturbed it least
SECONDS = 0.3  # of a round


def images_per_second(
    lane: NetworkState, key: str, images: Sequence[object], root: Path, *, remote: Access | None = None
) -> float:
    """Measure the output `key` of `lane` alone on up to 64 of `images`, spread over them, without the cache.

    Opening the network does not count, nor does the disk: the files are read once before, and `remote` images fetched.
    Images of the same content run once, as ever. Returns NaN where none can be read.
    """
    with Fetcher(root, remote) as fetch:
        some = _readable([images[at] for at in spread(len(images), MOST_IMAGES)], root, fetch if remote else None)
    if not some:
        return float("nan")
    engine = lane.opening.start(lane.precision, key)

    def rate(chosen: Sequence[object]) -> float:
        alone = NetworkState(lane.spec, lane.pixels, lane.opening, np.zeros(len(chosen), bool), engine=engine)
        start = time.perf_counter()
        with closing(Pipeline(chosen, [alone], root, Timings(), Cache(None), {}).run(range(len(chosen)))) as batches:
            ran = sum(len(batch.rows) for batch in batches)
        return ran / (time.perf_counter() - start)

    with isolation.pillow_defaults():
        guess = rate([some[at] for at in spread(len(some), FIRST_IMAGES)])
        affordable = [some[at] for at in spread(len(some), max(FIRST_IMAGES, int(guess * SECONDS)))]
        return max(rate(affordable) for _ in range(ROUNDS))


def _readable(images: Sequence[object], root: Path, fetch: Fetch | None) -> list[object]:
    """Return those of `images` that can be read, having read them; what was fetched in place of its address."""
    found = []
    for image in images:
        try:
            source, _ = load_image(image, root, fetch)
        except ImageError:
            continue
        found.append(image if address_of(image) is None else source)
    return found
