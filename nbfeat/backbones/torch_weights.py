"""The weights in a PyTorch checkpoint (``.pth``), read without PyTorch and without running what the file says.

A checkpoint is a pickle that describes tensors, and beside it the bytes of their storages: since PyTorch 1.6 as members
of a zip, before that in a row. Python's own unpickler, the one in Python, reads it with the steps and names that state
dicts need and no others (``torch/_utils.py``, ``torch/serialization.py``). Whatever a file holds, reading it runs
nothing, opens no other file, and takes no more memory than the tensors do that its own bytes can fill, a copy of one of
them, and some 50 MB.
"""

from __future__ import annotations

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
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.backbone import Backbone
from nbfeat.errors import Refused, WeightsError, damaged, quote, refusing

Arrays = dict[str, NDArray[Any]]
LayerWeights = dict[str, list[NDArray[np.float32]]]  # what each layer's `set_weights` takes, by the layer's name
Places = dict[str, tuple[int, int]]  # where the bytes of each storage begin in the file, and how many they are

MOST_BYTES = 4 << 20  # of a pickle, in which a tensor takes about 100, and of a zip's table of contents
MOST_STEPS = 500_000  # a tensor takes about 50; a step takes up to 100 bytes of memory
MOST_AXES = 32  # NumPy 1's limit
MOST_ELEMENTS = 1 << 48  # more than any file has, and far from where 64 bits overflow
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_TYPES = {
    "Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": "V2", "Long": "<i8", "Int": "<i4", "Short": "<i2",
    "Char": "|i1", "Byte": "|u1", "Bool": "|b1", "ComplexFloat": "<c8", "ComplexDouble": "<c16",
}  # fmt: skip
_MEMBER = re.compile(
    r"((?!\.\.?/)[^/\\\0]+)/"
    r"(data\.pkl|data/[0-9]{1,20}|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
_InPython: Any = pickle._Unpickler  # each step is a method, which the one in C lacks
# None is of protocol 0: its numbers are decimal text, which takes quadratic time to read.
_STEPS = b"\x80(.N\x88\x89KMJ\x8aGUTX\x8c]})t\x85\x86\x87hjqr\x94c\x93QRae"
_HARMLESS_FLAGS = 0x0808  # sizes follow the data, names are UTF-8


def read(path: Path) -> Arrays:
    """Return the tensors of a state dict by name, in the file's order; WeightsError where there is anything else.

    bfloat16, which NumPy lacks, becomes float32 without loss. Names of one tensor (tied weights) have one array.
    """
    advice = "Save the weights alone, with torch.save(model.state_dict(), ...), or download them again."
    with refusing(path, "PyTorch weights", advice), path.open("rb") as file:
        head, size = file.read(20), os.fstat(file.fileno()).st_size
        if not head.startswith((b"PK\3\4", b"\x80")):
            raise Refused(f"it is no checkpoint of PyTorch's (it begins with {quote(head)})")
        value, places = _read_zip(file) if head.startswith(b"PK") else _read_row(file, size)
        if isinstance(value, dict):  # it may be beside what training needs
            value = next((value[key] for key in ("state_dict", "model") if isinstance(value.get(key), dict)), value)
        if not isinstance(value, dict) or not value:
            raise Refused("it holds no state dict")
        arrays, by_name, room = Arrays(), Arrays(), size
        for name, tensor in value.items():
            if type(name) is not str or type(tensor) is not _Tensor:
                raise Refused(f"its entry {quote(str(name))} is no tensor")
            # Text has a hash that the file cannot foresee, to make all its tensors collide.
            one, storage = f"{tensor.storage.key} {tensor.offset} {tensor.shape} {tensor.strides}", tensor.storage
            if one not in arrays:
                start, length = places.get(storage.key, (0, -1))
                if length != storage.count * storage.dtype.itemsize:
                    raise damaged(f"its storage {storage.key} is missing or has another size than its pickle says")
                room -= tensor.span * storage.dtype.itemsize
                if room < 0:
                    raise Refused("its tensors share their bytes and would take more memory than the file has bytes")
                arrays[one] = tensor.read(file, start)
            by_name[name] = arrays[one]
        return by_name


def _read_zip(file: BinaryIO) -> tuple[object, Places]:
    """Return what the checkpoint describes, and where its storages lie, by their keys."""
    places = _members(file)
    if not 0 < places.get("data.pkl", (0, 0))[1] <= MOST_BYTES:
        raise Refused(f"it is a zip without the data.pkl of a checkpoint, or with one of over {MOST_BYTES:,} bytes")
    if "byteorder" in places and _bytes_at(file, *places["byteorder"]) != b"little":
        raise Refused("its numbers are not little-endian")
    unpickler = _Unpickler(_bytes_at(file, *places["data.pkl"]))
    value = unpickler.load()
    if unpickler.file.read(1):
        raise damaged("its data.pkl goes on after its end")
    return value, {name.removeprefix("data/"): place for name, place in places.items()}


def _members(file: BinaryIO) -> Places:
    """Return where the members of a zip lie, once it is sure that they lie apart, and as they were written."""
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
                raise Refused(f"its member {name} is none that a checkpoint has")
            folders.add(known[1])
            start = member.header_offset + 30 + sum(struct.unpack("<2H", _bytes_at(file, member.header_offset + 26, 4)))
            if member.header_offset < free or known[2] in places or (member.header_offset and not places):
                raise damaged(f"its member {name} overlaps another")
            places[known[2]], free = (start, member.file_size), start + member.file_size
        if free > archive.start_dir or len(places) != end[4]:
            raise damaged("its table of contents is not that of its members")
        if bad := archive.testzip():
            raise damaged(f"the bytes of its member {quote(bad)} are not those that were written")
    return places


def _read_row(file: BinaryIO, size: int) -> tuple[object, Places]:
    """Return what a checkpoint from before PyTorch 1.6 describes, and where its storages lie, by their keys."""
    unpickler = _Unpickler(_bytes_at(file, 0, MOST_BYTES))
    if unpickler.load() != _MAGIC or unpickler.load() != _VERSION:
        raise Refused("it is a pickle, but none that PyTorch wrote")
    system, value, keys = unpickler.load(), unpickler.load(), unpickler.load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("its numbers are not little-endian")
    places, at = Places(), unpickler.file.tell()
    for key in keys:
        storage = unpickler.storages.get(key) if isinstance(key, str) else None
        if storage is None or _bytes_at(file, at, 8) != storage.count.to_bytes(8, "little"):
            raise damaged("its storages are not those that its pickle describes")
        places[storage.key] = at + 8, storage.count * storage.dtype.itemsize
        at += 8 + places[storage.key][1]
    if at > size:
        raise damaged(f"it should have {at:,} bytes and has {size:,}")
    return value, places


def _bytes_at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]  # two plain bytes for bfloat16, which NumPy has not
    count: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view that lies within its storage; offset, strides and span, from its first to its last, count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    span: int

    def read(self, file: BinaryIO, start: int) -> NDArray[Any]:
        """Return its elements from a file where its storage begins at byte `start`, as an array in C order."""
        item = self.storage.dtype.itemsize
        file.seek(start + self.offset * item)
        elements = np.fromfile(file, self.storage.dtype, self.span)
        # NumPy too refuses a view that leaves `elements`. An axis of length 1 may have any stride.
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
    """Tell whether all are ints that a file may have so many elements; NumPy takes no bool for a length."""
    return all(type(number) is int and 0 <= number < MOST_ELEMENTS for number in numbers)


