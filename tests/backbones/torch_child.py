"""Reads checkpoints in a process and says what that did (`python -m tests.backbones.torch_child read DIR`)."""

from __future__ import annotations

import json
import pickle
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from nbfeat.backbones import torch_weights
from nbfeat.errors import WeightsError
from tests.backbones import hostile_checkpoints
from tests.memory import peak

SEED = 20_180_813
RESET = Path("/proc/self/clear_refs")


class Watch:
    """Notes whatever the interpreter does for files, modules, programs and code while a checkpoint is read."""

    def __init__(self) -> None:
        self.reading: str | None = None
        self.seen: set[str] = set()
        sys.addaudithook(self.see)

    def see(self, event: str, arguments: tuple[object, ...]) -> None:
        # Printing a dataclass asks for ids, so as not to print one within itself.
        if self.reading and event != "builtins.id" and not (event == "open" and arguments[0] == self.reading):
            self.seen.add(f"{event} {arguments}"[:200])


def watched(paths: Iterator[Path], read_one: Callable[[Path], Mapping[str, object]]) -> dict[str, object]:
    """Read every file; return which could be read, how many were refused, and whatever should not have happened."""
    watch, read, odd, refused, slowest, most = Watch(), list[str](), list[str](), 0, 0.0, 0
    for path in paths:
        RESET.write_text("5", encoding="ascii")
        watch.reading, start = str(path), time.process_time()
        try:
            arrays = read_one(path)
            read.append(path.name)
            odd += [f"{path.name}: {name}" for name, array in arrays.items() if not isinstance(array, np.ndarray)]
        except WeightsError as error:
            refused += 1
            text = str(error)
            if (
                "\n" in text
                or len(text) > 400
                or not text.endswith(".")
                or "memory for it" in text
                or "RecursionError" in text
            ):
                odd.append(f"{path.name}: {text}")
        except BaseException as error:  # any is told
            odd.append(f"{path.name}: {error!r}")
        watch.reading, seconds = None, time.process_time() - start
        slowest = max(slowest, seconds)
        most = max(most, peak() - 2 * path.stat().st_size)
    seen = sorted(watch.seen)
    return {"read": read, "refused": refused, "odd": odd, "seen": seen, "seconds": slowest, "bytes": most}


def changing(folder: str, make: Callable[[random.Random], bytes], count: int) -> Iterator[Path]:
    chance, path = random.Random(SEED), Path(folder, "changed.pth")
    for _ in range(count):
        path.write_bytes(make(chance))
        yield path


def main(task: str, *words: str) -> None:
    """Do one task and print what came of it as JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    with tempfile.TemporaryDirectory() as name:
        match task:
            case "read" | "unpickle":
                paths = iter(sorted(Path(words[0]).iterdir()))
            case "mutate":
                data = Path(words[0]).read_bytes()
                paths = changing(name, lambda chance: hostile_checkpoints.mutated(data, chance), int(words[1]))
            case "programs":
                paths = changing(name, hostile_checkpoints.program, int(words[0]))
            case _:
                raise ValueError(task)
        unpickled = lambda path: {"value": pickle.loads(path.read_bytes())}  # noqa: S301 - to try the watch
        print(json.dumps(watched(paths, unpickled if task == "unpickle" else torch_weights.read)))


if __name__ == "__main__":
    main(*sys.argv[1:])
