"""One extraction in a fresh process, and what it took, as JSON.

`child.fresh` imports nbfeat before anything else, to see how long that takes. The request is JSON, too: `folder` and
`count` of the images, `block`, `options` of the extraction, and `cores`, the numbers of those that the process may use.
With `way: "tutorial"` it is the tutorial loop instead.
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
    told = tutorial(request) if request.get("way") == "tutorial" else extraction(request)
    print(json.dumps({"import": imported, "total": time.perf_counter() - start, "peak": megabytes("VmHWM"), **told}))


def extraction(request: dict[str, Any]) -> dict[str, Any]:
    """Run nbfeat and return seconds, images per second and megabytes."""
    if request.get("cores"):
        os.sched_setaffinity(0, request["cores"])
    import pandas as pd

    import nbfeat

    files = [f"{request['folder']}/{number:06d}.jpg" for number in range(request["count"])]
    frame = pd.DataFrame({"path": files})
    before = megabytes("VmRSS")
    began, worked = time.perf_counter(), time.process_time()
    result = nbfeat.extract(frame, request["block"], images="path", cache=False, **request["options"])
    run, cpu = time.perf_counter() - began, time.process_time() - worked
    return {
        "run": run,
        "cpu": cpu,
        "before": before,
        "rate": result.rate,
        "matrix": 4 * len(frame) * len(result.columns) / 2**20,
        "precision": result.precision,
        "failed": len(result.failures),
        "heavy": [name for name in ("tensorflow", "keras") if name in sys.modules],
    }


def tutorial(request: dict[str, Any]) -> dict[str, Any]:
    """Do as the tutorials do."""
    from tests.benchmarks.keras_ways import tutorial

    files = [f"{request['folder']}/{number:06d}.jpg" for number in range(request["count"])]
    tutorial(files, request["block"], request["options"]["weights"])
    return {"import": None}


def megabytes(what: str) -> float:
    """Return the memory that this process has, ``VmRSS``, or the most that it has had, ``VmHWM``."""
    return bytes_of(what) / 2**20