class _Steps(dict[int, Any]):
    """What each step of a pickle does; any other step, and one too many, is refused."""

    left = MOST_STEPS

    def __getitem__(self, step: int) -> Any:
        self.left -= 1
        if self.left < 0 or step not in self:
            raise Refused(f"its pickle has a step, {quote(bytes([step]))}, that no state dict needs, or too many")
        return super().__getitem__(step)


class _Unpickler(_InPython):  # type: ignore[misc]
    """Reads pickles in a row; it recurses into nothing, sets no attributes, hashes only text and small numbers."""

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
            raise Refused(f"it asks for {quote(full)}, which weights do not need and which was not run")
        return _FOUND[full]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), str(), count, *view) if view in ([], [None]):
                storage = _Storage(key, dtype, count)
            case _:
                raise Refused("its pickle refers to what is not the storage of a tensor")
        # The key is in the text of every tensor, so it is kept short.
        if not re.fullmatch(r"[0-9]{1,20}", key, re.ASCII) or not _naturals(count):
            raise damaged("a storage in it has an impossible name or size")
        if self.storages.setdefault(key, storage) != storage:
            raise damaged(f"it describes storage {key} in two ways")
        return storage

    def _ordered_dict(self, pairs: Iterable[Any] = ()) -> dict[Any, Any]:
        """Make a dict of nothing, or of a list of pairs, as Python 2 wrote it; one list may be given many times."""
        made = dict[Any, Any]()
        for key, value in pairs:
            self.dispatch.left -= 1
            made[_key(key)] = value
        return made

    def _fill(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def _build(self) -> None:
        """Leave out the state of an OrderedDict, which is the `_metadata` of a state dict."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise damaged("its pickle sets what has no state")

    _KNOWN: ClassVar[dict[int, Any]] = {
        **{step: _InPython.dispatch[step] for step in _STEPS},
        pickle.SETITEM[0]: lambda self: self._fill([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._fill(self.pop_mark()),
        pickle.BUILD[0]: _build,
        pickle.FRAME[0]: lambda self: self.read(8),  # how long a frame is
    }


def _key(key: Any) -> Any:
    # Text is hashed with a secret of the process and small numbers do not collide; other keys could take for ever.
    if not (type(key) is str or _naturals(key)):
        raise Refused("a dict in its pickle has a key that is neither text nor a number")
    return key


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _gradient: Any = None, _hooks: Any = None, metadata: Any = None
) -> _Tensor:
    """Describe a tensor that lies within its storage and has no more elements than it."""
    if not (
        type(storage) is _Storage and type(shape) is tuple and type(strides) is tuple
        and len(shape) == len(strides) <= MOST_AXES and _naturals(offset, *shape, *strides)
        and math.prod(length or 1 for length in shape) <= MOST_ELEMENTS  # NumPy checks those beside a zero too
    ):  # fmt: skip
        raise damaged("a tensor in it has an impossible shape")
    if metadata:
        raise Refused("a tensor in it is to be conjugated or negated")
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    span = 0 if 0 in shape else last + 1
    if math.prod(shape) > storage.count or (span and offset + span > storage.count):
        raise damaged("a tensor in it reaches beyond its storage")
    return _Tensor(storage, offset, shape, strides, span)


_FOUND: dict[str, Any] = {
    **{f"{module}.{kind}Storage": np.dtype(_TYPES[kind]) for kind in _TYPES for module in ("torch", "torch.cuda")},
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, _gradient, _hooks: tensor,
}


class Convolution(NamedTuple):
    """A convolution of a network written here."""

    name: str  # in Keras
    key: str  # in a state dict
    before: int  # channels
    after: int
    side: int  # of the kernel


def array_of(arrays: Arrays, backbone: Backbone, key: str, *shape: int) -> NDArray[np.float32]:
    """Return one array of what is published for `backbone`, as float32; WeightsError where it is not of this shape."""
    advice = f"Take the file that torchvision publishes, {backbone.published}."
    if key not in arrays:
        raise WeightsError(f"There is no {key} among these weights, so they are not {backbone.name}'s. {advice}")
    if arrays[key].shape != shape:
        both = arrays[key].shape, shape
        found, wanted = (" × ".join(f"{side:,}" for side in one) or "a single number" for one in both)
        raise WeightsError(f"{key} is {found}; {backbone.name} has {wanted} there. {advice}")
    return np.ascontiguousarray(arrays[key], np.float32)
