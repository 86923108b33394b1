"""Which backbones there are: the table of published ones, those that were registered, and finding one by its name.

The table is written by hand, so that help, completion and checks never wait for Keras; a test builds every network and
compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from nbfeat.backbones.backbone import SCALINGS, Backbone, Layer, Scaling
from nbfeat.backbones.user_models import LARGEST, SUFFIXES, backbone_at
from nbfeat.errors import RequestError, listing, near, sentences

if TYPE_CHECKING:
    import keras
    import pandas as pd


def find(name: str) -> Backbone:
    """Return the backbone called `name`, whatever its case, or the one in the ``.keras`` file of that path."""
    if name.endswith(SUFFIXES):
        return backbone_at(name)
    if known := _known(name):
        return CATALOG[known]
    raise RequestError(sentences(f"There is no backbone {name!r}.", near(name, CATALOG), "`%backbones` lists all."))


def _known(name: str) -> str:
    """Return how the catalog spells `name`; "" where it has no such backbone."""
    return next((known for known in CATALOG if known.casefold() == name.casefold()), "")


def backbones(pattern: str = "*") -> pd.DataFrame:
    """List the backbones whose name matches `pattern`.

    Parameters
    ----------
    pattern
        Shell wildcards (``*``, ``?``, ``[…]``), in any case.

    Returns
    -------
    pandas.DataFrame
        One row per backbone, by name: its family, the side of its input in pixels, its width (features per image), its
        parameters without the classifier, how its pixels are scaled, the alphas and the layers one can name, and the
        weights it has by default. Width and parameters of registered networks are not known before they are built.

    Raises
    ------
    RequestError
        Where no name matches.

    Examples
    --------
    >>> nbfeat.backbones("vgg*")["width"].to_dict()
    {'VGG16': 512, 'VGG19': 512}
    """
    import pandas as pd

    chosen = [each for name, each in CATALOG.items() if fnmatchcase(name.casefold(), pattern.casefold())]
    if not chosen:
        hint = near(pattern.strip("*?"), CATALOG)
        raise RequestError(sentences(f"No backbone's name matches {pattern!r}.", hint, "`%backbones` lists all."))
    columns = {
        "family": [each.family for each in chosen],
        "input size": [each.size for each in chosen],
        "width": pd.array([each.width or None for each in chosen], "Int64"),
        "parameters": pd.array([each.parameters or None for each in chosen], "Int64"),
        "scaling": [each.scaling for each in chosen],
        "alphas": [", ".join(map(str, each.alphas)) for each in chosen],
        "layers": [", ".join(layer.name for layer in each.layers) for each in chosen],
        "weights": [each.default_weights for each in chosen],
    }
    return pd.DataFrame(columns, index=pd.Index([each.name for each in chosen], name="backbone"))


def register_backbone(
    name: str,
    build: Callable[[int], keras.Model],
    *,
    input_size: int,
    scaling: Scaling,
    layers: Iterable[str] = (),
) -> None:
    """Add a network of your own to the backbones, for this session.

    Parameters
    ----------
    name
        What to call it; the name of a published backbone is refused, one that was registered before is replaced.
    build
        Takes the side of the images in pixels and returns a functional or Sequential Keras model without classifier
        whose input is ``(size, size, 3)``, with the weights it is to have. It is called each time that features are
        extracted, so that what is kept is told by its weights and never by its name.
    input_size
        The side of its images in pixels, where ``--size`` does not say otherwise.
    scaling
        How pixels are prepared: ``"tf"``, ``"torch"``, ``"caffe"``, or ``"none"`` for 0 … 255.
    layers
        Names of the layers that completion offers to cut at.

    Raises
    ------
    RequestError
        Where a value cannot be.

    Examples
    --------
    >>> def build(size):
    ...     image = keras.Input((size, size, 3))
    ...     return keras.Model(image, keras.layers.Conv2D(32, 3, name="conv")(image))
    >>> nbfeat.register_backbone("MyNet", build, input_size=96, scaling="tf", layers=["conv"])  # doctest: +SKIP
    """
    known = _known(str(name))
    if not isinstance(name, str) or not name.isidentifier():
        raise RequestError(
            f"A backbone's name is letters, digits and underscores, not {name!r}. Choose one such as 'MyNet'."
        )
    if known and CATALOG[known].package != "registered":
        raise RequestError(f"{known} is a published backbone. Choose another name, such as 'My{known}'.")
    if not callable(build):
        raise RequestError(f"build must be a function of the size that returns a model, not {type(build).__name__}.")
    if scaling not in SCALINGS:
        raise RequestError(f"scaling cannot be {scaling!r}. Choose {listing(SCALINGS, 'or')}.")
    if isinstance(input_size, bool) or not isinstance(input_size, int) or not 1 <= input_size <= LARGEST:
        raise RequestError(f"input_size takes a whole number of pixels from 1 to {LARGEST:,}, not {input_size!r}.")
    names = (None,) if isinstance(layers, str) else tuple(layers)
    if not all(isinstance(layer, str) for layer in names):
        raise RequestError(f"layers takes names of layers, such as ['conv5'], not {layers!r}.")
    if known:
        del CATALOG[known]
    CATALOG[name] = Backbone(
        name=name, family="own", module="", size=input_size, smallest=1, width=0, scaling=scaling, parameters=0,
        layers=tuple(Layer(str(layer), 0, 0) for layer in names), package="registered", default_weights="own",
        function=build,
    )  # fmt: skip


Row = tuple[str, int, int, int, int, str]  # name, input size, smallest input size, width, parameters, layers


def _family(family: str, module: str, scaling: Scaling, rows: Iterable[Row], **more: Any) -> list[Backbone]:
    """Spell out the rows of one family; `more` is what they have in common and other families have not."""
    return [
        Backbone(
            name=name, family=family, module=module, size=size, smallest=smallest, width=width, scaling=scaling,
            parameters=parameters, layers=tuple(_layers(layers)), **more,
        )
        for name, size, smallest, width, parameters, layers in rows
    ]  # fmt: skip


def _layers(text: str) -> Iterator[Layer]:
    for row in text.split(","):
        name, stride, channels = row.split()
        yield Layer(name, int(stride), int(channels))


def _ends(text: str, top: int, lone: str = "project_bn") -> str:
    """Spell out an EfficientNet's layers from the last block of each stage and its channels."""
    words = text.split()
    ends = [
        f"block{block}_{lone if block.endswith('a') else 'add'} {stride} {channels}"
        for block, channels, stride in zip(words[::2], words[1::2], (2, 4, 8, 16, 16, 32, 32), strict=False)
    ]
    return ", ".join([*ends, f"top_activation 32 {top}"])


