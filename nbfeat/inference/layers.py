"""List the cut points of a backbone: shape, width after each pooling, bytes per image."""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbfeat.backbones import user_models
from nbfeat.backbones.backbone import Backbone
from nbfeat.backbones.catalog import find
from nbfeat.errors import NbfeatError, NetworkError
from nbfeat.inference.compiled_models import run_child, versions
from nbfeat.inference.engines.keras import in_a_fresh_session
from nbfeat.inference.model import MAP_RANK, layers_of, load_base
from nbfeat.inference.spec import Cut, NetworkSpec, alpha_of, whole
from nbfeat.paths import keep, write_whole

if TYPE_CHECKING:
    import pandas as pd


def layers(backbone: str, *, alpha: float | None = None, size: int | None = None) -> pd.DataFrame:
    """List the layers at which a backbone can be cut.

    The first call builds the network in a child process (a few seconds, no weights needed) and caches the table on
    disk. A registered backbone is built in this process on every call.

    Parameters
    ----------
    backbone : str
        A name from `nbfeat.backbones()`, such as ``"VGG16"``, or the path of a ``.keras`` file.
    alpha : float, optional
        Width multiplier. Only for backbones that have one.
    size : int, optional
        Side of the square input in pixels. The default is the backbone's own size.

    Returns
    -------
    pandas.DataFrame
        One row per layer, in network order, with index ``layer`` and these columns: ``kind``, the Keras class;
        ``shape`` (rows × columns × channels); ``avg, max, gem`` and ``flatten``, the number of features after that
        pooling (a layer that gives a vector is not pooled and has only ``flatten``); ``bytes`` of one image's
        features after average pooling; ``negative``, whether values can be below zero, which GeM pooling would clip;
        ``customary``, whether the layer is commonly used.

    Raises
    ------
    RequestError
        If the backbone, `alpha` or `size` is not valid.
    WeightsError
        If the model file cannot be read.
    NetworkError
        If Keras cannot build the network.

    Examples
    --------
    >>> nbfeat.layers("EfficientNetLite0").loc["block3b_add", "shape"]
    '28 × 28 × 40'
    """
    import pandas as pd

    found = find(backbone)
    spec = _spec_of(found, alpha, size)
    customary = set() if found.package == "file" else {layer.name for layer in found.layers}
    if found.package == "registered":
        rows = in_a_fresh_session(lambda: layers_of(load_base(spec, lambda _: None)[0]), "cpu")
    else:
        rows = _rows(spec)
    table = []
    for row in rows:
        pooled, flat = _widths(row)
        row["shape"] = " × ".join(f"{size:,}" for size in row["shape"] if size is not None)
        widths = {"avg, max, gem": pooled, "flatten": flat, "bytes": 4 * (pooled or flat)}
        ends = {"negative": row.pop("negative"), "customary": row["layer"] in customary}
        table.append({**row, **widths, **ends})
    # Vectors have no pooled width; a nullable dtype keeps the other widths integers.
    return pd.DataFrame(table).set_index("layer").astype({"avg, max, gem": "Int64"})


def _rows(spec: NetworkSpec, *, build: bool = True) -> list[dict[str, Any]]:
    """Return the cached rows, which a child process makes if there are none; an empty list without `build`."""
    file, rows = None, list[dict[str, Any]]()
    with suppress(OSError, ValueError):
        file = keep("layers") / f"{spec.key(**versions())}.json"
        rows = json.loads(file.read_text(encoding="utf-8")) or []
    if rows or not build:
        return rows
    with tempfile.TemporaryDirectory(prefix="nbfeat-") as folder:
        for _ in run_child(spec, Path(folder)):
            pass
        text = Path(folder, "layers.json").read_text(encoding="utf-8")
    with suppress(OSError):  # the next call builds it again
        if file:
            write_whole(file, text)
    if not (rows := list(json.loads(text))):
        raise NetworkError(f"Keras built {spec.network.title} without any layers. Report this with your Keras version.")
    return rows


def layer_names(backbone: Backbone) -> list[str]:
    """Return the known cut points without building the network: customary layers first, then cached ones."""
    return list(dict.fromkeys([*(layer.name for layer in backbone.layers), *_seen(backbone)]))


def expected_width(backbone: Backbone, cut: Cut, *, alpha: float | None, size: int | None) -> tuple[int, bool] | None:
    """Return the number of features that `cut` will give, and whether it is exact; None if unknown."""
    if backbone.is_user_model:
        return None
    rows = _seen(backbone, alpha, size)
    name = cut.layer or backbone.end or next(reversed(rows), "")
    if name in rows:
        pooled, flat = _widths(rows[name])
        return flat if pooled is None or cut.pooling == "flatten" else pooled, True
    stride, channels = 32, backbone.width_at(alpha)
    if cut.layer:
        if cut.layer not in (customary := {layer.name: layer for layer in backbone.layers}):
            return None
        stride, channels = customary[cut.layer].stride, round(customary[cut.layer].channels * (alpha or 1))
    if cut.pooling != "flatten" or not stride:
        return channels, not (cut.layer and alpha)
    return channels * math.ceil((size or backbone.size) / stride) ** 2, False


def _seen(backbone: Backbone, alpha: float | None = None, size: int | None = None) -> dict[str, dict[str, Any]]:
    with suppress(NbfeatError):
        if not backbone.is_user_model:  # reading the layers from a whole model file would be slow
            return {row["layer"]: row for row in _rows(_spec_of(backbone, alpha, size), build=False)}
    return {}


def _spec_of(backbone: Backbone, alpha: float | None = None, size: int | None = None) -> NetworkSpec:
    """Describe the network to list; its weights do not matter."""
    side = whole("size")(size) if size is not None else backbone.size
    width = alpha_of(alpha) if alpha is not None else None
    if not backbone.is_user_model:
        backbone.check(size=side, alpha=width)
        name, weights, scaling = backbone.name, "random", backbone.scaling
    else:
        side = user_models.check(backbone, size=size and side, alpha=width, weights=None, scaling="none")
        name, weights = (user_models.NAME, backbone.name) if backbone.package == "file" else (backbone.name, "own")
        width, scaling = None, "none"
    return NetworkSpec(backbone=name, alpha=width, weights=weights, scaling=scaling, size=side, cuts=())


def _widths(row: dict[str, Any]) -> tuple[int | None, int]:
    """Return the number of features of a layer after pooling (None for a vector) and after flattening."""
    shape = [size for size in row["shape"] if size is not None]
    return shape[-1] if len(shape) == MAP_RANK - 1 else None, math.prod(shape)
