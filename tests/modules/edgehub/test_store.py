"""The outbox's file and its thread: commits, restarts, damage, a full disk, age, the ledger."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modules.edgehub import store as module
from modules.edgehub.store import Dropped, OutboxFile, Row, Store, set_aside
from tests.support.aio import until_sync

SIGNAL, DATA = 0, 1


def rows(first: int, count: int, size: int = 10) -> list[Row]:
    return [Row(number, "sender", b"%06d" % number + b"x" * (size - 6)) for number in range(first, first + count)]


def open_file(path: Path, *, boot: str = "boot-1", now: float = 100.0) -> OutboxFile:
    return OutboxFile(path, boot_id=boot, now=now)


def test_rows_survive_closing_and_opening(tmp_path: Path) -> None:
    file = open_file(tmp_path / "outbox.db")
    with file.transaction():
        file.add(DATA, rows(1, 5), 100.0)
    file.close()
    file = open_file(tmp_path / "outbox.db")
    assert file.extent(DATA) == (1, 5, 5, 50)
    assert file.extent(SIGNAL) == (1, 0, 0, 0)
    assert file.read(DATA, 2, max_messages=2, max_bytes=1000) == rows(3, 2)
    file.close()


def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    open_file(tmp_path / "outbox.db").close()
    assert stat.S_IMODE(os.stat(tmp_path / "outbox.db").st_mode) == 0o600


def test_a_read_gives_at_least_one_row_whatever_its_size(tmp_path: Path) -> None:
    file = open_file(tmp_path / "outbox.db")
    with file.transaction():
        file.add(DATA, rows(1, 3, size=5000), 100.0)
    assert [row.row for row in file.read(DATA, 0, max_messages=10, max_bytes=100)] == [1]
    assert [row.row for row in file.read(DATA, 0, max_messages=10, max_bytes=10_000)] == [1, 2]
    file.close()


def test_numbers_go_on_after_everything_was_deleted(tmp_path: Path) -> None:
    file = open_file(tmp_path / "outbox.db")
    with file.transaction():
        file.add(DATA, rows(1, 5), 100.0)
        file.delete(DATA, 5)
    file.close()
    file = open_file(tmp_path / "outbox.db")
    assert file.extent(DATA) == (6, 5, 0, 0)
    file.close()


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    file = open_file(tmp_path / "outbox.db")
    with pytest.raises(sqlite3.IntegrityError), file.transaction():
        file.add(DATA, rows(1, 2), 100.0)
        file.add(DATA, rows(2, 1), 100.0)
    assert file.extent(DATA).messages == 0
    assert file.extent(DATA).bytes == 0
    file.close()


def test_what_is_dropped_is_in_the_ledger_by_the_same_transaction(tmp_path: Path) -> None:
    file = open_file(tmp_path / "outbox.db")
    with file.transaction():
        file.add(DATA, rows(1, 300), 100.0)
    with pytest.raises(RuntimeError), file.transaction():
        file.drop(DATA, 200, "too-old", 1)
        raise RuntimeError("power loss")
    assert file.ledger()["dropped"] == []
    with file.transaction():
        assert file.drop(DATA, 200, "too-old", 1) == Dropped("too-old", DATA, 200, 2000)
    ledger = file.ledger()
    assert ledger["dropped"] == [{"reason": "too-old", "class": "data", "messages": 200, "bytes": 2000}]
    assert len(ledger["examples"]) == module.EXAMPLES
    assert file.extent(DATA) == (201, 300, 100, 1000)
    file.close()


def test_ages_are_counted_within_one_boot(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    file = open_file(path, now=1000.0)
    with file.transaction():
        file.add(DATA, rows(1, 2), 1000.0)
        file.add(DATA, rows(3, 2), 1500.0)
    assert file.last_older_than(DATA, 600, 1550.0) is None
    assert file.last_older_than(DATA, 600, 1700.0) == 2
    assert file.last_older_than(DATA, 600, 2200.0) == 4
    file.close()
    # The machine starts again: its clock begins anew, and so does the age of what it finds.
    file = open_file(path, boot="boot-2", now=5.0)
    with file.transaction():
        file.add(DATA, rows(5, 1), 300.0)
    assert file.last_older_than(DATA, 600, 500.0) is None
    assert file.last_older_than(DATA, 600, 700.0) == 4
    assert file.last_older_than(DATA, 600, 1000.0) == 5
    file.close()


def test_the_oldest_rows_of_a_size_are_found(tmp_path: Path) -> None:
    file = open_file(tmp_path / "outbox.db")
    assert file.upto_bytes(DATA, 10) is None
    with file.transaction():
        file.add(DATA, rows(1, 10), 1.0)
    assert file.upto_bytes(DATA, 25) == 3
    assert file.upto_bytes(DATA, 10_000) == 10
    file.close()


def test_a_file_of_a_later_version_that_only_adds_can_be_read(tmp_path: Path) -> None:
    file = open_file(tmp_path / "outbox.db")
    with file.transaction():
        file.add(DATA, rows(1, 3), 1.0)
    file.close()
    db = sqlite3.connect(tmp_path / "outbox.db")
    db.execute("PRAGMA user_version=2")
    db.execute("CREATE TABLE later (x)")
    db.close()
    file = open_file(tmp_path / "outbox.db")
    assert file.read(DATA, 0, max_messages=9, max_bytes=999) == rows(1, 3)
    file.close()


def test_a_damaged_file_is_moved_and_never_overwrites_another(tmp_path: Path) -> None:
    for expected in ("outbox.db.damaged-1", "outbox.db.damaged-2"):
        (tmp_path / "outbox.db").write_text(expected)
        assert set_aside(tmp_path / "outbox.db").name == expected
    assert (tmp_path / "outbox.db.damaged-1").read_text() == "outbox.db.damaged-1"


# --- the thread ---------------------------------------------------------------------------------


class Loop:
    """Takes the thread's answers and runs them where the test is."""

    def __init__(self) -> None:
        self.answers: list[Callable[[], None]] = []
        self.lock = threading.Lock()
        self.damage: list[str] = []

    def call_back(self, answer: Callable[[], None]) -> None:
        with self.lock:
            self.answers.append(answer)

    def run(self) -> None:
        with self.lock:
            answers, self.answers = self.answers, []
        for answer in answers:
            answer()


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def made(tmp_path: Path, loop: Loop) -> Iterator[Store]:
    store = make(tmp_path / "outbox.db", loop)
    store.start()
    yield store
    store.stop()


