"""Take a PyTorch state dict apart: its arrays, checked, in the order and layout in which Keras layers keep theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbfeat.backbones.backbone import Backbone
from nbfeat.errors import WeightsError

Arrays = Mapping[str, NDArray[Any]]
LayerWeights = dict[str, list[NDArray[np.float32]]]  # what each layer's `set_weights` takes, by the layer's name


class Convolution(NamedTuple):
    """A convolution: its name in Keras, its key in a state dict, channels before and after, the side of its kernel."""

    name: str
    key: str
    before: int
    after: int
    side: int


@dataclass(frozen=True, slots=True)
class StateDict:
    """Arrays by PyTorch's names, which should be those that are published for `backbone`."""

    arrays: Arrays
    backbone: Backbone

    def take(self, key: str, *shape: int) -> NDArray[np.float32]:
        """Return one array as float32; raise WeightsError where it is missing or of another shape than `shape`."""
        if key not in self.arrays:
            raise WeightsError(
                f"There is no {key} among these weights, so they are not {self.backbone.name}'s. {self._advice}"
            )
        array = self.arrays[key]
        if array.shape != shape:
            raise WeightsError(
                f"{key} is {_sides(array.shape)}; {self.backbone.name} has {_sides(shape)} there. {self._advice}"
            )
        return np.ascontiguousarray(array, np.float32)

    @property
    def _advice(self) -> str:
        return f"Take the file that torchvision publishes, {self.backbone.published}."

    def kernel(self, name: str, before: int, after: int, side: int) -> NDArray[np.float32]:
        """Return the kernel of a convolution: (outputs, inputs, rows, columns) → (rows, columns, inputs, outputs)."""
        return np.ascontiguousarray(self.take(f"{name}.weight", after, before, side, side).transpose(2, 3, 1, 0))

    def batch_norm(self, name: str, channels: int) -> list[NDArray[np.float32]]:
        """Return gamma, beta, moving mean and moving variance."""
        parts = ("weight", "bias", "running_mean", "running_var")
        return [self.take(f"{name}.{part}", channels) for part in parts]


def _sides(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{side:,}" for side in shape) or "a single number"
