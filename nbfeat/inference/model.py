"""Blocks that share a backbone become one Keras model: raw uint8 pixels in, pooled vectors out.

Pixel scaling, the cuts and the pooling lie inside the model; normalization of features does not. Everything that
changes the numbers is in NetworkSpec, and its `key` names the built network on disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nbfeat.backbones import keras_applications, user_models, weights
from nbfeat.backbones.backbone import Backbone, Scaling
from nbfeat.backbones.catalog import find
from nbfeat.errors import RequestError, near, sentences
from nbfeat.extraction.options import FeatureBlock, Pooling
from nbfeat.inference.channels_first import MAP_RANK, gives_the_same, turn_channels_first
from nbfeat.inference.signs import made_by, maps_with_negative_values

if TYPE_CHECKING:
    import keras

NUMERICS = 2  # raised whenever a change here changes the numbers that come out
GEM_POWER = 3.0  # Radenović et al. 2018, "Fine-tuning CNN image retrieval with no human annotation"


@dataclass(frozen=True, slots=True, order=True)
class Cut:
    """One output of a network: where it is cut, and how a map there is pooled ("" for the default)."""

    layer: str = ""
    pooling: Pooling | str = ""

    @property
    def key(self) -> str:
        """The name of the output in the built model."""
        return f"{self.layer or 'end'}:{self.pooling or 'default'}"


@dataclass(frozen=True, slots=True)
class Output:
    """What a cut turned out to be once the network was built."""

    width: int
    pooling: Pooling | None
    shape: tuple[int, ...]  # of the layer, channels last, without the batch
    negative: bool  # whether values below zero can occur, which GeM would lose


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """Everything that decides a network's numbers.

    A network in a file of the user's own is told by `weights`, the path of the file, which the key replaces by its
    content.
    """

    backbone: str
    alpha: float | None
    weights: str
    scaling: Scaling
    size: int
    cuts: tuple[Cut, ...]

    @classmethod
    def of(cls, blocks: Iterable[FeatureBlock]) -> NetworkSpec:
        """Describe the one network that serves `blocks`, which share everything but cut, normalization and prefix."""
        blocks = list(blocks)
        first, backbone = blocks[0], find(blocks[0].backbone)
        cuts = tuple(sorted({cut_of(block) for block in blocks}))
        if backbone.is_user_model:
            return cls._of_own(backbone, first, cuts)
        chosen = first.weights or backbone.default_weights
        spec = cls(
            backbone=backbone.name,
            alpha=first.alpha,
            weights=chosen if chosen in weights.NAMED else str(weights.weights_file(chosen)),
            scaling=first.scaling or backbone.scaling,
            size=first.size or backbone.size,
            cuts=cuts,
        )
        keras_applications.check(backbone, size=spec.size, alpha=spec.alpha, weights=spec.weights)
        return spec

    @classmethod
    def _of_own(cls, backbone: Backbone, block: FeatureBlock, cuts: tuple[Cut, ...]) -> NetworkSpec:
        given = {name: getattr(block, name) for name in ("size", "alpha", "weights", "scaling")}
        size, is_file = user_models.check(backbone, **given), backbone.package == "file"
        return cls(
            backbone=user_models.NAME if is_file else backbone.name,
            alpha=None,
            weights=backbone.name if is_file else backbone.default_weights,
            scaling=block.scaling or backbone.scaling,
            size=size,
            cuts=cuts,
        )

    @property
    def network(self) -> Backbone:
        """The backbone that is built."""
        return find(self.weights if self.backbone == user_models.NAME else self.backbone)

    @property
    def is_registered(self) -> bool:
        """Whether a function of the user's builds it, in this process."""
        return self.network.package == "registered"

    @property
    def title(self) -> str:
        """What it is called where people read it."""
        return self.network.title

    def key(self, **versions: str) -> str:
        """Name this network, as `versions` of the libraries would build it, in 40 hexadecimal digits."""
        content = self.weights
        if content == "bundled":
            content = find(self.backbone).bundled  # another release may bring others
        elif content not in weights.NAMED:
            content = weights.digest(weights.weights_file(content))
        parts = {**asdict(self), "weights": content, "numerics": NUMERICS, **versions}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]

    @classmethod
    def from_json(cls, text: str) -> NetworkSpec:
        """Read what ``json.dumps(asdict(spec))`` wrote."""
        parts = json.loads(text)
        return cls(**{**parts, "cuts": tuple(Cut(**cut) for cut in parts["cuts"])})


