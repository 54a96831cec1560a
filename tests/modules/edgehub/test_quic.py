"""EdgeHub over QUIC against cloudsim, on lines that lose, delay, break and move."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cloudsim import CloudSim
from modules.edgehub.config import QUIC, WEBSOCKET, Endpoint
from modules.edgehub.hub import EdgeHub
from modules.edgehub.outbox import Class
from modules.edgehub.quic import CREDIT_BYTES, QuicLink
from runtime.emp import Priority
from runtime.message import BYTES, JSON, TEXT, Message
from runtime.names import Group
from tests.modules.edgehub.fakes import hand_over, running, upload
from tests.modules.edgehub.simulated import NODE, cloud, command, config_map, settings, state
from tests.support.aio import run, until
from tests.support.lossy import LossyLine


def quic_settings(sim: CloudSim, line: LossyLine | None = None, **changes: Any) -> Any:
    if line is not None:
        changes["endpoints"] = (Endpoint("127.0.0.1", line.port),)
    return settings(sim, protocol=QUIC, **changes)


def link_of(hub: EdgeHub) -> QuicLink:
    assert hub._connection is not None
    link = hub._connection._link
    assert isinstance(link, QuicLink)
    return link


def numbers(sim: CloudSim) -> list[int]:
    return [json.loads(each.content)["number"] for each in sim.uploads(NODE)]


async def is_served(hub: EdgeHub) -> None:
    await until(lambda: state(hub) == "served", "a served link")


@pytest.mark.parametrize("loss", [0.005, 0.05])
def test_nothing_is_lost_on_a_line_that_loses_datagrams(tmp_path: Path, loss: float) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, quic_port=0) as sim,
            LossyLine(sim.quic_port or 0, loss=loss, delay_seconds=0.002) as line,
            running(quic_settings(sim, line)) as (hub, bus),
        ):
            await is_served(hub)
            deferrals = []
            for number in range(2000):
                deferrals.append(await hand_over(hub, upload(number, pad="x" * 300)))
                if number % 5 == 0:
                    sim.send(NODE, command(number))
            await until(lambda: all(each and each.outcome == "done" for each in deferrals), "every upload settled")
            await until(lambda: len(bus.sent_to("eventbus")) == 400, "every command")
            assert numbers(sim) == list(range(2000)), "in order, each once"
            assert [m.json()["number"] for m in bus.sent_to("eventbus")] == list(range(0, 2000, 5))
            assert line.dropped > 0
            assert hub.counters()["connects"] == 1, "over one link all the time"

    run(scenario())


def test_a_half_open_link_is_found_and_everything_goes_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, quic_port=0) as sim,
            LossyLine(sim.quic_port or 0) as line,
            running(quic_settings(sim, line, silence_seconds=0.5)) as (hub, _),
        ):
            await is_served(hub)
            line.is_silent = True
            deferrals = [await hand_over(hub, upload(number)) for number in range(10)]
            await until(lambda: state(hub) != "served", "the silence to be noticed")
            line.is_silent = False
            await until(lambda: all(each and each.outcome == "done" for each in deferrals), "the settlement")
            assert set(numbers(sim)) == set(range(10))

    run(scenario())


def test_the_link_moves_to_another_local_address_and_lives_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, quic_port=0) as sim,
            LossyLine(sim.quic_port or 0) as line,
            running(quic_settings(sim, line)) as (hub, bus),
        ):
            await is_served(hub)
            deferrals = []
            for move in range(3):
                deferrals += [await hand_over(hub, upload(10 * move + number)) for number in range(10)]
                link_of(hub)._moved_at = float("-inf")
                link_of(hub)._move()
                sim.send(NODE, command(move))
                await until(lambda n=move: len(bus.sent_to("eventbus")) == n + 1, "a command over the new path")
            await until(lambda: all(each and each.outcome == "done" for each in deferrals), "the settlement")
            assert numbers(sim) == list(range(30))
            assert len(line.ways) == 4, "four addresses"
            assert hub.counters()["connects"] == 1, "one link"

    run(scenario())


def test_a_large_upload_holds_up_no_signal(tmp_path: Path) -> None:
    """On a line of 1 MB/s an upload of 3 MB takes three seconds; a hundred signals pass it meanwhile."""

    async def scenario() -> None:
        async with (
            cloud(tmp_path, quic_port=0) as sim,
            LossyLine(sim.quic_port or 0) as line,
            running(quic_settings(sim, line)) as (hub, _),
        ):
            await is_served(hub)
            line.bytes_per_second = 1e6
            large = await hand_over(hub, upload(0, pad="x" * 3_000_000))
            signals = []
            for number in range(1, 101):
                message = Message.upload("default/signal", {"number": number}, source="twin")
                signals.append(await hand_over(hub, message, priority=Priority.SIGNAL))
                await asyncio.sleep(0)
            await until(lambda: all(each and each.outcome == "done" for each in signals), "the signals settled")
            assert large is not None
            assert large.outcome is None, "the upload is still on its way"
            assert numbers(sim) == list(range(1, 101)), "in order"
            await until(lambda: large.outcome == "done", "the upload")

    run(scenario())


def test_an_upload_of_twelve_mebibytes_passes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, quic_port=0) as sim,
            running(quic_settings(sim, quic_datagram_bytes=16_384)) as (hub, _),
        ):
            await is_served(hub)
            large = await hand_over(hub, upload(0, pad="x" * (12 * 2**20)))
            await until(lambda: large is not None and large.outcome == "done", "the upload")

    run(scenario())


def test_a_message_from_the_cloud_that_is_larger_than_the_credit_passes(tmp_path: Path) -> None:
    """Of 16 MiB from a peer in Go: tests/peers; here each datagram costs 0.3 ms."""

    async def scenario() -> None:
        async with cloud(tmp_path, quic_port=0) as sim, running(quic_settings(sim)) as (hub, bus):
            await is_served(hub)
            down = command(1)
            down.content["pad"] = "y" * (2 * CREDIT_BYTES)
            sim.send(NODE, down)
            await until(lambda: bus.sent_to("eventbus"), "the command")
            assert len(bus.sent_to("eventbus")[0].content) > 2 * CREDIT_BYTES

    run(scenario())


def test_a_message_from_the_cloud_that_is_too_large_is_skipped_and_the_link_lives(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, quic_port=0) as sim,
            running(quic_settings(sim, max_frame_bytes=100_000)) as (hub, bus),
        ):
            await is_served(hub)
            down = command(1)
            down.content["pad"] = "y" * 1_000_000
            sim.send(NODE, down)
            sim.send(NODE, command(2))
            await until(lambda: bus.sent_to("eventbus"), "the second")
            assert [m.json()["number"] for m in bus.sent_to("eventbus")] == [2]
            assert hub.counters()["skipped_down"] == 1
            assert hub.counters()["connects"] == 1

    run(scenario())


def test_the_cloud_is_not_read_while_modules_hold_up_what_comes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, quic_port=0) as sim,
            running(quic_settings(sim, downstream_messages=4, keepalive_limit_seconds=30.0)) as (hub, bus),
        ):
            await is_served(hub)
            bus.slow.add("eventbus")
            for number in range(300):
                down = command(number)
                down.content["pad"] = "y" * 50_000
                sim.send(NODE, down)
            link = link_of(hub)
            await until(lambda: hub._lanes.is_full, "modules that are full")
            seen = -1
            while link._inbox_bytes != seen:
                seen = link._inbox_bytes
                await asyncio.sleep(0.3)  # until nothing more comes in
            assert seen < 4 * 2**20, "15 MB did not go into memory"
            bus.slow.clear()
            for sent in list(bus.sent):
                sent.receipt.settle()
            await until(lambda: len(bus.sent_to("eventbus")) == 300, "all of them")
            assert [m.json()["number"] for m in bus.sent_to("eventbus")] == list(range(300))

    run(scenario())


@pytest.mark.parametrize(
    ("kind", "content"),
    [(JSON, b'{"a":1}'), (JSON, b"null"), (TEXT, "grün".encode()), (BYTES, b"\x00\xff\xfe")],
    ids=["json", "null", "text", "bytes"],
)
def test_content_goes_up_as_it_is(tmp_path: Path, kind: Any, content: bytes) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, quic_port=0) as sim, running(quic_settings(sim)) as (hub, _):
            await is_served(hub)
            message = Message(id="m", group="user", operation="upload", resource="r", kind=kind, content=content)
            deferral = await hand_over(hub, message)
            await until(lambda: deferral is not None and deferral.outcome == "done", "the settlement")
            assert sim.uploads(NODE)[0].content == (content if content != b"null" else None)

    run(scenario())


def test_objects_from_the_cloud_are_json_for_modules_as_over_the_websocket(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, quic_port=0) as sim, running(quic_settings(sim)) as (hub, bus):
            await is_served(hub)
            sim.send(NODE, config_map("c", 1))
            await until(lambda: bus.sent_to(Group("meta")), "the object")
            assert bus.sent_to(Group("meta"))[0].kind == JSON
            await until(lambda: hub.counters()["acks"] == 1, "the ACK")

    run(scenario())


@pytest.mark.parametrize(("before", "after"), [(WEBSOCKET, QUIC), (QUIC, WEBSOCKET)])
def test_what_was_stored_for_one_transport_goes_up_over_the_other(tmp_path: Path, before: str, after: str) -> None:
    outbox = tmp_path / "outbox.db"

    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", quic_port=0) as sim:
            nowhere = (Endpoint("127.0.0.1", 9),)
            config = settings(sim, protocol=before, endpoints=nowhere, outbox_path=outbox, spill_seconds=0.01)
            async with running(config) as (hub, _):
                deferrals = [await hand_over(hub, upload(number)) for number in range(20)]
                await until(lambda: all(each and each.outcome == "done" for each in deferrals), "the outbox")
            async with running(settings(sim, protocol=after, outbox_path=outbox)) as (hub, _):
                await until(lambda: len(sim.uploads(NODE)) == 20, "the uploads")
                contents = [each.content for each in sim.uploads(NODE)]
                found = [json.loads(each) if isinstance(each, bytes) else each for each in contents]
                assert [each["number"] for each in found] == list(range(20))

    run(scenario())


def test_a_rejected_link_is_given_up_and_nothing_counts_as_confirmed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, quic_port=0, node_limit=0) as sim,
            running(quic_settings(sim, greeting_seconds=0.1, retry_cap_seconds=0.05)) as (hub, _),
        ):
            deferral = await hand_over(hub, upload(1))
            await until(lambda: hub.counters()["connects"] >= 5, "a fifth dial")
            await until(lambda: "did not answer the greeting" in hub.link_status()["why"], "the reason in words")
            assert sim.uploads(NODE) == []
            assert deferral is not None
            assert deferral.outcome is None

    run(scenario())


def test_the_first_endpoint_is_looked_for_and_returned_to(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, quic_port=0) as sim, LossyLine(sim.quic_port or 0) as first:
            first.is_silent = True
            second = Endpoint("127.0.0.1", sim.quic_port or 0)
            config = quic_settings(
                sim,
                endpoints=(Endpoint("127.0.0.1", first.port), second),
                handshake_seconds=0.3,
                failback_seconds=0.2,
                retry_cap_seconds=0.1,
            )
            async with running(config) as (hub, _):
                await until(lambda: hub.link_status()["endpoint"] == str(second) and state(hub) == "served", "second")
                first.is_silent = False
                await until(lambda: hub.link_status()["endpoint"] == f"127.0.0.1:{first.port}", "the first again")
                await is_served(hub)
                assert hub.counters()["moves"] == 1

    run(scenario())


def test_exactly_one_certificate_is_sent(tmp_path: Path) -> None:
    """CloudHub with authorization enforced gives no session to who sends more, or another node's."""

    async def scenario() -> None:
        async with (
            cloud(tmp_path, quic_port=0, enforce_authorization=True) as sim,
            running(quic_settings(sim)) as (hub, _),
        ):
            await is_served(hub)
            assert sim.is_served(NODE)

    run(scenario())


def test_the_outbox_keeps_the_two_classes_apart_under_way(tmp_path: Path) -> None:
    """The data's barrier is not answered; the signals' are, and settle only signals."""

    async def scenario() -> None:
        async with (
            cloud(tmp_path, quic_port=0) as sim,
            LossyLine(sim.quic_port or 0) as line,
            running(quic_settings(sim, line)) as (hub, _),
        ):
            await is_served(hub)
            line.bytes_per_second = 200_000.0
            data = await hand_over(hub, upload(0, pad="x" * 1_000_000))
            signal = await hand_over(hub, upload(1), priority=Priority.SIGNAL)
            await until(lambda: signal is not None and signal.outcome == "done", "the signal")
            assert data is not None
            assert data.outcome is None
            assert hub._outbox.unconfirmed_of(Class.DATA)[0] == 1
            line.bytes_per_second = None
            await until(lambda: data.outcome == "done", "the data")

    run(scenario())
