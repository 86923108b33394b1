"""Which networks serve feature blocks: those that share everything but cut, normalization and prefix run as one."""

from __future__ import annotations

from collections.abc import Iterable

from nbfeat.backbones import keras_applications, user_models, weights
from nbfeat.backbones.catalog import find
from nbfeat.extraction.options import FeatureBlock
from nbfeat.images.resize import PixelSpec
from nbfeat.inference import layers
from nbfeat.inference.spec import Cut, NetworkSpec


def cut_of(block: FeatureBlock) -> Cut:
    """Return the output of the network that `block` reads."""
    return Cut(block.layer or "", block.pooling or "")


def networks_of(blocks: Iterable[FeatureBlock]) -> list[tuple[NetworkSpec, PixelSpec, list[FeatureBlock]]]:
    """Return each network with the pixels it takes and the blocks that it serves, in order of first appearance."""
    groups: dict[tuple[NetworkSpec, PixelSpec], list[FeatureBlock]] = {}
    for block in blocks:
        pixels = PixelSpec(block.size or find(block.backbone).size, block.resize, block.interpolation)
        groups.setdefault((network_spec(block, cuts=()), pixels), []).append(block)
    return [
        (network_spec(group[0], cuts=tuple(sorted({cut_of(block) for block in group}))), pixels, group)
        for (_, pixels), group in groups.items()
    ]


def network_spec(block: FeatureBlock, cuts: tuple[Cut, ...]) -> NetworkSpec:
    """Describe the network of `block`, cut at `cuts`; raise RequestError where it cannot be had so."""
    backbone, alpha = find(block.backbone), block.alpha
    scaling, is_file = block.scaling or backbone.scaling, backbone.package == "file"
    if backbone.is_user_model:
        given = {name: getattr(block, name) for name in ("size", "alpha", "weights", "scaling")}
        size, alpha = user_models.check(backbone, **given), None
        chosen = backbone.name if is_file else backbone.default_weights
    else:
        chosen = block.weights or backbone.default_weights
        chosen = chosen if chosen in weights.NAMED else str(weights.weights_file(chosen))
        size = block.size or backbone.size
        keras_applications.check(backbone, size=size, alpha=alpha, weights=chosen)
    name = user_models.NAME if is_file else backbone.name
    return NetworkSpec(backbone=name, alpha=alpha, weights=chosen, scaling=scaling, size=size, cuts=cuts)


def expected_width(block: FeatureBlock) -> tuple[int, bool] | None:
    """Return how many features of an image `block` will give, without building anything, and whether that is exact."""
    if block.components:
        return block.components, True
    return layers.expected_width(find(block.backbone), cut_of(block), alpha=block.alpha, size=block.size)
