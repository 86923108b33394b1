"""Networks on disk: found by the hash of what was asked for, built by a child process where they are not there yet.

A network is a folder with a JSON manifest (what was asked, versions, SHA-256 of the weights and of each file) and is
used only if the digests agree.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nbfeat import errors, isolation
from nbfeat.backbones import user_models, weights
from nbfeat.backbones.catalog import find
from nbfeat.inference.export import versions
from nbfeat.inference.model import NetworkSpec, Output
from nbfeat.paths import HomeError, folder_written_whole, keep

FILES = ("network.xml", "network.bin")
ABANDONED_AFTER = 3600  # seconds; a network is built in less


@dataclass(frozen=True, slots=True)
class Stored:
    """A network on disk, checked."""

    folder: Path
    outputs: dict[str, Output]
    weights: weights.Loaded
    owner: object = None  # keeps a temporary folder alive where nothing could be kept


class Preparing:
    """Find or build the network of `spec`; iterate for sentences to show meanwhile, then read `result`."""

    result: Stored
    note = ""  # why nothing could be kept, where that is so

    def __init__(self, spec: NetworkSpec) -> None:
        self.spec = spec

    def __iter__(self) -> Iterator[str]:
        """Work, yielding what is being done."""
        owner = None
        try:
            parent = keep("networks")
        except HomeError as error:
            self.note = f"{error} The network is built for this run only."
            owner = TemporaryFolder()
            parent = owner.path
        final = parent / self.spec.key(**versions())
        if found := read(final):
            self.result = self._checked(found)
            return
        shutil.rmtree(final, ignore_errors=True)
        remove_abandoned(parent)
        spec, _held = yield from located(self.spec)
        yield f"building {spec.title} (once; then it is kept)"
        with folder_written_whole(final) as made:
            yield from run_child(spec, made)
        if not (written := read(final)):
            raise errors.NetworkError(
                f"The network just written to {final} cannot be read back. Is the disk full or changing?"
            )
        self.result = replace(self._checked(written), owner=owner)

    def _checked(self, found: Stored) -> Stored:
        """Refuse a network of the user's own whose file was another one when it was loaded than when it was named."""
        if self.spec.backbone == user_models.NAME and found.weights.sha256 != weights.digest(Path(self.spec.weights)):
            shutil.rmtree(found.folder, ignore_errors=True)
            raise errors.WeightsError(f"{self.spec.title} changed while it was read. Run it again when it is saved.")
        return found


def located(spec: NetworkSpec) -> Generator[str, None, tuple[NetworkSpec, object]]:
    """Yield sentences while weights come that Keras does not fetch; return `spec` with their path, and their owner."""
    if spec.weights != "imagenet" or not find(spec.backbone).published:
        return spec, None
    backbone = find(spec.backbone)
    owner = None
    try:
        folder = keep("weights")
    except HomeError:
        owner = TemporaryFolder()
        folder = owner.path
    remove_abandoned(folder)
    path = yield from weights.fetch(backbone, folder)
    return replace(spec, weights=str(path)), owner


def remove_abandoned(parent: Path) -> None:
    """Remove what processes that were killed while building or downloading left behind in `parent`."""
    for half in parent.glob(".*"):
        with suppress(OSError):  # somebody else was first
            if time.time() - half.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(half) if half.is_dir() else half.unlink()


class TemporaryFolder:
    """A folder that is removed when nobody holds this object any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="nbfeat-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def read(folder: Path) -> Stored | None:
    """Read and check a network; None where there is none, or it is not what its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if any(weights.digest(folder / name) != manifest["files"][name] for name in FILES):
            return None
        outputs = {
            key: Output(**{**parts, "shape": tuple(parts["shape"])}) for key, parts in manifest["outputs"].items()
        }
        return Stored(folder, outputs, weights.Loaded(**manifest["weights"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def run_child(spec: NetworkSpec, out: Path) -> Iterator[str]:
    """Run the child that builds `spec` into the folder `out`, yielding what it says on the way."""
    request = out / "request.json"
    request.write_text(json.dumps(asdict(spec)), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "nbfeat.inference.export", str(request), str(out)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise:
        child = subprocess.Popen(  # this interpreter, this package
            command, stdout=subprocess.PIPE, stderr=noise, stdin=subprocess.DEVNULL, text=True, encoding="utf-8",
            env=isolation.child_environment(),
        )  # fmt: skip
        try:
            assert child.stdout is not None
            for line in child.stdout:
                words: dict[str, Any] = json.loads(line)
                if "error" in words:
                    raise getattr(errors, words["error"])(words["message"])
                yield words["tell"]
            if child.wait():
                noise.seek(0)
                last = (noise.read().strip().splitlines() or ["it said nothing"])[-1]
                raise errors.NetworkError(f"The process that builds {spec.title} ended with {child.returncode}: {last}")
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    request.unlink()
