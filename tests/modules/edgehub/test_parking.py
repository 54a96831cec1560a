"""Objects that no module here owns: parked, acknowledged, handed over in order when their owner comes."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from modules.edgehub.hub import OUTBOX_FILE, EdgeHub
from modules.edgehub.parking import park_key
from modules.edgehub.store import OutboxFile, read_ledger
from runtime.message import Message
from runtime.names import Group
from tests.modules.edgehub.fakes import FakeBus, FakeCloud, running
from tests.modules.edgehub.test_hub import acks, config, configmap, until_served
from tests.support.aio import run, until

META = Group("meta")


def stored(directory: Path, **changes: Any) -> Any:
    return config(outbox_path=directory / OUTBOX_FILE, **changes)


async def park(hub: EdgeHub, cloud: FakeCloud, *messages: Message) -> None:
    """Send objects as CloudHub does: the next one after the ACK."""
    await until_served(hub)
    for message in messages:
        cloud.link.down(message)
        await until(lambda m=message: m.id in acks(cloud), "the ACK")


def ledger(directory: Path) -> dict[str, Any]:
    db = sqlite3.connect(directory / OUTBOX_FILE)
    try:
        return read_ledger(db)
    finally:
        db.close()


def parked_rows(directory: Path) -> int:
    db = sqlite3.connect(directory / OUTBOX_FILE)
    try:
        return int(db.execute("SELECT count(*) FROM parked").fetchone()[0])
    finally:
        db.close()


def test_an_object_without_an_owner_is_parked_then_acknowledged_and_delivered_when_its_module_comes(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(stored(tmp_path), factory=cloud) as (hub, bus):
            bus.refusing[META] = "unroutable"
            objects = [configmap(name) for name in ("a", "b", "c")]
            await park(hub, cloud, *objects)
            assert hub.counters()["parked"] == parked_rows(tmp_path) == 3
            assert hub.link_status()["parked"] == {META: 3}
            del bus.refusing[META]
            before = len(bus.sent_to(META))
            bus.attach("metamanager")
            await until(lambda: hub.counters()["parked"] == 0, "the delivery")
            assert [m.id for m in bus.sent_to(META)][before:] == [m.id for m in objects]
            assert [m.content for m in bus.sent_to(META)][before:] == [m.content for m in objects]
            assert hub.counters()["unparked"] == 3
            assert parked_rows(tmp_path) == 0
            assert ledger(tmp_path) == {"dropped": [], "examples": []}

    run(scenario())


def test_what_is_parked_survives_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        update = configmap("a")
        async with running(stored(tmp_path), factory=cloud) as (hub, bus):
            bus.refusing[META] = "unroutable"
            await park(hub, cloud, update)
        async with running(stored(tmp_path), factory=FakeCloud()) as (hub, bus):
            await until(lambda: hub.counters()["parked"] == 0, "the delivery")
            assert [m.id for m in bus.sent_to(META)] == [update.id]

    run(scenario())


def test_only_the_last_version_of_a_resource_is_parked(tmp_path: Path) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(stored(tmp_path), factory=cloud) as (hub, bus):
            bus.refusing[META] = "unroutable"
            first, other, last = configmap("a"), configmap("b"), configmap("a")
            await park(hub, cloud, first, other, last)
            assert hub.counters()["parked"] == 2
            del bus.refusing[META]
            before = len(bus.sent_to(META))
            bus.attach("metamanager")
            await until(lambda: hub.counters()["parked"] == 0, "the delivery")
            assert [m.id for m in bus.sent_to(META)][before:] == [other.id, last.id]

    run(scenario())


def test_a_delete_prunes_what_its_owner_never_had(tmp_path: Path) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(stored(tmp_path), factory=cloud) as (hub, bus):
            bus.refusing[META] = "unroutable"
            await park(hub, cloud, configmap("a"), configmap("b"), configmap("a", operation="delete"))
            assert hub.counters()["parked"] == 1
            await park(hub, cloud, configmap("never seen", operation="delete"))
            assert hub.counters()["parked"] == 1

    run(scenario())


def test_a_delete_of_what_its_owner_may_have_waits_for_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(stored(tmp_path), factory=cloud) as (hub, bus):
            await park(hub, cloud, configmap("a"))  # handled by its owner
            bus.refusing[META] = "unroutable"
            new = configmap("new", operation="insert")
            delete = configmap("a", operation="delete")
            await park(hub, cloud, configmap("a"), delete, new, configmap("new", operation="delete"))
            assert hub.counters()["parked"] == 1, "the insert and its delete leave nothing"
            del bus.refusing[META]
            bus.attach("metamanager")
            await until(lambda: hub.counters()["parked"] == 0, "the delivery")
            assert bus.sent_to(META)[-1].id == delete.id

    run(scenario())


def test_new_objects_go_behind_the_parked_ones(tmp_path: Path) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(stored(tmp_path), factory=cloud) as (hub, bus):
            bus.refusing[META] = "unroutable"
            objects = [configmap(f"c{n}") for n in range(5)]
            await park(hub, cloud, *objects)
            del bus.refusing[META]
            bus.slow.add(META)
            before = len(bus.sent_to(META))
            bus.attach("metamanager")
            await until(lambda: len(bus.sent_to(META)) == before + 1, "the first one")
            newer = configmap("c0"), configmap("later")
            await park(hub, cloud, *newer)
            bus.slow.clear()
            bus.sent[-1].receipt.settle()
            await until(lambda: hub.counters()["parked"] == 0, "the delivery")
            ids = [m.id for m in bus.sent_to(META)][before:]
            assert ids == [m.id for m in [*objects, *newer]]

    run(scenario())


def test_without_room_no_ack_goes_up_and_the_repeat_is_a_new_try(tmp_path: Path) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(stored(tmp_path, parked_messages=1), factory=cloud) as (hub, bus):
            bus.refusing[META] = "unroutable"
            first, second = configmap("a"), configmap("b")
            await park(hub, cloud, first)
            cloud.link.down(second)
            await until(lambda: hub.counters()["parking_full"] == 1, "the refusal")
            assert acks(cloud) == [first.id]
            await park(hub, cloud, configmap("a"))  # a newer version needs no more room
            del bus.refusing[META]
            bus.attach("metamanager")
            await until(lambda: hub.counters()["parked"] == 0, "the delivery")
            await park(hub, cloud, second)

    run(scenario())


def test_what_its_owner_refuses_again_and_again_is_acknowledged_and_in_the_ledger(tmp_path: Path) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(stored(tmp_path, owner_refusals=3), factory=cloud) as (hub, bus):
            await until_served(hub)
            bus.refusing[META] = "bad-object"
            update = configmap("a")
            for attempt in range(1, 4):
                assert acks(cloud) == []
                cloud.link.down(update)
                await until(lambda n=attempt: hub.counters()["refused_down"] == n, "the refusal")
            await until(lambda: acks(cloud) == [update.id], "the ACK")
            (dropped,) = ledger(tmp_path)["dropped"]
            assert (dropped["reason"], dropped["class"], dropped["messages"]) == ("refused-by-owner", "object", 1)
            assert update.id in ledger(tmp_path)["examples"][0]["head"]
            assert hub.counters()["refused_by_owner"] == 1
            cloud.link.down(update)
            await until(lambda: acks(cloud) == [update.id] * 2, "its repeat is only acknowledged")
            assert len(bus.sent_to(META)) == 3

    run(scenario())


def test_refusals_of_the_bus_are_not_counted_as_the_owners(tmp_path: Path) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(stored(tmp_path, owner_refusals=1), factory=cloud) as (hub, bus):
            await until_served(hub)
            bus.refusing[META] = "overtaken"
            update = configmap("a")
            for attempt in range(1, 4):
                cloud.link.down(update)
                await until(lambda n=attempt: hub.counters()["refused_down"] == n, "the refusal")
            assert acks(cloud) == []

    run(scenario())


def test_a_parked_object_that_its_owner_refuses_goes_to_the_ledger_and_does_not_hold_up_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modules.edgehub.hub.ParkingLimits", impatient)

    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(stored(tmp_path, owner_refusals=2), factory=cloud) as (hub, bus):
            bus.refusing[META] = "unroutable"
            bad, good = configmap("a"), configmap("b")
            await park(hub, cloud, bad, good)
            before = len(bus.sent_to(META))
            bus.refusing[META] = "bad-object"
            bus.attach("metamanager")
            await until(lambda: hub.counters()["parked"] == 1, "the end of the first")
            del bus.refusing[META]
            await until(lambda: hub.counters()["parked"] == 0, "the delivery of the second")
            assert [m.id for m in bus.sent_to(META)][before : before + 2] == [bad.id, bad.id]
            assert bus.sent_to(META)[-1].id == good.id
            (dropped,) = ledger(tmp_path)["dropped"]
            assert (dropped["reason"], dropped["messages"]) == ("refused-by-owner", 1)

    run(scenario())


def impatient(*args: Any) -> Any:
    from modules.edgehub.parking import ParkingLimits

    return ParkingLimits(*args, pause_seconds=0.01)


def test_a_full_disk_holds_the_ack_back_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.edgehub.store.RETRY_SECONDS", 0.02)
    is_full = True
    whole = OutboxFile.park

    def no_room(self: OutboxFile, *args: Any, **more: Any) -> bool:
        if is_full:
            raise sqlite3.OperationalError("database or disk is full")
        return whole(self, *args, **more)

    monkeypatch.setattr(OutboxFile, "park", no_room)

    async def scenario() -> None:
        nonlocal is_full
        cloud = FakeCloud()
        async with running(stored(tmp_path), factory=cloud) as (hub, bus):
            bus.refusing[META] = "unroutable"
            await until_served(hub)
            update = configmap("a")
            cloud.link.down(update)
            await until(lambda: hub.counters()["store_failing"] == 1, "the failure")
            cloud.link.down(update)
            assert acks(cloud) == []
            is_full = False
            await until(lambda: acks(cloud) == [update.id], "the ACK")
            assert hub.counters()["parked"] == 1

    run(scenario())


def test_objects_that_were_not_committed_when_the_file_was_damaged_are_left_to_the_clouds_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = OutboxFile.park
    faults: list[Exception] = []

    def park_or_fail(self: OutboxFile, *args: Any, **more: Any) -> bool:
        if faults:
            raise faults.pop()
        return whole(self, *args, **more)

    monkeypatch.setattr(OutboxFile, "park", park_or_fail)

    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(stored(tmp_path), factory=cloud) as (hub, bus):
            bus.refusing[META] = "unroutable"
            await park(hub, cloud, configmap("kept"))
            faults.append(sqlite3.DatabaseError("database disk image is malformed"))
            update = configmap("a")
            cloud.link.down(update)
            await until(lambda: hub.counters()["outbox_damaged"] == 1, "the new file")
            assert acks(cloud)[1:] == []
            await park(hub, cloud, update)
            assert hub.counters()["objects_dropped"] == 1
            assert {"reason": "outbox-damaged", "class": "object", "messages": 1, "bytes": 0} in ledger(tmp_path)[
                "dropped"
            ]

    run(scenario())


def test_messages_that_need_no_ack_are_not_parked(tmp_path: Path) -> None:
    async def scenario() -> None:
        cloud = FakeCloud()
        async with running(stored(tmp_path), factory=cloud) as (hub, bus):
            await until_served(hub)
            bus.refusing["eventbus"] = "unroutable"
            cloud.link.down(
                Message.build(source="router_eventbus", group="user", resource="t", operation="publish", content="x")
            )
            await until(lambda: hub.counters()["refused_down"] == 1, "the refusal")
            assert hub.counters()["parked"] == 0

    run(scenario())


def test_patches_and_responses_do_not_take_an_objects_place() -> None:
    update, patch = configmap("a"), configmap("a", operation="patch")
    assert park_key(update) == park_key(configmap("a", operation="delete"))
    assert park_key(patch) != park_key(update)
    assert park_key(patch) != park_key(configmap("a", operation="patch"))


def test_a_file_of_the_first_schema_gets_its_new_tables(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    OutboxFile(path, boot_id="b", now=1.0).close()
    db = sqlite3.connect(path)
    db.executescript("DROP TABLE parked; DROP TABLE owner; PRAGMA user_version=1")
    db.close()
    file = OutboxFile(path, boot_id="b", now=1.0)
    assert file.parked() == {}
    assert file.parked_of() == (0, 0)
    file.close()


def test_a_bus_that_tells_nothing_of_presence_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.edgehub.parking._LOOK_SECONDS", 0.05)

    async def scenario() -> None:
        cloud = FakeCloud()
        bus: FakeBus
        async with running(stored(tmp_path), factory=cloud) as (hub, bus):
            bus.refusing[META] = "gone"
            await park(hub, cloud, configmap("a"))
            del bus.refusing[META]
            await until(lambda: hub.counters()["parked"] == 0, "the delivery")

    run(scenario())
