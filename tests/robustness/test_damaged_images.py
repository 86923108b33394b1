"""A damaged image gives pixels or a reason of one line, in any format that is read."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, strategies as some
from PIL import Image

import nbfeat
from nbfeat import isolation
from nbfeat.images import decode
from nbfeat.images.decode import NAMES
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import read_pixels
from tests.images.images_child import images as image_files, is_a_sentence
from tests.mutations import TIMES, mutated
from tests.robustness.tries import CHANCE, Trials, said_by, tries

pytestmark = [pytest.mark.slow, pytest.mark.robustness]
FILES = [(kind, data) for kind, ways in image_files().items() for data in ways]


def gives_pixels_or_a_sentence(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch, isolation.pillow_defaults():
        patch.setattr(decode, "MOST_PIXELS", 4_000_000)
        try:
            (pixels,) = read_pixels(data, [PixelSpec(24)], Path())
            assert pixels.shape == (24, 24, 3)
        except nbfeat.ImageError as error:
            text = str(error)
        else:
            text = "fine"
    assert is_a_sentence(text), text


def test_every_format_is_among_the_images() -> None:
    assert {kind for kind, _ in FILES} == {*NAMES, "MPO"}
    for kind, data in FILES:
        assert Image.open(io.BytesIO(data)).format == kind
        gives_pixels_or_a_sentence(data)


@tries(400)
@given(file=some.sampled_from(FILES), chance=CHANCE)
def test_a_damaged_image_gives_pixels_or_a_sentence(
    trials: Trials, file: tuple[str, bytes], chance: random.Random
) -> None:
    trials["damaged images"] += 1
    gives_pixels_or_a_sentence(mutated(file[1], chance))


@tries(400)
@given(file=some.sampled_from(FILES), kept=some.integers(2, 40), rest=some.binary(max_size=300))
def test_a_header_before_anything_gives_pixels_or_a_sentence(
    trials: Trials, file: tuple[str, bytes], kept: int, rest: bytes
) -> None:
    trials["headers of images"] += 1
    gives_pixels_or_a_sentence(file[1][:kept] + rest)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="memory is measured as Linux does")
def test_two_thousand_damaged_images_are_features_or_failures(tmp_path: Path, trials: Trials) -> None:
    said = said_by("tests.images.images_child", 0, 2000 * TIMES, folder=tmp_path)
    assert said["odd"] == []
    assert {kind for kind, _ in FILES} == set(said["found"])
    for kind, counts in said["found"].items():
        assert set(counts) == {"decoded", "failed"}, kind
    assert sum(sum(counts.values()) for counts in said["found"].values()) == 2000 * TIMES
    # Of more images, one is sooner or later as large as any may be.
    assert said["peak"] < (1_000_000_000 if TIMES == 1 else 2_000_000_000)
    trials["damaged images in a run"] = 2000 * TIMES
    print(json.dumps(said))
