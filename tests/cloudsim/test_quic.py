"""The double's QUIC port on real sockets."""

from __future__ import annotations

import asyncio
import datetime
import random
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from aioquic.quic.configuration import QuicConfiguration

from cloudsim import CloudMessage, CloudSim, Header, Route
from cloudsim.certificates import Authority
from cloudsim.quic import CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES
from cloudsim.recorder import Happened
from runtime.viaduct import package_header, packages
from tests.cloudsim.quicnode import (
    CA_QUERY,
    QuicNode,
    client_configuration,
    header_package,
    quic_cloud,
    quic_message,
    quic_raw,
    quic_served,
)
from tests.cloudsim.rawnode import served
from tests.support.aio import run, until

CONFIGMAP = {"metadata": {"uid": "u", "name": "cm"}, "data": {"a": "<b>"}}


def send_object(sim: CloudSim, version: str = "1", *, node: str = "edge-a") -> dict[str, str | None]:
    return sim.send(
        node,
        CloudMessage(
            Header(resourceversion=version),
            Route("edgecontroller", "", "resource", "insert", f"node/{node}/default/configmap/cm"),
            CONFIGMAP,
        ),
    )


def reasons(sim: CloudSim) -> list[str]:
    """Why connections ended."""
    return [
        event.facts["reason"]
        for event in sim.recorder.since(0)[1]
        if isinstance(event, Happened) and event.what in ("disconnected", "unserved-closed")
    ]


# --- headers and streams ------------------------------------------------------------------------------


