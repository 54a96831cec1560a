"""The ways to the cloud and from it, as users take them: modules on the bus, and a device on MQTT."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from bench.payload import FIRST_READING, reading
from bench.worker import Arguments, Gate
from runtime.client import Bus, Receipt
from runtime.message import Message
from runtime.names import Group

TOPIC = "SYS/dis/upload_records"
"One of the topics that KubeEdge's eventbus uploads (docs/eventbus.md)."

COMMANDS_TO = "eventbus"
"The module that owns what cloud applications send."

PUBLISHED_BYTES = 256
WAIT_SECONDS = 120.0
IN_FLIGHT = 100


def sender(arguments: Arguments, gate: Gate) -> None:
    """A module that uploads: each receipt is awaited, it comes when the cloud has confirmed."""
    asyncio.run(_upload(arguments, gate))


async def _upload(arguments: Arguments, gate: Gate) -> None:
    count = arguments["count"]
    async with Bus.connect("bench-uploader", endpoint=arguments["endpoint"]) as bus:
        await bus.wait_attached()
        gate.ready()
        await asyncio.to_thread(gate.wait)
        pending: deque[Receipt] = deque()
        confirmed = 0
        started = time.monotonic_ns()
        for number in range(count):
            message = Message.upload("default/bench/1", reading(number), source="bench")
            pending.append(await bus.send(Group("hub"), message))
            while pending and pending[0].settled:
                await pending.popleft()
                confirmed += 1
        async with asyncio.timeout(WAIT_SECONDS):
            while pending:
                await pending.popleft()
                confirmed += 1
        gate.result(started_ns=started, finished_ns=time.monotonic_ns(), confirmed=confirmed)
        await asyncio.to_thread(gate.stay)


def receiver(arguments: Arguments, gate: Gate) -> None:
    """The module that the cloud's commands are for. Each carries its number."""
    asyncio.run(_receive(arguments, gate))


async def _receive(arguments: Arguments, gate: Gate) -> None:
    count, skips = arguments["count"], 0
    numbers: set[int] = set()
    finished = asyncio.Event()

    async def handle(message: Message) -> None:
        nonlocal skips
        if message.group != "user":
            return  # whether the cloud is there
        number = message.json()["number"]
        skips += number != FIRST_READING + len(numbers)
        numbers.add(number)
        if len(numbers) == count:
            finished.set()

    async with Bus.connect(COMMANDS_TO, endpoint=arguments["endpoint"], handler=handle) as bus:
        await bus.wait_attached()
        gate.ready()
        await asyncio.to_thread(gate.wait)
        async with asyncio.timeout(WAIT_SECONDS):
            await finished.wait()
        gate.result(received=len(numbers), skips=skips, last_ns=time.monotonic_ns())
        await asyncio.to_thread(gate.stay)


def requester(arguments: Arguments, gate: Gate) -> None:
    """A device that publishes at QoS 1. Says when it began and when mosquitto had acknowledged all."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="bench-device")
    client.max_inflight_messages_set(IN_FLIGHT)
    client.max_queued_messages_set(0)
    count, filler = arguments["count"], b"x" * (PUBLISHED_BYTES - 8)
    connected, finished = threading.Event(), threading.Event()
    acknowledged = 0

    def on_connect(*_: Any) -> None:
        connected.set()

    def on_publish(*_: Any) -> None:
        nonlocal acknowledged
        acknowledged += 1
        if acknowledged == count:
            finished.set()

    client.on_connect = on_connect
    client.on_publish = on_publish
    client.connect("127.0.0.1", arguments["port"])
    client.loop_start()
    if not connected.wait(WAIT_SECONDS):
        raise TimeoutError("mosquitto did not answer")
    gate.ready()
    gate.wait()
    started = time.monotonic_ns()
    for number in range(count):
        client.publish(TOPIC, b"%08d" % number + filler, qos=1)
    finished.wait(WAIT_SECONDS)
    gate.result(started_ns=started, finished_ns=time.monotonic_ns(), confirmed=acknowledged)
    gate.stay()
    client.disconnect()
    client.loop_stop()
