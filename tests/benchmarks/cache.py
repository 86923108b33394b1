"""``cache``: what keeping features costs, and what it saves."""

from __future__ import annotations

from collections.abc import Iterator

import nbfeat
from tests.benchmarks.limit import Limit, Ours
from tests.benchmarks.rounds import in_rounds, progress
from tests.benchmarks.setting import Setting, titled
from tests.benchmarks.table import Row, Table, rate, share, times

BACKBONE = "MobileNetV2"
WITHOUT, FIRST, AGAIN, LIMIT = "without the cache", "first run, features kept", "run again, features taken", "limit"
HEAD = ("nbfeat, auto", "images/s", "× without the cache", "of the limit")


def tables(setting: Setting) -> Iterator[Table]:
    """Measure one backbone."""
    progress("cache")
    note = (
        f"{len(setting.files)} images; whole runs, the network on disk. The share of the limit is of the steady part "
        "of a run, without opening the network and attaching columns."
    )
    yield Table(f"The cache: {titled(BACKBONE)}", HEAD, rows(setting), note)


def rows(setting: Setting) -> list[Row]:
    """Measure without the cache, with an empty one, and with a full one."""
    without = Ours(setting.files, BACKBONE, "auto")
    kept = Ours(setting.files, BACKBONE, "auto", cache=True)
    without.steady()  # builds the network, and settles the precision
    steady: dict[str, list[float]] = {WITHOUT: [], FIRST: []}

    def run(way: str, ours: Ours) -> float:
        steady[way].append(ours.steady())
        return ours.whole()

    def first() -> float:
        nbfeat.storage.clear()
        return run(FIRST, kept)

    def again() -> float:
        return max((kept.steady(), kept.whole())[1] for _ in range(3))

    limit = Limit(setting.files, BACKBONE, without.precision)  # type: ignore[arg-type]
    ways = {WITHOUT: lambda: run(WITHOUT, without), FIRST: first, AGAIN: again, LIMIT: limit.rate}
    found = in_rounds(ways, setting.rounds)
    found.values |= {f"{way}, steady": values for way, values in steady.items() if found.has(way)}
    made: list[Row] = []
    for way in ways:
        if way in found.missing:
            made.append((way, found.missing[way]))
            continue
        ratio = times(found.ratio(way, WITHOUT)) if found.has(WITHOUT) and way != LIMIT else ""
        has_share = found.has(f"{way}, steady", LIMIT)
        made.append(
            (way, rate(found.typical(way)), ratio, share(found.ratio(f"{way}, steady", LIMIT)) if has_share else "")
        )
    return made
