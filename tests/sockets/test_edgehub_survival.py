"""edgehub against cloudsim on loopback TLS: cuts, dead paths, zombies, floods, slow links."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from cloudsim import CloudSim, HubVersion
from modules.edgehub.config import Endpoint
from modules.edgehub.hub import EdgeHub
from runtime.emp import Priority
from runtime.errors import Refused
from runtime.message import Message
from runtime.names import Group
from tests.modules.edgehub.fakes import FakeDeferral, hand_over, running, upload
from tests.modules.edgehub.simulated import NODE, cloud, command, config_map, served, settings, state
from tests.support.aio import run, until
from tests.support.narrow import NarrowLine


async def send_all(hub: EdgeHub, count: int, begin: int = 0) -> list[FakeDeferral]:
    deferrals = []
    for number in range(begin, begin + count):
        deferral = await hand_over(hub, upload(number))
        assert deferral is not None
        deferrals.append(deferral)
    return deferrals


def is_done(deferrals: list[FakeDeferral]) -> bool:
    return all(deferral.outcome == "done" for deferral in deferrals)


def numbers(sim: CloudSim) -> list[int]:
    return [received.content["number"] for received in sim.uploads(NODE)]


def test_uploads_arrive_once_and_in_order_and_are_settled(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as (hub, _):
            deferrals = await send_all(hub, 2000)
            await until(lambda: is_done(deferrals), "all settled")
            assert numbers(sim) == list(range(2000))
            assert [r.id for r in sim.uploads(NODE)] == [d.message.id for d in deferrals]
            assert hub.counters()["confirmed"] == 2000

    run(scenario())


def test_a_cloud_with_authorization_enforced_serves_us(tmp_path: Path) -> None:
    """It rejects whoever sends more than one certificate, without a word."""

    async def scenario() -> None:
        async with cloud(tmp_path, enforce_authorization=True) as sim, served(sim) as (hub, _):
            assert hub.counters()["connects"] == 1

    run(scenario())


def test_the_link_is_killed_twenty_times_and_nothing_is_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim, retry_cap_seconds=0.1) as (hub, _):
            deferrals: list[FakeDeferral] = []
            for kill in range(20):
                await sim.inject("drop-at", NODE, count=1 + (kill * 7) % 45, dispatched=kill % 2 == 0)
                deferrals += await send_all(hub, 50, begin=len(deferrals))
                await until(lambda k=kill: hub.counters()["connects"] > k + 1, "a new connection")
            await until(lambda: is_done(deferrals), "all settled")
            received = sim.uploads(NODE)
            assert hub.counters()["connects"] >= 21
            first = list(dict.fromkeys(r.content["number"] for r in received))
            assert first == list(range(1000)), "every upload arrives, in order"
            ids = {d.message.id for d in deferrals}
            assert {r.id for r in received} == ids, "ids do not change"
            # A repeat is possible only of what was not confirmed when a link was cut: never more than was in hand.
            assert len(received) - 1000 <= 20 * 50

    run(scenario())


def test_repeats_come_only_out_of_the_last_unconfirmed_window(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as (hub, _):
            settled = await send_all(hub, 100)
            await until(lambda: is_done(settled), "the first hundred settled")
            await sim.inject("slow-pong", NODE, seconds=1.0)
            open_ = await send_all(hub, 10, begin=100)
            await until(lambda: len(sim.uploads(NODE)) == 110, "they are in the cloud, without a pong")
            assert not any(d.outcome for d in open_)
            await sim.inject("clear")
            sim.kick(NODE)
            await until(lambda: is_done(open_), "settled over the second link")
            assert numbers(sim) == [*range(110), *range(100, 110)]

    run(scenario())


def test_a_half_open_link_is_found_in_seconds(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim, silence_seconds=0.5) as (hub, _):
            await sim.inject("half-open", NODE)
            begun = time.monotonic()
            deferrals = await send_all(hub, 1)
            await until(lambda: is_done(deferrals), "the upload over a new link")
            assert time.monotonic() - begun < 8.0
            assert hub.counters()["connects"] == 2

    run(scenario())


def test_an_idle_half_open_link_is_found_by_the_next_keepalive(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim, silence_seconds=0.5, heartbeat_seconds=0.3) as (hub, _):
            await sim.inject("half-open", NODE)
            await until(lambda: hub.counters()["connects"] >= 2 and state(hub) == "served", "a new link")

    run(scenario())


def test_a_hub_that_stops_reading_is_found_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim, silence_seconds=0.5) as (hub, _):
            await sim.inject("stall", NODE)
            deferrals = await send_all(hub, 1)
            await until(lambda: hub.counters()["connects"] >= 2, "a new link")
            await until(lambda: is_done(deferrals), "the upload")

    run(scenario())


def test_a_rejected_connection_is_found_and_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            await sim.inject("reject", NODE, count=1)
            async with running(settings(sim, greeting_seconds=0.3)) as (hub, _):
                await until(lambda: state(hub) == "served", "a served link")
                assert hub.counters()["connects"] == 2

    run(scenario())


def test_a_link_that_is_always_rejected_stays_unproven_and_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            await sim.inject("reject", NODE)
            async with running(settings(sim, greeting_seconds=0.1)) as (hub, _):
                await until(lambda: state(hub) == "unproven", "an unproven link")
                status = hub.link_status()
                assert status["unproven"]
                assert "none of 3 greetings" in status["why"]
                deferrals = await send_all(hub, 5)
                await until(lambda: is_done(deferrals), "uploads settled by pong all the same")
                await hand_over(hub, Message.build(source="s", group="g", resource="r", operation="ping"))
                await until(lambda: hub.counters()["received"] == 1, "the connection layer's ack")
                assert state(hub) == "unproven", "which proves nothing"

    run(scenario())


def test_a_cloudhub_before_1_17_is_unproven_until_it_sends_something(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, hub_version=HubVersion.BEFORE_1_17) as sim,
            running(settings(sim, greeting_seconds=0.1)) as (hub, bus),
        ):
            await until(lambda: state(hub) == "unproven", "an unproven link")
            sim.send(NODE, command(1))
            await until(lambda: state(hub) == "served", "proof")
            await until(lambda: bus.sent_to("eventbus"), "the command")

    run(scenario())


def test_the_next_endpoint_serves_when_the_first_does_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "a") as dead, cloud(tmp_path / "b") as alive:
            await dead.inject("refuse")
            config = settings(alive, endpoints=(Endpoint("127.0.0.1", dead.port), Endpoint("127.0.0.1", alive.port)))
            async with running(config) as (hub, _):
                await until(lambda: state(hub) == "served", "the second endpoint")
                assert hub.link_status()["endpoint"] == f"127.0.0.1:{alive.port}"

    run(scenario())


def test_a_hub_at_its_node_limit_makes_the_node_move_on_to_the_next_endpoint(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, node_limit=0) as full, cloud(tmp_path) as free:
            config = settings(
                free,
                endpoints=(Endpoint("127.0.0.1", full.port), Endpoint("127.0.0.1", free.port)),
                greeting_seconds=0.3,
            )
            async with running(config) as (hub, _):
                await until(lambda: state(hub) == "served", "the second endpoint")
                assert hub.link_status()["endpoint"] == f"127.0.0.1:{free.port}"
                assert hub.counters()["connects"] == 2
                assert not full.is_served(NODE)

    run(scenario())


def test_a_replaced_session_comes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as (first, _):
            async with running(settings(sim), seed=2) as (second, _):
                await until(lambda: first.counters()["connects"] + second.counters()["connects"] >= 4, "both to fight")
            await until(lambda: state(first) == "served", "the first one back")

    run(scenario())


def test_a_message_beyond_the_limit_is_passed_over_and_the_link_lives(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as (hub, bus):
            large = command(0)
            large.content = "x" * (16 * 2**20)
            sim.send(NODE, large)
            just = command(1)
            just.content = "y" * (8 * 2**20)
            sim.send(NODE, just)
            await until(lambda: bus.sent_to("eventbus"), "the 8 MiB message")
            (message,) = bus.sent_to("eventbus")
            assert message.content == b"y" * (8 * 2**20)
            assert hub.counters()["skipped_down"] == 1
            assert hub.counters()["connects"] == 1

    run(scenario())


def test_an_8_mib_upload_arrives_whole(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as (hub, _):
            message = Message.upload("a/b", "z" * (8 * 2**20))
            deferral = await hand_over(hub, message)
            assert deferral is not None
            await until(lambda: deferral.outcome == "done", "the settlement")
            (received,) = sim.uploads(NODE)
            assert received.content == "z" * (8 * 2**20)

    run(scenario())


def test_objects_are_acknowledged_once_their_owner_has_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as (hub, bus):
            meta = Group("meta")
            bus.slow.add(meta)
            for i in range(3):
                sim.send(NODE, config_map(f"c{i}", i + 1))
            await until(lambda: len(bus.sent_to(meta)) == 1, "the first object")
            await asyncio.sleep(0.05)
            assert len(bus.sent_to(meta)) == 1, "CloudHub sends the next one only after the ACK"
            for i in range(3):
                await until(lambda n=i: len(bus.sent_to(meta)) == n + 1, "the next object")
                bus.sent[-1].receipt.settle()
            await until(lambda: hub.counters()["acks"] == 3, "three ACKs")

    run(scenario())


def test_a_slow_module_does_not_hold_up_the_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as (_, bus):
            bus.slow.add(Group("meta"))
            sim.send(NODE, config_map("blocked", 1))
            await until(lambda: bus.sent_to(Group("meta")), "the object")
            for number in range(300):
                sim.send(NODE, command(number))
            await until(lambda: len(bus.sent_to("eventbus")) == 300, "the commands")
            assert [m.json()["number"] for m in bus.sent_to("eventbus")] == list(range(300))

    run(scenario())


def test_a_flood_of_commands_waits_in_the_socket_and_none_is_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim, downstream_messages=50) as (hub, bus):
            bus.slow.add("eventbus")
            for number in range(2000):
                sim.send(NODE, command(number))
            await until(lambda: hub.counters()["downstream_held"] >= 50, "the bound")
            for _ in range(20):
                await asyncio.sleep(0)
            held = hub.counters()["downstream_held"]
            assert held < 2000, "reading has stopped"
            settled = 0
            while settled < 2000:
                await until(lambda n=settled: len(bus.sent) > n, "more")
                for sent in bus.sent[settled:]:
                    sent.receipt.settle()
                    settled += 1
            assert [m.json()["number"] for m in bus.sent_to("eventbus")] == list(range(2000))

    run(scenario())


def test_a_modules_question_is_answered_as_its_reply_and_acknowledged(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as (hub, bus):
            question = Message.build(source="edged", group="meta", resource="k8s/ca.crt", operation="query")
            deferral = await hand_over(hub, question, priority=Priority.REQUEST, expects_reply=True)
            assert deferral is not None
            await until(lambda: bus.replies, "the answer")
            request, answer = bus.replies[0]
            assert request is question
            assert answer.parent_id == question.id
            assert answer.text().startswith("-----BEGIN CERTIFICATE-----")
            await until(lambda: deferral.outcome == "done", "the request settled by its answer")

    run(scenario())


def test_messages_wait_for_the_cloud_and_go_up_when_it_comes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            config = settings(sim)
            await sim.inject("refuse")
            async with running(config) as (hub, bus):
                deferrals = await send_all(hub, 500)
                assert state(hub) in ("closed", "dialling")
                assert not any(d.outcome for d in deferrals)
                await sim.inject("clear")
                await until(lambda: is_done(deferrals), "all settled")
                assert numbers(sim) == list(range(500))
                events = [m.content for g, _, m in bus.retained if g == Group("bus")]
                assert events == [b"cloud_disconnected", b"cloud_connected"]

    run(scenario())


def test_a_slow_link_is_not_taken_for_a_dead_one_and_its_window_stays_small(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, receive_buffer_bytes=8192) as sim, served(sim, silence_seconds=0.6) as (hub, _):
            await sim.inject("throttle", NODE, bytes_per_second=60_000)
            deferrals = [await hand_over(hub, upload(n, pad="x" * 1000)) for n in range(200)]
            await until(lambda: deferrals[20] and deferrals[20].outcome == "done", "the first ones")
            signal = await hand_over(hub, Message.build(source="twin", group="resource", operation="update"))
            assert signal is not None
            begun = time.monotonic()
            await until(lambda: signal.outcome == "done", "the signal")
            assert time.monotonic() - begun < 2.5, "it passed the data that waits"
            assert deferrals[-1] is not None
            assert deferrals[-1].outcome is None
            await until(lambda: is_done([d for d in deferrals if d]), "all of it")
            assert hub.counters()["connects"] == 1

    run(scenario())


def test_the_first_message_on_a_slow_link_is_refused_when_it_would_hold_it_for_long(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            with NarrowLine(sim.port, 60_000) as line:
                endpoints = (Endpoint("127.0.0.1", line.port),)
                async with running(settings(sim, endpoints=endpoints, silence_seconds=0.6)) as (hub, _):
                    await until(lambda: state(hub) == "served", "a served link")
                    with pytest.raises(Refused, match="too-large-for-link"):
                        await hand_over(hub, Message.upload("a/b", "z" * (2 * 2**20)))
                    deferral = await hand_over(hub, Message.upload("a/b", "z" * (200 * 1024)))
                    assert deferral is not None
                    await until(lambda: deferral.outcome == "done", "one that passes in a few seconds")
                    assert hub.counters()["connects"] == 1

    run(scenario())


def test_stopping_hands_over_what_is_under_way(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            async with served(sim) as (hub, _):
                deferrals = await send_all(hub, 1000)
            assert is_done(deferrals)
            assert numbers(sim) == list(range(1000))
            await until(lambda: not sim.is_served(NODE), "the session to end")

    run(scenario())


def test_broken_json_from_the_cloud_is_counted_and_the_link_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as (hub, bus):
            hub.receive(b'{"header":' + b"x" * 500)
            assert hub.counters()["invalid_down"] == 1
            assert state(hub) == "served"
            sim.send(NODE, command(1))
            await until(lambda: bus.sent_to("eventbus"), "the next message")

    run(scenario())
    (line,) = [r.getMessage() for r in caplog.records if "no message came" in r.getMessage()]
    assert len(line) < 400, "the first 200 bytes of it"
    assert json.dumps("x" * 500) not in line
