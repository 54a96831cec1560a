"""The examples in other languages as their READMEs say to run them: each one's `.conf` under a node's supervisord."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import keys
from runtime.client import Bus
from runtime.message import Message
from tests.support.aio import run, until
from tests.support.built import BUILT, EXAMPLES, require_example
from tests.support.deadline import DEADLINE
from tests.support.mosquitto import free_port
from tests.support.node import Node, node_in

pytestmark = pytest.mark.processes

# The test stands in edgehub's place.
CONFIGURATION = """
modules:
  edgeHub: {{enable: false}}
  eventBus: {{enable: false}}
runtime:
  broker: {{heartbeatSeconds: 0.3}}
  modules:
    {name}: {{}}
    collector: {{groups: [hub]}}
"""
WITH_KEY = """
  bus: {{listen: ["{endpoint}"]}}
  policy:
    enable: true
    modules:
      {name}: {{keys: ["{key}"], to: ["@hub"]}}
"""
STOP_SECONDS = 10
"stopwaitsecs in each of the files."


def filled_in(text: str, node: Node, name: str) -> str:
    """The file with what its user fills in; the readings come more often than every 10 s."""
    text = text.replace('UPLOAD_SECONDS="10"', 'UPLOAD_SECONDS="0.1"')
    configuration = CONFIGURATION.format(name=name)
    if "BROKER_KEY" in text:
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        printed = node.edgezmq("keys", "make", name)
        assert printed.returncode == 0, printed.stderr
        [server] = re.findall(r"EDGEZMQ_CURVE_SERVER=(\S+)", printed.stdout)
        key = keys.load(node.home.curve / f"{name}.key_secret").public
        configuration += WITH_KEY.format(endpoint=endpoint, name=name, key=key)
        text = text.replace("tcp://127.0.0.1:5577", endpoint).replace('"BROKER_KEY"', f'"{server.replace("%", "%%")}"')
    node.configure(configuration)
    return text


@pytest.fixture(params=BUILT)
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Node, str]]:
    """A node that runs the example of one language, and the name of its module."""
    language = request.param
    require_example(language)
    [conf] = (EXAMPLES / language).glob("*-example.conf")
    with node_in(tmp_path) as node:
        (node.home.modules / language).symlink_to(EXAMPLES / language)  # where the file says to copy it to
        (node.home.modules / conf.name).write_text(filled_in(conf.read_text(), node, conf.stem))
        node.up()
        yield node, conf.stem


def test_its_conf_runs_it_and_it_answers_and_loses_no_reading_when_the_broker_is_killed(
    example: tuple[Node, str],
) -> None:
    node, name = example
    pid = node.wait_running(name)
    readings: list[int] = []

    async def take(message: Message) -> None:
        assert message.delivery.sender == name
        if not message.delivery.redelivered or message.json()["number"] not in readings:
            readings.append(message.json()["number"])

    async def scenario() -> None:
        endpoint = f"ipc://{node.home.bus_socket}"
        async with Bus.connect("collector", groups={"hub"}, handler=take, endpoint=endpoint) as bus:
            for content in ({"x": 2**60}, {"x": [1.5, None, "é"]}):
                await until(lambda: len(readings) >= 5, "readings")
                question = Message.build(resource="x", operation="get", content=content)
                assert (await bus.request(name, question, timeout=DEADLINE)).json() == content
                before = len(readings)
                os.kill(await asyncio.to_thread(node.wait_running, "broker"), signal.SIGKILL)
                await until(lambda before=before: len(readings) >= before + 5, "readings through the next broker")  # type: ignore[misc]
            assert (await bus.request(name, Message.build(content=1), timeout=DEADLINE)).json() == 1
            assert node.program(name).pid == pid, "it lived through it all"
            assert (await asyncio.to_thread(node.module, name))["state"] == "attached"
            await asyncio.to_thread(node.supervisor.stop, name, wait=False)
            await until(lambda: node.program(name).state == "STOPPED", "the stop")
            assert readings == list(range(1, len(readings) + 1)), "one was lost, or is out of order"

    try:
        run(scenario())
    except BaseException:
        print(node.logs())
        raise
    assert f"killing '{name}'" not in node.log("supervisord"), f"it took more than {STOP_SECONDS} s to leave"
