"""The child process that builds a network with Keras and writes it for OpenVINO.

``python -m nbfeat.inference.export SPEC OUT`` reads a NetworkSpec as JSON and fills the folder OUT: ``network.xml``,
``network.bin`` and ``manifest.json``. A SPEC without cuts asks for ``layers.json``, what can be cut, alone. Each line
on standard output is a JSON object: ``{"tell": text}`` on the way, ``{"error": class, "message": text}`` at the end.

A process of its own keeps Keras, its settings and 800 MB out of the kernel, whatever backend the user has chosen.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbfeat import errors, isolation
from nbfeat.backbones.user_models import REGISTER
from nbfeat.backbones.weights import digest

if TYPE_CHECKING:
    from nbfeat.inference.model import Built, NetworkSpec


def main(spec_path: str, out: str) -> int:
    """Build and write; every failure becomes a line of JSON with a sentence in it."""
    # Standard output is a channel to the parent: keep it, and send what libraries print there to standard error.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(**line: str) -> None:
        channel.write(json.dumps(line) + "\n")

    try:
        isolation.quiet_child()
        from nbfeat.inference.model import NetworkSpec

        spec = NetworkSpec.from_json(Path(spec_path).read_text(encoding="utf-8"))
        (export if spec.cuts else describe)(spec, Path(out), lambda text: say(tell=text))
    except errors.NbfeatError as error:
        say(error=type(error).__name__, message=str(error))
        return 1
    except Exception as error:  # the parent turns it into a NetworkError
        say(error="NetworkError", message=f"{type(error).__name__}: {error}")
        return 1
    return 0


def export(spec: NetworkSpec, out: Path, tell: Any) -> None:
    """Build the network of `spec` and write it to the folder `out`."""
    from nbfeat.inference.model import build

    built = build(spec, tell, channels_first=True)
    try:
        write(built, out / "network.xml")
    except Exception as error:
        if not spec.network.is_user_model:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise errors.NetworkError(
            f"OpenVINO cannot run {spec.title}: {reason}. {REGISTER} Keras then runs it."
        ) from error
    manifest = {
        "spec": asdict(spec),
        "made_with": versions(),
        "weights": asdict(built.weights),
        "outputs": {key: asdict(output) for key, output in built.outputs.items()},
        "files": {name: digest(out / name) for name in ("network.xml", "network.bin")},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def write(built: Built, path: Path) -> None:
    """Trace the model with Keras' OpenVINO backend and save the graph with float32 weights.

    Keras' own `export` fixes the batch at 1 on this backend and leaves the outputs without names.
    """
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
    try:
        fold: Any = importlib.import_module("openvino._offline_transformations").apply_moc_transformations
    except (ImportError, AttributeError):
        pass  # compiling then takes 0.4 s longer; the numbers are the same
    else:
        fold(graph, True)
    openvino.save_model(graph, path, compress_to_fp16=False)


def describe(spec: NetworkSpec, out: Path, tell: Any) -> None:
    """Write name, shape and sign of every layer of the backbone, with random weights: they do not matter here."""
    from nbfeat.backbones import keras_applications
    from nbfeat.inference.model import load_base

    backbone = spec.network
    tell(f"building {backbone.title} to see its layers")
    network: Any = (
        load_base(spec, tell)[0]
        if backbone.is_user_model
        else keras_applications.build(backbone, size=spec.size, alpha=spec.alpha)
    )
    (out / "layers.json").write_text(json.dumps(rows_of(network)), encoding="utf-8")


def rows_of(network: Any) -> list[dict[str, Any]]:
    """Return name, shape and sign of every layer that can be cut at."""
    from nbfeat.inference.signs import maps_with_negative_values

    negative = maps_with_negative_values(network)
    return [
        {
            "layer": layer.name,
            "kind": type(layer).__name__,
            "shape": layer.output.shape[1:],
            "negative": negative[layer.name],
        }
        for layer in network.layers[1:]
        if hasattr(layer.output, "shape")  # some give several tensors
    ]


def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers of an exported network."""
    from importlib.metadata import version

    return {name: version(name) for name in ("keras", "openvino")}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
