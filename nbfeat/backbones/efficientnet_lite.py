"""EfficientNet-Lite in Keras, matching ``efficientnet-lite-pytorch``, a conversion of Google's release.

EfficientNet (Tan & Le 2019) for small devices: ReLU6 instead of swish, no squeeze-and-excitation, and a stem and head
that don't grow with the network. Layers are named as in ``keras.applications.EfficientNetB0``.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from nbfeat.backbones.backbone import Backbone
from nbfeat.backbones.torch_weights import NORM, Arrays, LayerWeights, array_of

EPSILON = 0.001  # of every batch norm
_STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))  # side, stride, expansion
_NETWORKS = {  # the number of blocks and the channels of each stage
    "EfficientNetLite0": ((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "EfficientNetLite1": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
    "EfficientNetLite2": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}


def _steps(name: str) -> Iterator[tuple[str, str, str, int, int, int, int]]:
    # Prefix of layers in Keras, keys of convolution and batch norm in a state dict, channels before (1: depthwise) and
    # after, side of the kernel, stride.
    yield "stem_", "_conv_stem", "_bn0", 3, 32, 3, 2
    number, before = 0, 32
    for stage, (side, stride, expansion), repeats, after in zip("1234567", _STAGES, *_NETWORKS[name], strict=True):
        for block in "abcde"[:repeats]:
            layer, key, within = f"block{stage}{block}_", f"_blocks.{number}.", before * expansion
            if expansion > 1:
                yield f"{layer}expand_", f"{key}_expand_conv", f"{key}_bn0", before, within, 1, 1
            yield layer, f"{key}_depthwise_conv", f"{key}_bn1", 1, within, side, stride if block == "a" else 1
            yield f"{layer}project_", f"{key}_project_conv", f"{key}_bn2", within, after, 1, 1
            number, before = number + 1, after
    yield "top_", "_conv_head", "_bn1", before, 1280, 1, 1


def build(backbone: Backbone, size: int) -> Any:
    """Build `backbone` for square images of `size` pixels, which it scales to (x - 127) / 128 itself."""
    import keras
    from keras import layers

    pixels = keras.Input((size, size, 3))
    x = shortcut = layers.Rescaling(1 / 128, offset=-127 / 128, name="rescaling")(pixels)
    for name, _, _, before, after, side, stride in _steps(backbone.name):
        settings: dict[str, Any] = {"strides": stride, "padding": "same", "use_bias": False}
        if before > 1:
            x = layers.Conv2D(after, side, name=f"{name}conv", **settings)(x)
        else:
            x = layers.DepthwiseConv2D(side, name=f"{name}dwconv", **settings)(x)
        x = layers.BatchNormalization(epsilon=EPSILON, name=f"{name}bn")(x)
        if not name.endswith("project_"):
            x = layers.ReLU(6, name=f"{name}activation")(x)
            continue
        if x.shape == shortcut.shape:  # in all blocks of a stage but the first
            x = layers.Add(name=name.replace("project_", "add"))([x, shortcut])
        shortcut = x
    return keras.Model(pixels, x, name=backbone.name)


def weights_from(backbone: Backbone, state: Arrays) -> LayerWeights:
    """Convert a state dict, without the classifier, to arrays for each layer's `set_weights`."""
    take = partial(array_of, state, backbone)
    found: LayerWeights = {}
    for name, key, norm, before, after, side, _ in _steps(backbone.name):
        kernel = take(f"{key}.weight", after, before, side, side)
        order, conv = ((2, 3, 1, 0), "conv") if before > 1 else ((2, 3, 0, 1), "dwconv")
        found[f"{name}{conv}"] = [kernel.transpose(order)]
        found[f"{name}bn"] = [take(f"{norm}.{part}", after) for part in NORM]
    return found
