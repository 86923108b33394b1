"""Which layers can give values below zero, told by what the layers are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras

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
            negative[layer.name] = any(negative.get(made_by(source), True) for source in sources)
        else:
            negative[layer.name] = True
    return negative


def made_by(tensor: Any) -> str:
    """Return the name of the layer, or plain operation, that gives `tensor`."""
    return str(tensor._keras_history.operation.name)  # Keras has no other way back