def cut_of(block: FeatureBlock) -> Cut:
    """Return the output of the network that `block` reads."""
    return Cut(block.layer or "", block.pooling or "")


@dataclass(frozen=True, slots=True)
class Built:
    """A Keras model from raw pixels to a dict of vectors, and what is known of it."""

    model: keras.Model
    outputs: dict[str, Output]
    weights: weights.Loaded


Base = tuple["keras.Model", weights.Loaded]


def build(spec: NetworkSpec, tell: weights.Tell, *, channels_first: bool = False, base: Base | None = None) -> Built:
    """Build the network of `spec` in this process, on the backend that Keras has here.

    With `channels_first` the trunk works in the layout that OpenVINO is two to five times faster in, where the network
    can be turned; pixels come in, and vectors go out, the same way. A `base` that is there already is used as it is.
    """
    base = base or load_base(spec, tell)
    if not channels_first:
        return _assembled(spec, base)
    if not spec.network.is_user_model:
        return _assembled(spec, base, turn_channels_first(base[0]))
    straight = _assembled(spec, base)
    # Of what layers like these do in the other layout nothing is known: some work along the last axis, whatever it is.
    with contextlib.suppress(Exception):
        turned = turn_channels_first(base[0])
        if turned is not None:
            built = _assembled(spec, base, turned)
            if built.outputs == straight.outputs and gives_the_same(built.model, straight.model):
                return built
    return straight


def _assembled(spec: NetworkSpec, base: Base, turned: keras.Model | None = None) -> Built:
    """Put scaling before the base, or what it was turned into, and cuts and pooling after it."""
    backbone, keras = spec.network, cast("Any", importlib.import_module("keras"))
    negative = maps_with_negative_values(base[0])
    trunk: Any = turned or base[0]
    tensors = {cut: _tensor_at(trunk, cut, backbone) for cut in spec.cuts}
    heads, outputs = {}, {}
    for cut, tensor in tensors.items():
        ends_in_norm = isinstance(trunk.layers[-1], keras.layers.LayerNormalization)
        pooling = _pooling(cut, tensor, backbone)
        # In mixed precision a network gives fewer bits than pooling is to have.
        tensor = tensor if tensor.dtype == "float32" else keras.ops.cast(tensor, "float32")  # noqa: PLW2901
        norm = trunk.layers[-1] if ends_in_norm and not backbone.is_user_model and not cut.layer else None
        norm = norm if pooling in {"avg", "max"} else None
        head = pool(trunk.layers[-1].input if norm else tensor, pooling, channels_first=turned is not None)
        # Keras' ConvNeXt normalizes *after* pooling when it is asked to pool.
        heads[cut.key] = norm(head) if norm else head
        shape = _channels_last(tuple(tensor.shape[1:]), turned is not None)
        # What plain operations at the end of a network of the user's own give may be anything.
        name = made_by(_tensor_at(base[0], cut, backbone))
        outputs[cut.key] = Output(int(heads[cut.key].shape[-1]), pooling, shape, negative.get(name, True))
    features = keras.Model(trunk.inputs, heads)
    pixels = keras.Input((spec.size, spec.size, 3), dtype="uint8", name="pixels")
    x = scale(pixels, spec.scaling)
    x = keras.ops.transpose(x, (0, 3, 1, 2)) if turned is not None else x
    return Built(keras.Model(pixels, features(x, training=False)), outputs, base[1])


