"""Cache features in one SQLite file, by image content and cache key; a problem becomes a `note`, not an error."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbfeat.cache.keys import CacheKey
from nbfeat.errors import printable
from nbfeat.paths import HomeError, file_system, is_remote, keep

LARGEST = 20_000_000_000  # bytes
SHARE_OF_DISK = 10  # the cache may take a tenth of the free disk space
LOOK_EVERY = 64_000_000  # bytes written between two checks of the size
MOST_AT_ONCE = 500  # rows per query or deletion
BYTES_AT_ONCE = 8_000_000  # per query
BYTES_EVICTED = 1_000_000  # per transaction, a few milliseconds
PATIENCE = 10.0  # seconds to wait for another process to finish writing

FORMAT = 2  # of the schema; increased with every change
# Entries are evicted per owner. An owner is a cache key (features by image), FILES (content hashes by file state), or
# FAILURES with the decoders' names (reasons why images cannot be decoded). Format 1 had the tables that are dropped.
SCHEMA = f"""
BEGIN IMMEDIATE;
DROP TABLE IF EXISTS features; DROP TABLE IF EXISTS blocks; DROP TABLE IF EXISTS files; DROP TABLE IF EXISTS failures;
CREATE TABLE IF NOT EXISTS owners (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, description BLOB, used REAL);
CREATE TABLE IF NOT EXISTS entries (owner INTEGER, key BLOB, value BLOB);
CREATE UNIQUE INDEX IF NOT EXISTS keys ON entries (owner, key);
PRAGMA user_version = {FORMAT};
COMMIT
"""
_SIZES = "SELECT * FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
FILES, FAILURES = "files", "failures by "
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_ERRORS = (sqlite3.Error, OSError, ValueError, TypeError)

Vector = NDArray[np.float32]


@dataclass(slots=True)
class CacheEntries:
    """Results of a run, to be saved in one transaction."""

    vectors: list[tuple[CacheKey, Sequence[bytes], Vector]] = field(default_factory=list)  # images, one row each
    files: dict[bytes, bytes] = field(default_factory=dict)  # file state → content hash
    failures: dict[bytes, str] = field(default_factory=dict)  # image that cannot be decoded → reason

    def __bool__(self) -> bool:
        return bool(self.vectors or self.files or self.failures)


class Cache:
    """The features cached on this machine; with ``folder=None`` the cache is off."""

    def __init__(self, folder: Path | None, decoders: str = "", note: str = "") -> None:
        self.note = note  # the problem and the next step
        self.writes = False
        self._folder, self.path, self._failures = folder, Path(), FAILURES + decoders
        self._db: sqlite3.Connection | None = None  # writes
        self._reader: sqlite3.Connection | None = None  # so that decoders never wait for a write
        self._lock, self._reading = threading.RLock(), threading.RLock()
        self._in_use: set[str] = set()  # keys
        self._unmeasured, self._most = LOOK_EVERY, 0
        if folder is not None:
            try:
                self._open(folder)
            except _ERRORS as error:
                self._give_up(error, "opened")

    @classmethod
    def at_home(cls, decoders: str = "") -> Cache:
        """Open the cache in the home folder."""
        try:
            return cls(keep("features"), decoders)
        except HomeError as error:
            return cls(None, note=f"{error} Features are not cached.")

    def images(self, states: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return the content hashes of files in these states that were read before."""
        return self._find(FILES, states)

    def failures(self, images: Iterable[bytes]) -> dict[bytes, str]:
        """Return the reasons why images could not be decoded, if these decoders already tried."""
        return {image: reason.decode() for image, reason in self._find(self._failures, images).items()}

    def vectors(self, block: CacheKey, images: Iterable[bytes]) -> dict[bytes, Vector]:
        """Return the cached features of these images; damaged rows count as missing."""
        found = self._find(block.key, images, 4 * block.width)
        return {image: np.frombuffer(vector, np.float32) for image, vector in found.items()}

    def _find(self, owner: str, keys: Iterable[bytes], size: int = 1) -> dict[bytes, bytes]:
        """Return undamaged values of `size` bytes each, queried in parts to limit memory."""
        wanted, most = list(keys), max(1, min(MOST_AT_ONCE, BYTES_AT_ONCE // size))
        query = "SELECT key, value FROM entries WHERE owner = (SELECT id FROM owners WHERE name = ?) AND key IN ({})"
        found: dict[bytes, bytes] = {}

        def select(db: sqlite3.Connection) -> None:
            for start in range(0, len(wanted), most):
                some = wanted[start : start + most]
                for key, stored in db.execute(query.format(",".join("?" * len(some))), (owner, *some)).fetchall():
                    if (value := checked(stored, key, owner)) is not None:
                        found[key] = value

        self._try("read", select)
        return found

    def use(self, blocks: Iterable[CacheKey]) -> None:
        """Mark the blocks that a run uses, so they are not evicted."""
        owners = {block.key: block.description for block in blocks}
        self._in_use = set(owners)
        self._try("written", lambda db: _touch(db, {**owners, FILES: "", self._failures: ""}))

    def keep(self, entries: CacheEntries) -> None:
        """Save all entries or none."""
        size = sum(4 * block.width * len(images) for block, images, _ in entries.vectors)
        self._unmeasured += size
        for _ in range(1 + 2 * size // BYTES_EVICTED):  # more than is added
            self._try("written", self._make_room)
        if entries:
            self._try("written", lambda db: self._insert(db, entries))

    def _insert(self, db: sqlite3.Connection, entries: CacheEntries) -> None:
        owners: list[tuple[str, str, Iterable[tuple[bytes, bytes]]]] = [
            (FILES, "", entries.files.items()),
            (self._failures, "", [(image, reason.encode()) for image, reason in entries.failures.items()]),
        ]
        for block, images, vectors in entries.vectors:
            owners.append((block.key, block.description, zip(images, map(np.ndarray.tobytes, vectors), strict=True)))
        with db:  # all or nothing
            db.execute("BEGIN IMMEDIATE")  # SQLite waits only for a lock that is taken at the start
            for owner, description, values in owners:
                _touch(db, {owner: description})  # another process may just have evicted it
                [number] = db.execute("SELECT id FROM owners WHERE name = ?", (owner,)).fetchone()
                rows = ((number, key, with_checksum(value, key, owner)) for key, value in values)
                db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)

    def limit(self) -> int:
        """Return the size limit in bytes: a share of what would be free without the cache, at most LARGEST."""
        assert self._folder is not None
        return min(LARGEST, (shutil.disk_usage(self._folder).free + bytes_in(self._folder)) // SHARE_OF_DISK)

    def blocks(self) -> list[dict[str, Any]]:
        """Describe each block, with its key, number of images, last use and bytes."""
        sql = "SELECT name, description, used, COUNT(*) FROM owners JOIN entries ON owner=id GROUP BY 1 ORDER BY 3 DESC"
        found: list[tuple[Any, ...]] = self._try("read", lambda db: db.execute(sql).fetchall()) or []
        return [
            {**block, "key": key, "images": images, "used": used, "bytes": 4 * block["width"] * images}
            for key, stored, used, images in found
            if (description := checked(stored, b"", key)) and (block := json.loads(description))
        ]

    def clear(self) -> None:
        """Delete everything and free the disk space."""
        everything = "BEGIN IMMEDIATE; DELETE FROM entries; DELETE FROM owners; COMMIT"
        space = "PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)"
        self._try("written", lambda db: db.executescript(f"{everything}; {space}"))

    def _make_room(self, db: sqlite3.Connection) -> None:
        """If the cache is over its limit, evict a little of the least recently used owner, which blocks nobody long."""
        if self._unmeasured >= LOOK_EVERY:
            self._most, self._unmeasured = self.limit(), 0
        [(pages, free, size)] = db.execute(_SIZES).fetchall()
        if (pages - free) * size > self._most:
            for number, name in db.execute("SELECT id, name FROM owners ORDER BY used").fetchall():
                if name not in self._in_use:
                    if _evict(db, number):  # what this run adds to it, such as states of files, stays
                        self._in_use.add(name)
                    return
            self.writes = False
            full = f"This run alone fills the cache ({self._most / 1e9:,.1f} GB, a tenth of the free disk space)"
            self.note = f"{full}: further features are not cached. Set NBFEAT_HOME to a folder on a larger disk."
        elif pages * size > self._most:  # free pages are reused, but not given back
            db.executescript(f"PRAGMA incremental_vacuum({BYTES_EVICTED // size})")  # `execute` frees one page

    def _open(self, folder: Path) -> None:
        kind = file_system(folder)
        self.path = max(folder.glob("features-*.sqlite"), default=folder / "features-000000.sqlite")
        connect = partial(sqlite3.connect, self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        self._db = db = connect()
        db.text_factory = partial(str, encoding="utf-8", errors="replace")  # damage must not raise
        [found] = db.execute("PRAGMA user_version").fetchone()
        if found > FORMAT:
            newer = f"it was written by a newer nbfeat, in format {found}"
            raise sqlite3.NotSupportedError(f"{newer}; this version reads format {FORMAT}")
        if found < FORMAT:  # these two only affect a new file
            db.execute("PRAGMA page_size = 4096")  # larger pages write up to four times as much per batch
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        # A write-ahead log needs shared memory, which processes on two machines don't have.
        with suppress(sqlite3.OperationalError):  # another process is creating the file, and sets this
            db.execute(f"PRAGMA journal_mode = {'DELETE' if is_remote(kind) else 'WAL'}")
        db.execute("PRAGMA synchronous = NORMAL")
        if found < FORMAT:
            db.executescript(SCHEMA)
        self._reader, self.writes = connect(), True
        self._reader.text_factory = db.text_factory
        if is_remote(kind):
            self.note = f"The cache is on a network file system ({kind}). Set NBFEAT_HOME to a faster local folder."

    def _try(self, verb: str, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """Return the result of `work`; if it fails, say so in `note` and return None."""
        is_read = verb == "read"
        with self._reading if is_read else self._lock:
            db = self._reader if is_read else self._db
            if db is None or not (is_read or self.writes):
                return None
            try:
                return work(db)
            except _ERRORS as error:
                problem = error
        with self._lock:
            if db in {self._db, self._reader}:  # else another thread has just replaced it
                self._give_up(problem, verb)
        return None

    def _give_up(self, error: Exception, verb: str) -> None:
        """Start a new file if this one is damaged, else stop writing; explain it in `note`."""
        why, way = printable(str(error)), "Free some disk space, or set NBFEAT_HOME to another folder."
        code = getattr(error, "sqlite_errorcode", None) or 0
        is_schema = code == sqlite3.SQLITE_ERROR and why.startswith("no such ")  # a table or column
        if is_schema or code == sqlite3.SQLITE_IOERR_SHORT_READ or code & 0xFF in _DAMAGED:
            damaged = self.path
            self.close()
            with suppress(*_ERRORS):
                damaged.with_name(f"features-{int(damaged.stem.rpartition('-')[2]) + 1:06}.sqlite").touch()
                for file in damaged.parent.glob(f"{damaged.name}*"):  # other processes may have it open
                    file.unlink(missing_ok=True)
                self._open(damaged.parent)
            tail = "A new one was started" if self.writes else "Features are not cached: delete that folder"
            self.note = f"The cache in {self._folder} was damaged ({why}). {tail}."
            return
        if code & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            why, way = "another program has locked it", "Close that program, and run the cell again."
        elif isinstance(error, sqlite3.NotSupportedError):
            way = "Update nbfeat, or set NBFEAT_HOME to another folder."
        self.writes = False
        if verb == "opened":
            self.close()
        self.note = f"The cache in {self._folder} cannot be {verb} ({why}): features are no longer cached. {way}"

    def close(self) -> None:
        """Close the file; the cache is then off."""
        self.writes = False
        with self._lock, self._reading:
            for db in filter(None, (self._reader, self._db)):  # the last one empties the write-ahead log
                with suppress(sqlite3.Error):
                    db.close()
            self._db = self._reader = None


def with_checksum(value: bytes, key: bytes, owner: str) -> bytes:
    """Return `value` with a checksum, which SQLite lacks; it covers key and owner, because damage may swap values."""
    return zlib.crc32(value, zlib.crc32(key + owner.encode())).to_bytes(4, "big") + value


def checked(stored: object, key: bytes, owner: str) -> bytes | None:
    """Return a stored value without its checksum; None if it is damaged or belongs to a different key."""
    value = stored[4:] if isinstance(stored, bytes) else b""
    return value if stored == with_checksum(value, key, owner) else None


def _touch(db: sqlite3.Connection, owners: dict[str, str]) -> None:
    """Update the last use of owners, given with their descriptions."""
    sql = "INSERT INTO owners VALUES (NULL, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET used = excluded.used"
    now = time.time()
    db.executemany(sql, [(name, with_checksum(text.encode(), b"", name), now) for name, text in owners.items()])


def _evict(db: sqlite3.Connection, owner: int) -> bool:
    """Delete some entries of an owner in one short transaction; if it has none, delete the owner and return True."""
    some = "SELECT rowid, LENGTH(value) FROM entries WHERE owner = ? LIMIT ?"
    with db:
        db.execute("BEGIN IMMEDIATE")
        if found := db.execute(some, (owner, MOST_AT_ONCE)).fetchall():
            rows = [(row,) for row, _ in found]
            db.executemany("DELETE FROM entries WHERE rowid = ?", rows[: max(1, BYTES_EVICTED // (found[0][1] or 1))])
        else:
            db.execute("DELETE FROM owners WHERE id = ?", (owner,))
    return not found


def bytes_in(folder: Path) -> int:
    """Return the size of a file or folder."""
    total = 0
    for path in (folder, *folder.rglob("*")):
        with suppress(OSError):  # just removed
            total += path.stat().st_size if path.is_file() else 0
    return total
