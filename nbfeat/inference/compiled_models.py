"""Store compiled networks on disk, by the hash of their spec; a child process builds those that don't exist yet.

``python -m nbfeat.inference.compiled_models SPEC OUT`` is the child: it reads a NetworkSpec as JSON and writes
``network.xml``, ``network.bin`` and ``manifest.json`` to the folder OUT; for a SPEC without cuts, only ``layers.json``,
the list of cut points. Each line on standard output is a JSON object: ``{"tell": text}`` for progress, ``{"error":
class, "message": text}`` for a failure. A separate process keeps Keras, its settings and 800 MB out of the kernel.
"""

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nbfeat import errors, isolation
from nbfeat.backbones import user_models, weights
from nbfeat.backbones.catalog import find
from nbfeat.inference.engines.devices import is_out_of_memory, memory_errors_named
from nbfeat.inference.engines.keras import in_a_fresh_session
from nbfeat.inference.model import Base, Built, build, layers_of, load_base
from nbfeat.inference.spec import NetworkSpec, Output
from nbfeat.paths import HomeError, folder_written_whole, keep, temporary_folder

_FILES = ("network.xml", "network.bin")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, over the user's quota, larger than a file may be
_ABANDONED_AFTER = 3600  # seconds; building a network takes less
FILE_ADVICE = f"{user_models.REGISTER} Keras then runs it."  # removed for registered models, which it doesn't help


@dataclass(frozen=True, slots=True)
class Stored:
    """A network on disk whose hashes were checked."""

    folder: Path
    outputs: dict[str, Output]
    weights: weights.Loaded
    note: str = ""  # why it could not be saved, if so
    owner: object = None  # keeps a temporary folder alive if it could not be saved


def prepare(spec: NetworkSpec) -> Generator[str, None, Stored]:
    """Find or build the network of `spec`, yielding progress messages; if the disk is full, in a temporary folder."""
    parent, owner, problem = _kept_folder("networks")
    try:
        stored = yield from _stored_in(parent, spec)
    except errors.DiskFullError as error:
        if owner is not None:
            raise
        (parent, owner), problem = temporary_folder(), str(error)
        stored = yield from _stored_in(parent, spec)
    return replace(stored, note=problem and f"{problem} The network was built only for this run.", owner=owner)


def _stored_in(parent: Path, spec: NetworkSpec) -> Generator[str, None, Stored]:
    final = parent / spec.key(**versions())
    if (stored := _read(final)) is None:
        shutil.rmtree(final, ignore_errors=True)
        ready, _held = yield from located(spec)
        yield f"building {ready.network.title} (only once; it is then cached)"
        with _full_disk_named(parent), folder_written_whole(final) as made:
            yield from run_child(ready, made)
            if not (stored := _read(made)):
                unread = f"The network just written to {made} cannot be read back."
                raise errors.NetworkError(f"{unread} Check the disk, and run it again.")
        stored = replace(stored, folder=final)
    # The user's file may have changed since the hash was computed.
    if spec.backbone == user_models.NAME and stored.weights.sha256 != weights.digest(Path(spec.weights)):
        shutil.rmtree(final, ignore_errors=True)
        raise errors.WeightsError(f"{spec.network.title} changed while it was being read. Run it again.")
    return stored


def located(spec: NetworkSpec) -> Generator[str, None, tuple[NetworkSpec, object]]:
    """Download weights that Keras doesn't have, yielding progress; return `spec` with their path, and their owner."""
    if spec.weights != "imagenet" or not find(spec.backbone).published:
        return spec, None
    owner = None
    if (path := weights.on_this_machine(find(spec.backbone))) is None:
        folder, owner, _ = _kept_folder("weights")
        path = yield from weights.fetch(find(spec.backbone), folder)
    return replace(spec, weights=str(path)), owner


def _kept_folder(name: str) -> tuple[Path, object, str]:
    """Return a permanent folder, cleared of abandoned files, or a temporary one with its owner and the reason."""
    try:
        folder = keep(name)
    except HomeError as error:
        return *temporary_folder(), str(error)
    for half in folder.glob(".*"):
        with suppress(OSError):  # another process was faster
            if time.time() - half.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(half) if half.is_dir() else half.unlink()
    return folder, None, ""


