"""GoogLeNet in Keras, matching ``torchvision.models.googlenet``.

Inception v1 (Szegedy et al. 2015, "Going deeper with convolutions") with batch norm and without local response
normalization. Layers are named as in the paper, even the "5x5" convolutions, whose kernels are 3 × 3 in torchvision
(https://github.com/pytorch/vision/issues/906).

The published weights expect `tf` scaling: torchvision applies `torch` scaling, (p - 0.485) / 0.229 for red, and then
``transform_input``, x * 0.229 / 0.5 + (0.485 - 0.5) / 0.5, which together give p / 0.5 - 1.
"""

from functools import partial
from itertools import chain
from typing import Any

from nbfeat.backbones.backbone import Backbone
from nbfeat.backbones.torch_weights import NORM, Arrays, Convolution, LayerWeights, array_of

EPSILON = 0.001  # of every batch norm
_STEM = (
    # Without the suffixes `_conv`, `_bn` and `_relu` of the names and `.conv` and `.bn` of the keys.
    ("conv1", "conv1", 3, 64, 7),
    ("conv2", "conv2", 64, 64, 1),
    ("conv3", "conv3", 64, 192, 3),
)
# Channels: before, after 1x1, 3x3_reduce, 3x3, 5x5_reduce, 5x5, pool_proj.
_INCEPTIONS = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}
_POOLED = {"3b": (3, "pool3"), "4e": (2, "pool4")}  # side and name of the next pooling


def build(backbone: Backbone, size: int) -> Any:
    """Build GoogLeNet up to `inception_5b` for square images of `size` pixels with `tf` scaling."""
    import keras

    conv1, conv2, conv3 = _STEM
    pixels = keras.Input((size, size, 3))
    # PyTorch pads evenly on all sides; Keras' "same" does so only with a stride of 1.
    x = keras.layers.ZeroPadding2D(3, name="conv1_pad")(pixels)
    x = _pool(_convolve(x, conv1, strides=2, padding="valid"), 3, "pool1")
    x = _pool(_convolve(_convolve(x, conv2), conv3), 3, "pool2")
    for part in _INCEPTIONS:
        x = _inception(x, part)
        if part in _POOLED:
            x = _pool(x, *_POOLED[part])
    return keras.Model(pixels, x, name=backbone.name)


def _convolve(x: Any, convolution: Convolution, strides: int = 1, padding: str = "same") -> Any:
    from keras import layers

    name, _, _, after, side = convolution
    x = layers.Conv2D(after, side, strides=strides, padding=padding, use_bias=False, name=f"{name}_conv")(x)
    x = layers.BatchNormalization(epsilon=EPSILON, name=f"{name}_bn")(x)
    return layers.Activation("relu", name=f"{name}_relu")(x)


def _pool(x: Any, side: int, name: str) -> Any:
    """Max-pool with stride 2, including a last partial window (PyTorch's ``ceil_mode``)."""
    from keras import layers

    # PyTorch pads with minus infinity; zero gives the same result after a ReLU.
    if lacking := (x.shape[1] - side) % 2:
        x = layers.ZeroPadding2D(((0, lacking), (0, lacking)), name=f"{name}_pad")(x)
    return layers.MaxPooling2D(side, strides=2, name=name)(x)


def _inception(x: Any, part: str) -> Any:
    from keras import layers

    one, three_reduce, three, five_reduce, five, projection = _branches(part)
    pooled = layers.MaxPooling2D(3, strides=1, padding="same", name=f"inception_{part}_pool")(x)
    branches = [_convolve(x, one), _convolve(_convolve(x, three_reduce), three)]  # this order sets that of the weights
    branches += [_convolve(_convolve(x, five_reduce), five), _convolve(pooled, projection)]
    return layers.Concatenate(name=f"inception_{part}")(branches)


def _branches(part: str) -> tuple[Convolution, ...]:
    before, one, three_reduce, three, five_reduce, five, projection = _INCEPTIONS[part]
    name, key = f"inception_{part}", f"inception{part}"
    return (
        (f"{name}_1x1", f"{key}.branch1", before, one, 1),
        (f"{name}_3x3_reduce", f"{key}.branch2.0", before, three_reduce, 1),
        (f"{name}_3x3", f"{key}.branch2.1", three_reduce, three, 3),
        (f"{name}_5x5_reduce", f"{key}.branch3.0", before, five_reduce, 1),
        (f"{name}_5x5", f"{key}.branch3.1", five_reduce, five, 3),
        (f"{name}_pool_proj", f"{key}.branch4.1", before, projection, 1),
    )


def weights_from(backbone: Backbone, state: Arrays) -> LayerWeights:
    """Convert torchvision's state dict, without the classifiers, to arrays for each layer's `set_weights`."""
    take = partial(array_of, state, backbone)
    found: LayerWeights = {}
    for name, key, before, after, side in chain(_STEM, *map(_branches, _INCEPTIONS)):
        found[f"{name}_conv"] = [take(f"{key}.conv.weight", after, before, side, side).transpose(2, 3, 1, 0)]
        found[f"{name}_bn"] = [take(f"{key}.bn.{part}", after) for part in NORM]
    return found
