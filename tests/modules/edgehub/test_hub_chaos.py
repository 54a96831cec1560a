"""Random schedules over the whole hub: links cut at any moment, pongs late, owners slow and unwilling.

After each: every upload is settled and reached the cloud in order, every object reached its owner and was
acknowledged, nobody waits.
"""

import asyncio
import random

import pytest

from modules.edgehub.link import Passed, Received
from runtime.message import Message, from_cloud_json, to_cloud_json
from runtime.names import Group
from tests.modules.edgehub.fakes import FakeBus, FakeCloud, FakeDeferral, FakeLink, hand_over, running, upload
from tests.modules.edgehub.test_hub import acks, config, configmap
from tests.support.aio import run, until

META = Group("meta")
UPLOADS, OBJECTS, STEPS = 120, 25, 400


class World:
    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.cloud = FakeCloud(answers_barriers=False)
        self.read: list[int] = []  # uploads in the order the cloud took them
        self.seen = 0
        self.answered: dict[int, int] = {}  # per link: barriers answered
        self.taken: dict[int, int] = {}  # per link: payloads the cloud has read
        self.lost: set[int] = set()
        self.objects = [configmap(f"c{n}") for n in range(OBJECTS)]

    def cloud_reads(self, index: int, link: FakeLink, count: int) -> None:
        """Take `count` more frames of a link, in order."""
        at = self.taken.get(index, 0)
        for payload in link.written[at : at + count]:
            message = from_cloud_json(payload)
            if message.operation == "upload":
                self.read.append(message.json()["number"])
        self.taken[index] = min(at + count, len(link.written))

    def pong(self, index: int, link: FakeLink) -> None:
        """Answer the pings so far: everything written before them has been read."""
        self.cloud_reads(index, link, len(link.written))
        at = self.answered.get(index, 0)
        link.arrive(*(Passed(barrier) for barrier in link.barriers[at:]))
        self.answered[index] = len(link.barriers)

    def step(self, bus: FakeBus) -> None:
        chance = self.chance
        if not self.cloud.links:
            return
        index = len(self.cloud.links) - 1
        link = self.cloud.link
        match chance.randrange(12):
            case 0 if index not in self.lost:
                self.cloud_reads(index, link, chance.randrange(40))
                self.lost.add(index)
                link.lose("EOF", is_cut_by_cloud=chance.random() < 0.3)
            case 1 | 2 | 3:
                self.pong(index, link)
            case 4 | 5:
                missing = [m for m in self.objects if m.id not in acks(self.cloud)]
                if missing:
                    link.arrive(Received(to_cloud_json(chance.choice(missing[:3]))))
            case 6:
                link.arrive(Received(chance.choice([b"{", b"[]", b'{"header":1}', b'{"route":{"group":"?"}}'])))
            case 7 | 8:
                for sent in bus.sent:
                    if not sent.receipt.settled and chance.random() < 0.5:
                        sent.receipt.settle("failed" if chance.random() < 0.2 else None)
            case _:
                pass


@pytest.mark.parametrize("seed", range(12))
def test_a_random_schedule_loses_nothing_and_keeps_order(seed: int) -> None:
    async def scenario() -> None:
        world = World(seed)
        deferrals: list[FakeDeferral] = []

        async def send() -> None:
            for number in range(UPLOADS):
                deferral = await hand_over(hub, upload(number))
                assert deferral is not None
                deferrals.append(deferral)
                if world.chance.random() < 0.3:
                    await asyncio.sleep(0)

        settings = config(retry_cap_seconds=0.06, memory_messages=world.chance.choice([5, 50, 1000]))
        async with running(settings, factory=world.cloud, seed=seed) as (hub, bus):
            bus.slow.add(META)
            sending = asyncio.create_task(send())
            for step in range(STEPS):
                world.step(bus)
                await asyncio.sleep(0.001 if step % 10 == 0 else 0)  # now and then real time passes

            def finished() -> bool:
                index = len(world.cloud.links) - 1
                if index >= 0 and index not in world.lost:
                    world.pong(index, world.cloud.link)
                    for message in world.objects:
                        if message.id not in acks(world.cloud):
                            world.cloud.link.arrive(Received(to_cloud_json(message)))
                for sent in bus.sent:
                    sent.receipt.settle()
                return (
                    sending.done()
                    and all(d.outcome for d in deferrals)
                    and {m.id for m in world.objects} <= set(acks(world.cloud))
                )

            await until(finished, "everything settled")
            await sending
            assert {d.outcome for d in deferrals} == {"done"}
            assert list(dict.fromkeys(world.read)) == list(range(UPLOADS)), "all, in order of first arrival"
            owned: set[str] = {message.id for message in bus.sent_to(META)}
            assert owned == {message.id for message in world.objects}
            assert hub.counters()["downstream_held"] == 0
            assert hub.counters()["ledger_mismatch"] == 0
            assert hub.counters()["waiting_data"] == 0

    run(scenario())


def test_an_ack_never_goes_up_before_its_object_was_handled() -> None:
    async def scenario() -> None:
        world = World(99)
        async with running(config(), factory=world.cloud) as (_, bus):
            bus.slow.add(META)
            handled: set[str] = set()
            for step in range(STEPS):
                world.step(bus)
                handled |= {s.message.id for s in bus.sent if s.receipt.settled and s.receipt.refusal is None}
                assert set(acks(world.cloud)) <= handled
                await asyncio.sleep(0.001 if step % 10 == 0 else 0)  # now and then real time passes
            assert handled

    run(scenario())


def test_the_fake_cloud_speaks_as_the_real_one() -> None:
    message = Message.build(source="s", group="g", resource="r", operation="o", content={"a": 1})
    assert from_cloud_json(to_cloud_json(message)) == message
