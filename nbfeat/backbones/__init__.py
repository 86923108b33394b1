"""Which networks there are, and how to build them; the package is also the public function that lists them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Listing(ModuleType):  # Python lets a module choose its class
    def __call__(self, pattern: str = "*") -> Any:
        """List the backbones whose names match `pattern`: see `nbfeat.backbones.catalog.backbones`."""
        from nbfeat.backbones.catalog import backbones

        return backbones(pattern)


sys.modules[__name__].__class__ = _Listing
