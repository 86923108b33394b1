"""Parquet files that tell by themselves whether they are, byte for byte, what was written.

Parquet has checksums of pages at most: nothing tells that the head of a page, or the footer, which says where each
column lies, is another by now. So the footer has a digest of all that comes before it, and one of itself, taken while
that digest was blank.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

BODY, SEAL = b"nbfeat.body.sha256", b"nbfeat.footer.sha256"  # entries of the footer
_BLANK = b"0" * 64
_MAGIC = b"PAR1"  # how Parquet files begin and end
_TAIL = 8  # the length of the footer, and that
_HEAD = SEAL + b"\x18\x40"  # what stands before its value: a field of text, 64 bytes of it
AT_ONCE = 1 << 20  # bytes


class UnsealedError(ValueError):
    """The file is not, or not any more, what was written; `is_parquet` and `is_sealed` tell what it is at least."""

    def __init__(self, *, is_parquet: bool, is_sealed: bool) -> None:
        super().__init__("not what was written")
        self.is_parquet, self.is_sealed = is_parquet, is_sealed


@contextmanager
def writer(sink: Any, schema: Any, entries: Mapping[bytes, bytes], **options: Any) -> Iterator[Any]:
    """Give a writer of tables whose file has these `entries` in its footer, and the digests; `sink` stays open."""
    import pyarrow as pa
    from pyarrow import parquet

    out = _Out(sink)
    with parquet.ParquetWriter(pa.PythonFile(out, mode="w"), schema, **options) as made:
        yield made
        made.add_key_value_metadata({**entries, BODY: out.begin_footer(), SEAL: _BLANK})
    sink.write(sealed(bytes(out.footer)))


class _Out(io.RawIOBase):
    """Passes on what comes before the footer, and holds the footer back."""

    def __init__(self, sink: Any) -> None:
        self.footer = bytearray()
        self._sink, self._told, self._size, self._is_footer = sink, hashlib.sha256(), 0, False

    def begin_footer(self) -> str:
        """Say that all else is written; return its digest."""
        self._is_footer = True
        return self._told.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        self._size += len(data)
        if self._is_footer:
            self.footer += data
        else:
            self._told.update(data)
            self._sink.write(data)
        return len(data)


def sealed(footer: bytes) -> bytes:
    """Return the footer with its digest in it, whatever was in its place."""
    at = footer.rindex(_HEAD) + len(_HEAD)
    return footer[:at] + _digest(footer, at) + footer[at + len(_BLANK) :]


def _digest(footer: bytes, at: int) -> bytes:
    told, view = hashlib.sha256(), memoryview(footer)
    for some in (view[:at], _BLANK, view[at + len(_BLANK) :]):
        told.update(some)
    return told.hexdigest().encode()


def footer(file: Any) -> bytes:
    """Return the footer of a Parquet file, with the bytes that files end with, if it is what was written.

    Raises
    ------
    UnsealedError
        Where it is not; none of it was understood then, so that it could do no harm.
    """
    file.seek(0, io.SEEK_END)
    size = file.tell()
    file.seek(max(0, size - _TAIL))
    tail = bytes(file.read(_TAIL))
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > size - _TAIL - len(_MAGIC):
        raise UnsealedError(is_parquet=False, is_sealed=False)
    file.seek(size - _TAIL - length)
    found = bytes(file.read(length + _TAIL))
    if _HEAD not in found:
        raise UnsealedError(is_parquet=True, is_sealed=False)
    at = found.rindex(_HEAD) + len(_HEAD)
    if found[at : at + len(_BLANK)] != _digest(found, at):
        raise UnsealedError(is_parquet=True, is_sealed=True)
    return found


def alone(footer: bytes) -> Any:
    """Return a footer as a file that has nothing else."""
    import pyarrow as pa

    return pa.BufferReader(_MAGIC + footer)


@dataclass(frozen=True, slots=True)
class Body:
    """What comes before the footer, by its digest and size."""

    digest: bytes
    size_of_footer: int

    @classmethod
    def of(cls, entries: Mapping[bytes, bytes], footer: bytes) -> Body:
        """Take it from the `entries` of a `footer`."""
        return cls(entries.get(BODY, b""), len(footer))

    def is_in(self, file: Any) -> bool:
        """Tell whether a file has it, by reading it once."""
        file.seek(0, io.SEEK_END)
        left, told = file.tell() - self.size_of_footer, hashlib.sha256()
        file.seek(0)
        while left > 0 and (some := bytes(file.read(min(AT_ONCE, left)))):
            told.update(some)
            left -= len(some)
        return told.hexdigest().encode() == self.digest
