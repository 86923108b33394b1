"""An extraction that was interrupted at any line, or refused, can go on and gives the right features."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import nbfeat
from nbfeat import Extraction, ExtractionError, RequestError
from nbfeat.extraction import columns, sink
from tests.fake import FakeEngine
from tests.memory import IN_MEMORY
from tests.mutations import TIMES

pytestmark = pytest.mark.usefixtures("fake_network")
END = "MobileNet --size 32"
STANDARD = f"{END} --normalize standard"
PACKAGE = str(Path(nbfeat.__file__).parent)
ROWS = 14
Interrupt = type[BaseException]


class Interrupted:
    """Raise an error before line number `at` of those that Python executes in `rooms`."""

    def __init__(
        self, at: int, kind: Interrupt = KeyboardInterrupt, rooms: Sequence[str] = ("extraction", "parquet", "cache")
    ) -> None:
        self.at, self.kind, self.rooms, self.lines, self.where = at, kind, rooms, 0, ""

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        is_traced = name.startswith(PACKAGE) and Path(name).parent.name in self.rooms
        return self._line if is_traced and event == "call" else None

    def _line(self, frame: FrameType, event: str, _: object) -> Any:
        self.lines += event == "line"
        if event == "line" and self.lines == self.at:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            raise self.kind
        return self._line

    @contextmanager
    def here(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        except self.kind:
            pass
        except ExtractionError as error:
            assert isinstance(error.__cause__, self.kind)  # noqa: PT017 - memory ran out, which is explained
        finally:
            sys.settrace(before)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """Return a frame with copies and a missing file; datasets get files of six rows."""
    monkeypatch.setattr(sink, "MOST_ROWS", 6)
    paths = [tmp_path / f"{number}.bmp" for number in range(ROWS)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number % 11).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    paths[5] = tmp_path / "gone.png"
    return pd.DataFrame({"path": list(map(str, paths))})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt in a finalizer
@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        ([END], {"cache": False}),
        ([END, f"{END} --layer x --pooling max"], {"cache": True}),
        ([STANDARD], {"cache": False}),
        ([END], {"parquet": True}),
        ([STANDARD], {"parquet": True}),
        ([], {"parquet": True, "like": True}),
    ],
    ids=["memory", "cache", "standard", "files", "standard files", "repeated files"],
)
def test_interrupts_at_any_line_and_going_on(
    pictures: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, blocks: list[str], options: dict[str, Any]
) -> None:
    train = nbfeat.extract(pictures, f"{STANDARD} --components 3", cache=False)
    generator = random.Random(3)

    def made(home: str) -> tuple[Extraction, Any]:
        monkeypatch.setenv("NBFEAT_HOME", home)
        given = {**options, **({"like": train} if "like" in options else {})}
        folder = Path(home, "features in files") if "parquet" in options else None
        extraction = Extraction(pictures, *blocks, batch_size=3, **{**given, "parquet": folder})
        return extraction, lambda: (nbfeat.read(folder) if folder else extraction).features

    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as home, Interrupted(0).here():
        extraction, features = made(home)
        watch: Any = sys.gettrace()
        extraction.run()
        expected, lines = features(), watch.lines
    for at in sorted(generator.sample(range(1, lines), min(lines - 1, 25 * TIMES))):
        again = Interrupted(generator.randrange(1, lines), generator.choice([KeyboardInterrupt, MemoryError]))
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as home:
            extraction, features = made(home)
            first = Interrupted(at)
            for interrupt in (first, again):
                with interrupt.here():
                    extraction.run()
            extraction.run()
            # Normalization that is fitted file by file sums up in a different order after a stop.
            np.testing.assert_allclose(features(), expected, atol=1e-4, err_msg=f"{first.where}, {again.where}")
            assert (extraction.done, extraction.state, len(extraction.failures)) == (ROWS, "done", 1)


def test_a_clash_that_only_the_network_shows_is_refused_each_time(pictures: pd.DataFrame) -> None:
    pictures["mobilenet_conv1_0002"] = "mine"
    extraction = Extraction(pictures, f"{END} --layer conv1")
    for _ in range(2):
        with pytest.raises(RequestError, match="mobilenet_conv1_0002"):
            extraction.run()
    assert FakeEngine.computed == 0


def test_too_little_memory_is_refused_each_time_and_may_be_there_later(
    pictures: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    extraction = Extraction(pictures, f"{END} --layer conv1")
    with monkeypatch.context() as patch:
        patch.setattr(columns, "free_bytes", lambda: 10)
        for _ in range(2):
            with pytest.raises(RequestError, match="free memory"):
                extraction.run()
    assert FakeEngine.computed == 0
    assert extraction.run().done == ROWS
