"""The connections to the log's file: opened, watched, and opened again where somebody took the file away.

SQLite writes on into files that were deleted or moved, and says nothing; what it writes there is gone
with the process. So the files are looked at, by device and inode.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from pathlib import Path

from streaming.errors import LogError, LogFull
from streaming.log.file import locked, prepare

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 5.0  # for a lock of a foreign reader, such as a backup
MAX_WAL_BYTES = 64 * 1024 * 1024  # of `-wal`; a larger one is cut when no reader needs it any more
WARN_WAL_BYTES = 256 * 1024 * 1024

_Identity = tuple[int, int] | None  # device and inode; None: no such file
# What passes: no room, or a foreign reader's lock. The rest means that the file or the disk is broken.
_NO_ROOM = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE})
_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


def failure_of(path: Path, exc: sqlite3.Error) -> LogError:
    """What a write that failed is raised as."""
    code = getattr(exc, "sqlite_errorcode", None)
    if code in _NO_ROOM:
        return LogFull(f"log {path}: cannot be written now: {exc}", "its disk is full")
    if code in _LOCKED:
        return LogFull(f"log {path}: cannot be written now: {exc}", "another program holds a lock on it")
    return LogError(f"log {path}: {exc}")


class Connections:
    """One that writes and one that reads. `reading` is held by whoever uses the second."""

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            LogError: it is in use, corrupt, no log, or a log of another version; says what to do.
        """
        self._path = path
        self._wal = path.with_name(path.name + "-wal")
        self._lock = locked(path)
        self.reading = threading.Lock()
        try:
            self.writer = _connect(path)
            self.id = prepare(self.writer, path)  # of this log, and of no other one
            self._open()
        except sqlite3.Error as exc:
            self._lock.close()
            raise LogError(f"log {path}: cannot be used: {exc}; move it away or set [log] path") from exc
        except LogError:
            self._lock.close()
            raise

    def close(self) -> None:
        """Give the file back."""
        with contextlib.suppress(sqlite3.Error):  # all that was promised is committed
            self.reader.close()
            self.writer.close()
        self._lock.close()

    def _open(self) -> None:
        self.writer.execute("PRAGMA synchronous = FULL")
        self.writer.execute(f"PRAGMA journal_size_limit = {MAX_WAL_BYTES}").fetchall()
        self.writer.execute("SELECT count(*) FROM sqlite_master").fetchall()  # makes `-wal`
        self.reader = _connect(self._path)
        self.reader.execute("PRAGMA query_only = ON")
        self._files = self._look()

    # --- upkeep: of the writing thread ---------------------------------------------------

    def lost(self) -> str:
        """What is not where it was any more; empty where all is."""
        found = self._look()
        if found == self._files:
            return ""
        names = (self._path.name, self._wal.name)
        return " and ".join(
            f"{name} was {'deleted or moved' if now is None else 'replaced'}"
            for name, before, now in zip(names, self._files, found, strict=True)
            if before != now
        )

    def make_whole(self) -> None:
        """Write everything that is still open to where it belongs, and open that.

        Raises:
            LogFull: not now; the same may be tried again.
            LogError: another file is in the log's place, or what is open cannot be written.
        """
        is_there = self._look()[0]
        if is_there is not None and is_there != self._files[0]:
            raise LogError(f"log {self._path}: was replaced by another file while the server ran")
        try:
            if is_there is None:
                self._copy()
            else:
                busy, *_ = self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if busy:  # a foreign reader: what it reads is copied after it
                    raise LogFull(
                        f"log {self._path}: another program reads it", "another program holds a lock on it"
                    )
            with self.reading:
                self.reader.close()
                self.writer.close()
                self.writer = _connect(self._path)
                self.writer.execute("PRAGMA journal_mode = WAL").fetchall()
                self._open()
        except sqlite3.Error as exc:
            raise failure_of(self._path, exc) from exc

    def _copy(self) -> None:
        """All of the open database into a new file in its place."""
        partial = self._path.with_name(self._path.name + ".partial")
        partial.unlink(missing_ok=True)
        self._wal.unlink(missing_ok=True)  # of the file that is gone: it does not belong to the new one
        self._path.with_name(self._path.name + "-shm").unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(partial)) as copy:
            self.writer.backup(copy)
        partial.chmod(0o600)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(self._path)

    def shorten(self) -> None:
        """Cut a `-wal` that grew while somebody read for long; waits for nobody."""
        n_bytes = self._wal.stat().st_size if self._wal.exists() else 0
        if n_bytes <= MAX_WAL_BYTES:
            return
        with contextlib.suppress(sqlite3.Error):  # later
            self.writer.execute("PRAGMA busy_timeout = 0").fetchall()
            self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        with contextlib.suppress(sqlite3.Error):
            self.writer.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}").fetchall()
        n_bytes = self._wal.stat().st_size if self._wal.exists() else 0
        if n_bytes > WARN_WAL_BYTES:
            logger.warning(
                "log %s: -wal has %d MiB, since another program reads the log", self._path, n_bytes >> 20
            )

    def _look(self) -> tuple[_Identity, _Identity]:
        return _identity(self._path), _identity(self._wal)


def _identity(path: Path) -> _Identity:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
