"""nbfeat: image features from pretrained Keras networks, as columns of a dataframe, in a notebook.

>>> %load_ext nbfeat                             # doctest: +SKIP
>>> %extract photos ResNet50 --images path       # doctest: +SKIP

or, the same in Python: ``nbfeat.extract(photos, "ResNet50", images="path")``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbfeat.backbones.catalog import register_backbone as register_backbone
    from nbfeat.cache.storage import storage as storage
    from nbfeat.errors import (
        ExtractionError as ExtractionError,
        ImageError as ImageError,
        NbfeatError as NbfeatError,
        NetworkError as NetworkError,
        RequestError as RequestError,
        WeightsError as WeightsError,
    )
    from nbfeat.explore.compare import compare as compare
    from nbfeat.explore.gallery import thumbnails as thumbnails
    from nbfeat.explore.neighbors import duplicates as duplicates, similar as similar
    from nbfeat.explore.scatter import scatter as scatter
    from nbfeat.extraction.extraction import Extraction as Extraction, extract as extract
    from nbfeat.extraction.options import FeatureBlock as FeatureBlock
    from nbfeat.extraction.result import Result as Result, read as read
    from nbfeat.extraction.transformer import ImageFeatures as ImageFeatures
    from nbfeat.images.folder import folder as folder
    from nbfeat.images.sample_photos import sample_photos as sample_photos
    from nbfeat.inference.layers import layers as layers
    from nbfeat.jupyter.panel.panel import Panel as Panel

_MODULES = {
    "nbfeat.backbones.catalog": "register_backbone",
    "nbfeat.cache.storage": "storage",
    "nbfeat.errors": "NbfeatError RequestError WeightsError NetworkError ExtractionError ImageError",
    "nbfeat.explore.compare": "compare",
    "nbfeat.explore.neighbors": "similar duplicates",
    "nbfeat.explore.scatter": "scatter",
    "nbfeat.explore.gallery": "thumbnails",
    "nbfeat.extraction.extraction": "extract Extraction",
    "nbfeat.extraction.result": "Result read",
    "nbfeat.extraction.options": "FeatureBlock",
    "nbfeat.extraction.transformer": "ImageFeatures",
    "nbfeat.images.folder": "folder",
    "nbfeat.images.sample_photos": "sample_photos",
    "nbfeat.inference.layers": "layers",
    "nbfeat.jupyter.panel.panel": "Panel",
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = ["backbones", *_PUBLIC]  # noqa: PLE0604 - the table's keys
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "backbones":
        return importlib.import_module("nbfeat.backbones")
    if name in _PUBLIC:
        value = globals()[name] = getattr(importlib.import_module(_PUBLIC[name]), name)
        return value
    raise AttributeError(f"module 'nbfeat' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics, their settings and what Tab offers."""
    from nbfeat.jupyter.magics import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take all of it back."""
    from nbfeat.jupyter.magics import unload

    unload(shell)
