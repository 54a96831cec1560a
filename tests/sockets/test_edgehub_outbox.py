"""The durable outbox as a process sees it: offline, killed, with a full backlog, and with the link up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cloudsim import CloudSim
from runtime.client import Bus
from runtime.config import EdgeHubExtras, EdgeHubSection, NodeConfig, RuntimeSection, WebsocketSection, store
from runtime.home import find_home
from runtime.message import Message
from runtime.names import Group
from tests.modules.edgehub.fakes import upload
from tests.modules.edgehub.simulated import NODE, cloud
from tests.sockets.test_edgehub_process import Processes, processes, write_config
from tests.support.aio import run, until

__all__ = ["processes"]

pytestmark = pytest.mark.processes


@asynccontextmanager
async def node(tmp_path: Path, processes: Processes) -> AsyncIterator[tuple[CloudSim, Bus]]:
    """Broker, edgehub and cloudsim; edgehub dials again at least once a second."""
    async with cloud(tmp_path / "cloud") as sim:
        home = find_home()
        home.prepare()
        pair = sim.certificate(NODE)
        hub = EdgeHubSection(
            message_qps=0,
            tls_ca_file=str(sim.ca.certificate),
            tls_cert_file=str(pair.certificate),
            tls_private_key_file=str(pair.key),
            websocket=WebsocketSection(server=f"127.0.0.1:{sim.port}"),
        )
        extras = RuntimeSection(edgehub=EdgeHubExtras(retry_cap_seconds=1.0))
        store(NodeConfig(node_name=NODE, edge_hub=hub, runtime=extras), home)
        processes.start("runtime.broker")
        processes.start("modules.edgehub")
        async with Bus.connect("tester") as bus:
            await sim.wait_served(NODE)
            yield sim, bus


async def link_status(bus: Bus) -> dict[str, object]:
    question = Message.build(group="edgezmq", resource="edgehub/link", operation="status")
    answer: dict[str, object] = (await bus.request("edgehub", question, timeout=10)).json()
    return answer


def arrived(sim: CloudSim) -> list[int]:
    return [received.content["number"] for received in sim.uploads(NODE)]


def test_offline_uploads_are_accepted_survive_a_kill_and_arrive_in_order(tmp_path: Path, processes: Processes) -> None:
    async def scenario() -> None:
        async with node(tmp_path, processes) as (sim, bus):
            for number in range(100):
                await (await bus.send(Group("hub"), upload(number)))
            await sim.inject("refuse")
            await sim.inject("drop", NODE)
            await sim.wait_for(lambda: not sim.is_served(NODE))
            receipts = [await bus.send(Group("hub"), upload(number)) for number in range(100, 3000)]
            async with asyncio.timeout(5):  # not as long as a message may wait for its turn on a link that works
                for receipt in receipts:
                    await receipt  # accepted although there is no cloud: it is on disk
            status = await link_status(bus)
            assert status["stored"] == 2900
            for _ in range(2):
                processes.kill("modules.edgehub")
                processes.start("modules.edgehub")
                assert (await link_status(bus))["stored"] == 2900
            await (await bus.send(Group("hub"), upload(3000)))
            await sim.inject("clear")
            await sim.wait_for(lambda: len(set(arrived(sim))) == 3001)
            assert list(dict.fromkeys(arrived(sim))) == list(range(3001)), "in order of first arrival"
            async with asyncio.timeout(5):
                while (await link_status(bus))["stored"]:
                    await asyncio.sleep(0.02)  # until the last pong has come

    run(scenario())


def test_with_the_link_up_nothing_is_written_to_disk(tmp_path: Path, processes: Processes) -> None:
    async def scenario() -> None:
        async with node(tmp_path, processes) as (_, bus):
            await (await bus.send(Group("hub"), upload(0)))
            await asyncio.sleep(0.5)  # what the start itself writes is over
            before = written_bytes(processes.running["modules.edgehub"].pid)
            receipts = [await bus.send(Group("hub"), upload(number)) for number in range(10_000)]
            for receipt in receipts:
                await receipt
            # A line of log may be written; ten thousand uploads of 100 B would be a megabyte.
            assert written_bytes(processes.running["modules.edgehub"].pid) - before < 16_384

    run(scenario())


def test_a_stop_without_a_link_leaves_what_was_accepted_in_the_file(tmp_path: Path, processes: Processes) -> None:
    async def scenario() -> None:
        async with node(tmp_path, processes) as (sim, bus):
            await sim.inject("half-open", NODE)
            receipts = [await bus.send(Group("hub"), upload(number)) for number in range(500)]
            while sum(map(int, (await held(bus)))) < 500:
                await asyncio.sleep(0.01)  # until edgehub has them all in hand
            assert await asyncio.to_thread(processes.stop, "modules.edgehub") == 0
            for receipt in receipts:
                await receipt
            assert (find_home().data / "outbox.db").stat().st_mode & 0o777 == 0o600
            await sim.inject("clear")
            processes.start("modules.edgehub")
            await sim.wait_for(lambda: len(set(arrived(sim))) == 500)

    run(scenario())


def test_an_outbox_that_cannot_be_opened_is_waited_for(tmp_path: Path, processes: Processes) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim:
            write_config(sim)
            obstacle = find_home().data / "outbox.db"
            obstacle.mkdir()
            processes.start("runtime.broker")
            for is_stopped in (True, False):
                processes.start("modules.edgehub")
                said = len(processes.said("modules.edgehub"))
                await until(lambda said=said: "cannot be opened" in processes.said("modules.edgehub")[said:], "a word")
                if is_stopped:
                    assert await asyncio.to_thread(processes.stop, "modules.edgehub") == 0
            obstacle.rmdir()
            await sim.wait_served(NODE)
            async with Bus.connect("tester") as bus:
                await (await bus.send(Group("hub"), upload(1)))
            await sim.wait_for(lambda: arrived(sim) == [1])

    run(scenario())


async def held(bus: Bus) -> list[str]:
    status = await link_status(bus)
    return [str(status[what]) for what in ("unconfirmed", "waiting")]


def written_bytes(pid: int) -> int:
    """Bytes the process has had written to storage (proc(5), io)."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("write_bytes:"):
            return int(line.split()[1])
    raise AssertionError("no write_bytes in /proc/PID/io")
