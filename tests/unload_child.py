"""Loads the extension, uses and unloads it, again and again in a process of its own; says what that left behind.

`python -m tests.unload_child ROUNDS [BLOCK]`: with a block that is extracted for real, else by the pretended network.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.core.interactiveshell import InteractiveShell
from ipywidgets.widgets import widget
from PIL import Image
from traitlets.config import Config

from nbfeat.inference import engines
from tests.fake import FakeNetwork
from tests.memory import bytes_of

WARM_UP = 10
CELLS = (
    "result = %extract photos {block} --images path --into more --quiet",
    "%%extract photos --images path --quiet --no-cache\n{block} --prefix again;",
    "panel = %extract_panel photos",
    "panel.close(); del panel, result, more; photos = photos[['path']]",
    "%extract photos nosuch",
)


def one_round(shell: InteractiveShell, block: str) -> None:
    """Load the extension, run cells of all kinds, complete a word, and unload it."""
    shell.run_line_magic("load_ext", "nbfeat")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for cell in CELLS:
            outcome = shell.run_cell(cell.format(block=block))
            assert outcome.success or "nosuch" in cell, outcome
        shell.complete("%extract pho")
    shell.run_line_magic("unload_ext", "nbfeat")


def left_behind(shell: InteractiveShell) -> dict[str, Any]:
    """Count what an extension can leave behind."""
    for thread in threading.enumerate():
        if thread.name.startswith("nbfeat"):
            thread.join(30)  # a panel that was closed looks at images to the end
    tables: Any = shell.magics_manager.magics
    hooks: dict[str, list[Callable[..., object]]] = shell.events.callbacks
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": sum(1 for _ in Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").is_dir() else 0,
        "magics": {kind: sorted(table) for kind, table in tables.items()},
        "registry": sorted(shell.magics_manager.registry),
        "settings": [type(one).__name__ for one in shell.configurables],
        "matchers": len(shell.Completer.custom_matchers),
        "events": {event: len(calls) for event, calls in hooks.items()},
        "warnings": len(warnings.filters),
        "widgets": len(widget._instances),
        "extensions": sorted(getattr(shell.extension_manager, "loaded", ())),
        "objects": _objects(),
    }


def _objects() -> dict[str, int]:
    """Count what there is of each class of nbfeat."""
    gc.collect()
    kinds = [type(one) for one in gc.get_objects()]
    mine = Counter(kind.__qualname__ for kind in kinds if str(kind.__module__).startswith("nbfeat."))
    return dict(sorted(mine.items()))


def main(rounds: int, block: str = "") -> None:
    """Go round, and print what was there after the warm-up and at the end, and how memory grew from round to round."""
    if not block:
        engines.PreparedNetwork = FakeNetwork  # type: ignore[misc,assignment]
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=config)
    paths = [f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((8, 8, 3), 80 * number, np.uint8)).save(path)
    shell.user_ns["photos"] = pd.DataFrame({"path": paths})
    for _ in range(WARM_UP):
        one_round(shell, block or "MobileNet --size 32")
    before, start = left_behind(shell), bytes_of("VmRSS")
    for _ in range(rounds):
        one_round(shell, block or "MobileNet --size 32")
    print(json.dumps({"before": before, "after": left_behind(shell), "bytes": bytes_of("VmRSS") - start}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
