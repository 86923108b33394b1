"""The tables of the cache in SQLite: make them, change them whole, and give disk back."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

FORMAT = 1  # of the tables below; raised with every change of them
PATIENCE = 10.0  # seconds to wait for another process that writes
PAGE = 4096  # larger ones write up to four times as much per batch, since images come in no order
ROWS_AT_ONCE = 500  # in one transaction that gives disk back

_TABLES = """
CREATE TABLE blocks (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE NOT NULL, recipe TEXT NOT NULL, width INTEGER, used REAL);
CREATE TABLE features (block INTEGER, image BLOB, vector BLOB, sum INTEGER);
CREATE UNIQUE INDEX features_of_image ON features (block, image);
CREATE TABLE files (state BLOB PRIMARY KEY, image BLOB, kept REAL) WITHOUT ROWID;
CREATE TABLE failures (
    image BLOB, decoders TEXT, reason TEXT, kept REAL, PRIMARY KEY (image, decoders)) WITHOUT ROWID
"""
NAMES = ("features", "blocks", "files", "failures")
BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
# SQLITE_ERROR is what a table or column that is not there gives.
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})


class NewerError(Exception):
    """The file was written by a newer nbfeat."""


def is_busy(error: Exception) -> bool:
    """Tell whether another process is in the way."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in BUSY


def is_damage(error: Exception) -> bool:
    """Tell whether the file is not what it should be."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # of Python, which finds text that is none, in errors that quote the file, too
        return isinstance(error, sqlite3.OperationalError | ValueError | TypeError)
    return code & 0xFF in _DAMAGED or code == sqlite3.SQLITE_IOERR_SHORT_READ


def prepare(db: sqlite3.Connection, journal: str) -> None:
    """Set up a connection with a `journal` of this kind; make the tables where the file is new."""
    if not _check_format(db):
        db.execute(f"PRAGMA page_size = {PAGE}")  # these two count for a new file only
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _insist(lambda: db.execute(f"PRAGMA journal_mode = {journal}"))
    db.execute("PRAGMA synchronous = NORMAL")
    if _check_format(db) < FORMAT:
        with transaction(db):
            if _check_format(db) < FORMAT:  # nobody else was first
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {FORMAT}")


def _check_format(db: sqlite3.Connection) -> int:
    found = int(db.execute("PRAGMA user_version").fetchone()[0])
    if found > FORMAT:
        raise NewerError(f"it was written by a newer nbfeat, in format {found}; this one reads {FORMAT}")
    return found


def _insist(work: Callable[[], object]) -> None:
    """Repeat what SQLite itself does not wait with: two processes that make the file at once."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            work()
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Do the block whole or not at all."""
    db.execute("BEGIN IMMEDIATE")  # a lock taken later could not be waited for
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def used_bytes(db: sqlite3.Connection) -> int:
    """Return the size of all pages that are not free."""
    pages, free, size = (
        int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def evict(db: sqlite3.Connection, block: int, used: float) -> None:
    """Delete a block in short transactions, and what was learned of files and failures until it was last used."""
    some = "DELETE FROM features WHERE rowid IN (SELECT rowid FROM features WHERE block = ? LIMIT ?)"
    gone = ROWS_AT_ONCE
    while gone == ROWS_AT_ONCE:
        with transaction(db):
            gone = db.execute(some, (block, ROWS_AT_ONCE)).rowcount
    with transaction(db):
        db.execute("DELETE FROM blocks WHERE id = ?", (block,))
        for table in ("files", "failures"):
            db.execute(f"DELETE FROM {table} WHERE kept <= ?", (used,))  # noqa: S608 - of the two names above
    give_back(db)


def clear(db: sqlite3.Connection) -> None:
    """Empty all tables."""
    with transaction(db):
        for table in NAMES:
            db.execute(f"DELETE FROM {table}")  # noqa: S608 - of the names above
    give_back(db)


def give_back(db: sqlite3.Connection) -> None:
    """Cut the free pages off the file, some at a time, so that others can write in between."""
    while int(db.execute("PRAGMA freelist_count").fetchone()[0]):
        before = int(db.execute("PRAGMA page_count").fetchone()[0])
        db.execute(f"PRAGMA incremental_vacuum({ROWS_AT_ONCE})").fetchall()
        if int(db.execute("PRAGMA page_count").fetchone()[0]) == before:
            break
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
