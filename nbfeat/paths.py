"""Where nbfeat keeps files: one private folder, written whole or not at all.

The folder is ``NBFEAT_HOME`` if that is set, else the platform's cache folder for ``nbfeat``. What lies there is loaded
as a network and run, so a folder that somebody else owns or may write to is not used.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class HomeError(OSError):
    """The home folder cannot be used; the message says why and how to mend it."""


def home() -> Path:
    """Return the folder where nbfeat keeps files; it need not exist yet."""
    if chosen := os.environ.get("NBFEAT_HOME"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("nbfeat", appauthor=False))


def keep(name: str) -> Path:
    """Return the subfolder `name` of the home folder, made private, ready to be written.

    Raises HomeError where it cannot be made, cannot be written, or is not ours alone.
    """
    top = home()
    try:
        for folder in (top, top / name):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(folder)
    except HomeError:
        raise
    except OSError as error:
        raise HomeError(
            f"{top} cannot be used: {error.strerror or error}. Set NBFEAT_HOME to a folder that you can write to."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise HomeError(f"{folder} cannot be written. Set NBFEAT_HOME to a folder that you can write to.")
    return folder


def check_private(folder: Path) -> None:
    """Raise HomeError where `folder` belongs to, or may be written by, anybody else."""
    if os.name != "posix":
        return  # Windows: the profile folder's access list already says so
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise HomeError(f"{folder} belongs to another user and is not used. Set NBFEAT_HOME to a folder of your own.")
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise HomeError(
            f"{folder} may be written by others and is not used. Run `chmod go-w {folder}`, or set NBFEAT_HOME."
        )


@contextmanager
def folder_written_whole(final: Path) -> Iterator[Path]:
    """Give a temporary folder beside `final`; on success rename it there, on failure leave nothing.

    Where another process was first, its folder stays and this one is dropped.
    """
    made = Path(tempfile.mkdtemp(prefix=f".{final.name[:24]}-", dir=final.parent))
    try:
        yield made
        # Renaming onto a folder that is not empty fails: somebody else was first, or what is there is broken.
        if final.exists() and not (final / "manifest.json").exists():
            shutil.rmtree(final, ignore_errors=True)
        with suppress(OSError):
            made.rename(final)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def file_written_whole(final: Path) -> Iterator[Path]:
    """Give the name of a temporary file beside `final`; on success rename it there, on failure leave nothing."""
    made = final.with_name(f".{final.name[:24]}-{secrets.token_hex(4)}")
    try:
        yield made
        made.replace(final)
    finally:
        made.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to a temporary file beside `path` and rename it there."""
    with file_written_whole(path) as made:
        made.write_text(text, encoding="utf-8")


_REMOTE = (
    "nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "fuse.sshfs", "fuse.gluster", "vboxsf",
)  # fmt: skip


def file_system(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the kind of file system that `folder` is on, e.g. ``ext4`` or ``nfs4``; "" where it cannot be told."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    resolved, deepest, kind = folder.resolve(), 0, ""
    for words in lines:
        point = words[4].replace("\\040", " ")
        if resolved.is_relative_to(point) and len(point) >= deepest:  # of two on one point, the later one is seen
            deepest, kind = len(point), words[words.index("-") + 1]
    return kind


def is_remote(kind: str) -> bool:
    """Tell whether a `kind` of file system is shared between machines."""
    return kind.startswith(_REMOTE)
