"""Whether a file of Keras weights (HDF5, ``.keras``) is only that, and no larger than it looks; else, why not.

An HDF5 file may send its reader to other files (external links, external storage, virtual datasets) and may declare
more numbers than it has bytes; a zip may hold other things than a model, or become much larger. Here all of this is
looked at before anything is opened or read.
"""

from __future__ import annotations

import json
import math
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from nbfeat.errors import WeightsError

MOST_LINKS = 100_000  # a network of a thousand layers has 5,000
MOST_LEVELS = 64
MOST_RATIO = 16  # weights compress to a half at best, those that were pruned to a tenth
SLACK = 1 << 20  # bytes; new weights are zeros, and a small file may hold little else
# Deflate, shuffle, Fletcher's checksum and LZF, which h5py brings itself; others would be looked for on this machine.
_FILTERS = frozenset({1, 2, 3, 32_000})
_WEIGHTS = "model.weights.h5"


class Refused(Exception):  # noqa: N818 - it is the reason why, before it has the file's name
    """Why a file is not read: a clause without its name, then the next step where it is not that of its kind."""


def damaged(what: str) -> Refused:
    """Refuse a file that is not as it was written."""
    return Refused(what, "Download it again.")


def quote(text: str | bytes, most: int = 60) -> str:
    """Return text from a file in quotes on one line, in ASCII, cut after `most` characters."""
    line = ascii(text[:most] if isinstance(text, str) else text[:most].decode("latin-1"))
    return f"{line[:-1]}...{line[-1]}" if len(text) > most else line


@contextmanager
def refusing(path: Path, kind: str, advice: str = "Download it again.") -> Iterator[None]:
    """Turn what goes wrong over the file at `path` into a WeightsError: "`path` cannot be read as `kind`: …"."""
    cause: Exception | None = None
    try:
        # Opening a pipe waits for its other end for ever, and reading a device may do anything.
        if stat.S_ISREG(path.stat().st_mode):
            yield
            return
        reason = "it is not a file. Check the path."
    except Refused as refused:
        reason = ". ".join((*refused.args, advice)[:2])
    except WeightsError:
        raise
    except Exception as error:
        cause, text = error, quote(getattr(error, "strerror", None) or str(error), 200)[1:-1]
        reason = f"it is damaged beyond reading ({type(error).__name__}: {text}). Download it again."
        if isinstance(error, MemoryError):
            reason = "there is not enough memory for it. Close other notebooks and try again."
        elif isinstance(error, OSError | ValueError):  # ValueError: a NUL in the path
            reason = f"{text}. Check the path, or download the file again."
    raise WeightsError(f"{path.name} cannot be read as {kind}: {reason}") from cause


def check_hdf5(path: Path) -> None:
    """Raise WeightsError where a file is no HDF5, leads out of itself, holds other things than numbers, or expands."""
    import h5py

    advice = "Save the weights anew with model.save_weights(), or download them again."
    with refusing(path, "weights in HDF5", advice), h5py.File(path, "r") as file:
        names = set[bytes]()

        def refusal(name: bytes, link: Any) -> Refused | None:
            if len(names) >= MOST_LINKS or name.count(b"/") > MOST_LEVELS:
                return Refused(f"it has more than {MOST_LINKS:,} links, or more than {MOST_LEVELS} levels of groups")
            group, _, own = name.rpartition(b"/")
            if group and group not in names:  # HDF5 would take it as a path, and follow other links on the way
                return Refused(f"its link {quote(own)} has a name that is a path")
            if link.type not in {h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT}:
                return Refused(f"its link {quote(own)} leads to another file")
            if link.type == h5py.h5l.TYPE_HARD:  # what a soft link leads to has a hard one too
                names.add(name)
            return None

        # By hard links alone, and each group once. Nothing is opened before it is sure that no link leads elsewhere.
        if refused := file.id.links.visit(refusal, info=True):
            raise refused
        things, size = (h5py.h5o.open(file.id, name) for name in names), path.stat().st_size
        declared = sum(_bytes_declared(one) for one in things if isinstance(one, h5py.h5d.DatasetID))
        if declared > MOST_RATIO * size + SLACK:
            raise Refused(f"its {size:,} bytes would become more than {MOST_RATIO} times as many")


def _bytes_declared(dataset: Any) -> int:
    """Return how many bytes reading a dataset, or a chunk of it, would take; refuse one that is not plain numbers."""
    import h5py

    stored, kind = dataset.get_create_plist(), dataset.get_type()
    name = quote(h5py.h5i.get_name(dataset) or b"")
    if stored.get_layout() == h5py.h5d.VIRTUAL or stored.get_external_count():
        raise Refused(f"the numbers of its dataset {name} are in another file")
    if kind.get_class() not in {h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM}:
        raise Refused(f"its dataset {name} is not of numbers")
    for number in range(stored.get_nfilters()):
        if (known := stored.get_filter(number)[0]) not in _FILTERS:
            raise Refused(f"its dataset {name} is stored with filter {known}, which is not used here")
    lengths = [dataset.shape or (), stored.get_chunk() if stored.get_layout() == h5py.h5d.CHUNKED else ()]
    return max(map(math.prod, lengths)) * int(kind.get_size())


def check_archive(path: Path) -> None:
    """Raise WeightsError where a ``.keras`` file has other parts than a model, or they lead elsewhere or expand."""
    with _opened(path) as archive, tempfile.TemporaryDirectory(prefix="nbfeat-") as folder:
        whole = Path(folder, _WEIGHTS)
        with archive.open(_WEIGHTS) as packed, whole.open("wb") as out:
            shutil.copyfileobj(packed, out)
        check_hdf5(whole)


def description(path: Path) -> dict[str, Any]:
    """Return what a ``.keras`` file says of its model, without Keras; WeightsError where it cannot be read."""
    with _opened(path) as archive:
        return cast("dict[str, Any]", json.loads(archive.read("config.json")))


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    advice = "Save it anew with model.save('model.keras')."
    with refusing(path, "a model of Keras", advice), zipfile.ZipFile(path) as archive:
        names, size = archive.namelist(), path.stat().st_size
        if unknown := [name for name in names if name not in {"metadata.json", "config.json", _WEIGHTS}]:
            raise Refused(f"its part {quote(unknown[0])} is none that a model of stock layers has")
        if len(set(names)) != len(names) or not {"config.json", _WEIGHTS} <= set(names):
            raise damaged("it has not the parts of a model")
        if sum(part.file_size for part in archive.infolist()) > MOST_RATIO * size + SLACK:
            raise Refused(f"its {size:,} bytes would become more than {MOST_RATIO} times as many")
        yield archive
