"""Build one Keras model for all blocks that share a backbone, from raw pixels to pooled, not yet normalized vectors."""

import contextlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbfeat.backbones import keras_weights, user_models, weights
from nbfeat.backbones.backbone import Backbone, Scaling
from nbfeat.errors import NetworkError, RequestError, first_line, near
from nbfeat.inference.spec import Cut, NetworkSpec, Output, Pooling

MAP_RANK = 4
GEM_POWER = 3.0  # Radenović et al. 2018, "Fine-tuning CNN image retrieval with no human annotation"
_ALWAYS_POSITIVE = {"relu", "relu6", "sigmoid", "softmax", "softplus", "hard_sigmoid"}
_KEEPS_SIGN = (
    "MaxPooling2D", "AveragePooling2D", "AdaptiveAveragePooling2D", "GlobalAveragePooling2D", "GlobalMaxPooling2D",
    "UpSampling2D", "ZeroPadding2D", "Cropping2D", "Dropout", "Flatten", "Reshape", "Concatenate", "Add", "Multiply",
)  # fmt: skip
_LARGEST_DIFFERENCE = 0.005  # relative to the variation between images; float32 differs by 1e-3 in the deepest networks
_IMAGES = 4  # for comparing two models

Base = tuple[Any, weights.Loaded]  # a Keras model without its classifier, and its weights


@dataclass(frozen=True, slots=True)
class Built:
    """A Keras model from raw pixels to a dict of vectors, with its outputs and weights."""

    model: Any
    outputs: dict[str, Output]
    weights: weights.Loaded


def build(spec: NetworkSpec, tell: weights.Tell, *, channels_first: bool = False, base: Base | None = None) -> Built:
    """Build the network of `spec` in this process, from `base` if given; channels first, if requested and possible."""
    base = base or load_base(spec, tell)
    if not spec.network.is_user_model:
        return _assembled(spec, base, turn_channels_first(base[0]) if channels_first else None)
    straight = _assembled(spec, base)
    # A user's layers may depend on the layout (some always use the last axis), so use the conversion only if it agrees.
    with contextlib.suppress(Exception):
        if channels_first and (turned := turn_channels_first(base[0])) is not None:
            built = _assembled(spec, base, turned)
            if built.outputs == straight.outputs and gives_the_same(built.model, straight.model):
                return built
    return straight


def _assembled(spec: NetworkSpec, base: Base, turned: Any = None) -> Built:
    """Put scaling before the base (or its channels-first copy), and cuts and pooling after it."""
    backbone, keras = spec.network, importlib.import_module("keras")
    negative = negative_layers(base[0])
    trunk, is_turned = turned or base[0], turned is not None
    last = trunk.layers[-1]
    heads, outputs = {}, {}
    for cut in spec.cuts:
        tensor = _tensor_at(trunk, cut, backbone)
        pooling = _pooling(cut, tensor, backbone)
        if tensor.dtype != "float32":  # pooling is computed in float32 even in mixed precision
            tensor = keras.ops.cast(tensor, "float32")
        is_own_end = not (cut.layer or backbone.is_user_model)  # Keras' ConvNeXt normalizes it *after* pooling
        if is_own_end and isinstance(last, keras.layers.LayerNormalization) and pooling in {"avg", "max"}:
            head = last(_pool(last.input, pooling, is_turned))
        else:
            head = _pool(tensor, pooling, is_turned)
        shape = tuple(tensor.shape[1:])
        if is_turned and len(shape) == MAP_RANK - 1:
            shape = (*shape[1:], shape[0])
        # A user's network may end in a plain operation, which can give any values.
        name = _made_by(_tensor_at(base[0], cut, backbone))
        heads[cut.key] = head
        outputs[cut.key] = Output(int(head.shape[-1]), pooling, shape, negative.get(name, True))
    features = keras.Model(trunk.inputs, heads)
    pixels = keras.Input((spec.size, spec.size, 3), dtype="uint8", name="pixels")
    x = _scale(pixels, spec.scaling)
    x = keras.ops.transpose(x, (0, 3, 1, 2)) if is_turned else x
    return Built(keras.Model(pixels, features(x, training=False)), outputs, base[1])