# Layers are chosen so that every stage has its end and every stride its layer, as far as Keras names them: the others
# are numbered by a counter that depends on what was built before. So the stems of Inception are missing, as are the
# activations at the end of MobileNetV3 and NASNet.
_ALEXNET = (
    "conv1 4 64, pool1 8 64, conv2 8 192, pool2 16 192, conv3 16 384, conv4 16 256, conv5 16 256, pool5 32 256, "
    "fc6 0 4096, fc7 0 4096"
)
_VGG = "block1_pool 2 64, block2_pool 4 128, block3_pool 8 256, block4_pool 16 512, block5_pool 32 512"
_RESNET = (
    "conv1_relu 2 64, conv2_block3_out 4 256, conv3_block{}_out 8 512, conv4_block{}_out 16 1024, "
    "conv5_block3_out 32 2048"
)
# Version 2 strides in the last block of a stage, not in the first, and its blocks end before the activation.
_RESNET_V2 = (
    "conv1_conv 2 64, conv2_block2_out 4 256, conv2_block3_out 8 256, conv3_block{}_out 16 512, "
    "conv4_block{}_out 32 1024, conv5_block3_out 32 2048, post_relu 32 2048"
)
_GOOGLENET = (
    "conv1_relu 2 64, conv3_relu 4 192, inception_3a 8 256, inception_3b 8 480, inception_4a 16 512, "
    "inception_4b 16 512, inception_4c 16 512, inception_4d 16 528, inception_4e 16 832, inception_5a 32 832, "
    "inception_5b 32 1024"
)
_INCEPTION = "mixed0 8 256, mixed2 8 288, mixed3 16 768, mixed5 16 768, mixed7 16 768, mixed8 32 1280, mixed10 32 2048"
_INCEPTION_RESNET = (
    "mixed_5b 8 320, block35_10_ac 8 320, mixed_6a 16 1088, block17_20_ac 16 1088, mixed_7a 32 2080, conv_7b_ac 32 1536"
)
_XCEPTION = (
    "block1_conv2_act 2 64, block3_sepconv1_act 4 128, block4_sepconv1_act 8 256, block13_sepconv1_act 16 728, "
    "block14_sepconv2_act 32 2048"
)
_DENSENET = "conv1_relu 2 64, pool2_relu 4 256, pool3_relu 8 512, pool4_relu 16 {}, relu 32 {}"
_NASNET = (
    "stem_bn1 2 {}, reduction_concat_stem_1 4 {}, normal_concat_{} 8 {}, normal_concat_{} 16 {}, normal_concat_{} 32 {}"
)
_MOBILENET = (
    "conv_pw_1_relu 2 64, conv_pw_3_relu 4 128, conv_pw_5_relu 8 256, conv_pw_11_relu 16 512, conv_pw_13_relu 32 1024"
)
_MOBILENET_V2 = (
    "expanded_conv_project_BN 2 16, block_2_add 4 24, block_5_add 8 32, block_9_add 16 64, block_12_add 16 96, "
    "block_15_add 32 160, block_16_project_BN 32 320, out_relu 32 1280"
)
_MOBILENET_V3_SMALL = (
    "expanded_conv_project_bn 4 16, expanded_conv_2_add 8 24, expanded_conv_5_add 16 40, expanded_conv_7_add 16 48, "
    "expanded_conv_10_add 32 96"
)
_MOBILENET_V3_LARGE = (
    "expanded_conv_add 2 16, expanded_conv_2_add 4 24, expanded_conv_5_add 8 40, expanded_conv_9_add 16 80, "
    "expanded_conv_11_add 16 112, expanded_conv_14_add 32 160"
)
# Where a stage of ConvNeXt ends Keras has a nameless addition; the `…_identity` before it is one block's branch alone.
# So the cuts are where the next stage begins. The default cut is the last stage, pooled and only then normalized.
_CONVNEXT = (
    "convnext_{0}_stem 4 {1}, convnext_{0}_downsampling_block_0 8 {2}, convnext_{0}_downsampling_block_1 16 {3}, "
    "convnext_{0}_downsampling_block_2 32 {4}"
)
_POCKET = "conv1 2 24, block1_out 4 64, block3_out 8 128, block5_out 16 256, top_conv 16 512"
_POCKET_SHA256 = "a25f674d6e7ba92138bb18c67eab6426148d134b2442ceab61c7ccbe804e5c19"
_HERE = "nbfeat.backbones"