def make(path: Path, loop: Loop) -> Store:
    return Store(
        path,
        boot_id="boot-1",
        clock=lambda: 100.0,
        wall_ms=lambda: 1,
        call_back=loop.call_back,
        on_damage=loop.damage.append,
    )


def wait(loop: Loop, condition: Callable[[], object]) -> None:
    def look() -> object:
        loop.run()
        return condition()

    until_sync(look)


def test_many_orders_are_one_commit(tmp_path: Path, loop: Loop) -> None:
    store = make(tmp_path / "outbox.db", loop)
    done: list[int] = []
    for number in range(1, 51):
        store.add(DATA, rows(number, 1), lambda number=number: done.append(number))  # type: ignore[misc]
    store.start()
    wait(loop, lambda: len(done) == 50)
    assert done == list(range(1, 51))
    assert store.commits == 1
    assert store.bytes_written == 500
    store.stop()


def test_rows_are_answered_and_deleted(made: Store, loop: Loop) -> None:
    got: list[list[Row]] = []
    made.add(DATA, rows(1, 4), lambda: None)
    made.read(DATA, 1, got.append)
    wait(loop, lambda: got)
    assert got == [rows(2, 3)]
    made.delete(DATA, 3)
    made.read(DATA, 0, got.append)
    wait(loop, lambda: len(got) == 2)
    assert got[1] == rows(4, 1)


def test_stopping_does_what_was_ordered_first(tmp_path: Path, loop: Loop) -> None:
    store = make(tmp_path / "outbox.db", loop)
    store.start()
    store.add(DATA, rows(1, 100), lambda: None)
    store.stop()
    file = open_file(tmp_path / "outbox.db")
    assert file.extent(DATA).messages == 100
    file.close()


