"""Our QUIC link against a stranger: a CloudHub and an edge node in Go, on quic-go, written from the contract alone."""

import asyncio
import hashlib
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cloudsim.certificates import Authority
from modules.edgehub.config import QUIC, EdgeHubConfig, Endpoint
from modules.edgehub.hub import EdgeHub
from runtime.message import Message
from runtime.names import Group
from tests.modules.edgehub.fakes import FakeBus, FakeDeferral, hand_over, running, upload
from tests.modules.edgehub.simulated import NODE, cloud, command, config_map, state
from tests.peers.quicgo_program import SOURCE, GoEdge, GoHub, build, find_go
from tests.support.aio import run, until
from tests.support.lossy import LossyLine

META = Group("meta")

OBJECT = {
    "source": "edgecontroller",
    "group": "resource",
    "operation": "update",
    "resource": "default/configmap/settings",
    "content": '{"data":{"n":"{n}"}}',
    "ack": True,
}
"Needs an ack."
COMMAND = {
    "source": "router_eventbus",
    "group": "user",
    "operation": "publish",
    "resource": "commands/lamp",
    "content": '{"n":{n}}',
}
"Needs none."


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("quicgo") / "quicgo")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


def settings(authority: Authority, port: int, **changes: Any) -> EdgeHubConfig:
    pair = authority.node(NODE)
    values: dict[str, Any] = {
        "node_name": NODE,
        "protocol": QUIC,
        "endpoints": (Endpoint("127.0.0.1", port),),
        "ca_file": str(authority.ca.certificate),
        "cert_file": str(pair.certificate),
        "key_file": str(pair.key),
        "message_qps": 0.0,
        "retry_cap_seconds": 1.0,
        "drain_seconds": 1.0,
    }
    return EdgeHubConfig(**values | changes)


@asynccontextmanager
async def met(
    program: Path, tmp_path: Path, flags: dict[str, str | bool] | None = None, **changes: Any
) -> AsyncIterator[tuple[GoHub, EdgeHub, FakeBus]]:
    """Our edgehub, served by the stranger. `flags` are the stranger's, `changes` ours."""
    authority = Authority(tmp_path / "pki")
    async with (
        GoHub(program, tmp_path, authority, **{"authorization": True} | (flags or {})) as peer,
        running(settings(authority, peer.port, **changes)) as (hub, bus),
    ):
        await is_served(hub)
        yield peer, hub, bus
        assert await peer.faults() == []


async def is_served(hub: EdgeHub) -> None:
    await until(lambda: state(hub) == "served", "a served link")


async def connections(peer: GoHub, count: int) -> None:
    """Wait until the peer has had so many."""
    while (await peer.ask("/state"))["connections"] < count:
        await asyncio.sleep(0.02)  # a pace of asking


async def kick(peer: GoHub) -> None:
    """Have the peer drop the connection, and wait for the next."""
    before = (await peer.ask("/state"))["connections"]
    await peer.ask("/kick", {"node": NODE})
    await connections(peer, before + 1)


async def settled(deferrals: list[FakeDeferral | None]) -> None:
    await until(lambda: all(each and each.outcome == "done" for each in deferrals), "every upload settled")


async def numbers(peer: GoHub) -> list[int]:
    """Of the uploads, in the order in which they came."""
    uploads = [each for each in await peer.received() if each["operation"] == "upload"]
    return [json.loads(each["content"])["number"] for each in uploads]


# --- our edgehub and a CloudHub in Go -----------------------------------------------------------------


@pytest.mark.parametrize("alpn", ["", "viaduct"])
def test_the_peer_serves_us_with_one_certificate_after_proof_of_our_address(
    program: Path, tmp_path: Path, alpn: str
) -> None:
    async def scenario() -> None:
        flags = {"alpn": alpn, "validate_address": True}
        async with met(program, tmp_path, flags, quic_alpn=(alpn,) if alpn else ()) as (peer, _, _):
            (session,) = await peer.sessions()
            assert session["node"] == NODE
            assert session["alpn"] == alpn
            (greeting, *_) = await peer.received()
            assert greeting["resource"] == "k8s/ca.crt" or greeting["operation"] == "keepalive"

    run(scenario())