def test_the_headers_are_acknowledged_and_open_a_session(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_raw(sim) as node:
            node.write(0, header_package())
            answer = await node.message(1, 0)
            assert (answer.header.parent_msg_id, answer.content) == ("header", b"ack")
            assert (answer.route.operation, answer.route.resource) == ("response", "header")
            (session,) = sim.sessions()
            assert (session["node"], session["state"], session["transport"]) == ("edge-a", "served", "quic")

    run(scenario())


@pytest.mark.parametrize(
    "content", [b"no JSON", b"[]", b'{"Node_id":"edge-a"}', b"", None], ids=["text", "list", "string", "empty", "null"]
)
def test_headers_that_are_none_get_a_nack_and_the_hub_goes_on_without_a_name(tmp_path: Path, content: Any) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_raw(sim) as node:
            node.write(0, quic_message("header", "header", content=content))
            assert (await node.message(1, 0)).content == b"nack"
            node.write(4, b"msg" + quic_message())
            await node.barrier()
            assert [session["node"] for session in sim.sessions()] == [""]
            assert len(sim.uploads("")) == 1

    run(scenario())


def test_header_names_in_another_spelling_are_not_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_raw(sim) as node:
            node.write(0, header_package(content={"node_id": ["edge-a"]}))
            assert (await node.message(1, 0)).content == b"ack"
            assert not sim.is_served("edge-a")
            assert sim.is_served("")

    run(scenario())


def test_later_packages_on_the_control_stream_are_each_acknowledged_and_go_nowhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            node.write(0, quic_message("upload", id="c1") + quic_message("config", id="c2"))
            answers = [await node.message(number, 0) for number in (2, 3)]
            assert [(each.header.parent_msg_id, each.content) for each in answers] == [("c1", b"ack"), ("c2", b"ack")]
            assert sim.uploads() == []

    run(scenario())


def test_messages_go_both_ways_on_the_stream_that_the_node_opened(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            node.write(4, quic_message(content=b'{"a":1}'))
            await node.barrier()
            (upload,) = sim.uploads()
            assert (upload.content, upload.data, upload.resource) == (b'{"a":1}', b'{"a":1}', "t")
            assert b'"transport":"quic","text":"{\\"a\\":1}"' in upload.line()
            for content, expected in (({"x": "<"}, b'{"x":"\\u003c"}'), ("é", "é".encode()), (b"\0\xff", b"\0\xff")):
                sim.send_command("edge-a", "topic", content)
                assert (await node.message(len(node.messages()) + 1, 4)).content == expected
            assert sorted(node.data) == [0, 4]

    run(scenario())


def test_the_hub_opens_a_stream_of_its_own_when_there_is_none_and_is_answered_on_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_raw(sim) as node:
            await node.greet()
            sim.send_command("edge-a", "topic", "first")
            sim.send_command("edge-a", "topic", "second")
            assert (await node.message(2, 1)).content == b"second"
            assert bytes(node.data[1][:3]) == b"msg"
            node.write(1, quic_message())
            await node.barrier(1)
            assert len(sim.uploads()) == 1

    run(scenario())


def test_objects_are_sent_again_until_they_are_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudsim.queues.RETRY_SECONDS", 0.05)

    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            assert send_object(sim)["queue"] == "ack"
            first, second = await node.message(1), await node.message(2)
            assert first == second  # the same id and bytes
            assert (first.header.resourceversion, first.route.resource) == ("", "default/configmap/cm")
            node.write(4, quic_message("response", parent=first.header.msg_id))
            await until(lambda: sim.sessions()[0]["queued_objects"] == 0, "the ACK")
            assert send_object(sim)["dropped"] == "version 1 is acknowledged already"

    run(scenario())


def test_ping_and_config_among_the_messages_are_not_answered(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            for operation in ("ping", "pong", "config"):
                node.write(4, quic_message(operation, source="edged"))
            await node.barrier()
            assert len(node.messages()) == 1
            assert len([each for each in sim.messages("edgecontroller") if not each.from_hub]) == 3

    run(scenario())


def test_the_query_of_the_cluster_ca_is_answered_after_all_before_it_on_its_stream(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            node.write(4, b"".join(quic_message(id=f"m{number}") for number in range(300)) + CA_QUERY)
            answer = await node.message()
            assert len(sim.uploads()) == 300
            assert (answer.header.parent_msg_id, answer.route.source) == ("ca", "cloudhub")
            assert answer.content == sim.ca.certificate.read_bytes()

    run(scenario())


# --- what is wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [package_header(1) + b"\xff", bytes.fromhex("0101010001000200000161"), packages([bytes.fromhex("0a02ffff1200")])],
    ids=["no protobuf", "too long", "no UTF-8"],
)
def test_what_cannot_be_read_costs_its_stream_only(tmp_path: Path, bad: bytes) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            node.write(4, bad)
            await node.wait(lambda: 4 in node.resets and 4 in node.stops)
            assert (node.resets[4], node.stops[4]) == (1, 1)
            node.write(8, b"msg" + quic_message())
            await node.barrier(8)
            assert len(sim.uploads()) == 1
            assert node.ended is None

    run(scenario())


@pytest.mark.parametrize("payload", ["", "0a00", "1200"])
def test_a_payload_without_header_or_router_takes_the_whole_hub_down(tmp_path: Path, payload: str) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim, "edge-b") as other, served(sim, "edge-c") as third:
            async with quic_served(sim) as node:
                node.write(4, packages([bytes.fromhex(payload)]))
                await node.wait(lambda: node.ended)
            await other.wait(lambda: other.ended)
            assert await third.ends()
            assert sim.recorder.happened["crashed"] == 1
            assert sim.sessions() == []

    run(scenario())


def test_a_stream_that_ends_before_its_use_type_ends_the_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_raw(sim) as node:
            await node.greet()
            node.write(4, b"ms", end=True)
            assert (await node.wait(lambda: node.ended)).error_code == 0
            assert reasons(sim) == ["stream 4 ended before its use type"]

    run(scenario())


def test_a_stream_that_the_node_resets_or_refuses_is_not_used_any_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            await node.barrier()
            node.quic.reset_stream(4, 7)
            node.quic.stop_stream(4, 7)
            node.transmit()
            await node.wait(lambda: 4 in node.stops)
            sim.send_command("edge-a", "topic", "on another")
            assert (await node.message(1, 1)).content == b"on another"

    run(scenario())


def test_a_node_that_speaks_before_its_headers_is_heard_after_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_raw(sim) as node:
            node.quic.send_stream_data(0, b"")  # opened first, written to last
            node.write(4, b"msg" + quic_message())
            assert await node.is_quiet()
            assert sim.uploads() == []
            await node.greet()
            await sim.wait_for_uploads(1, "edge-a")

    run(scenario())


# --- sessions -------------------------------------------------------------------------------------------


def test_keepalives_keep_the_session_and_nothing_else_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path, keepalive_seconds=0.4) as sim, quic_served(sim) as node:
            for _ in range(4):
                await asyncio.sleep(0.2)  # half of the keepalive limit
                node.write(4, quic_message("keepalive", "node", source="websocket", group="resource"))
            assert sim.is_served("edge-a")
            while not (node.stops or node.ended):
                node.write(4, quic_message())
                await asyncio.sleep(0.05)  # a pace of sending, until the session ends
            ended = await node.wait(lambda: node.ended)
            assert (ended.error_code, ended.frame_type, node.resets) == (0, None, {4: 1})
            assert reasons(sim) == ["no keepalive in time"]

    run(scenario())


def test_a_rejected_connection_stays_open_is_read_from_and_gets_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path, node_limit=1) as sim, quic_served(sim, "edge-b"), quic_served(sim) as node:
            node.write(4, quic_message() + CA_QUERY)
            await sim.wait_for_uploads(1, "edge-a")
            assert sim.send_command("edge-a", "t", "x")["dropped"]
            assert await node.is_quiet()
            assert [session["state"] for session in sim.sessions()] == ["served", "rejected"]

    run(scenario())


