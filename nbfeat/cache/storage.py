"""Show what nbfeat stores on this machine, where, and how large it is; and clear it."""

from __future__ import annotations

import json
import secrets
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

_FOLDERS = {"networks": "networks layers", "weights": "weights", "precisions": "precisions", "all": "samples"}
KINDS = ("features", *_FOLDERS)


class Storage:
    """Features, networks, weights and precision checks that nbfeat has stored on this machine.

    Use the instance ``nbfeat.storage``; in a notebook it shows their sizes. See `clear` for how to delete them.

    Examples
    --------
    >>> "EfficientNetLite0" in set(nbfeat.storage.networks["backbone"])
    True
    """

    @property
    def folder(self) -> Path:
        """Path: the folder that holds everything. Set the environment variable NBFEAT_HOME to change it."""
        return home()

    @property
    def features(self) -> pd.DataFrame:
        """DataFrame: one row per cached feature block, with its options, number of images, bytes and last use."""
        import pandas as pd

        with closing(self._cache()) as cache:
            return pd.DataFrame(cache.blocks())

    @property
    def networks(self) -> pd.DataFrame:
        """DataFrame: one row per compiled network, with backbone, alpha, weights, size, cuts, bytes and folder."""
        import pandas as pd

        return pd.DataFrame(self._networks())

    @property
    def bytes(self) -> int:
        """int: the disk space in use, in bytes."""
        return bytes_in(self.folder)

    def clear(self, what: str = "features") -> None:
        """Delete stored data and free the disk space; later runs recreate what they need. Running notebooks continue.

        Parameters
        ----------
        what : {"features", "networks", "weights", "precisions", "all"}, default "features"
            The data to delete: cached features, compiled networks and layer tables, downloaded weights, or the results
            of comparing precisions; all of them and the files of `nbfeat.sample_photos`.

        Raises
        ------
        RequestError
            If `what` isn't one of these.
        NbfeatError
            If the cache file cannot be cleared.

        Examples
        --------
        >>> nbfeat.storage.clear("precisions")
        """
        if what not in KINDS:
            raise RequestError(f"Cannot clear {what!r}: use {listing(KINDS, 'or')}.")
        if what in {"features", "all"}:
            with closing(self._cache()) as cache:
                cache.clear()
                if cache.note and not cache.writes:
                    raise NbfeatError(cache.note)
        for kind, folders in _FOLDERS.items():
            for folder in folders.split() if what in {kind, "all"} else ():
                for path in (self.folder / folder).glob("[!.]*"):  # other names are of what is being written
                    with suppress(OSError):  # another process was faster
                        gone = path.rename(path.with_name(f".{secrets.token_hex(8)}"))  # at once
                        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()

    def _cache(self) -> Cache:
        return Cache.at_home() if (self.folder / "features").is_dir() else Cache(None)

    def _networks(self) -> Iterator[dict[str, Any]]:
        for folder in sorted((self.folder / "networks").glob("*")):
            # A folder without a manifest is being built, or was left by a process that was killed.
            with suppress(OSError, ValueError, KeyError, TypeError):
                manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
                spec, weights = manifest["spec"], manifest["weights"]["name"]
                cuts = [f"{cut['layer'] or 'end'} {cut['pooling']}".strip() for cut in spec["cuts"]]
                row = {"backbone": spec["backbone"], "alpha": spec["alpha"], "weights": weights, "size": spec["size"]}
                yield {**row, "cuts": cuts, "bytes": bytes_in(folder), "folder": str(folder)}

    def _tables(self) -> tuple[str, list[tuple[list[tuple[object, ...]], tuple[str, ...]]], str]:
        """Return the heading, the rows and header of each table, and how to clear them."""
        features: list[Any] = []
        with closing(self._cache()) as cache:
            for row in cache.blocks():
                cut = f"{row['layer'] or 'end'} {row['pooling'] or ''}".strip()
                block = f"{_backbone(row)} {row['resize']}: {cut}, {row['precision']}"
                features.append((block, row["images"], format_bytes(row["bytes"]), _when(row["used"])))
            limit = f"; features may take up to {format_bytes(cache.limit())}" if cache.writes else ""
        networks = [(f"{_backbone(row)}: {', '.join(row['cuts'])}", row["bytes"]) for row in self._networks()]
        weights = [(file.name, bytes_in(file)) for file in sorted((self.folder / "weights").glob("*"))]
        files = ([(name, format_bytes(size)) for name, size in sizes] for sizes in (networks, weights))
        heads = ("features", "images", "bytes", "last used"), ("networks", "bytes"), ("weights", "bytes")
        tables = [(rows, head) for rows, head in zip((features, *files), heads, strict=True) if rows]
        first, *others = [f'"{kind}"' for kind in KINDS]
        way = f"Clear with nbfeat.storage.clear({first}), {listing(others, 'or')}. Set NBFEAT_HOME to move this folder."
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
    return f"{row['backbone']}{alpha} ({row.get('weights_name') or row['weights']} weights), {row['size']} px"


def _when(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
    except (TypeError, ValueError, OverflowError, OSError):
        return "unknown"  # damaged
