"""A day of work in minutes: ``python -m tests.robustness.soak EXTRACTIONS`` in one shell, with a real network.

Extractions of mixed kinds follow each other, with interrupts, reloads, clears and cancelled panels among them. It
prints what there was a quarter of the way, halfway and at the end, as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.core.interactiveshell import InteractiveShell
from matplotlib import pyplot as plt
from PIL import Image
from traitlets.config import Config

import nbfeat
from tests.memory import bytes_of
from tests.unload_child import left_behind

BLOCK = "MobileNet --alpha 0.25 --size 32 --weights random"
OTHER = "MobileNet --alpha 0.25 --weights random --size 48"
IMAGES = 60
LAYER = "conv_pw_3_relu"
# One extraction each, whatever else it does.
KINDS: dict[str, str] = {
    "cached": "result = %extract photos {block} --images path --into more --quiet",
    "not cached": "%extract photos {block} --images path --into more --no-cache",
    "cell": "%%extract photos --images path --into more\n{block} --normalize standard\n{block} --layer {layer} -x a",
    "two networks": "%%extract photos --images path --into more --quiet\n{block}\n{other} --prefix b;",
    "files": "%extract photos {block} --images path --parquet {files}",
    "read": "made(photos, parquet='{files}', cache=True); nbfeat.read('{files}').frame",
    "like": "train = nbfeat.extract(photos[::2], '{block} --normalize standard'); train.like(photos[1::2]).frame",
    "similar": "nbfeat.similar(made(photos), photos.path[0])._repr_html_()",
    "compare": "nbfeat.compare(made(photos), 'label', cv=3, speed=False)._repr_html_()",
    "scatter": "nbfeat.scatter(made(photos), 'label')",
    "thumbnails": "nbfeat.thumbnails(made(photos))._repr_html_()",
    "recipe": "made(photos).to_parquet('{files}.parquet')",
    "interrupted": "%extract photos {block} --images path --into more --no-cache --batch-size 2",
    "panel": "panel = nbfeat.Panel('photos'); panel.extract(); panel.wait(60); panel.close(); del panel",
    "cancelled": "panel = nbfeat.Panel('photos'); panel.extract(); panel.cancel(); panel.wait(60)\n"
                 "panel.extract(); panel.wait(60); panel.close(); del panel",
    "failing": "%extract broken {block} --images path --into more",
}  # fmt: skip
# What comes between them.
BETWEEN = (
    "%reload_ext nbfeat", "%unload_ext nbfeat\n%load_ext nbfeat", "nbfeat.storage.clear()", "%extract_cache",
    "%backbones Res*", "%extract photos nosuch", "%extract -h", "nbfeat.storage.clear('all')",
)  # fmt: skip
FAILS = ("nosuch",)


class Soak:
    """A shell with a frame of images, and what it did."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.done, self.between, self.interrupts = chance, Counter[str](), Counter[str](), 0
        mpl.use("agg")
        config = Config()
        config.HistoryManager.enabled = False
        config.InteractiveShell.cache_size = 0
        self.shell = InteractiveShell.instance(config=config)
        paths = [f"{number}.png" for number in range(IMAGES)]
        pixels = np.random.default_rng(0).integers(0, 255, (IMAGES, 40, 40, 3), dtype=np.uint8)
        for path, image in zip(paths, pixels, strict=True):
            Image.fromarray(image).save(path)
        photos = pd.DataFrame({"path": paths, "label": [f"kind {number % 3}" for number in range(IMAGES)]})
        broken = photos.assign(path=[path if number % 3 else "gone.png" for number, path in enumerate(paths)])
        made = lambda frame, **options: nbfeat.extract(frame, BLOCK, images="path", **options)
        self.names = {"photos": photos, "broken": broken, "nbfeat": nbfeat, "made": made}
        self.run("%load_ext nbfeat")

    def run(self, cell: str, *, may_fail: bool = False) -> bool:
        """Run a cell; an unexpected error ends the soak."""
        self.shell.user_ns.update(self.names)
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            outcome = self.shell.run_cell(cell)
        assert outcome.success or may_fail or any(word in cell for word in FAILS), f"{cell}: {said.getvalue()[-2000:]}"
        return bool(outcome.success)

    def extraction(self, kind: str, number: int) -> None:
        files = f"files {number}"
        cell = KINDS[kind].format(block=BLOCK, other=OTHER, files=files, layer=LAYER)
        if kind == "interrupted":
            timer = threading.Timer(self.chance.random() / 10, os.kill, (os.getpid(), signal.SIGINT))
            with contextlib.suppress(KeyboardInterrupt):  # it may come just after the cell
                timer.start()
                self.interrupts += not self.run(cell, may_fail=True)
            with contextlib.suppress(KeyboardInterrupt):
                timer.join()
                time.sleep(0.01)
        else:
            self.run(cell.replace(files, files.replace(" ", "-")))
        for path in Path().glob("files-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.done[kind] += 1
        for name in ("more", "train", "result"):
            self.shell.user_ns.pop(name, None)
        plt.close("all")

    def pause(self) -> None:
        """Do something that isn't an extraction; now and then, delete all networks too."""
        cell = self.chance.choice(BETWEEN[:-1]) if self.chance.random() < 0.95 else BETWEEN[-1]
        self.run(cell)
        self.between[cell.partition("\n")[0]] += 1

    def state(self) -> dict[str, Any]:
        """Return what there is now: what an extension can leave behind, children, and bytes of memory."""
        for name in [name for name in self.shell.user_ns if name.startswith("_")]:
            if name.strip("_i0123456789") == "" and name not in {"_", "__", "___", "_i", "_ii", "_iii"}:
                del self.shell.user_ns[name]
        self.run("%extract photos nosuch")  # its traceback takes the place of a larger one, which IPython keeps
        found = left_behind(self.shell)
        found["magics"] = sum(map(len, found["magics"].values()))
        found["registry"], found["settings"] = len(found["registry"]), len(found["settings"])
        files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        found["files"] = sorted(file.partition(":")[0] for file in files if not re.search("/fd|/fonts/", file))
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
        found |= {"children": len(children), "temporary": sorted(os.listdir(tempfile.gettempdir()))}
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return {**found, "bytes": bytes_of("VmRSS")}


def main(extractions: int) -> None:
    """Warm up with each kind twice, then work, and print the states."""
    soak, started = Soak(random.Random(extractions)), time.perf_counter()
    for number, kind in enumerate([*KINDS, *KINDS]):
        soak.extraction(kind, number)
    for cell in BETWEEN[:-1]:
        soak.run(cell)
    soak.done.clear()
    states = {}
    order = [list(KINDS)[number % len(KINDS)] for number in range(extractions)]
    soak.chance.shuffle(order)
    for number, kind in enumerate(order, start=1):
        soak.extraction(kind, number)
        soak.pause()
        if number in {extractions // 4, extractions // 2, extractions}:
            states[f"{100 * number // extractions} %"] = soak.state()
    seconds = time.perf_counter() - started
    counts = {"done": soak.done, "between": soak.between, "interrupts": soak.interrupts}
    print(json.dumps({"states": states, **counts, "seconds": seconds}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
