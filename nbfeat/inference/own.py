"""A registered network, built in this kernel and handed over as a file, so that it runs like any other.

What Keras cannot load again without the user's own code stays in the kernel, and Keras runs it there.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nbfeat.backbones import user_models
from nbfeat.errors import NbfeatError
from nbfeat.inference.compiled_models import TemporaryFolder
from nbfeat.inference.engines import Engine, vectors_of
from nbfeat.inference.engines.session import in_a_fresh_session
from nbfeat.inference.model import Base, NetworkSpec, load_base

FILE_ADVICE = f"{user_models.REGISTER} Keras then runs it."  # which does not help where it is registered
_SEED = 9
_IMAGES = 16  # to tell networks apart by
_DIGITS = 3  # the same network gives others from run to run only beyond these


@dataclass(frozen=True, slots=True)
class Made:
    """A network that was built in this kernel: as it is, and the file that it is in where it needs no other code."""

    base: Base
    file: NetworkSpec | None
    why_not: str = ""
    owner: object = None  # keeps the folder of the file alive


def make(spec: NetworkSpec, device: str) -> Made:
    """Build the registered network of `spec`, and save it where Keras alone can load it again."""
    owner = TemporaryFolder()
    path = owner.path / f"{spec.backbone}.keras"

    def work() -> tuple[Base, str]:
        base = load_base(spec, lambda _: None)
        try:
            base[0].save(path)
        except Exception as error:  # whatever the user's layers make of being saved
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            return base, f"{spec.backbone} cannot be saved ({reason})"
        return base, ""

    base, why_not = in_a_fresh_session(work, device)
    if why_not:
        return Made(base, None, why_not)
    try:
        user_models.backbone_at(str(path))
    except NbfeatError as error:
        return Made(base, None, why_not_as_file(error, spec.backbone))
    _write_without_dates(path)
    return Made(base, replace(spec, backbone=user_models.NAME, weights=str(path)), owner=owner)


def why_not_as_file(error: NbfeatError, name: str) -> str:
    """Return what is told of a file as a clause about what was registered as `name`, without the next step."""
    told = str(error).removesuffix(FILE_ADVICE).removesuffix(user_models.REGISTER).partition(": replace")[0]
    return told.replace(f"{name}.keras", name).rstrip(" .")


def _write_without_dates(path: Path) -> None:
    """Write a ``.keras`` file anew without times and addresses in memory, so that equal networks are equal files."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    numbers: dict[int, int] = {}

    def renumbered(thing: dict[str, Any]) -> dict[str, Any]:
        if "shared_object_id" in thing:
            thing["shared_object_id"] = numbers.setdefault(thing["shared_object_id"], len(numbers) + 1)
        return thing

    parts["config.json"] = json.dumps(json.loads(parts["config.json"], object_hook=renumbered)).encode()
    parts["metadata.json"] = json.dumps({**json.loads(parts["metadata.json"]), "date_saved": ""}).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(parts):
            archive.writestr(zipfile.ZipInfo(name), parts[name])


def what_it_gives(engine: Engine) -> str:
    """Return a digest of what a network gives for seeded pixels: of code there is no hash, of what it does there is."""
    shape = engine.buffer().shape[1:]
    engine.close()
    # The same images whatever the engine's size of a batch, which a GPU's is measured for.
    pixels = np.random.default_rng(_SEED).integers(0, 256, (_IMAGES, *shape), np.uint8)
    total = hashlib.sha256()
    for key, vectors in sorted(vectors_of(engine, pixels).items()):
        largest = np.abs(vectors).max(initial=0)
        total.update(f"{key} {largest:.{_DIGITS}e} {vectors.shape}".encode())
        # Adding zero takes the sign from what was rounded to -0.
        total.update((np.round(vectors / (largest or 1), _DIGITS) + 0.0).astype("float32").tobytes())
    return total.hexdigest()


def rows(spec: NetworkSpec) -> list[dict[str, Any]]:
    """Return what `nbfeat.layers` shows of a registered network."""
    describe: Any = importlib.import_module("nbfeat.inference.export").rows_of
    found: list[dict[str, Any]] = in_a_fresh_session(lambda: describe(load_base(spec, lambda _: None)[0]), "cpu")
    return found
