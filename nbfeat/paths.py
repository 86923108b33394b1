"""The private folder for nbfeat's files, and files that are written completely or not at all.

It is ``NBFEAT_HOME``, or the platform's cache folder. Networks in it are loaded and run, so a folder that another user
owns or can write to isn't used.
"""

import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nbfeat.errors import RequestError, near


class HomeError(OSError):
    """The home folder can't be used; the message says why and what to do."""


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return `path` with ``~`` expanded, absolute; relative ones start in the working folder, or at / if it is gone."""
    expanded = Path(path).expanduser()
    try:
        return expanded.absolute()
    except FileNotFoundError:
        return Path(os.sep, expanded)


def existing_file(path: str | os.PathLike[str], like: str) -> Path:
    """Return the absolute path of a regular file, or raise RequestError with similar names that match `like`."""
    file, shown = absolute(path), repr(os.fspath(path))
    if file.is_file():
        return file
    if file.exists():  # opening a pipe can block forever, and reading a device can do anything
        raise RequestError(f"{shown} isn't a regular file. Check the path.")
    siblings = (one.name for one in file.parent.glob(like))
    way = near(file.name, siblings) or f"Check the path; relative paths start at {absolute('')}."
    raise RequestError(f"File not found: {shown}. {way}")


def home() -> Path:
    """Return nbfeat's folder, which may not exist yet."""
    if chosen := os.environ.get("NBFEAT_HOME"):
        return absolute(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("nbfeat", appauthor=False))


def keep(name: str) -> Path:
    """Create the private subfolder `name` of the home folder and return it; raise HomeError if it can't be used."""
    top = home()
    try:
        for folder in (top, top / name):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(folder)
    except HomeError:
        raise
    except OSError as error:
        what = f"{top} can't be used: {error.strerror or error}"
        raise HomeError(f"{what}. Set NBFEAT_HOME to a folder that you can write to.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise HomeError(f"{folder} isn't writable. Set NBFEAT_HOME to a folder that you can write to.")
    return folder


def check_private(folder: Path) -> None:
    """Raise HomeError if another user owns `folder` or can write to it."""
    if os.name != "posix":
        return  # on Windows, the access list of the profile folder does this
    if (status := folder.stat()).st_uid != os.getuid():
        raise HomeError(f"{folder} belongs to another user, so it isn't used. Set NBFEAT_HOME to a folder of your own.")
    if stat.S_IMODE(status.st_mode) & 0o022:
        way = f"Run `chmod go-w {folder}`, or set NBFEAT_HOME."
        raise HomeError(f"{folder} is writable by other users, so it isn't used. {way}")


def temporary_folder() -> tuple[Path, object]:
    """Return a folder that lasts as long as its owner."""
    folder, owner = Path(tempfile.mkdtemp(prefix="nbfeat-")), set[object]()  # a set allows weak references
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder, owner


@contextmanager
def folder_written_whole(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` on success, unless another process was first."""
    made = Path(tempfile.mkdtemp(prefix=f".{final.name[:24]}-", dir=final.parent))
    try:
        yield made
        # Renaming to a non-empty folder fails: another process was first, or the folder is broken.
        if final.exists() and not (final / "manifest.json").exists():
            shutil.rmtree(final, ignore_errors=True)
        with suppress(OSError):
            made.rename(final)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def file_written_whole(final: Path) -> Iterator[Path]:
    """Yield the name of a temporary file that becomes `final` on success and is deleted on failure."""
    made = final.with_name(f".{final.name[:24]}-{secrets.token_hex(4)}")
    try:
        yield made
        made.replace(final)
    finally:
        made.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, completely or not at all."""
    with file_written_whole(path) as made:
        made.write_text(text, encoding="utf-8")


_REMOTE = r"nfs|cifs|smb|9p|afs|ceph|lustre|gpfs|beegfs|fuse\.(sshfs|gluster)|vboxsf|afp|webdav|macfuse|osxfuse"


def file_system(folder: Path) -> str:
    """Return the file system of `folder`, e.g. ``ext4`` or ``nfs4``; "" if unknown."""
    resolved, deepest, kind = folder.resolve(), 0, ""
    for point, found in _mounts(resolved):
        if resolved.is_relative_to(point) and len(point) >= deepest:  # the last mount on a point hides the others
            deepest, kind = len(point), found
    return kind


def _mounts(folder: Path, table: Path = Path("/proc/self/mountinfo")) -> Iterator[tuple[str, str]]:
    """Yield mount points and their file systems; on Windows, those of the drive of `folder`."""
    if sys.platform == "win32":
        import ctypes

        is_share = ctypes.windll.kernel32.GetDriveTypeW(folder.anchor) == 4  # DRIVE_REMOTE
        yield folder.anchor, "smb" if is_share else "local"
    elif sys.platform == "darwin":  # lines such as "//me@server/share on /Volumes/share (smbfs, nodev)"
        lines = subprocess.run(["/sbin/mount"], capture_output=True, text=True, check=False).stdout
        yield from re.findall(r"^.+? on (/.*) \((\w+)", lines, re.MULTILINE)
    else:
        with suppress(OSError):
            for line in table.read_text(encoding="utf-8").splitlines():
                words = line.split()
                yield words[4].replace("\\040", " "), words[words.index("-") + 1]


def is_remote(kind: str) -> bool:
    """Return whether a file system is shared between machines."""
    return re.match(_REMOTE, kind) is not None
