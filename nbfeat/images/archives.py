"""Images in zip archives of this machine: ``zip://inner/path.jpg::/folder/archive.zip``."""

from __future__ import annotations

import os
import stat
import threading
import zipfile
import zlib
from pathlib import Path
from typing import IO

from nbfeat.errors import ImageError
from nbfeat.images.formats import short
from nbfeat.images.public_hosts import ARCHIVE, scheme_of

MOST_OPEN = 8  # archives; the directory of a large one takes longer to read than an image of it
# The decoders of other methods give back whatever there is at once, a gigabyte out of a kilobyte.
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_ENCRYPTED = 1


class Archives:
    """Reads members of archives, which stay open until `close`; threads may call it at once. Paths start at `root`."""

    def __init__(self, root: Path, most_bytes: int) -> None:
        self.root, self.most_bytes = root, most_bytes
        self._turn = threading.Lock()
        self._open: dict[str, zipfile.ZipFile] = {}
        self._is_closed = False

    def __call__(self, address: str) -> bytes:
        """Return the bytes of the member that `address` names; raise ImageError with the reason why not."""
        member, archive = _parts(address)
        if not archive:
            raise ImageError(
                "zip addresses are read only of an archive on this machine: zip://image.jpg::folder/archive.zip"
            )
        path = _path(archive, self.root)
        try:
            with self._turn:  # until a member is open, its archive may be closed for another one
                file = self._member(self._archive(path), member, path)
            with file:  # it ends at the size that the archive tells, whatever there is
                return file.read(self.most_bytes)
        except FileNotFoundError:
            reason = f"no such archive: {path}"
        except PermissionError:
            reason = f"permission denied: {path}"
        except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error):
            reason = f"the archive is damaged, or is no zip: {path}"
        except ValueError:  # raised before the system is asked: a NUL, or a character that file names cannot hold
            reason = f"the path holds a character that no file name can: {path}"
        except (OSError, RuntimeError) as error:
            reason = f"{(getattr(error, 'strerror', None) or type(error).__name__).lower()}: {member} in {path}"
        raise ImageError(short(reason))

    def close(self) -> None:
        """Close the archives, and open none again."""
        with self._turn:
            self._is_closed = True
            for archive in self._open.values():
                archive.close()
            self._open.clear()

    def _archive(self, path: str) -> zipfile.ZipFile:
        if self._is_closed:
            raise ImageError(short(f"the run was stopped before it was read: {path}"))
        found = self._open.pop(path, None)
        if found is None:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ImageError(short(f"a folder, pipe or device, not an archive: {path}"))
            found = zipfile.ZipFile(path)
            if len(self._open) == MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
        self._open[path] = found
        return found

    def _member(self, archive: zipfile.ZipFile, member: str, path: str) -> IO[bytes]:
        try:
            found = archive.getinfo(member)
        except KeyError:
            raise ImageError(short(f"no such member of the archive: {member} in {path}")) from None
        if found.is_dir():
            reason = f"a folder, not a file: {member} in {path}"
        elif found.flag_bits & _ENCRYPTED:
            reason = f"encrypted: {member} in {path}"
        elif found.compress_type not in _METHODS:
            reason = f"compressed in another way than deflate, which is not read: {member} in {path}"
        elif not found.file_size:
            reason = f"the file is empty: {member} in {path}"
        elif found.file_size > self.most_bytes:
            reason = f"too large for an image ({found.file_size:,} bytes): {member} in {path}"
        else:
            return archive.open(found)
        raise ImageError(short(reason))


def absolute(address: str, root: Path) -> str:
    """Return an address that names the same archive wherever paths start; all but those of archives as they are."""
    member, archive = _parts(address) if scheme_of(address) == ARCHIVE else ("", "")
    return f"{ARCHIVE}://{member}::{_path(archive, root)}" if archive else address


def _parts(address: str) -> tuple[str, str]:
    """Return the member and the archive that `address` names; nothing where it names no archive on this machine."""
    member, _, archive = address.partition("://")[2].partition("::")
    return ("", "") if not member or "::" in archive or scheme_of(archive) else (member, archive)


def _path(archive: str, root: Path) -> str:
    return os.path.join(root, os.path.expanduser(archive))
