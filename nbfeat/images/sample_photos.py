"""Photographs to try things on: tiles of real ones, which scikit-image and scikit-learn have in their wheels."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, ImageStat

from nbfeat.errors import RequestError
from nbfeat.images.folder import folder
from nbfeat.paths import HomeError, folder_written_whole, keep, temporary_folder

if TYPE_CHECKING:
    import pandas as pd

EACH, SIZE = 40, 96  # tiles per class, pixels per tile
_PHOTOS = {  # label → file, and the side of a place in pixels; each tile is cut from a place of its own
    "astronaut": ("skimage/data/astronaut.png", 56), "brick": ("skimage/data/brick.png", 64),
    "cat": ("skimage/data/chelsea.png", 50), "coffee": ("skimage/data/coffee.png", 56),
    "coins": ("skimage/data/coins.png", 48), "flower": ("sklearn/datasets/images/flower.jpg", 48),
    "galaxies": ("skimage/data/hubble_deep_field.jpg", 110), "grass": ("skimage/data/grass.png", 72),
    "retina": ("skimage/data/retina.jpg", 120), "rocket": ("skimage/data/rocket.jpg", 44),
    "temple": ("sklearn/datasets/images/china.jpg", 56), "tissue": ("skimage/data/ihc.png", 64),
}  # fmt: skip
_COPIED = {"astronaut": 15, "cat": 15, "coffee": 16, "flower": 28, "temple": 21, "tissue": 26}  # one tile of each
_temporary = cache(temporary_folder)  # until the process ends


def sample_photos() -> pd.DataFrame:
    """Return a frame of 480 small photographs in 12 classes to try things on.

    They are tiles of real photographs, with seeded places, scales, mirroring and lighting. Six are near duplicates,
    named ``copy``; others of a class don't overlap. One file is damaged on purpose. The first call writes the files,
    1.3 MB, to nbfeat's cache folder, or to a temporary one if that can't be used.

    Returns
    -------
    DataFrame
        ``path``; ``label``, 40 rows of each, one class after another in turn; ``source``, the photograph.

    Raises
    ------
    RequestError
        scikit-image, which has ten of the photographs, isn't installed.

    Notes
    -----
    Public domain: astronaut, galaxies (NASA), rocket (SpaceX). CC0: brick, cat (Stéfan van der Walt), coffee (Rachel
    Michetti), grass, retina (Mikael Häggström). No known copyright: coins (Brooklyn Museum), tissue (CMMI). CC BY 2.0,
    so name the photographers, both on Flickr: temple (danielbuechele), flower (vultilion).

    Examples
    --------
    >>> nbfeat.sample_photos()["label"].head(3).tolist()
    ['astronaut', 'brick', 'cat']
    """
    try:
        final = keep("samples") / "photos-1"
    except HomeError:
        final = _temporary()[0] / "photos-1"
    if not (final / "manifest.json").exists():
        with folder_written_whole(final) as made:
            for label, (name, side) in _PHOTOS.items():
                _cut(_find(*name.split("/")), side, made / label)
            (broken := made / "rocket" / "07.jpg").write_bytes(broken.read_bytes()[:1000])
            (made / "manifest.json").write_text("{}", encoding="utf-8")  # now it is whole
    frame = folder(final)
    sources = {label: f"{Path(name).stem} of {name.partition('/')[0]}" for label, (name, _) in _PHOTOS.items()}
    frame["source"] = frame["label"].map(sources)
    return frame.iloc[frame.groupby("label").cumcount().argsort(kind="stable")].reset_index(drop=True)


def _find(package: str, *parts: str) -> Path:
    """Find a file of a package without importing it."""
    spec = find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        if (file := Path(place, *parts)).is_file():
            return file
    raise RequestError("`sample_photos` needs scikit-image, which isn't installed: pip install 'nbfeat[samples]'.")


def _cut(photo: Path, side: int, target: Path) -> None:
    """Cut a tile from each place of `photo`, save those with the most detail, and one again as a near duplicate."""
    image = Image.open(photo).convert("RGB")
    generator, tiles = np.random.default_rng(0), []
    for row, column in np.ndindex(image.height // side, image.width // side):
        size = generator.uniform(0.55, 1) * side
        x, y = np.array([column, row]) * side + generator.uniform(0, side - size, 2)
        light = generator.uniform(0.7, 1.3) * generator.uniform(0.9, 1.1, 3)  # exposure × white balance
        curves = np.outer(light, range(256)).clip(0, 255).astype(int).ravel().tolist()
        tile = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (x, y, x + size, y + size)).point(curves)
        tiles.append(ImageOps.mirror(tile) if generator.random() < 0.5 else tile)
    copied, detail = _COPIED.get(target.name), [sum(ImageStat.Stat(tile).stddev) for tile in tiles]
    target.mkdir()
    for number, at in enumerate(sorted(np.argsort(detail)[(copied is not None) - EACH :])):
        tiles[at].save(target / f"{number:02d}.jpg", quality=90)
        if number == copied:
            tiles[at].crop((1, 1, SIZE, SIZE)).save(target / f"{number:02d}_copy.jpg", quality=80)
