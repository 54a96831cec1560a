"""The edgehub process between a real broker and cloudsim: end to end, and through SIGKILL."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cloudsim import CloudSim
from runtime.client import Bus
from runtime.config import EdgeHubSection, NodeConfig, WebsocketSection, store
from runtime.errors import Refused
from runtime.home import find_home
from runtime.message import Message
from runtime.names import Group
from tests.modules.edgehub.fakes import upload
from tests.modules.edgehub.simulated import NODE, cloud, command
from tests.support.aio import run, until

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


class Processes:
    """Processes of ours by name; all ended at the end, whatever happened."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, module: str) -> None:
        environment = os.environ | {"EDGEZMQ_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        log = (self.home / f"{module}.out").open("ab")
        with log:
            self.running[module] = subprocess.Popen(
                [sys.executable, "-m", module], cwd=self.home, env=environment, stdout=log, stderr=log
            )

    def kill(self, module: str) -> None:
        process = self.running.pop(module)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self, module: str) -> int:
        process = self.running.pop(module)
        process.terminate()
        return process.wait(timeout=20)

    def said(self, module: str) -> str:
        return (self.home / f"{module}.out").read_text()


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("EDGEZMQ_HOME", str(home))
    made = Processes(home)
    yield made
    for module in list(made.running):
        made.kill(module)


def write_config(sim: CloudSim) -> None:
    pair = sim.certificate(NODE)
    home = find_home()
    home.prepare()
    hub = EdgeHubSection(
        message_qps=0,
        tls_ca_file=str(sim.ca.certificate),
        tls_cert_file=str(pair.certificate),
        tls_private_key_file=str(pair.key),
        websocket=WebsocketSection(server=f"127.0.0.1:{sim.port}"),
    )
    store(NodeConfig(node_name=NODE, edge_hub=hub), home)


@asynccontextmanager
async def node(tmp_path: Path, processes: Processes) -> AsyncIterator[tuple[CloudSim, Bus]]:
    async with cloud(tmp_path / "cloud") as sim:
        write_config(sim)
        processes.start("runtime.broker")
        processes.start("modules.edgehub")
        async with Bus.connect("tester") as bus:
            await sim.wait_served(NODE)
            yield sim, bus


def test_an_upload_crosses_the_bus_and_its_receipt_means_that_the_cloud_has_it(
    tmp_path: Path, processes: Processes
) -> None:
    async def scenario() -> None:
        async with node(tmp_path, processes) as (sim, bus):
            receipts = [await bus.send(Group("hub"), upload(number)) for number in range(3000)]
            for receipt in receipts:
                await receipt
            assert [r.content["number"] for r in sim.uploads(NODE)] == list(range(3000))
            with pytest.raises(Refused, match="invalid"):
                await (await bus.send(Group("hub"), Message(id="m", content=b"{not json")))

    run(scenario())


def test_a_question_crosses_the_bus_and_comes_back_with_the_clouds_answer(tmp_path: Path, processes: Processes) -> None:
    async def scenario() -> None:
        async with node(tmp_path, processes) as (_, bus):
            question = Message.build(source="edged", group="meta", resource="k8s/ca.crt", operation="query")
            answer = await bus.request(Group("hub"), question, timeout=10)
            assert answer.text().startswith("-----BEGIN CERTIFICATE-----")
            status = Message.build(group="edgezmq", resource="edgehub/link", operation="status")
            assert (await bus.request("edgehub", status, timeout=10)).json()["state"] == "served"

    run(scenario())


def test_a_command_crosses_to_eventbus_and_the_connection_state_to_group_bus(
    tmp_path: Path, processes: Processes
) -> None:
    async def scenario() -> None:
        got: list[Message] = []

        async def handle(message: Message) -> None:
            got.append(message)

        async with (
            node(tmp_path, processes) as (sim, _),
            Bus.connect("eventbus", groups=["bus"], handler=handle),
        ):
            for number in range(100):
                sim.send(NODE, command(number))

            def states() -> list[str]:
                return [m.text() for m in got if m.resource == "node/connection"]

            # Commands and the state go different ways: either may be first.
            await until(lambda: len(got) >= 101 and states()[-1:] == ["cloud_connected"], "the commands and the state")
            numbers = [m.json()["number"] for m in got if m.operation == "publish"]
            assert numbers == list(range(100))

    run(scenario())


def test_edgehub_is_killed_under_load_and_no_upload_is_lost(tmp_path: Path, processes: Processes) -> None:
    async def scenario() -> None:
        async with node(tmp_path, processes) as (sim, bus):
            receipts = []
            for number in range(6000):
                receipts.append(await bus.send(Group("hub"), upload(number)))
                if number in (1500, 3000, 4500):
                    processes.kill("modules.edgehub")
                    processes.start("modules.edgehub")
            for receipt in receipts:
                await receipt
            received = [r.content["number"] for r in sim.uploads(NODE)]
            assert list(dict.fromkeys(received)) == list(range(6000)), "every upload, in order of first arrival"

    run(scenario())


@pytest.mark.alone
def test_a_killed_edgehub_is_served_again_within_two_seconds_of_its_start(tmp_path: Path, processes: Processes) -> None:
    async def scenario() -> None:
        async with node(tmp_path, processes) as (sim, bus):
            processes.kill("modules.edgehub")
            await sim.wait_for(lambda: not sim.is_served(NODE))
            begun = time.monotonic()
            processes.start("modules.edgehub")
            await (await bus.send(Group("hub"), upload(1)))
            assert sim.is_served(NODE)
            print(f"killed to served: {time.monotonic() - begun:.2f} s")

    run(scenario())


def test_sigterm_says_goodbye_and_exits_with_0(tmp_path: Path, processes: Processes) -> None:
    async def scenario() -> None:
        async with node(tmp_path, processes) as (sim, bus):
            receipts = [await bus.send(Group("hub"), upload(number)) for number in range(500)]
            assert await asyncio.to_thread(processes.stop, "modules.edgehub") == 0
            await sim.wait_for(lambda: not sim.is_served(NODE))
            processes.start("modules.edgehub")
            for receipt in receipts:
                await receipt  # in the cloud, or in the outbox of the one or the other process
            await sim.wait_for(lambda: len({r.content["number"] for r in sim.uploads(NODE)}) == 500)
            received = [r.content["number"] for r in sim.uploads(NODE)]
            assert list(dict.fromkeys(received)) == list(range(500))

    run(scenario())


def test_a_wrong_setting_ends_the_process_with_one_line(tmp_path: Path, processes: Processes) -> None:
    home = find_home()
    home.prepare()
    store(NodeConfig(node_name=NODE, edge_hub=EdgeHubSection(websocket=WebsocketSection(server="no port here"))), home)
    processes.start("modules.edgehub")
    assert processes.running.pop("modules.edgehub").wait(timeout=20) == 2
    assert "modules.edgeHub.websocket.server: got 'no port here'" in processes.said("modules.edgehub")
    assert "Traceback" not in processes.said("modules.edgehub")
