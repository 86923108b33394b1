"""The pickle in a PyTorch checkpoint, taken as steps for a machine that can make descriptions of tensors, not run code.

The machine knows text, numbers, lists, dicts and tuples, and the few names that a state dict asks for; any other step
or name is refused before anything is made of it. It never recurses into what it made, and its work, its memory and the
text it reads are bounded by `MOST_STEPS` and `MOST_BYTES`, not by numbers in the file.

Sources: ``pickletools.py`` for the steps, ``torch/_utils.py`` and ``torch/serialization.py`` for the names.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from nbfeat.backbones.refusal import Refused, damaged, shown

T = TypeVar("T")

MOST_STEPS = 300_000  # a tensor takes about 35; a step takes up to 100 bytes of memory
MOST_BYTES = 4 << 20  # a tensor takes about 100
MOST_AXES = 32  # NumPy 1's limit
MOST_ELEMENTS = 1 << 48  # more than any file has, and far from where 64 bits overflow
_KEY = re.compile(r"[0-9]{1,20}", re.ASCII)
# What elements are in the file, and in arrays: NumPy has no bfloat16.
KINDS = {
    "Double": ("<f8", "<f8"),
    "Float": ("<f4", "<f4"),
    "Half": ("<f2", "<f2"),
    "BFloat16": ("<u2", "<f4"),
    "Long": ("<i8", "<i8"),
    "Int": ("<i4", "<i4"),
    "Short": ("<i2", "<i2"),
    "Char": ("|i1", "|i1"),
    "Byte": ("|u1", "|u1"),
    "Bool": ("|u1", "|b1"),
    "ComplexFloat": ("<c8", "<c8"),
    "ComplexDouble": ("<c16", "<c16"),
}
_STORAGES = {f"{module}.{kind}Storage": kind for kind in KINDS for module in ("torch", "torch.cuda")}
_NAMES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *_STORAGES,
}


def unwanted(what: str) -> Refused:
    """Make the refusal of a file that may be whole, but holds what is not read."""
    return Refused(f"{what}. Save the weights alone, with torch.save(model.state_dict(), ...), or download them again.")


@dataclass(frozen=True, slots=True)
class Storage:
    """`count` elements of a kind of `KINDS`, found in the file by `key`."""

    key: str
    kind: str
    count: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view that lies within its storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from its first to its last, those between that are not its own too."""
        if 0 in self.shape:
            return 0
        return 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class _Named:
    """One of `_NAMES`, asked for by a pickle."""

    name: str


