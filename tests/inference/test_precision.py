"""Precision: measured on the user's own images, chosen once, reported and repeated."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from PIL import Image

import nbfeat
from nbfeat import ExtractionError, NetworkError, RequestError, paths
from nbfeat.extraction.extraction import Extraction
from nbfeat.inference import precision
from nbfeat.inference.engines import devices
from nbfeat.inference.engines.base import Precision, Vectors
from tests.conftest import ROOT
from tests.fake import FakeEngine, FakeNetwork

BLOCK = "MobileNet --size 32"


class Hardware:
    """Pretended hardware with an error and a speed for lower precision, and with its own clock."""

    def __init__(self) -> None:
        self.error = 0.0  # of the last image's first feature, relative to its length
        self.speedup = 2.0
        self.now = 0.0
        self.refuses: tuple[Precision, ...] = ()
        self.started: list[Precision] = []

    def spoil(self, engine: FakeEngine, vectors: Vectors) -> None:
        """Add the error to features computed at lower precision."""
        for features in vectors.values():
            features[-1, 0] += self.error * np.linalg.norm(features[-1])


@pytest.fixture
def hardware(fake_network: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> Hardware:
    assert fake_network
    pretended = Hardware()
    start, collect = FakeNetwork.start, FakeEngine.collect
    monkeypatch.setattr(FakeNetwork, "faster", ("bfloat16",))
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: pretended.now))

    def started(network: FakeNetwork, asked: Precision, only: str | None = None) -> FakeEngine:
        if asked in pretended.refuses:
            raise NetworkError(f"This CPU has no {asked}.")
        pretended.started.append(asked)
        engine = start(network, asked, only)
        engine.name = asked
        return engine

    def collected(engine: FakeEngine) -> Vectors:
        vectors = collect(engine)
        pretended.now += 1.0 if engine.name == "float32" else 1.0 / pretended.speedup
        if engine.name != "float32":
            pretended.spoil(engine, vectors)
        return vectors

    monkeypatch.setattr(FakeNetwork, "start", started)
    monkeypatch.setattr(FakeEngine, "collect", collected)
    return pretended


@pytest.fixture(scope="session")
def enough(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Draw as many images as `auto` needs for a comparison."""
    folder, generator = tmp_path_factory.mktemp("enough"), np.random.default_rng(1)
    paths = [folder / f"{number:03d}.png" for number in range(precision.FROM_IMAGES)]
    for path in paths:
        Image.fromarray(generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(path)
    return pd.DataFrame({"path": list(map(str, paths))})


def run(frame: pd.DataFrame, *blocks: str, **options: Any) -> Extraction:
    return nbfeat.extract(frame, *(blocks or (BLOCK,)), images="path", **options)


def kept() -> list[Path]:
    return sorted((nbfeat.storage.folder / "precisions").glob("*.json"))


# Choosing automatically


@pytest.mark.parametrize(
    ("error", "speedup", "taken", "words"),
    [
        (0.0, 2.0, "bfloat16", r"MobileNet .* bfloat16: similarity .* 1\.0000 on 64 of .*, 2\.0 times as fast\."),
        (0.3, 2.0, "float32", r"bfloat16 .*: similarity 0\.9\d* on 16 .* below the 0\.999 threshold, so MobileNet .*"),
        (0.0, 1.05, "float32", r"bfloat16 .*: it is only 1\.05 .* \(similarity 1\.0000 on 64 .*\), so .* float32\."),
    ],
)
def test_auto_takes_fewer_bits_that_agree_and_are_faster(
    enough: pd.DataFrame, hardware: Hardware, error: float, speedup: float, taken: str, words: str
) -> None:
    hardware.error, hardware.speedup = error, speedup
    result = run(enough)
    assert result.precision == result.recipe["precision"] == taken
    assert re.fullmatch(words, result.notes[0])
    assert f"· {taken}" in repr(result)
    assert hardware.started == ["float32", "bfloat16"]  # the compared engine is reused
    if taken == "float32":
        pd.testing.assert_frame_equal(result.features, run(enough, precision="float32", cache=False).features)


def test_an_image_off_among_those_that_come_later_is_found(
    enough: pd.DataFrame, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def spoil(engine: FakeEngine, vectors: Vectors) -> None:
        seen.append(engine.name)
        vectors["end:default"][-1, 0] += 1e3 * (len(seen) == 7)  # the fifth batch of eight after the first sixteen

    monkeypatch.setattr(hardware, "spoil", spoil)
    assert " on 64 of your images is below" in run(enough).notes[0]


def test_a_network_that_overflows_runs_in_float32_unless_it_was_asked_for(
    enough: pd.DataFrame, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(engine: FakeEngine, vectors: Vectors) -> None:
        raise NetworkError(f"{engine.name} overflowed")

    monkeypatch.setattr(hardware, "spoil", spoil)
    result = run(enough)
    assert result.precision == "float32"
    assert result.notes[0].startswith("bfloat16 was rejected: it gives infinite or NaN values")
    hardware.started.clear()
    assert run(enough, cache=False).notes == result.notes
    assert hardware.started == ["float32"]  # it is not tried again
    with pytest.raises(NetworkError, match="bfloat16 overflowed"):
        run(enough, precision="bfloat16")


def test_what_the_hardware_has_not_is_not_spoken_of(enough: pd.DataFrame, hardware: Hardware) -> None:
    hardware.refuses = ("bfloat16",)
    result = run(enough)
    assert (result.precision, result.notes) == ("float32", [])
    hardware.started.clear()
    hardware.refuses = ()
    assert run(enough, cache=False).precision == "float32"  # cached from the first run
    assert hardware.started == ["float32"]


def test_of_several_the_first_that_is_better_is_taken(
    enough: pd.DataFrame, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeNetwork, "faster", ("float16", "bfloat16"))
    hardware.refuses = ("float16",)
    assert run(enough).precision == "bfloat16"


def test_few_images_are_not_worth_comparing(
    enough: pd.DataFrame, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = enough.head(precision.FROM_IMAGES - 1)
    result = run(some)
    assert (result.precision, result.notes, hardware.started) == ("float32", [], ["float32"])
    run(enough)
    assert run(some).precision == "bfloat16"  # a check of more images is valid for fewer, if some of those agree
    monkeypatch.setattr(FakeNetwork, "faster", ("float16", "bfloat16"))
    assert run(some).precision == "bfloat16"  # even where another precision comes first and has no check


def test_every_output_counts(enough: pd.DataFrame, hardware: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(_: FakeEngine, vectors: Vectors) -> None:
        for key in vectors.keys() - {"end:default"}:
            vectors[key][0] *= [1, -1, 1]

    monkeypatch.setattr(hardware, "spoil", spoil)
    assert run(enough, BLOCK).precision == "bfloat16"
    assert run(enough, f"{BLOCK} --layer conv_pw_3_relu", BLOCK).precision == "float32"
    assert hardware.started.count("bfloat16") == 2


def test_images_that_cannot_be_read_are_left_out_of_it(enough: pd.DataFrame, hardware: Hardware) -> None:
    holes = enough.copy()
    holes.loc[::2, "path"] = "gone.png"
    result = run(holes)
    assert result.precision == "bfloat16"
    assert "on 32 of your images" in result.notes[0]
    hardware.started.clear()
    run(holes, cache=False)
    assert hardware.started == ["bfloat16"]
    lost = pd.DataFrame({"path": ["gone.png"] * 200})
    nbfeat.storage.clear("precisions")
    with pytest.raises(nbfeat.ExtractionError, match="None of the 200 images"):
        run(lost)
    assert not kept()


# Caching the choice


def test_it_is_decided_once(enough: pd.DataFrame, hardware: Hardware) -> None:
    run(enough)
    hardware.started.clear()
    hardware.error = 0.3
    again = run(enough, cache=False)
    assert again.precision == "bfloat16"
    assert "on 64 of your images" in again.notes[0]
    assert hardware.started == ["bfloat16"]
    cached = run(enough)
    assert (cached.cached, cached.precision) == (len(enough), "bfloat16")
    assert hardware.started == ["bfloat16"]  # nothing was started
    nbfeat.storage.clear("precisions")
    assert run(enough).precision == "float32"


@pytest.mark.parametrize("change", ["engine", "weights", "pixels", "cuts"])
def test_it_is_decided_anew_for_what_is_another(
    enough: pd.DataFrame, hardware: Hardware, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(enough)
    made = FakeNetwork.__init__

    def other(self: FakeNetwork, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        if change == "engine":
            self.numbers = {"engine": "another", "cpu": "another"}
        elif change == "weights":
            self.weights = nbfeat.backbones.weights.Loaded("random", "1" * 64)

    monkeypatch.setattr(FakeNetwork, "__init__", other)
    hardware.started.clear()
    blocks = {"pixels": [f"{BLOCK} --resize pad"], "cuts": [BLOCK, f"{BLOCK} --pooling max"]}.get(change, [BLOCK])
    run(enough, *blocks)
    assert hardware.started == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"precision": "int8"}', "nan", '{"images": "64"}', '{"agreement": null}']
)
def test_what_is_kept_of_it_and_damaged_is_not_used(enough: pd.DataFrame, hardware: Hardware, damage: str) -> None:
    run(enough)
    ours, others = (json.loads(file.read_text()) for file in kept())
    assert ours == others
    assert set(ours) == {"precision", "images", "agreement", "speedup", "day"}
    for file in kept():
        file.write_text(json.dumps({**ours, **json.loads(damage)}) if damage.startswith('{"') else damage)
    hardware.started.clear()
    assert run(enough, cache=False).precision == "bfloat16"
    assert hardware.started == ["float32", "bfloat16"]
    assert [json.loads(file.read_text()) for file in kept()] == [ours, ours]


@pytest.mark.parametrize("while_", ["starting", "comparing"])
def test_a_lack_of_memory_decides_nothing(
    enough: pd.DataFrame, hardware: Hardware, monkeypatch: pytest.MonkeyPatch, while_: str
) -> None:
    def short(*_: object) -> None:
        raise ExtractionError("There is not enough memory.")

    with monkeypatch.context() as patch:
        if while_ == "comparing":
            patch.setattr(hardware, "spoil", short)
        else:
            start = FakeNetwork.start
            patch.setattr(FakeNetwork, "start", lambda *asked: short() if "bfloat16" in asked else start(*asked))
        result = run(enough, cache=False)
        assert result.precision == "float32"
        assert result.notes[0] == "bfloat16 was not compared with float32: there is not enough memory for both."
        with pytest.raises(ExtractionError):
            run(enough, cache=False, precision="bfloat16")
        assert kept() == []
    assert run(enough, cache=False).precision == "bfloat16"


def test_where_nothing_can_be_kept_it_is_decided_all_the_same(
    enough: pd.DataFrame, hardware: Hardware, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NBFEAT_HOME", str(tmp_path / "file"))
    assert [run(enough).precision for _ in range(2)] == ["bfloat16"] * 2
    assert hardware.started == ["float32", "bfloat16"] * 2


# Other images


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_a_check_on_other_images_is_confirmed_on_these_before_it_is_reported(
    enough: pd.DataFrame, photos: pd.DataFrame, hardware: Hardware, error: float
) -> None:
    run(enough)
    hardware.started.clear()
    hardware.error = error
    first, again = run(photos), run(photos, cache=False)
    assert first.notes == again.notes
    (note,) = first.notes
    if error:
        assert note.startswith("bfloat16 was rejected: similarity 0.9")
        assert " on 16 of your images is below" in note
        assert hardware.started == ["float32", "bfloat16", "float32"]
    else:
        speed = r"2\.0 times as fast \(on other images on \d{4}-\d\d-\d\d\)\."
        assert re.search(rf"MobileNet runs in bfloat16: .* 1\.0000 on 16 of your images, {speed}", note)
        assert hardware.started == ["float32", "bfloat16", "bfloat16"]  # confirmed once
    assert first.precision == ("float32" if error else "bfloat16")
    assert "on 64 of your images" in run(enough).notes[0]


def test_a_rejection_on_other_images_is_reported_as_that(
    enough: pd.DataFrame, photos: pd.DataFrame, hardware: Hardware
) -> None:
    hardware.error = 0.3
    run(enough)
    hardware.started.clear()
    result = run(photos)
    assert (result.precision, hardware.started) == ("float32", ["float32"])
    assert re.search(r"similarity 0\.9\d* on 16 other images on \d{4}-\d\d-\d\d is below", result.notes[0])
    assert "on 16 of your images" in run(enough).notes[0]


def test_a_changed_file_is_another_image(enough: pd.DataFrame, hardware: Hardware, tmp_path: Path) -> None:
    copies = enough.assign(path=[str(shutil.copy(path, tmp_path)) for path in enough["path"]])
    run(copies)
    Image.new("RGB", (12, 12), "red").save(copies["path"].iloc[0])
    assert hardware.started == ["float32", "bfloat16"]
    assert "on 16 of your images" in run(copies).notes[0]


def test_two_at_once_measure_once(enough: pd.DataFrame, hardware: Hardware) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: run(enough, cache=False), range(2)))
    assert [result.precision for result in results] == ["bfloat16"] * 2
    assert sorted(hardware.started) == ["bfloat16", "bfloat16", "float32"]


def test_a_process_that_never_finishes_measuring_stops_no_other(
    enough: pd.DataFrame, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "PATIENCE", 0.1)
    with FileLock(paths.keep("precisions") / ".lock"):
        assert run(enough).precision == "bfloat16"
    assert hardware.started == ["float32", "bfloat16"]


# Requested precisions


def test_what_is_asked_for_is_obeyed_and_compared(photos: pd.DataFrame, hardware: Hardware) -> None:
    hardware.error = 0.3
    result = run(photos, precision="bfloat16")
    assert result.precision == "bfloat16"
    (note,) = result.notes
    assert "MobileNet runs in bfloat16, as requested: similarity to float32 is at least 0.9" in note
    assert note.endswith("on 20 of your images.")
    hardware.started.clear()
    assert run(photos, precision="bfloat16", cache=False).notes == [note]
    assert hardware.started == ["bfloat16"]
    assert run(photos.head(1), f"{BLOCK} --resize pad", precision="bfloat16").notes[0].endswith("on 1 of your images.")
    hardware.started.clear()
    exact = run(photos, precision="float32")
    assert (exact.precision, exact.notes, hardware.started) == ("float32", [], ["float32"])


def test_more_images_are_compared_again_where_few_do_not_suffice(
    photos: pd.DataFrame, enough: pd.DataFrame, hardware: Hardware
) -> None:
    run(photos, precision="bfloat16")
    hardware.started.clear()
    assert "on 64 of your images" in run(enough).notes[0]
    assert hardware.started == ["float32", "bfloat16"]
    # A rejection by a few images is enough for auto, but not for a requested precision.
    hardware.error = 0.3
    nbfeat.storage.clear("precisions")
    run(enough)
    assert "on 64 of your images" in run(enough, precision="bfloat16").notes[0]
    hardware.started.clear()
    assert run(enough, cache=False).precision == "float32"
    assert hardware.started == ["float32"]


def test_what_is_asked_for_and_cannot_be_had_is_an_error(photos: pd.DataFrame, hardware: Hardware) -> None:
    hardware.refuses = ("float16",)
    with pytest.raises(NetworkError, match="no float16"):
        run(photos, precision="float16")


# Repeated


def test_it_is_repeated_without_comparing(
    enough: pd.DataFrame, photos: pd.DataFrame, hardware: Hardware, tmp_path: Path
) -> None:
    blocks = (f"{BLOCK} --normalize standard", "MobileNetV2 --size 32")
    result = run(enough, *blocks)
    result.to_parquet(tmp_path / "result.parquet")
    hardware.error = 0.3
    nbfeat.storage.clear("precisions")
    for like in (result, tmp_path / "result.parquet"):
        hardware.started.clear()
        repeated = nbfeat.extract(photos, like=like, images="path", cache=False)
        assert repeated.precision == "bfloat16"
        assert hardware.started == ["bfloat16", "bfloat16"]
        assert not any("runs in" in note for note in repeated.notes)
    with pytest.raises(RequestError, match=r"computed in bfloat16.*in float32: drop `precision`"):
        result.like(photos, precision="float32")


def test_networks_of_one_run_may_differ(
    enough: pd.DataFrame, photos: pd.DataFrame, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(engine: FakeEngine, vectors: Vectors) -> None:
        if engine.spec.backbone == "MobileNet":
            vectors["end:default"][-1, 0] += 1e3

    monkeypatch.setattr(hardware, "spoil", spoil)
    blocks = (f"{BLOCK} --normalize standard", "MobileNetV2 --size 32 --normalize standard")
    result = run(enough, *blocks)
    assert [part.network.precision for part in result.parts if part.network] == ["float32", "bfloat16"]
    assert result.precision == "float32 and bfloat16"
    assert [note.endswith("so MobileNet runs in float32.") for note in result.notes[:2]] == [True, False]
    assert result.notes[1].startswith("MobileNetV2 runs in bfloat16: ")
    assert [part.precision for part in result.fitted.parts] == ["float32", "bfloat16"]
    raw = result.before_normalization().run()
    assert (raw.precision, raw.cached) == ("float32 and bfloat16", len(enough))
    repeated = result.like(photos)
    assert [part.network.precision for part in repeated.parts if part.network] == ["float32", "bfloat16"]
    model = nbfeat.ImageFeatures(list(blocks)).fit(enough["path"])
    assert model.recipe_.precision == "float32 and bfloat16"
    np.testing.assert_array_equal(model.transform(photos["path"]), repeated.features)


# Measuring


@pytest.mark.parametrize(
    ("exact", "other", "agreement"),
    [
        ([[1, 0]], [[1, 0]], 1), ([[1, 0]], [[0, 1]], 0), ([[0, 0]], [[0, 0]], 1), ([[0, 0]], [[0, 1]], 0),
        ([[0, 0]], [[0, -1]], 0),
        ([[1, 0]], [[np.nan, 0]], -1), ([[np.inf, 0]], [[np.inf, 0]], -1),
        ([[3, 4], [1, 1]], [[6, 8], [1, 0]], 0.5**0.5),
        ([[1e30, 0]], [[1e30, 0]], 1), ([[1e-30, 0]], [[1e-30, 0]], 1),
    ],
)  # fmt: skip
def test_agreement_is_that_of_the_worst_image(exact: Any, other: Any, agreement: float) -> None:
    one, two = ({"end": np.array(rows, np.float32)} for rows in (exact, other))
    assert precision.agreement_of(one, two) == pytest.approx(agreement)
    assert precision.agreement_of({**one, "more": one["end"]}, {**two, "more": one["end"]}) <= 1.0


@pytest.mark.parametrize(
    ("images", "agreement", "speedup", "is_better"),
    [(64, 0.999, 1.1, True), (0, 1.0, 9.0, False), (64, 0.9989, 9.0, False), (64, 1.0, 1.09, False)],
)
def test_better_is_what_agrees_and_is_faster(images: int, agreement: float, speedup: float, is_better: bool) -> None:
    assert precision.PrecisionCheck("bfloat16", images, agreement, speedup).is_better is is_better


@pytest.mark.parametrize(
    ("seen", "agreement", "total", "auto", "asked"),
    [
        (64, 1.0, 9999, True, True), (32, 1.0, 9999, True, True), (31, 1.0, 9999, False, False),
        (20, 1.0, 40, False, True), (20, 1.0, 41, False, False), (16, 0.9, 9999, True, False), (0, 0.0, 9, True, False),
    ],
)  # fmt: skip
def test_a_check_suffices_if_half_of_the_images_could_be_read(
    seen: int, agreement: float, total: int, auto: bool, asked: bool
) -> None:
    check = precision.PrecisionCheck("bfloat16", seen, agreement, 2.0)
    assert (check.suffices(total, is_open=True), check.suffices(total, is_open=False)) == (auto, asked)


@pytest.mark.parametrize(
    ("value", "text"), [(0.9444, "0.9444"), (0.99899, "0.9989"), (0.99996, "0.9999"), (0.999999, "1.0000")]
)
def test_agreement_is_rounded_down(value: float, text: str) -> None:
    check = precision.PrecisionCheck("bfloat16", 64, value, 0.0)
    assert f"at least {text} on" in check.message("EfficientNetLite0", asked=True)


def test_values_that_are_not_finite_are_told_whether_it_was_asked_for_or_not() -> None:
    check = precision.PrecisionCheck("float16", 64, -1.0, 0.0)
    why = "it gives infinite or NaN values for some of your images"
    assert (
        check.message("EfficientNetLite0", asked=True) == f"EfficientNetLite0 runs in float16, as requested, but {why}."
    )
    assert (
        check.message("EfficientNetLite0", asked=False)
        == f"float16 was rejected: {why}, so EfficientNetLite0 runs in float32."
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ("MobileNetV2 --alpha 0.35", "bfloat16 was rejected: similarity 0.9"),
        ("EfficientNetLite0 --layer stem_activation", "similarity (to float32 is at least )?0.999"),
    ],
)
def test_a_pretrained_network_takes_bfloat16_only_where_it_agrees(
    flowers: pd.DataFrame, backbone: str, words: str
) -> None:
    some = flowers.iloc[::2]
    found, exact = (nbfeat.extract(some, backbone, images="path", precision=asked) for asked in ("auto", "float32"))
    if not found.notes:
        pytest.skip("this CPU does not compute in bfloat16")
    assert re.search(words, found.notes[0])
    if found.precision == "float32":
        pd.testing.assert_frame_equal(found.features, exact.features)
    scores = [nbfeat.compare(one, "label", speed=False).table["score"].iloc[0] for one in (found, exact)]
    assert abs(scores[0] - scores[1]) <= 0.01  # the folds are seeded


def test_the_guide_says_what_a_precision_must_achieve() -> None:
    page = " ".join((ROOT / "notebooks" / "guide" / "precision.md").read_text(encoding="utf-8").split())
    assert f"a cosine similarity of at least {precision.AGREES} with float32" in page
    assert f"at least {precision.IS_FASTER} times as fast" in page
    assert f"if there are at least {precision.FROM_IMAGES} images" in page
    assert f"On up to {precision.MOST_IMAGES} of your images" in page
