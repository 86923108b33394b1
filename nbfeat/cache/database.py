"""Features that were computed before, by image content and block, in one SQLite file.

A run never fails because of its cache. What goes wrong becomes one sentence in `note`: a full disk or a locked file
stops the writing, a damaged file is begun anew, and what cannot be opened is not used.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nbfeat.cache import tables
from nbfeat.cache.keys import CacheKey, News, checked, summed
from nbfeat.errors import printable
from nbfeat.paths import HomeError, file_system, is_remote, keep

LARGEST = 20_000_000_000  # bytes
SHARE_OF_DISK = 10  # one part in so many of what is free
LOOK_EVERY = 64_000_000  # bytes written between two looks at the size
MOST_AT_ONCE = 500  # rows in one query
BYTES_AT_ONCE = 8_000_000

Vector = NDArray[np.float32]
_T = TypeVar("_T")


class Cache:
    """The features kept on this machine. With ``folder=None`` nothing is kept, and nothing found."""

    note = ""  # what went wrong, and what to do

    def __init__(self, folder: Path | None, decoders: str = "") -> None:
        self.decoders = decoders
        self.writes = False
        self._db: sqlite3.Connection | None = None
        self._lock = threading.RLock()
        self._mine: dict[str, CacheKey] = {}
        self._unmeasured = LOOK_EVERY
        self._folder = folder
        self._path = Path()
        if folder is not None:
            self._try(self._open, None, "opened")

    @classmethod
    def at_home(cls, decoders: str = "") -> Cache:
        """Open the cache in the home folder."""
        try:
            return cls(keep("features"), decoders)
        except HomeError as error:
            cache = cls(None)
            cache.note = f"{error} Features are not kept."
            return cache

    @property
    def path(self) -> Path:
        """The file; a damaged one is left behind for one of the next number."""
        assert self._folder is not None
        return max(self._folder.glob("features-*.sqlite"), key=_number, default=self._folder / "features-0.sqlite")

    # Reading

    def images(self, states: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return what the files in these states hold, for those that were read before."""
        query = "SELECT state, image FROM files WHERE state IN ({})"
        found = ((state, checked(kept, state)) for state, kept in self._find(query, states))
        return {state: image for state, image in found if image is not None}

    def failures(self, images: Iterable[bytes]) -> dict[bytes, str]:
        """Return the reasons why images could not be decoded, for those that were tried with these decoders."""
        query = "SELECT image, reason FROM failures WHERE image IN ({}) AND decoders = ?"
        found = ((image, checked(kept, self._tried(image))) for image, kept in self._find(query, images, self.decoders))
        return {image: reason.decode() for image, reason in found if reason is not None}

    def vectors(self, block: CacheKey, images: Iterable[bytes]) -> dict[bytes, Vector]:
        """Return the features that `block` has of these images; rows that are damaged are as good as none."""
        query = (
            "SELECT image, vector, sum FROM features WHERE image IN ({}) "
            "AND block = (SELECT id FROM blocks WHERE key = ?)"
        )
        size = 4 * block.width
        return {
            image: np.frombuffer(vector, np.float32)
            for image, vector, sum_ in self._find(query, images, block.key, size=size)
            if isinstance(vector, bytes) and len(vector) == size and block.sum(image, vector) == sum_
        }

    def _tried(self, image: bytes) -> bytes:
        """Return what a failure is about."""
        return image + self.decoders.encode()

    def _find(self, query: str, keys: Iterable[bytes], *more: str, size: int = 1) -> Iterator[Any]:
        """Yield the rows that `query` finds for `keys`, so many at a time that rows of `size` bytes stay few."""
        wanted, most = list(keys), max(1, min(MOST_AT_ONCE, BYTES_AT_ONCE // size))
        for start in range(0, len(wanted), most):
            some = wanted[start : start + most]
            text, values = query.format(",".join("?" * len(some))), (*some, *more)
            yield from self._try(lambda db: db.execute(text, values).fetchall(), [], "read")  # noqa: B023 - used at once

    # Writing

    def use(self, blocks: Iterable[CacheKey]) -> None:
        """Say which blocks a run is about: they are the last to be evicted."""
        self._mine = {block.key: block for block in blocks}

        def work(db: sqlite3.Connection) -> None:
            with tables.transaction(db):
                self._touch(db, self._mine.values())

        self._write(work)

    def keep(self, news: News) -> None:
        """Keep what was found out, whole or not at all."""
        if not self.writes or not news:
            return
        self._unmeasured += sum(4 * block.width * len(images) for block, images, _ in news.vectors)
        if self._unmeasured >= LOOK_EVERY:
            self._write(self._make_room)
            self._unmeasured = 0
        self._write(lambda db: self._insert(db, news))

    def _insert(self, db: sqlite3.Connection, news: News) -> None:
        now = time.time()
        with tables.transaction(db):
            for block, images, vectors in news.vectors:
                number = self._id(db, block)
                rows = [
                    (number, image, data, block.sum(image, data))
                    for image, data in zip(images, map(np.ndarray.tobytes, vectors), strict=True)
                ]
                db.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?)", rows)
            files = [(state, summed(image, state), now) for state, image in news.files.items()]
            db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", files)
            failures = [
                (image, self.decoders, summed(reason.encode(), self._tried(image)), now)
                for image, reason in news.failures.items()
            ]
            db.executemany("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", failures)

    def _id(self, db: sqlite3.Connection, block: CacheKey) -> int:
        """Return the number of a block, which another process may just have evicted."""
        query = "SELECT id FROM blocks WHERE key = ?"
        found = db.execute(query, (block.key,)).fetchone()
        if found is None:
            self._touch(db, [block])
            found = db.execute(query, (block.key,)).fetchone()
        return int(found[0])

    def _touch(self, db: sqlite3.Connection, blocks: Iterable[CacheKey]) -> None:
        now = time.time()
        db.executemany(
            "INSERT INTO blocks (key, recipe, width, used) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (key) DO UPDATE SET used = excluded.used",
            [
                (block.key, summed(block.recipe.encode(), _about(block.key, block.width)), block.width, now)
                for block in blocks
            ],
        )

    # Size

    def limit(self) -> int:
        """Return how many bytes the cache may take: its share of what would be free without it, LARGEST at most."""
        assert self._folder is not None
        return min(LARGEST, (shutil.disk_usage(self._folder).free + self.size()) // SHARE_OF_DISK)

    def size(self) -> int:
        """Return the bytes on disk."""
        return sum(file.stat().st_size for file in _files(self.path) if file.exists())

    def blocks(self) -> list[dict[str, Any]]:
        """Return a recipe for each block, with its key, width, rows and last use."""
        query = "SELECT key, recipe, width, used, (SELECT COUNT(*) FROM features WHERE block = id) FROM blocks"
        none: list[tuple[Any, ...]] = []
        found = self._try(lambda db: db.execute(f"{query} ORDER BY used DESC").fetchall(), none, "read")
        told = (
            (checked(recipe, _about(key, width)), key, width, used, rows) for key, recipe, width, used, rows in found
        )
        return [
            {**json.loads(recipe), "key": key, "width": width, "rows": rows, "used": used}
            for recipe, key, width, used, rows in told
            if recipe and rows
        ]

    def clear(self) -> None:
        """Forget everything, and give the disk back."""
        self._write(tables.clear)

    def _make_room(self, db: sqlite3.Connection) -> None:
        """Evict whole blocks, the one longest unused first, until the rest is within the limit."""
        limit, tried = self.limit(), set[int]()
        while tables.used_bytes(db) > limit:
            every = db.execute("SELECT id, used, key FROM blocks ORDER BY used").fetchall()
            others = [(number, used) for number, used, key in every if key not in self._mine and number not in tried]
            if not others:
                self.writes = False
                self.note = (
                    f"The cache is full with this run alone ({limit / 1e9:,.1f} GB, a tenth of the free disk): further "
                    "features are not kept. Set NBFEAT_HOME to a folder on a larger disk."
                )
                return
            tried.add(others[0][0])
            tables.evict(db, *others[0])

    # Trouble

    def _open(self, _: None = None) -> None:
        assert self._folder is not None
        kind = file_system(self._folder)
        self._path = self.path
        db = sqlite3.connect(self._path, timeout=tables.PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            # A write-ahead log needs memory that all processes share, which those of two machines do not.
            tables.prepare(db, "DELETE" if is_remote(kind) else "WAL")
        except BaseException:
            db.close()
            raise
        self._db, self.writes = db, True
        if is_remote(kind):
            self.note = f"The cache is on a network file system ({kind}); a local folder in NBFEAT_HOME is faster."

    def _write(self, work: Callable[[sqlite3.Connection], None]) -> None:
        if self.writes:
            self._try(work, None, "written")

    def _try(self, work: Callable[[Any], _T], nothing: _T, verb: str) -> _T:
        """Do `work`; where that fails, say so in `note`, do without, and return `nothing`."""
        with self._lock:
            if self._db is None and verb != "opened":
                return nothing
            try:
                return work(self._db)
            except (sqlite3.Error, tables.NewerError, OSError, ValueError, TypeError) as error:
                self._give_up(error, verb)
            return nothing

    def _give_up(self, error: Exception, verb: str) -> None:
        """Stop writing, or begin anew where the file is damaged."""
        why, way = printable(str(error)), "Free some disk, or set NBFEAT_HOME to another folder."
        if tables.is_damage(error):
            self._begin_anew(error)
            return
        if tables.is_busy(error):
            why, way = "another program has locked it", "Close it, and run the cell again."
        elif isinstance(error, tables.NewerError):
            way = "Update nbfeat, or set NBFEAT_HOME to another folder."
        self.writes = False
        if verb == "opened":
            self.close()
        self.note = f"The cache in {self._folder} cannot be {verb} ({why}): features are not kept from here on. {way}"

    def _begin_anew(self, error: Exception) -> None:
        """Leave a damaged file to the processes that have it open, and begin one of the next number."""
        damaged = self._path
        self.close()
        try:
            (damaged.parent / f"features-{_number(damaged) + 1}.sqlite").touch()
            for file in _files(damaged):
                file.unlink(missing_ok=True)
            self._open()
            self._unmeasured = LOOK_EVERY
        except (OSError, sqlite3.Error, tables.NewerError):
            self.close()
        tail = "It was begun anew" if self._db else "Features are not kept: delete that folder"
        self.note = f"The cache in {self._folder} was damaged ({printable(str(error))}). {tail}."

    def close(self) -> None:
        """Let the file go; the cache then finds and keeps nothing."""
        self.writes = False
        with self._lock, suppress(sqlite3.Error):
            if self._db is not None:
                self._db.close()
        self._db = None


def _files(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", "-journal")]


def _about(key: object, width: object) -> bytes:
    return f"{key} {width}".encode()


def _number(path: Path) -> int:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1
