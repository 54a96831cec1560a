"""The two ways up to the cloud, as users take them: a module on the bus, and a device on MQTT."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from bench.worker import Arguments, Gate
from runtime.client import Bus, Receipt
from runtime.message import Message
from runtime.names import Group

TOPIC = "SYS/dis/upload_records"
"One of the topics that KubeEdge's eventbus uploads (docs/eventbus.md)."

READING_BYTES = 256
WAIT_SECONDS = 120.0
IN_FLIGHT = 100


def sender(arguments: Arguments, gate: Gate) -> None:
    """A module that uploads: each receipt is awaited, it comes when the cloud has confirmed."""
    asyncio.run(_upload(arguments, gate))


async def _upload(arguments: Arguments, gate: Gate) -> None:
    count, filler = arguments["count"], "x" * (READING_BYTES - len('{"number":1000000,"filler":""}'))
    async with Bus.connect("bench-uploader", endpoint=arguments["endpoint"]) as bus:
        await bus.wait_attached()
        gate.ready()
        await asyncio.to_thread(gate.wait)
        pending: deque[Receipt] = deque()
        confirmed = 0
        started = time.monotonic_ns()
        for number in range(count):
            reading = {"number": 1_000_000 + number, "filler": filler}
            pending.append(await bus.send(Group("hub"), Message.upload("default/bench/1", reading, source="bench")))
            while pending and pending[0].settled:
                await pending.popleft()
                confirmed += 1
        async with asyncio.timeout(WAIT_SECONDS):
            while pending:
                await pending.popleft()
                confirmed += 1
        gate.result(started_ns=started, finished_ns=time.monotonic_ns(), confirmed=confirmed)
        await asyncio.to_thread(gate.stay)


def requester(arguments: Arguments, gate: Gate) -> None:
    """A device that publishes at QoS 1. Says when it began and when mosquitto had acknowledged all."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="bench-device")
    client.max_inflight_messages_set(IN_FLIGHT)
    client.max_queued_messages_set(0)
    count, filler = arguments["count"], b"x" * (READING_BYTES - 8)
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
