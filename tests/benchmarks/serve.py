"""Measure ways of doing the same, each in a process of its own: one JSON request per line in, one answer out.

Needs nothing but Python, since the process may be that of an environment without nbfeat.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Answer = dict[str, Any]


def serve(ways: Mapping[str, Callable[..., Answer | None]]) -> None:
    """Answer requests until there are no more; what libraries print goes elsewhere."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm: set[str] = set()
    for line in sys.stdin:
        answers.write(json.dumps(answer(ways, json.loads(line), warm)) + "\n")
        answers.flush()


def answer(ways: Mapping[str, Callable[..., Answer | None]], request: dict[str, Any], warm: set[str]) -> Answer:
    """Run one way and return its seconds and what it tells, or what it lacks, or how it failed.

    The first time it runs over a few images before, `first` of them: it may build, trace or compile something.
    """
    files, first = request.pop("files"), request.pop("first", 32)
    key = json.dumps(request, sort_keys=True)
    way = ways[request.pop("way")]
    try:
        if key not in warm:
            way(files=files[:first], **request)
            warm.add(key)
        start = time.perf_counter()
        told = way(files=files, **request)
        return {"seconds": time.perf_counter() - start, **(told or {})}
    except ImportError as error:
        return {"missing": error.name or str(error)}
    except Exception as error:  # the row of the table says it
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0]}"}
