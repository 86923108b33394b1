"""What extraction promises, in every interface."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest

import nbfeat
from nbfeat import Extraction, ExtractionError, FeatureBlock, RequestError
from nbfeat.extraction import columns, pipeline
from nbfeat.images.resize import PixelSpec
from nbfeat.images.sources import read_pixels
from nbfeat.inference.engines.cpu_count import available_cores
from nbfeat.inference.spec import Cut
from tests import fake
from tests.faces import Face, every_face, same

pytestmark = pytest.mark.usefixtures("fake_network")
BLOCK = "MobileNet --size 32"


def expected(paths: pd.Series, size: int = 32) -> np.ndarray:
    pixels = [read_pixels(path, [PixelSpec(size)], Path())[0] for path in paths]
    return fake.features(np.stack(pixels), Cut())


@every_face
def test_features_are_attached_as_float32_columns_and_nothing_else_changes(extract: Face, photos: pd.DataFrame) -> None:
    before = photos.copy(deep=True)
    result = extract(photos, BLOCK, images="path")
    same(photos, before)
    same(result.frame[list(photos.columns)], photos)
    assert list(result.frame.columns) == [*photos.columns, *result.columns]
    assert result.columns[:2] == ["mobilenet_0000", "mobilenet_0001"]
    assert (result.features.dtypes == np.float32).all()
    np.testing.assert_array_equal(result.features.to_numpy(), expected(photos["path"]))
    assert result.ok.all()
    assert result.failures.empty
    same(result["mobilenet"], result.features)


@every_face
def test_the_same_cell_three_times_gives_the_same_frame(extract: Face, photos: pd.DataFrame) -> None:
    first = extract(photos, BLOCK, images="path").frame
    first.insert(2, "note", "mine")
    first["after"] = 1
    second = extract(first, BLOCK, images="path")
    third = extract(second.frame, BLOCK, images="path")
    same(third.frame, first)
    assert "(replaced)" in repr(third)


def test_narrower_features_replace_wider_ones_whole(extract: Face, photos: pd.DataFrame) -> None:
    wide = extract(photos, BLOCK, images="path").frame
    narrow = extract(wide, BLOCK, images="path", components=3)
    assert [name for name in narrow.frame.columns if name.startswith("mobilenet")] == narrow.columns
    assert len(narrow.columns) == 3


def test_an_image_that_cannot_be_read_is_a_row_of_nan_with_a_reason(
    extract: Face, photos: pd.DataFrame, tmp_path: Path
) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    broken = photos.copy()
    broken.iloc[3, 0] = str(text)
    broken.iloc[4, 0] = None
    broken.iloc[17, 0] = str(tmp_path / "gone.png")
    result = extract(broken, BLOCK, images="path")
    assert list(result.failures["position"]) == [3, 4, 17]
    assert list(result.failures.index) == ["row 3", "row 4", "row 17"]
    assert list(result.failures.columns) == ["position", "column", "image", "reason"]
    assert result.failures["reason"].str.len().gt(10).all()
    assert "no such file" in result.failures["reason"].iloc[2]
    assert list(np.flatnonzero(~result.ok)) == [3, 4, 17]
    assert result.features[~result.ok].isna().all(axis=None)
    good = extract(photos, BLOCK, images="path").features
    same(result.features[result.ok], good[result.ok.to_numpy()])
    assert "3 of 20 images failed" in repr(result)
    assert "text.jpg" in result._repr_html_()


def test_batches_stay_full_when_images_fail(photos: pd.DataFrame) -> None:
    photos.iloc[::3, 0] = None
    extraction = Extraction(photos, BLOCK, images="path", batch_size=4)
    extraction.run()
    engine = extraction._run.networks[0].engine
    assert isinstance(engine, fake.FakeEngine)
    assert engine.batches == [4, 4, 4, 1]


@every_face
def test_when_no_image_can_be_read_the_run_fails_and_says_where_it_looked(extract: Face, tmp_path: Path) -> None:
    lost = pd.DataFrame({"path": [f"lost/{number}.png" for number in range(5)]})
    with pytest.raises(
        ExtractionError, match=r"None of the 5 images could be read.*set a different folder with"
    ) as caught:
        extract(lost, BLOCK, images="path", root=tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_relative_paths_start_at_root(extract: Face, photos: pd.DataFrame) -> None:
    relative = photos.assign(path=[Path(path).name for path in photos["path"]])
    result = extract(relative, BLOCK, images="path", root=Path(photos["path"].iloc[0]).parent)
    same(result.features, extract(photos, BLOCK, images="path").features)


@pytest.mark.parametrize(
    "index", [["same"] * 20, pd.MultiIndex.from_product([["a", "b"], range(10)]), range(20, 0, -1)]
)
def test_any_index_is_kept(extract: Face, photos: pd.DataFrame, index: pd.Index) -> None:
    photos.index = pd.Index(index) if isinstance(index, list) else index
    result = extract(photos, BLOCK, images="path")
    pd.testing.assert_index_equal(result.frame.index, photos.index)
    np.testing.assert_array_equal(result.features.to_numpy(), expected(photos["path"]))


@every_face
def test_a_clash_of_columns_is_an_error_that_names_them_before_any_work(extract: Face, photos: pd.DataFrame) -> None:
    photos["mobilenet_0000"] = "mine"
    with pytest.raises(RequestError, match=r"mobilenet_0000.*[Pp]refix"):
        extract(photos, BLOCK, images="path")
    assert fake.FakeEngine.opened == 0
    assert (extract(photos, BLOCK, images="path", replace=True).frame["mobilenet_0000"] != "mine").all()
    assert len(extract(photos, BLOCK, images="path", prefix="other").columns) == 48


def test_a_clash_further_right_is_told_before_the_first_image(extract: Face, photos: pd.DataFrame) -> None:
    photos["mobilenet_0007"] = "mine"
    with pytest.raises(RequestError, match="mobilenet_0007"):
        extract(photos, BLOCK, images="path")


@pytest.mark.parametrize(("clashes", "more"), [(3, ""), (4, " and 1 more"), (48, " and 45 more")])
def test_of_many_clashes_three_are_named(photos: pd.DataFrame, clashes: int, more: str) -> None:
    names = [f"mobilenet_{number:04d}" for number in range(clashes)]
    photos[names] = "mine"
    with pytest.raises(RequestError, match=rf"columns mobilenet_0000, mobilenet_0001 and mobilenet_0002{more}, which"):
        nbfeat.extract(photos, BLOCK, images="path")


def test_an_empty_frame_gets_its_columns(extract: Face, photos: pd.DataFrame) -> None:
    result = extract(photos.iloc[:0], BLOCK, images="path")
    assert result.frame.shape == (0, 3 + 1024)
    assert (result.features.dtypes == np.float32).all()
    assert result.failures.empty


@every_face
def test_multiindex_columns_and_other_things_than_frames_are_refused(extract: Face, photos: pd.DataFrame) -> None:
    deep = photos.copy()
    deep.columns = pd.MultiIndex.from_product([["a"], photos.columns])
    with pytest.raises(RequestError, match="MultiIndex columns"):
        extract(deep, BLOCK)
    with pytest.raises(RequestError, match=r"must be a pandas DataFrame, not list"):
        extract(list(photos["path"]), BLOCK)


@every_face
def test_unknown_names_come_with_near_ones(extract: Face, photos: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match=r"Backbone 'Mobilnet' not found.*MobileNet"):
        extract(photos, "Mobilnet")
    with pytest.raises(RequestError, match=r"no column.*pth.*path"):
        extract(photos, BLOCK, images="pth")
    with pytest.raises(RequestError, match=r"[Pp]ooling.* must be avg, .*, not 'average'. Did you mean avg"):
        extract(photos, BLOCK, images="path", pooling="average")


def test_the_image_column_is_found_or_candidates_are_named(extract: Face, photos: pd.DataFrame) -> None:
    assert len(extract(photos, BLOCK).columns) == 48
    photos["second"] = photos["path"]
    with pytest.raises(RequestError, match=r"path.*second.*`?(--)?images"):
        extract(photos, BLOCK)
    with pytest.raises(RequestError, match="images=COLUMN"):
        extract(photos[["label"]], BLOCK)


@every_face
def test_two_image_columns_make_two_sets_of_columns(extract: Face, photos: pd.DataFrame) -> None:
    photos["back"] = list(photos["path"])[::-1]
    photos.loc["row 2", "back"] = None
    result = extract(photos, BLOCK, images=["path", "back"])
    assert len(result.columns) == 96
    front, back = result["path_mobilenet"], result["back_mobilenet"]
    np.testing.assert_array_equal(front.to_numpy(), expected(photos["path"]))
    assert back.iloc[2].isna().all()
    np.testing.assert_array_equal(back.iloc[[0]].to_numpy(), front.iloc[[19]].to_numpy())
    assert list(result.failures["column"]) == ["back"]
    assert result.ok.sum() == 19


@every_face
def test_normalizations_learn_from_the_rows_of_fit_on_alone(extract: Face, photos: pd.DataFrame) -> None:
    photos.iloc[1, 0] = None
    result = extract(photos, BLOCK, images="path", normalize="standard", fit_on="split == 'train'")
    train = (photos["split"] == "train").to_numpy() & result.ok.to_numpy()
    np.testing.assert_allclose(result.features[train].mean(), 0, atol=1e-4)
    assert "Normalization was fitted on 14 rows" in repr(result)
    changed = photos.copy()
    changed["path"] = photos["path"].mask(photos.index == "row 15", photos["path"].iloc[0])
    again = extract(changed, BLOCK, images="path", normalize="standard", fit_on="split == 'train'")
    same(result.features[train], again.features[train])
    assert "including any test rows; name the training rows" in repr(
        extract(photos, BLOCK, images="path", normalize="minmax")
    )


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("nosuch == 1", "can't be evaluated"),
        ("label", "True or False for each row"),
        ("split == 'x'", "selects no rows"),
    ],
)
def test_a_bad_fit_on_is_refused(extract: Face, photos: pd.DataFrame, query: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        extract(photos, BLOCK, images="path", normalize="standard", fit_on=query)


def test_components_project_and_whiten(extract: Face, photos: pd.DataFrame) -> None:
    result = extract(photos, BLOCK, images="path", normalize="whiten", components=5)
    assert len(result.columns) == 5
    np.testing.assert_allclose(result.features.std(ddof=1), 1, rtol=1e-3)
    with pytest.raises(RequestError, match=r"`components=30` is too many.*Use `components=20` or fewer"):
        extract(photos, BLOCK, images="path", components=30)
    with pytest.raises(RequestError, match="`normalize='whiten'` needs `components=N`"):
        extract(photos, BLOCK, images="path", normalize="whiten")


def test_whitening_leaves_out_what_has_no_variance(photos: pd.DataFrame) -> None:
    paths = photos["path"].tolist()[:6] * 2
    result = nbfeat.extract(pd.DataFrame({"path": paths}), f"{BLOCK} --normalize whiten --components 8", images="path")
    assert "mobilenet: 5 of 8 components have variance. Use `components=5`." in repr(result)
    new = result.like(photos).features
    assert np.abs(new.to_numpy()).max() < 1e3  # it was in the millions
    assert (new.iloc[:, 5:] == 0).all(axis=None)
    assert new.iloc[:, :5].std().min() > 0
    again = nbfeat.extract(photos, f"{BLOCK} --normalize whiten --components 5", images="path")
    assert "have variance" not in repr(again)


def test_more_components_than_rows_are_refused_before_an_image_is_read(photos: pd.DataFrame) -> None:
    before = fake.FakeEngine.computed
    for options in ({"components": 21}, {"components": 7, "fit_on": "split == 'test'"}):
        with pytest.raises(RequestError, match="components"):
            nbfeat.extract(photos, BLOCK, images="path", **options)
    assert fake.FakeEngine.computed == before


def test_columns_are_looked_for_once(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Mock(wraps=columns.made_columns)
    monkeypatch.setattr(columns, "made_columns", look)
    blocks = [f"{BLOCK} --prefix {name}" for name in "abcd"]
    nbfeat.extract(photos, blocks, images="path")
    assert look.call_count == 3  # when it is requested, when widths are known, and when columns are attached


def test_a_column_beside_those_of_a_narrow_layer_is_no_clash(photos: pd.DataFrame) -> None:
    photos["mobilenet_conv1_relu_0400"] = 1.0
    result = nbfeat.extract(photos, f"{BLOCK} --layer conv1_relu", images="path")
    assert "mobilenet_conv1_relu_0400" in result.frame
    assert len(result.columns) < 400


def test_the_default_width_multiplier_is_no_other_network(photos: pd.DataFrame) -> None:
    nbfeat.extract(photos, BLOCK, images="path")
    assert nbfeat.extract(photos, f"{BLOCK} --alpha 1.0", images="path").cached == len(photos)


def test_l2_gives_unit_rows(extract: Face, photos: pd.DataFrame) -> None:
    rows = extract(photos, BLOCK, images="path", normalize="l2").features.to_numpy()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)


def test_blocks_of_one_backbone_share_a_network_and_others_do_not(photos: pd.DataFrame) -> None:
    blocks = [BLOCK, f"{BLOCK} --layer conv1_relu", "VGG16 --size 32", f"{BLOCK} --resize pad --prefix padded"]
    Extraction(photos, *blocks, images="path").run()
    assert fake.FakeEngine.opened == 3


def test_two_blocks_of_one_prefix_are_an_error_naming_both(photos: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match=r"`MobileNet --size 32` and `MobileNet --size 64`.*`prefix`"):
        Extraction(photos, "MobileNet --size 32", FeatureBlock(backbone="mobilenet", size=64))


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"batch_size": 4097}, {"batch_size": "many"}, {"device": "tpu"}, {"precision": "int8"}],
)
def test_options_of_the_run_are_checked(extract: Face, photos: pd.DataFrame, options: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        extract(photos, BLOCK, images="path", **options)


@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_features_are_the_same_for_any_batch_size(extract: Face, photos: pd.DataFrame, size: int) -> None:
    result = extract(photos, BLOCK, images="path", batch_size=size)
    np.testing.assert_array_equal(result.features.to_numpy(), expected(photos["path"]))


def test_what_comes_from_data_is_escaped(extract: Face, photos: pd.DataFrame, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    bad = tmp_path / f"{name}.jpg"
    bad.write_text("no image")
    shutil.copy(photos["path"].iloc[0], tmp_path / "good.png")
    frame = pd.DataFrame({name: [str(bad), str(tmp_path / "good.png")]})
    html = extract(frame, BLOCK, images=name)._repr_html_()
    assert "<img" not in html
    assert "&lt;img src=x" in html


# The loop itself


def test_nothing_happens_before_the_first_step(photos: pd.DataFrame) -> None:
    extraction = Extraction(photos, BLOCK, images="path")
    assert fake.FakeEngine.opened == 0
    assert extraction.state == "new"
    with pytest.raises(ExtractionError, match="0 of 20 images"):
        _ = extraction.frame


def test_files_that_change_during_a_stop_give_their_features_to_no_other_row(
    photos: pd.DataFrame, tmp_path: Path
) -> None:
    files = [str(shutil.copy(path, tmp_path)) for path in photos["path"]]
    shutil.copy(files[5], files[19])
    work = Extraction(photos.assign(path=files), BLOCK, images="path", batch_size=2, cache=False)
    steps = work.steps()
    while next(steps).done < 2:
        pass
    steps.close()  # with row 5 read ahead, and not finished
    assert work.done < 5
    shutil.copy(files[7], files[5])
    same(work.run().features, nbfeat.extract(photos.assign(path=files), BLOCK, images="path", cache=False).features)


def test_leaving_the_loop_stops_and_asking_again_goes_on(photos: pd.DataFrame) -> None:
    photos.iloc[5, 0] = None
    extraction = Extraction(photos, BLOCK, images="path", batch_size=3)
    steps = extraction.steps()
    seen = list(islice(steps, 4))
    steps.close()
    assert str(extraction.state) == "stopped"
    assert 0 < extraction.done < 20
    done = extraction.done
    engine = extraction._run.networks[0].engine
    assert isinstance(engine, fake.FakeEngine)
    assert engine.closed == 1
    rest = list(extraction.steps())
    assert seen[-1].done == done
    assert rest[0].done > done
    assert rest[-1].done == 20
    assert extraction.state == "done"
    assert fake.FakeEngine.opened == 1
    assert sum(engine.batches) <= 19 + 2 * 3
    good = extraction.ok.to_numpy()
    np.testing.assert_array_equal(extraction.features[good].to_numpy(), expected(photos["path"][good]))


def test_a_stop_reads_none_of_the_images_that_were_next(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, stopping, load = [], threading.Event(), pipeline.__dict__["load_image"]

    def watched(*given: Any) -> Any:
        looked.append(given)
        if len(looked) > 8:
            assert stopping.wait(30)
            time.sleep(0.1)  # longer than it takes not to wait for this
        return load(*given)

    def shutdown(executor: ThreadPoolExecutor, *, wait: bool, cancel_futures: bool) -> None:
        end(executor, wait=False, cancel_futures=cancel_futures)
        stopping.set()
        end(executor, wait=wait)

    end = ThreadPoolExecutor.shutdown
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    monkeypatch.setattr(pipeline, "load_image", watched)
    monkeypatch.setattr(pipeline, "available_cores", lambda: 2)
    steps = Extraction(photos, BLOCK, images="path", batch_size=4).steps()
    while not next(steps).done:
        pass
    steps.close()
    assert len(looked) <= 8 + 2  # of twenty, all of which wait for a thread
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nbfeat-decode")]


@pytest.mark.parametrize("others", ["equal", "gone"])
def test_rows_that_need_no_network_are_counted_on_the_way_and_few_are_read_ahead(
    photos: pd.DataFrame, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted, submit = [], ThreadPoolExecutor.submit

    def counted(*given: Any) -> Any:
        submitted.append(given)
        return submit(*given)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)
    paths = [*photos["path"], *(list(photos["path"]) * 14 if others == "equal" else ["gone.png"] * 280)]
    extraction = Extraction(pd.DataFrame({"path": paths}), BLOCK, images="path", batch_size=1)
    done, ahead = [0], available_cores() + pipeline.BATCHES_AHEAD
    for step in extraction.steps():
        done.append(step.done)
        assert len(submitted) - step.done <= pipeline.SETTLED_AT_ONCE + ahead + 3  # in the network
    assert done[-1] == 300
    assert max(np.diff(done)) <= pipeline.SETTLED_AT_ONCE + 1


def test_steps_count_up_and_say_what_is_coming(photos: pd.DataFrame) -> None:
    steps = list(Extraction(photos, BLOCK, images="path", batch_size=5).steps())
    assert [step.note for step in steps[:2]] == [
        "opening a pretended MobileNet",
        "20 rows × 48 columns (4 kB of memory) · random weights · Fake engine · float32",
    ]
    assert [step.done for step in steps[2:]] == [5, 10, 15, 20]
    assert all(step.total == 20 for step in steps)
    assert steps[-1].images_per_second > 0
    assert steps[-1].seconds_left == 0


def test_a_running_extraction_cannot_be_run_twice(photos: pd.DataFrame) -> None:
    extraction = Extraction(photos, BLOCK, images="path")
    steps = extraction.steps()
    next(steps)
    with pytest.raises(ExtractionError, match="already running"):
        next(extraction.steps())
    assert len(list(steps)) > 1
    assert list(extraction.steps()) == []


def test_a_matrix_that_would_fill_the_memory_is_refused(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbfeat.extraction.columns.free_bytes", lambda: 2000)
    with pytest.raises(RequestError, match=r"48 features per image: 20 images take 4 kB.*`pooling='avg'`"):
        Extraction(photos, BLOCK, images="path").run()


def test_the_recipe_names_what_decides_the_numbers(photos: pd.DataFrame) -> None:
    result = Extraction(photos, BLOCK, images="path").run()
    assert result.recipe["blocks"] == ["MobileNet --size 32"]
    assert result.recipe["weights"] == ["0" * 64]
    assert set(result.recipe["versions"]) >= {"keras", "openvino", "pillow", "simplejpeg"}
    assert set(result.profile) == {
        "preparing", "reading", "decoding", "network", "cache", "attaching", "total", "bottleneck",
    }  # fmt: skip


def test_an_unknown_block_of_a_result_comes_with_near_ones(photos: pd.DataFrame) -> None:
    result = Extraction(photos, BLOCK, images="path").run()
    with pytest.raises(RequestError, match="Did you mean mobilenet"):
        result["mobilnet"]