def load_base(spec: NetworkSpec, tell: weights.Tell) -> Base:
    """Build the backbone without its classifier and load its weights."""
    backbone = spec.network
    if backbone.package == "registered":
        network = user_models.build(backbone, spec.size)
        loaded = weights.Loaded(backbone.name, weights.digest_of_arrays(network.get_weights()))
    elif backbone.package == "file":
        path = Path(backbone.name)
        network, loaded = user_models.load(path, spec.size), weights.Loaded(path.name, weights.digest(path))
    else:
        return weights.load(backbone, spec.size, spec.alpha, spec.weights, tell)
    user_models.check_pixels(network, spec.scaling, backbone.title)
    return network, loaded


def _scale(pixels: Any, scaling: Scaling) -> Any:
    """Scale pixels 0 … 255 like ``keras.applications.imagenet_utils.preprocess_input`` in mode `scaling`."""
    ops: Any = importlib.import_module("keras").ops
    x = ops.cast(pixels, "float32")
    match scaling:
        case "tf":
            return x / 127.5 - 1.0
        case "torch":
            mean, deviation = (ops.array(rgb, "float32") for rgb in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
            return (x / 255.0 - mean) / deviation
        case "caffe":
            return ops.flip(x, axis=-1) - ops.array([103.939, 116.779, 123.68], "float32")
    return x


def _pool(x: Any, pooling: Pooling | None, channels_first: bool) -> Any:
    """Pool a feature map to a float32 vector; with `None`, `x` already is a vector."""
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
    shape, where = tuple(tensor.shape[1:]), cut.layer or f"The end of {backbone.title}"
    if len(shape) == MAP_RANK - 1:
        return cut.pooling or "avg"  # type: ignore[return-value]
    if len(shape) != 1:
        raise RequestError(f"{where} gives tensors of shape {shape}: choose a layer with a feature map or vector.")
    if cut.pooling:
        raise RequestError(f"{where} already gives a vector of {shape[0]:,} features: drop `pooling`.")
    return None


def _tensor_at(network: Any, cut: Cut, backbone: Backbone) -> Any:
    if backbone.is_user_model:
        return user_models.output_of(network, cut.layer, backbone.title)
    names = [layer.name for layer in network.layers[1:]]
    if cut.layer and cut.layer not in names:
        known = near(cut.layer, names) or f"Commonly used layers: {', '.join(layer.name for layer in backbone.layers)}."
        way = f"Use `nbfeat.layers({backbone.name!r})` to list all layers."
        raise RequestError(f"{backbone.name} has no layer {cut.layer!r}. {known} {way}")
    name = cut.layer or backbone.end
    return (network.get_layer(name) if name else network.layers[-1]).output


def negative_layers(network: Any) -> dict[str, bool]:
    """Return, by layer name, whether its output can be negative, judging by layer types and activations."""
    negative: dict[str, bool] = {}
    for layer in network.layers:
        activation, kind = getattr(getattr(layer, "activation", None), "__name__", ""), type(layer).__name__
        is_relu = kind == "ReLU" and not layer.negative_slope
        negative[layer.name] = not is_relu and activation not in _ALWAYS_POSITIVE
        if negative[layer.name] and (kind in _KEEPS_SIGN or (kind == "Activation" and activation == "linear")):
            sources = layer.input if isinstance(layer.input, list) else [layer.input]
            # Plain operations are not in `network.layers`, and can give any values.
            negative[layer.name] = any(negative.get(_made_by(source), True) for source in sources)
    return negative


def _made_by(tensor: Any) -> str:
    return str(tensor._keras_history.operation.name)  # a layer or plain operation; Keras has no public attribute for it


def layers_of(network: Any) -> list[dict[str, Any]]:
    """Describe every layer that can be a cut point: name, kind, shape and whether its output can be negative."""
    signs = negative_layers(network)
    return [
        {"layer": one.name, "kind": type(one).__name__, "shape": one.output.shape[1:], "negative": signs[one.name]}
        for one in network.layers[1:]
        if hasattr(one.output, "shape")  # some layers give several tensors
    ]


def turn_channels_first(base: Any) -> Any | None:
    """Clone `base` channels first, two to five times faster in OpenVINO; None if it has nested models (ConvNeXt)."""
    keras: Any = importlib.import_module("keras")
    if any(hasattr(layer, "layers") for layer in base.layers):
        return None

    def turn(layer: Any, config: dict[str, Any]) -> None:
        if "data_format" in config:
            config["data_format"] = "channels_first"
        if isinstance(layer, keras.layers.BatchNormalization | keras.layers.Concatenate | keras.layers.Normalization):
            config["axis"] = 1
        if isinstance(layer, keras.layers.Reshape) and len(config["target_shape"]) == MAP_RANK - 1:
            rows, columns, channels = config["target_shape"]
            config["target_shape"] = (channels, rows, columns)
        if isinstance(layer, keras.layers.Rescaling) and isinstance(config["scale"], list | tuple):
            config["scale"] = [[[value]] for value in config["scale"]]

    rows, columns, channels = base.input_shape[1:]
    turned = keras_weights.cloned(base, turn, inputs=keras.Input((channels, rows, columns)))
    if turned.output_shape[1] != base.output_shape[-1]:
        shapes = f"{turned.output_shape} from {base.output_shape}"
        raise NetworkError(f"{base.name} could not be converted to channels-first: {shapes}.")
    return turned


def gives_the_same(one: Any, other: Any) -> bool:
    """Tell whether two models agree in every output on seeded random pixels."""
    size, generator = other.input_shape[1], np.random.default_rng(8)
    # Images with and without structure, all asymmetric and of different brightness.
    noise = generator.integers(0, 256, (_IMAGES, size, size, 3))
    coarse = generator.integers(0, 256, (_IMAGES, 4, 4, 3))
    at, number = np.arange(size) * 4 // size, np.arange(_IMAGES)[:, None, None, None]
    brightness = np.linspace(0.4, 1, _IMAGES)[:, None, None, None]
    pixels = np.asarray(np.where(number % 2, noise, coarse[:, at][:, :, at]) * brightness, np.uint8)
    left, right = (model.predict_on_batch(pixels) for model in (one, other))
    for key, values in right.items():
        ours, theirs = np.asarray(left[key], float), np.asarray(values, float)
        if ours.shape != theirs.shape or not np.isfinite(ours).all():
            return False
        varies = np.linalg.norm(theirs - theirs.mean(axis=0))  # a constant, such as a saturated softmax, proves nothing
        if not np.linalg.norm(ours - theirs) <= _LARGEST_DIFFERENCE * varies or not varies:
            return False
    return True


def mixed_precision(spec: NetworkSpec, base: Base, precision: str) -> Base:
    """Return a copy of `base` whose layers have their own dtype policy for `precision`; variables stay in float32."""
    if precision == "float32":
        return base
    network, loaded = base
    cause = None
    try:
        turned = in_policy(network, f"mixed_{precision}")
        kept = _kept_exact(turned)
        left = [layer for layer in keras_weights.leaves(turned) if layer not in kept]
        exact = sorted(layer.name for layer in left if layer.compute_dtype != precision)
        reason = f"its layer {exact[0]} stays in float32" if exact else ""
        if not reason and spec.network.package == "registered":  # custom layers may not copy correctly
            models = (in_policy(network, "float32"), network)
            twin, straight = (build(spec, lambda _: None, base=(one, loaded)).model for one in models)
            reason = "" if gives_the_same(twin, straight) else "a copy of it gives different values"
    except Exception as error:
        cause, reason = error, first_line(error)
    if reason:
        what = f"{spec.network.title} cannot be converted to {precision} ({reason})"
        raise NetworkError(f"{what}. Use `precision='float32'`.") from cause
    return turned, loaded


def in_policy(network: Any, policy: str) -> Any:
    """Clone `network` with its weights, and with `policy` for every layer that computes features."""
    keras: Any = importlib.import_module("keras")
    kept = _kept_exact(network)

    def edit(layer: Any, config: dict[str, Any]) -> None:
        if isinstance(layer, keras.layers.Layer):
            config["dtype"] = "float32" if layer in kept else policy

    return keras_weights.cloned(network, edit)


def _kept_exact(network: Any) -> list[Any]:
    """Return the layers that stay in float32: pixel scaling, and a final normalization, which follows pooling."""
    layers: Any = importlib.import_module("keras").layers
    kept = [one for one in keras_weights.leaves(network) if isinstance(one, layers.Rescaling | layers.Normalization)]
    return kept + [layer for layer in network.layers[-1:] if isinstance(layer, layers.LayerNormalization)]
