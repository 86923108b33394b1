"""Read the weights in a PyTorch checkpoint (``.pth``) without PyTorch and without running code from the file.

A checkpoint is a pickle that describes tensors, plus the bytes of their storages: members of a zip since PyTorch 1.6,
consecutive before that. Python's pure-Python unpickler reads it, limited to the opcodes and names that state dicts need
(``torch/_utils.py``, ``torch/serialization.py``). Reading any file runs nothing, opens no other file, and takes no more
memory than the tensors that its bytes can fill, a copy of one of them, and about 50 MB.
"""

import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.backbone import Backbone
from nbfeat.errors import Refused, WeightsError, damaged, quote, refusing

Arrays = dict[str, NDArray[Any]]
LayerWeights = dict[str, list[NDArray[np.float32]]]  # arrays for `set_weights`, by layer name
NORM = ("weight", "bias", "running_mean", "running_var")  # gamma, beta, moving mean and variance of a batch norm
Convolution = tuple[str, str, int, int, int]  # name in Keras, key in a state dict, channels before and after, side
Places = dict[str, tuple[int, int]]  # offset and number of bytes of each storage in the file

MOST_BYTES = 4 << 20  # of a pickle (about 100 per tensor) and of a zip's table of contents
MOST_STEPS = 500_000  # a tensor takes about 50; a step takes up to 100 bytes of memory
MOST_AXES = 32  # NumPy 1's limit
MOST_ELEMENTS = 1 << 48  # more than any file has, and far below a 64-bit overflow
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_TYPES = {
    "Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": "V2", "Long": "<i8", "Int": "<i4", "Short": "<i2",
    "Char": "|i1", "Byte": "|u1", "Bool": "|b1", "ComplexFloat": "<c8", "ComplexDouble": "<c16",
}  # fmt: skip
_MEMBER = re.compile(
    r"((?!\.\.?/)[^/\\\0]+)/"
    r"(data\.pkl|data/[0-9]{1,20}|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
_InPython: Any = pickle._Unpickler  # its steps are methods, unlike those of the one in C
# None from protocol 0, whose decimal numbers take quadratic time to read.
_STEPS = b"\x80(.N\x88\x89KMJ\x8aGUTX\x8c]})t\x85\x86\x87hjqr\x94c\x93QRae"
_HARMLESS_FLAGS = 0x0808  # sizes follow the data, names are UTF-8


def read(path: Path) -> Arrays:
    """Return the tensors of a state dict by name, in file order; bfloat16 becomes float32, tied weights share one."""
    advice = "Save only the weights, with torch.save(model.state_dict(), ...), or download them again."
    with refusing(path, "PyTorch weights", advice), path.open("rb") as file:
        head, size = file.read(20), os.fstat(file.fileno()).st_size
        if not head.startswith((b"PK\3\4", b"\x80")):
            raise Refused(f"it is not a PyTorch checkpoint (it starts with {quote(head)})")
        value, places = _read_zip(file) if head.startswith(b"PK") else _read_row(file, size)
        if isinstance(value, dict):  # training checkpoints nest it
            value = next((value[key] for key in ("state_dict", "model") if isinstance(value.get(key), dict)), value)
        if not isinstance(value, dict) or not value:
            raise Refused("it doesn't hold a state dict")
        arrays, by_name, room = Arrays(), Arrays(), size
        for name, tensor in value.items():
            if type(name) is not str or type(tensor) is not _Tensor:
                raise Refused(f"its entry {quote(str(name))} is not a tensor")
            # A file cannot predict the hash of text, so it cannot make its tensors collide.
            one, storage = f"{tensor.storage.key} {tensor.offset} {tensor.shape} {tensor.strides}", tensor.storage
            if one not in arrays:
                start, length = places.get(storage.key, (0, -1))
                if length != storage.count * storage.dtype.itemsize:
                    raise damaged(f"its storage {storage.key} is missing, or its size differs from its pickle")
                room -= tensor.span * storage.dtype.itemsize
                if room < 0:
                    raise Refused("its tensors share bytes and would take more memory than the size of the file")
                arrays[one] = tensor.read(file, start)
            by_name[name] = arrays[one]
        return by_name


def _read_zip(file: BinaryIO) -> tuple[object, Places]:
    """Return the pickled value and the places of its storages by key."""
    places = _members(file)
    if not 0 < places.get("data.pkl", (0, 0))[1] <= MOST_BYTES:
        raise Refused(f"it is a zip whose data.pkl is missing, empty or larger than {MOST_BYTES:,} bytes")
    if "byteorder" in places and _bytes_at(file, *places["byteorder"]) != b"little":
        raise Refused("its numbers are not little-endian")
    unpickler = _Unpickler(_bytes_at(file, *places["data.pkl"]))
    value = unpickler.load()
    if unpickler.file.read(1):
        raise damaged("its data.pkl continues after its end")
    return value, {name.removeprefix("data/"): place for name, place in places.items()}


def _members(file: BinaryIO) -> Places:
    """Return the places of a zip's members after checking that they don't overlap and their checksums match."""
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # ZipFile would read a table of any size
    if not end or end[5] > MOST_BYTES or end[8]:
        raise damaged("it does not end with the table of contents of its zip")
    with zipfile.ZipFile(file, metadata_encoding="utf-8") as archive:
        places, free, folders = Places(), 0, set[str]()
        for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
            known, name = _MEMBER.fullmatch(member.orig_filename), quote(member.orig_filename)
            if member.compress_type or member.flag_bits & ~_HARMLESS_FLAGS or member.file_size != member.compress_size:
                raise Refused(f"its member {name} is compressed or encrypted")
            if not known or len(folders | {known[1]}) > 1:
                raise Refused(f"its member {name} doesn't belong in a checkpoint")
            folders.add(known[1])
            start = member.header_offset + 30 + sum(struct.unpack("<2H", _bytes_at(file, member.header_offset + 26, 4)))
            if member.header_offset < free or known[2] in places or (member.header_offset and not places):
                raise damaged(f"its member {name} overlaps another")
            places[known[2]], free = (start, member.file_size), start + member.file_size
        if free > archive.start_dir or len(places) != end[4]:
            raise damaged("its table of contents doesn't match its members")
        if bad := archive.testzip():
            raise damaged(f"the checksum of its member {quote(bad)} doesn't match")
    return places


def _read_row(file: BinaryIO, size: int) -> tuple[object, Places]:
    """Do the same for a checkpoint from before PyTorch 1.6."""
    unpickler = _Unpickler(_bytes_at(file, 0, MOST_BYTES))
    if unpickler.load() != _MAGIC or unpickler.load() != _VERSION:
        raise Refused("it is a pickle that PyTorch didn't write")
    system, value, keys = unpickler.load(), unpickler.load(), unpickler.load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("its numbers are not little-endian")
    places, at = Places(), unpickler.file.tell()
    for key in keys:
        storage = unpickler.storages.get(key) if isinstance(key, str) else None
        if storage is None or _bytes_at(file, at, 8) != storage.count.to_bytes(8, "little"):
            raise damaged("its storages don't match its pickle")
        places[storage.key] = at + 8, storage.count * storage.dtype.itemsize
        at += 8 + places[storage.key][1]
    if at > size:
        raise damaged(f"it should have {at:,} bytes but has {size:,}")
    return value, places


def _bytes_at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]  # two plain bytes for bfloat16, which NumPy lacks
    count: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view within its storage; offset, strides and span (first to last) count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    span: int

    def read(self, file: BinaryIO, start: int) -> NDArray[Any]:
        """Return its elements as a C-ordered array; its storage starts at byte `start`."""
        item = self.storage.dtype.itemsize
        file.seek(start + self.offset * item)
        elements = np.fromfile(file, self.storage.dtype, self.span)
        # NumPy also rejects a view outside `elements`; an axis of length 1 may have any stride.
        steps = [step * item if length > 1 else 0 for length, step in zip(self.shape, self.strides, strict=True)]
        array = np.ndarray(self.shape, elements.dtype, elements, 0, steps).astype(elements.dtype, "C", copy=False)
        if array.dtype.kind == "b":
            array = array.view("u1") != 0
        if array.dtype.kind != "V":
            return array
        wide = array.view("<u2").astype("<u4")  # bfloat16 is the upper half of a float32
        wide <<= 16
        return wide.view("<f4")


