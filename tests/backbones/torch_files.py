"""Checkpoints as PyTorch writes them and as an attacker would, put together byte by byte, without PyTorch."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import starmap

import numpy as np
from numpy.typing import NDArray

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # as in every checkpoint before PyTorch 1.6
START, STOP = b"\x80\x02", b"."
FOUR = struct.pack("<4f", 1, 2, 3, 4)  # the storage that most of these have


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def row(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def listed(*parts: bytes) -> bytes:
    return b"](" + b"".join(parts) + b"e"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(callee: bytes, *arguments: bytes) -> bytes:
    return callee + row(*arguments) + b"R"


ORDERED = named("collections", "OrderedDict")
REBUILD = named("torch._utils", "_rebuild_tensor_v2")


def state(items: Mapping[str, bytes] | Iterable[tuple[bytes, bytes]]) -> bytes:
    pairs = [(text(name), part) for name, part in items.items()] if isinstance(items, Mapping) else items
    return call(ORDERED) + b"(" + b"".join(key + value for key, value in pairs) + b"u"


def storage(kind: str = "Float", key: bytes = text("0"), count: bytes = number(4), more: bytes = b"") -> bytes:
    return row(text("storage"), named("torch", f"{kind}Storage"), key, text("cpu"), count, more) + b"Q"


def shape(*lengths: int) -> bytes:
    return row(*map(number, lengths))


def tensor(
    stored: bytes = storage(),
    offset: bytes = number(0),
    size: bytes = shape(4),
    stride: bytes = shape(1),
    more: bytes = b"\x89" + call(ORDERED),
) -> bytes:
    return call(REBUILD, stored, offset, size, stride, more)


def pickled(value: bytes) -> bytes:
    return START + value + STOP


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a zip, as PyTorch writes it unless it is said otherwise."""

    name: str
    data: bytes
    flags: int = 0x0808
    method: int = 0
    size: int | None = None
    size_before: int | None = None
    checksum: int | None = None
    start: int | None = None
    other_name: str | None = None  # in the member's own header

    def header(self, at: int) -> bytes:
        """Return the member's beginning at byte `at`: its data begin at a multiple of 64, its sizes come after them."""
        name = (self.other_name or self.name).encode()
        room = -(at + 34 + len(name)) % 64
        extra = b"FB" + struct.pack("<H", room) + b"Z" * room
        return (
            struct.pack("<4s5H3L2H", b"PK\3\4", 0, self.flags, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra
        )

    def sums(self) -> tuple[int, int, int]:
        """Return its CRC-32 and its sizes as stored and before."""
        checksum = zlib.crc32(self.data) if self.checksum is None else self.checksum
        size = len(self.data) if self.size is None else self.size
        return checksum, size, size if self.size_before is None else self.size_before

    def entry(self, at: int) -> bytes:
        """Return what the table of contents says of the member that is at byte `at`."""
        start = at if self.start is None else self.start
        fields = (0, 0, self.flags, self.method, 0, 0, *self.sums(), len(self.name.encode()), 0, 0, 0, 0, 0, start)
        return struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + self.name.encode()


def zipped(*members: Member, count: int | None = None, start: int | None = None, comment: bytes = b"") -> bytes:
    """Return a zip with `members`; the number of them and the start of their table may be said otherwise."""
    data, table = bytearray(), bytearray()
    for member in members:
        table += member.entry(len(data))
        data += member.header(len(data)) + member.data + b"PK\7\x08" + struct.pack("<3L", *member.sums())
    entries = len(members) if count is None else count
    at = len(data) if start is None else start
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 30, 45, 0, 0, entries, entries, len(table), at)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(data) + len(table), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, entries & 0xFFFF, entries & 0xFFFF, len(table), at, len(comment))
    return bytes(data + table) + end64 + locator + end + comment


def members(pickle: bytes, *storages: bytes, byteorder: bytes = b"little") -> list[Member]:
    datas = [Member(f"archive/data/{key}", data) for key, data in enumerate(storages)]
    few = Member("archive/byteorder", byteorder), Member("archive/version", b"3\n")
    return [Member("archive/data.pkl", pickle), few[0], *datas, few[1], Member("archive/.data/serialization_id", b"12")]


def as_zip(value: bytes, *storages: bytes) -> bytes:
    """Return the checkpoint of a pickled value as PyTorch writes it since 1.6."""
    return zipped(*members(pickled(value), *storages))


def as_row(value: bytes, *storages: tuple[int, bytes], keys: bytes | None = None, little: bytes = b"\x88") -> bytes:
    """Return the checkpoint of a pickled value as PyTorch wrote it before 1.6; storages are count and bytes."""
    system = pickled(b"}" + text("protocol_version") + number(1001) + b"s" + text("little_endian") + little + b"s")
    order = pickled(listed(*(text(str(key)) for key in range(len(storages)))) if keys is None else keys)
    datas = starmap(lambda count, data: struct.pack("<q", count) + data, storages)
    return MAGIC + pickled(number(1001)) + system + pickled(value) + order + b"".join(datas)


def checkpoint(arrays: Mapping[str, NDArray[np.float32]]) -> bytes:
    """Return a state dict of these arrays as PyTorch writes it since 1.6."""
    tensors = {}
    for place, (name, array) in enumerate(arrays.items()):
        stored = storage(key=text(str(place)), count=number(array.size))
        strides = [step // array.itemsize for step in array.strides]
        tensors[name] = tensor(stored, size=shape(*array.shape), stride=shape(*strides))
    return as_zip(state(tensors), *(array.tobytes() for array in arrays.values()))


FORMATS = {"zip": lambda value: as_zip(value, FOUR), "row": lambda value: as_row(value, (4, FOUR))}
