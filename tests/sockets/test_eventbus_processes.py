"""The eventbus process on a real bus: killed, and the bus's broker killed, with messages on the way."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modules.eventbus.broker import candidates, find_python
from modules.eventbus.bus import EventBus
from modules.eventbus.config import EventBusConfig
from runtime.client import Bus
from runtime.config import EventBusExtras, EventBusSection, NodeConfig, RuntimeSection, store
from runtime.home import Home
from runtime.message import Message
from tests.modules.eventbus.fakes import FakeBus, hosted, killed
from tests.sockets.test_eventbus_mosquitto import device
from tests.support.aio import run, until
from tests.support.mosquitto import Mosquitto, free_port

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


class Process:
    """`python -m MODULE` on one home, which can be killed and started again."""

    def __init__(self, module: str, home: Home) -> None:
        self._command = [sys.executable, "-m", module]
        self._environment = {**os.environ, "EDGEZMQ_HOME": str(home.path)}
        self._environment.pop("EDGEZMQ_BUS", None)
        self._log = home.log / f"{module}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(20)


@contextmanager
def started(module: str, home: Home) -> Iterator[Process]:
    process = Process(module, home)
    process.start()
    try:
        yield process
    finally:
        process.kill()


@pytest.mark.mosquitto
def test_nothing_is_lost_when_eventbus_and_the_bus_are_killed_under_load(tmp_path: Path) -> None:
    home = Home(tmp_path / "home").prepare()
    total = 4000

    async def scenario(mosquitto: Mosquitto, broker: Process, eventbus: Process) -> None:
        arrived: list[int] = []

        async def handler(message: Message) -> None:
            arrived.append(int(message.content))
            await asyncio.sleep(0)

        endpoint = f"ipc://{home.bus_socket}"
        async with Bus.connect("edgehub", groups={"hub"}, handler=handler, endpoint=endpoint) as bus:
            first = await bus.request("eventbus", command("c/first", "x"), timeout=15)
            assert first.text() == "OK"
            with device(mosquitto, "c/#") as sensor:
                for number in range(total):
                    sensor.publish("default/user/x", str(number))
                    if number % 1000 == 500:
                        await until(lambda number=number: len(arrived) > number - 400)
                    if number == 1500:
                        eventbus.kill()
                        eventbus.start()
                    if number == 2500:
                        broker.kill()
                        broker.start()
                await until(lambda: sensor.acknowledged == total)
                await until(lambda: len(set(arrived)) == total, "every message")
                receipt = await bus.send("eventbus", command("c/last", "done"))
                await receipt
                await until(lambda: ("c/last", b"done") in sensor.received)
        assert eventbus.terminate() == 0

    with Mosquitto(tmp_path / "m") as mosquitto:
        section = EventBusSection(mqtt_server_external=mosquitto.url)
        store(NodeConfig(node_name="n1", event_bus=section), home)
        with started("runtime.broker", home) as broker, started("modules.eventbus", home) as eventbus:
            run(scenario(mosquitto, broker, eventbus))


def command(topic: str, payload: str) -> Message:
    return Message.build(source="router_eventbus", group="user", resource=topic, operation="publish", content=payload)


def test_the_built_in_broker_keeps_what_is_not_acknowledged_beyond_amqtts_5_seconds(tmp_path: Path) -> None:
    python = find_python(candidates(EventBusConfig()))
    if python is None:
        pytest.skip("amqtt is not installed (requirements-amqtt.txt)")
    home = Home(tmp_path / "home").prepare()
    url = f"tcp://127.0.0.1:{free_port()}"
    section = EventBusSection(mqtt_mode=0, mqtt_server_internal=url)
    own = RuntimeSection(eventbus=EventBusExtras(broker_python=python))
    store(NodeConfig(node_name="n1", event_bus=section, runtime=own), home)
    config = EventBusConfig(node_name="n1", mode=0, server_internal=url)

    async def scenario() -> None:
        bus = FakeBus()
        bus.is_holding = True
        async with killed(EventBus(config, tmp_path), bus) as host:
            await until(lambda: host.count("mqtt_connected") and not host.count("subscriptions_missing"))
            with device(FakeServer(int(url.rpartition(":")[2]))) as sensor:
                for number in range(50):
                    sensor.publish("default/user/x", str(number))
                await until(lambda: len(bus.held) == 50)
                await asyncio.sleep(5.5)  # amqtt alone would have dropped them by now
                bus.release(10)
                await asyncio.sleep(0.1)
        async with hosted(EventBus(config, tmp_path)) as host:
            await until(lambda: {*bus.payloads, *host.bus.payloads} == {b"%d" % n for n in range(50)})

    with started("modules.eventbus.broker", home):
        run(scenario())


class FakeServer:
    """Stands where `device` wants a Mosquitto: it asks only for the port."""

    def __init__(self, port: int) -> None:
        self.port = port
