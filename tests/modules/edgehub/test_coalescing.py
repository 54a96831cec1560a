"""Status-like messages while the cloud is away: only the last of each counts, by configuration."""

import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from modules.edgehub.coalescing import Coalescing
from modules.edgehub.hub import OUTBOX_FILE
from modules.edgehub.link import LinkLost
from modules.edgehub.outbox import Class, Outbox, OutboxLimits, StoredRow
from modules.edgehub.store import OutboxFile, Row, read_ledger
from runtime.errors import ConfigError
from runtime.message import Message
from tests.modules.edgehub.fakes import FakeCloud, FakeDeferral, hand_over, running
from tests.modules.edgehub.test_hub import config
from tests.support.aio import run, until


def status(device: str, value: int, **more: Any) -> Message:
    return Message.upload(f"default/status/{device}", {"value": value, **more})


def event(number: int) -> Message:
    return Message.upload("default/event", {"value": number})


def settings(directory: Path, **changes: Any) -> Any:
    return config(
        outbox_path=directory / OUTBOX_FILE, coalesce=("default/status/* upload",), spill_seconds=0.01, **changes
    )


def test_patterns_name_resource_and_operation() -> None:
    coalescing = Coalescing(["default/status/* upload", "a topic/# *"])
    one, other = status("a", 1), status("b", 1)
    assert coalescing.key(one) == coalescing.key(status("a", 2)) != coalescing.key(other)
    assert coalescing.key(event(1)) is None
    assert coalescing.key(Message.build(source="s", group="g", resource="a topic/#", operation="x")) is not None
    assert not Coalescing([])


@pytest.mark.parametrize("pattern", ["", "resource", " upload", "resource "])
def test_a_pattern_without_both_is_an_error_that_names_it(pattern: str) -> None:
    with pytest.raises(ConfigError, match="coalesce"):
        config(coalesce=(pattern,))


def box() -> Outbox[str]:
    outbox: Outbox[str] = Outbox(OutboxLimits(1000, 1 << 20))
    return outbox


def take(outbox: Outbox[str]) -> list[bytes]:
    return [entry.payload for entry in outbox.take(1 << 20, max_messages=100, max_data=None)]


def merge(first: str, second: str) -> str:
    return first + "+" + second


def test_in_memory_the_last_one_takes_the_first_ones_place_and_both_are_settled_together() -> None:
    outbox = box()
    outbox.put(b"old", "old", Class.DATA, key="k")
    outbox.put(b"event", "event", Class.DATA)
    assert outbox.coalesce("k", b"newer", "new", Class.DATA, sender="s", merge=merge) == 0
    assert take(outbox) == [b"newer", b"event"]
    barrier = outbox.barrier()
    assert barrier is not None
    assert outbox.passed(barrier) == ["old+new", "event"]
    assert outbox.held_bytes == outbox.mismatch == 0


def test_a_row_that_is_read_before_its_replacement_is_committed_goes_up_with_the_new_payload() -> None:
    outbox = box()
    outbox.put(b"x" * 600_000, "large", Class.DATA)
    outbox.put(b"old", "old", Class.DATA, key="k")
    rows = outbox.spill(Class.DATA, 1e9)
    outbox.stored(Class.DATA, 2)
    assert outbox.coalesce("k", b"newer", "new", Class.DATA, sender="s", merge=merge) == 2
    assert take(outbox) == [b"x" * 600_000]
    assert outbox.wanted() == [(Class.DATA, 1)]
    outbox.loaded(Class.DATA, 1, [StoredRow(2, "s", rows[1].payload)], now=1.0)
    assert outbox.coalesce("k", b"newest", "newest", Class.DATA, sender="s", merge=merge) == 2
    assert take(outbox) == [b"newest"]
    outbox.replaced(Class.DATA, 2, b"newer")
    barrier = outbox.barrier()
    assert barrier is not None
    outbox.passed(barrier)
    assert outbox.held_messages == outbox.held_bytes == outbox.mismatch == 0


