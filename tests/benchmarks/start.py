"""``start``: a fresh kernel, with nothing on disk and with the network there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.child import fresh
from tests.benchmarks.rounds import progress, why
from tests.benchmarks.setting import Setting, titled, weights_of
from tests.benchmarks.table import Row, Table

BACKBONE = "MobileNetV2"
IMAGES = 10
HEAD = ("fresh process", "import", f"to the features of {IMAGES} images", "peak memory", "TensorFlow or Keras imported")


def tables(setting: Setting) -> Iterator[Table]:
    """Measure starts, in turn."""
    request: dict[str, object] = {
        "folder": str(Path(setting.files[0]).parent),
        "count": IMAGES,
        "block": BACKBONE,
        "options": {"weights": weights_of(BACKBONE)},
    }
    ways: dict[str, dict[str, object]] = {
        "nbfeat, cold: the network is built": {},
        "nbfeat, warm: the network is on disk": {},
        "the tutorial loop": {"way": "tutorial"},
    }
    told: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    missing: dict[str, str] = {}
    for number in range(setting.rounds):
        home = setting.folder / "cold"  # the warm start finds there what the cold one built
        for way, more in ways.items():
            if way not in missing:
                progress(f"start: round {number + 1} of {setting.rounds}: {way}")
                try:
                    told[way].append(fresh({**request, **more}, NBFEAT_HOME=str(home)))
                except Exception as error:  # the row says it
                    missing[way] = why(error)
        shutil.rmtree(home, ignore_errors=True)
    rows = [(way, missing[way]) if way in missing else row(way, told[way]) for way in ways]
    note = "From `import` on; pandas and its pyarrow are in it. The medians of rounds."
    yield Table(f"Start: {titled(BACKBONE)}", HEAD, rows, note)


def row(way: str, told: list[dict[str, Any]]) -> Row:
    """Show one kind of start; a tutorial's import cannot be told from the rest."""
    middle = {what: median(each[what] for each in told) for what in ("total", "peak")}
    imported = f"{1000 * median(each['import'] for each in told):.0f} ms" if told[0]["import"] else ""
    heavy = (", ".join(told[0]["heavy"]) or "no") if "heavy" in told[0] else "yes"
    return way, imported, f"{middle['total']:.2f} s", f"{middle['peak']:,.0f} MB", heavy
