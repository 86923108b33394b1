"""How fast one cut of an open network is, from files to features, measured on some of the user's own images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from nbfeat import isolation
from nbfeat.cache.database import Cache
from nbfeat.extraction.network_state import NetworkState
from nbfeat.extraction.pipeline import Pipeline
from nbfeat.extraction.profile import Timings
from nbfeat.images.remote import Access
from nbfeat.images.sources import Fetch, address_of, load_image, spread
from nbfeat.inference.engines.devices import timed
from nbfeat.inference.precision import readable_sample

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

    def read(image: object, fetch: Fetch | None) -> object:
        """Read the image; give what was fetched in place of its address."""
        source, _ = load_image(image, root, fetch)
        return image if address_of(image) is None else source

    some = readable_sample(images, read, root, remote)
    if not some:
        return float("nan")
    engine = lane.opening.start(lane.precision, key)

    def rate(chosen: Sequence[object]) -> float:
        alone = NetworkState(lane.spec, lane.pixels, lane.opening, np.zeros(len(chosen), bool), engine=engine)
        pipeline = Pipeline(chosen, [alone], root, Timings(), Cache(None), {})
        with closing(pipeline.run(range(len(chosen)))) as batches:
            ran, seconds = timed(lambda: sum(len(batch.rows) for batch in batches))
        return ran / seconds

    with isolation.pillow_defaults():
        guess = rate([some[at] for at in spread(len(some), FIRST_IMAGES)])
        affordable = [some[at] for at in spread(len(some), max(FIRST_IMAGES, int(guess * SECONDS)))]
        return max(rate(affordable) for _ in range(ROUNDS))
