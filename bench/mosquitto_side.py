"""paho-mqtt at QoS 1: every message counted when its PUBACK came, and again when it arrived.

Sent with `loop_start()` and `publish()`, the form paho's documentation shows. The window is the fastest
of those tried (docs/benchmarks.md): larger ones are slower, for both mosquitto and paho search their
unacknowledged messages one by one.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from bench.payload import Sequence, filler
from bench.worker import Arguments, Gate

IN_FLIGHT = 100
WAIT_SECONDS = 120.0


def sender(arguments: Arguments, gate: Gate) -> None:
    client = _client("bench-sender")
    client.max_inflight_messages_set(IN_FLIGHT)
    client.max_queued_messages_set(0)
    count, rest = arguments["count"], filler(arguments["size"])
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
        client.publish("bench", number.to_bytes(8, "big") + rest, qos=1)
    finished.wait(WAIT_SECONDS)
    gate.result(started_ns=started, finished_ns=time.monotonic_ns(), confirmed=acknowledged)
    gate.stay()
    client.disconnect()
    client.loop_stop()


def receiver(arguments: Arguments, gate: Gate) -> None:
    client = _client("bench-receiver")
    sequence, count = Sequence(), arguments["count"]

    def on_connect(*_: Any) -> None:
        client.subscribe("bench", qos=1)

    def on_subscribe(*_: Any) -> None:
        gate.ready()

    def on_message(_client: Any, _data: Any, message: mqtt.MQTTMessage) -> None:
        sequence.take(message.payload)

    client.on_connect = on_connect
    client.on_subscribe = on_subscribe
    client.on_message = on_message
    client.connect("127.0.0.1", arguments["port"])
    deadline = time.monotonic() + WAIT_SECONDS
    while sequence.received < count and time.monotonic() < deadline:
        client.loop(1.0)
    # The bench has said `go` long before the last message came; its line is read here.
    last_ns = time.monotonic_ns()
    gate.result(received=sequence.received, skips=sequence.skips, last_ns=last_ns)
    # A last turn for PUBACKs that are still unsent.
    client.loop(0.1)
    gate.stay()
    client.disconnect()


def _client(client_id: str) -> mqtt.Client:
    return mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id)
