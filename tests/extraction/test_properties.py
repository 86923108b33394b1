"""Properties that hold for any sequence of requests; NBFEAT_TEST_EXAMPLES=10 tries a thousand random ones each."""

from __future__ import annotations

import os
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as some
from PIL import Image

import nbfeat
from nbfeat import Extraction, RequestError
from nbfeat.images import fingerprint
from nbfeat.inference.engines.base import Vectors
from tests.fake import FakeEngine
from tests.memory import IN_MEMORY
from tests.mutations import TIMES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fake_network")]
LAYERS = ("", "conv_pw_3_relu", "conv_pw_5_relu", "conv_pw_11_relu")
COLORS = range(6)
many = settings(max_examples=100 * TIMES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def blocks_of(layers: set[str]) -> list[str]:
    return [f"MobileNet --size 32{f' --layer {layer}' if layer else ''}" for layer in sorted(layers)]


def image(color: int, size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), 7 + 40 * color, np.uint8)


@many
@given(some.lists(some.sets(some.sampled_from(LAYERS), min_size=1), min_size=2, max_size=3))
def test_cuts_beside_cuts(monkeypatch: pytest.MonkeyPatch, requests: list[set[str]]) -> None:
    """The pretended network fuses: what a cut gives depends on the cuts beside it, as OpenVINO's last bits do."""
    collect = FakeEngine.collect

    def fused(engine: FakeEngine) -> Vectors:
        beside = np.float32(sum(len(cut.layer) for cut in engine.spec.cuts))
        return {key: vectors + beside for key, vectors in collect(engine).items()}

    frame = pd.DataFrame({"image": [image(0)]})
    with monkeypatch.context() as patch, tempfile.TemporaryDirectory(dir=IN_MEMORY) as home:
        patch.setenv("NBFEAT_HOME", home)
        patch.setattr(FakeEngine, "collect", fused)
        for layers in requests:
            found = nbfeat.extract(frame, blocks_of(layers)).features.to_numpy()
            np.testing.assert_array_equal(found, image(0)[0, 0, 0] + sum(map(len, layers)))


@many
@given(
    some.lists(some.sampled_from(COLORS), min_size=1, max_size=6),
    some.lists(some.sampled_from(COLORS), min_size=1, max_size=6),
    some.booleans(),
)
def test_read_beside_a_frame(tmp_path: Path, written: list[int], other: list[int], as_folder: bool) -> None:
    """Features are attached to a frame with these images in this order, and to no other."""
    for color in COLORS:
        if not (file := tmp_path / f"{color}.png").exists():
            Image.fromarray(image(color)).save(file)
    frames = [
        pd.DataFrame({"path": [str(tmp_path / f"{color}.png") for color in colors]}) for colors in (written, other)
    ]
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        path = Path(folder, "result") if as_folder else Path(folder, "result.parquet")
        if as_folder:
            nbfeat.extract(frames[0], "MobileNet --size 32", parquet=path)
        else:
            nbfeat.extract(frames[0], "MobileNet --size 32", cache=False).to_parquet(path)
        if written == other:
            expected = [image(color)[0, 0, 0] for color in written]
            assert nbfeat.read(path, frame=frames[1]).features.iloc[:, 0].tolist() == pytest.approx(expected)
        else:
            with pytest.raises(RequestError):
                nbfeat.read(path, frame=frames[1])


@many
@given(
    some.lists(some.sampled_from(COLORS), min_size=2, max_size=8),
    some.lists(some.tuples(some.integers(0, 6), some.integers(0, 7), some.sampled_from(COLORS)), max_size=3),
    some.booleans(),
)
def test_going_on_after_a_stop_while_files_change(
    monkeypatch: pytest.MonkeyPatch, colors: list[int], stops: list[tuple[int, int, int]], cache: bool
) -> None:
    """Each row has the features of some content that its file had during the run, never those of another file."""
    monkeypatch.setattr(fingerprint, "SETTLED_AFTER_NS", 0)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder, monkeypatch.context() as patch:
        patch.setenv("NBFEAT_HOME", folder)
        held: list[set[int]] = [{color} for color in colors]
        paths = [Path(folder, f"{row}.bmp") for row in range(len(colors))]
        for path, color in zip(paths, colors, strict=True):
            Image.fromarray(image(color)).save(path)
        frame = pd.DataFrame({"path": list(map(str, paths))})
        extraction = Extraction(frame, "MobileNet --size 32", batch_size=2, cache=cache)
        for number, (steps, row, color) in enumerate(stops):
            for _ in islice(extraction.steps(), steps):
                pass
            if extraction.state == "done":
                break
            Image.fromarray(image(color)).save(paths[row % len(colors)])
            os.utime(paths[row % len(colors)], ns=(10**18 + number, 10**18 + number))
            held[row % len(colors)].add(color)
        extraction.run()
        shades: Any = extraction.features.iloc[:, 0].to_numpy()
        for shade, contents in zip(shades, held, strict=True):
            assert any(abs(shade - image(color)[0, 0, 0]) < 1e-3 for color in contents)
