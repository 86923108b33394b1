"""Blocks that share a backbone become one Keras model: raw uint8 pixels in, pooled vectors out.

Pixel scaling, the cuts and the pooling lie inside the model; normalization of features does not. Everything that
changes the numbers is in NetworkSpec, and its `key` names the built network on disk.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nbfeat.backbones import applications, weights
from nbfeat.backbones.backbone import Backbone, Scaling
from nbfeat.backbones.catalog import find
from nbfeat.errors import NetworkError, RequestError, near, sentences
from nbfeat.features.block import FeatureBlock, Pooling

if TYPE_CHECKING:
    import keras

NUMERICS = 1  # raised whenever a change here changes the numbers that come out
GEM_POWER = 3.0  # Radenović et al. 2018, "Fine-tuning CNN image retrieval with no human annotation"
MAP_RANK = 4


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
    """Everything that decides a network's numbers."""

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
        chosen = first.weights or backbone.default_weights
        spec = cls(
            backbone=backbone.name,
            alpha=first.alpha,
            weights=chosen if chosen in {"imagenet", "random"} else str(weights.weights_file(chosen)),
            scaling=first.scaling or backbone.scaling,
            size=first.size or backbone.size,
            cuts=tuple(sorted({cut_of(block) for block in blocks})),
        )
        applications.check(backbone, size=spec.size, alpha=spec.alpha, weights=spec.weights)
        return spec

    def key(self, **versions: str) -> str:
        """Name this network, as `versions` of the libraries would build it, in 40 hexadecimal digits."""
        file = self.weights not in {"imagenet", "random"}
        content = weights.digest(weights.weights_file(self.weights)) if file else self.weights
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


def build(spec: NetworkSpec, tell: weights.Tell, *, channels_first: bool = False) -> Built:
    """Build the network of `spec` in this process, on the backend that Keras has here.

    With `channels_first` the trunk works in the layout that OpenVINO is two to five times faster in, where the network
    can be turned; pixels come in, and vectors go out, the same way.
    """
    backbone = find(spec.backbone)
    base, loaded = load_base(spec, tell)
    keras: Any = importlib.import_module("keras")
    negative = maps_with_negative_values(base)
    turned = turn_channels_first(base) if channels_first else None
    trunk = turned or base
    tensors = {cut: _tensor_at(trunk, cut, backbone) for cut in spec.cuts}
    heads, outputs = {}, {}
    for cut, tensor in tensors.items():
        is_end_norm = not cut.layer and isinstance(trunk.layers[-1], keras.layers.LayerNormalization)
        pooling = _pooling(cut, tensor)
        norm = trunk.layers[-1] if is_end_norm and pooling in {"avg", "max"} else None
        head = pool(trunk.layers[-1].input if norm else tensor, pooling, channels_first=turned is not None)
        # Keras' ConvNeXt normalizes *after* pooling when it is asked to pool.
        heads[cut.key] = norm(head) if norm else head
        shape = _channels_last(tuple(tensor.shape[1:]), turned is not None)
        name = _layer_at(base, cut, backbone).name
        outputs[cut.key] = Output(int(heads[cut.key].shape[-1]), pooling, shape, negative[name])
    features = keras.Model(trunk.inputs, heads)
    pixels = keras.Input((spec.size, spec.size, 3), dtype="uint8", name="pixels")
    x = scale(pixels, spec.scaling)
    x = keras.ops.transpose(x, (0, 3, 1, 2)) if turned is not None else x
    return Built(keras.Model(pixels, features(x, training=False)), outputs, loaded)


def load_base(spec: NetworkSpec, tell: weights.Tell) -> tuple[keras.Model, weights.Loaded]:
    """Build the backbone without classifier and give it its weights."""
    backbone = find(spec.backbone)
    make = functools.partial(applications.build, backbone, size=spec.size, alpha=spec.alpha)
    return weights.load(backbone, lambda name: make(weights=name), spec.weights, tell)


def scale(pixels: Any, scaling: Scaling) -> Any:  # noqa: ANN401 - a tensor of whichever backend
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


def pool(x: Any, pooling: Pooling | None, *, channels_first: bool) -> Any:  # noqa: ANN401 - a tensor of whichever backend
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


def _pooling(cut: Cut, tensor: Any) -> Pooling | None:  # noqa: ANN401 - a Keras tensor
    rank = len(tensor.shape)
    if rank == MAP_RANK:
        return cut.pooling or "avg"  # type: ignore[return-value]
    if rank != 2:  # noqa: PLR2004 - batch and features
        message = f"{cut.layer} gives tensors of shape {tuple(tensor.shape[1:])}; cut at a feature map or a vector."
        raise RequestError(message)
    if cut.pooling:
        message = f"{cut.layer} already gives a vector of {tensor.shape[-1]:,}; leave --pooling {cut.pooling} away."
        raise RequestError(message)
    return None


