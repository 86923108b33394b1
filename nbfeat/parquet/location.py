"""Read and write the files of a dataset in a local folder or at a URL such as ``s3://bucket/features``."""

from __future__ import annotations

import errno
import io
import os
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from nbfeat.errors import ExtractionError, RequestError
from nbfeat.paths import absolute, file_written_whole

LOCK = ".nbfeat.lock"
_OF_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  # left by file managers
_WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class Location:
    """A folder or URL whose files are named relative to it (``part-00000.parquet``, ``.raw/part-00000.npz``)."""

    address: str  # as given by the user
    folder: Path | None  # None unless local
    system: Any  # pyarrow's file system
    top: str  # the path in that file system

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Location:
        """Return the location of a folder or URL, which need not exist."""
        from pyarrow import fs

        if not isinstance(path, str | os.PathLike):
            raise RequestError(f"`parquet` must be a folder or a URL such as s3://bucket/features, not {path!r}.")
        text = os.fspath(path)
        if "://" in text and not text.startswith("file://"):
            return cls(text, None, *_remote(text))
        folder = absolute(url2pathname(urlsplit(text).path) if text.startswith("file://") else text)
        return cls(text, folder, fs.LocalFileSystem(), str(folder))

    @property
    def name(self) -> str:
        """The last part of the path, with a slash."""
        return f"{PurePosixPath(self.top).name or self.address}/"

    def sizes(self, folders: Collection[str] = ()) -> dict[str, int]:
        """Return the size of each file here and in `folders`, by name; anything else gets a name with a slash."""
        from pyarrow import fs

        if self.folder is not None and not self.folder.is_dir():
            if self.folder.exists():
                raise RequestError(f"{self.address} is a file, but `parquet` needs a folder: use a different path.")
            if not self.folder.parent.is_dir():
                raise RequestError(f"The folder {self.folder.parent} doesn't exist: create it, or write elsewhere.")
        found: dict[str, int] = {}
        for prefix in ("", *(f"{folder}/" for folder in folders)):
            try:
                infos = self.system.get_file_info(fs.FileSelector(self._path(prefix).rstrip("/"), allow_not_found=True))
            except OSError as error:
                reason = error.strerror or error
                raise ExtractionError(f"{self.address} cannot be read: {reason}. Use another folder.") from error
            for info in infos:
                if info.type == fs.FileType.File and info.base_name not in _OF_SYSTEMS:
                    found[prefix + info.base_name] = int(info.size or 0)
                elif info.type in {fs.FileType.Directory, fs.FileType.Unknown} and info.base_name not in folders:
                    found[f"{prefix}{info.base_name}/"] = 0
        return found

    def opened(self, name: str) -> Any:
        """Open a file for reading."""
        return self.system.open_input_file(self._path(name))

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for writing, which appears under its `name` complete, when the block ends."""
        if self.folder is None:
            buffer = io.BytesIO()
            yield buffer
            with self.system.open_output_stream(self._path(name)) as out:
                out.write(buffer.getbuffer())
            return
        final = self.folder / name
        final.parent.mkdir(exist_ok=True)
        with file_written_whole(final) as made, made.open("wb") as file:
            yield file

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with suppress(FileNotFoundError):
            self.system.delete_file(self._path(name))

    def remove_folder(self, name: str) -> None:
        """Remove an empty folder, if it exists."""
        with suppress(OSError):
            if self.folder is None:
                self.system.delete_dir(self._path(name))
            else:
                (self.folder / name).rmdir()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create the folder, and lock it, if local, against other processes during the block."""
        if self.folder is None:
            with suppress(OSError):  # most stores have no folders
                self.system.create_dir(self.top, recursive=True)
            yield
            return
        from filelock import FileLock, Timeout

        file = self.folder / LOCK
        before = _holder(file)  # older releases of filelock empty the file when they find it locked
        lock = FileLock(file, timeout=0, thread_local=False)  # another thread may close the generator
        try:
            self.folder.mkdir(exist_ok=True)
            lock.acquire()
            if (_holder(file) or "process")[:7] == "process":  # a lock without flock names its holder itself
                file.write_text(f"process {os.getpid()} of {socket.gethostname()}", encoding="utf-8")
        except Timeout:
            who = _holder(file) or before or "another process"
            way = "wait until it finishes, or write to another folder"
            raise ExtractionError(f"{self.address} is being written by {who}: {way}.") from None
        except (OSError, NotImplementedError) as error:
            if not lock.is_locked and getattr(error, "errno", errno.ENOSYS) not in _WITHOUT_LOCKS:
                reason = getattr(error, "strerror", None) or error
                raise ExtractionError(f"{self.address} cannot be written: {reason}. Use another folder.") from error
        try:
            yield
        finally:
            with suppress(OSError):
                if os.name == "nt":  # Windows cannot remove an open file
                    lock.release()
                file.unlink()
            lock.release()

    def _path(self, name: str) -> str:
        return f"{self.top.rstrip('/')}/{name}"


def _holder(file: Path) -> str:
    """Return the name of the process that holds the lock; on Windows it cannot be read."""
    with suppress(OSError, ValueError):  # it may hold anything
        return file.read_text(encoding="utf-8").strip()
    return ""


def _remote(address: str) -> tuple[Any, str]:
    """Return the file system of a URL, from fsspec if installed, else from pyarrow, and the path in it."""
    import pyarrow as pa
    from pyarrow import fs

    why = "fsspec is not installed"
    try:
        try:
            import fsspec

            system, top = fsspec.core.url_to_fs(address)
            system = fs.PyFileSystem(fs.FSSpecHandler(system))
        except (ImportError, ValueError) as error:
            why = str(error) or why
            system, top = fs.FileSystem.from_uri(address)
    except (pa.ArrowException, ValueError, OSError) as error:
        way = "Install the package that fsspec needs for it, or use a local folder."
        raise RequestError(f"Cannot open {address!r}: {why}. {way}") from error
    return system, str(top).rstrip("/")
