"""The available networks and how they are built; the package itself is callable and lists them."""

import sys
from types import ModuleType
from typing import Any


class _Listing(ModuleType):
    def __call__(self, pattern: str = "*") -> Any:
        """List the backbones whose names match `pattern`; see `nbfeat.backbones.catalog.backbones`."""
        from nbfeat.backbones.catalog import backbones

        return backbones(pattern)

    def __repr__(self) -> str:
        return "<nbfeat.backbones: call it, nbfeat.backbones('Res*')>"


sys.modules[__name__].__class__ = _Listing
