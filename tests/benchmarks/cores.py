"""``cores``: how much faster all cores are than one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nbfeat.inference.engines.cpu_count import available_cores
from tests.benchmarks.child import fresh
from tests.benchmarks.rounds import MissingError, in_rounds, progress
from tests.benchmarks.setting import Setting, titled, weights_of
from tests.benchmarks.table import Row, Table, rate, share, times

BACKBONE = "MobileNetV2"
HEAD = ("nbfeat, auto", "images/s", "× one core", "of the cores' number")


def tables(setting: Setting) -> Iterator[Table]:
    """Measure one core and all, each in a fresh process."""
    progress("cores")
    if not hasattr(os, "sched_setaffinity"):
        raise MissingError("this system cannot tell a process which cores to use")
    cores = sorted(os.sched_getaffinity(0))
    if available_cores() == 1:
        raise MissingError("there is only one core")
    note = f"In fresh processes; the network is on disk. {len(setting.files)} images, medians of rounds."
    yield Table(f"One core against all: {titled(BACKBONE)}", HEAD, rows(setting, cores), note)


def rows(setting: Setting, cores: list[int]) -> list[Row]:
    """Measure, and compare."""
    one, every = "1 core", f"{available_cores()} cores"
    request: dict[str, object] = {
        "folder": str(Path(setting.files[0]).parent),
        "count": len(setting.files),
        "block": BACKBONE,
        "options": {"weights": weights_of(BACKBONE)},
    }

    precisions: dict[int, str] = {}  # by the number of cores, should `auto` choose another one on one core

    def steady(on: list[int]) -> float:
        told: dict[str, Any] = fresh({**request, "cores": on})
        precisions[len(on)] = told["precision"]
        return float(told["rate"])

    for on in (cores, cores[:1]):
        steady(on)  # builds the network, and settles the precision
    found = in_rounds({one: partial(steady, cores[:1]), every: partial(steady, cores)}, setting.rounds)
    made: list[Row] = []
    for way, count, of in ((one, 1, 1), (every, available_cores(), len(cores))):
        shown = f"{way}, {precisions[of]}"
        if way in found.missing:
            made.append((way, found.missing[way]))
        elif not found.has(one):
            made.append((shown, rate(found.typical(way))))
        else:
            ratio = found.ratio(way, one)
            made.append((shown, rate(found.typical(way)), times(ratio), share(ratio / count)))
    return made
