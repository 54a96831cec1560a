"""KubeEdge's edgehub, step by step, as ours does it: one test a step, through every adapter.

docs/edgehub.md maps each step to its symbol and its test here. A further adapter is one more line in ADAPTERS.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cloudsim import CloudSim
from modules.edgehub.config import QUIC, WEBSOCKET, EdgeHubConfig, Endpoint
from modules.edgehub.hub import EdgeHub
from modules.edgehub.link import make_link
from modules.edgehub.quic import QuicLink
from modules.edgehub.websocket import WebSocketLink
from runtime.config import EdgeHubSection, NodeConfig, QuicSection, WebsocketSection
from runtime.emp import Priority
from runtime.errors import ConfigError
from runtime.message import Message
from runtime.names import Group
from tests.modules.edgehub.fakes import FakeBus, hand_over, running, upload
from tests.modules.edgehub.simulated import NODE, cloud, command, config_map, served, settings, state
from tests.support.aio import run, until


@dataclass(frozen=True)
class Adapter:
    protocol: str
    link: type
    section: Callable[[str], EdgeHubSection]
    "The part of edgecore.yaml that switches it on, for a server."
    cloud: dict[str, Any]
    "What a cloudsim needs beside its usual settings."


def websocket_section(server: str) -> EdgeHubSection:
    return EdgeHubSection(websocket=WebsocketSection(enable=True, server=server), quic=QuicSection(enable=False))


def quic_section(server: str) -> EdgeHubSection:
    return EdgeHubSection(websocket=WebsocketSection(enable=False), quic=QuicSection(enable=True, server=server))


ADAPTERS = [
    Adapter(WEBSOCKET, WebSocketLink, websocket_section, {}),
    Adapter(QUIC, QuicLink, quic_section, {"quic_port": 0}),
]


def content_of(content: Any) -> Any:
    """As the cloud application reads it: over QUIC content is bytes, whatever it was."""
    return json.loads(content) if isinstance(content, bytes) else content


through_each = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.protocol)


def hub_settings(sim: CloudSim, adapter: Adapter, **changes: Any) -> EdgeHubConfig:
    return settings(sim, protocol=adapter.protocol, **changes)


@through_each
def test_configuration_has_a_protocol_switch(adapter: Adapter) -> None:
    node = NodeConfig(node_name=NODE, edge_hub=adapter.section("cloud.example:10000"))
    config = EdgeHubConfig.from_node(node)
    assert config.protocol == adapter.protocol
    assert config.endpoints == (Endpoint("cloud.example", 10000),)
    assert config.node_name == NODE


def test_configuration_wants_exactly_one_protocol() -> None:
    for both in (True, False):
        section = EdgeHubSection(websocket=WebsocketSection(enable=both), quic=QuicSection(enable=both))
        with pytest.raises(ConfigError, match="exactly one"):
            EdgeHubConfig.from_node(NodeConfig(node_name=NODE, edge_hub=section))


@through_each
def test_initial_checks_the_adapter_and_tells_everybody_that_the_cloud_is_not_there(
    adapter: Adapter, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, **adapter.cloud) as sim:
            await sim.inject("refuse")
            async with running(hub_settings(sim, adapter)) as (hub, bus):
                assert state(hub) == "closed"
                await until(lambda: len(bus.retained) == 4, "the first announcement")
                assert {m.text() for _, _, m in bus.retained} == {"cloud_disconnected"}

    run(scenario())


def test_initial_stops_the_process_for_a_protocol_that_there_is_not() -> None:
    async def scenario() -> None:
        config = EdgeHubConfig(node_name=NODE, endpoints=(Endpoint("c", 1),), protocol="smoke signals")
        hub = EdgeHub(config)
        hub.bus = FakeBus()  # type: ignore[assignment]
        with pytest.raises(ConfigError, match="smoke signals"):
            await hub.start()

    run(scenario())


@through_each
def test_the_client_factory_makes_the_adapter_of_the_switch(adapter: Adapter) -> None:
    config = EdgeHubConfig(node_name=NODE, endpoints=(Endpoint("c", 1),), protocol=adapter.protocol)
    assert type(make_link(config)) is adapter.link


@pytest.mark.parametrize("wrong", ["", "http", "WebSocket", "QUIC"])
def test_the_client_factory_has_a_clear_error_for_a_wrong_type(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"'websocket' or 'quic'"):
        make_link(EdgeHubConfig(node_name=NODE, endpoints=(Endpoint("c", 1),), protocol=wrong))


@through_each
def test_init_opens_a_session_and_uninit_ends_it(adapter: Adapter, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, **adapter.cloud) as sim:
            async with served(sim, protocol=adapter.protocol) as (hub, _):
                assert sim.is_served(NODE)
                assert hub.counters()["connects"] == 1
            await until(lambda: not sim.is_served(NODE), "the session to end")
            assert sim.sessions() == []

    run(scenario())


@through_each
def test_pub_connect_info_tells_true_and_false(adapter: Adapter, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, **adapter.cloud) as sim, served(sim, protocol=adapter.protocol) as (hub, bus):
            sim.kick(NODE)
            await until(lambda: hub.counters()["connects"] == 2 and state(hub) == "served", "the second link")
            await until(lambda: len(bus.retained) == 16, "the announcements of both links")
            for group in ("twin", "meta", "bus", "taskmanager"):
                told = [m for to, key, m in bus.retained if to == Group(group) and key == "node/connection"]
                assert [m.text() for m in told] == ["cloud_disconnected", "cloud_connected"] * 2
                assert {(m.source, m.group, m.resource, m.operation) for m in told} == {
                    ("edgehub", group, "node/connection", "connect")
                }

    run(scenario())


@through_each
def test_route_to_edge_gives_each_message_to_its_owner(adapter: Adapter, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, **adapter.cloud) as sim, served(sim, protocol=adapter.protocol) as (hub, bus):
            for number in range(3):
                sim.send(NODE, command(number))
                sim.send(NODE, config_map(f"c{number}", number + 1))
            await until(lambda: len(bus.sent) == 6, "all of them")
            assert [m.json()["number"] for m in bus.sent_to("eventbus")] == [0, 1, 2]
            assert [m.resource for m in bus.sent_to(Group("meta"))] == [f"default/configmap/c{n}" for n in range(3)]
            await until(lambda: hub.counters()["acks"] == 3, "an ACK for each object, none for commands")

    run(scenario())


@through_each
def test_route_to_cloud_hands_over_in_order_and_settles_what_the_cloud_has(adapter: Adapter, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, **adapter.cloud) as sim, served(sim, protocol=adapter.protocol) as (hub, _):
            deferrals = [await hand_over(hub, upload(number)) for number in range(100)]
            await until(lambda: all(d and d.outcome == "done" for d in deferrals), "the settlement")
            received = sim.uploads(NODE)
            assert [content_of(r.content)["number"] for r in received] == list(range(100))
            assert [r.id for r in received] == [d.message.id for d in deferrals if d]

    run(scenario())


@through_each
def test_keepalive_comes_at_once_and_each_heartbeat(adapter: Adapter, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, keepalive_seconds=0.8, **adapter.cloud) as sim,
            served(sim, protocol=adapter.protocol, heartbeat_seconds=0.2) as (hub, _),
        ):
            await until(lambda: hub.counters()["keepalives"] >= 8, "twice CloudHub's patience")
            assert hub.counters()["connects"] == 1

    run(scenario())


@through_each
def test_stop_cleans_up_before_the_next_connection_begins(adapter: Adapter, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, **adapter.cloud) as sim,
            served(sim, protocol=adapter.protocol, retry_cap_seconds=0.1) as (hub, _),
        ):
            names = {"cloud to bus", "bus to cloud", "keepalive"}

            def tasks() -> list[str]:
                return sorted(task.get_name() for task in asyncio.all_tasks() if task.get_name() in names)

            for cut in range(5):
                assert tasks() == sorted(names), "one set of tasks, never two"
                sim.kick(NODE)
                await until(lambda n=cut: hub.counters()["connects"] == n + 2, "the next connection")
                await until(lambda: state(hub) == "served", "a served link")
        assert tasks() == []

    run(scenario())


@through_each
def test_sync_keeper_brings_the_answer_to_who_asked(adapter: Adapter, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, **adapter.cloud) as sim, served(sim, protocol=adapter.protocol) as (hub, bus):
            asked = Message.build(source="edged", group="meta", resource="default/configmap/c", operation="query")
            deferral = await hand_over(hub, asked, priority=Priority.REQUEST, expects_reply=True)
            assert deferral is not None
            await until(lambda: asked.id in [m.id for m in sim.messages("edgecontroller", NODE)], "the question")
            answer = config_map("c", 7)
            answer.header.parent_msg_id = asked.id
            answer.route.operation = "response"
            sim.send(NODE, answer)
            await until(lambda: bus.replies, "the reply")
            request, reply = bus.replies[0]
            assert request is asked
            assert reply.json()["metadata"]["name"] == "c"
            assert bus.sent == [], "to nobody else"
            await until(lambda: deferral.outcome == "done", "the settlement")
            await until(lambda: hub.counters()["acks"] == 1, "the ACK")

    run(scenario())
