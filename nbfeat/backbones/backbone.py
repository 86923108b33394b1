"""Backbone: what one network is called, takes and gives, and where it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from nbfeat.errors import RequestError

Scaling = Literal["caffe", "tf", "torch", "none"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
Package = Literal["keras.applications", "nbfeat.backbones"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A customary cut point: `channels` (at alpha 1) for every `stride` by `stride` pixels; stride 0 is a vector."""

    name: str
    stride: int
    channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A network without its classifier, built by `module` of `package`.

    `size` and `smallest` are input sides in pixels. `width` and `parameters` are those at alpha 1; the width is that of
    the default cut: the layer `end`, or where that is empty the last layer of the network, which is among `layers` only
    where Keras gives it a name of its own. `published` is the file of its weights where PyTorch
    publishes them, `alphas` are the width multipliers with published weights.
    """

    name: str
    family: str
    module: str
    size: int
    smallest: int
    width: int
    scaling: Scaling
    parameters: int
    layers: tuple[Layer, ...]
    package: Package = "keras.applications"
    end: str = ""
    published: str = ""
    alphas: tuple[float, ...] = ()
    default_weights: str = "imagenet"

    def width_at(self, alpha: float | None) -> int:
        """Return the width of the default cut when the network is built with `alpha`."""
        if alpha is None:
            return self.width
        if not self.alphas:
            message = f"{self.name} has no width multiplier: leave --alpha away."
            raise RequestError(message)
        if not 0 < alpha < float("inf"):
            message = f"--alpha {alpha} is no width multiplier for {self.name}: take a number above 0, such as 0.5."
            raise RequestError(message)
        if self.family == "MobileNetV2":
            # Its last convolution never gets narrower (Sandler et al. 2018), and wider in eights only.
            return max(self.width, int(self.width * alpha + 4) // 8 * 8)
        return int(self.width * alpha)
