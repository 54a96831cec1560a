"""A whole node from nothing but a token and an address: joined, served, rotated under load, all in real processes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.client import Bus, Receipt
from runtime.names import Group
from tests.modules.edgehub.fakes import upload
from tests.support.aio import until
from tests.support.joined import Cloud, cloud_in_a_thread
from tests.support.node import Node, node_in

pytestmark = pytest.mark.processes

QUIET = """
  eventBus: {enable: false}
runtime: {metrics: {enable: false}}
"""
PAUSE = 0.04
"Seconds between uploads: below messageQPS (30 a second), else they pile up for as long as a rotation takes."
LIFETIME = 10
"Seconds: a process has to start, ask and end in the last third of it, on a machine that does other things."


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    with cloud_in_a_thread(tmp_path / "cloud", enforce_authorization=True, signing_seconds=LIFETIME) as made:
        yield made


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with node_in(tmp_path / "node") as made:
        yield made


def rotations(node: Node) -> int:
    return int((node.module("edgehub").get("counters") or {}).get("certificate_rotations", 0))


def test_a_node_joins_from_a_token_and_an_address_and_loses_nothing_through_rotations(cloud: Cloud, node: Node) -> None:
    words = ("--node-name", "edge-1", "--server", cloud.server, "--cloudhub", f"127.0.0.1:{cloud.sim.port}")
    joined = node.edgezmq("join", "--token", cloud.token(), *words)
    assert joined.returncode == 0, joined.stderr
    with (node.home.path / "edgecore.yaml").open("a") as config:
        config.write(QUIET)
    node.up()
    node.until(lambda: cloud.sim.is_served("edge-1"), "the link to be served")

    async def load() -> list[str]:
        sent: list[tuple[str, Receipt]] = []
        async with Bus.connect("loader", endpoint=f"ipc://{node.home.bus_socket}") as bus:
            for wanted in (1, 2):
                rotating = asyncio.create_task(_until_rotated(node, wanted))
                while not rotating.done():
                    message = upload(len(sent))
                    sent.append((message.id, await bus.send(Group("hub"), message)))
                    await asyncio.sleep(PAUSE)
                await rotating
            for _, receipt in sent:
                await receipt
        return [message_id for message_id, _ in sent]

    ids = asyncio.run(load())
    assert len(ids) > 100
    node.until(
        lambda: set(ids) <= {up.message.header.msg_id for up in cloud.sim.uploads()}, "every upload in the cloud"
    )
    found = node.status()["link"]["certificate"]
    assert (found["standing"], found["last_refusal"]) == ("valid", None)


async def _until_rotated(node: Node, wanted: int) -> None:
    reached = False

    async def look() -> None:
        nonlocal reached
        while not reached:
            reached = await asyncio.to_thread(rotations, node) >= wanted

    looking = asyncio.create_task(look())
    await until(lambda: reached, f"rotation {wanted}")
    await looking


def test_a_node_with_a_token_in_its_configuration_joins_at_its_first_start(cloud: Cloud, node: Node) -> None:
    cloud.sim.certificates.api.signing_seconds = 86_400.0  # type: ignore[union-attr]  # it has one
    cloud.fault("refuse")
    token = cloud.token()
    node.configure(
        f"""
modules:
  edged: {{hostnameOverride: edge-1}}
  edgeHub:
    httpServer: {cloud.server}
    token: {token}
    tlsCaFile: pki/rootCA.crt
    tlsCertFile: pki/server.crt
    tlsPrivateKeyFile: pki/server.key
    websocket: {{server: "127.0.0.1:{cloud.sim.port}"}}{QUIET}"""
    )
    up = node.edgezmq("up", "-d")
    assert up.returncode == 0, up.stderr
    assert "cannot be read" not in up.stderr
    node.until(lambda: "joining: " in node.edgezmq("status").stdout, "the status to say so")
    assert "nothing listens there" in node.edgezmq("status").stdout
    sent = node.edgezmq("send", "cloud", "-r", "a/b", "--content", "1")
    assert sent.returncode == 0, "stored while the node has no certificate"
    cloud.fault("clear")
    node.until(lambda: cloud.sim.is_served("edge-1"), "the link to be served")
    node.until(lambda: len(cloud.sim.uploads()) == 1, "what was stored")
    assert "made out to system:node:edge-1" in node.edgezmq("check", "--json").stdout
    assert token.rpartition(".")[2] not in node.logs()
