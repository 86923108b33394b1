"""The pickle in a PyTorch checkpoint, taken as steps for a machine that can make descriptions of tensors, not run code.

The machine knows text, numbers, lists, dicts and tuples, and the few names that a state dict asks for; any other step
or name is refused before anything is made of it. It never recurses into what it made, and its work, its memory and the
text it reads are bounded by `MOST_STEPS` and `MOST_BYTES`, not by numbers in the file.

Sources: ``pickletools.py`` for the steps, ``torch/_utils.py`` and ``torch/serialization.py`` for the names.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from nbfeat.backbones.refusal import damaged, quote
from nbfeat.backbones.torch_tensor import KINDS, Storage, Tensor, naturals, unwanted

T = TypeVar("T")

MOST_STEPS = 500_000  # a tensor takes about 50; a step takes up to 100 bytes of memory
MOST_BYTES = 4 << 20  # a tensor takes about 100
_STORAGES = {f"{module}.{kind}Storage": kind for kind in KINDS for module in ("torch", "torch.cuda")}
_NAMES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *_STORAGES,
}


@dataclass(frozen=True, slots=True)
class Name:
    """One of `_NAMES`, which a pickle asked for."""

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
        self._tensors: dict[str, Tensor] = {}

    def load(self) -> object:
        """Return what the next pickle describes: plain data, and tensors as `Tensor`, the same ones as one object."""
        self._stack, self._marks, self._memo = [], [], {}
        while (step := self._take(1)) != b".":
            self._spend(1)
            if make := self._MAKES.get(step):
                self._stack.append(make(self))
            elif do := self._DOES.get(step):
                do(self)
            else:
                raise unwanted(f"its pickle has a step, {quote(step)}, that no state dict needs")
        value = self._pop()
        if self._stack or self._marks:
            raise damaged("its pickle ends with values left over")
        return value

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise unwanted(f"its pickle has more than {MOST_STEPS:,} steps")

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
            raise damaged(f"its pickle has {type(value).__name__} where {kind.__name__} belongs")
        self._stack.append(value)
        return value

    def _of(self, kind: type[T]) -> T:
        value = self._top(kind)
        self._stack.pop()
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

    def _named(self, module: str, name: str) -> Name:
        full = f"{module}.{name}"
        if full not in _NAMES:
            raise unwanted(f"it asks for {quote(full)}, which weights do not need and which was not run")
        return Name(full)

    def _arguments(self) -> tuple[Any, ...]:
        values: tuple[Any, ...] = self._of(tuple)
        self._spend(len(values))  # one long tuple may be given many times
        return values

    def _stored(self) -> Storage:
        match self._arguments():
            case ("storage", Name(name), str() as key, str(), int() as count, *view) if name in _STORAGES and not any(
                view
            ):
                storage = Storage(key, _STORAGES[name], count)
            case _:
                raise unwanted("its pickle refers to what is not the storage of a tensor")
        if self.storages.setdefault(key, storage) != storage:
            raise damaged(f"it describes storage {key} in two ways")
        return storage

    def _called(self) -> object:
        arguments, named = self._arguments(), self._of(Name)
        match named.name.rpartition(".")[2], arguments:
            case "OrderedDict", ():
                return {}
            case "OrderedDict", (list() as pairs,):  # as Python 2 wrote it
                self._spend(len(pairs))
                if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
                    return _fill({}, [part for pair in pairs for part in pair])
            case "_rebuild_parameter", (Tensor() as tensor, *_):
                return tensor
            case "_rebuild_tensor" | "_rebuild_tensor_v2", (Storage(), int(), tuple(), tuple(), *more):
                if more[2:] and more[2]:  # after gradient and hooks
                    raise unwanted("a tensor in it is to be conjugated or negated")
                tensor = Tensor(*arguments[:4])
                # Text has a hash that the file cannot foresee, to make all its tensors collide.
                return self._tensors.setdefault(repr(tensor), tensor)
        raise unwanted(f"its pickle calls {named.name} with arguments that PyTorch does not write")

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
        b"\x93": lambda self: self._named(*[self._of(str), self._of(str)][::-1]),
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
        if not (isinstance(key, str) or naturals(key)):
            raise unwanted("a dict in its pickle has a key that is neither text nor a number")
        target[key] = value
    return target
