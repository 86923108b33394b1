"""The content hash of an image and the state of a file, which tell whether it is the same as before.

Both are 16 bytes of SHA-256. Equal content is never computed twice; a file whose state is known need not be read.
"""

import hashlib
import os
import struct
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from nbfeat.errors import ImageError

LENGTH = 16
# File times have steps of up to 2 s (FAT): a change within the step in which a file was read leaves no trace.
SETTLED_AFTER_NS = 2_000_000_000


def digest(source: bytes | npt.NDArray[Any] | Image.Image) -> bytes:
    """Return the hash of this content; raise ImageError if it has no bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()[:LENGTH]
    if (array := np.asarray(source)).dtype.hasobject:
        raise ImageError(f"an array of {array.dtype} has no pixels: convert it to uint8 or uint16")
    hasher = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    hasher.update(np.ascontiguousarray(array).data)
    return hasher.digest()[:LENGTH]


def state(path: str, status: os.stat_result) -> bytes:
    """Return the hash of the state of the file at `path`, from its `status`."""
    parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return hashlib.sha256(f"{path}\0{parts}".encode(errors="surrogateescape")).digest()[:LENGTH]


def seen(path: str) -> bytes:
    """Return the state of the file at `path`, then the part that machines share (no device); b"" if missing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return b""
    return state(path, status) + struct.pack("<qq", status.st_size, status.st_mtime_ns)


def is_settled(status: os.stat_result) -> bool:
    """Return whether any later change would change the state: the last one was long enough ago."""
    return max(status.st_mtime_ns, status.st_ctime_ns) + SETTLED_AFTER_NS < time.time_ns()
