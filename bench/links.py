"""How a cloud's restart is met by many nodes: `python -m bench.links [--nodes N] [--down S S …] [--link wss|quic]`.

N edgehubs in one process, each with its own session, governor, connection and socket, TLS and all; only the bus and
the disk are not there. cloudsim, a process of its own, is killed and comes back after a while. Told are when the
nodes dialled and when they were served again, in seconds after the cloud had come back.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import runtime.libraries  # noqa: F401  (before msgspec: see there)
from bench.children import Child
from bench.rig import ready_line
from bench.stats import percentile
from modules.edgehub.config import QUIC, WEBSOCKET, EdgeHubConfig, Endpoint
from modules.edgehub.hub import EdgeHub
from modules.edgehub.link import Link, make_link
from runtime.message import Message
from runtime.names import Group

STABLE_SECONDS: Final = 10.0
"edgehub takes a link that lived so long for a good one: its back-off begins anew."
WAIT_SECONDS: Final = 240.0
BUSIEST_SECONDS: Final = 0.1
STEP_SECONDS: Final = 0.5
BAR: Final = 60


class Bus:
    """The bus that is not there; by what edgehub announces on it we know whether it is served."""

    def __init__(self, announced: Callable[[bool], None]) -> None:
        self._announced = announced

    async def retain(self, group: Group, key: str, message: Message, **_: Any) -> None:
        if group == Group("meta"):  # one of those that are told
            self._announced(message.text() == "cloud_connected")


class Node:
    """One edgehub; `dials` and `served` are moments."""

    def __init__(self, config: EdgeHubConfig, seed: int, tasks: asyncio.TaskGroup) -> None:
        self.is_served = False
        self.dials: list[float] = []
        self.served: list[float] = []
        self.hub = EdgeHub(config, chance=random.Random(seed), factory=self._make_link)
        self.hub.bus = Bus(self._announced)  # type: ignore[assignment]  # all of it that is used here
        self.hub.tasks = tasks
        self._is_started = False

    async def start(self) -> None:
        await self.hub.start()
        self._is_started = True

    def _make_link(self, config: EdgeHubConfig) -> Link:
        if self._is_started:  # before, edgehub only looks whether the protocol is known
            self.dials.append(time.monotonic())
        return make_link(config)

    def _announced(self, is_connected: bool) -> None:
        self.is_served = is_connected
        if is_connected:
            self.served.append(time.monotonic())


def node_name(number: int) -> str:
    return f"node-{number}"


def start_cloud(directory: Path, count: int, port: int = 0, link: str = WEBSOCKET) -> tuple[Child, int]:
    """cloudsim, and the port that the nodes dial."""
    ports = ("--port", str(port)) if link == WEBSOCKET else ("--port", "0", "--quic-port", str(port))
    command = [sys.executable, "-m", "cloudsim", "--dir", str(directory), *ports]
    command += [word for number in range(count) for word in ("--node", node_name(number))]
    command += ["--control-port", "0", "--node-limit", "100000", "--replacement-race", "0"]
    child = Child(command, log=directory.parent / "cloudsim.log")
    ready = ready_line(child)
    return child, int(ready["port" if link == WEBSOCKET else "quic_port"])


@asynccontextmanager
async def nodes_at(directory: Path, port: int, count: int, link: str) -> AsyncIterator[list[Node]]:
    async with asyncio.TaskGroup() as tasks:
        nodes = []
        for number in range(count):
            config = EdgeHubConfig(
                node_name=node_name(number),
                endpoints=(Endpoint("127.0.0.1", port),),
                protocol=link,
                ca_file=str(directory / "ca.crt"),
                cert_file=str(directory / f"{node_name(number)}.crt"),
                key_file=str(directory / f"{node_name(number)}.key"),
                message_qps=0,
            )
            nodes.append(Node(config, number, tasks))
        for node in nodes:
            await node.start()
            await asyncio.sleep(0.01)  # two hundred handshakes at once would be a benchmark of their own
        yield nodes
        for node in nodes:
            await node.hub.stop()


async def all_served(nodes: Iterable[Node]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not all(node.is_served for node in nodes):
            await asyncio.sleep(0.02)  # between two looks


async def measure(count: int, downs: Sequence[float], link: str) -> None:
    with tempfile.TemporaryDirectory(prefix="links") as name, ExitStack() as stack:
        directory = Path(name) / "cloud"
        directory.mkdir()
        child, port = start_cloud(directory, count, link=link)
        sim = stack.enter_context(child)
        async with nodes_at(directory, port, count, link) as nodes:
            for down in downs:
                await all_served(nodes)
                await asyncio.sleep(STABLE_SECONDS + 1.0)
                for node in nodes:
                    node.dials.clear()
                    node.served.clear()
                os.kill(sim.pid, signal.SIGKILL)
                await asyncio.sleep(down)
                child, _ = await asyncio.to_thread(start_cloud, directory, count, port, link)
                sim = stack.enter_context(child)
                back = time.monotonic()
                while not all(node.served for node in nodes):
                    await asyncio.sleep(0.02)  # between two looks
                dials = [at - back for node in nodes for at in node.dials]
                print(report(down, dials, [node.served[-1] - back for node in nodes]))


def report(down_seconds: float, dials: Sequence[float], served: Sequence[float]) -> str:
    """When they dialled and were served, in seconds after the cloud had come back. Pure."""
    late = sorted(served)
    busiest = max(Counter(int(at / BUSIEST_SECONDS) for at in dials if at >= 0).values(), default=0)
    lines = [
        f"cloud away for {down_seconds:g} s, {len(served)} nodes: {sum(at < 0 for at in dials)} dials meanwhile, "
        f"{sum(at >= 0 for at in dials)} after it; at most {busiest} in {BUSIEST_SECONDS:g} s",
        f"  served again: half after {percentile(late, 0.5):.1f} s, 90 % after {percentile(late, 0.9):.1f} s, "
        f"the last after {late[-1]:.1f} s",
    ]
    steps = Counter(int(max(at, 0.0) / STEP_SECONDS) for at in served)
    for step in range(max(steps) + 1):
        if steps[step]:
            lines.append(f"  {step * STEP_SECONDS:5.1f} s {steps[step]:4d} {'#' * min(steps[step], BAR)}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--down", type=float, nargs="+", default=[2.0, 20.0], help="how long the cloud is away")
    parser.add_argument("--link", choices=("wss", QUIC), default="wss")
    options = parser.parse_args()
    asyncio.run(measure(options.nodes, options.down, QUIC if options.link == QUIC else WEBSOCKET))