def test_with_a_link_every_message_stands_for_itself() -> None:
    outbox = box()
    outbox.put(b"old", "old", Class.DATA, key="k")
    outbox.settle_places()
    assert not outbox.has_place("k", Class.DATA)


def test_a_row_in_the_file_is_replaced_and_the_old_one_is_in_the_ledger(tmp_path: Path) -> None:
    file = OutboxFile(tmp_path / "outbox.db", boot_id="b", now=1.0)
    with file.transaction():
        file.add(Class.DATA, [Row(1, "s", b"old"), Row(2, "s", b"x")], 1.0)
        assert file.replace(Class.DATA, 1, "t", b"newer", "coalesced")
        assert not file.replace(Class.DATA, 7, "t", b"newer", "coalesced")
    assert file.read(Class.DATA, 0, max_messages=9, max_bytes=99) == [Row(1, "t", b"newer"), Row(2, "s", b"x")]
    assert file.extent(Class.DATA) == (1, 2, 2, 6)
    assert file.account(Class.DATA).mismatch == 0
    assert file.ledger()["dropped"] == [{"reason": "coalesced", "class": "data", "messages": 2, "bytes": 3}]
    file.close()


@pytest.mark.parametrize("seed", range(4))
def test_while_the_cloud_is_away_the_last_value_of_each_device_is_kept_and_all_events(
    tmp_path: Path, seed: int
) -> None:
    async def scenario() -> None:
        chance = random.Random(seed)
        cloud = FakeCloud()
        cloud.faults = [LinkLost("refused")] * 10_000
        deferrals: list[FakeDeferral] = []
        last: dict[str, int] = {}
        events: list[int] = []
        statuses = 0
        async with running(settings(tmp_path), factory=cloud, seed=seed) as (hub, _):
            for number in range(600):
                if chance.random() < 0.2:
                    message = event(number)
                    events.append(number)
                else:
                    device = f"d{chance.randrange(20)}"
                    message = status(device, number, pad="x" * chance.choice([0, 10, 30_000]))
                    last[device] = number
                    statuses += 1
                deferral = await hand_over(hub, message)
                assert deferral is not None
                deferrals.append(deferral)
                if chance.random() < 0.1:
                    await until(lambda: deferrals[0].outcome == "done", "the first commit")
                if number == 300:
                    await until(lambda: all(d.outcome == "done" for d in deferrals), "acceptance")
            await until(lambda: all(d.outcome == "done" for d in deferrals), "acceptance")
            counts = hub.counters()
            assert counts["coalesced"] == counts["dropped"] == statuses - len(last)
            assert counts["held"] == len(last) + len(events)
            assert counts["ledger_mismatch"] == 0
            cloud.faults.clear()
            hub.dial_now()
            await until(lambda: hub.counters()["held"] == 0, "everything to go up")
            assert hub.counters()["ledger_mismatch"] == 0
        written = cloud.written()
        assert [m.json()["value"] for m in written if m.resource == "default/event"] == events
        arrived = {m.resource.rpartition("/")[2]: m.json()["value"] for m in written if "status" in m.resource}
        assert arrived == last
        db = sqlite3.connect(tmp_path / OUTBOX_FILE)
        (dropped,) = read_ledger(db)["dropped"]
        db.close()
        assert (dropped["reason"], dropped["messages"]) == ("coalesced", statuses - len(last))

    run(scenario())


def test_with_the_link_up_nothing_is_coalesced(tmp_path: Path) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(settings(tmp_path), factory=cloud) as (hub, _):
            await until(lambda: hub.counters()["link_served"] == 1, "a served link")
            for number in range(20):
                await hand_over(hub, status("a", number))
            await until(lambda: len(cloud.written()) == 20, "all of them")
            assert hub.counters()["coalesced"] == 0

    run(scenario())
