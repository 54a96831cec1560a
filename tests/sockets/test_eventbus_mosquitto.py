"""eventbus against a real mosquitto: what only the real broker can show."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from modules.eventbus.bus import EventBus
from modules.eventbus.config import EventBusConfig
from modules.eventbus.store import FILE_NAME
from runtime.message import BYTES, TEXT, Message
from tests.modules.eventbus.fakes import FakeBus, Host, hosted, killed
from tests.support.aio import run, until, until_sync
from tests.support.deadline import DEADLINE
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.mosquitto

EIGHT_MIB = 8 * 2**20


class Device:
    """A real MQTT client of a device, QoS 1 both ways."""

    def __init__(self, broker: Mosquitto, name: str = "device", *, filters: tuple[str, ...] = ()) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.acknowledged = 0
        self._filters = filters
        self._ready = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
        self._client.max_inflight_messages = 200
        self._client.reconnect_delay_set(1, 1)
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()
        assert self._ready.wait(DEADLINE)

    def _on_connect(self, client: paho.Client, *_: object) -> None:
        if self._filters:
            client.subscribe([(each, 1) for each in self._filters])
        else:
            self._ready.set()

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        self.received.append((message.topic, bytes(message.payload)))

    def _on_publish(self, *_: object) -> None:
        self.acknowledged += 1

    def publish(self, topic: str, payload: bytes | str, qos: int = 1, *, retain: bool = False) -> None:
        info = self._client.publish(topic, payload, qos, retain=retain)
        assert info.rc in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@contextmanager
def device(broker: Mosquitto, *filters: str, name: str = "device") -> Iterator[Device]:
    made = Device(broker, name, filters=filters)
    try:
        yield made
    finally:
        made.close()


def settings(broker: Mosquitto, **more: object) -> EventBusConfig:
    return EventBusConfig(node_name="n1", server_external=broker.url, **more)  # type: ignore[arg-type]


async def subscribed(host: Host) -> None:
    await until(
        lambda: host.count("mqtt_connected") and not host.count("subscriptions_missing"), "all filters subscribed"
    )


def publish(topic: str, content: object) -> Message:
    return Message.build(source="router_eventbus", group="user", resource=topic, operation="publish", content=content)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_messages_of_a_device_reach_the_bus_in_order(tmp_path: Path, protocol: str) -> None:
    async def scenario(broker: Mosquitto) -> None:
        async with hosted(EventBus(settings(broker, protocol=protocol), tmp_path)) as host:
            await subscribed(host)
            with device(broker) as sensor:
                for number in range(500):
                    sensor.publish("default/user/x", str(number))
                sensor.publish("$hw/events/device/ns/d/twin/update", "{}")
                await until(lambda: len(host.bus.delivered) == 501, "501 messages")
                assert [int(payload) for payload in host.bus.payloads[:500]] == list(range(500))
                assert [to for to, _ in host.bus.sent] == ["@hub"] * 500 + ["@twin"]
                await until(lambda: host.count("in_hand") == 0)

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize(
    ("payload", "kind"),
    [(b"", TEXT), (b"\xff\x00\xfe", BYTES), ("grüße".encode(), TEXT), (b"\x80" * EIGHT_MIB, BYTES)],
    ids=["empty", "binary", "unicode", "8 MiB"],
)
def test_payloads_of_every_kind_pass_unharmed_both_ways(
    tmp_path: Path, protocol: str, payload: bytes, kind: str
) -> None:
    async def scenario(broker: Mosquitto) -> None:
        async with hosted(EventBus(settings(broker, protocol=protocol), tmp_path)) as host:
            await subscribed(host)
            with device(broker, "commands/#") as sensor:
                sensor.publish("default/user/x", payload)
                await until(lambda: host.bus.delivered, "the upload")
                assert host.bus.delivered[0].kind == kind
                assert host.bus.delivered[0].content == payload
                result = await host.deliver(publish("commands/1", payload))
                await until(lambda: sensor.received, "the command")
                assert sensor.received == [("commands/1", payload)]
                await until(lambda: result.outcome == "done")

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


def test_D_V_5_messages_published_while_eventbus_was_away_arrive_when_it_is_back(tmp_path: Path) -> None:
    async def scenario(broker: Mosquitto) -> None:
        async with hosted(EventBus(settings(broker), tmp_path)) as host:
            await subscribed(host)
        with device(broker) as sensor:
            for number in range(300):
                sensor.publish("default/user/x", str(number))
            await until(lambda: sensor.acknowledged == 300)
        async with hosted(EventBus(settings(broker), tmp_path)) as host:
            await until(lambda: len(host.bus.delivered) == 300, "what waited in the session")
            assert [int(payload) for payload in host.bus.payloads] == list(range(300))

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


def test_killing_eventbus_under_load_loses_nothing_that_the_broker_acknowledged(tmp_path: Path) -> None:
    """Each instance dies with messages in hand, some settled and not yet acknowledged."""

    async def scenario(broker: Mosquitto) -> None:
        async with hosted(EventBus(settings(broker), tmp_path)) as host:
            await subscribed(host)
        arrived: set[int] = set()
        total = 3000
        with device(broker) as sensor:
            for number in range(total):
                sensor.publish("default/user/x", str(number))
            for life in range(4):
                bus = FakeBus()
                bus.is_holding = True
                async with killed(EventBus(settings(broker, receive_window=200), tmp_path), bus):
                    await until(lambda bus=bus: len(bus.held) >= 50, "messages in hand")
                    bus.release(40 + life)
                arrived |= {int(payload) for payload in bus.payloads}
            async with hosted(EventBus(settings(broker), tmp_path)) as host:
                await until(
                    lambda: len(arrived | {int(payload) for payload in host.bus.payloads}) == total, "every message"
                )
                await until(lambda: sensor.acknowledged == total)

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


def test_a_restart_of_the_broker_under_load_loses_nothing_and_sends_nothing_in_hand_twice(tmp_path: Path) -> None:
    async def scenario(broker: Mosquitto) -> None:
        bus = FakeBus()
        bus.is_holding = True
        async with hosted(EventBus(settings(broker, receive_window=100), tmp_path), bus) as host:
            await subscribed(host)
            total = 2000
            with device(broker) as sensor:
                for number in range(total):
                    sensor.publish("default/user/x", str(number))
                await until(lambda: sensor.acknowledged == total)  # else the device sends some twice
                for _ in range(2):
                    await until(lambda: len(bus.held) >= 100, "a full window")
                    dials = host.count("mqtt_dials")
                    await asyncio.to_thread(broker.terminate)  # writes its sessions
                    # Settled from here on: a PUBACK on its way when a connection ends is lost, and its message
                    # comes once more.
                    await until(lambda: not host.count("mqtt_connected"))
                    bus.release(30)
                    await asyncio.to_thread(broker.start)
                    await until(lambda dials=dials: host.count("mqtt_dials") > dials, "a new connection")
                    await until(lambda: host.count("mqtt_connected"))
                bus.is_holding = False
                bus.release()
                await until(lambda: {int(p) for p in bus.payloads} == set(range(total)), "every message")
                await until(lambda: host.count("in_hand") == 0)
                assert host.count("received_again") > 0
                # Of the 100 in hand at each cut none was sent twice; of the 30 settled around it a PUBACK that
                # mosquitto had not taken down yet when it ended lets the message come once more.
                assert total <= len(bus.payloads) <= total + 2 * 30

    with Mosquitto(tmp_path / "m", persistent=True) as broker:
        run(scenario(broker))


def test_D_V_10_subscriptions_are_made_again_after_the_broker_lost_its_state(tmp_path: Path) -> None:
    async def scenario(broker: Mosquitto) -> None:
        async with hosted(EventBus(settings(broker), tmp_path)) as host:
            await subscribed(host)
            asked = Message.build(source="router_eventbus", resource="default/rule/#", operation="subscribe")
            assert (await host.deliver(asked)).outcome == "done"
            assert b"default/rule/#" in (tmp_path / FILE_NAME).read_bytes()
            await subscribed(host)
            await asyncio.to_thread(broker.kill)
            await until(lambda: not host.count("mqtt_connected"))
            await asyncio.to_thread(broker.start)
            await subscribed(host)
            with device(broker) as sensor:
                sensor.publish("default/rule/1", "again")
                await until(lambda: host.bus.payloads == [b"again"])

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


def test_stored_subscriptions_are_restored_and_can_be_removed(tmp_path: Path) -> None:
    async def scenario(broker: Mosquitto) -> None:
        async with hosted(EventBus(settings(broker), tmp_path)) as host:
            await host.deliver(Message.build(resource="default/rule", operation="subscribe"))
        async with hosted(EventBus(settings(broker), tmp_path)) as host:
            await subscribed(host)
            with device(broker) as sensor:
                sensor.publish("default/rule", "1")
                await until(lambda: host.bus.payloads == [b"1"])
                await host.deliver(Message.build(resource="default/rule", operation="unsubscribe"))
                await until(lambda: host.module._subscriptions.snapshot().unwanted == [])
                sensor.publish("default/rule", "2")
                sensor.publish("default/user/x", "3")
                await until(lambda: host.bus.payloads == [b"1", b"3"])

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_D_V_7_an_own_publish_to_a_subscribed_topic_does_not_come_back_as_an_upload(
    tmp_path: Path, protocol: str
) -> None:
    async def scenario(broker: Mosquitto) -> None:
        async with hosted(EventBus(settings(broker, protocol=protocol), tmp_path)) as host:
            await subscribed(host)
            with device(broker, "a/user/#") as sensor:
                for number in range(100):
                    await host.deliver(publish("a/user/b", str(number)))
                await until(lambda: len(sensor.received) == 100, "the publishes at the device")
                sensor.publish("a/user/b", "from the device")
                await until(lambda: host.bus.delivered, "the device's own message")
                assert host.bus.payloads == [b"from the device"]
                assert host.count("echoes_skipped") == (100 if protocol == "3.1.1" else 0)

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


def test_D_V_1_D_V_2_a_broker_that_hangs_blocks_no_handler_and_results_come_when_it_answers(tmp_path: Path) -> None:
    async def scenario(broker: Mosquitto) -> None:
        async with hosted(EventBus(settings(broker, publish_window=20), tmp_path)) as host:
            await subscribed(host)
            with device(broker, "c/#") as sensor:
                broker.freeze()
                try:
                    results = [await host.deliver(publish(f"c/{n % 3}", f"{n:04}")) for n in range(500)]
                    assert host.count("publishes_in_flight") == 20
                    assert host.count("publishes_waiting") == 480
                    assert all(result.outcome is None for result in results)
                finally:
                    broker.thaw()
                await until(lambda: all(result.outcome == "done" for result in results), "truthful results")
                await until(lambda: len(sensor.received) == 500)
                for topic in ("c/0", "c/1", "c/2"):
                    of_topic = [payload for each, payload in sensor.received if each == topic]
                    assert of_topic == sorted(of_topic)

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


def test_D_V_2_publishes_under_way_when_the_broker_restarts_are_sent_again_and_only_then_done(tmp_path: Path) -> None:
    async def scenario(broker: Mosquitto) -> None:
        async with hosted(EventBus(settings(broker, publish_window=50), tmp_path)) as host:
            await subscribed(host)
            with device(broker, "c/#") as sensor:
                broker.freeze()
                results = [await host.deliver(publish("c/x", f"{n:04}")) for n in range(200)]
                broker.kill()
                await until(lambda: not host.count("mqtt_connected"))
                assert all(result.outcome is None for result in results)
                await asyncio.to_thread(broker.start)
                await until(lambda: all(result.outcome == "done" for result in results), "all published")
                await until(lambda: host.count("published") == 200)
                # The device may have been slower to come back than eventbus; what it got is in order.
                payloads = [payload for _, payload in sensor.received]
                assert payloads == sorted(payloads)

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


def test_a_refused_message_is_tried_again_and_a_permanent_refusal_does_not_block_the_queue(tmp_path: Path) -> None:
    async def scenario(broker: Mosquitto) -> None:
        tries: dict[bytes, int] = {}

        def policy(message: Message) -> str | None:
            count = tries[message.content] = tries.get(message.content, 0) + 1
            if message.content == b"bad":
                return "invalid"
            return "gone" if message.content == b"later" and count < 3 else None

        bus = FakeBus()
        bus.policy = policy
        async with hosted(EventBus(settings(broker), tmp_path), bus) as host:
            await subscribed(host)
            with device(broker) as sensor:
                for payload in ("later", "bad", "good"):
                    sensor.publish("default/user/x", payload)
                await until(lambda: sorted(bus.payloads) == [b"good", b"later"])
                await until(lambda: host.count("in_hand") == 0)
                assert tries == {b"later": 3, b"bad": 1, b"good": 1}
                assert host.count("given_up_invalid") == 1
                assert host.count("retried") == 2

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


def test_a_full_window_at_the_bus_holds_the_broker_and_loses_nothing(tmp_path: Path) -> None:
    async def scenario(broker: Mosquitto) -> None:
        bus = FakeBus()
        bus.is_holding = True
        bus.window = 10
        async with hosted(EventBus(settings(broker, receive_window=50), tmp_path), bus) as host:
            await subscribed(host)
            with device(broker) as sensor:
                for number in range(400):
                    sensor.publish("default/user/x", str(number))
                # mosquitto sends one more than Receive Maximum allows.
                await until(lambda: host.count("in_hand") in (50, 51) and sensor.acknowledged == 400, "a full window")
                assert len(bus.held) == 10
                bus.is_holding = False
                bus.release()
                await until(lambda: [int(p) for p in bus.payloads] == list(range(400)), "everything, in order")

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


def test_mode_both_serves_two_brokers_and_a_publish_is_done_when_both_have_it(tmp_path: Path) -> None:
    async def scenario(external: Mosquitto, internal: Mosquitto) -> None:
        config = settings(external, mode=1, server_internal=internal.url)
        async with hosted(EventBus(config, tmp_path)) as host:
            await until(lambda: host.count("external_mqtt_connected") and host.count("internal_mqtt_connected"))
            await until(
                lambda: (
                    not host.count("external_subscriptions_missing")
                    and not host.count("internal_subscriptions_missing")
                )
            )
            with device(external, "c/#", name="one") as one, device(internal, "c/#", name="two") as two:
                one.publish("default/user/x", "from one")
                two.publish("default/user/x", "from two")
                await until(lambda: set(host.bus.payloads) == {b"from one", b"from two"})
                internal.freeze()
                result = await host.deliver(publish("c/1", "both"))
                await until(lambda: one.received, "the publish at the external broker")
                await until(lambda: host.count("external_published") == 1)
                assert result.outcome is None
                internal.thaw()
                await until(lambda: result.outcome == "done")
                await until(lambda: two.received)

    with Mosquitto(tmp_path / "e") as external, Mosquitto(tmp_path / "i") as internal:
        run(scenario(external, internal))


def test_retained_messages_come_once_and_not_again_with_each_connection(tmp_path: Path) -> None:
    async def scenario(broker: Mosquitto) -> None:
        with device(broker) as sensor:
            sensor.publish("default/user/kept", "kept", retain=True)
            await until(lambda: sensor.acknowledged == 1)
            for _ in range(2):
                async with hosted(EventBus(settings(broker), tmp_path)) as host:
                    await subscribed(host)
                    sensor.publish("default/user/mark", "mark")
                    await until(lambda host=host: b"mark" in host.bus.payloads)
                    payloads = host.bus.payloads
        assert payloads == [b"mark"]

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


def test_stopping_lets_what_is_in_hand_settle(tmp_path: Path) -> None:
    async def scenario(broker: Mosquitto) -> None:
        bus = FakeBus()
        bus.is_holding = True
        async with hosted(EventBus(settings(broker), tmp_path), bus) as host:
            await subscribed(host)
            with device(broker) as sensor:
                for number in range(20):
                    sensor.publish("default/user/x", str(number))
                await until(lambda: len(bus.held) == 20)
                stopping = asyncio.create_task(host.module.stop())
                await asyncio.sleep(0)
                assert not stopping.done()
                bus.release()
                await stopping
        async with hosted(EventBus(settings(broker), tmp_path)) as host:
            await subscribed(host)
            with device(broker) as sensor:
                sensor.publish("default/user/x", "next")
                await until(lambda: host.bus.payloads, "the next message")
                assert host.bus.payloads == [b"next"]  # all twenty were acknowledged

    with Mosquitto(tmp_path / "m") as broker:
        run(scenario(broker))


# --- TLS and passwords -----------------------------------------------------------------------------


def tls_broker(tmp_path: Path, *, client_certificates: bool = False) -> Mosquitto:
    from tests.support.certificates import make_authority  # cryptography is slow to import

    make_authority(tmp_path, servers=["localhost", "127.0.0.1"], clients=["n1"])
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "edge", "geheim"], check=True)
    return Mosquitto(
        tmp_path / "m",
        defaults=False,
        lines=[
            f"cafile {tmp_path}/ca.crt",
            f"certfile {tmp_path}/server.crt",
            f"keyfile {tmp_path}/server.key",
            f"require_certificate {'true' if client_certificates else 'false'}",
            "allow_anonymous false",
            f"password_file {passwords}",
        ],
    )


def tls_settings(broker: Mosquitto, tmp_path: Path, **more: object) -> EventBusConfig:
    from modules.eventbus.config import TlsFiles

    values: dict[str, object] = {
        "node_name": "n1",
        "server_external": f"ssl://127.0.0.1:{broker.port}",
        "username": "edge",
        "password": "geheim",
        "tls": TlsFiles(f"{tmp_path}/ca.crt", f"{tmp_path}/n1.crt", f"{tmp_path}/n1.key"),
        **more,
    }
    return EventBusConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_mqtt_over_tls_with_password_and_client_certificate(tmp_path: Path, protocol: str) -> None:
    async def scenario(broker: Mosquitto) -> None:
        config = tls_settings(broker, tmp_path, protocol=protocol)
        async with hosted(EventBus(config, tmp_path)) as host:
            await subscribed(host)
            asked = Message.build(resource="c/big", operation="publish", content=b"z" * 1_000_000)
            result = await host.deliver(asked)
            await until(lambda: result.outcome == "done")

    with tls_broker(tmp_path, client_certificates=True) as broker:
        run(scenario(broker))


@pytest.mark.parametrize("protocol", ["auto", "3.1.1"])
def test_a_wrong_password_is_said_in_the_log_and_tried_again(
    tmp_path: Path, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(broker: Mosquitto) -> None:
        config = tls_settings(broker, tmp_path, password="wrong", protocol=protocol)
        async with hosted(EventBus(config, tmp_path)) as host:
            await until(lambda: host.count("mqtt_dials") >= 2, "a second attempt")
            assert not host.count("mqtt_connected")

    with tls_broker(tmp_path) as broker:
        run(scenario(broker))
    assert "uthori" in caplog.text  # Not authorized, or: bad user name or password
    assert "geheim" not in caplog.text


# asyncio of Python 3.11 leaves the socket of a TLS handshake that failed to the garbage collector, which warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_D_V_9_a_server_that_the_ca_did_not_sign_is_not_trusted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from modules.eventbus.config import TlsFiles
    from tests.support.certificates import make_authority

    other = tmp_path / "other"
    make_authority(other, servers=["localhost"], clients=[])

    async def scenario(broker: Mosquitto) -> None:
        config = tls_settings(broker, tmp_path, tls=TlsFiles(f"{other}/ca.crt"))
        async with hosted(EventBus(config, tmp_path)) as host:
            await until(lambda: host.count("mqtt_dials") >= 2)
            assert not host.count("mqtt_connected")

    with tls_broker(tmp_path) as broker:
        run(scenario(broker))
    gc.collect()  # here, where it is expected, and not in some later test
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


def test_a_broker_that_is_not_there_is_dialled_until_it_is(tmp_path: Path) -> None:
    async def scenario(broker: Mosquitto) -> None:
        async with hosted(EventBus(settings(broker), tmp_path)) as host:
            await until(lambda: host.count("mqtt_dials") >= 2)
            result = await host.deliver(publish("c/1", "early"))
            await asyncio.to_thread(broker.start)
            await until(lambda: result.outcome == "done", "the publish that waited")

    with Mosquitto(tmp_path / "m") as broker:
        broker.kill()
        until_sync(lambda: broker._process is not None and broker._process.poll() is not None)
        run(scenario(broker))


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_the_broker_dropped_is_counted_and_goes_nowhere_else(tmp_path: Path, protocol: str) -> None:
    async def scenario(broker: Mosquitto) -> None:
        async with hosted(EventBus(settings(broker, protocol=protocol), tmp_path)) as host:
            await until(lambda: "mqtt_broker_dropped" in host.module.counters(), "the broker's own count")
            assert host.count("mqtt_broker_dropped") == 0
            await subscribed(host)
            assert host.bus.delivered == []

    with Mosquitto(tmp_path / "m", lines=["sys_interval 1"]) as broker:
        run(scenario(broker))
