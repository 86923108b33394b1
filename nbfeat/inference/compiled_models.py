"""Networks on disk: found by the hash of what was asked for, built by a child process where they are not there yet.

A network is a folder with a JSON manifest (what was asked, versions, SHA-256 of the weights and of each file) and is
used only if the digests agree.

``python -m nbfeat.inference.compiled_models SPEC OUT`` is the child: it reads a NetworkSpec as JSON and fills the
folder OUT with ``network.xml``, ``network.bin`` and ``manifest.json``; a SPEC without cuts asks for ``layers.json``,
what can be cut, alone. Each line on standard output is a JSON object: ``{"tell": text}`` on the way, ``{"error": class,
"message": text}`` at the end. A process of its own keeps Keras, its settings and 800 MB out of the kernel.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
import zipfile
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nbfeat import errors, isolation
from nbfeat.backbones import keras_applications, user_models, weights
from nbfeat.backbones.catalog import find
from nbfeat.inference.engines.keras import in_a_fresh_session
from nbfeat.inference.model import Base, Built, build, first_line, layers_of, load_base
from nbfeat.inference.spec import NetworkSpec, Output
from nbfeat.paths import HomeError, folder_written_whole, keep

_FILES = ("network.xml", "network.bin")
_ABANDONED_AFTER = 3600  # seconds; a network is built in less
FILE_ADVICE = f"{user_models.REGISTER} Keras then runs it."  # which does not help where it is registered


@dataclass(frozen=True, slots=True)
class Stored:
    """A network on disk, checked."""

    folder: Path
    outputs: dict[str, Output]
    weights: weights.Loaded
    note: str = ""  # why it could not be kept, where that is so
    owner: object = None  # keeps a temporary folder alive where nothing could be kept


def prepare(spec: NetworkSpec) -> Generator[str, None, Stored]:
    """Find or build the network of `spec`; yield sentences to show meanwhile."""
    parent, owner, problem = _kept_folder("networks")
    final = parent / spec.key(**versions())
    stored = _read(final)
    if stored is None:
        shutil.rmtree(final, ignore_errors=True)
        ready, _held = yield from located(spec)
        yield f"building {ready.network.title} (once; then it is kept)"
        with folder_written_whole(final) as made:
            yield from run_child(ready, made)
        if not (stored := _read(final)):
            unread = f"The network just written to {final} cannot be read back."
            raise errors.NetworkError(f"{unread} Is the disk full or changing?")
    # A file of the user's own may be another one by now than when it was named.
    if spec.backbone == user_models.NAME and stored.weights.sha256 != weights.digest(Path(spec.weights)):
        shutil.rmtree(final, ignore_errors=True)
        raise errors.WeightsError(f"{spec.network.title} changed while it was read. Run it again when it is saved.")
    note = f"{problem} The network is built for this run only." if problem else ""
    return replace(stored, note=note, owner=owner)


def located(spec: NetworkSpec) -> Generator[str, None, tuple[NetworkSpec, object]]:
    """Yield sentences while weights come that Keras does not fetch; return `spec` with their path, and their owner."""
    if spec.weights != "imagenet" or not find(spec.backbone).published:
        return spec, None
    folder, owner, _ = _kept_folder("weights")
    path = yield from weights.fetch(find(spec.backbone), folder)
    return replace(spec, weights=str(path)), owner


def _kept_folder(name: str) -> tuple[Path, object, str]:
    """Return a folder that stays, free of what killed processes left; else one that goes with its owner, and why."""
    try:
        folder = keep(name)
    except HomeError as error:
        folder, owner = Path(tempfile.mkdtemp(prefix="nbfeat-")), set[object]()  # one that can be referred to weakly
        weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
        return folder, owner, str(error)
    for half in folder.glob(".*"):
        with suppress(OSError):  # somebody else was first
            if time.time() - half.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(half) if half.is_dir() else half.unlink()
    return folder, None, ""


def _read(folder: Path) -> Stored | None:
    """Read and check a network; None where there is none, or it is not what its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if any(weights.digest(folder / name) != manifest["files"][name] for name in _FILES):
            return None
        outputs = {key: Output(**{**one, "shape": tuple(one["shape"])}) for key, one in manifest["outputs"].items()}
        return Stored(folder, outputs, weights.Loaded(**manifest["weights"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def run_child(spec: NetworkSpec, out: Path) -> Iterator[str]:
    """Run the child that builds `spec` into the folder `out`, yielding what it says on the way."""
    request = out / "request.json"
    request.write_text(json.dumps(asdict(spec)), encoding="utf-8")
    command = isolation.child_command(__name__, str(request), str(out))
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as noise,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=noise, stdin=subprocess.DEVNULL, text=True, encoding="utf-8",
            env=isolation.child_environment(),
        ) as child,
    ):  # fmt: skip
        try:
            for line in child.stdout or ():
                words: dict[str, Any] = json.loads(line)
                if "error" in words:
                    raise getattr(errors, words["error"])(words["message"])
                yield words["tell"]
            if child.wait():
                noise.seek(0)
                ended = f"The process that builds {spec.network.title} ended with {child.returncode}"
                said = noise.read().strip().splitlines() or ["it said nothing"]
                raise errors.NetworkError(f"{ended}: {said[-1]}")
        finally:
            child.kill()
    request.unlink()


def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers of a network on disk."""
    return {name: isolation.version_of(name) for name in ("keras", "openvino")}


# What a function of the user's builds


def build_user_model(spec: NetworkSpec, device: str, path: Path) -> tuple[Base, str]:
    """Build the registered network of `spec`, save it at `path`, and say why Keras alone cannot load it from there."""

    def work() -> tuple[Base, str]:
        base = load_base(spec, lambda _: None)
        try:
            base[0].save(path)
        except Exception as error:  # whatever the user's layers make of being saved
            return base, f"{spec.backbone} cannot be saved ({first_line(error)})"
        return base, ""

    base, why_not = in_a_fresh_session(work, device)
    if not why_not:
        try:
            user_models.backbone_at(str(path))
        except errors.NbfeatError as error:
            return base, why_not_as_file(error, spec.backbone)
        _write_without_dates(path)
    return base, why_not


def why_not_as_file(error: errors.NbfeatError, name: str) -> str:
    """Return what is said of a file as a clause about what was registered as `name`, without the next step."""
    clause = str(error).removesuffix(FILE_ADVICE).removesuffix(user_models.REGISTER).partition(": replace")[0]
    return clause.replace(f"{name}.keras", name).rstrip(" .")


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


# The child


def _main(spec_path: str, out: str) -> int:
    """Build and write; every failure becomes a line of JSON with a sentence in it."""
    # Standard output is a channel to the parent: keep it, and send what libraries print there to standard error.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(**line: str) -> None:
        channel.write(json.dumps(line) + "\n")

    try:
        isolation.quiet_child()
        spec = NetworkSpec.from_json(Path(spec_path).read_text(encoding="utf-8"))
        (_export if spec.cuts else _describe)(spec, Path(out), lambda text: say(tell=text))
    except errors.NbfeatError as error:
        say(error=type(error).__name__, message=str(error))
    except Exception as error:  # the parent turns it into a NetworkError
        say(error="NetworkError", message=f"{type(error).__name__}: {error}")
    else:
        return 0
    return 1


def _export(spec: NetworkSpec, out: Path, tell: weights.Tell) -> None:
    built = build(spec, tell, channels_first=True)
    try:
        _write(built, out / "network.xml")
    except Exception as error:
        if not spec.network.is_user_model:
            raise
        reason = f"OpenVINO cannot run {spec.network.title}: {first_line(error)}"
        raise errors.NetworkError(f"{reason}. {FILE_ADVICE}") from error
    manifest = {
        "spec": asdict(spec),
        "made_with": versions(),
        "weights": asdict(built.weights),
        "outputs": {key: asdict(output) for key, output in built.outputs.items()},
        "files": {name: weights.digest(out / name) for name in _FILES},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _write(built: Built, path: Path) -> None:
    """Trace the model and save the graph; Keras' `export` fixes the batch at 1 and leaves the outputs without names."""
    openvino: Any = isolation.import_openvino()
    operations: Any = importlib.import_module("openvino.opset13")
    ops: Any = importlib.import_module("keras").ops
    shape = [-1 if size is None else size for size in built.model.input_shape]
    pixels = operations.parameter(shape, openvino.Type.u8)
    pixels.output(0).set_names({"pixels"})
    results = []
    for key, value in built.model(ops.convert_to_tensor(pixels.output(0)), training=False).items():
        value.output.set_names({key})
        results.append(operations.result(value.output, name=key))
    graph = openvino.Model(results, [pixels])
    with suppress(ImportError, AttributeError):  # compiling then takes 0.4 s longer; the numbers are the same
        importlib.import_module("openvino._offline_transformations").apply_moc_transformations(graph, True)
    openvino.save_model(graph, path, compress_to_fp16=False)


def _describe(spec: NetworkSpec, out: Path, tell: weights.Tell) -> None:
    """Write what can be cut of the backbone of `spec`, with weights as Keras draws them: they do not matter here."""
    backbone = spec.network
    tell(f"building {backbone.title} to see its layers")
    if backbone.is_user_model:
        network = load_base(spec, tell)[0]
    else:
        network = keras_applications.build(backbone, size=spec.size, alpha=spec.alpha)
    (out / "layers.json").write_text(json.dumps(layers_of(network)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
