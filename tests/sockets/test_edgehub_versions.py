"""Older CloudHubs: the tree of 2019 and those before 1.17, as cloudsim plays them, and TLS as it was in 2019."""

import asyncio
import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from cloudsim import CloudMessage, Header, HubVersion, Route
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.dialect import BEFORE_1_17, TREE_2019
from modules.edgehub.link import LinkRefused
from modules.edgehub.websocket import WebSocketLink
from runtime.message import Message, new_id
from runtime.names import Group
from tests.modules.edgehub.fakes import hand_over, running, upload
from tests.modules.edgehub.simulated import NODE, cloud, command, settings, state
from tests.sockets.test_edgehub_link import upgrade
from tests.support.aio import run, until


@pytest.mark.parametrize(
    ("version", "dialect"),
    [(HubVersion.BEFORE_1_17, BEFORE_1_17), (HubVersion.TREE_2019, TREE_2019)],
    ids=["1.16", "2019"],
)
def test_a_hub_that_cannot_prove_itself_is_not_asked_to_and_connected_at_once(
    tmp_path: Path, version: HubVersion, dialect: object
) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, hub_version=version) as sim,
            running(settings(sim, dialect=dialect)) as (hub, bus),
        ):
            await until(lambda: state(hub) == "unproven", "the link")
            assert hub.counters()["connects"] == 1, "no dial is thrown away"
            deferral = await hand_over(hub, upload(7))
            assert deferral is not None
            await until(lambda: deferral.outcome == "done", "an upload")
            assert not any("k8s/ca.crt" in received.resource for received in sim.messages(node=NODE))
            sim.send(NODE, command(1))
            await until(lambda: state(hub) == "served", "the first message from the cloud")
            owner = Group("bus") if dialect is TREE_2019 else "eventbus"
            await until(lambda: len(bus.sent_to(owner)) == 1, "a command")

    run(scenario())


def test_the_connection_events_of_2019_have_its_operation_and_its_groups(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, hub_version=HubVersion.TREE_2019) as sim,
            running(settings(sim, dialect=TREE_2019)) as (hub, bus),
        ):
            await until(lambda: state(hub) == "unproven", "the link")
            await until(lambda: len(bus.retained) == 6, "disconnected, then connected")
            assert [group for group, _, _ in bus.retained[3:]] == ["@meta", "@twin", "@bus"]
            assert {message.operation for _, _, message in bus.retained} == {"publish"}

    run(scenario())


def test_an_error_of_2019_answers_the_question_about_its_resource(tmp_path: Path) -> None:
    """Its parent id is that of the question's own parent: empty."""

    async def scenario() -> None:
        async with (
            cloud(tmp_path, hub_version=HubVersion.TREE_2019) as sim,
            running(settings(sim, dialect=TREE_2019)) as (hub, bus),
        ):
            await until(lambda: state(hub) == "unproven", "the link")
            question = Message.build(source="m", group="meta", resource="default/secret/s", operation="query")
            await hand_over(hub, question, expects_reply=True)
            fault = CloudMessage(
                Header(msg_id=new_id(), timestamp=1),
                Route(source="metamanager", group="meta", operation="error", resource="default/secret/s"),
                "no such secret",
            )
            sim.send(NODE, fault)
            await until(lambda: bus.replies, "the answer")
            [(asked, reply)] = bus.replies
            assert (asked.id, reply.parent_id, reply.text()) == (question.id, question.id, "no such secret")

    run(scenario())


def test_in_2019_the_first_connection_wins_and_the_second_comes_in_when_it_is_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path, hub_version=HubVersion.TREE_2019, keepalive_seconds=1.0) as sim,
            running(
                settings(
                    sim,
                    dialect=TREE_2019,
                    silence_seconds=0.3,
                    keepalive_limit_seconds=1.0,
                    heartbeat_seconds=0.3,
                    retry_cap_seconds=0.2,
                )
            ) as (hub, _),
        ):
            await until(lambda: state(hub) == "unproven", "the link")
            await sim.inject("half-open", NODE)
            deferral = await hand_over(hub, upload(7))
            assert deferral is not None
            await until(lambda: deferral.outcome == "done", "the upload, once the hub has let the old connection go")
            assert hub.counters()["connects"] >= 2

    run(scenario())


# --- TLS of 2019: RSA, one suite, names in the subject alone ----------------------------------------------------


class OldAuthority:
    """CA, server and node as the scripts of 2019 made them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ca_key = rsa.generate_private_key(65537, 2048)
        self._ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "KubeEdge")])
        self.make("ca", "KubeEdge", is_ca=True)
        for name in ("server", "edge"):
            self.make(name, "kubeedge.io")

    def make(self, name: str, common_name: str, *, is_ca: bool = False) -> None:
        key = self._ca_key if is_ca else rsa.generate_private_key(65537, 2048)
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self._ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .sign(self._ca_key, hashes.SHA256())
        )
        self.path(name, "crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.path(name, "key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )

    def path(self, name: str, suffix: str) -> Path:
        return self.directory / f"{name}.{suffix}"

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
        context.load_cert_chain(self.path("server", "crt"), self.path("server", "key"))
        return context


def test_the_tls_of_2019_is_verified_by_the_name_in_its_subject(tmp_path: Path) -> None:
    old = OldAuthority(tmp_path)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        await reader.read()
        writer.transport.abort()

    async def scenario() -> None:
        listener = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=old.server_context())
        config = EdgeHubConfig(
            node_name="edge-1",
            endpoints=(Endpoint("127.0.0.1", listener.sockets[0].getsockname()[1]),),
            dialect=TREE_2019,
            ca_file=str(old.path("ca", "crt")),
            cert_file=str(old.path("edge", "crt")),
            key_file=str(old.path("edge", "key")),
            server_name="kubeedge.io",
        )
        link = WebSocketLink(config)
        await link.open(config.endpoints[0])
        await link.close(is_polite=True)
        other = EdgeHubConfig(**{name: getattr(config, name) for name in config.__slots__} | {"server_name": ""})
        with pytest.raises(LinkRefused, match="CloudHub's certificate does not verify"):
            await WebSocketLink(other).open(other.endpoints[0])
        listener.close()

    run(scenario())