@pytest.mark.parametrize("second", [served, quic_served], ids=["websocket", "quic"])
def test_a_second_connection_of_a_node_replaces_the_first_over_either_transport(tmp_path: Path, second: Any) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            send_object(sim)
            await node.message()
            async with second(sim):
                await node.wait(lambda: node.ended)
                (session,) = sim.sessions()
                assert (session["state"], session["queued_objects"]) == ("served", 0)

    run(scenario())


def test_kick_deletion_and_restart_end_the_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim:
            for end in (lambda: sim.kick("edge-a"), lambda: sim.delete_node("edge-a")):
                async with quic_served(sim) as node:
                    end()
                    assert (await node.wait(lambda: node.ended)).error_code == 0
            async with quic_served(sim) as node:
                await sim.inject("restart", seconds=0.05)
                await node.wait(lambda: node.ended)
            async with quic_served(sim):
                pass

    run(scenario())


def test_the_end_of_the_node_is_told_with_its_code(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim:
            async with quic_served(sim) as node:
                node.close(error_code=9, reason_phrase="bye")
            await until(lambda: not sim.is_served("edge-a"), "the end of the session")
            assert reasons(sim) == ["the node closed (0x9: bye)"]
            assert sim._quic is not None
            assert not sim._quic._connections

    run(scenario())


# --- TLS ------------------------------------------------------------------------------------------------


async def refusal(sim: CloudSim, configuration: QuicConfiguration) -> int:
    """The error code with which a connection is refused."""
    try:
        async with quic_raw(sim, configuration=configuration) as node:
            node.write(0, header_package())
            ended = await node.wait(lambda: node.ended)
            return int(ended.error_code)
    except ConnectionError:
        return -1


def wrong_certificate(sim: CloudSim, directory: Path, kind: str) -> QuicConfiguration:
    configuration = client_configuration(sim, None)
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    match kind:
        case "none":
            return configuration
        case "other CA":
            pair = Authority(directory / "other").node("edge-a")
        case "expired":
            pair = sim.authority.node("edge-a", file_name="old", not_before=now - 2 * day, lifetime=day)
        case "not yet":
            pair = sim.authority.node("edge-a", file_name="new", not_before=now + day)
        case _:
            pair = sim.authority.node("edge-a", file_name="server-only", server_only=True)
    configuration.load_cert_chain(pair.certificate, pair.key)
    return configuration


@pytest.mark.parametrize(
    ("kind", "alert"), [("none", 116), ("other CA", 48), ("expired", 45), ("not yet", 45), ("server only", 42)]
)
def test_a_client_certificate_that_does_not_verify_gets_the_alert_of_the_contract(
    tmp_path: Path, kind: str, alert: int
) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim:
            assert await refusal(sim, wrong_certificate(sim, tmp_path, kind)) == 0x100 + alert
            assert sim.sessions() == []

    run(scenario())


def test_authorization_needs_one_certificate_with_the_name_of_the_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path, enforce_authorization=True) as sim:
            async with quic_served(sim):
                assert sim.is_served("edge-a")
            other = client_configuration(sim, "edge-b")
            with_ca = client_configuration(sim, "edge-a")
            with_ca.certificate_chain = [*with_ca.certificate_chain, sim.authority._certificate]
            for configuration in (other, with_ca):
                async with quic_raw(sim, configuration=configuration) as node:
                    await node.greet()
                    assert [each["state"] for each in sim.sessions() if each["node"] == "edge-a"][-1] == "rejected"

    run(scenario())


