"""The loss ledger: what it says of refusals, of the outbox file, and of accounts that close or do not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modules.edgehub.store import CLASSES, OutboxFile, Row
from runtime import ledger
from runtime.ledger import OutboxLedger, UnreadableOutbox, compose, edgehub_account, problems, read_outbox

DATA = 1


@contextlib.contextmanager
def outbox_file(path: Path) -> Iterator[OutboxFile]:
    """With 5 data messages, of which the first two were dropped."""
    file = OutboxFile(path, boot_id="boot", now=100.0)
    with file.transaction():
        file.add(DATA, [Row(number, "eventbus", b'{"n":%d}' % number) for number in range(1, 6)], 100.0)
        file.drop(DATA, 2, "too-old", 1234)
    try:
        yield file
    finally:
        file.close()


def lane(**more: Any) -> dict[str, Any]:
    return {
        "sender": "eventbus",
        "destination": "@hub",
        "priority": 3,
        "accepted": 3,
        "delivered": 2,
        "refused": 1,
        "held": 0,
        "balanced": True,
        **more,
    }


COUNTERS = {"accepted": 10, "restored": 5, "confirmed": 8, "held": 4, "dropped": 2, "given_up": 1}


def test_it_reads_the_file_that_edgehub_writes_while_edgehub_has_it_open(tmp_path: Path) -> None:
    with outbox_file(tmp_path / "outbox.db") as file:
        found = read_outbox(tmp_path / "outbox.db")
        assert found is not None
        assert {"dropped": found.dropped, "examples": found.examples} == file.ledger()
        assert found.dropped == [{"reason": "too-old", "class": "data", "messages": 2, "bytes": 14}]
        assert [each["head"] for each in found.examples] == ['{"n":1}', '{"n":2}']
        assert found.stored == [
            {"class": "signal", "messages": 0, "bytes": 0},
            {"class": "data", "messages": 3, "bytes": 21},
        ]
    assert ledger.CLASSES == CLASSES


def test_it_reads_the_file_of_a_node_that_is_down_and_of_one_that_was_killed(tmp_path: Path) -> None:
    with outbox_file(tmp_path / "outbox.db"):
        for name in ("outbox.db", "outbox.db-wal"):  # as a kill leaves them
            (tmp_path / f"killed-{name}").write_bytes((tmp_path / name).read_bytes())
    stopped = read_outbox(tmp_path / "outbox.db")
    killed = read_outbox(tmp_path / "killed-outbox.db")
    assert stopped == killed
    assert stopped is not None
    assert stopped.dropped


def test_no_file_is_no_loss_and_a_damaged_one_is_said(tmp_path: Path) -> None:
    assert read_outbox(tmp_path / "outbox.db") is None
    (tmp_path / "outbox.db").write_bytes(b"no database " * 1000)
    with pytest.raises(UnreadableOutbox, match=r"outbox\.db"):
        read_outbox(tmp_path / "outbox.db")


def test_refusals_are_told_by_module_and_reason_most_first() -> None:
    bus = {
        "modules": [
            {"name": "a", "refused": {"denied": 1, "expired": 0}},
            {"name": "b", "refused": {"failed": 7}},
            {"name": "c"},
        ]
    }
    document = compose(bus, None)
    assert [(each["module"], each["reason"], each["messages"]) for each in document["refused"]] == [
        ("b", "failed", 7),
        ("a", "denied", 1),
    ]
    assert document["refused_messages"] == 8
    assert document["balanced"]
    assert problems(document) == []


def test_edgehubs_account_closes_when_everything_accepted_is_somewhere() -> None:
    account = edgehub_account(COUNTERS)
    assert account == {**COUNTERS, "missing": 0, "balanced": True}
    assert edgehub_account({}) is None


def test_a_missing_message_opens_the_accounts_and_is_a_problem() -> None:
    for bus in (
        {"modules": [{"name": "edgehub", "counters": {**COUNTERS, "held": 3}}]},
        {"modules": [], "accounts": [lane(), lane(delivered=1, balanced=False)]},
    ):
        document = compose(bus, None)
        assert not document["balanced"]
        assert any("do not close" in problem for problem in problems(document))


def test_what_was_dropped_while_under_way_and_arrived_all_the_same_is_no_loss() -> None:
    account = edgehub_account({**COUNTERS, "dropped": 4})
    assert account is not None
    assert (account["missing"], account["balanced"]) == (-2, True)


def test_the_mqtt_brokers_own_losses_are_summed_or_unknown() -> None:
    def told(**counters: int) -> int | None:
        document = compose({"modules": [{"name": "eventbus", "counters": counters}]}, None)
        count: int | None = document["mqtt_broker_dropped"]
        return count

    assert told() is None
    assert told(mqtt_broker_dropped=0) == 0
    assert told(external_mqtt_broker_dropped=2, internal_mqtt_broker_dropped=3) == 5


def test_drops_are_a_problem_and_are_there_without_a_broker() -> None:
    dropped = [{"reason": "outbox-full", "class": "data", "messages": 12, "bytes": 100}]
    document = compose(None, OutboxLedger(dropped=dropped))
    assert (document["is_live"], document["dropped_messages"]) == (False, 12)
    assert problems(document) == ["12 messages were dropped after they were accepted (edgezmq ledger)"]
