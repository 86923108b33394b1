"""Where the parts of a dataset lie: a folder of this machine, or an address such as ``s3://bucket/features``.

A file is there whole or not at all. On this machine it gets its name when it is complete; stores of objects, which
cannot rename, take it in one piece. Only a folder of this machine can be locked.
"""

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
from nbfeat.paths import file_written_whole

LOCK = ".nbfeat.lock"
_OF_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  # left by file managers, and no matter
_WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class Location:
    """A place for files, by their names below it (``part-00000.parquet``, ``.raw/part-00000.npz``)."""

    address: str  # as it was named
    folder: Path | None  # None unless it is on this machine
    system: Any  # of pyarrow
    top: str  # the place in that system

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Location:
        """Return the location of a folder or an address, for which a file system is installed; neither need exist."""
        from pyarrow import fs

        if not isinstance(path, str | os.PathLike):
            raise RequestError(f"--parquet takes a folder, or an address such as s3://bucket/features, not {path!r}.")
        text = os.fspath(path)
        if "://" in text and not text.startswith("file://"):
            return cls(text, None, *_remote(text))
        local = url2pathname(urlsplit(text).path) if text.startswith("file://") else text
        folder = Path(local).expanduser().absolute()
        return cls(text, folder, fs.LocalFileSystem(), str(folder))

    @property
    def name(self) -> str:
        """The last part of its name, with a slash."""
        return f"{PurePosixPath(self.top).name or self.address}/"

    def sizes(self, folders: Collection[str] = ()) -> dict[str, int]:
        """Return the bytes of each file here and in these `folders`, by name; other folders end with a slash."""
        from pyarrow import fs

        if self.folder is not None and not self.folder.is_dir():
            if self.folder.exists():
                raise RequestError(
                    f"{self.address} is a file, and --parquet takes a folder: name another, or remove it."
                )
            if not self.folder.parent.is_dir():
                raise RequestError(f"There is no folder {self.folder.parent}: make it first, or write elsewhere.")
        found: dict[str, int] = {}
        for prefix in ("", *(f"{folder}/" for folder in folders)):
            selector = fs.FileSelector(self._path(prefix).rstrip("/"), allow_not_found=True)
            try:
                infos = self.system.get_file_info(selector)
            except OSError as error:
                reason = error.strerror or error
                raise ExtractionError(f"{self.address} cannot be read: {reason}. Name another folder.") from error
            for info in infos:
                if info.type == fs.FileType.File and info.base_name not in _OF_SYSTEMS:
                    found[prefix + info.base_name] = int(info.size or 0)
                elif info.type == fs.FileType.Directory and info.base_name not in folders:
                    found[f"{prefix}{info.base_name}/"] = 0
        return found

    def opened(self, name: str) -> Any:
        """Open a file to read."""
        return self.system.open_input_file(self._path(name))

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Give a file to write, which is there under its `name` when the block ends, and not before."""
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
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self.system.delete_file(self._path(name))

    def remove_folder(self, name: str) -> None:
        """Remove a folder that has no files any more, if it is there; stores without folders have none to remove."""
        with suppress(OSError):
            if self.folder is None:
                self.system.delete_dir(self._path(name))
            else:
                (self.folder / name).rmdir()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other processes of this machine from writing here for the block."""
        if self.folder is None:
            with suppress(OSError):  # most stores have no folders
                self.system.create_dir(self.top, recursive=True)
            yield
            return
        from filelock import FileLock, Timeout

        file = self.folder / LOCK
        lock = FileLock(file, timeout=0, thread_local=False)  # a generator may be closed by another thread
        try:
            self.folder.mkdir(exist_ok=True)
            lock.acquire()
            if (_holder(file) or "process")[:7] == "process":  # a lock without flock says in its own way who has it
                file.write_text(f"process {os.getpid()} of {socket.gethostname()}", encoding="utf-8")
        except Timeout:
            raise ExtractionError(
                f"{self.address} is being written by {_holder(file) or 'another process'}: wait until it is done, or "
                "write to another folder."
            ) from None
        except (OSError, NotImplementedError) as error:
            if not lock.is_locked and getattr(error, "errno", errno.ENOSYS) not in _WITHOUT_LOCKS:
                reason = getattr(error, "strerror", None) or error
                raise ExtractionError(
                    f"{self.address} cannot be written: {reason}. Name a folder that you can write to."
                ) from error
        try:
            yield
        finally:
            with suppress(OSError):
                if os.name == "nt":  # where an open file cannot be removed
                    lock.release()
                file.unlink()
            lock.release()

    def _path(self, name: str) -> str:
        return f"{self.top.rstrip('/')}/{name}"


def _holder(file: Path) -> str:
    """Return what the lock's holder wrote into it; Windows keeps others from reading that."""
    with suppress(OSError):
        return file.read_text(encoding="utf-8").strip()
    return ""


def _remote(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the place in it: fsspec's where it is installed, else pyarrow's own."""
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
        raise RequestError(
            f"No file system here knows {address!r}: {why}. Install what fsspec needs for it, or take a folder."
        ) from error
    return system, str(top).rstrip("/")