def test_a_full_disk_pushes_back_and_recovers_by_itself(
    tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)
    store = make(tmp_path / "outbox.db", loop)
    # SQLite gives the same error when the file may not grow as when the disk is full.
    pages = store._file._db.execute("PRAGMA page_count").fetchone()[0]
    store._file._db.execute(f"PRAGMA max_page_count={pages + 2}")
    store.start()
    done: list[str] = []
    store.add(DATA, rows(1, 50, size=4000), lambda: done.append("large"))
    store.add(SIGNAL, rows(1, 1), lambda: done.append("small"))
    wait(loop, lambda: store.failing)
    assert "full" in str(store.failing)
    assert done == []
    store.read(DATA, 0, lambda _: done.append("read"))
    store._file._db.execute("PRAGMA max_page_count=1000000")
    wait(loop, lambda: len(done) == 3)
    assert done == ["large", "small", "read"]
    assert store.failing is None
    store.stop()


def test_a_damaged_file_is_set_aside_at_the_start_and_reported(tmp_path: Path, loop: Loop) -> None:
    path = tmp_path / "outbox.db"
    path.write_bytes(b"this is no database" * 1000)
    store = make(path, loop)
    assert [extent.messages for extent in store.extents()] == [0, 0]
    store.start()
    wait(loop, lambda: loop.damage)
    assert Path(loop.damage[0]).read_bytes().startswith(b"this is no database")
    got: list[list[Row]] = []
    store.add(DATA, rows(1, 1), lambda: None)
    store.read(DATA, 0, got.append)
    wait(loop, lambda: got)
    assert got == [rows(1, 1)]
    store.stop()


def test_damage_that_shows_later_begins_a_new_file_too(tmp_path: Path, loop: Loop) -> None:
    path = tmp_path / "outbox.db"
    file = open_file(path)
    with file.transaction():
        file.add(DATA, rows(1, 2000, size=500), 1.0)
    file._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    file.close()
    size = path.stat().st_size
    with path.open("r+b") as raw:
        raw.seek(size // 2)
        raw.write(os.urandom(size // 4))
    store = make(path, loop)
    store.start()
    got: list[list[Row]] = []
    after = 0

    def take(found: list[Row]) -> None:
        nonlocal after
        got.append(found)
        after = found[-1].row if found else 10**9

    for _ in range(20):
        if loop.damage:
            break
        before = len(got)
        store.read(DATA, after, take)
        wait(loop, lambda before=before: len(got) > before or loop.damage)  # type: ignore[misc]
    assert loop.damage, "the file begun anew is told to the outbox, which stores again what it still has"
    done: list[str] = []
    store.add(DATA, rows(1, 1), lambda: done.append("stored"))
    wait(loop, lambda: done)
    store.stop()


def test_the_ledger_counts_what_was_given_up(made: Store, loop: Loop) -> None:
    made.note(DATA, "cut-by-cloud", "sender", b"{" * 2000)
    made.note_many(DATA, "outbox-damaged", 7)
    done: list[str] = []
    made.add(DATA, rows(1, 1), lambda: done.append("x"))
    wait(loop, lambda: done)
    ledger = made._file.ledger()
    assert {(entry["reason"], entry["messages"]) for entry in ledger["dropped"]} == {
        ("cut-by-cloud", 1),
        ("outbox-damaged", 7),
    }
    assert len(ledger["examples"][0]["head"]) == 512


def test_old_and_too_many_rows_are_dropped_and_told(made: Store, loop: Loop) -> None:
    told: list[tuple[Dropped, int]] = []
    made.add(DATA, rows(1, 10), lambda: None)
    made.drop_bytes(DATA, 25, "outbox-full", lambda what, last: told.append((what, last)))
    wait(loop, lambda: told)
    assert told == [(Dropped("outbox-full", DATA, 3, 30), 3)]
    made.drop_older(DATA, -1.0, "too-old", lambda what, last: told.append((what, last)))
    wait(loop, lambda: len(told) == 2)
    assert told[1] == (Dropped("too-old", DATA, 7, 70), 10)
