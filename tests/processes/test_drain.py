"""Modules restarted under traffic by `edgezmq restart`: what is in hand is finished, nothing is lost or done twice."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from runtime.client import Bus, Receipt
from runtime.emp import Priority
from runtime.message import Message
from tests.support.aio import run, until
from tests.support.node import Node, node_in

pytestmark = pytest.mark.processes

CONFIGURATION = """
modules:
  edged: {hostnameOverride: edge-1}
  edgeHub: {enable: false}
  eventBus: {enable: false}
runtime:
  modules: {sink: {}, echo: {}}
  metrics: {enable: false}
"""

# Writes down each message when it is done with it, a line in one write: what is there was handled to its end.
SINK = """
import asyncio, os, pathlib
from runtime.module import Module, run

class Sink(Module):
    name = "sink"

    async def start(self):
        self.file = os.open(pathlib.Path(__file__).with_suffix(".handled"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def handle(self, message):
        text = message.text()
        if text.startswith("slow"):
            os.write(self.file, f"began {text}\\n".encode())
            await asyncio.sleep(1.5)
        else:
            await asyncio.sleep(0.001)
        os.write(self.file, f"{text}\\n".encode())

run(Sink)
"""

ECHO = """
from runtime.module import Module, run

class Echo(Module):
    name = "echo"

    async def handle(self, message):
        await self.bus.respond(message, message.response(message.text()))

run(Echo)
"""

RESTARTS = 3

LONGEST_GAP_SECONDS = 1.0
"For a pair that has nothing to do with it, on a busy machine; a restart takes some tenths of a second."


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with node_in(tmp_path_factory.mktemp("node")) as node:
        node.configure(CONFIGURATION)
        node.add_module("sink", SINK)
        node.add_module("echo", ECHO)
        node.up()
        for name in ("sink", "echo"):
            node.wait_running(name)
        yield node


def handled(node: Node) -> list[str]:
    file = node.home.data / "sink.handled"
    return file.read_text().splitlines() if file.exists() else []


def text_message(text: str) -> Message:
    return Message.build(source="test", group="test", resource="r", operation="upload", content=text)


async def restart(node: Node, name: str) -> None:
    pid = node.program(name).pid
    done = await asyncio.to_thread(node.edgezmq, "restart", name)
    assert done.returncode == 0, done.stderr
    assert node.program(name).pid not in (0, pid)
    assert "killing" not in node.log("supervisord")


def test_a_module_restarted_three_times_under_traffic_loses_nothing_and_does_nothing_twice(node: Node) -> None:
    async def scenario() -> None:
        receipts: dict[str, Receipt] = {}
        gaps: list[float] = []
        stopping = False

        async def pour(bus: Bus) -> None:
            number = 0
            while not stopping:
                for _ in range(5):
                    number += 1
                    receipts[f"n{number}"] = await bus.send("sink", text_message(f"n{number}"))
                await asyncio.sleep(0.005)  # the rate: about 800 messages a second

        async def ask(bus: Bus) -> None:
            while not stopping:
                began = time.monotonic()
                reply = await bus.request("echo", text_message("x"), timeout=10.0)
                assert reply.text() == "x"
                gaps.append(time.monotonic() - began)
                await asyncio.sleep(0.005)

        async with Bus.connect("pourer", endpoint=f"ipc://{node.home.bus_socket}") as bus:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(pour(bus))
                tasks.create_task(ask(bus))
                await until(lambda: len(handled(node)) > 100, "traffic")
                for _ in range(RESTARTS):
                    before = len(handled(node))
                    await restart(node, "sink")
                    await until(lambda before=before: len(handled(node)) > before + 200, "traffic again")  # type: ignore[misc]
                stopping = True
            for receipt in receipts.values():
                await receipt  # raises Refused unless it was delivered
        counts = Counter(handled(node))
        assert counts.keys() == receipts.keys()
        assert {name: count for name, count in counts.items() if count != 1} == {}
        assert max(gaps) < LONGEST_GAP_SECONDS

    run(scenario())


def test_what_is_in_hand_is_finished_before_the_module_ends(node: Node) -> None:
    async def scenario() -> None:
        async with Bus.connect("pourer", endpoint=f"ipc://{node.home.bus_socket}") as bus:
            receipt = await bus.send("sink", text_message("slow one"))
            signal = await bus.send("sink", text_message("slow two"), priority=Priority.SIGNAL)
            await until(lambda: {"began slow one", "began slow two"} <= set(handled(node)), "both handlers to begin")
            await restart(node, "sink")
            await receipt
            await signal
        lines = handled(node)
        for text in ("slow one", "slow two"):
            assert (lines.count(f"began {text}"), lines.count(text)) == (1, 1)

    run(scenario())
