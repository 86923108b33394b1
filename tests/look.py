"""What tests of looking at features share: frames whose features are known, and pictures."""

from __future__ import annotations

import re
from base64 import b64decode
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from nbfeat.extraction.options import column_names

HOSTILE = "<img src=x onerror=alert(1)>"


def featured(*blocks: NDArray[Any], **columns: Any) -> pd.DataFrame:
    """Return a frame of `columns`, then of blocks ``net0``, ``net1`` …, indexed from 100 on."""
    index = pd.RangeIndex(100, 100 + len(blocks[0]))
    made = [
        pd.DataFrame(rows.astype(np.float32), index=index, columns=column_names(f"net{number}", rows.shape[1]))
        for number, rows in enumerate(blocks)
    ]
    return pd.concat([pd.DataFrame(columns, index=index), *made], axis=1)


def cosine(rows: NDArray[Any]) -> NDArray[Any]:
    """Return all cosine distances, by the book."""
    unit = rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)
    return np.asarray(1 - (unit[:, None, :] * unit[None, :, :]).sum(axis=2))


def euclidean(rows: NDArray[Any]) -> NDArray[Any]:
    """Return all Euclidean distances, by the book."""
    return np.asarray(np.sqrt(np.square(rows.astype(float)[:, None, :] - rows.astype(float)[None, :, :]).sum(axis=2)))


def detailed() -> Image.Image:
    """Draw a picture with fine lines and many colors."""
    y, x = np.mgrid[:320, :480] / 60
    hues = np.stack([np.sin(2 * x + y), np.cos(2 * y - x), np.sin(x * y / 3)], 2)
    return Image.fromarray((128 + 60 * hues + 50 * np.sin(20 * (x + y))[..., None]).astype(np.uint8))


def difference(one: Image.Image, other: Image.Image) -> float:
    """Return the mean difference of the values of two pictures."""
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


def shown(html: str) -> list[Image.Image]:
    """Return the pictures in a page."""
    return [Image.open(BytesIO(b64decode(found))) for found in re.findall(r"data:image/webp;base64,([^\"]+)", html)]
