"""The device: a real MQTT client (paho) that reports measurements and obeys commands."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from demo.children import DemoFailed

MEASUREMENTS = "demo/user/thermometer"
"KubeEdge sends what is published under +/user/# up to the cloud."
COMMANDS = "demo/lamp/set"
ANSWERS = "demo/user/lamp/answer"

_CONNECT_SECONDS = 10.0


class Device:
    """Publishes at QoS 1, so that the MQTT broker acknowledges each message; never repeats one itself.

    `obey` is called in the client's thread for each command that arrives, and returns the answer to publish.
    """

    def __init__(self, port: int, client_id: str, obey: Callable[[bytes], bytes | None]) -> None:
        self._obey = obey
        self._ready = threading.Event()
        self.acknowledged = 0
        "Messages that the MQTT broker has confirmed."
        self._client = client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id)
        client.max_queued_messages_set(0)  # no limit: paho holds what the broker has not yet confirmed
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        try:
            client.connect("127.0.0.1", port)
        except OSError as fault:
            raise DemoFailed(f"the device cannot reach the MQTT broker on port {port}: {fault}") from fault
        client.loop_start()
        if not self._ready.wait(_CONNECT_SECONDS):
            self.close()
            raise DemoFailed(f"the MQTT broker on port {port} does not answer the device")

    def publish(self, topic: str, payload: bytes) -> None:
        self._client.publish(topic, payload, qos=1)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    # paho calls these in its own thread.

    def _on_connect(self, client: mqtt.Client, *_: Any) -> None:
        client.subscribe(COMMANDS, qos=1)

    def _on_subscribe(self, *_: Any) -> None:
        self._ready.set()

    def _on_message(self, client: mqtt.Client, _: Any, message: mqtt.MQTTMessage) -> None:
        answer = self._obey(bytes(message.payload))
        if answer is not None:
            client.publish(ANSWERS, answer, qos=1)

    def _on_publish(self, *_: Any) -> None:
        self.acknowledged += 1
