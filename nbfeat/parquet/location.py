"""Where the parts of a dataset lie: a folder of this machine, or an address such as ``s3://bucket/features``.

A file is there whole or not at all. On this machine it gets its name when it is complete; stores of objects, which
cannot rename, take it in one piece. Only a folder of this machine can be locked.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from nbfeat.errors import ExtractionError, RequestError
from nbfeat.paths import file_written_whole

LOCK = ".nbfeat.lock"
_OF_SYSTEMS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  # left by file managers, and no matter


@dataclass(frozen=True, slots=True)
class Shelf:
    """A place for files, by their names below it (``part-00000.parquet``, ``.raw/part-00000.parquet``)."""

    shown: str  # as it was named
    folder: Path | None  # None for an address
    system: Any  # of pyarrow
    top: str  # the place in that system

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Shelf:
        """Return the shelf at a folder or an address; neither need exist.

        Raises
        ------
        RequestError
            Where no file system for such an address is installed.
        """
        from pyarrow import fs

        if not isinstance(path, str | os.PathLike):
            raise RequestError(f"--parquet takes a folder, or an address such as s3://bucket/features, not {path!r}.")
        text = os.fspath(path)
        if "://" in text and not text.startswith("file://"):
            return cls(text, None, *_remote(text))
        local = url2pathname(unquote(urlsplit(text).path)) if text.startswith("file://") else text
        folder = Path(local).expanduser().absolute()
        return cls(text, folder, fs.LocalFileSystem(), str(folder))

    @property
    def name(self) -> str:
        """The last part of its name, with a slash."""
        return f"{PurePosixPath(self.top).name or self.shown}/"

    def sizes(self, folders: Collection[str] = ()) -> dict[str, int]:
        """Return the bytes of each file here and in these `folders`, by name; other folders end with a slash."""
        from pyarrow import fs

        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise RequestError(f"{self.shown} is a file, and --parquet takes a folder: name another, or remove it.")
        found: dict[str, int] = {}
        for folder in ("", *folders):
            where = self._path(folder) if folder else self.top
            try:
                infos = self.system.get_file_info(fs.FileSelector(where, allow_not_found=True))
            except OSError as error:
                raise ExtractionError(
                    f"{self.shown} cannot be read: {error.strerror or error}. Name another folder."
                ) from error
            for info in infos:
                name = PurePosixPath(info.path.replace(os.sep, "/")).name
                if info.type == fs.FileType.File and name not in _OF_SYSTEMS:
                    found[f"{folder}/{name}" if folder else name] = int(info.size or 0)
                elif info.type == fs.FileType.Directory and name not in folders:
                    found[f"{folder}/{name}/" if folder else f"{name}/"] = 0
        return found

    def check(self) -> None:
        """Raise RequestError where there is no folder that this one could be made in."""
        if self.folder is not None and not self.folder.parent.is_dir():
            raise RequestError(f"There is no folder {self.folder.parent}: make it first, or write elsewhere.")

    def _make(self) -> None:
        if self.folder is None:
            with suppress(OSError):  # most stores have no folders
                self.system.create_dir(self.top, recursive=True)
        else:
            self.folder.mkdir(exist_ok=True)

    def opened(self, name: str) -> Any:
        """Open a file to read."""
        return self.system.open_input_file(self._path(name))

    @contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """Give a sink for the bytes of the file `name`, which is there when the block ends, and not before."""
        import pyarrow as pa

        if self.folder is None:
            sink = pa.BufferOutputStream()
            yield sink
            with self.system.open_output_stream(self._path(name)) as out:
                out.write(sink.getvalue())
            return
        final = self.folder / name
        final.parent.mkdir(exist_ok=True)
        with file_written_whole(final) as made, pa.OSFile(str(made), "wb") as sink:
            yield sink

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self.system.delete_file(self._path(name))

    def remove_folder(self, name: str) -> None:
        """Remove a folder that has no files any more, if it is there; stores without folders have none to remove."""
        if self.folder is None:
            with suppress(OSError):
                self.system.delete_dir(self._path(name))
        else:
            with suppress(OSError):
                (self.folder / name).rmdir()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other processes of this machine from writing here for the block."""
        try:
            self._make()
            file = None if self.folder is None else _locked(self.folder / LOCK, self.shown)
        except OSError as error:
            raise ExtractionError(
                f"{self.shown} cannot be written: {error.strerror or error}. Name a folder that you can write to."
            ) from error
        if self.folder is None or file is None:
            yield
            return
        try:
            yield
        finally:
            with suppress(OSError):
                if os.name == "nt":  # where an open file cannot be removed
                    file.close()
                (self.folder / LOCK).unlink()
            file.close()

    def _path(self, name: str) -> str:
        return f"{self.top.rstrip('/')}/{name}"


def _remote(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the place in it: fsspec's where it is installed, else pyarrow's own."""
    import pyarrow as pa
    from pyarrow import fs

    why = "fsspec is not installed"
    try:
        import fsspec

        system, top = fsspec.core.url_to_fs(address)
        return fs.PyFileSystem(fs.FSSpecHandler(system)), str(top).rstrip("/")
    except (ImportError, ValueError) as error:
        why = str(error) or why
    try:
        system, top = fs.FileSystem.from_uri(address)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise RequestError(
            f"No file system here knows {address!r}: {why}. Install what fsspec needs for it, or take a folder."
        ) from error
    return system, str(top).rstrip("/")


def _locked(path: Path, shown: str) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            file.close()
            raise ExtractionError(
                f"{shown} is being written by {who}: wait until it is done, or write to another folder."
            ) from None
        except OSError:  # a file system without locks: nothing can be told, and nothing need be refused
            return file
        if _is_there(path, file):
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}")
            file.flush()
            return file
        file.close()  # the one that was waited for has removed it meanwhile


def _is_there(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[str]) -> None:
        # A byte far behind what is written: locked ones cannot be read by others.
        file.seek(1 << 20)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error

else:
    import fcntl

    def _lock(file: IO[str]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