def test_ten_thousand_uploads_reach_the_peer_in_order_each_once(program: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with met(program, tmp_path) as (peer, hub, _):
            await settled([await hand_over(hub, upload(number)) for number in range(10_000)])
            assert await numbers(peer) == list(range(10_000))

    run(scenario())


def test_commands_of_the_peer_come_in_order_and_over_several_streams_all_of_them(program: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with met(program, tmp_path) as (peer, _, bus):
            await peer.send(NODE, **COMMAND, count=1000)
            await until(lambda: len(bus.sent_to("eventbus")) == 1000, "the commands")
            assert [message.json()["n"] for message in bus.sent_to("eventbus")] == list(range(1000))
        (tmp_path / "spread").mkdir()
        async with met(program, tmp_path / "spread", {"rotate": True}) as (peer, hub, bus):
            await peer.ask("/open", {"node": NODE, "count": 5})
            ids = await peer.send(NODE, **COMMAND, count=1000)
            await settled([await hand_over(hub, upload(number)) for number in range(1000)])
            await until(lambda: len(bus.sent_to("eventbus")) == 1000, "the commands")
            assert {message.id for message in bus.sent_to("eventbus")} == set(ids)
            assert await numbers(peer) == list(range(1000))

    run(scenario())


def test_the_peers_objects_are_acknowledged_once_they_are_handled(program: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with met(program, tmp_path, {"retry": "300ms"}) as (peer, _, bus):
            bus.slow.add(META)
            first, *others = await peer.send(NODE, **OBJECT, count=20)
            await until(lambda: bus.sent_to(META), "the first object")
            while (await peer.delivery(first))["attempts"] < 3:  # the peer asks again and again, in vain
                await asyncio.sleep(0.05)  # a pace of asking
            assert [message.id for message in bus.sent_to(META)] == [first], "handed on once"
            assert not (await peer.delivery(first))["acked"]
            bus.slow.clear()
            for sent in bus.sent:
                sent.receipt.settle()
            await until(lambda: len(bus.sent_to(META)) == 20, "all objects")
            while not (await peer.delivery(others[-1]))["acked"]:
                await asyncio.sleep(0.05)  # a pace of asking
            assert [message.json() for message in bus.sent_to(META)] == [{"data": {"n": str(n)}} for n in range(20)]
            assert all([(await peer.delivery(each))["attempts"] == 1 for each in others])

    run(scenario())


def test_the_peer_drops_us_and_dies_and_no_upload_is_lost(program: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with met(program, tmp_path, silence_seconds=1.0) as (peer, hub, _):
            deferrals = []
            for number in range(3000):
                deferrals.append(await hand_over(hub, upload(number)))
                if number % 1000 == 500:
                    await kick(peer)
            await settled(deferrals)
            before = await numbers(peer)
            peer.kill()
            await asyncio.to_thread(peer.start)
            await settled([await hand_over(hub, upload(number)) for number in range(3000, 4000)])
            assert list(dict.fromkeys(before)) == list(range(3000)), "in order of first arrival"
            assert set(await numbers(peer)) == set(range(3000, 4000))

    run(scenario())


def test_a_peer_that_never_serves_us_is_found_out_and_nothing_counts_as_confirmed(
    program: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with met(program, tmp_path, greeting_seconds=0.3) as (peer, hub, _):
            await peer.ask("/rules", {"reject": True})
            await kick(peer)
            await until(lambda: state(hub) != "served", "the drop to be noticed")
            deferrals = [await hand_over(hub, upload(number)) for number in range(10)]
            await connections(peer, 4)  # the third and the fourth after we gave up the one before
            assert state(hub) != "served"
            assert not any(each and each.outcome for each in deferrals)
            await peer.ask("/rules", {"reject": False})
            await settled(deferrals)
            assert set(await numbers(peer)) == set(range(10))

    run(scenario())


def test_a_peer_that_freezes_is_left_and_found_again(program: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with met(program, tmp_path, silence_seconds=0.5) as (peer, hub, _):
            peer.freeze()
            deferrals = [await hand_over(hub, upload(number)) for number in range(10)]
            await until(lambda: state(hub) != "served", "the silence to be noticed")
            peer.thaw()
            await settled(deferrals)
            assert set(await numbers(peer)) == set(range(10))

    run(scenario())


def test_a_peer_that_does_not_read_holds_us_up_and_loses_nothing(program: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with met(program, tmp_path, silence_seconds=60.0) as (peer, hub, _):
            await peer.ask("/stall", {"node": NODE, "on": True})
            deferrals = [await hand_over(hub, upload(number, pad="x" * 65_536)) for number in range(200)]
            await asyncio.sleep(0.5)  # nothing happens that could be waited for
            assert not all(each and each.outcome for each in deferrals)
            assert state(hub) == "served"
            await peer.ask("/stall", {"node": NODE, "on": False})
            await settled(deferrals)
            uploads = [each for each in await peer.received() if each["operation"] == "upload"]
            assert len(uploads) == 200
            assert hub.counters()["connects"] == 1, "over one link all the time"

    run(scenario())


_PACKAGE = "01010100010000000004" + "0a001200"
"An empty message."


@pytest.mark.parametrize(
    ("data", "end", "is_the_end"),
    [
        ("737472" + "00" * 1000, "", False),  # raw bytes
        ("737472" + "00" * 1000, "reset", False),
        ("78797a" + "00" * 1000, "", False),  # a use that nobody knows
        ("6d73", "fin", True),  # ended before it said what for
        ("6d7367", "fin", False),
        ("6d7367" + _PACKAGE * 3, "fin", False),
        ("6d7367" + _PACKAGE * 3, "reset", False),
        ("6d7367" + "ffffffffffff00000004" + "0a001200", "", False),  # only the length is looked at
        ("6d7367" + "01010100010000000002" + "0a00", "", False),  # no router: crashes a CloudHub
        ("6d7367" + "01010100010000000003" + "ffffff", "", False),  # no protobuf
        ("6d7367" + _PACKAGE + _PACKAGE[:20], "fin", True),
        ("6d7367" + "01010100010002000001", "", True),  # longer than any reader takes
    ],
)
def test_what_no_cloudhub_would_write_ends_its_stream_or_the_link_and_loses_nothing(
    program: Path, tmp_path: Path, data: str, end: str, is_the_end: bool
) -> None:
    async def scenario() -> None:
        async with met(program, tmp_path) as (peer, hub, bus):
            await peer.ask("/raw", {"node": NODE, "hex": data, "end": end})
            if is_the_end:
                await connections(peer, 2)
                await is_served(hub)
            await settled([await hand_over(hub, upload(number)) for number in range(100)])
            await peer.send(NODE, **COMMAND, count=100)
            await until(lambda: len(bus.sent_to("eventbus")) == 100, "the commands")
            assert await numbers(peer) == list(range(100))
            assert hub.counters()["connects"] == (2 if is_the_end else 1)

    run(scenario())


def test_twelve_mebibytes_reach_the_peer_and_sixteen_come_from_it(program: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with met(program, tmp_path) as (peer, hub, bus):
            content = json.dumps({"pad": "u" * (12 * 2**20 - 1024)}).encode()
            message = Message.build(source="bus", group="user", resource="large", operation="upload", content=content)
            await settled([await hand_over(hub, message)])
            (record,) = [each for each in await peer.received() if each["operation"] == "upload"]
            assert record["size"] == len(content)
            assert record["sha256"] == hashlib.sha256(content).hexdigest()
            await peer.send(NODE, **COMMAND | {"content": "", "size": 16 * 2**20 - 1024})
            await until(lambda: bus.sent_to("eventbus"), "the large command")
            assert bus.sent_to("eventbus")[0].content == b"d" * (16 * 2**20 - 1024)

    run(scenario())


def test_nothing_is_lost_between_us_and_the_peer_on_a_line_that_loses_datagrams(program: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        authority = Authority(tmp_path / "pki")
        async with (
            GoHub(program, tmp_path, authority) as peer,
            LossyLine(peer.port, loss=0.05, delay_seconds=0.002) as line,
            running(settings(authority, line.port)) as (hub, bus),
        ):
            await is_served(hub)
            await peer.send(NODE, **COMMAND, count=500)
            await settled([await hand_over(hub, upload(number, pad="x" * 300)) for number in range(1000)])
            await until(lambda: len(bus.sent_to("eventbus")) == 500, "the commands")
            assert await numbers(peer) == list(range(1000))
            assert line.dropped > 0
            assert hub.counters()["connects"] == 1

    run(scenario())


# --- an edge node in Go and cloudsim ------------------------------------------------------------------


def test_cloudsim_serves_an_edge_node_in_go_as_a_peer(program: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, quic_port=0) as sim:
            authority = Authority(sim.ca.certificate.parent)
            flags = {"uploads": "2000", "expect": "30"}
            async with GoEdge(program, authority, NODE, sim.quic_port or 0, **flags) as edge:
                await until(lambda: edge.saw("uploaded"), "the uploads")
                assert [json.loads(each.content)["n"] for each in sim.uploads(NODE)] == list(range(2000))
                for number in range(15):
                    sim.send(NODE, command(number))
                    sim.send(NODE, config_map(f"settings-{number}", 1))
                assert await edge.finish() == ""
                commands = [each for each in edge.saw("received") if each["group"] == "user"]
                assert [json.loads(each["content"])["number"] for each in commands] == list(range(15))

    run(scenario())


def test_cloudsim_asks_a_peer_again_that_does_not_acknowledge_and_drops_it_when_told(
    program: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, quic_port=0) as sim:
            authority = Authority(sim.ca.certificate.parent)
            async with GoEdge(program, authority, NODE, sim.quic_port or 0, mute=True) as edge:
                await sim.wait_served(NODE)
                sim.send(NODE, config_map("settings", 1))
                await until(lambda: len(edge.saw("received")) == 2, "the object again, after five seconds")
                assert len({each["id"] for each in edge.saw("received")}) == 1
                sim.kick(NODE)
                assert "Application error" in await edge.finish()

    run(scenario())


def test_cloudsim_serves_no_peer_with_the_certificate_of_another_node(program: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, quic_port=0, enforce_authorization=True) as sim:
            authority = Authority(sim.ca.certificate.parent)
            authority.node(NODE, common_name="system:node:edge-2")
            async with GoEdge(program, authority, NODE, sim.quic_port or 0) as edge:
                await until(lambda: edge.saw("control"), "the ack on the control stream")
                await asyncio.sleep(0.5)  # nothing happens that could be waited for
                assert not edge.saw("confirmed")
                assert not sim.is_served(NODE)

    run(scenario())


# --- the peer itself ----------------------------------------------------------------------------------


def test_the_peer_is_written_as_go_people_write_and_meets_the_vectors(program: Path) -> None:
    go = find_go()
    assert go is not None  # the program has been built with it
    unformatted = subprocess.run([Path(go).with_name("gofmt"), "-l", "."], cwd=SOURCE, capture_output=True, check=True)
    assert unformatted.stdout == b""
    for arguments in (["vet", "./..."], ["test", "./..."]):
        done = subprocess.run([go, *arguments], cwd=SOURCE, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rotate", [False, True])
def test_the_peers_hub_and_edge_understand_each_other(
    program: Path, tmp_path: Path, authority: Authority, rotate: bool
) -> None:
    async def scenario() -> None:
        flags = {"alpn": "viaduct", "authorization": True, "rotate": rotate, "validate_address": True}
        async with (
            GoHub(program, tmp_path, authority, **flags) as hub,
            GoEdge(program, authority, NODE, hub.port, alpn="viaduct", uploads="1000", expect="20") as edge,
        ):
            await until(lambda: edge.saw("uploaded"), "the uploads")
            objects = await hub.send(NODE, **OBJECT, count=10)
            commands = await hub.send(NODE, **COMMAND, count=10)
            assert await edge.finish() == ""
            assert [each["id"] for each in edge.saw("received") if each["group"] == "resource"] == objects
            assert [each["id"] for each in edge.saw("received") if each["group"] == "user"] == commands
            uploads = [each for each in await hub.received() if each["operation"] == "upload"]
            assert [json.loads(each["content"])["n"] for each in uploads] == list(range(1000))
            assert all([(await hub.delivery(each))["acked"] for each in objects])
            assert await hub.faults() == []

    run(scenario())
