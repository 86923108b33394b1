"""A tensor as PyTorch saves it: a view of a storage, described, checked, and read into an array.

Nothing is read, and no memory taken, before it is sure that the view lies within its storage and is not larger.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.refusal import Refused, damaged

MOST_AXES = 32  # NumPy 1's limit
MOST_ELEMENTS = 1 << 48  # more than any file has, and far from where 64 bits overflow
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
_KEY = re.compile(r"[0-9]{1,20}", re.ASCII)


def unwanted(what: str) -> Refused:
    """Make the refusal of a checkpoint that may be whole, but holds what is not read."""
    return Refused(f"{what}. Save the weights alone, with torch.save(model.state_dict(), ...), or download them again.")


def naturals(*numbers: object) -> bool:
    """Tell whether all are ints that a file may have so many elements; NumPy takes no bool for a length."""
    return all(type(number) is int and 0 <= number < MOST_ELEMENTS for number in numbers)


@dataclass(frozen=True, slots=True)
class Storage:
    """`count` elements of a kind of `KINDS`, found in the file by `key`."""

    key: str
    kind: str
    count: int

    def __post_init__(self) -> None:
        # The key is in the text of every tensor, so it is kept short.
        if not _KEY.fullmatch(self.key) or not naturals(self.count):
            raise damaged("a storage in it has an impossible name or size")

    @property
    def item(self) -> int:
        """Bytes of an element in the file."""
        return np.dtype(KINDS[self.kind][0]).itemsize


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view that lies within its storage; offset and strides count elements.

    Raises
    ------
    Refused
        Where it does not, or has more elements than its storage, as an expanded tensor has.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.shape) == len(self.strides) <= MOST_AXES or not naturals(
            self.offset, *self.shape, *self.strides
        ):
            raise damaged("a tensor in it has an impossible shape")
        # NumPy checks the lengths beside a zero too.
        if math.prod(length or 1 for length in self.shape) > MOST_ELEMENTS:
            raise damaged("a tensor in it has an impossible shape")
        if math.prod(self.shape) > self.storage.count or (self.span and self.offset + self.span > self.storage.count):
            raise damaged("a tensor in it reaches beyond its storage")

    @property
    def span(self) -> int:
        """Elements from its first to its last, those between that are not its own too."""
        if 0 in self.shape:
            return 0
        return 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))

    def read(self, file: BinaryIO, start: int) -> NDArray[Any]:
        """Return its elements from a file where its storage begins at byte `start`, as an array in C order."""
        item = self.storage.item
        file.seek(start + self.offset * item)
        in_file, given = map(np.dtype, KINDS[self.storage.kind])
        elements = np.fromfile(file, in_file, self.span)
        if elements.size != self.span:
            raise damaged("it became shorter while it was read")
        # NumPy too refuses a view that leaves `elements`. An axis of length 1 may have any stride.
        steps = [step * item if length > 1 else 0 for length, step in zip(self.shape, self.strides, strict=True)]
        view = np.ndarray(self.shape, in_file, elements, 0, steps)
        if self.storage.kind == "BFloat16":  # the upper half of a float32
            wide = view.astype("<u4", order="C")
            wide <<= 16
            return wide.view(given)
        return view.astype(given, order="C", copy=False)
