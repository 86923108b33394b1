"""The weights in a PyTorch checkpoint (``.pth``), read without PyTorch and without running what the file says.

A checkpoint is a pickle that describes tensors, and beside it the bytes of their storages: since PyTorch 1.6 as members
of a zip, before that in a row. Whatever a file holds, reading it runs nothing, opens no other file, and takes no more
memory than the tensors do that its own bytes can fill, a copy of one of them, and some 50 MB.

Sources: ``torch/serialization.py`` for both layouts, PKWARE's APPNOTE.TXT for the zip.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from numpy.typing import NDArray

from nbfeat.backbones.refusal import damaged, quote, refusing
from nbfeat.backbones.torch_pickle import MOST_BYTES, Machine
from nbfeat.backbones.torch_tensor import Tensor, unwanted

Arrays: TypeAlias = dict[str, NDArray[Any]]
Places: TypeAlias = dict[str, "_Place"]

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_MEMBER = re.compile(
    rb"((?!\.\.?/)[^/\\\0]+)/"
    rb"(data\.pkl|data/[0-9]{1,20}|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
# The end of a zip: entries, bytes and start of its table. An entry there: flags, compression, CRC-32, bytes as stored,
# bytes before, bytes of name, extra and comment, start of the member. A member's beginning: bytes of name and extra.
_END, _ENTRY, _HEADER = struct.Struct("<4s6xH2L2x"), struct.Struct("<4s4x2H4x3L3H8xL"), struct.Struct("<4s22x2H")
_NO_COMPRESSION, _HARMLESS_FLAGS = 0, 0x0808  # sizes follow the data, names are UTF-8
_MOST_ZIP = 0xFFFF_FFFE  # longer ones have their sizes elsewhere
_PART = 1 << 20  # bytes that are summed at a time


class _Place(NamedTuple):
    """Where bytes lie in the file."""

    start: int
    size: int


def read(path: Path) -> Arrays:
    """Return the tensors of a state dict by name, in the file's order.

    Arrays have the shapes and types of the tensors; bfloat16, which NumPy lacks, becomes float32 without loss. Names of
    one tensor (tied weights) have one array. A state dict under ``state_dict`` or ``model`` is found there.

    Raises
    ------
    WeightsError
        Where the file cannot be read, is damaged, or holds or asks for anything that the weights alone do not need.
    """
    with refusing(path, "PyTorch weights"), path.open("rb") as file:
        return _read(file, os.fstat(file.fileno()).st_size)


def _read(file: BinaryIO, size: int) -> Arrays:
    head = _bytes_at(file, 0, 20)
    if head.startswith(b"PK\3\4"):
        value, places = _read_zip(file, size)
    elif head.startswith(b"\x80"):
        value, places = _read_row(file, size)
    else:
        raise unwanted(f"it is no checkpoint of PyTorch's (it begins with {quote(head)})")
    arrays, given, room = dict[int, NDArray[Any]](), Arrays(), size
    for name, tensor in _state_dict(value).items():
        if id(tensor) not in arrays:
            place, storage = places.get(tensor.storage.key), tensor.storage
            if place is None or place.size != storage.count * storage.item:
                raise damaged(f"its storage {storage.key} is missing or has another size than its pickle says")
            room -= tensor.span * storage.item
            if room < 0:
                raise unwanted("its tensors share their bytes and would take more memory than the file has bytes")
            arrays[id(tensor)] = tensor.read(file, place.start)
        given[name] = arrays[id(tensor)]
    return given


def _bytes_at(file: BinaryIO, start: int, count: int) -> bytes:
    """Return `count` bytes of the file, or fewer where it ends."""
    file.seek(start)
    return file.read(count)


def _read_zip(file: BinaryIO, size: int) -> tuple[object, Places]:
    """Return what the checkpoint describes, and where its storages lie, by their keys."""
    if size > _MOST_ZIP:
        raise unwanted(f"it has {size:,} bytes, and zips of more than {_MOST_ZIP:,} are not read")
    members = dict(_members(file, size))
    if "data.pkl" not in members:
        raise unwanted("it is a zip without the data.pkl of a checkpoint")
    if "byteorder" in members and _bytes_at(file, *members["byteorder"]) != b"little":
        raise unwanted("its numbers are not little-endian")
    if members["data.pkl"].size > MOST_BYTES:
        raise unwanted(f"its data.pkl has {members['data.pkl'].size:,} bytes; up to {MOST_BYTES:,} are read")
    machine = Machine(_bytes_at(file, *members["data.pkl"]))
    value = machine.load()
    if machine.at != members["data.pkl"].size:
        raise damaged("its data.pkl goes on after its end")
    return value, {name.removeprefix("data/"): place for name, place in members.items()}


def _members(file: BinaryIO, size: int) -> Iterator[tuple[str, _Place]]:
    """Give the members of a zip once it is sure that they lie apart, within the file, and as they were written."""
    table_start, entries = _entries(file, size)
    free = 0
    for start, length, checksum, path in sorted(entries):
        header = _bytes_at(file, start, _HEADER.size + len(path))
        if len(header) < _HEADER.size + len(path) or not (header.startswith(b"PK\3\4") and header.endswith(path)):
            raise damaged(f"its member {quote(path)} is not where its table of contents says")
        _, name_length, extra_length = _HEADER.unpack_from(header)
        first = start + _HEADER.size + name_length + extra_length
        if start < free or name_length != len(path) or first + length > table_start:
            raise damaged(f"its member {quote(path)} overlaps another")
        free = first + length
        if _checksum(file, first, length) != checksum:
            raise damaged(f"the bytes of its member {quote(path)} are not those that were written")
        yield path.partition(b"/")[2].decode(), _Place(first, length)


def _entries(file: BinaryIO, size: int) -> tuple[int, list[tuple[int, int, int, bytes]]]:
    """Return where the table of contents of a zip begins, and start, bytes, CRC-32 and path of each member."""
    end = _bytes_at(file, max(size - _END.size, 0), _END.size)
    if len(end) < _END.size or not end.startswith(b"PK\5\6"):
        raise damaged("it ends before the table of contents of its zip")
    _, count, length, table_start = _END.unpack(end)
    if table_start + length > size or length > MOST_BYTES:
        raise damaged("the table of contents of its zip is not where it should be")
    table, at, entries = _bytes_at(file, table_start, length), 0, dict[bytes, tuple[int, int, int, bytes]]()
    for _ in range(count):
        if at + _ENTRY.size > length:
            raise damaged("the table of contents of its zip ends early")
        mark, flags, method, checksum, stored, whole, *lengths, start = _ENTRY.unpack_from(table, at)
        path = table[at + _ENTRY.size : at + _ENTRY.size + lengths[0]]
        at += _ENTRY.size + sum(lengths)
        if mark != b"PK\1\2" or path in entries:
            raise damaged("the table of contents of its zip is not one")
        if method != _NO_COMPRESSION or flags & ~_HARMLESS_FLAGS or stored != whole:
            raise unwanted(f"its member {quote(path)} is compressed or encrypted")
        if not (known := _MEMBER.fullmatch(path)) or not path.startswith(next(iter(entries), path)[: known.end(1) + 1]):
            raise unwanted(f"its member {quote(path)} is none that a checkpoint has")
        entries[path] = start, stored, checksum, path
    return table_start, list(entries.values())


def _checksum(file: BinaryIO, start: int, length: int) -> int:
    checksum = 0
    file.seek(start)
    for at in range(0, length, _PART):
        checksum = zlib.crc32(file.read(min(_PART, length - at)), checksum)
    return checksum


def _read_row(file: BinaryIO, size: int) -> tuple[object, Places]:
    """Return what a checkpoint from before PyTorch 1.6 describes, and where its storages lie, by their keys."""
    machine = Machine(_bytes_at(file, 0, MOST_BYTES))
    if machine.load() != _MAGIC or machine.load() != _VERSION:
        raise unwanted("it is a pickle, but none that PyTorch wrote")
    system, value, keys = machine.load(), machine.load(), machine.load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise unwanted("its numbers are not little-endian")
    if not isinstance(keys, list):
        raise damaged("it does not say in which order its storages come")
    places, at = Places(), machine.at
    for key in keys:
        storage = machine.storages.get(key) if isinstance(key, str) else None
        if storage is None or _bytes_at(file, at, 8) != storage.count.to_bytes(8, "little"):
            raise damaged("its storages are not those that its pickle describes")
        places[storage.key] = _Place(at + 8, storage.count * storage.item)
        at += 8 + places[storage.key].size
    if at > size:
        raise damaged(f"it should have {at:,} bytes and has {size:,}")
    return value, places


def _state_dict(value: object) -> dict[str, Tensor]:
    """Return the state dict that a checkpoint is or, beside what training needs, has."""
    if isinstance(value, dict):
        value = next((value[name] for name in ("state_dict", "model") if isinstance(value.get(name), dict)), value)
    if not isinstance(value, dict) or not value:
        raise unwanted("it holds no state dict")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise unwanted(f"its entry {quote(str(name))} is no tensor")
    return value
