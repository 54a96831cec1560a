"""How the double looks in TLS when it is asked to be wrong, and what hub and version it plays."""

from __future__ import annotations

import asyncio
import ssl
import warnings
from pathlib import Path
from typing import Any

import pytest

from cloudsim import CloudSim, HubVersion
from tests.cloudsim.quicnode import quic_cloud, quic_raw, quic_served
from tests.cloudsim.rawnode import KEEPALIVE_FRAME, RawNode, client_context, cloud, frame, message, raw, served
from tests.support.aio import run, until

CERTIFICATES = ["expired", "not-yet-valid", "wrong-ca", "wrong-host"]


def trusting(sim: CloudSim) -> ssl.SSLContext:
    """As a node that verifies the hub."""
    context = ssl.create_default_context(cafile=str(sim.ca.certificate))
    pair = sim.certificate("edge-a")
    context.load_cert_chain(pair.certificate, pair.key)
    return context


async def verification(sim: CloudSim, context: ssl.SSLContext | None = None) -> str:
    """What a node says of the hub; empty: it takes it."""
    try:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", sim.port, ssl=context or trusting(sim), server_hostname="localhost"
        )
    except ssl.SSLError as error:
        return str(error)
    writer.close()
    return ""


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("expired", "certificate has expired"),
        ("not-yet-valid", "certificate is not yet valid"),
        ("wrong-ca", "unable to get local issuer certificate"),
        ("wrong-host", "Hostname mismatch"),
        ("old-version", "VERSION"),
    ],
)
def test_a_server_is_wrong_in_the_way_that_is_asked_for_and_right_again(tmp_path: Path, wrong: str, said: str) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            assert await verification(sim) == ""
            await sim.inject("tls", wrong=wrong)
            assert [fault.wrong for fault in sim.shell.lasting] == [wrong]
            assert said in await verification(sim)
            await node.barrier()  # a connection of before stays
            await sim.inject("clear")
            assert await verification(sim) == ""

    run(scenario())


def test_an_old_version_is_what_an_old_client_can_talk_to(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            await sim.inject("tls", wrong="old-version")
            context = client_context(sim, "edge-a")
            context.set_ciphers("ALL:@SECLEVEL=0")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
            node = await RawNode.connect(sim, context)
            await node.upgrade("edge-a")
            assert sim.is_served("edge-a")
            await node.aclose()

    run(scenario())


@pytest.mark.parametrize("wrong", CERTIFICATES)
def test_over_quic_the_certificate_is_wrong_as_well(tmp_path: Path, wrong: str) -> None:
    async def scenario() -> None:
        async with quic_cloud(tmp_path) as sim:
            await sim.inject("tls", wrong=wrong)
            with pytest.raises(ConnectionError):
                async with quic_raw(sim):
                    pass
            await sim.inject("clear")
            async with quic_served(sim):
                pass

    run(scenario())


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_the_hub_of_2019_has_one_rsa_suite_of_tls_1_2_and_looks_at_no_certificate(tmp_path: Path, version: str) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, hub_version=HubVersion.TREE_2019) as sim:
            context = client_context(sim, None, version=ssl.TLSVersion.TLSv1_3 if version == "1.3" else None)
            if version == "1.3":
                assert "VERSION" in await verification(sim, context)
                return
            async with raw(sim, None) as node:
                await node.upgrade("edge-a")
                suite, found, _ = node.writer.get_extra_info("cipher")
                assert (suite, found) == ("ECDHE-RSA-AES128-GCM-SHA256", "TLSv1.2")
                await node.send(KEEPALIVE_FRAME, frame(1, message("query", "k8s/ca.crt", group="meta")))
                await node.barrier()
                assert len([each for each in sim.messages("edgecontroller") if not each.from_hub]) == 1

    run(scenario())


def test_without_a_cluster_ca_the_answer_comes_with_nothing_in_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, has_cluster_ca=False) as sim, served(sim) as node:
            await node.send(frame(1, message("query", "k8s/ca.crt", group="meta")))
            answer = await node.message()
            assert (answer["route"]["source"], answer["content"]) == ("cloudhub", "")

    run(scenario())


def test_a_race_can_be_asked_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            await sim.inject("race", "edge-a")
            async with served(sim) as old, served(sim) as new:
                assert await old.ends()
                assert await new.ends()
            async with served(sim) as old, served(sim) as new:
                assert await old.ends()
                await new.barrier()

    run(scenario())


def test_rules_can_be_changed_while_it_runs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim) as node:
            sim.set_rules(node_limit=1, keepalive_seconds=0.2)
            async with served(sim, "edge-b"):
                assert not sim.is_served("edge-b")
            await node.send(KEEPALIVE_FRAME)
            await until(lambda: not sim.is_served("edge-a"), "the new keepalive limit")
            sim.set_rules(node_limit=2, keepalive_seconds=30.0)
            async with served(sim, "edge-b"):
                assert sim.is_served("edge-b")

    run(scenario())


def test_a_node_that_the_cloud_knows_is_told_of_its_node_object_when_it_connects(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, edgecontroller=True) as sim:
            async with served(sim) as node:
                assert await node.is_quiet()
                await node.send(frame(1, message("update", "default/nodestatus/edge-a", source="edged", group="meta")))
                found: list[dict[str, Any]] = [await node.message(), await node.message()]
                assert [each["route"]["operation"] for each in found] == ["response", "update"]
            async with served(sim) as node:
                update = await node.message()
                assert (update["route"]["operation"], update["route"]["resource"]) == ("update", "null/node/edge-a")

    run(scenario())