class Machine:
    """Reads pickles that follow one another in `data`; `at` is where the next begins."""

    def __init__(self, data: bytes) -> None:
        self.at = 0
        self.storages: dict[str, Storage] = {}
        self._data = data
        self._steps = 0
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def load(self) -> object:
        """Return what the next pickle describes: plain data, and tensors as `Tensor`."""
        self._stack, self._marks, self._memo = [], [], {}
        while (step := self._take(1)) != b".":
            self._spend(1)
            if make := self._MAKES.get(step):
                self._stack.append(make(self))
            elif do := self._DOES.get(step):
                do(self)
            else:
                message = f"its pickle has a step, {shown(step)}, that no state dict needs"
                raise unwanted(message)
        value = self._pop()
        if self._stack or self._marks:
            raise damaged("its pickle ends with values left over")
        return value

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            message = f"its pickle has more than {MOST_STEPS:,} steps"
            raise unwanted(message)

    def _take(self, count: int) -> bytes:
        taken = self._data[self.at : self.at + count]
        if not 0 <= count == len(taken):
            raise damaged("its pickle ends early")
        self.at += count
        return taken

    def _number(self, form: str) -> int:
        number: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return number

    def _text(self, length: int) -> str:
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise damaged("its pickle has text that is not UTF-8") from None

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at, self.at + 200)
        line = self._text(end - self.at)
        self.at = end + 1
        return line

    def _pop(self) -> object:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise damaged("its pickle uses a value that it never made")
        return self._stack.pop()

    def _since_mark(self) -> list[object]:
        if not self._marks:
            raise damaged("its pickle uses a mark that it never set")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _last(self, count: int) -> tuple[object, ...]:
        return tuple([self._pop() for _ in range(count)][::-1])

    def _top(self, kind: type[T]) -> T:
        value = self._pop()
        if not isinstance(value, kind):
            message = f"its pickle has {type(value).__name__} where {kind.__name__} belongs"
            raise damaged(message)
        self._stack.append(value)
        return value

    def _put(self, index: int) -> None:
        self._memo[index] = self._top(object)

    def _get(self, index: int) -> object:
        if index not in self._memo:
            raise damaged("its pickle remembers a value that it never made")
        return self._memo[index]

    def _extend(self, values: Sequence[object]) -> None:
        self._top(list).extend(values)

    def _fill(self, values: Sequence[object]) -> None:
        if len(values) % 2:
            raise damaged("its pickle has a key without a value")
        _fill(self._top(dict), values)

    def _build(self) -> None:
        """Leave out the state of an OrderedDict, which is the `_metadata` of a state dict."""
        self._pop()
        self._top(dict)

    def _named(self, module: object, name: object) -> _Named:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a name that is no text"
        if full not in _NAMES:
            message = f"it asks for {shown(full)}, which weights do not need and which was not run"
            raise unwanted(message)
        return _Named(full)

    def _arguments(self) -> tuple[Any, ...]:
        values: tuple[Any, ...] = self._top(tuple)
        self._spend(len(values))  # one long tuple may be given many times
        self._stack.pop()
        return values

    def _stored(self) -> Storage:
        match self._arguments():
            case ("storage", _Named(name), str() as key, str(), int() as count, *view) if (
                name in _STORAGES and _KEY.fullmatch(key) and _naturals(count) and view in ([], [None])
            ):
                storage = Storage(key, _STORAGES[name], count)
            case _:
                raise unwanted("its pickle refers to what is not the storage of a tensor")
        if self.storages.setdefault(key, storage) != storage:
            message = f"it describes storage {key} in two ways"
            raise damaged(message)
        return storage

    def _called(self) -> object:
        arguments, named = self._arguments(), self._top(_Named)
        self._stack.pop()
        match named.name.rpartition(".")[2], arguments:
            case "OrderedDict", ():
                return {}
            case "OrderedDict", (list() as pairs,):  # as Python 2 wrote it
                self._spend(len(pairs))
                if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):  # noqa: PLR2004 - a pair
                    return _fill({}, [part for pair in pairs for part in pair])
            case "_rebuild_parameter", (Tensor() as tensor, *_):
                return tensor
            case "_rebuild_tensor" | "_rebuild_tensor_v2", (Storage(), int(), tuple(), tuple(), *_):
                return _tensor(*arguments)
        message = f"its pickle calls {named.name} with arguments that PyTorch does not write"
        raise unwanted(message)

    # Steps that put one value on the stack, and steps that do anything else. No step of protocol 0 is among them: its
    # numbers are decimal text, which takes quadratic time to read.
    _MAKES: ClassVar[dict[bytes, Callable[[Machine], object]]] = {
        b"N": lambda _: None,
        b"\x88": lambda _: True,
        b"\x89": lambda _: False,
        b"K": lambda self: self._number("<B"),
        b"M": lambda self: self._number("<H"),
        b"J": lambda self: self._number("<i"),
        b"\x8a": lambda self: int.from_bytes(self._take(self._number("<B")), "little", signed=True),
        b"G": lambda self: struct.unpack(">d", self._take(8))[0],
        b"U": lambda self: self._text(self._number("<B")),
        b"T": lambda self: self._text(self._number("<i")),
        b"X": lambda self: self._text(self._number("<I")),
        b"\x8c": lambda self: self._text(self._number("<B")),
        b"]": lambda _: [],
        b"}": lambda _: {},
        b")": lambda _: (),
        b"t": lambda self: tuple(self._since_mark()),
        b"\x85": lambda self: self._last(1),
        b"\x86": lambda self: self._last(2),
        b"\x87": lambda self: self._last(3),
        b"h": lambda self: self._get(self._number("<B")),
        b"j": lambda self: self._get(self._number("<I")),
        b"c": lambda self: self._named(self._line(), self._line()),
        b"\x93": lambda self: self._named(*self._last(2)),
        b"Q": lambda self: self._stored(),
        b"R": lambda self: self._called(),
    }
    _DOES: ClassVar[dict[bytes, Callable[[Machine], object]]] = {
        b"\x80": lambda self: self._take(1),  # which protocol
        b"\x95": lambda self: self._take(8),  # how long a frame is
        b"(": lambda self: self._marks.append(len(self._stack)),
        b"q": lambda self: self._put(self._number("<B")),
        b"r": lambda self: self._put(self._number("<I")),
        b"\x94": lambda self: self._put(len(self._memo)),
        b"a": lambda self: self._extend(self._last(1)),
        b"e": lambda self: self._extend(self._since_mark()),
        b"s": lambda self: self._fill(self._last(2)),
        b"u": lambda self: self._fill(self._since_mark()),
        b"b": lambda self: self._build(),
    }


def _fill(target: dict[object, object], values: Sequence[object]) -> dict[object, object]:
    for key, value in zip(values[::2], values[1::2], strict=True):
        # Text is hashed with a secret of the process and small numbers do not collide; other keys could take for ever.
        if not (isinstance(key, str) or _naturals(key)):
            raise unwanted("a dict in its pickle has a key that is neither text nor a number")
        target[key] = value
    return target


def _naturals(*numbers: object) -> bool:
    return all(isinstance(number, int) and 0 <= number < MOST_ELEMENTS for number in numbers)


def _tensor(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *more: object) -> Tensor:
    """Check that a view is within its storage: PyTorch's arguments are these, then gradient, hooks and flags."""
    if more[2:] and more[2]:
        raise unwanted("a tensor in it is to be conjugated or negated")
    if not len(shape) == len(strides) <= MOST_AXES or not _naturals(offset, *shape, *strides):
        raise damaged("a tensor in it has an impossible shape")
    # An axis of length 1 may have any stride.
    strides = tuple(stride if length > 1 else 0 for length, stride in zip(shape, strides, strict=True))
    tensor = Tensor(storage, offset, shape, strides)
    count = math.prod(shape)
    if count > storage.count or (count and offset + tensor.span > storage.count):
        raise damaged("a tensor in it reaches beyond its storage")
    if math.prod(length or 1 for length in shape) > MOST_ELEMENTS:
        raise damaged("a tensor in it has an impossible shape")
    return tensor
