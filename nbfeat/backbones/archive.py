"""Whether a ``.keras`` file is only what Keras writes: a description in JSON, weights in HDF5, and nothing larger."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from nbfeat.backbones.hdf5 import MOST_RATIO, SLACK, check_hdf5
from nbfeat.backbones.refusal import Refused, damaged, quote, refusing

WEIGHTS = "model.weights.h5"
_MEMBERS = {"metadata.json", "config.json", WEIGHTS}
_KIND = "a model of Keras"


def check_archive(path: Path) -> None:
    """Refuse a file that has other parts than a model's, or parts that would become much larger, or lead elsewhere.

    Raises
    ------
    WeightsError
        With the reason.
    """
    with refusing(path, _KIND), _opened(path) as archive, tempfile.TemporaryDirectory(prefix="nbfeat-") as folder:
        whole = Path(folder, WEIGHTS)
        with archive.open(WEIGHTS) as packed, whole.open("wb") as out:
            shutil.copyfileobj(packed, out)
        check_hdf5(whole)


def description(path: Path) -> dict[str, Any]:
    """Return what a ``.keras`` file says of its model, without Keras; WeightsError where it cannot be read."""
    with refusing(path, _KIND), _opened(path) as archive:
        told = json.loads(archive.read("config.json"))
        if not isinstance(told, dict):
            raise damaged("its config.json describes no model")
        return told


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise damaged(f"it is no .keras file ({error})") from error
    names, size = archive.namelist(), path.stat().st_size
    if unknown := [name for name in names if name not in _MEMBERS]:
        raise _unwanted(f"its part {quote(unknown[0])} is none that a model of stock layers has")
    if len(set(names)) != len(names) or not {"config.json", WEIGHTS} <= set(names):
        raise damaged("it has not the parts of a model")
    if sum(part.file_size for part in archive.infolist()) > MOST_RATIO * size + SLACK:
        raise _unwanted(f"its {size:,} bytes would become more than {MOST_RATIO} times as many")
    return archive


def _unwanted(what: str) -> Refused:
    return Refused(f"{what}. Save it anew with model.save('model.keras').")
