"""Who we are to CloudHub and who it is to us: one certificate, the right names, on either version of TLS."""

import ssl
from pathlib import Path

import pytest

from modules.edgehub import tls
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.link import LinkRefused
from modules.edgehub.websocket import WebSocketLink
from tests.modules.edgehub.fakes import running
from tests.modules.edgehub.simulated import NODE, cloud, settings, state
from tests.support.aio import run, until

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


def only(version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let edgehub speak one version of TLS."""
    make = tls.client_context

    def client_context(config: EdgeHubConfig) -> ssl.SSLContext:
        context = make(config)
        context.minimum_version = context.maximum_version = version
        return context

    monkeypatch.setattr(tls, "client_context", client_context)


@pytest.mark.parametrize("version", VERSIONS, ids=["1.2", "1.3"])
def test_one_certificate_is_sent_and_authorization_lets_us_in(
    tmp_path: Path, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(version, monkeypatch)

    async def scenario() -> None:
        async with cloud(tmp_path, enforce_authorization=True) as sim, running(settings(sim)) as (hub, _):
            await until(lambda: state(hub) == "served", "a served link")
            assert sim.is_served(NODE)

    run(scenario())


@pytest.mark.parametrize("version", VERSIONS, ids=["1.2", "1.3"])
def test_with_pythons_own_ways_the_ca_goes_along_and_authorization_rejects_us_in_silence(
    tmp_path: Path, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(version, monkeypatch)
    monkeypatch.setattr(tls, "send_one_certificate_only", lambda context: True)

    async def scenario() -> None:
        async with (
            cloud(tmp_path, enforce_authorization=True) as sim,
            running(settings(sim, greeting_seconds=0.2, retry_cap_seconds=0.1)) as (hub, _),
        ):
            await until(lambda: state(hub) == "unproven", "three greetings without an answer")
            assert not sim.is_served(NODE)
            assert "rejected (node limit, certificate)" in hub.link_status()["why"]

    run(scenario())


@pytest.mark.parametrize(
    ("host", "address", "server_name", "is_trusted"),
    [
        ("127.0.0.1", "127.0.0.1", "", True),
        ("127.0.0.1", "localhost", "", True),
        ("::1", "::1", "", True),
        ("127.0.0.2", "127.0.0.2", "cloudcore", True),
        ("127.0.0.2", "127.0.0.2", "cloud.example", False),
    ],
)
def test_the_name_in_the_hubs_certificate_counts(
    tmp_path: Path, host: str, address: str, server_name: str, is_trusted: bool
) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, host=host) as sim:
            config = settings(sim, endpoints=(Endpoint(address, sim.port),), server_name=server_name)
            link = WebSocketLink(config)
            if is_trusted:
                await link.open(config.endpoints[0])
                await link.close(is_polite=True)
            else:
                with pytest.raises(LinkRefused, match="Hostname mismatch"):
                    await link.open(config.endpoints[0])

    run(scenario())


def test_an_address_that_is_not_in_the_hubs_certificate_is_not_trusted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            config = settings(sim, server_name="192.0.2.1")  # as if that had been dialled
            with pytest.raises(LinkRefused, match=r"IP address mismatch, certificate is not valid for '192\.0\.2\.1'"):
                await WebSocketLink(config).open(config.endpoints[0])

    run(scenario())


def test_another_nodes_certificate_is_refused_before_any_dial(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            other = sim.certificate("edge-2")
            config = settings(sim, cert_file=str(other.certificate), key_file=str(other.key))
            async with running(config) as (hub, _):
                await until(lambda: "CN='system:node:edge-2'" in hub.link_status()["why"], "the reason")
                assert "expected 'system:node:edge-1' (hostnameOverride)" in hub.link_status()["why"]
                assert hub.counters()["connects"] == 0

    run(scenario())
