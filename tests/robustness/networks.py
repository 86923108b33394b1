"""Loads damaged networks and weights of Keras: ``python -m tests.robustness.networks COUNT`` prints what came of it."""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "openvino"  # as where networks are built

import numpy as np

from nbfeat import NbfeatError, isolation
from nbfeat.backbones import keras_weights, user_models
from tests.backbones.user_networks import SIZE, plain
from tests.mutations import mutated

RUNS_CODE = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)
NAMES = ("plain.keras", "plain.weights.h5", "plain.h5")
MADE = ("plain", "damaged")


class Watch:
    """Notes programs that are started, and connections that are made."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        sys.addaudithook(self.see)

    def see(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in RUNS_CODE:
            self.seen.append(f"{event} {arguments}"[:200])


def damaged(name: str, files: dict[str, bytes], chance: random.Random) -> bytes:
    """Damage a file: its bytes, or those of a part of an archive whose sums are then right again."""
    data = files[name]
    if not name.endswith(".keras") or chance.random() < 0.3:
        return mutated(data, chance, 4096)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        part = chance.choice(source.namelist())
        for each in source.namelist():
            target.writestr(each, mutated(source.read(each), chance, 4096) if each == part else source.read(each))
    return out.getvalue()


def loaded(name: str, path: Path, network: Any) -> Any:
    if not name.endswith(".keras"):
        keras_weights.load(network, path)
        return network
    user_models.backbone_at(str(path))
    return user_models.load(path, SIZE)


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    pairs = list(zip(one, other, strict=False))
    return len(one) == len(other) == len(pairs) and all(np.array_equal(a, b) for a, b in pairs)


def part(start: int, count: int) -> None:
    """Load the damaged files from number `start` on, and print a line on each."""
    isolation.LONGEST_READING = 2
    isolation.quiet_child()
    keras: Any = importlib.import_module("keras")
    legacy: Any = importlib.import_module("keras.src.legacy.saving.legacy_h5_format")
    h5py: Any = importlib.import_module("h5py")
    keras.utils.set_random_seed(1)
    network = plain(keras)
    network.save(NAMES[0])
    network.save_weights(NAMES[1])
    with h5py.File(NAMES[2], "w") as file:
        legacy.save_weights_to_hdf5_group(file, network)
    files = {name: Path(name).read_bytes() for name in NAMES}
    right, watch = network.get_weights(), Watch()
    for number in range(start, count):
        chance, name = random.Random(number), NAMES[number % len(NAMES)]
        path = Path(f"damaged.{name.partition('.')[2]}").absolute()
        path.write_bytes(damaged(name, files, chance))
        outcome, odd = f"{name[5:]} refused", ""
        try:
            found = loaded(name, path, network).get_weights()
            outcome = f"{name[5:]} loaded {'right' if same(found, right) else 'with other numbers'}"
        except NbfeatError as error:
            text = str(error)
            if text.splitlines() != [text] or text[-1] != "." or len(text) > 600:
                odd = f"{number} {name}: {text}"
        except BaseException as error:  # any is odd
            odd = f"{number} {name}: {error!r}"
        print(json.dumps([number, outcome, odd, watch.seen]), flush=True)


def main(count: int) -> None:
    """Load `count` damaged files, and print what came of them; go on behind one that takes for ever."""
    outcomes, odd, seen, start = Counter[str](), set[str](), set[str](), 0
    while start < count:
        command = [sys.executable, "-X", "faulthandler", "-m", __spec__.name, str(start), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            number, outcome, what, watched = json.loads(line)
            outcomes[outcome] += 1
            odd.add(what)
            seen.update(watched)
            start = number + 1
        if done.returncode:
            if "Timeout (" not in done.stderr:
                odd.add(f"{start} ended with {done.returncode}: {done.stderr[-1000:]}")
            outcomes[f"{NAMES[start % len(NAMES)][5:]} ended in time"] += 1
            start += 1
    left = {path.name for path in Path().iterdir()} - {name.replace("plain", new) for name in NAMES for new in MADE}
    print(json.dumps({"outcomes": outcomes, "odd": sorted(odd - {""}), "seen": sorted(seen), "left": sorted(left)}))


if __name__ == "__main__":
    numbers = list(map(int, sys.argv[1:]))
    (part if len(numbers) > 1 else main)(*numbers)
