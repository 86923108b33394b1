"""Weights that are in the package itself: a file beside the module of their network, checked before it is read."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np

from nbfeat.backbones.backbone import Backbone
from nbfeat.backbones.state_dict import LayerWeights
from nbfeat.errors import WeightsError

_ADVICE = "Install nbfeat again: `pip install --force-reinstall --no-deps nbfeat`."


def file_of(backbone: Backbone) -> Path:
    """Return where the bundled weights of `backbone` are."""
    return Path(__file__).with_name(f"{backbone.module}.npz")


def read(backbone: Backbone) -> LayerWeights:
    """Return what each layer's `set_weights` takes: the kernel (rows, columns, inputs, outputs) and the bias.

    Raises
    ------
    WeightsError
        Where the file is missing, or its SHA-256 is not the catalog's.
    """
    path = file_of(backbone)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"The weights of {backbone.name} cannot be read ({error}). {_ADVICE}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != backbone.bundled:
        raise WeightsError(
            f"The weights of {backbone.name} in {path} are not those of this release: their SHA-256 begins with "
            f"{found[:8]}, not with {backbone.bundled[:8]}. {_ADVICE}"
        )
    weights: LayerWeights = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for key in arrays:  # the kernel of each layer first
            weights.setdefault(key.partition("/")[0], []).append(arrays[key].astype(np.float32))
    return weights