def load_base(spec: NetworkSpec, tell: weights.Tell) -> Base:
    """Build the backbone without classifier and give it its weights."""
    backbone = spec.network
    if backbone.package == "registered":
        network = user_models.build(backbone, spec.size)
        loaded = weights.Loaded(backbone.name, weights.digest_of_arrays(network.get_weights()))
    elif backbone.package == "file":
        path = Path(backbone.name)
        network, loaded = user_models.load(path, spec.size), weights.Loaded(path.name, weights.digest(path))
    else:
        make = functools.partial(keras_applications.build, backbone, size=spec.size, alpha=spec.alpha)
        return weights.load(backbone, lambda name: make(weights=name), spec.weights, tell)
    user_models.check_pixels(network, spec.scaling, backbone.title)
    return network, loaded


def scale(pixels: Any, scaling: Scaling) -> Any:
    """Scale pixels 0 … 255 as ``keras.applications.imagenet_utils.preprocess_input`` does in mode `scaling`."""
    ops: Any = importlib.import_module("keras").ops
    x = ops.cast(pixels, "float32")
    match scaling:
        case "tf":
            return x / 127.5 - 1.0
        case "torch":
            return (x / 255.0 - ops.array([0.485, 0.456, 0.406], "float32")) / ops.array(
                [0.229, 0.224, 0.225], "float32"
            )
        case "caffe":
            return ops.flip(x, axis=-1) - ops.array([103.939, 116.779, 123.68], "float32")
    return x


def pool(x: Any, pooling: Pooling | None, *, channels_first: bool) -> Any:
    """Make a vector of a feature map, in float32; `None` leaves a vector as it is."""
    ops: Any = importlib.import_module("keras").ops
    across = (2, 3) if channels_first else (1, 2)
    match pooling:
        case "avg":
            return ops.mean(x, axis=across)
        case "max":
            return ops.max(x, axis=across)
        case "gem":
            return ops.power(ops.mean(ops.power(ops.maximum(x, 1e-6), GEM_POWER), axis=across), 1 / GEM_POWER)
        case "flatten":
            x = ops.transpose(x, (0, 2, 3, 1)) if channels_first else x
            return ops.reshape(x, (-1, int(x.shape[1]) * int(x.shape[2]) * int(x.shape[3])))
    return x


def _pooling(cut: Cut, tensor: Any, backbone: Backbone) -> Pooling | None:
    rank, where = len(tensor.shape), cut.layer or f"The end of {backbone.title}"
    if rank == MAP_RANK:
        return cut.pooling or "avg"  # type: ignore[return-value]
    if rank != 2:
        raise RequestError(
            f"{where} gives tensors of shape {tuple(tensor.shape[1:])}; cut at a feature map or a vector."
        )
    if cut.pooling:
        raise RequestError(
            f"{where} already gives a vector of {tensor.shape[-1]:,}; leave --pooling {cut.pooling} away."
        )
    return None


def _tensor_at(network: Any, cut: Cut, backbone: Backbone) -> Any:
    if backbone.is_user_model:
        return user_models.output_of(network, cut.layer, backbone.title)
    names = [layer.name for layer in network.layers[1:]]
    if cut.layer and cut.layer not in names:
        customary = ", ".join(layer.name for layer in backbone.layers)
        raise RequestError(
            sentences(
                f"{backbone.name} has no layer {cut.layer!r}.",
                near(cut.layer, names) or f"Customary ones: {customary}.",
                f"`nbfeat.layers({backbone.name!r})` lists all.",
            )
        )
    name = cut.layer or backbone.end
    return (network.get_layer(name) if name else network.layers[-1]).output


def _channels_last(shape: tuple[int, ...], turned: bool) -> tuple[int, ...]:
    return (*shape[1:], shape[0]) if turned and len(shape) == MAP_RANK - 1 else shape


def group(blocks: Iterable[FeatureBlock], by: Callable[[FeatureBlock], Any]) -> list[list[FeatureBlock]]:
    """Gather the blocks that `by` calls equal, in order of first appearance."""
    groups: dict[Any, list[FeatureBlock]] = {}
    for block in blocks:
        groups.setdefault(by(block), []).append(block)
    return list(groups.values())
