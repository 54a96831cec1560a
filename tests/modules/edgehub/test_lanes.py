import asyncio
from typing import Any

import pytest

from modules.edgehub.lanes import Lanes
from runtime.emp import Priority
from runtime.errors import Congested, InvalidMessage, MessageTooLarge, Refused
from runtime.message import Message
from runtime.names import Group
from tests.modules.edgehub.fakes import FakeBus, FakeReceipt
from tests.support.aio import run, until


class Ledger:
    def __init__(self) -> None:
        self.settled: list[tuple[str, str | None]] = []

    def __call__(self, message: Message, refusal: str | None) -> None:
        self.settled.append((message.id, refusal))


async def with_lanes(bus: FakeBus, body: Any, **limits: int) -> Ledger:
    ledger = Ledger()
    async with asyncio.TaskGroup() as tasks:
        lanes = Lanes(bus, tasks, ledger, **{"max_messages": 10, "max_bytes": 1000} | limits)
        await body(lanes)
        lanes.stop()
    return ledger


def test_a_destination_gets_its_messages_in_order() -> None:
    async def scenario() -> None:
        bus = FakeBus()

        async def body(lanes: Lanes) -> None:
            for i in range(50):
                lanes.put("eventbus", Message(id=str(i)), 1)
            await until(lambda: lanes.held_messages == 0, "all settled")

        ledger = await with_lanes(bus, body)
        assert ledger.settled == [(str(i), None) for i in range(50)]
        assert {sent.priority for sent in bus.sent} == {Priority.DATA}

    run(scenario())


def test_a_slow_destination_does_not_hold_up_another() -> None:
    async def scenario() -> None:
        class Stuck(FakeBus):
            async def send(self, to: str, message: Message, **facts: Any) -> FakeReceipt:
                if to == Group("meta"):
                    await asyncio.Event().wait()
                return await super().send(to, message, **facts)

        bus = Stuck()

        async def body(lanes: Lanes) -> None:
            lanes.put(Group("meta"), Message(id="stuck"), 1)
            lanes.put(Group("twin"), Message(id="passes"), 1)
            await until(lambda: lanes.held_messages == 1, "the other")

        assert (await with_lanes(bus, body)).settled == [("passes", None)]
        assert bus.sent[0].priority == Priority.SIGNAL

    run(scenario())


def test_it_is_full_in_messages_or_bytes_until_something_is_settled() -> None:
    async def scenario() -> None:
        bus = FakeBus()
        bus.slow.add("eventbus")

        async def body(lanes: Lanes) -> None:
            lanes.put("eventbus", Message(id="a"), 10)
            assert not lanes.is_full
            lanes.put("eventbus", Message(id="b"), 990)
            assert lanes.is_full
            waiting = asyncio.create_task(lanes.wait_room())
            await until(lambda: len(bus.sent) == 2, "both sent")
            assert not waiting.done()
            bus.sent[1].receipt.settle()
            await waiting
            assert (lanes.held_messages, lanes.held_bytes) == (1, 10)
            for i in range(9):
                lanes.put("eventbus", Message(id=str(i)), 0)
            assert lanes.is_full

        await with_lanes(bus, body)

    run(scenario())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (MessageTooLarge(20, 10), "too-large"),
        (InvalidMessage("no"), "invalid"),
        (Refused("unroutable"), "unroutable"),
        (Congested("full"), "failed"),
    ],
)
def test_what_the_bus_does_not_take_is_settled_as_refused(fault: Exception, reason: str) -> None:
    async def scenario() -> None:
        class Unwilling(FakeBus):
            async def send(self, to: str, message: Message, **facts: Any) -> FakeReceipt:
                raise fault

        async def body(lanes: Lanes) -> None:
            lanes.put("eventbus", Message(id="m"), 5)
            await until(lambda: lanes.held_messages == 0, "the refusal")

        assert (await with_lanes(Unwilling(), body)).settled == [("m", reason)]

    run(scenario())


def test_a_refused_receipt_is_told() -> None:
    async def scenario() -> None:
        bus = FakeBus()
        bus.refusing["eventbus"] = "gone"

        async def body(lanes: Lanes) -> None:
            lanes.put("eventbus", Message(id="m"), 5)
            await until(lambda: lanes.held_messages == 0, "the refusal")

        assert (await with_lanes(bus, body)).settled == [("m", "gone")]

    run(scenario())
