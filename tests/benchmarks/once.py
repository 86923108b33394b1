"""One extraction in a fresh process, and what it took, as JSON.

`processes.fresh` imports nbfeat before anything else, to see how long that takes, and so this imports little. The
request is JSON, too: `folder` and `count` of the images, `block`, `options` of the extraction, and `cores`, the numbers
of those that the process may use. With `way: "tutorial"` it is the tutorial loop instead.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from tests.memory import bytes_of


def main(start: float, imported: float) -> None:
    """Do what is asked for on the command line, and print what it took since `start`."""
    request = json.loads(sys.argv[1])
    files = [f"{request['folder']}/{number:06d}.jpg" for number in range(request["count"])]
    told: dict[str, Any] = {"import": imported}
    if request.get("way") == "tutorial":
        from tests.benchmarks.others import tutorial

        tutorial(files, request["block"], request["options"]["weights"])
        told["import"] = None
    else:
        told |= extraction(files, request)
    print(json.dumps({"total": time.perf_counter() - start, "peak": bytes_of("VmHWM") / 2**20, **told}))


def extraction(files: list[str], request: dict[str, Any]) -> dict[str, Any]:
    """Run nbfeat and return seconds, images per second and megabytes."""
    if request.get("cores"):
        os.sched_setaffinity(0, request["cores"])
    import pandas as pd

    import nbfeat

    frame = pd.DataFrame({"path": files})
    before = bytes_of("VmRSS") / 2**20
    began, worked = time.perf_counter(), time.process_time()
    result = nbfeat.extract(frame, request["block"], images="path", cache=False, **request["options"])
    return {
        "run": time.perf_counter() - began,
        "cpu": time.process_time() - worked,
        "before": before,
        "rate": result.rate,
        "matrix": 4 * len(frame) * len(result.columns) / 2**20,
        "precision": result.precision,
        "heavy": [name for name in ("tensorflow", "keras") if name in sys.modules],
    }
