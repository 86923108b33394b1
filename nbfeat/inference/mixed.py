"""A network that computes in fewer bits: cloned layer by layer, each layer with a policy of its own.

Variables stay in float32, and so do layers that prepare pixels or end the network with a norm. Keras' policy for the
whole process is neither asked nor changed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nbfeat.backbones import keras_weights
from nbfeat.errors import NetworkError
from nbfeat.inference.channels_first import gives_the_same
from nbfeat.inference.engines import Precision
from nbfeat.inference.model import Base, NetworkSpec, build

if TYPE_CHECKING:
    import keras


def in_precision(spec: NetworkSpec, base: Base, precision: Precision) -> Base:
    """Return `base` computing in `precision`; float32 leaves it as it is.

    Of a network that a function of the user's builds it is first tried whether a clone in float32 gives the same.
    """
    if precision == "float32":
        return base
    network, loaded = base
    try:
        turned = _cloned(network, f"mixed_{precision}")
        left = sorted({layer.name for layer in _computing(turned) if layer.compute_dtype != precision})
        reason = f"of its layers, {left[0]} stays in float32" if left else ""
        if not reason and spec.is_registered:
            twin, straight = (build(spec, lambda _: None, base=(one, loaded)) for one in (_cloned(network), network))
            reason = "" if gives_the_same(twin.model, straight.model) else "a copy of it gives other numbers"
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _refusal(spec, precision, lines[0].rstrip(".")) from error
    if reason:
        raise _refusal(spec, precision, reason)
    return turned, loaded


def _refusal(spec: NetworkSpec, precision: Precision, reason: str) -> NetworkError:
    return NetworkError(f"{spec.title} cannot be turned to {precision} ({reason}). Use --precision float32.")


def _cloned(network: keras.Model, policy: str = "float32") -> Any:
    """Clone `network`, with the same weights, and `policy` for every layer that computes features."""
    keras: Any = importlib.import_module("keras")
    kept = _kept_exact(network)

    def clone(layer: Any) -> Any:
        config = layer.get_config()
        if isinstance(layer, keras.layers.Layer) and not isinstance(layer, keras.layers.InputLayer):
            config["dtype"] = "float32" if layer in kept else policy
        return type(layer).from_config(config)

    twin = keras.models.clone_model(network, clone_function=clone, recursive=True)
    keras_weights.copy(network, twin)
    return twin


def _kept_exact(network: Any) -> list[Any]:
    """Return the layers that stay in float32: those that scale pixels, and a norm at the end, which follows pooling."""
    layers: Any = importlib.import_module("keras").layers
    kept = [
        layer for layer in keras_weights.leaves(network) if isinstance(layer, layers.Rescaling | layers.Normalization)
    ]
    return kept + [layer for layer in network.layers[-1:] if isinstance(layer, layers.LayerNormalization)]


def _computing(network: Any) -> list[Any]:
    """Return the innermost layers, without those that stay in float32."""
    kept = _kept_exact(network)
    return [layer for layer in keras_weights.leaves(network) if layer not in kept]