@pytest.mark.parametrize("enforced", [False, True])
def test_as_over_googles_quic_no_certificate_is_seen(tmp_path: Path, enforced: bool) -> None:
    async def scenario() -> None:
        async with (
            quic_cloud(tmp_path, quic_client_certificates=False, enforce_authorization=enforced) as sim,
            quic_raw(sim, None) as node,
        ):
            await node.greet()
            assert sim.is_served("edge-a") is not enforced

    run(scenario())


def test_a_protocol_that_is_asked_for_must_be_offered(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path, quic_alpn=("kubeedge",)) as sim:
            assert await refusal(sim, client_configuration(sim, "edge-a", alpn=["h3"])) == -1
            async with quic_raw(sim, configuration=client_configuration(sim, "edge-a", alpn=["kubeedge"])) as node:
                await node.greet()

    run(scenario())


def test_other_versions_are_told_which_one_is_spoken(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim:
            assert sim.quic_port is not None
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[bytes] = loop.create_future()

            class Probe(asyncio.DatagramProtocol):
                def datagram_received(self, data: bytes, address: Any) -> None:
                    answer.set_result(data)

            transport, _ = await loop.create_datagram_endpoint(Probe, remote_addr=("127.0.0.1", sim.quic_port))
            transport.sendto(b"\x80rubbish")
            transport.sendto(b"\xc0" + bytes.fromhex("6b3343cf") + b"\x08abcdefgh\x04wxyz" + bytes(1200))
            data = await answer
            transport.close()
            assert data[1:5] == bytes(4)
            assert data[5:] == b"\x04wxyz\x08abcdefgh" + bytes.fromhex("00000001")

    run(scenario())


def test_of_many_datagrams_at_once_each_reaches_its_connection(tmp_path: Path) -> None:
    class Counted:
        datagrams = 0
        turns = 0

        def datagram(self, data: bytes, address: Any) -> None:
            self.datagrams += 1

        def progress(self) -> None:
            self.turns += 1

    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim:
            counted, identifier = Counted(), b"8 bytes!"
            assert sim._quic is not None
            assert sim.quic_port is not None
            sim._quic.add(identifier, counted)  # type: ignore[arg-type]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(200):
                    sender.sendto(b"\x40" + identifier + bytes(30), ("127.0.0.1", sim.quic_port))
            await until(lambda: counted.datagrams == 200)
            assert counted.turns < 10
            sim._quic.remove(identifier)

    run(scenario())


def test_garbage_on_the_port_harms_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        chance = random.Random(5)
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            listener = sim._quic
            assert listener is not None
            known = list(listener._connections)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw_socket:
                for _ in range(300):
                    size = chance.choice([0, 1, 20, 1200, 1500])
                    first = chance.choice([b"", b"\xc3\0\0\0\1\x08" + chance.choice(known)[:8], b"\x40" + known[0]])
                    raw_socket.sendto(first + chance.randbytes(size), ("127.0.0.1", listener.port))
                    await asyncio.sleep(0)
            node.write(4, quic_message())
            await node.barrier()
            assert len(sim.uploads()) == 1

    run(scenario())


# --- flow control, faults -------------------------------------------------------------------------------


async def flood(node: QuicNode, count: int) -> None:
    """Hand over many messages of 100 kB."""
    for number in range(count):
        node.write(4, quic_message(id=f"m{number}", content=bytes(100_000)))
        await asyncio.sleep(0)


def test_what_is_not_read_is_held_back_by_flow_control_and_read_afterwards(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            await node.barrier()
            await sim.inject("stall", "edge-a")
            await flood(node, 60)
            stream = node.quic._streams[4].sender
            await until(lambda: stream.highest_offset >= STREAM_WINDOW_BYTES, "the window to fill")
            assert await node.is_quiet()
            assert stream.highest_offset <= STREAM_WINDOW_BYTES + 1000
            assert sim.uploads() == []
            await sim.inject("clear", "edge-a")
            assert len(await sim.wait_for_uploads(60)) == 60

    run(scenario())


def test_the_windows_slide_and_do_not_grow(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            await flood(node, 180)
            await sim.wait_for_uploads(180)
            await node.barrier()
            sent = node.quic._streams[4].sender.highest_offset
            assert sent > CONNECTION_WINDOW_BYTES
            assert node.quic._streams[4].max_stream_data_remote <= sent + STREAM_WINDOW_BYTES
            assert node.quic._remote_max_data <= node.quic._remote_max_data_used + CONNECTION_WINDOW_BYTES

    run(scenario())


def test_a_node_that_does_not_read_holds_up_the_hub_and_nothing_is_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim:
            configuration = client_configuration(sim, "edge-a", max_data=65536, max_stream_data=65536)
            async with quic_raw(sim, configuration=configuration) as node:
                await node.greet()
                node.write(4, b"msg")
                await node.barrier()
                limits = node.quic._write_connection_limits, node.quic._write_stream_limits
                node.quic._write_connection_limits = node.quic._write_stream_limits = lambda **_: None
                for number in range(40):
                    sim.send_command("edge-a", "t", f"{number:03}" + "x" * 10_000)
                await until(lambda: sim.sessions()[0]["queued_messages"] > 0, "a queue")
                assert len(node.messages()) < 10
                node.quic._write_connection_limits, node.quic._write_stream_limits = limits
                node.write(4, quic_message())
                await node.message(41)
                found = [each.content[:3] for each in node.messages()[1:]]
                assert found == [b"%03d" % number for number in range(40)]

    run(scenario())


def test_messages_survive_a_lossy_line(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path, seed=3) as sim, quic_served(sim) as node:
            await sim.inject("loss", rate=0.05)
            for number in range(200):
                node.write(4, quic_message(id=f"m{number}", content=bytes(1000)))
                sim.send_command("edge-a", "t", f"{number}" + "x" * 1000)
            await sim.wait_for_uploads(200)
            await node.message(200)
            assert sim.recorder.counts()["distinct"] == 200

    run(scenario())


def test_throttle_and_delay_slow_the_line_down(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            await node.barrier()
            await sim.inject("delay", seconds=0.2)
            begun = time.monotonic()
            await node.barrier()
            assert time.monotonic() - begun >= 0.19
            await sim.inject("clear")
            await sim.inject("throttle", bytes_per_second=100_000)
            begun = time.monotonic()
            node.write(4, quic_message(content=bytes(30_000)))
            await node.barrier()
            assert time.monotonic() - begun > 0.25

    run(scenario())


def test_half_open_says_and_hears_nothing_until_it_is_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            await node.barrier()
            await sim.inject("half-open", "edge-a")
            node.write(4, quic_message() + CA_QUERY)
            sim.send_command("edge-a", "t", "x")
            assert await node.is_quiet()
            assert sim.uploads() == []
            await sim.inject("clear", "edge-a")
            await node.message(3)
            assert len(sim.uploads()) == 1

    run(scenario())


def test_a_half_open_connection_stays_silent_when_its_session_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path, keepalive_seconds=0.3) as sim, quic_served(sim) as node:
            await sim.inject("half-open", "edge-a")
            await until(lambda: not sim.is_served("edge-a"), "the keepalive limit")
            assert await node.is_quiet()

    run(scenario())


def test_slow_pong_delays_what_the_hub_answers_itself(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            await node.barrier()
            await sim.inject("slow-pong", "edge-a", seconds=0.2)
            begun = time.monotonic()
            node.write(4, CA_QUERY)
            node.write(0, quic_message("config"))
            sim.send_command("edge-a", "t", "at once")
            assert (await node.message(2)).content == b"at once"
            assert (await node.message(3)).route.source == "cloudhub"
            assert (await node.message(2, 0)).content == b"ack"
            assert time.monotonic() - begun >= 0.19

    run(scenario())


def test_close_mid_frame_ends_inside_the_next_message(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            await node.barrier()
            before = len(node.data[4])
            await sim.inject("close-mid-frame", "edge-a")
            sim.send_command("edge-a", "t", "x" * 1000)
            await node.wait(lambda: node.ended)
            assert 0 < len(node.data[4]) - before < 1000

    run(scenario())


@pytest.mark.parametrize(("dispatched", "arrived"), [(False, 2), (True, 3)])
def test_drop_at_ends_the_connection_at_the_nth_message(tmp_path: Path, dispatched: bool, arrived: int) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            await sim.inject("drop-at", "edge-a", count=3, dispatched=dispatched)
            node.write(4, b"".join(quic_message(id=f"m{number}") for number in range(5)))
            await node.wait(lambda: node.ended)
            assert len(sim.uploads()) == arrived

    run(scenario())


def test_refuse_answers_no_new_connection_and_keeps_the_present_ones(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            await sim.inject("refuse")
            with pytest.raises(ConnectionError):
                async with quic_raw(sim, configuration=client_configuration(sim, "edge-b", idle_timeout=0.3)):
                    pass
            await node.barrier()
            await sim.inject("clear")
            async with quic_served(sim, "edge-b"):
                pass

    run(scenario())


def test_a_node_may_move_to_another_address(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim) as node:
            await node.barrier()
            loop = asyncio.get_running_loop()
            old: Any = node._transport
            transport, _ = await loop.create_datagram_endpoint(
                lambda: node, local_addr=(old.get_extra_info("sockname")[0], 0)
            )
            node.write(4, quic_message())
            await node.barrier()
            assert len(sim.uploads()) == 1
            assert sim.sessions()[0]["connection"] == 1
            old.close()
            transport.close()

    run(scenario())


def test_websocket_and_quic_nodes_are_served_side_by_side(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim, quic_served(sim, "edge-a") as one, served(sim, "edge-b") as two:
            assert {each["node"]: each["transport"] for each in sim.sessions()} == {
                "edge-a": "quic",
                "edge-b": "websocket",
            }
            for node in ("edge-a", "edge-b"):
                sim.send_command(node, "t", {"a": 1})
            assert (await one.message()).content == b'{"a":1}'
            assert (await two.message())["content"] == {"a": 1}

    run(scenario())
