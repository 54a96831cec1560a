"""eventbus against a broker that the test plays packet by packet."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from modules.eventbus.bus import EventBus
from modules.eventbus.config import EventBusConfig, TlsFiles
from modules.eventbus.mqtt import MAX_PACKET_BYTES
from modules.eventbus.store import FILE_NAME
from runtime.errors import ConfigError
from runtime.message import Message
from tests.modules.eventbus.fake_broker import (
    CONNECT,
    DISCONNECT,
    PINGREQ,
    SUBSCRIBE,
    FakeBroker,
    fake_broker,
    packet,
    publish,
)
from tests.modules.eventbus.fakes import FakeBus, Host, hosted
from tests.support.aio import run, until

TOPIC = "a/user/b"


def module(broker: FakeBroker, data: Path, **more: object) -> EventBus:
    url = f"tcp://127.0.0.1:{broker.port}"
    return EventBus(EventBusConfig(node_name="n1", server_external=url, **more), data)  # type: ignore[arg-type]


async def ready(host: Host) -> None:
    await until(lambda: host.count("mqtt_connected") and not host.count("subscriptions_missing"), "a ready connection")


def command(payload: bytes, topic: str = "c") -> Message:
    return Message.build(source="router_eventbus", operation="publish", resource=topic, content=payload)


def holding() -> FakeBus:
    bus = FakeBus()
    bus.is_holding = True
    return bus


def test_pubacks_go_out_in_the_order_of_the_publishes_though_settled_in_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path), holding()) as host:
            await ready(host)
            broker.last.send(*(publish(TOPIC, b"%d" % mid, mid) for mid in (11, 5, 8, 2)))
            await until(lambda: len(host.bus.held) == 4)
            held = list(host.bus.held)
            for index in (3, 1, 2):
                host.bus.settle(*held[index])
            await asyncio.sleep(0.05)  # a chance for a wrong PUBACK to go out
            assert broker.last.pubacks == []
            host.bus.settle(*held[0])
            await until(lambda: broker.last.pubacks == [11, 5, 8, 2], "PUBACKs in order")
            host.bus.held.clear()

    run(scenario())


def test_messages_that_come_in_one_write_with_the_connack_are_taken(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker:
            broker.session_present = True
            broker.after_connack = publish(TOPIC, b"first", 1, dup=True) + publish(TOPIC, b"second", 2)
            async with hosted(module(broker, tmp_path)) as host:
                await until(lambda: host.bus.payloads == [b"first", b"second"])
                await until(lambda: broker.last.pubacks == [1, 2])

    run(scenario())


def test_a_redelivery_of_what_is_in_hand_is_not_sent_twice_and_acknowledged_on_the_new_connection(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path), holding()) as host:
            await ready(host)
            broker.last.send(publish(TOPIC, b"x", 7), publish(TOPIC, b"y", 8))
            await until(lambda: len(host.bus.held) == 2)
            broker.session_present = True
            broker.after_connack = publish(TOPIC, b"x", 7, dup=True) + publish(TOPIC, b"y", 8, dup=True)
            broker.last.cut()
            second = await broker.connection(2)
            await until(lambda: host.count("received_again") == 2)
            host.bus.release()
            await until(lambda: second.pubacks == [7, 8])
            assert broker.connections[0].pubacks == []
            assert len(host.bus.sent) == 2

    run(scenario())


def test_publishes_under_way_are_repeated_under_their_packet_id_with_dup_and_then_the_next(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path, publish_window=2)) as host:
            await ready(host)
            broker.acknowledges = False
            results = [await host.deliver(command(b"%d" % n)) for n in range(3)]
            await until(lambda: len(broker.last.publishes) == 2)
            first = broker.last.publishes
            broker.acknowledges, broker.session_present = True, True
            broker.last.cut()
            second = await broker.connection(2)
            await until(lambda: all(result.outcome == "done" for result in results))
            assert second.publishes[:2] == [(mid, True, payload) for mid, _, payload in first]
            assert [payload for _, _, payload in second.publishes] == [b"0", b"1", b"2"]

    run(scenario())


def test_the_brokers_receive_maximum_is_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker:
            broker.properties = b"\x21\x00\x03"
            broker.acknowledges = False
            async with hosted(module(broker, tmp_path)) as host:
                await ready(host)
                for n in range(10):
                    await host.deliver(command(b"%d" % n))
                await until(lambda: len(broker.last.publishes) == 3)
                await asyncio.sleep(0.05)  # a chance for a fourth
                assert len(broker.last.publishes) == 3
                broker.acknowledges = True
                for mid, _, _ in broker.last.publishes[:3]:
                    broker.last.send(packet(0x40, mid.to_bytes(2, "big")))
                await until(lambda: host.count("published") == 10)

    run(scenario())


@pytest.mark.parametrize(("code", "reason"), [(0x87, "denied"), (0x10, "done"), (0x80, "failed"), (0x97, "overflow")])
def test_D_V_2_a_refusal_in_the_puback_is_the_result(tmp_path: Path, code: int, reason: str) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path)) as host:
            await ready(host)
            broker.acknowledges = False
            asked = command(b"x")
            result = await host.deliver(asked, expects_reply=True)
            await until(lambda: broker.last.publishes)
            broker.last.send(packet(0x40, broker.last.publishes[0][0].to_bytes(2, "big") + bytes([code, 0])))
            await until(lambda: result.outcome == reason)
            await until(lambda: host.bus.replies)
            request, reply = host.bus.replies[0]
            assert request is asked
            assert reply.operation == ("response" if reason == "done" else "error")

    run(scenario())


def test_what_exceeds_the_brokers_maximum_packet_size_is_refused_and_the_connection_stays(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker:
            broker.properties = b"\x27\x00\x00\x04\x00"  # 1 KiB
            async with hosted(module(broker, tmp_path)) as host:
                await ready(host)
                large = await host.deliver(command(b"x" * 2000))
                small = await host.deliver(command(b"x"))
                await until(lambda: small.outcome == "done")
                assert large.outcome == "too-large"
                assert len(broker.connections) == 1

    run(scenario())


def refuse_version_5(connection: object) -> bytes | None:
    return packet(0x20, b"\x00\x84\x00") if connection.level == 5 else packet(0x20, b"\x00\x00")  # type: ignore[attr-defined]


def old_refusal(connection: object) -> bytes | None:
    return packet(0x20, b"\x00\x01") if connection.level == 5 else packet(0x20, b"\x00\x00")  # type: ignore[attr-defined]


def hang_up(connection: object) -> bytes | None:
    if connection.level == 5:  # type: ignore[attr-defined]
        connection.cut()  # type: ignore[attr-defined]
        return None
    return packet(0x20, b"\x00\x00")


@pytest.mark.parametrize("behaviour", [refuse_version_5, old_refusal, hang_up], ids=lambda each: each.__name__)
def test_a_broker_without_mqtt_5_is_spoken_to_in_3_1_1(tmp_path: Path, behaviour: object) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker:
            broker.on_connect = behaviour  # type: ignore[assignment]
            async with hosted(module(broker, tmp_path)) as host:
                await ready(host)
                assert [connection.level for connection in broker.connections] == [5, 4]
                assert broker.last.of(CONNECT)[0].body[7] & 2 == 0  # not a clean session

    run(scenario())


def test_a_silent_broker_is_dialled_with_3_1_1_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.eventbus.mqtt.FIRST_CONNACK_SECONDS", 0.1)

    async def scenario() -> None:
        async with fake_broker() as broker:
            broker.on_connect = lambda connection: None if connection.level == 5 else packet(0x20, b"\x00\x00")
            async with hosted(module(broker, tmp_path)) as host:
                await ready(host)
                assert broker.last.level == 4

    run(scenario())


def test_a_setting_of_one_version_is_not_departed_from(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker:
            broker.on_connect = refuse_version_5
            async with hosted(module(broker, tmp_path, protocol="5")) as host:
                await until(lambda: len([each for each in broker.connections if each.level]) >= 3)
                # 0: accepted, and its CONNECT not read yet.
                assert {connection.level for connection in broker.connections} - {0} == {5}
                assert not host.count("mqtt_connected")

    run(scenario())


def fast_keepalive(host: Host, seconds: int = 1) -> None:
    connection = host.module._sides[0].connection
    connection._settings = replace(connection._settings, keepalive_seconds=seconds)


def test_a_broker_that_says_nothing_any_more_is_given_up_and_dialled_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker:
            broker.answers_pings = False
            async with hosted(module(broker, tmp_path, protocol="3.1.1")) as host:
                fast_keepalive(host)
                await until(lambda: len(broker.connections) >= 2, "a second connection")
                assert broker.connections[0].of(PINGREQ)

    run(scenario())


def test_an_idle_connection_is_kept_alive_by_pings(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path, protocol="3.1.1")) as host:
            fast_keepalive(host)
            await until(lambda: broker.connections and len(broker.last.of(PINGREQ)) >= 4)
            assert len(broker.connections) == 1

    run(scenario())


def test_the_brokers_own_keepalive_is_kept_when_it_is_shorter(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker:
            broker.properties = b"\x13\x00\x01"
            async with hosted(module(broker, tmp_path)) as host:
                await ready(host)
                await until(lambda: len(broker.last.of(PINGREQ)) >= 2)

    run(scenario())


def test_stopping_does_not_wait_for_the_next_attempt_to_connect(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker:
            broker.on_connect = lambda connection: connection.cut()
            async with hosted(module(broker, tmp_path)) as host:
                await until(lambda: len(broker.connections) >= 2)
                drawn: list[float] = []

                def delay(failures: int) -> float:
                    drawn.append(1000.0)
                    return drawn[-1]

                host.module._sides[0].connection._backoff.delay = delay  # type: ignore[method-assign]
                await until(lambda: drawn, "a pause of 1000 s to begin")

    run(scenario())


@pytest.mark.parametrize("pause_seconds", [0.0, 0.001, 0.003, 0.01])
def test_stopping_while_the_session_is_about_to_open_ends_it(tmp_path: Path, pause_seconds: float) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path)):
            await asyncio.sleep(pause_seconds)  # the moment to stop at is what this is about

    run(scenario())


def test_qos_0_messages_beyond_the_window_are_left_unread_and_the_connection_lives_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            fake_broker() as broker,
            hosted(module(broker, tmp_path, protocol="3.1.1", receive_window=10), holding()) as host,
        ):
            fast_keepalive(host)
            await ready(host)
            flood = b"".join(publish(TOPIC, b"%04d" % n, 0, is_mqtt5=False) for n in range(5000))
            broker.last.send(flood)
            await until(lambda: host.count("in_hand") == 11)
            await until(lambda: len(broker.last.of(PINGREQ)) >= 4)  # pings are not answered: we do not read
            assert host.count("in_hand") == 11
            assert len(broker.connections) == 1
            host.bus.is_holding = False
            host.bus.release()
            await until(lambda: len(host.bus.delivered) == 5000, "every message")
            assert host.bus.payloads == [b"%04d" % n for n in range(5000)]

    run(scenario())


def test_commands_get_done_while_the_window_is_full_of_uploads_that_wait_for_the_cloud(tmp_path: Path) -> None:
    # edgehub reads no pong, and so settles no upload, while commands that were not done fill its own window.
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path, receive_window=10), holding()) as host:
            await ready(host)
            broker.last.send(b"".join(publish(TOPIC, b"%d" % mid, mid) for mid in range(1, 8001)))
            await until(lambda: host.count("in_hand") == 11)
            results = [await host.deliver(command(b"%d" % n)) for n in range(3)]
            await until(lambda: all(result.outcome == "done" for result in results))
            assert host.count("in_hand") == 11
            host.bus.is_holding = False
            host.bus.release()
            await until(lambda: broker.last.pubacks == list(range(1, 8001)), "every PUBACK")
            assert host.bus.payloads == [b"%d" % n for n in range(1, 8001)]

    run(scenario())


def test_bytes_in_hand_are_bounded_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path), holding()) as host:
            await ready(host)
            for _ in range(10):
                broker.last.send(publish(TOPIC, b"z" * 8 * 2**20, 0))
            await until(lambda: host.count("in_hand") == 4)
            await asyncio.sleep(0.1)  # a chance for a fifth
            assert host.count("in_hand_bytes") == 32 * 2**20
            host.bus.is_holding = False
            host.bus.release()
            await until(lambda: len(host.bus.delivered) == 10)

    run(scenario())


def test_a_message_beyond_every_limit_is_skipped_counted_and_acknowledged_in_its_turn(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path), holding()) as host:
            await ready(host)
            broker.last.send(
                publish(TOPIC, b"1", 1), publish(TOPIC, bytes(MAX_PACKET_BYTES + 1), 2), publish(TOPIC, b"3", 3)
            )
            await until(lambda: len(host.bus.held) == 2)
            assert broker.last.pubacks == []
            host.bus.release()
            await until(lambda: broker.last.pubacks == [1, 2, 3])
            assert host.count("given_up_too-large") == 1

    run(scenario())


def test_a_message_too_large_for_the_bus_is_counted_and_acknowledged(tmp_path: Path) -> None:
    async def scenario() -> None:
        bus = FakeBus()
        bus.max_message_bytes = 1000
        async with fake_broker() as broker, hosted(module(broker, tmp_path), bus) as host:
            await ready(host)
            broker.last.send(publish(TOPIC, b"x" * 2000, 1), publish(TOPIC, b"x", 2))
            await until(lambda: broker.last.pubacks == [1, 2])
            assert host.count("given_up_too-large") == 1
            assert len(bus.delivered) == 1

    run(scenario())


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x00",
        b"\x30\xff\xff\xff\xff\x7f",
        b"\x34\x09\x00\x01a\x00\x01\x00xyz",  # QoS 2
        b"\x20\x02\x00\x00",  # a second CONNACK
        b"\x40\x00",  # PUBACK without a packet id
        b"\x90\x02\x00\x01",
        b"\xf0\x00",
        b"\xe0\x01\x8e",  # DISCONNECT: session taken over
    ],
    ids=lambda data: data.hex(),
)
def test_garbage_from_the_broker_ends_at_most_the_connection(tmp_path: Path, garbage: bytes) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path)) as host:
            await ready(host)
            first = broker.last
            first.send(garbage)
            await asyncio.sleep(0.05)
            first.cut()
            await until(lambda: len(broker.connections) >= 2)
            await ready(host)
            broker.last.send(publish(TOPIC, b"alive", 1))
            await until(lambda: host.bus.payloads == [b"alive"])

    run(scenario())


def test_a_topic_that_is_not_utf8_is_acknowledged_counted_and_goes_nowhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path)) as host:
            await ready(host)
            broker.last.send(packet(0x32, b"\x00\x02\xff\xfe\x00\x07\x00payload"), publish(TOPIC, b"good", 8))
            await until(lambda: broker.last.pubacks == [7, 8])
            assert host.bus.payloads == [b"good"]
            assert host.count("malformed_topics") == 1

    run(scenario())


def test_D_V_4_a_filter_that_the_broker_refuses_does_not_stop_the_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker:
            broker.refuses_filters = {b"$hw/events/upload/#"}
            async with hosted(module(broker, tmp_path)) as host:
                await until(lambda: host.count("subscriptions_missing") == 1)
                assert len([each for each in broker.last.of(SUBSCRIBE) if b"$SYS" not in each.body]) == 6
                broker.refuses_filters.clear()
                await ready(host)
                assert len([each for each in broker.last.of(SUBSCRIBE) if b"$SYS" not in each.body]) == 7

    run(scenario())


def test_D_V_10_a_subscription_is_on_disk_before_the_broker_hears_of_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path)) as host:
            asked = Message.build(source="router_eventbus", operation="subscribe", resource="ns/rule")
            assert (await host.deliver(asked)).outcome == "done"  # accepted before any connection is there
            assert b"ns/rule" in (tmp_path / FILE_NAME).read_bytes()
            await ready(host)
            assert any(b"ns/rule" in each.body for each in broker.last.of(SUBSCRIBE))

    run(scenario())


def test_a_subscription_that_cannot_be_stored_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path)) as host:

            def full(*_: object) -> None:
                raise OSError(28, "No space left on device")

            asked = Message.build(operation="subscribe", resource="ns/rule")
            with monkeypatch.context() as patch:
                patch.setattr(host.module._store, "save", full)
                for _ in range(2):
                    with pytest.raises(OSError, match="No space"):
                        await host.deliver(asked)
            assert (await host.deliver(asked)).outcome == "done"
            assert b"ns/rule" in (tmp_path / FILE_NAME).read_bytes()

    run(scenario())


def test_D_V_3_an_odd_message_is_refused_as_invalid_and_the_next_one_is_done(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path)) as host:
            await ready(host)
            odd = Message.build(operation="message", content=[1, 2])
            assert (await host.deliver(odd, expects_reply=True)).outcome == "invalid"
            assert host.bus.replies[0][1].operation == "error"
            assert host.count("rejected") == 1
            result = await host.deliver(command(b"x"))
            await until(lambda: result.outcome == "done")

    run(scenario())


def test_the_cloud_links_state_is_recorded(tmp_path: Path) -> None:
    def state(content: str) -> Message:
        return Message.build(
            source="edgehub", group="bus", resource="node/connection", operation="connect", content=content
        )

    async def scenario() -> None:
        async with fake_broker() as broker, hosted(module(broker, tmp_path)) as host:
            await ready(host)
            assert "cloud_connected" not in host.module.counters()
            assert (await host.deliver(state("cloud_connected"))).outcome == "done"
            assert host.count("cloud_connected") == 1
            await host.deliver(state("cloud_disconnected"))
            assert host.module.counters()["cloud_connected"] == 0
            assert host.count("published") == 0

    run(scenario())


def test_stopping_says_goodbye_to_the_broker(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with fake_broker() as broker:
            async with hosted(module(broker, tmp_path)) as host:
                await ready(host)
            await until(lambda: broker.last.of(DISCONNECT))

    run(scenario())


@pytest.mark.parametrize("missing", ["tlsMqttCAFile", "tlsMqttCertFile", "tlsMqttPrivateKeyFile"])
def test_D_V_9_a_tls_file_that_cannot_be_read_stops_the_start_with_its_name(tmp_path: Path, missing: str) -> None:
    from tests.support.certificates import make_authority

    make_authority(tmp_path, servers=["localhost"], clients=["n1"])
    paths = {
        "tlsMqttCAFile": f"{tmp_path}/ca.crt",
        "tlsMqttCertFile": f"{tmp_path}/n1.crt",
        "tlsMqttPrivateKeyFile": f"{tmp_path}/n1.key",
    }
    paths[missing] = f"{tmp_path}/absent.pem"
    config = EventBusConfig(server_external="ssl://localhost", tls=TlsFiles(*paths.values()))
    with pytest.raises(ConfigError) as fault:
        EventBus(config, tmp_path)
    assert fault.value.key == f"modules.eventBus.eventBusTLS.{missing}"
    assert fault.value.value == paths[missing]
    assert "No such file" in fault.value.rule


def test_D_V_9_a_ca_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("no certificate")
    config = EventBusConfig(server_external="ssl://localhost", tls=TlsFiles(f"{tmp_path}/ca.crt"))
    with pytest.raises(ConfigError, match="tlsMqttCAFile"):
        EventBus(config, tmp_path)
