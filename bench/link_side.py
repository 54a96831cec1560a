"""edgehub's end of the cloud link alone: its outbox, connection and transport, without a bus and without a disk.

What this reaches is the most that the node can reach; what the node reaches less, the bus and the module take.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import runtime.libraries  # noqa: F401  (before msgspec: see there)
from bench.payload import reading
from bench.worker import Arguments, Gate
from modules.edgehub import cloud
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.connection import Connection, Settles
from modules.edgehub.governor import Pace, Ramp
from modules.edgehub.lanes import Lanes
from modules.edgehub.link import make_encoder, make_link
from modules.edgehub.outbox import Class, Outbox, OutboxLimits, Poisoned
from modules.edgehub.session import Action, DialDue, Greet, Keepalive, LinkSession, LinkState, Proven
from modules.edgehub.window import TokenBucket
from runtime.backoff import Backoff
from runtime.message import Message, from_cloud_json

WAIT_SECONDS = 120.0
WARM_UP = 2_000
"Not counted: the byte window finds its size."
TOGETHER = 128
"Messages put in one turn of the loop: what the bus delivers at once."


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Who waits until so many messages are through."""

    count: int
    done: asyncio.Future[None]


class _Host:
    """What `EdgeHub` is to a connection, without all that a node needs beside it."""

    def __init__(self, arguments: Arguments) -> None:
        self.config = config = EdgeHubConfig(
            node_name=arguments["node"],
            endpoints=(Endpoint("127.0.0.1", arguments["port"]),),
            protocol=arguments["protocol"],
            ca_file=arguments["ca"],
            cert_file=arguments["certificate"],
            key_file=arguments["key"],
            message_qps=0,
            **arguments.get("settings", {}),
        )
        self._loop = asyncio.get_running_loop()
        self._encode = make_encoder(config)
        chance = random.Random()
        self._outbox: Outbox[Settles] = Outbox(OutboxLimits(config.memory_messages, config.memory_bytes))
        self._session = LinkSession(
            config.endpoints,
            Backoff(chance, cap_seconds=config.retry_cap_seconds),
            heartbeat_seconds=config.heartbeat_seconds,
            greeting_seconds=config.greeting_seconds,
            stable_seconds=config.stable_seconds,
            unproven_redial_seconds=config.unproven_redial_seconds,
            failback_seconds=config.failback_seconds,
            now=self._loop.time(),
        )
        self._pace = Pace(TokenBucket(0, 0), TokenBucket(0, 0), Ramp(chance, start_rate=1.0, seconds=0.0))
        self._served = asyncio.Event()
        self._room = asyncio.Event()
        self._confirmed = 0
        self._received = 0
        self._up: _Waiting | None = None
        self._down: _Waiting | None = None

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """One connection, until it is lost."""
        lanes = Lanes(_Nobody(), tasks, lambda *_: None, max_messages=1, max_bytes=1)
        link = make_link(self.config)
        self._connection = Connection(self.config, link, self, self._session, self._outbox, self._pace, lanes)
        self._session.start()
        self._session.receive(DialDue(), now=self._loop.time())
        await self._connection.run(self.config.endpoints[0])
        raise ConnectionError(f"the link is gone: {self._session.why}")

    async def served(self) -> None:
        await self._served.wait()

    async def upload(self, count: int) -> None:
        """Returns when the cloud has all of them."""
        outbox, encode, loop = self._outbox, self._encode, self._loop
        up = self._up = _Waiting(self._confirmed + count, loop.create_future())
        for number in range(count):
            payload = encode(Message.upload("default/bench/1", reading(number), source="bench"))
            while not outbox.has_room(Class.DATA, len(payload)):
                self._room.clear()
                await self._room.wait()
            outbox.put(payload, self, Class.DATA, sender="bench", now=loop.time())
            if number % TOGETHER == TOGETHER - 1:
                self._connection.wake()
                await asyncio.sleep(0)
        self._connection.wake()
        await up.done

    async def receive_all(self, count: int) -> None:
        """Returns when so many messages of group `user` have come from the cloud."""
        down = self._down = _Waiting(self._received + count, self._loop.create_future())
        await down.done

    # --- connection.Settles ----------------------------------------------------------------------

    def done(self) -> None:
        self._confirmed += 1
        if self._up is not None and self._confirmed == self._up.count:
            self._up.done.set_result(None)

    def refuse(self, reason: str) -> None:
        raise AssertionError(f"an upload was refused: {reason}")

    # --- connection.Host -------------------------------------------------------------------------

    def perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Greet):
                self._connection.send([cloud.keepalive(), cloud.greeting()])
            elif isinstance(action, Keepalive):
                self._connection.send([cloud.keepalive()])

    def receive(self, payload: bytes) -> None:
        self.take(from_cloud_json(payload), len(payload))

    def take(self, message: Message, size_bytes: int) -> None:
        if self._session.state is LinkState.GREETING and cloud.proves_session(message):
            self.perform(self._session.receive(Proven(), now=self._loop.time()))
            self._connection.wake()
            self._served.set()
        if message.group == cloud.GROUP_USER:
            self._received += 1
            if self._down is not None and self._received == self._down.count:
                self._down.done.set_result(None)

    def skipped(self, size_bytes: int) -> None:
        raise AssertionError(f"a message of {size_bytes} bytes was skipped")

    def confirmed(self, count: int) -> None:
        self._room.set()

    def given_up(self, poisoned: Poisoned[Settles]) -> None:
        raise AssertionError("a message was given up")

    def load(self) -> None:
        pass


class _Nobody:
    """The bus that is not there: nothing is handed to it."""

    async def send(self, to: str, message: Message, *, priority: Any) -> Any:
        raise AssertionError(to)


def sender(arguments: Arguments, gate: Gate) -> None:
    """Uploads; each is settled once the cloud has confirmed it."""
    asyncio.run(_upload(arguments, gate))


def receiver(arguments: Arguments, gate: Gate) -> None:
    """Takes what the cloud sends to this node."""
    asyncio.run(_receive(arguments, gate))


async def _upload(arguments: Arguments, gate: Gate) -> None:
    host = _Host(arguments)
    async with asyncio.TaskGroup() as tasks:
        link = tasks.create_task(host.run(tasks))
        async with asyncio.timeout(WAIT_SECONDS):
            await host.served()
            await host.upload(WARM_UP)
        gate.ready()
        await asyncio.to_thread(gate.wait)
        started = time.monotonic_ns()
        async with asyncio.timeout(WAIT_SECONDS):
            await host.upload(arguments["count"])
        gate.result(started_ns=started, finished_ns=time.monotonic_ns(), confirmed=arguments["count"])
        await asyncio.to_thread(gate.stay)
        link.cancel()


async def _receive(arguments: Arguments, gate: Gate) -> None:
    host = _Host(arguments)
    async with asyncio.TaskGroup() as tasks:
        link = tasks.create_task(host.run(tasks))
        async with asyncio.timeout(WAIT_SECONDS):
            await host.served()
        gate.ready()
        received = tasks.create_task(host.receive_all(arguments["count"]))
        await asyncio.to_thread(gate.wait)
        async with asyncio.timeout(WAIT_SECONDS):
            await received
        gate.result(last_ns=time.monotonic_ns(), received=arguments["count"])
        await asyncio.to_thread(gate.stay)
        link.cancel()
