"""edgehub against cloudsim under random faults on real sockets: nothing lost, order kept, no one waits in the end."""

import asyncio
import random
from pathlib import Path

import pytest

from cloudsim import CloudSim
from modules.edgehub.hub import EdgeHub
from runtime.names import Group
from tests.modules.edgehub.fakes import FakeBus, FakeDeferral, hand_over, upload
from tests.modules.edgehub.simulated import NODE, cloud, command, config_map, served, state
from tests.support.aio import run, until

FAULTS = 8


async def afflict(sim: CloudSim, chance: random.Random) -> None:
    match chance.randrange(9):
        case 0:
            await sim.inject("drop", NODE)
        case 1:
            await sim.inject("half-open", NODE)
        case 2:
            await sim.inject("stall", NODE, seconds=0.2)
        case 3:
            await sim.inject("close-mid-frame", NODE)
            sim.send(NODE, command(-1))
        case 4:
            await sim.inject("drop-at", NODE, count=chance.randrange(1, 60), dispatched=chance.random() < 0.5)
        case 5:
            await sim.inject("restart", seconds=0.1)
        case 6:
            await sim.inject("slow-pong", NODE, seconds=0.1)
        case 7:
            await sim.inject("delay", NODE, seconds=0.05)
        case _:
            await sim.inject("reject", NODE, count=1)
            sim.kick(NODE)


async def keep_sending(hub: EdgeHub, deferrals: list[FakeDeferral], enough: asyncio.Event) -> None:
    while not enough.is_set():
        for _ in range(20):
            deferral = await hand_over(hub, upload(len(deferrals), pad="x" * 300))
            assert deferral is not None
            deferrals.append(deferral)
        await asyncio.sleep(0.01)


async def keep_ordering(sim: CloudSim, bus: FakeBus, enough: asyncio.Event) -> None:
    number = 0
    while not enough.is_set():
        number += 1
        sim.send(NODE, command(number))
        sim.send(NODE, config_map(f"c{number % 5}", number))
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_lose_nothing(seed: int, tmp_path: Path) -> None:
    async def scenario() -> None:
        chance = random.Random(seed)
        deferrals: list[FakeDeferral] = []
        enough = asyncio.Event()
        async with (
            cloud(tmp_path, replacement_race=0.2, seed=seed) as sim,
            served(sim, silence_seconds=0.3, greeting_seconds=0.3, handshake_seconds=1.0, retry_cap_seconds=0.2) as (
                hub,
                bus,
            ),
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(keep_sending(hub, deferrals, enough))
            tasks.create_task(keep_ordering(sim, bus, enough))
            for _ in range(FAULTS):
                await asyncio.sleep(chance.random() * 0.3)
                await afflict(sim, chance)
            await sim.inject("clear")
            await asyncio.sleep(0.2)
            enough.set()
            await until(lambda: state(hub) == "served", "a served link in the end")
            await until(lambda: all(d.outcome for d in deferrals), "every upload settled")
            assert {d.outcome for d in deferrals} == {"done"}
            numbers = [received.content["number"] for received in sim.uploads(NODE)]
            assert list(dict.fromkeys(numbers)) == list(range(len(deferrals))), "all, in order of first arrival"
            orders = [m.json()["number"] for m in bus.sent_to("eventbus")]
            real = [number for number in orders if number > 0]
            assert real == sorted(set(real)), "commands may be lost with a link, never repeated or reordered"
            sim.send(NODE, config_map("last", 10_000_000))
            await until(
                lambda: any(m.resource == "default/configmap/last" for m in bus.sent_to(Group("meta"))),
                "the last object",
            )

    run(scenario())
