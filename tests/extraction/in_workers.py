"""ImageFeatures that report which process decoded which image; joblib's workers import this module."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from nbfeat import Extraction, ImageFeatures
from nbfeat.extraction import pipeline
from nbfeat.images import decode
from nbfeat.inference import prepared
from nbfeat.inference.engines import cpu_count
from tests.fake import FakeNetwork


class Watched(ImageFeatures):
    """Run a fake network, and log each decoded image."""

    def _run(self, *args: Any, **options: Any) -> Extraction:
        original = decode.pixels_of

        def watched(source: decode.Source, specs: Any) -> Any:
            assert isinstance(source, bytes)
            with _log().open("a") as log:
                log.write(f"{os.getpid()} {hashlib.sha256(source).hexdigest()}\n")
            return original(source, specs)

        with (
            mock.patch.object(prepared, "PreparedNetwork", FakeNetwork),
            mock.patch.object(pipeline, "pixels_of", watched),
        ):
            return super()._run(*args, **options)


def decoded() -> Counter[tuple[str, ...]]:
    """Return how many times each process decoded each image."""
    return Counter(tuple(line.split()) for line in _log().read_text().splitlines())


def cores_and_engine(transformer: ImageFeatures, paths: list[str]) -> tuple[int, str]:
    """Return the number of cores that a process uses, and the name of its engine."""
    return cpu_count.available_cores(), transformer.fit(paths).recipe_.provenance["engines"][0]


def _log() -> Path:
    return Path(os.environ["NBFEAT_HOME"]) / "decoded.txt"
