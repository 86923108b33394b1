"""Rows whose features are in the cache, by the state of their files alone: nothing is read, nothing is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nbfeat.cache.database import Cache
from nbfeat.extraction.batch import Batch
from nbfeat.extraction.lane import NetworkState
from nbfeat.images.sources import state_of

ROWS_AT_ONCE = 500


def recall(
    images: Sequence[object], rows: Sequence[int], lanes: Sequence[NetworkState], root: Path, cache: Cache
) -> Iterator[Batch]:
    """Yield what `cache` has for those of `rows` whose files have not changed since they were read."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        states = {row: state for row in some if (state := state_of(images[row], root))}
        holds = cache.images(set(states.values()))
        known = {row: holds[state] for row, state in states.items() if state in holds}
        if not known:
            continue
        reasons = cache.failures(set(known.values()))
        failures = {row: reasons[image] for row, image in known.items() if image in reasons}
        if failures:
            yield Batch(failures=failures)
        for lane in lanes:
            left = {row: image for row, image in known.items() if not (row in failures or lane.done[row])}
            if (batch := _recalled(lane, left, cache)).rows:
                yield batch


def _recalled(lane: NetworkState, images: dict[int, bytes], cache: Cache) -> Batch:
    """Return the features that all outputs of `lane` have of `images`."""
    wanted = set(images.values())
    found = {key: cache.vectors(kept, wanted) for key, kept in lane.kept.items()}
    whole = {image for image in wanted if all(image in vectors for vectors in found.values())}
    rows = [row for row, image in images.items() if image in whole]
    if not rows:
        return Batch(lane)
    vectors = {key: np.stack([vectors[images[row]] for row in rows]) for key, vectors in found.items()}
    return Batch(lane, rows, vectors=vectors, cached=True)
