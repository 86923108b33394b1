"""Whether a file of Keras weights in HDF5 is only that: data of its own, and no more of it than the file can hold.

An HDF5 file may send its reader to other files (external links, external storage, virtual datasets) and may declare
more numbers than it has bytes. All is looked at before it is opened or read: links before objects, how a dataset is
stored before what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from nbfeat.backbones.refusal import Refused, quote, refusing

MOST_LINKS = 100_000  # a network of a thousand layers has 5,000
MOST_LEVELS = 64
MOST_RATIO = 16  # weights compress to a half at best, those that were pruned to a tenth
SLACK = 1 << 20  # bytes; new weights are zeros, and a small file may hold little else
# Deflate, shuffle, Fletcher's checksum and LZF, which h5py brings itself; others would be looked for on this machine.
_FILTERS = frozenset({1, 2, 3, 32_000})


def check_hdf5(path: Path) -> None:
    """Refuse an HDF5 file that leads out of itself, that no walk would end in, or that is larger than it looks.

    Raises
    ------
    WeightsError
        Where it has external links or storage, virtual datasets, datasets that are not numbers or are stored in a way
        that h5py does not know by itself, more than `MOST_RATIO` times its own size in numbers, or is no HDF5 file.
    """
    with refusing(path, "weights in HDF5"), h5py.File(path, "r") as file:
        size = path.stat().st_size
        if sum(map(_bytes_declared, _datasets(file.id))) > MOST_RATIO * size + SLACK:
            raise _unwanted(f"its {size:,} bytes would become more than {MOST_RATIO} times as many")


def _unwanted(what: str) -> Refused:
    return Refused(f"{what}. Save the weights anew with model.save_weights(), or download them again.")


def _datasets(root: Any) -> Iterator[Any]:
    """Give every dataset once, by hard links alone: what a soft link leads to within the file has a hard one too."""
    groups, links = [(h5py.h5g.open(root, b"/"), 0)], 0
    seen = {h5py.h5o.get_info(groups[0][0]).addr}
    while groups:
        group, level = groups.pop()
        links += len(group)
        if links > MOST_LINKS or level > MOST_LEVELS:
            raise _unwanted(f"it has more than {MOST_LINKS:,} links, or more than {MOST_LEVELS} levels of groups")
        for name in group:
            if not _is_hard(group, name):
                continue
            thing = h5py.h5o.open(group, name)
            address = h5py.h5o.get_info(thing).addr
            if address in seen:
                continue
            seen.add(address)
            if isinstance(thing, h5py.h5g.GroupID):
                groups.append((thing, level + 1))
            elif isinstance(thing, h5py.h5d.DatasetID):
                yield thing


def _is_hard(group: Any, name: bytes) -> bool:
    """Tell whether a link is an object's own; refuse those that lead elsewhere."""
    # HDF5 takes such names as paths, and would follow other links on the way.
    if b"/" in name or name == b".":
        raise _unwanted(f"its link {quote(name)} has a name that is a path")
    kind = group.links.get_info(name).type
    if kind not in {h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT}:
        raise _unwanted(f"its link {quote(name)} leads to another file")
    return bool(kind == h5py.h5l.TYPE_HARD)


def _bytes_declared(dataset: Any) -> int:
    """Return how many bytes reading a dataset, or a chunk of it, would take; refuse one that is not plain numbers."""
    stored, kind = dataset.get_create_plist(), dataset.get_type()
    name = quote(h5py.h5i.get_name(dataset) or b"")
    if stored.get_layout() == h5py.h5d.VIRTUAL or stored.get_external_count():
        raise _unwanted(f"the numbers of its dataset {name} are in another file")
    if kind.get_class() not in {h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM}:
        raise _unwanted(f"its dataset {name} is not of numbers")
    for number in range(stored.get_nfilters()):
        if (known := stored.get_filter(number)[0]) not in _FILTERS:
            raise _unwanted(f"its dataset {name} is stored with filter {known}, which is not used here")
    lengths = [dataset.shape or (), stored.get_chunk() if stored.get_layout() == h5py.h5d.CHUNKED else ()]
    return max(map(math.prod, lengths)) * int(kind.get_size())
