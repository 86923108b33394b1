"""What nbfeat keeps on this machine: where, how large, and how to clear it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbfeat.cache.database import Cache, bytes_in
from nbfeat.errors import NbfeatError, RequestError, format_bytes, listing
from nbfeat.html import Html, paragraph, table, text_table
from nbfeat.paths import home

if TYPE_CHECKING:
    import pandas as pd

_FOLDERS = {"networks": ("networks", "layers"), "weights": ("weights",), "precisions": ("precisions",)}
KINDS = ("features", *_FOLDERS, "all")


class Storage:
    """Where nbfeat keeps features and networks on this machine, how large they are, and how to clear them.

    >>> nbfeat.storage                      # shows it    # doctest: +SKIP
    >>> nbfeat.storage.clear()              # forgets the features that were computed    # doctest: +SKIP
    >>> nbfeat.storage.clear("networks")    # and the networks that were built    # doctest: +SKIP
    """

    @property
    def folder(self) -> Path:
        """Where everything is; the variable NBFEAT_HOME sets another place."""
        return home()

    @property
    def features(self) -> pd.DataFrame:
        """One row for each block in the cache: its recipe, how many images, how many bytes, when it was last used."""
        import pandas as pd

        with closing(self._cache()) as cache:
            return pd.DataFrame(cache.blocks())

    @property
    def networks(self) -> pd.DataFrame:
        """One row for each network that was built: backbone, weights, input size, cuts, bytes, folder."""
        import pandas as pd

        return pd.DataFrame(self._networks())

    @property
    def bytes(self) -> int:
        """How much disk all of it takes."""
        return bytes_in(self.folder)

    def clear(self, what: str = "features") -> None:
        """Forget one kind of what is kept, and give the disk back; what is asked for again is made again.

        `what` is ``"features"`` that were computed, ``"networks"`` that were built, ``"weights"`` that were downloaded,
        ``"precisions"``: in what each network was found to compute best; or ``"all"``. Running notebooks go on.
        """
        if what not in KINDS:
            raise RequestError(f"clear takes {', '.join(KINDS)}, not {what!r}.")
        if what in {"features", "all"}:
            with closing(self._cache()) as cache:
                cache.clear()
                if cache.note and not cache.writes:
                    raise NbfeatError(cache.note)
        for kind, folders in _FOLDERS.items():
            for folder in folders if what in {kind, "all"} else ():
                shutil.rmtree(self.folder / folder, ignore_errors=True)

    def _cache(self) -> Cache:
        return Cache.at_home() if (self.folder / "features").is_dir() else Cache(None)

    def _networks(self) -> Iterator[dict[str, Any]]:
        for folder in sorted((self.folder / "networks").glob("*")):
            # Without a manifest it is being built, or was left behind by a process that was killed.
            with suppress(OSError, ValueError, KeyError, TypeError):
                manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
                spec, weights = manifest["spec"], manifest["weights"]["name"]
                cuts = [f"{cut['layer'] or 'end'} {cut['pooling']}".strip() for cut in spec["cuts"]]
                row = {"backbone": spec["backbone"], "alpha": spec["alpha"], "weights": weights, "size": spec["size"]}
                yield {**row, "cuts": cuts, "bytes": bytes_in(folder), "folder": str(folder)}

    def _tables(self) -> tuple[str, list[tuple[list[tuple[object, ...]], tuple[str, ...]]], str]:
        """Return the heading, the rows and head of each table, and what can be done."""
        features: list[tuple[object, ...]] = []
        with closing(self._cache()) as cache:
            for row in cache.blocks():
                cut = f"{row['layer'] or 'end'} {row['pooling'] or ''}".strip()
                block = f"{_backbone(row)}, {row['size']} px {row['resize']}: {cut}, {row['precision']}"
                features.append((block, row["images"], format_bytes(row["bytes"]), _when(row["used"])))
            limit = f"; features may take up to {format_bytes(cache.limit())}" if cache.writes else ""
        networks: list[tuple[object, ...]] = [
            (f"{_backbone(row)}, {row['size']} px: {', '.join(row['cuts'])}", format_bytes(row["bytes"]))
            for row in self._networks()
        ]
        files = sorted((self.folder / "weights").glob("*"))
        weights: list[tuple[object, ...]] = [(file.name, format_bytes(bytes_in(file))) for file in files]
        heads = ("features", "images", "bytes", "last used"), ("networks", "bytes"), ("weights", "bytes")
        tables = [(rows, head) for rows, head in zip((features, networks, weights), heads, strict=True) if rows]
        first, *others = [f'"{kind}"' for kind in KINDS]
        way = f"Clear with nbfeat.storage.clear({first}), {listing(others, 'or')}; NBFEAT_HOME names another folder."
        return f"{self.folder}: {format_bytes(self.bytes)}{limit}", tables, way

    def __repr__(self) -> str:
        head, tables, way = self._tables()
        return "\n".join([head, *(text_table(*each) for each in tables), way])

    def _repr_html_(self) -> str:
        head, tables, way = self._tables()
        return Html("".join([paragraph(head, strong=True), *(table(*each) for each in tables), paragraph(way)]))


storage = Storage()


def _backbone(row: dict[str, Any]) -> str:
    alpha = f" {row['alpha']:g}" if row["alpha"] else ""
    return f"{row['backbone']}{alpha} ({row.get('weights_name') or row['weights']} weights)"


def _when(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
    except (TypeError, ValueError, OverflowError, OSError):
        return "some time"  # damaged, and no matter