@contextmanager
def _full_disk_named(folder: Path, needed: float = 0) -> Iterator[None]:
    """Turn errors about the full disk of `folder` into DiskFullError, with the bytes that are free and `needed`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free, more = shutil.disk_usage(folder).free, f" and {errors.format_bytes(needed)} needed" if needed else ""
        problem = f"The disk is full at {folder} ({error.strerror}, {errors.format_bytes(free)} free{more})."
        way = "Free some space, or set NBFEAT_HOME to a folder on another disk."
        raise errors.DiskFullError(f"{problem} {way}") from error


def _read(folder: Path) -> Stored | None:
    """Read and check a network; None if it doesn't exist or doesn't match its manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if any(weights.digest(folder / name) != manifest["files"][name] for name in _FILES):
            return None
        outputs = {key: Output(**{**one, "shape": tuple(one["shape"])}) for key, one in manifest["outputs"].items()}
        return Stored(folder, outputs, weights.Loaded(**manifest["weights"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def run_child(spec: NetworkSpec, out: Path) -> Iterator[str]:
    """Run the child process that builds `spec` in the folder `out`, yielding its progress messages."""
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
                ended = f"The process that builds {spec.network.title} ended with exit status {child.returncode}"
                said = noise.read().strip().splitlines() or ["it printed no error"]
                if any(line.startswith("Timeout (") for line in said):  # from isolation.reading_in_time
                    problem = f"The weights of {spec.network.title} take longer to read than an intact file does"
                    raise errors.WeightsError(f"{problem}. Download or save them again.")
                with memory_errors_named(f"build {spec.network.title}"):
                    if child.returncode == -9 or is_out_of_memory(RuntimeError(said[-1])):  # Linux kills the largest
                        raise MemoryError(said[-1])
                raise errors.NetworkError(f"{ended}: {said[-1]}")
        finally:
            child.kill()
    request.unlink()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that affect the features of a network on disk."""
    return {name: isolation.version_of(name) for name in ("keras", "openvino")}


def build_user_model(spec: NetworkSpec, device: str, path: Path) -> tuple[Base, str]:
    """Build the registered network of `spec`, save it at `path`, and say why Keras cannot load it from there, if so."""

    def work() -> tuple[Base, str]:
        base = load_base(spec, lambda _: None)
        try:
            base[0].save(path)
        except Exception as error:  # custom layers may raise anything
            return base, f"{spec.backbone} cannot be saved ({errors.first_line(error)})"
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
    """Turn an error about a model file into a clause about the registered `name`, without the next step."""
    clause = str(error).removesuffix(FILE_ADVICE).removesuffix(user_models.REGISTER).partition(": replace")[0]
    return clause.replace(f"{name}.keras", name).rstrip(" .")


def _write_without_dates(path: Path) -> None:
    """Remove dates and memory addresses from a ``.keras`` file, so that identical networks give identical files."""
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


def _main(spec_path: str, out: str) -> int:
    """Build and write the network; every failure becomes a JSON line with a message."""
    # Standard output is the channel to the parent, so redirect what libraries print there to standard error.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    say: Callable[..., None] = lambda **line: print(json.dumps(line), file=channel)
    try:
        spec = NetworkSpec.from_json(Path(spec_path).read_text(encoding="utf-8"))
        with memory_errors_named(f"build {spec.network.title}"):
            isolation.quiet_child()
            (_export if spec.cuts else _describe)(spec, Path(out), lambda text: say(tell=text))
    except errors.NbfeatError as error:
        say(error=type(error).__name__, message=str(error))
    except Exception as error:  # raised by the parent
        say(error="NetworkError", message=f"{type(error).__name__}: {error}")
    else:
        return 0
    return 1


def _export(spec: NetworkSpec, out: Path, tell: weights.Tell) -> None:
    built = build(spec, tell, channels_first=True)
    try:
        _write(built, out / "network.xml")
    except Exception as error:
        if not spec.network.is_user_model or isinstance(error, errors.DiskFullError) or is_out_of_memory(error):
            raise
        reason = f"OpenVINO cannot run {spec.network.title}: {errors.first_line(error)}"
        raise errors.NetworkError(f"{reason}. {FILE_ADVICE}") from error
    manifest = {
        "spec": asdict(spec), "made_with": versions(), "weights": asdict(built.weights),
        "outputs": {key: asdict(output) for key, output in built.outputs.items()},
        "files": {name: weights.digest(out / name) for name in _FILES},
    }  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _write(built: Built, path: Path) -> None:
    """Trace the model and save the graph, because Keras' `export` fixes the batch at 1 and drops the output names."""
    openvino: Any = isolation.import_openvino()
    operations: Any = importlib.import_module("openvino.opset13")
    ops: Any = importlib.import_module("keras").ops
    pixels = operations.parameter([-1 if size is None else size for size in built.model.input_shape], openvino.Type.u8)
    pixels.output(0).set_names({"pixels"})
    results = []
    for key, value in built.model(ops.convert_to_tensor(pixels.output(0)), training=False).items():
        value.output.set_names({key})
        results.append(operations.result(value.output, name=key))
    graph = openvino.Model(results, [pixels])
    with suppress(ImportError, AttributeError):  # only saves 0.4 s when compiling
        importlib.import_module("openvino._offline_transformations").apply_moc_transformations(graph, True)
    needed = 4 * built.model.count_params()
    with _full_disk_named(path.parents[1], needed):
        try:
            openvino.save_model(graph, path, compress_to_fp16=False)
        except RuntimeError:  # it doesn't say why: Python does
            path.with_suffix(".bin").unlink(missing_ok=True)
            with tempfile.TemporaryFile(dir=path.parent) as file:
                file.write(bytes(needed))
            raise


def _describe(spec: NetworkSpec, out: Path, tell: weights.Tell) -> None:
    """Write the cut points of the backbone of `spec`, built with random weights, which do not matter here."""
    backbone = spec.network
    tell(f"building {backbone.title} to list its layers")
    network = load_base(spec, tell)[0] if backbone.is_user_model else weights.build(backbone, spec.size, spec.alpha)
    (out / "layers.json").write_text(json.dumps(layers_of(network)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
