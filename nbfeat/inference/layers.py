"""The cut points of a backbone: shape, width after each pooling, bytes per image."""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbfeat.backbones import keras_applications, user_models
from nbfeat.backbones.backbone import Backbone
from nbfeat.backbones.catalog import find
from nbfeat.errors import NbfeatError, NetworkError
from nbfeat.inference.compiled_models import run_child, versions
from nbfeat.inference.engines.keras import in_a_fresh_session
from nbfeat.inference.model import MAP_RANK, layers_of, load_base
from nbfeat.inference.spec import Cut, NetworkSpec, alpha_of, whole
from nbfeat.paths import HomeError, keep, write_whole

if TYPE_CHECKING:
    import pandas as pd


def layers(backbone: str, *, alpha: float | None = None, size: int | None = None) -> pd.DataFrame:
    """Show where a backbone can be cut.

    The first call for a network builds it in a child process (seconds, no weights needed); the answer is kept.

    Parameters
    ----------
    backbone
        A name that `nbfeat.backbones()` lists, e.g. ``"VGG16"``, or the path of a ``.keras`` file. What was
        registered is built in this process, each time.
    alpha
        Width multiplier, for the backbones that have one.
    size
        Side of the input in pixels; by default the backbone's own.

    Returns
    -------
    pandas.DataFrame
        One row for each layer, in order; index ``layer``. Columns: ``kind``; ``shape`` (rows × columns × channels);
        ``avg, max, gem`` and ``flatten``, the width after that pooling (a vector is not pooled: its width stands under
        ``flatten``); ``bytes``, of one image's features after average pooling; ``negative``, whether values below zero
        can occur, which GeM would lose; ``customary``, whether the catalog recommends it.

    Examples
    --------
    >>> nbfeat.layers("VGG16").query("customary")  # doctest: +SKIP
    """
    import pandas as pd

    found = find(backbone)
    spec = _spec_of(found, alpha, size)
    customary = set() if found.package == "file" else {layer.name for layer in found.layers}
    if found.package == "registered":
        rows = in_a_fresh_session(lambda: layers_of(load_base(spec, lambda _: None)[0]), "cpu")
    else:
        rows = _known_layers(spec) or _look(spec)
    table = []
    for row in rows:
        pooled, flat = _widths(row)
        row["shape"] = " × ".join(f"{size:,}" for size in row["shape"] if size is not None)
        widths = {"avg, max, gem": pooled, "flatten": flat, "bytes": 4 * (pooled or flat)}
        ends = {"negative": row.pop("negative"), "customary": row["layer"] in customary}
        table.append({**row, **widths, **ends})
    # A vector is not pooled, and one that is missing must not turn the widths of the others into fractions.
    return pd.DataFrame(table).set_index("layer").astype({"avg, max, gem": "Int64"})


def _known_layers(spec: NetworkSpec) -> list[dict[str, Any]]:
    """Return what was found before, without building anything; nothing where it was not."""
    with suppress(OSError, ValueError):
        return json.loads(_place(spec).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    return []


def layer_names(backbone: Backbone) -> list[str]:
    """Return where a backbone can be cut, without building it: customary layers first, then those known from before."""
    return list(dict.fromkeys([*(layer.name for layer in backbone.layers), *_seen(backbone)]))


def expected_width(backbone: Backbone, cut: Cut, *, alpha: float | None, size: int | None) -> tuple[int, bool] | None:
    """Return how many features of an image `cut` will give, and whether that is exact; None where it is not known."""
    if backbone.is_user_model:
        return None
    rows = _seen(backbone, alpha, size)
    name = cut.layer or backbone.end or next(reversed(rows), "")
    if name in rows:
        pooled, flat = _widths(rows[name])
        return flat if pooled is None or cut.pooling == "flatten" else pooled, True
    stride, channels = 32, backbone.width_at(alpha)
    if cut.layer:
        customary = {layer.name: layer for layer in backbone.layers}
        if cut.layer not in customary:
            return None
        stride, channels = customary[cut.layer].stride, round(customary[cut.layer].channels * (alpha or 1))
    if cut.pooling != "flatten" or not stride:
        return channels, not (cut.layer and alpha)
    return channels * math.ceil((size or backbone.size) / stride) ** 2, False


def _seen(backbone: Backbone, alpha: float | None = None, size: int | None = None) -> dict[str, dict[str, Any]]:
    if backbone.is_user_model:  # a file tells all of them, and reading it whole would take long
        return {}
    with suppress(NbfeatError):
        return {row["layer"]: row for row in _known_layers(_spec_of(backbone, alpha, size))}
    return {}


def _spec_of(backbone: Backbone, alpha: float | None = None, size: int | None = None) -> NetworkSpec:
    """Describe the network whose layers are asked for; its weights do not matter."""
    side = whole("size")(size) if size is not None else backbone.size
    width = alpha_of(alpha) if alpha is not None else None
    if not backbone.is_user_model:
        keras_applications.check(backbone, size=side, alpha=width)
        name, weights, scaling = backbone.name, "random", backbone.scaling
    else:
        side = user_models.check(backbone, size=size and side, alpha=width, weights=None, scaling="none")
        name, weights = (user_models.NAME, backbone.name) if backbone.package == "file" else (backbone.name, "own")
        width, scaling = None, "none"
    return NetworkSpec(backbone=name, alpha=width, weights=weights, scaling=scaling, size=side, cuts=())


def _place(spec: NetworkSpec) -> Path:
    return keep("layers") / f"{spec.key(**versions())}.json"


def _look(spec: NetworkSpec) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="nbfeat-") as folder:
        for _ in run_child(spec, Path(folder)):
            pass
        text = Path(folder, "layers.json").read_text(encoding="utf-8")
    with suppress(HomeError):  # then it is looked at again next time
        write_whole(_place(spec), text)
    if rows := json.loads(text):
        return rows  # type: ignore[no-any-return]
    title = spec.network.title
    raise NetworkError(f"Keras built {title} without layers. Please report this with your Keras version.")


def _widths(row: dict[str, Any]) -> tuple[int | None, int]:
    """Return how many features a layer gives pooled, None where it is a vector, and flattened."""
    shape = [size for size in row["shape"] if size is not None]
    return shape[-1] if len(shape) == MAP_RANK - 1 else None, math.prod(shape)
