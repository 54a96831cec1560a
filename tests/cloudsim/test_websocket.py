"""The double's websocket on real sockets. What a real CloudHub was recorded doing: test_vectors.py."""

from __future__ import annotations

import asyncio
import datetime
import ssl
import time
from pathlib import Path
from typing import Any

import pytest

from cloudsim import Fault
from cloudsim.certificates import Authority
from cloudsim.recorder import Happened
from tests.cloudsim.rawnode import (
    KEEPALIVE_FRAME,
    RawNode,
    client_context,
    cloud,
    frame,
    message,
    raw,
    served,
    tls_failure,
    upgrade_text,
)
from tests.support.aio import run, until
from tests.support.deadline import DEADLINE


def test_a_single_frame_of_8_mib_passes_in_both_directions(tmp_path: Path) -> None:
    async def scenario() -> None:
        content = "x" * 2**23
        async with cloud(tmp_path) as sim, served(sim) as node:
            await node.send(frame(1, message(content=content)))
            await node.barrier()
            assert sim.uploads()[0].content == content
            sim.send_command("edge-a", "t", content)
            assert (await node.message())["content"] == content

    run(scenario())


# --- handshake and TLS ------------------------------------------------------------------------------


def test_a_refused_request_leaves_the_connection_open_for_the_next(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, raw(sim, "edge-a") as node:
            assert "403 Forbidden" in await node.request(upgrade_text({"Origin": "https://evil.example"}))
            assert await node.reader.readexactly(10) == b"Forbidden\n"
            await node.upgrade("edge-a")

    run(scenario())


def test_bytes_before_the_response_end_the_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, raw(sim, "edge-a") as node:
            await node.send(upgrade_text({"node_id": "edge-a"}).encode() + KEEPALIVE_FRAME)
            assert await node.ends()
            assert sim.sessions() == []

    run(scenario())


def test_what_is_no_request_is_answered_400_and_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            for garbage in (b"hello\r\n\r\n", b"x" * 70_000):
                async with raw(sim, "edge-a") as node:
                    await node.send(garbage)
                    assert (await node.reader.read()).startswith(b"HTTP/1.1 400 Bad Request\r\n")

    run(scenario())


def test_a_client_that_offers_h2_gets_h2(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            async with raw(sim, "edge-a", alpn=["h2", "http/1.1"]) as node:
                assert node.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
                assert not (await node.reader.read()).startswith(b"HTTP/1.1")
            async with raw(sim, "edge-a", alpn=["http/1.1"]) as node:
                assert node.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
                await node.upgrade("edge-a")

    run(scenario())


def test_a_certificate_of_the_ca_is_required(tmp_path: Path) -> None:
    async def scenario() -> None:
        other = Authority(tmp_path / "other").node("edge-a")
        async with cloud(tmp_path / "sim") as sim:
            authority = sim.authority
            expired = authority.node(
                "edge-a", file_name="expired", not_before=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
            )
            serving = authority.node("edge-a", file_name="serving", server_only=True)
            for pair, alert in (
                (None, "TLSV13_ALERT_CERTIFICATE_REQUIRED"),
                (other, "TLSV1_ALERT_UNKNOWN_CA"),
                (expired, "SSLV3_ALERT_CERTIFICATE_EXPIRED"),
                (serving, "ALERT"),  # OpenSSL says unsupported certificate where Go says bad certificate
            ):
                context = client_context(sim, None)
                if pair is not None:
                    context.load_cert_chain(pair.certificate, pair.key)
                assert alert in await tls_failure(sim, context)
            assert "HANDSHAKE_FAILURE" in await tls_failure(
                sim, client_context(sim, None, version=ssl.TLSVersion.TLSv1_2)
            )
            assert "101" in await tls_failure(sim, client_context(sim, "edge-a", version=ssl.TLSVersion.TLSv1_2))
            assert "101" in await tls_failure(sim, client_context(sim, "edge-a", version=ssl.TLSVersion.TLSv1_3))

    run(scenario())


def test_tls_1_2_takes_only_the_three_suites(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            for suite, accepted in (
                ("ECDHE-ECDSA-AES128-GCM-SHA256", True),
                ("ECDHE-ECDSA-AES256-GCM-SHA384", True),
                ("ECDHE-ECDSA-CHACHA20-POLY1305", True),
                ("ECDHE-ECDSA-AES128-SHA256", False),
                ("ECDHE-RSA-AES128-GCM-SHA256", False),
            ):
                context = client_context(sim, "edge-a", version=ssl.TLSVersion.TLSv1_2)
                context.set_ciphers(suite)
                assert ("101" in await tls_failure(sim, context)) is accepted, suite

    run(scenario())


def test_enforced_authorization_serves_one_certificate_of_the_node_and_leaves_the_rest_in_silence(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, enforce_authorization=True, keepalive_seconds=0.3) as sim:
            with_ca = client_context(sim, "edge-a")
            with_ca.load_verify_locations(sim.ca.certificate)  # OpenSSL then sends the CA along
            for context, node_id in ((with_ca, "edge-a"), (client_context(sim, "edge-b"), "edge-a")):
                node = await RawNode.connect(sim, context)
                await node.upgrade(node_id)
                assert not sim.is_served("edge-a")
                await node.barrier()
                await node.send(frame(1, message("query", "k8s/ca.crt", group="meta")))
                await node.send(frame(1, message(id="up", content=node_id)))
                await node.barrier()
                await asyncio.sleep(0.4)  # beyond the keepalive limit, which does not apply to it
                await node.barrier()
                assert sim.sessions()[-1]["state"] == "rejected"
                await node.aclose()
            assert len(sim.uploads()) == 2
            async with served(sim) as good:
                assert sim.is_served("edge-a")
                await good.send(frame(1, message("query", "k8s/ca.crt", group="meta")))
                assert (await good.message())["content"].startswith("-----BEGIN")

    run(scenario())


# --- sessions ----------------------------------------------------------------------------------------


def test_a_pong_proves_that_300_messages_were_dispatched_in_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            await node.send(*(frame(1, message(id=f"m{n}")) for n in range(300)), frame(9, b"sync"))
            assert await node.frame() == (True, 10, b"sync")
            assert [upload.id for upload in sim.uploads()] == [f"m{n}" for n in range(300)]

    run(scenario())


def test_a_silent_node_is_dropped_without_a_close_frame(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, keepalive_seconds=0.3) as sim, served(sim) as node:
            begun = time.monotonic()
            await asyncio.sleep(0.15)  # half of the keepalive limit
            await node.send(KEEPALIVE_FRAME)
            assert await node.ends()
            assert 0.4 < time.monotonic() - begun < DEADLINE

    run(scenario())


def test_without_connection_use_nothing_is_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, keepalive_seconds=0.4) as sim, raw(sim, "edge-a") as node:
            await node.request(upgrade_text({"node_id": "edge-a"}))
            assert sim.is_served("edge-a")
            await node.send(KEEPALIVE_FRAME, frame(1, message()), frame(9, b"p"))
            assert await node.is_quiet()
            assert await node.ends()
            assert sim.uploads() == []

    run(scenario())


def test_a_replaced_connection_ends_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as old, served(sim) as new:
            assert await old.ends()
            await new.barrier()
            assert [view["node"] for view in sim.sessions()] == ["edge-a"]

    run(scenario())


def test_the_replacement_race_takes_both(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, replacement_race=1.0) as sim, served(sim) as old, served(sim) as new:
            assert await old.ends()
            assert await new.ends()

    run(scenario())


def test_kick_and_deletion_end_the_connection_without_a_close_frame(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            for act in (sim.kick, sim.delete_node):
                async with served(sim) as node:
                    act("edge-a")
                    assert await node.ends()

    run(scenario())


def test_a_cloud_application_sends_and_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            waiting = asyncio.create_task(sim.wait_served("edge-a"))
            async with served(sim) as node:
                await waiting
                sim.subscribe("edge-a", "default/t")
                sim.send_command("edge-a", "a/b", {"on": True}, message_id="c1")
                sim.unsubscribe("edge-a", "default/t")
                found = [await node.message() for _ in range(3)]
                assert [item["route"]["operation"] for item in found] == ["subscribe", "publish", "unsubscribe"]
                assert found[1]["header"]["msg_id"] == "c1"
                assert found[1]["route"] == {
                    "source": "router_eventbus",
                    "group": "user",
                    "operation": "publish",
                    "resource": "a/b",
                }
                uploads = asyncio.create_task(sim.wait_for_uploads(2, "edge-a"))
                await node.send(frame(1, message(id="u1")), frame(1, message(id="u2")))
                assert [upload.id for upload in await uploads] == ["u1", "u2"]
                assert len(await sim.wait_for_uploads(2)) == 2

    run(scenario())


def test_a_node_that_does_not_read_blocks_the_hubs_writer_and_nothing_is_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            count = 400
            for number in range(count):
                result = sim.send_command("edge-a", "t", f"{number:06}" + "x" * 100_000)
                assert result["dropped"] is None
                await asyncio.sleep(0)
            assert sim.sessions()[0]["queued_messages"] > 0
            for number in range(count):
                assert (await node.message())["content"][:6] == f"{number:06}"

    run(scenario())


def test_the_reason_of_an_end_is_told_to_the_observer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, max_message_bytes=1000) as sim:
            for data, reason in (
                (frame(8, b"\x03\xe8"), "the node sent a close frame"),
                (b"\x81\x01x", "protocol violation: bad MASK"),
                (frame(1, b"x" * 1001), "a message above max_message_bytes"),
                (frame(1, b"[1]"), "undecodable message: message: a JSON list where an object belongs"),
            ):
                async with served(sim) as node:
                    await node.send(data)
                    await node.reader.read()
                events = [event for event in sim.recorder.since(0)[1] if isinstance(event, Happened)]
                assert events[-1].facts["reason"] == reason

    run(scenario())


# --- faults -------------------------------------------------------------------------------------------


def test_drop_ends_the_connection_without_a_close_frame(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node, served(sim, "edge-b") as other:
            await sim.inject("drop", "edge-a")
            assert await node.ends()
            await other.barrier()

    run(scenario())


def test_half_open_keeps_the_socket_and_says_nothing_even_when_the_session_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, keepalive_seconds=0.3) as sim, served(sim) as node:
            await sim.inject("half-open", "edge-a")
            sim.send_command("edge-a", "t", "x")
            await node.send(KEEPALIVE_FRAME, frame(9, b"p"))
            await until(lambda: not sim.is_served("edge-a"), "the keepalive limit")
            assert await node.is_quiet()

    run(scenario())


def test_a_stalled_connection_is_not_read_but_written_to_and_goes_on_after_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            await sim.inject("stall", "edge-a")
            await node.send(frame(1, message()), frame(9, b"p"))
            sim.send_command("edge-a", "t", "down")
            assert (await node.message())["content"] == "down"
            assert await node.is_quiet()
            assert sim.uploads() == []
            await sim.inject("clear")
            assert await node.frame() == (True, 10, b"p")
            assert len(sim.uploads()) == 1

    run(scenario())


def test_a_stall_can_end_by_itself(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            await sim.inject("stall", seconds=0.2)
            await node.send(frame(9, b"p"))
            assert await node.is_quiet()
            assert await node.frame() == (True, 10, b"p")

    run(scenario())


def test_throttle_slows_both_directions_down(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            await sim.inject("throttle", "edge-a", bytes_per_second=100_000)
            begun = time.monotonic()
            await node.send(frame(1, message(content="x" * 30_000)), frame(9, b"p"))
            assert await node.frame() == (True, 10, b"p")
            up = time.monotonic()
            sim.send_command("edge-a", "t", "y" * 30_000)
            await node.message()
            assert up - begun > 0.25
            assert time.monotonic() - up > 0.25

    run(scenario())


def test_delay_adds_round_trip_time_also_to_later_connections(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as early:
            await sim.inject("delay", seconds=0.2)
            begun = time.monotonic()
            await early.barrier()
            assert time.monotonic() - begun >= 0.19
            async with served(sim, "edge-b") as late:
                begun = time.monotonic()
                await late.barrier()
                assert time.monotonic() - begun >= 0.19
                await sim.inject("clear")
                begun = time.monotonic()
                await late.barrier()
                assert time.monotonic() - begun < 0.19

    run(scenario())


def test_slow_pong_answers_late_and_keeps_dispatching(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            await sim.inject("slow-pong", "edge-a", seconds=0.2)
            begun = time.monotonic()
            await node.send(frame(9, b"p"), frame(1, message()))
            await sim.wait_for_uploads(1)
            assert await node.frame() == (True, 10, b"p")
            assert time.monotonic() - begun >= 0.19

    run(scenario())


def test_close_mid_frame_ends_inside_the_next_message(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            await sim.inject("close-mid-frame", "edge-a")
            await node.barrier()
            sim.send_command("edge-a", "t", "x" * 1000)
            rest = await node.reader.read()
            assert 0 < len(rest) < 1000
            assert not sim.is_served("edge-a")

    run(scenario())


@pytest.mark.parametrize(("dispatched", "arrived"), [(False, 2), (True, 3)])
def test_drop_at_ends_the_connection_at_the_nth_message(tmp_path: Path, dispatched: bool, arrived: int) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            await sim.inject("drop-at", "edge-a", count=3, dispatched=dispatched)
            await node.send(*(frame(1, message(id=f"m{n}")) for n in range(5)), frame(9, b"p"))
            assert await node.ends()
            assert len(sim.uploads()) == arrived

    run(scenario())


def test_reject_makes_silent_zombies_as_often_as_asked(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            await sim.inject("reject", "edge-a", count=2)
            for expected in (False, False, True):
                async with served(sim) as node:
                    assert sim.is_served("edge-a") is expected
                    await node.barrier()

    run(scenario())


def test_refuse_accepts_no_connection_until_cleared(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            await sim.inject("refuse")
            with pytest.raises(ConnectionRefusedError):
                await RawNode.connect(sim, client_context(sim, "edge-b"))
            await node.barrier()
            await sim.inject("clear")
            async with served(sim, "edge-b"):
                pass

    run(scenario())


def test_restart_drops_all_and_listens_again_on_the_same_port(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            port = sim.port
            async with served(sim) as node:
                await sim.inject("restart", seconds=0.1)
                assert await node.ends()
                with pytest.raises(ConnectionRefusedError):
                    await RawNode.connect(sim, client_context(sim, "edge-a"))
            await until(lambda: sim._listener.is_open, "the listener")
            async with served(sim):
                assert sim.port == port

    run(scenario())


@pytest.mark.parametrize(
    "wrong",
    [
        {"fault": "delay"},
        {"fault": "slow-pong"},
        {"fault": "throttle"},
        {"fault": "throttle", "bytes_per_second": 0.0},
        {"fault": "drop-at"},
        {"fault": "drop-at", "count": 0},
        {"fault": "stall", "seconds": -1.0},
        {"fault": "tls"},
        {"fault": "tls", "wrong": "expired", "node": "edge-a"},
        {"fault": "loss"},
        {"fault": "loss", "rate": 1.5},
    ],
)
def test_a_fault_without_what_it_needs_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Fault(**wrong)
