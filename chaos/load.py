"""The load on a rig, in both directions, and what is read of its fate. Used from one thread.

Devices publish at QoS 1; the cloud application sends commands and asks again until the device's answer has come up;
the cloud sends objects that need an ACK; maker, a user's module, sends to keeper and to the cloud; the Go and the C
module to each other and to the cloud.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import uuid
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from chaos.account import Flow
from chaos.mixed import FELLOWS, Exchange, sender_of, way_in, way_out
from chaos.places import NODE
from chaos.rig import Rig
from chaos.tail import Tail

REPEAT_SECONDS: Final = 2.0
"The cloud application asks again when no answer has come for so long; then after twice that, and so on."
REPEAT_MAX_SECONDS: Final = 8.0
REPEATS_PER_SECOND: Final = 100.0
"At least so many may be asked again, once no new ones are asked."
OUTSTANDING_COMMANDS: Final = 1500
"Unanswered; no new ones beyond."
OBJECTS_PER_SECOND: Final = 20.0
KEPT_PER_SECOND: Final = 100.0
UPLOADED_PER_SECOND: Final = 50.0
MIXED_PER_SECOND: Final = 25.0
"Of each flow of the Go and the C module."
DEVICES: Final = 2
_HTTP_SECONDS: Final = 2.0
_HTTP_PAUSE_SECONDS: Final = 0.3
_FILLER: Final = "x" * 80


class Device:
    """A paho client of a persistent session. Its thread only fills two queues."""

    def __init__(self, port: int, number: int, commands: str | None) -> None:
        self._commands = commands
        self.acknowledged: deque[tuple[int, float]] = deque()
        "Packet ids with the time of their PUBACK."
        self.got: deque[tuple[bytes, bool]] = deque()
        "Payloads, and whether MQTT says that it is a repetition."
        self.subscribed: deque[float] = deque()
        self.pending: dict[int, tuple[str, str]] = {}
        self._client = client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=f"chaos-device-{number}-{os.getpid()}", clean_session=False
        )
        client.max_queued_messages_set(0)
        client.max_inflight_messages_set(200)
        client.reconnect_delay_set(0.2, 0.5)  # type: ignore[arg-type]  # any number will do
        client.on_connect = self._on_connect
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        client.connect("127.0.0.1", port, keepalive=10)
        client.loop_start()

    def publish(self, topic: str, payload: str, flow: str, key: str) -> None:
        info = self._client.publish(topic, payload, qos=1)
        self.pending[info.mid] = flow, key

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: mqtt.Client, *_: Any) -> None:
        if self._commands:
            client.subscribe(self._commands, qos=1)

    def _on_publish(self, _client: mqtt.Client, _data: Any, mid: int, *_: Any) -> None:
        self.acknowledged.append((mid, time.monotonic()))

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        self.got.append((bytes(message.payload), message.dup))

    def _on_subscribe(self, *_: Any) -> None:
        self.subscribed.append(time.monotonic())


class Load:
    """Rates a second may be set at any time; `tick` about every 10 ms."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._devices = [Device(rig.mqtt_port, n, "chaos/set" if n == 0 else None) for n in range(DEVICES)]
        self._cloud = Tail(rig.record / "cloud")
        self._maker = Tail(rig.record / "maker")
        self._keeper = Tail(rig.record / "keeper")
        self._asker = Tail(rig.record / "asker")
        self._mixed = [Tail(rig.record / name) for name in rig.foreign]
        self._handled = [Tail(rig.record / f"{name}.handled") for name in rig.foreign]
        self._mqtt = Tail(rig.record / "mqtt")
        self.latencies: list[tuple[float, float]] = []
        "Of the unrelated pair: when asked, seconds until answered."
        self._http: http.client.HTTPConnection | None = None
        self._http_after = 0.0
        self._cell = 0
        self.upload_rate = self.command_rate = self.object_rate = 0.0
        self.begin_cell()

    def begin_cell(self) -> None:
        """Forget what was; messages of earlier cells are not counted any more."""
        self._cell += 1
        self.mark = f"{self._cell:x}"
        self.uploads, self.answers, self.made = Flow(), Flow(), Flow()
        "From the device; its answers to commands; of maker to the cloud."
        self.commands, self.kept, self.objects = Flow(), Flow(), Flow()
        "Every single asking of the cloud application; of maker to keeper; objects of the cluster."
        self.mixed = Exchange() if self._rig.foreign else Exchange({})
        "Of the Go and the C module."
        self.answered = 0
        "Commands, however often they had to be asked."
        self.cuts: list[float] = []
        "When a session of the node with the cloud began or ended."
        self.node_has: set[str] = set()
        "Tokens that eventbus has acknowledged to the MQTT broker."
        self.mqtt_has: set[str] = set()
        "Tokens that the MQTT broker has acknowledged to eventbus."
        self.sessions_lost: list[float] = []
        "When eventbus connected and the MQTT broker had forgotten its session."
        self.subscribed: list[float] = []
        self.device_subscribed: list[float] = []
        self.asked: dict[int, float] = {}
        "Unanswered commands, with the time of the last asking."
        self._asked_again: dict[int, int] = {}
        self._repeats = 0.0
        self._askings = 0
        self._answers = 0
        self.asks_refused = 0
        "By the cloud, which has no session with the node."
        self.refusals: dict[str, int] = {}
        self.handled: list[tuple[int, float]] = []
        "Process and moment of everything that keeper has handled."
        self.last_progress = time.monotonic()
        self.watched_from = float("inf")
        self.first: dict[tuple[str, bool], float] = {}
        "Place and whether the message was also sent since `watch`: when the first one arrived there."
        self._crc: dict[str, int] = {}
        self._owed = [0.0, 0.0, 0.0]
        self._numbers = [0, 0, 0]
        self._last = time.monotonic()

    def set_rates(self, uploads: float, commands: float, *, others: bool) -> None:
        self.upload_rate, self.command_rate = uploads, commands
        self.object_rate = OBJECTS_PER_SECOND if others else 0.0
        rates = (KEPT_PER_SECOND, UPLOADED_PER_SECOND, MIXED_PER_SECOND)
        self._rig.set_rates(*(rates if others else (0.0, 0.0, 0.0)))
        self._last = time.monotonic()

    # --- sending ------------------------------------------------------------------------------------------

    def tick(self) -> None:
        now = time.monotonic()
        passed, self._last = min(now - self._last, 0.5), now
        for flow, rate in enumerate((self.upload_rate, self.command_rate, self.object_rate)):
            self._owed[flow] = self._owed[flow] + rate * passed if rate else 0.0
        while self._owed[0] >= 1.0:
            self._owed[0] -= 1.0
            self.publish_one(now)
        # As an application behaves that does not want to bury a node that is slow already: later each time, and
        # not more often than it may ask anew.
        self._repeats = min(self._repeats + max(self.command_rate, REPEATS_PER_SECOND) * passed, 50.0)
        due = []
        for number, at in self.asked.items():
            if self._repeats < 1.0:
                break
            if now - at > min(REPEAT_SECONDS * 2 ** self._asked_again.get(number, 0), REPEAT_MAX_SECONDS):
                self._repeats -= 1.0
                self._asked_again[number] = self._asked_again.get(number, 0) + 1
                due.append(number)
        while self._owed[1] >= 1.0 and len(self.asked) < OUTSTANDING_COMMANDS:
            self._owed[1] -= 1.0
            due.append(self.next_command(now))
        self._owed[1] = min(self._owed[1], 1.0)
        objects = []
        while self._owed[2] >= 1.0:
            self._owed[2] -= 1.0
            objects.append(self._object())
        self._ask(due, objects, now)
        self._hear()

    def publish_one(self, now: float) -> None:
        number = self._numbers[0] = self._numbers[0] + 1
        device = number % DEVICES
        key = f"u.{self.mark}.{device}.{number}."
        text = json.dumps({"t": key, "v": round(20 + number % 100 / 10, 1), "f": _FILLER})
        self._crc[key] = zlib.crc32(text.encode())
        self.uploads.send(key, now)
        self._devices[device].publish(f"chaos/user/device{device}", text, "u", key)

    @property
    def commands_begun(self) -> int:
        return self._numbers[1]

    def next_command(self, now: float) -> int:
        number = self._numbers[1] = self._numbers[1] + 1
        self.asked[number] = now
        return number

    def _object(self) -> dict[str, Any]:
        number = self._numbers[2] = self._numbers[2] + 1
        identity = str(uuid.uuid4())
        name = f"c{self.mark}-{number}"
        self.objects.send(identity, time.monotonic())
        content = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": "default", "uid": identity, "resourceVersion": str(number)},
            "data": {"n": str(number)},
        }
        header = {"msg_id": identity, "timestamp": int(time.time() * 1000), "resourceversion": str(number)}
        route = {
            "source": "edgecontroller",
            "group": "resource",
            "operation": "update",
            "resource": f"default/configmap/{name}",
        }
        return {"header": header, "route": route, "content": content}

    def _ask(self, numbers: list[int], objects: list[dict[str, Any]], now: float) -> None:
        messages = list(objects)
        keys = []
        for number in numbers:
            self.asked[number] = now
            self._askings += 1
            keys.append(f"c.{self.mark}.{number}.{self._askings}.")
            route = {"source": "router_eventbus", "group": "user", "operation": "publish", "resource": "chaos/set"}
            messages.append({"route": route, "content": {"t": keys[-1]}})
        if not messages or now < self._http_after:
            return
        for key in keys:
            self.commands.send(key, now)
        results = self._post(f"/nodes/{NODE}/messages/batch", messages)
        if results is None:
            self._http_after = now + _HTTP_PAUSE_SECONDS
            return
        for key, result in zip(keys, results.get("results", [])[len(objects) :], strict=False):
            if result.get("dropped"):
                self.asks_refused += 1
            else:
                self.commands.accept(key, now)

    def _post(self, path: str, body: Any) -> dict[str, Any] | None:
        try:
            if self._http is None:
                self._http = http.client.HTTPConnection("127.0.0.1", self._rig.control_port, timeout=_HTTP_SECONDS)
            self._http.request("POST", path, json.dumps(body))
            answer: dict[str, Any] = json.loads(self._http.getresponse().read() or b"{}")
            return answer
        except (OSError, ValueError, http.client.HTTPException):
            with contextlib.suppress(OSError):
                if self._http is not None:
                    self._http.close()
            self._http = None
            return None

    def inject(self, fault: str, **facts: Any) -> None:
        """A fault of cloudsim (docs/cloudsim.md, Faults)."""
        self._post("/faults", {"fault": fault, **facts})

    # --- hearing --------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        for device in self._devices:
            while device.acknowledged:
                mid, at = device.acknowledged[0]
                device.acknowledged.popleft()
                if mid not in device.pending:
                    continue  # nothing of ours: those are entered before a PUBACK is looked at
                kind, key = device.pending.pop(mid)
                if key.split(".", 2)[1] == self.mark:
                    (self.uploads if kind == "u" else self.answers).accept(key, at)
            while device.got:
                self._obey(device, *device.got.popleft())
            while device.subscribed:
                self.device_subscribed.append(device.subscribed.popleft())
        for line in self._mqtt.lines():
            kind, when, what = line.decode().split(" ")
            if kind == "P":
                self.node_has.add(what)
            elif kind == "Q":
                self.mqtt_has.add(what)
            elif kind == "C" and what == "0":
                self.sessions_lost.append(float(when))
            elif kind == "B":
                self.subscribed.append(float(when))
        # What a module sends is in its file before it is sent: with that file read last nothing unknown arrives.
        arrived, kept = self._cloud.lines(), self._keeper.lines()
        handled = [line for tail in self._handled for line in tail.lines()]
        for line in self._maker.lines():
            self._from_maker(line.decode().split(" "))
        for tail in self._mixed:
            for line in tail.lines():
                reason = self.mixed.sent(line.decode().split(" "))
                if reason is not None:
                    self.refusals[reason] = self.refusals.get(reason, 0) + 1
        for line in handled:
            self._handled_by_mixed(line.decode().split(" "))
        for line in arrived:
            self._from_cloud(line.decode().split(" "))
        for line in kept:
            words = line.decode().split(" ")
            flow = self.kept if words[0] == "H" else self.objects
            if words[1] in flow.sent_at:
                at = float(words[4])
                self.handled.append((int(words[3]), at))
                flow.arrive(words[1], at, is_marked=words[2] == "1")
                if flow is self.kept and at > self.watched_from:
                    self._seen("keeper", flow.sent_at[words[1]], at)
        for line in self._asker.lines():
            asked, took = line.split(b" ")
            self.latencies.append((float(asked), float(took)))

    def _obey(self, device: Device, payload: bytes, is_marked: bool) -> None:
        token = json.loads(payload).get("t", "")
        _, mark, number, _, _ = token.split(".")
        if mark != self.mark:
            return
        now = time.monotonic()
        self.last_progress = now
        self.commands.arrive(token, now, is_marked=is_marked)
        self._answers += 1
        key = f"a.{mark}.{number}.{self._answers}."
        self.answers.send(key, now)
        device.publish("chaos/user/answers", json.dumps({"t": key}), "a", key)

    def _from_cloud(self, words: list[str]) -> None:
        at = float(words[1])
        if words[0] == "K":
            self.cuts.append(at)
            return
        if words[0] == "A":
            if words[2] in self.objects.sent_at:
                self.objects.accept(words[2], at)
            return
        message_id, crc, token = words[2], int(words[3]), words[4]
        kind, mark, device, _, _ = token.split(".")
        if self.mixed.has_arrived(token, at, message_id=message_id):
            if at > self.watched_from:
                self._seen(way_out(sender_of(token)), self.mixed.sent_at(token), at)
            return
        if kind == "m":
            key = token[4:-1]  # m.x.GENERATION.NUMBER.
            if key in self.made.sent_at:
                self.made.arrive(key, at, message_id=message_id)
            return
        if mark != self.mark:
            return
        self.last_progress = time.monotonic()
        if kind == "u":
            if self._crc.get(token) != crc:
                self.uploads.damaged += 1  # then it counts as lost
                return
            self.uploads.arrive(token, at, message_id=message_id)
            if at > self.watched_from:
                self._seen("cloud", self.uploads.sent_at[token], at)
        elif kind == "a":
            self.answers.arrive(token, at, message_id=message_id)
            if self.asked.pop(int(device), None) is not None:
                self.answered += 1

    def _from_maker(self, words: list[str]) -> None:
        if words[0] == "G":
            return
        flow = self.kept if words[1] == "k" else self.made
        if words[0] == "S":
            flow.send(words[2], float(words[3]))
        elif words[0] == "R" and words[2] in flow.sent_at:
            flow.accept(words[2], float(words[3]))
        elif words[0].startswith("X"):
            self.refusals[words[0][2:]] = self.refusals.get(words[0][2:], 0) + 1

    def _handled_by_mixed(self, words: list[str]) -> None:
        token, is_marked, pid, at = words[1], words[2] == "1", int(words[3]), float(words[4])
        self.handled.append((pid, at))
        if self.mixed.has_arrived(token, at, is_marked=is_marked):
            self.last_progress = time.monotonic()
            if at > self.watched_from:
                self._seen(way_in(FELLOWS[sender_of(token)]), self.mixed.sent_at(token), at)

    def watch(self, since: float) -> None:
        """From now on `first` fills."""
        self.watched_from = since
        self.first.clear()

    def _seen(self, where: str, sent_at: float, at: float) -> None:
        self.first.setdefault((where, False), at)
        if sent_at > self.watched_from:
            self.first.setdefault((where, True), at)

    # --- asking -------------------------------------------------------------------------------------------------

    def is_settled(self, mqtt_lost_until: Sequence[float] = ()) -> bool:
        """All that was published is acknowledged and has arrived, all commands are answered.

        Not waited for: what an MQTT broker accepted up to one of those moments and the node never had; askings
        that were on their way at a cut.
        """
        if (
            len(self.uploads.accepted_at) != len(self.uploads.sent_at)
            or len(self.answers.accepted_at) != len(self.answers.sent_at)
            or self.asked
            or not self.mixed.is_settled()
            or any(flow.missing() for flow in (self.made, self.kept, self.objects))
        ):
            return False
        last_cut = max((*self.cuts, *mqtt_lost_until), default=None)
        if not all(self.commands.was_under_way(key, last_cut) for key in self.commands.missing()):
            return False
        for flow in (self.uploads, self.answers):
            missing = flow.missing()
            if missing and not mqtt_lost_until:
                return False
            for key in missing:
                if key in self.node_has or not flow.is_mqtts(key, mqtt_lost_until):
                    return False
        return True

    def close(self) -> None:
        for device in self._devices:
            device.close()
