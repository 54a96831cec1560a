"""Parking with real processes: objects without an owner are acknowledged, survive a kill, and wait for their module."""

import asyncio
from pathlib import Path

import pytest

from runtime.client import Bus
from runtime.message import Message
from tests.modules.edgehub.simulated import NODE, config_map
from tests.sockets.test_edgehub_outbox import link_status, node
from tests.sockets.test_edgehub_process import Processes, processes
from tests.support.aio import run

__all__ = ["processes"]

pytestmark = pytest.mark.processes

OBJECTS = 20


def test_objects_wait_for_their_module_over_a_kill_and_come_in_order(tmp_path: Path, processes: Processes) -> None:
    got: list[Message] = []

    async def handle(message: Message) -> None:
        if message.operation != "connect":
            got.append(message)

    async def scenario() -> None:
        async with node(tmp_path, processes) as (sim, bus):
            sent = [config_map(f"c{number}", number + 1, number=str(number)) for number in range(OBJECTS)]
            for message in sent:
                sim.send(NODE, message)
            await sim.wait_for(lambda: sim.recorder.counts()["happened"].get("acknowledged", 0) == OBJECTS)
            assert (await link_status(bus))["parked"] == {"@meta": OBJECTS}
            processes.kill("modules.edgehub")
            processes.start("modules.edgehub")
            assert (await link_status(bus))["parked"] == {"@meta": OBJECTS}
            async with Bus.connect("metamanager", groups=("meta",), handler=handle):
                async with asyncio.timeout(10):
                    while (await link_status(bus))["parked"]:
                        await asyncio.sleep(0.02)  # until the last one is handled
            assert [message.id for message in got] == [message.header.msg_id for message in sent]
            assert [message.json()["data"]["number"] for message in got] == [str(n) for n in range(OBJECTS)]

    run(scenario())
