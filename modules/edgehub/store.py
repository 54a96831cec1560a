"""The outbox on disk: one SQLite file, one thread that alone touches it, group commit.

`OutboxFile` is the file: plain calls that block, used by the thread and by tests. `Store` is the thread: orders
are queued, everything queued is done in one transaction, and answers come back into the loop.

A row is what CloudHub is to get: the JSON text as it is written. Rows are numbered per class, in the order in
which they were accepted, and are deleted from the front when the cloud has them. What is dropped after it was
accepted (age, size) is written to the ledger in the transaction that drops it.

Beside them lie the parked objects of `modules.edgehub.parking`: what the cloud sent, and no module here owns yet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, TypeVar

log = logging.getLogger("modules.edgehub.store")

T = TypeVar("T")
P = ParamSpec("P")

SCHEMA: Final = 2
"PRAGMA user_version. A later schema only adds, so that an earlier version can read it. 2 added `parked`."
OBJECT: Final = "object"
"Stands for the class in the ledger: not an upload, but an object that the cloud sent."
CLASSES: Final = ("signal", "data")
"Table names by the number of `modules.edgehub.outbox.Class`."
EXAMPLES: Final = 100
"Dropped messages that the ledger keeps, the last ones; the counts are for ever."
RETRY_SECONDS: Final = 1.0
"After a failed write (full disk) it is tried again this often."
WAL_LIMIT_BYTES: Final = 4 * 2**20
BUSY_SECONDS: Final = 5.0
"`edgezmq ledger` reads the file beside us."

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS {name} (
    row INTEGER PRIMARY KEY,
    born REAL NOT NULL,
    size INTEGER NOT NULL,
    sender TEXT NOT NULL,
    payload BLOB NOT NULL
)
"""
_META: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dropped (reason TEXT, class TEXT, messages INTEGER NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY (reason, class)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS example (number INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL,
    reason TEXT NOT NULL, class TEXT NOT NULL, sender TEXT NOT NULL, head BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS parked (number INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, key TEXT NOT NULL,
    is_new INTEGER NOT NULL, size INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS parked_key ON parked (owner, key);
CREATE INDEX IF NOT EXISTS parked_size ON parked (owner, size);
CREATE TABLE IF NOT EXISTS owner (name TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_COLUMNS: Final = {
    **dict.fromkeys(CLASSES, "row, born, size, sender, payload"),
    "dropped": "reason, class, messages, bytes",
    "example": "number, at_ms, reason, class, sender, head",
    "parked": "number, owner, key, is_new, size, payload",
    "owner": "name",
}
_HEAD_BYTES: Final = 512


class Row(NamedTuple):
    """One stored message."""

    row: int
    sender: str
    payload: bytes


class Extent(NamedTuple):
    """What one class holds."""

    first: int
    "Number of the first row; last + 1 when there is none."
    last: int
    messages: int
    bytes: int


class Account(NamedTuple):
    """What became of the rows of one class, ever."""

    stored: int
    confirmed: int
    dropped: int
    present: int

    @property
    def mismatch(self) -> int:
        """Rows of which nothing is known. Not 0: a fault of ours, or somebody wrote into the file."""
        return self.stored - self.confirmed - self.dropped - self.present


class Dropped(NamedTuple):
    """An entry of the ledger."""

    reason: str
    kind: int
    messages: int
    bytes: int


class Parked(NamedTuple):
    """An object that waits for its owner."""

    number: int
    owner: str
    payload: bytes


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turn what a value that we never wrote does to us into sqlite3.DatabaseError.

    SQLite holds any type in any column, and finds changed bytes only where they are in its own structures.
    """
    try:
        yield
    except (TypeError, ValueError, OverflowError) as fault:
        raise sqlite3.DatabaseError(f"a value that was never written: {fault}") from fault


def _reads(method: Callable[Concatenate[OutboxFile, P], T]) -> Callable[Concatenate[OutboxFile, P], T]:
    """For a method that computes with what the file holds."""

    @wraps(method)
    def reading(self: OutboxFile, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with _damage():
            return method(self, *args, **kwargs)

    return reading


class OutboxFile:
    """The file. Every method is one transaction, or part of the one that `begin` opened.

    Raises sqlite3.OperationalError when the disk is full, sqlite3.DatabaseError when the file is damaged.
    """

    def __init__(self, path: Path, *, boot_id: str, now: float) -> None:
        """Open or make it. `boot_id`: of this boot of the machine; `now`: CLOCK_BOOTTIME in seconds.

        Ages are counted in `now` of the boot in which a row was stored. Rows of earlier boots begin a new life at
        the first open of this boot, so that a clock that starts in 1970 expires nothing.
        """
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_SECONDS)
        # Text with changed bytes would be an OperationalError, which is tried again; it is only ever shown.
        self._db.text_factory = lambda raw: raw.decode("utf-8", "replace")
        os.chmod(path, 0o600)
        try:
            with _damage():
                self._prepare(boot_id, now)
        except sqlite3.OperationalError as fault:
            self._db.close()
            if getattr(fault, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:  # no such table, no such column
                raise sqlite3.DatabaseError(str(fault)) from fault
            raise
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, boot_id: str, now: float) -> None:
        run = self._db.execute
        run("PRAGMA auto_vacuum=INCREMENTAL")  # has an effect only before the first table is made
        run("PRAGMA journal_mode=WAL")
        run("PRAGMA synchronous=FULL")
        run(f"PRAGMA journal_size_limit={WAL_LIMIT_BYTES}")
        run("PRAGMA cache_size=-512")
        version = run("PRAGMA user_version").fetchone()[0]
        if version < SCHEMA:
            with self.transaction():
                for name in CLASSES:
                    run(_TABLES.format(name=name))
                for statement in _META.strip().split(";\n"):
                    if statement.strip(" ;\n"):
                        run(statement)
                for kind, name in enumerate(CLASSES):
                    first = self.extent(kind).first
                    if version == 1:  # it did not keep the account
                        run("INSERT OR IGNORE INTO meta VALUES (?, ?)", (f"base.{name}", first - 1))
                run(f"PRAGMA user_version={SCHEMA}")
        # Quick, and it finds the torn pages that a power loss on a lying disk leaves in the b-trees' upper levels.
        for name in CLASSES:
            run(f"SELECT min(row), max(row) FROM {name}").fetchone()
        # The same for tables and columns that are gone.
        for table, columns in _COLUMNS.items():
            run(f"SELECT {columns} FROM {table} LIMIT 0").fetchone()
        known = run("SELECT value FROM meta WHERE key = 'boot'").fetchone()
        if known is None or known[0] != boot_id:
            with self.transaction():
                run("INSERT OR REPLACE INTO meta VALUES ('boot', ?)", (boot_id,))
                for name in CLASSES:
                    last = run(f"SELECT max(row) FROM {name}").fetchone()[0] or 0
                    run("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"reborn.{name}", f"{last} {now!r}"))
        self._has_base = [
            run("SELECT 1 FROM meta WHERE key = ?", (f"base.{name}",)).fetchone() is not None for name in CLASSES
        ]
        self._reborn: list[tuple[int, float]] = []
        for name in CLASSES:
            value = run("SELECT value FROM meta WHERE key = ?", (f"reborn.{name}",)).fetchone()
            last, born = str(value[0]).split() if value else ("0", "0")
            self._reborn.append((int(last), float(born)))

    @contextlib.contextmanager
    def transaction(self) -> Any:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def shrink(self) -> None:
        """Give the pages of a backlog that is gone back to the file system."""
        self._db.execute("PRAGMA incremental_vacuum").fetchall()

    def close(self) -> None:
        self._db.close()

    @_reads
    def extent(self, kind: int) -> Extent:
        """What one class holds; does not depend on how much it is, for rows are numbered without gaps."""
        # Two look-ups: SQLite finds min and max by the key only when they are asked for one by one.
        first = self._db.execute(f"SELECT min(row) FROM {CLASSES[kind]}").fetchone()[0]
        last = self._db.execute(f"SELECT max(row) FROM {CLASSES[kind]}").fetchone()[0]
        if first is None:
            last = int(self._meta(f"top.{CLASSES[kind]}", 0))
            return Extent(last + 1, last, 0, 0)
        return Extent(first, last, last - first + 1, int(self._meta(f"bytes.{CLASSES[kind]}", 0)))

    def _meta(self, key: str, default: int) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row is not None else default

    def _grow(self, kind: int, size: int) -> None:
        self._db.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = max(0, value + excluded.value)",
            (f"bytes.{CLASSES[kind]}", size),
        )

    def _count(self, what: str, kind: int, count: int) -> None:
        self._db.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = value + excluded.value",
            (f"{what}.{CLASSES[kind]}", count),
        )

    @_reads
    def account(self, kind: int) -> Account:
        """What became of all rows that this file ever had, over every restart."""
        name = CLASSES[kind]
        extent = self.extent(kind)
        base = self._meta(f"base.{name}", 0)
        confirmed, dropped = (int(self._meta(f"{what}.{name}", 0)) for what in ("confirmed", "dropped"))
        return Account(extent.last - base, confirmed, dropped, extent.messages)

    def add(self, kind: int, rows: Sequence[Row], now: float) -> None:
        if rows and not self._has_base[kind]:
            # Numbers go on from those of a file that was set aside.
            self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (f"base.{CLASSES[kind]}", rows[0].row - 1))
        self._db.executemany(
            f"INSERT INTO {CLASSES[kind]} VALUES (?, ?, ?, ?, ?)",
            [(row.row, now, len(row.payload), row.sender, row.payload) for row in rows],
        )
        self._grow(kind, sum(len(row.payload) for row in rows))

    @_reads
    def read(self, kind: int, after: int, *, max_messages: int, max_bytes: int) -> list[Row]:
        """The rows behind number `after`, at most so many; at least one when there is any."""
        rows: list[Row] = []
        size = 0
        cursor = self._db.execute(
            f"SELECT row, sender, payload FROM {CLASSES[kind]} WHERE row > ? ORDER BY row LIMIT ?",
            (after, max_messages),
        )
        for number, sender, payload in cursor:
            if not isinstance(sender, str):
                raise TypeError(f"row {number}: the sender is of type {type(sender).__name__}")
            size += len(_blob(payload))
            if rows and size > max_bytes:
                break
            rows.append(Row(number, sender, _blob(payload)))
        cursor.close()
        return rows

    @_reads
    def replace(self, kind: int, number: int, sender: str, payload: bytes, reason: str) -> bool:
        """Let a message take the place of the one in row `number`, which goes into the ledger. False: no such row."""
        table = CLASSES[kind]
        old = self._db.execute(f"SELECT size FROM {table} WHERE row = ?", (number,)).fetchone()
        self.note(kind, reason, 1, old[0] if old is not None else 0)
        if old is None:
            return False
        self._db.execute(
            f"UPDATE {table} SET size = ?, sender = ?, payload = ? WHERE row = ?",
            (len(payload), sender, payload, number),
        )
        self._grow(kind, len(payload) - old[0])
        return True

    @_reads
    def delete(self, kind: int, upto: int) -> None:
        """The cloud has all up to row `upto`."""
        self._delete(kind, upto, "confirmed")

    def _delete(self, kind: int, upto: int, why: str) -> None:
        table = CLASSES[kind]
        count, size = self._db.execute(f"SELECT count(*), total(size) FROM {table} WHERE row <= ?", (upto,)).fetchone()
        if count:
            self._count(why, kind, count)
        self._db.execute(f"DELETE FROM {CLASSES[kind]} WHERE row <= ?", (upto,))
        self._grow(kind, -int(size))
        self._db.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = max(value, excluded.value)",
            (f"top.{CLASSES[kind]}", upto),
        )

    @_reads
    def drop(self, kind: int, upto: int, reason: str, at_ms: int) -> Dropped:
        """Drop accepted messages up to row `upto`, into the ledger."""
        table = CLASSES[kind]
        count, size = self._db.execute(f"SELECT count(*), total(size) FROM {table} WHERE row <= ?", (upto,)).fetchone()
        if count:
            self._db.execute(
                f"INSERT INTO example (at_ms, reason, class, sender, head) SELECT ?, ?, ?, sender, "
                f"substr(payload, 1, {_HEAD_BYTES}) FROM {table} WHERE row <= ? ORDER BY row DESC LIMIT {EXAMPLES}",
                (at_ms, reason, table, upto),
            )
            self._db.execute("DELETE FROM example WHERE number <= (SELECT max(number) FROM example) - ?", (EXAMPLES,))
            self.note(kind, reason, count, int(size))
            self._delete(kind, upto, "dropped")
        return Dropped(reason, kind, count, int(size))

    def note(self, kind: int, reason: str, messages: int, size: int) -> None:
        """Count what was dropped."""
        self._note(CLASSES[kind], reason, messages, size)

    def _note(self, kind: str, reason: str, messages: int, size: int) -> None:
        self._db.execute(
            "INSERT INTO dropped VALUES (?, ?, ?, ?) ON CONFLICT (reason, class) DO UPDATE SET "
            "messages = messages + excluded.messages, bytes = bytes + excluded.bytes",
            (reason, kind, messages, size),
        )

    def note_one(self, kind: int, reason: str, sender: str, payload: bytes, at_ms: int) -> None:
        """Count one message that never was a row, and keep its beginning."""
        self._note_one(CLASSES[kind], reason, sender, payload, at_ms)

    def _note_one(self, kind: str, reason: str, sender: str, payload: bytes, at_ms: int) -> None:
        self._db.execute(
            "INSERT INTO example (at_ms, reason, class, sender, head) VALUES (?, ?, ?, ?, ?)",
            (at_ms, reason, kind, sender, payload[:_HEAD_BYTES]),
        )
        self._db.execute("DELETE FROM example WHERE number <= (SELECT max(number) FROM example) - ?", (EXAMPLES,))
        self._note(kind, reason, 1, len(payload))

    @_reads
    def last_older_than(self, kind: int, seconds: float, now: float) -> int | None:
        """Number of the last row that is older than `seconds`, or None. Rows are in the order of their ages."""
        found = None
        reborn_upto, reborn_at = self._reborn[kind]
        table = CLASSES[kind]
        if now - reborn_at > seconds:
            row = self._db.execute(f"SELECT max(row) FROM {table} WHERE row <= ?", (reborn_upto,)).fetchone()
            found = row[0]
        first = self._db.execute(
            f"SELECT row, born FROM {table} WHERE row > ? ORDER BY row LIMIT 1", (reborn_upto,)
        ).fetchone()
        if first is not None and now - first[1] > seconds and (found is not None or self._none_before(kind, first[0])):
            row = self._db.execute(
                f"SELECT max(row) FROM {table} WHERE row > ? AND born < ?", (reborn_upto, now - seconds)
            ).fetchone()
            found = row[0] if row[0] is not None else found
        return found

    def _none_before(self, kind: int, row: int) -> bool:
        return self._db.execute(f"SELECT 1 FROM {CLASSES[kind]} WHERE row < ? LIMIT 1", (row,)).fetchone() is None

    @_reads
    def upto_bytes(self, kind: int, size: int) -> int | None:
        """Number of the row up to which the oldest rows make up at least `size` bytes, or None when there are none."""
        total = 0
        last = None
        cursor = self._db.execute(f"SELECT row, size FROM {CLASSES[kind]} ORDER BY row")
        for number, length in cursor:
            total += length
            last = number
            if total >= size:
                break
        cursor.close()
        return last

    # --- parked objects ------------------------------------------------------------------------------

    @_reads
    def park(
        self,
        owner: str,
        key: str,
        payload: bytes,
        *,
        is_insert: bool,
        is_delete: bool,
        max_messages: int,
        max_bytes: int,
    ) -> bool:
        """Keep an object for `owner`, the last one under each `key`, behind all others. False: there is no room.

        A delete takes the object's place. Of an object that the owner cannot know (its insert is parked too, or the
        owner never had any) it leaves nothing.
        """
        run = self._db.execute
        old = run("SELECT number, is_new, size FROM parked WHERE owner = ? AND key = ?", (owner, key)).fetchone()
        is_new = bool(old[1]) if old is not None else is_insert or not self.is_known_owner(owner)
        if is_delete and is_new:
            run("DELETE FROM parked WHERE owner = ? AND key = ?", (owner, key))
            return True
        messages, size = self.parked_of()
        if old is not None:
            messages, size = messages - 1, size - old[2]
        if messages >= max_messages or size + len(payload) > max_bytes:
            return False
        if old is not None:
            run("DELETE FROM parked WHERE number = ?", (old[0],))
        run(
            "INSERT INTO parked (owner, key, is_new, size, payload) VALUES (?, ?, ?, ?, ?)",
            (owner, key, is_new, len(payload), payload),
        )
        return True

    @_reads
    def first_parked(self, owner: str) -> Parked | None:
        row = self._db.execute(
            "SELECT number, owner, payload FROM parked WHERE owner = ? ORDER BY number LIMIT 1", (owner,)
        ).fetchone()
        return None if row is None else Parked(row[0], row[1], _blob(row[2]))

    def unpark(self, number: int) -> None:
        """Its owner has handled it. Numbers are never used again: a newer version of the object stays."""
        self._db.execute("DELETE FROM parked WHERE number = ?", (number,))

    @_reads
    def parked(self) -> dict[str, tuple[int, int]]:
        """By owner: how many objects, how many bytes."""
        rows = self._db.execute("SELECT owner, count(*), sum(size) FROM parked GROUP BY owner")
        return {owner: (messages, int(size)) for owner, messages, size in rows}

    @_reads
    def parked_of(self) -> tuple[int, int]:
        messages, size = self._db.execute("SELECT count(*), total(size) FROM parked").fetchone()
        return messages, int(size)

    def know_owner(self, owner: str) -> None:
        """From now on `owner` may have objects, so that deletes concern it."""
        self._db.execute("INSERT OR IGNORE INTO owner VALUES (?)", (owner,))
        self._db.execute("UPDATE parked SET is_new = 0 WHERE owner = ?", (owner,))

    def is_known_owner(self, owner: str) -> bool:
        return self._db.execute("SELECT 1 FROM owner WHERE name = ?", (owner,)).fetchone() is not None

    @_reads
    def known_owners(self) -> set[str]:
        return {name for (name,) in self._db.execute("SELECT name FROM owner")}

    def note_object(self, reason: str, owner: str, payload: bytes, at_ms: int) -> None:
        """An object that was acknowledged, or is to be, and that nobody will have."""
        self._note_one(OBJECT, reason, owner, payload, at_ms)

    def note_objects(self, reason: str, messages: int) -> None:
        """The same of objects of which nothing else is known."""
        self._note(OBJECT, reason, messages, 0)

    # --- the ledger ------------------------------------------------------------------------------------

    @_reads
    def ledger(self) -> dict[str, Any]:
        """What was dropped after acceptance: counts for ever, the last examples."""
        return read_ledger(self._db)


def read_ledger(db: sqlite3.Connection) -> dict[str, Any]:
    """The ledger in JSON values, newest example first."""
    return {
        "dropped": [
            {"reason": reason, "class": kind, "messages": messages, "bytes": size}
            for reason, kind, messages, size in db.execute("SELECT * FROM dropped ORDER BY reason, class")
        ],
        "examples": [
            {
                "at_ms": at_ms,
                "reason": reason,
                "class": kind,
                "sender": sender,
                "head": _blob(head).decode("utf-8", "replace"),
            }
            for at_ms, reason, kind, sender, head in db.execute(
                "SELECT at_ms, reason, class, sender, head FROM example ORDER BY number DESC"
            )
        ],
    }


def _blob(value: object) -> bytes:
    """A BLOB; TypeError for what SQLite else may hold there (`bytes` of a number would be so many zeros)."""
    if not isinstance(value, bytes):
        raise TypeError(f"a blob is of type {type(value).__name__}")
    return value


def set_aside(path: Path) -> Path:
    """Move a damaged file (and its WAL) out of the way; returns where it is now."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    for suffix in ("-wal", "-shm"):
        companion = path.with_name(path.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            companion.rename(aside.with_name(aside.name + suffix))
    path.rename(aside)
    return aside


# --- the thread ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Orders:
    """What is to be done in the next transaction, in this order."""

    add: list[tuple[int, list[Row], Callable[[], None]]] = field(default_factory=list)
    delete: dict[int, int] = field(default_factory=dict)
    read: deque[tuple[int, int, Callable[[list[Row]], None]]] = field(default_factory=deque)
    drop: list[tuple[int, int | None, float | None, str, Callable[[Dropped, int], None]]] = field(default_factory=list)
    note: list[tuple[int, str, str | int, bytes]] = field(default_factory=list)
    work: list[tuple[Callable[[OutboxFile], Any], Callable[[Any], None]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.add or self.delete or self.read or self.drop or self.note or self.work)


class Store:
    """The thread that owns the file. Its methods never block; answers are called through `call_back` (thread-safe).

    A write that fails for want of space is tried again every second, `failing` says why meanwhile; nothing
    that was ordered is forgotten. A damaged file is set aside and a new one begun: `on_damage(where)`; what waits for
    its commit goes into the new one.
    """

    def __init__(
        self,
        path: Path,
        *,
        boot_id: str,
        clock: Callable[[], float],
        wall_ms: Callable[[], int],
        call_back: Callable[[Callable[[], None]], None],
        on_damage: Callable[[str], None],
        read_bytes: int = 512 * 1024,
        read_messages: int = 1024,
    ) -> None:
        self._path = path
        self._boot_id = boot_id
        self._clock = clock
        self._wall_ms = wall_ms
        self._call_back = call_back
        self._on_damage = on_damage
        self._read_bytes = read_bytes
        self._read_messages = read_messages
        self._orders = _Orders()
        self._condition = threading.Condition()
        self._stopping = False
        self.failing: str | None = None
        "Why the last write failed, or None."
        self.bytes_written = 0
        "Payload bytes committed."
        self.commits = 0
        self._file = self._open()
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)

    def _open(self) -> OutboxFile:
        try:
            return OutboxFile(self._path, boot_id=self._boot_id, now=self._clock())
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as fault:
            return self._begin_anew(fault)

    def _begin_anew(self, fault: sqlite3.DatabaseError) -> OutboxFile:
        aside = set_aside(self._path)
        log.error("the outbox file is damaged, set aside as %s, a new one is begun: %s", aside, fault)
        file = OutboxFile(self._path, boot_id=self._boot_id, now=self._clock())
        with self._condition:
            # What was ordered spoke of the old file. Forgotten before anybody is told, who then orders anew.
            self._orders = _Orders(note=self._orders.note)
        self._call_back(lambda: self._on_damage(str(aside)))
        return file

    def extents(self) -> list[Extent]:
        """What the file holds, per class. Before `start` only.

        Looks at all that is asked for before `start`: a file that is damaged there is begun anew here.
        """
        try:
            self.parked()
            self.accounts()
            return [self._file.extent(kind) for kind in range(len(CLASSES))]
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as fault:
            self._file.close()
            self._file = self._begin_anew(fault)
            return [self._file.extent(kind) for kind in range(len(CLASSES))]

    def parked(self) -> tuple[dict[str, tuple[int, int]], set[str]]:
        """By owner: how many objects are parked, how many bytes; and who is known. Before `start`, after `extents`."""
        return self._file.parked(), self._file.known_owners()

    def accounts(self) -> list[Account]:
        """What became of the rows of each class. Before `start` only; after `extents`."""
        return [self._file.account(kind) for kind in range(len(CLASSES))]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Do what is ordered, once, then end the thread and close the file. Blocks for a commit."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(timeout=10.0)

    # --- orders; called in the loop ---------------------------------------------------------------

    def add(self, kind: int, rows: list[Row], done: Callable[[], None]) -> None:
        """Store `rows`; `done` once they are committed."""
        with self._condition:
            self._orders.add.append((kind, rows, done))
            self._condition.notify()

    def delete(self, kind: int, upto: int) -> None:
        with self._condition:
            self._orders.delete[kind] = max(upto, self._orders.delete.get(kind, 0))
            self._condition.notify()

    def read(self, kind: int, after: int, done: Callable[[list[Row]], None]) -> None:
        """`done` with the rows behind `after`, as many as `read_bytes` and `read_messages` allow."""
        with self._condition:
            self._orders.read.append((kind, after, done))
            self._condition.notify()

    def drop_older(self, kind: int, seconds: float, reason: str, done: Callable[[Dropped, int], None]) -> None:
        """Drop what is older than `seconds`; `done(what, last row dropped)` if anything was."""
        with self._condition:
            self._orders.drop.append((kind, None, seconds, reason, done))
            self._condition.notify()

    def drop_bytes(self, kind: int, size: int, reason: str, done: Callable[[Dropped, int], None]) -> None:
        """Drop the oldest rows that make up `size` bytes."""
        with self._condition:
            self._orders.drop.append((kind, size, None, reason, done))
            self._condition.notify()

    def note_many(self, kind: int, reason: str, messages: int) -> None:
        """Count messages of which nothing else is known into the ledger."""
        with self._condition:
            self._orders.note.append((kind, reason, messages, b""))
            self._condition.notify()

    def note(self, kind: int, reason: str, sender: str, payload: bytes) -> None:
        """Write a message that was given up, though accepted, into the ledger."""
        with self._condition:
            self._orders.note.append((kind, reason, sender, payload))
            self._condition.notify()

    def do(self, work: Callable[[OutboxFile], T], done: Callable[[T], None]) -> None:
        """Have `work(file)` done in the next transaction, in the thread; `done` with its result once it is committed.

        It may be called again when the commit failed. When the file was damaged it is forgotten.
        """
        with self._condition:
            self._orders.work.append((work, done))
            self._condition.notify()

    # --- the thread itself ---------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._orders and not self._stopping:
                    self._condition.wait()
                orders, self._orders = self._orders, _Orders()
                stopping = self._stopping
            if orders:
                try:
                    self._perform(orders)
                    if self.failing is not None:
                        log.info("the outbox can be written again")
                        self.failing = None
                except sqlite3.Error as fault:
                    self._failed(orders, fault, stopping)
            if stopping:
                self._file.close()
                return

    def _perform(self, orders: _Orders) -> None:
        answers: list[Callable[[], None]] = []
        file = self._file
        now = self._clock()
        if orders.add or orders.delete or orders.drop or orders.note or orders.work:
            with file.transaction():
                for kind, rows, done in orders.add:
                    file.add(kind, rows, now)
                    answers.append(done)
                for kind, upto in orders.delete.items():
                    file.delete(kind, upto)
                for kind, size, seconds, reason, dropped in orders.drop:
                    last = (
                        file.upto_bytes(kind, size)
                        if size is not None
                        else file.last_older_than(kind, seconds or 0.0, now)
                    )
                    if last is not None:
                        what = file.drop(kind, last, reason, self._wall_ms())
                        answers.append(lambda done=dropped, what=what, last=last: done(what, last))  # type: ignore[misc]
                for kind, reason, sender, payload in orders.note:
                    if isinstance(sender, int):
                        file.note(kind, reason, sender, 0)
                    else:
                        file.note_one(kind, reason, sender, payload, self._wall_ms())
                for work, told in orders.work:
                    answers.append(partial(told, work(file)))
            self.commits += 1
            self.bytes_written += sum(len(row.payload) for _, rows, _ in orders.add for row in rows)
            orders.add, orders.delete, orders.drop, orders.note, orders.work = [], {}, [], [], []
            for answer in answers:
                self._call_back(answer)
        while orders.read:
            kind, after, loaded = orders.read[0]
            rows = file.read(kind, after, max_messages=self._read_messages, max_bytes=self._read_bytes)
            orders.read.popleft()
            self._call_back(partial(loaded, rows))

    def _failed(self, orders: _Orders, fault: sqlite3.Error, stopping: bool) -> None:
        """Nothing of the transaction was done. Put it back in front; a damaged file is begun anew."""
        if not isinstance(fault, sqlite3.OperationalError):
            self._file.close()
            try:
                self._file = self._begin_anew(sqlite3.DatabaseError(str(fault)))
            except (sqlite3.Error, OSError) as again:
                fault = sqlite3.OperationalError(str(again))
            else:
                with self._condition:
                    self._orders.note = orders.note + self._orders.note
                return
        if isinstance(fault, sqlite3.OperationalError) and self.failing is None:
            log.error("the outbox cannot be written, trying again every %s s: %s", RETRY_SECONDS, fault)
        self.failing = str(fault)
        if stopping:
            return
        with self._condition:
            later = self._orders
            orders.add += later.add
            for kind, upto in later.delete.items():
                orders.delete[kind] = max(upto, orders.delete.get(kind, 0))
            orders.read += later.read
            orders.drop += later.drop
            orders.note += later.note
            orders.work += later.work
            self._orders = orders
            self._condition.wait(RETRY_SECONDS)
