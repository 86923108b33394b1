"""Galleries that a saved notebook can hold."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
import pytest
from matplotlib import pyplot as plt
from PIL import Image

import nbfeat
from nbfeat import RequestError
from nbfeat.explore.gallery import MOST_BYTES, SIDE
from nbfeat.images.sources import read_thumbnail
from tests.look import HOSTILE, detailed, difference, shown

BUDGET = 300_000  # bytes of html for two dozen


def test_two_dozen_of_the_worst_images_fit_a_notebook() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (24, 300, 300, 3), dtype=np.uint8)
    html = nbfeat.thumbnails(pd.DataFrame({"image": list(noise)}))._repr_html_()
    assert len(html) < BUDGET
    pictures = shown(html)
    assert [picture.size for picture in pictures] == [(SIDE, SIDE)] * 24
    assert max(len(part) for part in re.findall(r"base64,([^\"]+)", html)) <= MOST_BYTES * 4 / 3 + 4


def test_a_picture_is_saved_as_sharp_and_colorful_as_it_may_be() -> None:
    image = detailed()
    (saved,) = shown(nbfeat.thumbnails(pd.DataFrame({"image": [image]}))._repr_html_())
    assert saved.size == (SIDE, 107)
    assert difference(saved, read_thumbnail(image, SIDE, Path())) < 4


def test_small_images_are_shown_as_large_as_others() -> None:
    images = [np.zeros(sides, np.uint8) for sides in ((300, 300, 3), (96, 48, 3), (1, 1, 3))]
    html = nbfeat.thumbnails(pd.DataFrame({"image": images}))._repr_html_()
    assert [picture.size for picture in shown(html)] == [(SIDE, SIDE), (48, 96), (1, 1)]
    assert re.findall(r'width="(\d+)" height="(\d+)"', html) == [("112", "112"), ("56", "112"), ("112", "112")]


def test_those_shown_are_spread_over_the_frame_and_the_rest_is_counted(photos: pd.DataFrame) -> None:
    found = nbfeat.thumbnails(photos, limit=4)
    assert repr(found) == "Thumbnails of 4 of 20 images"
    html = found._repr_html_()
    assert re.findall(r'title="(row \d+)', html) == ["row 0", "row 6", "row 13", "row 19"]
    assert "… and 16 more; the images shown are evenly sampled" in html
    assert "more" not in nbfeat.thumbnails(photos)._repr_html_()
    assert len(shown(nbfeat.thumbnails(photos, limit=None)._repr_html_())) == 20
    with pytest.raises(RequestError, match=r"limit`? must be a whole number"):
        nbfeat.thumbnails(photos, limit=0)


def test_captions_are_of_the_columns_asked_for(photos: pd.DataFrame) -> None:
    photos["score"], photos["nothing"] = 0.123456, None
    html = nbfeat.thumbnails(photos, "path", ["split", "score", "nothing"], limit=1)._repr_html_()
    assert re.findall(r'break-word">([^<]+)</div>', html) == ["train", "0.1235", "missing"]
    assert ">kind 0<" in nbfeat.thumbnails(photos, limit=1)._repr_html_()
    assert ">row 0<" in nbfeat.thumbnails(photos[["path"]], limit=1)._repr_html_()
    with pytest.raises(RequestError, match="no column 'lable' for the caption"):
        nbfeat.thumbnails(photos, caption="lable")


def test_an_image_that_cannot_be_read_is_its_reason(photos: pd.DataFrame, tmp_path: Path) -> None:
    text = tmp_path / f"{HOSTILE.replace('/', '')}.jpg"
    text.write_text("text")
    photos.loc["row 3", "path"] = str(tmp_path / "gone.png")
    photos.loc["row 4", "path"] = str(text)
    photos.loc["row 5", ["path", "label"]] = [None, HOSTILE]
    photos = photos.rename(index={"row 6": HOSTILE}).rename(columns={"label": HOSTILE})
    found = nbfeat.thumbnails(photos, caption=HOSTILE)
    html = found._repr_html_()
    assert "no such file: " in html
    assert "text, not an image" in html
    assert "the value is missing" in html
    assert len(shown(html)) == 17
    assert "<img src=x" not in html
    assert "<script" not in html
    assert "http" not in html
    axes = found.plot()
    assert len(axes) == 20
    assert "such file" in axes[3].texts[0].get_text().replace("\n", " ")
    plt.close("all")


def test_names_that_turn_the_direction_of_text_are_shown_escaped(photos: pd.DataFrame, tmp_path: Path) -> None:
    turns = "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x1B, 0x9B)))
    file = tmp_path / "photo\u202egnp.exe\u2067.png"
    file.write_text("text")
    photos = photos.astype(object)
    photos.loc["row 3", ["path", "label"]] = [str(file), f"\u05e9\u05dc\ud800b{turns}"]
    photos = photos.rename(columns={"label": f"l{turns}"}).rename(index={"row 4": f"r{turns}"})
    found = nbfeat.thumbnails(photos, caption=f"l{turns}")
    result = nbfeat.extract(photos, "MobileNet", size=32, weights="random", images="path", prefix=f"p{turns[:9]}")
    for text in (found._repr_html_(), result._repr_html_(), repr(result), nbfeat.duplicates(result)._repr_html_()):
        assert not set(text) & {*turns, "\ud800"}
    html = found._repr_html_()
    assert r"photo\u202egnp.exe\u2067" in html
    assert "\u05e9\u05dc\\ud800b" in html  # Hebrew is as it was


@pytest.mark.usefixtures("fake_network")
def test_an_extraction_knows_its_images_and_their_reasons(photos: pd.DataFrame, tmp_path: Path) -> None:
    late = tmp_path / "late.png"
    photos.loc["row 3", "path"] = str(late)
    photos["path"] = [os.path.relpath(path, tmp_path) for path in photos["path"]]
    result = nbfeat.extract(photos, "MobileNet --size 32", images="path", root=tmp_path)
    Image.new("RGB", (9, 9)).save(late)
    html = nbfeat.thumbnails(result)._repr_html_()
    assert len(shown(html)) == 19
    assert "no such file" in html
    assert "mobilenet_0000" not in html
    assert len(shown(nbfeat.thumbnails(photos, root=tmp_path)._repr_html_())) == 20


def test_pictures_are_upright_in_their_own_proportions_and_never_enlarged(tmp_path: Path) -> None:
    wide = Image.new("RGB", (640, 320), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    wide.save(tmp_path / "turned.jpg", exif=exif)
    clear = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    deep = np.full((320, 640), 65_535, np.uint16)
    big = Image.new("RGB", (4000, 2000), "blue")
    big.save(tmp_path / "big.jpg")
    cells: list[object] = [tmp_path / "turned.jpg", wide, clear, deep, tmp_path / "big.jpg"]
    made = [read_thumbnail(cell, 160, Path()) for cell in cells]
    assert [image.size for image in made] == [(80, 160), (160, 80), (30, 20), (160, 80), (160, 80)]
    assert [image.getpixel((5, 5)) for image in made][1:4] == [(255, 0, 0), (255,) * 3, (255,) * 3]
    assert wide.size == (640, 320)


def test_pillows_settings_decide_nothing_and_stay(photos: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    normal = nbfeat.thumbnails(photos)._repr_html_()
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1)
    assert nbfeat.thumbnails(photos)._repr_html_() == normal
    assert PIL.Image.MAX_IMAGE_PIXELS == 1


def test_a_frame_without_images_is_told(photos: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match="No column looks like images"):
        nbfeat.thumbnails(photos[["label"]])
    with pytest.raises(RequestError, match=r"no column pth\. Did you mean path"):
        nbfeat.thumbnails(photos, "pth")
    with pytest.raises(RequestError, match="The frame has no rows"):
        nbfeat.thumbnails(photos.iloc[:0], "path")
    with pytest.raises(RequestError, match="must be a pandas DataFrame, not dict"):
        nbfeat.thumbnails({"path": []})  # type: ignore[arg-type]
