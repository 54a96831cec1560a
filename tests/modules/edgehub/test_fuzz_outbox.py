"""The outbox file with values that edgezmq never wrote: it is damaged, whatever SQLite thinks, and the node starts."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.seeds import OUTBOX_BOOT, outbox, park
from fuzz.targets import use_outbox
from runtime.ledger import UnreadableOutbox, read_outbox
from tests.modules.edgehub.test_store import Loop, make, rows, wait

DATA = 1
HUGE = 10**12
"As a length in bytes: more than any machine has."


def sound(path: Path) -> None:
    """A file with all that there can be in it."""
    path.write_bytes(outbox())


def change(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def test_a_sound_file_is_not_damaged(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    sound(path)
    use_outbox(path, OUTBOX_BOOT)


@pytest.mark.parametrize(
    "statement",
    [
        f"UPDATE data SET payload = {HUGE}",
        "UPDATE data SET payload = 'text'",
        "UPDATE data SET payload = 1.5",
        "UPDATE data SET sender = X'ff'",
        "UPDATE data SET size = 'much'",
        "UPDATE data SET born = 'long ago'",
        "UPDATE meta SET value = X'ff' WHERE key = 'reborn.data'",
        "UPDATE meta SET value = 'one two' WHERE key = 'reborn.data'",
        "UPDATE meta SET value = '1' WHERE key = 'reborn.data'",
        "UPDATE meta SET value = '1 2 3' WHERE key = 'reborn.data'",
        "UPDATE meta SET value = NULL WHERE key = 'reborn.data'",
        "UPDATE meta SET value = 'many' WHERE key = 'bytes.data'",
        "UPDATE meta SET value = NULL WHERE key = 'bytes.data'",
        "UPDATE meta SET value = 'many' WHERE key = 'base.data'",
        "UPDATE meta SET value = X'ff' WHERE key = 'confirmed.data'",
        f"UPDATE parked SET payload = {HUGE}",
        "UPDATE parked SET size = 'much'",
        "DROP TABLE data",
        "ALTER TABLE parked RENAME COLUMN payload TO burden",
    ],
)
def test_a_value_that_was_never_written_is_damage_and_the_node_starts_with_a_new_file(
    statement: str, tmp_path: Path
) -> None:
    path = tmp_path / "outbox.db"
    sound(path)
    change(path, statement)
    with pytest.raises(sqlite3.DatabaseError) as raised:
        use_outbox(path, OUTBOX_BOOT)
    assert not isinstance(raised.value, sqlite3.OperationalError), "that would be tried again for ever"
    loop = Loop()
    store = make(path, loop)
    store.extents()
    store.parked()
    store.accounts()
    store.start()
    # What shows only when a row is used begins the new file then. One after another: a drop would hide a bad row.
    for ask in (
        lambda done: store.read(DATA, 0, lambda rows: done()),
        lambda done: store.do(lambda file: file.first_parked("twin"), lambda parked: done()),
        lambda done: store.do(park, lambda is_parked: done()),
        lambda done: (store.drop_bytes(DATA, 1, "full", lambda *what: None), done()),
        lambda done: (store.drop_older(DATA, 0.5, "age", lambda *what: None), done()),
    ):
        answered: list[int] = []
        ask(lambda answered=answered: answered.append(1))
        wait(loop, lambda answered=answered: answered or loop.damage)
    wait(loop, lambda: loop.damage)
    stored: list[str] = []
    store.add(DATA, rows(1, 1), lambda: stored.append("yes"))
    wait(loop, lambda: stored)
    assert store.failing is None
    store.stop()


def test_a_text_that_is_no_utf8_is_shown_with_replacements(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    sound(path)
    change(path, "UPDATE data SET sender = CAST(X'73ff' AS TEXT)", "UPDATE example SET sender = CAST(X'ff' AS TEXT)")
    ledger = read_outbox(path)
    assert ledger is not None
    assert {example["sender"] for example in ledger.examples} == {"\ufffd"}
    use_outbox(path, OUTBOX_BOOT)


@pytest.mark.parametrize(
    "statement",
    [
        f"UPDATE example SET head = {HUGE}",
        "UPDATE example SET head = 'text'",
        "UPDATE meta SET value = 'many' WHERE key = 'bytes.data'",
        "DROP TABLE example",
    ],
)
def test_the_ledger_command_survives_such_values(statement: str, tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    sound(path)
    change(path, statement)
    with contextlib.suppress(UnreadableOutbox):
        read_outbox(path)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_are_read_or_are_damage(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(outbox())
    for at, byte in changes:
        damaged[at % len(damaged)] = byte
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "outbox.db")
        path.write_bytes(damaged)
        with contextlib.suppress(sqlite3.DatabaseError):
            use_outbox(path, "next")