# Scaling is what the published weights expect, in Keras' words; "none" where the network's first layers do it.
# fmt: off
_FAMILIES = (
    _family("Pocket", "pocket", "torch", [
        ("Pocket",             80, 32,  512,   1_062_624, _POCKET),
    ], package=_HERE, default_weights="bundled", bundled=_POCKET_SHA256),
    _family("AlexNet", "alexnet", "torch", [
        ("AlexNet",           224, 63,  256,  57_003_840, _ALEXNET),
    ], package=_HERE, end="pool5", published="alexnet-owt-7be5be79.pth"),
    _family("VGG", "vgg16", "caffe", [("VGG16", 224, 32, 512, 14_714_688, _VGG)]),
    _family("VGG", "vgg19", "caffe", [("VGG19", 224, 32, 512, 20_024_384, _VGG)]),
    _family("ResNet", "resnet", "caffe", [
        ("ResNet50",          224, 32, 2048,  23_587_712, _RESNET.format(4, 6)),
        ("ResNet101",         224, 32, 2048,  42_658_176, _RESNET.format(4, 23)),
        ("ResNet152",         224, 32, 2048,  58_370_944, _RESNET.format(8, 36)),
    ]),
    _family("ResNetV2", "resnet_v2", "tf", [
        ("ResNet50V2",        224, 32, 2048,  23_564_800, _RESNET_V2.format(4, 6)),
        ("ResNet101V2",       224, 32, 2048,  42_626_560, _RESNET_V2.format(4, 23)),
        ("ResNet152V2",       224, 32, 2048,  58_331_648, _RESNET_V2.format(8, 36)),
    ]),
    _family("Inception", "googlenet", "tf", [
        ("GoogLeNet",         224, 15, 1024,   5_614_464, _GOOGLENET),
    ], package=_HERE, published="googlenet-1378be20.pth"),
    _family("Inception", "inception_v3", "tf", [
        ("InceptionV3",       299, 75, 2048,  21_802_784, _INCEPTION),
    ]),
    _family("InceptionResNet", "inception_resnet_v2", "tf", [
        ("InceptionResNetV2", 299, 75, 1536,  54_336_736, _INCEPTION_RESNET),
    ]),
    _family("Xception", "xception", "tf", [
        ("Xception",          299, 71, 2048,  20_861_480, _XCEPTION),
    ]),
    _family("DenseNet", "densenet", "torch", [
        ("DenseNet121",       224, 32, 1024,   7_037_504, _DENSENET.format(1024, 1024)),
        ("DenseNet169",       224, 32, 1664,  12_642_880, _DENSENET.format(1280, 1664)),
        ("DenseNet201",       224, 32, 1920,  18_321_984, _DENSENET.format(1792, 1920)),
    ]),
    # Built without an input size, these two come out as other networks: Keras compares the sizes of feature maps.
    _family("NASNet", "nasnet", "tf", [
        ("NASNetMobile",      224, 32, 1056,   4_269_716, _NASNET.format(32, 44, 3, 264, 8, 528, 12, 1056)),
        ("NASNetLarge",       331, 32, 4032,  84_916_818, _NASNET.format(96, 168, 5, 1008, 12, 2016, 18, 4032)),
    ]),
    _family("MobileNet", "mobilenet", "tf", [
        ("MobileNet",         224, 32, 1024,   3_228_864, _MOBILENET),
    ], alphas=(0.25, 0.5, 0.75, 1.0)),
    _family("MobileNetV2", "mobilenet_v2", "tf", [
        ("MobileNetV2",       224, 32, 1280,   2_257_984, _MOBILENET_V2),
    ], alphas=(0.35, 0.5, 0.75, 1.0, 1.3, 1.4)),
    _family("MobileNetV3", "mobilenet_v3", "none", [
        ("MobileNetV3Small",  224, 32,  576,     939_120, _MOBILENET_V3_SMALL),
        ("MobileNetV3Large",  224, 32,  960,   2_996_352, _MOBILENET_V3_LARGE),
    ]),
    _family("EfficientNet", "efficientnet", "none", [
        ("EfficientNetB0",    224, 32, 1280,   4_049_571, _ends("1a 16 2b 24 3b 40 4c  80 5c 112 6d 192 7a 320", 1280)),
        ("EfficientNetB1",    240, 32, 1280,   6_575_239, _ends("1b 16 2c 24 3c 40 4d  80 5d 112 6e 192 7b 320", 1280)),
        ("EfficientNetB2",    260, 32, 1408,   7_768_569, _ends("1b 16 2c 24 3c 48 4d  88 5d 120 6e 208 7b 352", 1408)),
        ("EfficientNetB3",    300, 32, 1536,  10_783_535, _ends("1b 24 2c 32 3c 48 4e  96 5e 136 6f 232 7b 384", 1536)),
        ("EfficientNetB4",    380, 32, 1792,  17_673_823, _ends("1b 24 2d 32 3d 56 4f 112 5f 160 6h 272 7b 448", 1792)),
        ("EfficientNetB5",    456, 32, 2048,  28_513_527, _ends("1c 24 2e 40 3e 64 4g 128 5g 176 6i 304 7c 512", 2048)),
        ("EfficientNetB6",    528, 32, 2304,  40_960_143, _ends("1c 32 2f 40 3f 72 4h 144 5h 200 6k 344 7c 576", 2304)),
        ("EfficientNetB7",    600, 32, 2560,  64_097_687, _ends("1d 32 2g 48 3g 80 4j 160 5j 224 6m 384 7d 640", 2560)),
    ]),
    _family("EfficientNetV2", "efficientnet_v2", "none", [
        ("EfficientNetV2B0",  224, 32, 1280,   5_919_312,
            _ends("1a 16 2b 32 3b 48 4c 96 5e 112 6h 192", 1280, lone="project_activation")),
        ("EfficientNetV2B1",  240, 32, 1280,   6_931_124, _ends("1b 16 2c 32 3c 48 4d  96 5f 112 6i 192", 1280)),
        ("EfficientNetV2B2",  260, 32, 1408,   8_769_374, _ends("1b 16 2c 32 3c 56 4d 104 5f 120 6j 208", 1408)),
        ("EfficientNetV2B3",  300, 32, 1536,  12_930_622, _ends("1b 16 2c 40 3c 56 4e 112 5g 136 6l 232", 1536)),
        ("EfficientNetV2S",   384, 32, 1280,  20_331_360, _ends("1b 24 2d 48 3d 64 4f 128 5i 160 6o 256", 1280)),
        ("EfficientNetV2M",   480, 32, 1280,  53_150_388, _ends("1c 24 2e 48 3e 80 4g 160 5n 176 6r 304 7e 512", 1280)),
        ("EfficientNetV2L",   480, 32, 1280, 117_746_848, _ends("1d 32 2g 64 3g 96 4j 192 5s 224 6y 384 7g 640", 1280)),
    ]),
    _family("ConvNeXt", "convnext", "none", [
        ("ConvNeXtTiny",      224, 32,  768,  27_820_128, _CONVNEXT.format("tiny",    96, 192,  384,  768)),
        ("ConvNeXtSmall",     224, 32,  768,  49_454_688, _CONVNEXT.format("small",   96, 192,  384,  768)),
        ("ConvNeXtBase",      224, 32, 1024,  87_566_464, _CONVNEXT.format("base",   128, 256,  512, 1024)),
        ("ConvNeXtLarge",     224, 32, 1536, 196_230_336, _CONVNEXT.format("large",  192, 384,  768, 1536)),
        ("ConvNeXtXLarge",    224, 32, 2048, 348_147_968, _CONVNEXT.format("xlarge", 256, 512, 1024, 2048)),
    ]),
)
# fmt: on

CATALOG: dict[str, Backbone] = {backbone.name: backbone for family in _FAMILIES for backbone in family}