def _layer_at(network: Any, cut: Cut, backbone: Backbone) -> Any:  # noqa: ANN401 - Keras layers are not typed
    name = cut.layer or backbone.end
    return network.get_layer(name) if name else network.layers[-1]


def _tensor_at(network: Any, cut: Cut, backbone: Backbone) -> Any:  # noqa: ANN401 - a Keras tensor
    names = [layer.name for layer in network.layers[1:]]
    if cut.layer and cut.layer not in names:
        customary = ", ".join(layer.name for layer in backbone.layers)
        message = sentences(
            f"{backbone.name} has no layer {cut.layer!r}.",
            near(cut.layer, names) or f"Customary ones: {customary}.",
            f"`nbfeat.layers({backbone.name!r})` lists all.",
        )
        raise RequestError(message)
    return _layer_at(network, cut, backbone).output


def _channels_last(shape: tuple[int, ...], turned: bool) -> tuple[int, ...]:  # noqa: FBT001 - private
    return (*shape[1:], shape[0]) if turned and len(shape) == MAP_RANK - 1 else shape


def turn_channels_first(base: keras.Model) -> keras.Model | None:
    """Clone `base` with channels before rows and columns; None where it cannot be (ConvNeXt's nested parts)."""
    keras: Any = importlib.import_module("keras")
    layers = keras.layers
    if any(hasattr(layer, "layers") for layer in base.layers):
        return None

    def turn(layer: Any) -> Any:  # noqa: ANN401 - Keras layers are not typed
        if isinstance(layer, layers.InputLayer):
            return layer
        config = layer.get_config()
        if "data_format" in config:
            config["data_format"] = "channels_first"
        if isinstance(layer, layers.BatchNormalization | layers.Concatenate | layers.Normalization):
            config["axis"] = 1
        if isinstance(layer, layers.Reshape) and len(config["target_shape"]) == MAP_RANK - 1:
            rows, columns, channels = config["target_shape"]
            config["target_shape"] = (channels, rows, columns)
        if isinstance(layer, layers.Rescaling) and isinstance(config["scale"], list | tuple):
            config["scale"] = [[[value]] for value in config["scale"]]
        return type(layer).from_config(config)

    rows, columns, channels = base.input_shape[1:]
    turned = keras.models.clone_model(base, input_tensors=keras.Input((channels, rows, columns)), clone_function=turn)
    turned.set_weights(base.get_weights())
    if turned.output_shape[1] != base.output_shape[-1]:
        message = f"{base.name} could not be turned channels-first: {turned.output_shape} from {base.output_shape}."
        raise NetworkError(message)
    return turned


_ALWAYS_POSITIVE = {"relu", "relu6", "sigmoid", "softmax", "softplus", "hard_sigmoid"}
_KEEPS_SIGN: tuple[str, ...] = (
    "MaxPooling2D", "AveragePooling2D", "AdaptiveAveragePooling2D", "GlobalAveragePooling2D", "GlobalMaxPooling2D",
    "UpSampling2D", "ZeroPadding2D", "Cropping2D", "Dropout", "Flatten", "Reshape", "Concatenate", "Add", "Multiply",
)  # fmt: skip


def maps_with_negative_values(network: keras.Model) -> dict[str, bool]:
    """Tell for every layer whether its output can be negative, from what the layers are."""
    negative: dict[str, bool] = {}
    for layer in network.layers:
        activation = getattr(getattr(layer, "activation", None), "__name__", "")
        kind = type(layer).__name__
        if kind == "ReLU" or activation in _ALWAYS_POSITIVE:
            negative[layer.name] = False
        elif kind in _KEEPS_SIGN or (kind == "Activation" and activation == "linear"):
            sources = layer.input if isinstance(layer.input, list) else [layer.input]
            # Plain operations between layers are not among them: what they give may be anything.
            origins = [source._keras_history.operation.name for source in sources]  # noqa: SLF001 - Keras has no other way back
            negative[layer.name] = any(negative.get(origin, True) for origin in origins)
        else:
            negative[layer.name] = True
    return negative


def group(blocks: Iterable[FeatureBlock], by: Callable[[FeatureBlock], Any]) -> list[list[FeatureBlock]]:
    """Gather the blocks that `by` calls equal, in order of first appearance."""
    groups: dict[Any, list[FeatureBlock]] = {}
    for block in blocks:
        groups.setdefault(by(block), []).append(block)
    return list(groups.values())
