"""AlexNet in Keras, matching ``torchvision.models.alexnet``.

This is the single-tower variant (Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks"),
without local response normalization. Layers are named as in the papers; their outputs include the ReLU.
"""

from functools import partial
from typing import Any

from nbfeat.backbones.backbone import Backbone
from nbfeat.backbones.torch_weights import Arrays, LayerWeights, array_of

GRID = 6  # rows and columns of the map that `fc6` reads
WIDTH = 4096  # of `fc6` and `fc7`

_CONVOLUTIONS = (  # name in Keras, key in a state dict, channels before and after, side of the kernel
    ("conv1", "features.0", 3, 64, 11),
    ("conv2", "features.3", 64, 192, 5),
    ("conv3", "features.6", 192, 384, 3),
    ("conv4", "features.8", 384, 256, 3),
    ("conv5", "features.10", 256, 256, 3),
)
_POOLED = {"conv1": "pool1", "conv2": "pool2", "conv5": "pool5"}


def build(backbone: Backbone, size: int) -> Any:
    """Build AlexNet up to `fc7` for square images of `size` pixels with `torch` scaling."""
    import keras
    from keras import layers

    pixels = keras.Input((size, size, 3))
    # PyTorch pads evenly on all sides; Keras' "same" does so only with a stride of 1.
    x = layers.ZeroPadding2D(2, name="conv1_pad")(pixels)
    for name, _, _, after, side in _CONVOLUTIONS:
        steps: dict[str, Any] = {"strides": 4} if name == "conv1" else {"padding": "same"}
        x = layers.Conv2D(after, side, activation="relu", name=name, **steps)(x)
        if name in _POOLED:
            x = layers.MaxPooling2D(3, strides=2, name=_POOLED[name])(x)
    # Keras' adaptive pooling fails on TensorFlow for a 1 × 1 map.
    average = layers.UpSampling2D if x.shape[1] == 1 else layers.AdaptiveAveragePooling2D
    x = layers.Flatten(name="flatten")(average(GRID, name="avgpool")(x))
    x = layers.Dense(WIDTH, activation="relu", name="fc6")(x)
    x = layers.Dense(WIDTH, activation="relu", name="fc7")(x)
    return keras.Model(pixels, x, name=backbone.name)


def weights_from(backbone: Backbone, state: Arrays) -> LayerWeights:
    """Convert torchvision's state dict, without the classifiers, to arrays for each layer's `set_weights`."""
    take = partial(array_of, state, backbone)
    found: LayerWeights = {}
    for name, key, before, after, side in _CONVOLUTIONS:
        kernel = take(f"{key}.weight", after, before, side, side).transpose(2, 3, 1, 0)
        found[name] = [kernel, take(f"{key}.bias", after)]
    # PyTorch flattens channels, rows, columns; Keras flattens rows, columns, channels in either layout.
    fc6 = take("classifier.1.weight", WIDTH, 256 * GRID * GRID)
    fc6 = fc6.reshape(WIDTH, 256, GRID, GRID).transpose(2, 3, 1, 0).reshape(-1, WIDTH)
    found["fc6"] = [fc6, take("classifier.1.bias", WIDTH)]
    found["fc7"] = [take("classifier.4.weight", WIDTH, WIDTH).T, take("classifier.4.bias", WIDTH)]
    return found