def _naturals(*numbers: object) -> bool:
    """Tell whether all are ints (not bools) in the range of element counts."""
    return all(type(number) is int and 0 <= number < MOST_ELEMENTS for number in numbers)


class _Steps(dict[int, Any]):
    """The supported pickle opcodes; any other, and too many of them, are refused."""

    left = MOST_STEPS

    def __getitem__(self, step: int) -> Any:
        self.left -= 1
        if self.left < 0 or step not in self:
            raise Refused(f"its pickle has an unsupported step, {quote(bytes([step]))}, or too many steps")
        return super().__getitem__(step)


class _Unpickler(_InPython):  # type: ignore[misc]
    """Reads consecutive pickles; never recurses or sets attributes, and hashes only text and small numbers."""

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)
        super().__init__(self.file, encoding="utf-8")
        self.dispatch, self.storages = _Steps(self._KNOWN), dict[str, _Storage]()

    def load(self) -> Any:
        self.memo: dict[int, Any] = {}
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return self._ordered_dict
        if full not in _FOUND:
            raise Refused(f"it refers to {quote(full)}, which weights don't need (it was not run)")
        return _FOUND[full]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), str(), count, *view) if view in ([], [None]):
                storage = _Storage(key, dtype, count)
            case _:
                raise Refused("its pickle refers to something other than a tensor's storage")
        # Every tensor's text includes the key, so it must be short.
        if not re.fullmatch(r"[0-9]{1,20}", key, re.ASCII) or not _naturals(count):
            raise damaged("a storage in it has an impossible name or size")
        if self.storages.setdefault(key, storage) != storage:
            raise damaged(f"it describes storage {key} twice, differently")
        return storage

    def _ordered_dict(self, pairs: Iterable[Any] = ()) -> dict[Any, Any]:
        """Make a dict, from a list of pairs if Python 2 wrote it; a file may repeat one list many times."""
        made = dict[Any, Any]()
        for key, value in pairs:
            self.dispatch.left -= 1
            made[_key(key)] = value
        return made

    def _fill(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def _build(self) -> None:
        """Skip the state of an OrderedDict, the `_metadata` of a state dict."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise damaged("its pickle sets the state of something that has none")

    _KNOWN: ClassVar[dict[int, Any]] = {
        **{step: _InPython.dispatch[step] for step in _STEPS},
        pickle.SETITEM[0]: lambda self: self._fill([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._fill(self.pop_mark()),
        pickle.BUILD[0]: _build,
        pickle.FRAME[0]: lambda self: self.read(8),  # the length of a frame
    }


def _key(key: Any) -> Any:
    # Text hashes are salted and small numbers don't collide; other keys could collide on purpose and take forever.
    if not (type(key) is str or _naturals(key)):
        raise Refused("a dict in its pickle has a key that is neither text nor a number")
    return key


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _gradient: Any = None, _hooks: Any = None, metadata: Any = None
) -> _Tensor:
    """Describe a tensor after checking that it lies within its storage."""
    if not (
        type(storage) is _Storage and type(shape) is tuple and type(strides) is tuple
        and len(shape) == len(strides) <= MOST_AXES and _naturals(offset, *shape, *strides)
        and math.prod(length or 1 for length in shape) <= MOST_ELEMENTS  # NumPy also checks lengths next to a zero
    ):  # fmt: skip
        raise damaged("a tensor in it has an impossible shape")
    if metadata:
        raise Refused("a tensor in it is marked as conjugated or negated")
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    span = 0 if 0 in shape else last + 1
    if math.prod(shape) > storage.count or (span and offset + span > storage.count):
        raise damaged("a tensor in it extends beyond its storage")
    return _Tensor(storage, offset, shape, strides, span)


_FOUND: dict[str, Any] = {
    **{f"{module}.{kind}Storage": np.dtype(_TYPES[kind]) for kind in _TYPES for module in ("torch", "torch.cuda")},
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, _gradient, _hooks: tensor,
}


def array_of(arrays: Arrays, backbone: Backbone, key: str, *shape: int) -> NDArray[np.float32]:
    """Return one array of the published weights as float32; raise WeightsError if its shape differs."""
    advice = f"Use the published file, {backbone.published}."
    if key not in arrays:
        raise WeightsError(f"These weights don't belong to {backbone.name}: {key} is missing. {advice}")
    if arrays[key].shape != shape:
        both = arrays[key].shape, shape
        found, wanted = (" × ".join(f"{side:,}" for side in one) or "a single number" for one in both)
        raise WeightsError(f"These weights don't fit {backbone.name}: {key} is {found}, not {wanted}. {advice}")
    return np.ascontiguousarray(arrays[key], np.float32)
