"""Exit while a daemon thread extracts: ``exit_child.py SECONDS thread|job``."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pandas as pd

import nbfeat
from nbfeat.jupyter.job import Job


def main(seconds: float, kind: str) -> None:
    images = list(np.random.default_rng(0).integers(0, 255, (3000, 64, 64, 3), dtype=np.uint8))
    frame = pd.DataFrame({"image": pd.Series(images, dtype=object)})
    extraction = nbfeat.Extraction(frame, "MobileNetV2 --weights random --size 96", cache=False)
    if kind == "job":
        Job(extraction, lambda _: None, lambda work: work(), lambda: None).start()
    else:
        threading.Thread(target=extraction.run, daemon=True).start()
    while not extraction.done:
        time.sleep(0.01)
    time.sleep(seconds)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
