"""The weights of the networks written here, from where PyTorch publishes them, checked by the hash in their name.

A file is downloaded once, into the home folder; one that PyTorch itself left on this machine is used where it is.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO

from nbfeat.backbones.backbone import Backbone
from nbfeat.backbones.weights import digest
from nbfeat.errors import WeightsError
from nbfeat.paths import home

HOST = "https://download.pytorch.org/models"
PATIENCE = 30.0  # seconds without a byte
TOLD_EVERY = 1.0  # seconds
LARGEST = 1_000_000_000  # bytes; AlexNet's have 244 million
_PART = 1 << 20


def is_published(backbone: Backbone, name: str, sha256: str) -> bool:
    """Tell whether a file of this name and SHA-256 is the one that is published for `backbone`."""
    return bool(backbone.published) and name == backbone.published and sha256.startswith(_prefix(name))


def found(backbone: Backbone) -> Path:
    """Return where the published weights of `backbone` are on this machine; WeightsError where they are not."""
    path = on_this_machine(backbone)
    if path is None:
        raise _not_here(backbone, "they were not downloaded")
    return path


def on_this_machine(backbone: Backbone) -> Path | None:
    """Return a whole file of the published weights of `backbone`, or None."""
    torch_home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch"
    folders = (home() / "weights", Path(torch_home).expanduser() / "hub" / "checkpoints")
    for path in (folder / backbone.published for folder in folders):
        try:
            if is_published(backbone, path.name, digest(path)):
                return path
        except OSError:
            continue
    return None


def fetch(backbone: Backbone, folder: Path) -> Generator[str, None, Path]:
    """Return where the published weights of `backbone` are; download them to `folder` where they are not here yet.

    Yields how far it is. Nothing is left of half a file.

    Raises
    ------
    WeightsError
        Where the file cannot be had, or is not the one that was published; it says where to get it and put it.
    """
    if here := on_this_machine(backbone):
        return here
    name = backbone.published
    yield f"downloading {name} (once; it stays in {folder})"
    handle, half = tempfile.mkstemp(prefix=f".{name[:24]}-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            told = hashlib.sha256()
            for done, total, part in _parts(backbone):
                file.write(part)
                told.update(part)
                if total:
                    yield f"downloading {name}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        if not is_published(backbone, name, told.hexdigest()):
            reason = f"what came is another file: its SHA-256 begins with {told.hexdigest()[:8]}"
            raise _not_here(backbone, reason)
        return Path(half).replace(folder / name)
    finally:
        Path(half).unlink(missing_ok=True)


def _parts(backbone: Backbone) -> Iterator[tuple[int, int, bytes]]:
    """Give the file in parts: bytes so far, bytes in all (0: told a moment ago), the part."""
    address = f"{HOST}/{backbone.published}"
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:  # the address is of this module
            total, done, told_at = int(answer.headers.get("Content-Length") or 0), 0, time.monotonic()
            while part := _some(answer):
                done += len(part)
                if done > LARGEST:
                    raise _not_here(backbone, f"it is larger than {LARGEST:,} bytes")
                now = time.monotonic()
                is_due = now - told_at >= TOLD_EVERY
                told_at = now if is_due else told_at
                yield done, total if is_due else 0, part
            if done < total:
                raise _not_here(backbone, f"the connection ended after {done:,} of {total:,} bytes")
    except TimeoutError as error:
        raise _not_here(backbone, f"nothing came for {PATIENCE:g} seconds") from error
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise _not_here(backbone, f"the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _not_here(backbone, f"{reason}" or type(error).__name__) from error


def _some(answer: IO[bytes]) -> bytes:
    """Return what has come, up to a part; b"" at the end."""
    return answer.read1(_PART)  # type: ignore[attr-defined, no-any-return]  # an HTTPResponse


def _not_here(backbone: Backbone, reason: str) -> WeightsError:
    return WeightsError(
        f"The weights {backbone.published} are not on this machine and could not be downloaded ({reason}). "
        f"Download {HOST}/{backbone.published} and put it at {home() / 'weights' / backbone.published}, or use "
        "--weights random to try things out."
    )


def _prefix(name: str) -> str:
    """Return the digits of the SHA-256 that PyTorch puts into a file's name."""
    digits = re.search(r"-([0-9a-f]{8,})\.pth$", name)
    return digits[1] if digits else "none"
