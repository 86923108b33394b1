"""An RGB image → the pixels of a network: size, resizing and interpolation."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

Resize = Literal["squash", "crop", "pad"]
Interpolation = Literal["bilinear", "nearest", "bicubic", "lanczos"]
RESIZES: tuple[Resize, ...] = get_args(Resize)
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)

Pixels: TypeAlias = npt.NDArray[np.uint8]

LEAST_REDUCED = 4  # at twice the target, the cosine fell to 0.995
_FILTERS = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}


@dataclass(frozen=True, slots=True)
class PixelSpec:
    """The size of the square, how an image is fitted to it, and the filter."""

    size: int
    resize: Resize = "squash"
    interpolation: Interpolation = "bilinear"

    @property
    def short_side(self) -> int:
        """Pixels that the short side is scaled to before cropping."""
        return round(self.size * 256 / 224) if self.resize == "crop" else self.size


def reduction(width: int, height: int, spec: PixelSpec) -> int:
    """Return the factor (1, 2, 4 or 8) by which a JPEG of this size is reduced while decoding.

    The short side stays at least LEAST_REDUCED times the target, so features keep a cosine of 0.9995.

    >>> reduction(4000, 3000, PixelSpec(224)), reduction(500, 375, PixelSpec(224))
    (2, 1)
    """
    if spec.interpolation != "bilinear":
        return 1
    short_side = min(width, height)
    return next((factor for factor in (8, 4, 2) if reduced(short_side, factor) >= LEAST_REDUCED * spec.short_side), 1)


def reduced(side: int, factor: int) -> int:
    """Return the length of a side that is decoded at 1 / `factor`."""
    return -(-side // factor)


def fitted(image: Image.Image, spec: PixelSpec) -> Pixels:
    """Return the pixels (size, size, 3) of an RGB image."""
    target, kind = (spec.size, spec.size), _FILTERS[spec.interpolation]
    if spec.resize == "pad":
        width, height = (max(1, round(side * spec.size / max(image.size))) for side in image.size)
        out = Image.new("RGB", target)
        out.paste(image.resize((width, height), kind), ((spec.size - width) // 2, (spec.size - height) // 2))
    elif spec.resize == "crop":
        # Crop first: scaling all of an image of 1 × 30,000 pixels would take gigabytes.
        side = min(image.size) * spec.size / spec.short_side
        left, top = ((length - side) / 2 for length in image.size)
        out = image.resize(target, kind, (left, top, left + side, top + side))
    else:
        out = image.resize(target, kind)
    return np.asarray(out)
