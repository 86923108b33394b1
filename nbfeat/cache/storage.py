"""What nbfeat keeps on this machine: where, how large, and how to clear it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbfeat.cache.database import Cache
from nbfeat.errors import NbfeatError, RequestError, format_bytes, listing
from nbfeat.html import Html, paragraph, table, text_table
from nbfeat.paths import home

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("features", "networks", "weights", "precisions", "all")
_HEADS = {
    "features": ("features", "images", "bytes", "last used"),
    "networks": ("networks", "bytes"),
    "weights": ("weights", "bytes"),
}


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

        with _cache(self.folder) as cache:
            blocks = cache.blocks() if cache else []
        rows = [{**block, "bytes": 4 * block["width"] * block["rows"]} for block in blocks]
        return pd.DataFrame(rows).rename(columns={"rows": "images"})

    @property
    def networks(self) -> pd.DataFrame:
        """One row for each network that was built: backbone, weights, input size, cuts, bytes, folder."""
        import pandas as pd

        return pd.DataFrame(self._networks())

    @property
    def bytes(self) -> int:
        """How much disk all of it takes."""
        return _size(self.folder)

    def clear(self, what: str = "features") -> None:
        """Forget one kind of what is kept, and give the disk back: by default the features that were computed.

        Notebooks that run meanwhile go on. What is forgotten is computed, built, loaded or measured again when it is
        asked for.

        Parameters
        ----------
        what
            ``"features"``, ``"networks"`` that were built, ``"weights"`` that were downloaded, ``"precisions"``: in
            what each network was found to compute best; or ``"all"``.
        """
        if what not in KINDS:
            raise RequestError(f"clear takes {', '.join(KINDS)}, not {what!r}.")
        if what in {"features", "all"}:
            with _cache(self.folder) as cache:
                if cache:
                    cache.clear()
                    if cache.note and not cache.writes:
                        raise NbfeatError(cache.note)
        if what in {"networks", "all"}:
            for folder in ("networks", "layers"):
                shutil.rmtree(self.folder / folder, ignore_errors=True)
        if what in {"weights", "all"}:
            shutil.rmtree(self.folder / "weights", ignore_errors=True)
        if what in {"precisions", "all"}:
            shutil.rmtree(self.folder / "precisions", ignore_errors=True)

    def _networks(self) -> list[dict[str, Any]]:
        rows = []
        for folder in sorted((self.folder / "networks").glob("*")):
            try:
                manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
                spec, loaded = manifest["spec"], manifest["weights"]
                cuts = [f"{cut['layer'] or 'end'} {cut['pooling']}".strip() for cut in spec["cuts"]]
                rows.append(
                    {"backbone": spec["backbone"], "alpha": spec["alpha"], "weights": loaded["name"],
                     "size": spec["size"], "cuts": cuts, "bytes": _size(folder), "folder": str(folder)}
                )  # fmt: skip
            except (OSError, ValueError, KeyError, TypeError):
                continue  # being built, or left behind by a process that was killed
        return rows

    def _shown(self) -> tuple[str, dict[str, list[tuple[object, ...]]], str]:
        """Return the heading, the rows of both tables, and what can be done."""
        networks: list[tuple[object, ...]] = [
            (f"{_backbone(row)}, {row['size']} px: {', '.join(row['cuts'])}", format_bytes(row["bytes"]))
            for row in self._networks()
        ]
        weights: list[tuple[object, ...]] = [
            (file.name, format_bytes(_size(file))) for file in sorted((self.folder / "weights").glob("*"))
        ]
        with _cache(self.folder) as cache:
            blocks = cache.blocks() if cache else []
            limit = f"; features may take up to {format_bytes(cache.limit())}" if cache and cache.writes else ""
        features: list[tuple[object, ...]] = [
            (_block(row), row["rows"], format_bytes(4 * row["width"] * row["rows"]), _when(row["used"]))
            for row in blocks
        ]
        head = f"{self.folder}: {format_bytes(self.bytes)}{limit}"
        first, *others = [f'"{kind}"' for kind in KINDS]
        way = f"Clear with nbfeat.storage.clear({first}), {listing(others, 'or')}; NBFEAT_HOME names another folder."
        return head, {"features": features, "networks": networks, "weights": weights}, way

    def __repr__(self) -> str:
        head, tables, way = self._shown()
        return "\n".join([head, *(text_table(rows, _HEADS[kind]) for kind, rows in tables.items() if rows), way])

    def _repr_html_(self) -> str:
        head, tables, way = self._shown()
        drawn = [table(rows, _HEADS[kind]) for kind, rows in tables.items() if rows]
        return Html("".join([paragraph(head, strong=True), *drawn, paragraph(way)]))


storage = Storage()


@contextmanager
def _cache(folder: Path) -> Iterator[Cache | None]:
    """Open the cache if there is one; looking at it makes none."""
    if not (folder / "features").is_dir():
        yield None
        return
    with closing(Cache.at_home()) as cache:
        yield cache


def _backbone(row: dict[str, Any]) -> str:
    alpha = f" {row['alpha']:g}" if row["alpha"] else ""
    weights = row.get("weights_name") or row["weights"]
    return f"{row['backbone']}{alpha} ({weights} weights)"


def _block(row: dict[str, Any]) -> str:
    cut = f"{row['layer'] or 'end'} {row['pooling'] or ''}".strip()
    return f"{_backbone(row)}, {row['size']} px {row['resize']}: {cut}, {row['precision']}"


def _when(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
    except (TypeError, ValueError, OverflowError, OSError):
        return "some time"  # damaged, and no matter


def _size(folder: Path) -> int:
    total = 0
    for path in [folder, *folder.rglob("*")]:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # just removed
    return total
