"""Programs that repeat results, each in its own process: ``python -m tests.extraction.like_child NAME …``.

Each prints one line of JSON at the end.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import nbfeat
from tests import keras_child

run = functools.partial(keras_child.run, module="tests.extraction.like_child")


def repeated(folder: str) -> dict[str, Any]:
    """Repeat a result that another process wrote, and save the features."""
    result = nbfeat.extract(pd.read_parquet(Path(folder, "test.parquet")), like=Path(folder, "train.parquet"))
    np.save(Path(folder, "test.npy"), result.features.to_numpy())
    return {"columns": result.columns, "notes": result.notes, "computed": result.computed}


def own_networks(folder: str) -> dict[str, Any]:
    """Repeat results of user networks: the same ones, and different ones with the same name."""
    from tests.backbones import user_networks as own

    frame, file = own.frame_of(own.SIZE, 3), Path(folder, "net.keras")
    found: dict[str, Any] = {}
    for seed in (2, 3):
        own.build_with(seed).save(Path(folder, f"{seed}.keras"))

    def file_of(seed: int) -> str:
        file.write_bytes(Path(folder, f"{seed}.keras").read_bytes())
        return f"{file} --scaling tf"

    def registered(seed: int) -> str:
        nbfeat.register_backbone(
            "MyNet", lambda size: own.build_with(seed, size), input_size=own.SIZE, scaling="tf", layers=["conv"]
        )
        return "MyNet"

    def with_code(by: int) -> str:
        nbfeat.register_backbone("Own", functools.partial(own.own_with, by), input_size=own.SIZE, scaling="none")
        return "Own"

    makes: dict[str, Callable[[int], str]] = {"file": file_of, "registered": registered, "with code": with_code}
    for name, make in makes.items():
        result = nbfeat.extract(frame, make(2), images="image", normalize="standard", components=2)
        make(2)
        same = result.like(frame, cache=False).features.equals(result.features)
        make(3)
        try:
            result.like(frame)
        except nbfeat.RequestError as error:
            found[name] = [same, str(error)]
    return found


if __name__ == "__main__":
    print(json.dumps({"repeated": repeated, "own_networks": own_networks}[sys.argv[1]](*sys.argv[2:])))
