"""What tests of looking at features share: frames whose features are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

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
