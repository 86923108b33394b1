"""``python -m tests.benchmarks.speed [--only SECTION …] [--quick]``: tables of speed, in GitHub's markdown.

Progress goes to stderr. Images per second hold for the machine and the day; the ratios are taken within rounds of one
run, on the same files, and are what can be compared. Everything is kept in a temporary folder; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from tests.benchmarks import accuracy, decoding, fresh, ways
from tests.benchmarks.measure import MissingError, Setting, Table, heading, progress, why

SECTIONS: dict[str, Callable[[Setting], Iterator[Table]]] = {
    "ways": ways.tables,
    "cores": fresh.cores_tables,
    "growth": fresh.growth_tables,
    "decoding": decoding.tables,
    "start": fresh.start_tables,
    "cache": ways.cache_tables,
    "accuracy": accuracy.tables,
}


def printed(section: str, tables: Iterator[Table]) -> Iterator[str]:
    """Return what a section prints; where it cannot run here, why."""
    try:
        for table in tables:
            yield table.markdown()
    except MissingError as error:
        yield f"### {section}\n\nNot measured: {error}."
    except Exception as error:  # the other sections go on
        progress(traceback.format_exc())
        yield f"### {section}\n\nNot measured: {why(error)}."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.speed", description="Measure speed.")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help="%(choices)s"
    )
    parser.add_argument("--quick", action="store_true", help="few images, one round: whether it works, not how fast")
    parser.add_argument("--rounds", type=int, help="how often everything is measured; by default 3")
    asked = parser.parse_args()
    print(heading(str(datetime.now(UTC).date())))
    if asked.quick:
        print("\n**Quick: few images, one round. These are no results.**")
    with tempfile.TemporaryDirectory() as name:
        setting = Setting(Path(name), rounds=asked.rounds or (1 if asked.quick else 3), quick=asked.quick)
        setting.use_own_homes()
        for section in asked.only:
            for text in printed(section, SECTIONS[section](setting)):
                print(f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
