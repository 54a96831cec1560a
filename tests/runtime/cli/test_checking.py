"""`edgezmq check`: the verdicts."""

import asyncio
import errno
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloudsim import CloudSim
from runtime.cli import checking
from runtime.cli.checking import Finding
from runtime.config import EdgeHubExtras, EdgeHubSection, NodeConfig, QuicSection, RuntimeSection, WebsocketSection
from runtime.home import Home
from runtime.proxy import Proxy, ProxyRefused
from tests.modules.edgehub.simulated import cloud
from tests.support.aio import run
from tests.support.connect_proxy import ConnectProxy, proxying

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def make_pair(directory: Path, name: str, *, begin: datetime, end: datetime, stem: str = "node") -> tuple[str, str]:
    """A self-signed certificate and its key, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(end)
        .sign(key, hashes.SHA256())
    )
    paths = directory / f"{stem}.crt", directory / f"{stem}.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    paths[1].chmod(0o600)
    return str(paths[0]), str(paths[1])


def node(certificate: str, key: str, ca: str | None = None) -> NodeConfig:
    return NodeConfig(
        node_name="edge-1",
        edge_hub=EdgeHubSection(tls_ca_file=ca or certificate, tls_cert_file=certificate, tls_private_key_file=key),
    )


def verdicts(config: NodeConfig) -> list[str]:
    return [f"{finding.verdict} {finding.text}" for finding in checking.certificates(config, NOW)]


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    def make(name: str = "system:node:edge-1", begin_days: int = -10, end_days: int = 300) -> tuple[str, str]:
        begin, end = NOW + timedelta(days=begin_days), NOW + timedelta(days=end_days)
        return make_pair(tmp_path, name, begin=begin, end=end)

    return make


def test_good_certificates_are_ok(pair: Callable[..., tuple[str, str]]) -> None:
    assert verdicts(node(*pair())) == [
        "ok valid until 2027-03-28",
        "ok valid until 2027-03-28",
        "ok made out to system:node:edge-1",
    ]


def test_a_certificate_of_another_node_fails_and_both_names_are_told(pair: Callable[..., tuple[str, str]]) -> None:
    assert "fail made out to 'system:node:edge-2', not to 'system:node:edge-1'" in verdicts(
        node(*pair("system:node:edge-2"))
    )


@pytest.mark.parametrize(
    ("begin", "end", "said"),
    [
        (-10, -1, "fail expired on 2026-05-31 00:00 UTC"),
        (-10, 20, "warn expires in 20 days, on 2026-06-21"),
        (5, 20, "fail valid only from 2026-06-06 00:00 UTC, and now it is 2026-06-01 00:00 UTC"),
    ],
)
def test_the_time_of_a_certificate_is_judged(
    pair: Callable[..., tuple[str, str]], begin: int, end: int, said: str
) -> None:
    assert said in verdicts(node(*pair(begin_days=begin, end_days=end)))


def test_each_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    said = verdicts(node(f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/c"))
    assert said == [
        f"fail tlsCaFile {tmp_path}/c: No such file or directory",
        f"fail tlsCertFile {tmp_path}/a: No such file or directory",
        f"fail tlsPrivateKeyFile {tmp_path}/b: No such file or directory",
    ]


def test_a_file_that_is_no_certificate_and_a_key_of_another_pair_fail(
    pair: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    certificate, key = pair()
    _, other = make_pair(tmp_path, "x", begin=NOW - timedelta(days=1), end=NOW + timedelta(days=90), stem="other")
    assert f"fail certificate and private key do not fit: {other} is the key of another one" in verdicts(
        node(certificate, other)
    )
    assert any(f"fail {certificate} is no PEM private key" in said for said in verdicts(node(certificate, certificate)))
    rubbish = tmp_path / "rubbish"
    rubbish.write_text("-----BEGIN NONSENSE-----")
    assert any(f"{rubbish} is no PEM certificate" in said for said in verdicts(node(certificate, key, str(rubbish))))


def test_an_encrypted_key_fails_and_nobody_is_asked_for_its_password(
    pair: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    certificate, key = pair()
    secret = serialization.load_pem_private_key(Path(key).read_bytes(), password=None)
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )
    encrypted.chmod(0o600)
    assert f"fail tlsPrivateKeyFile {encrypted} is encrypted, and nobody is there to ask" in verdicts(
        node(certificate, str(encrypted))
    )


def test_a_chain_in_place_of_the_nodes_certificate_fails(pair: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    certificate, key = pair()
    chain = tmp_path / "chain.crt"
    chain.write_bytes(Path(certificate).read_bytes() * 2)
    assert f"fail {chain} holds several certificates" in verdicts(node(str(chain), key))


def test_the_proxys_password_file_is_looked_at(pair: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "password"
    extra = EdgeHubExtras(proxy="http://node@proxy:1", proxy_password_file=str(file))
    config = msgspec.structs.replace(node(*pair()), runtime=RuntimeSection(edgehub=extra))
    assert f"fail proxyPasswordFile {file}: No such file or directory" in verdicts(config)
    file.write_text("secret")
    file.chmod(0o644)
    assert f"warn proxyPasswordFile {file} can be read by others (mode 644)" in verdicts(config)
    file.chmod(0o600)
    assert all(said.startswith("ok") for said in verdicts(config))


def test_a_key_that_others_can_read_is_a_warning(pair: Callable[..., tuple[str, str]]) -> None:
    certificate, key = pair()
    Path(key).chmod(0o644)
    assert f"warn tlsPrivateKeyFile {key} can be read by others (mode 644)" in verdicts(node(certificate, key))


def test_a_clock_that_was_never_set_fails_before_tls_does() -> None:
    assert checking.clock(datetime(1970, 1, 1, 0, 3, tzinfo=UTC)).verdict == "fail"
    assert checking.clock(NOW).verdict == "ok"


@pytest.mark.parametrize(("free", "verdict"), [(10 * 2**20, "fail"), (100 * 2**20, "warn"), (2**30, "ok")])
def test_little_room_on_the_disk_is_told(free: int, verdict: str) -> None:
    assert checking.disk(Path("/h"), free).verdict == verdict


@pytest.mark.parametrize(("rate", "verdict"), [(30, "warn"), (0, "ok"), (1000, "ok")])
def test_the_default_rate_of_kubeedge_is_named_as_the_bottleneck(rate: int, verdict: str) -> None:
    finding = checking.bottleneck(NodeConfig(edge_hub=EdgeHubSection(message_qps=rate)))
    assert finding.verdict == verdict


def ssl_error(text: str) -> ssl.SSLError:
    return ssl.SSLError(1, text)


@pytest.mark.parametrize(
    ("result", "verdict", "text"),
    [
        (0.0123, "ok", "c:1 answers (12 ms)"),
        (ConnectionRefusedError(), "fail", "c:1: nothing listens there"),
        (TimeoutError(), "fail", "c:1: no answer within 3 s"),
        (ssl_error("[SSL: TLSV1_ALERT_UNKNOWN_CA] x"), "fail", "c:1 refuses this node's certificate: "),
        (ProxyRefused("the proxy says no"), "fail", "c:1: the proxy says no"),
        (ssl_error("[SSL: WRONG_VERSION_NUMBER] x"), "fail", "c:1: "),
    ],
)
def test_what_failed_on_the_way_to_the_cloud_decides_the_advice(
    result: Exception | float, verdict: str, text: str
) -> None:
    finding = checking.reachable("cloud", "c:1", result)
    assert finding.verdict == verdict
    assert finding.text.startswith(text)
    assert bool(finding.advice) == (verdict == "fail")


# --- the way to a real cloud ------------------------------------------------------------------------


def to_cloud(sim: CloudSim, **extra: Any) -> NodeConfig:
    pair = sim.certificate("edge-1")
    hub = EdgeHubSection(
        tls_ca_file=str(sim.ca.certificate),
        tls_cert_file=str(pair.certificate),
        tls_private_key_file=str(pair.key),
        websocket=WebsocketSection(server=f"localhost:{sim.port}"),
    )
    return NodeConfig(node_name="edge-1", edge_hub=hub, runtime=RuntimeSection(edgehub=EdgeHubExtras(**extra)))


async def ways(config: NodeConfig) -> list[str]:
    findings = await asyncio.to_thread(lambda: list(checking.cloud(config)))
    return [f"{finding.verdict} {finding.text}" for finding in findings]


def test_a_cloud_is_visited_as_edgehub_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)

    async def scenario() -> None:
        async with cloud(tmp_path / "sim") as sim, cloud(tmp_path / "other") as other:
            (said,) = await ways(to_cloud(sim))
            assert said.startswith(f"ok localhost:{sim.port} answers (")
            (said,) = await ways(to_cloud(sim, server_name="cloud.example"))
            assert "its certificate is for other names (Hostname mismatch" in said
            (said,) = await ways(to_cloud(sim, server_name="cloudcore"))
            assert said.startswith("ok"), "another name that is in it"
            strange = other.certificate("edge-1")
            config = to_cloud(sim)
            hub = msgspec.structs.replace(
                config.edge_hub, tls_cert_file=str(strange.certificate), tls_private_key_file=str(strange.key)
            )
            (said,) = await ways(msgspec.structs.replace(config, edge_hub=hub))
            assert said == f"fail localhost:{sim.port} refuses this node's certificate: unknown ca"

    run(scenario())


def test_a_cloud_behind_a_proxy_is_visited_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://other:1")
    password = tmp_path / "password"
    password.write_text("s3cret\n")

    async def scenario() -> None:
        wanted = Proxy("p", 1, user="node", password="s3cret").authorization()
        async with cloud(tmp_path / "sim") as sim, proxying(ConnectProxy(wanted)) as proxy:
            url = f"http://node@127.0.0.1:{proxy.port}"
            (said,) = await ways(to_cloud(sim, proxy=url, proxy_password_file=str(password)))
            assert said.startswith("ok")
            assert proxy.carried_bytes > 0
            (said,) = await ways(to_cloud(sim, proxy=url))
            assert "407 Proxy Authentication Required: it does not know user 'node'" in said
            said, _ = await ways(to_cloud(sim))
            assert said == "warn HTTPS_PROXY is set, and edgehub does not read it"

    run(scenario())


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("tcp://127.0.0.1:1883", ("127.0.0.1", 1883)),
        ("tcp://mq.local", ("mq.local", 1883)),
        ("ssl://mq.local/", ("mq.local", 8883)),
        ("tcp://[::1]:1884", ("::1", 1884)),
    ],
)
def test_an_mqtt_address_has_the_usual_ports(url: str, address: tuple[str, int]) -> None:
    assert checking.mqtt_address(url) == address


def test_a_port_in_use_is_a_failure_unless_it_is_ours() -> None:
    taken = OSError(errno.EADDRINUSE, "Address already in use")
    assert checking.port_free("b", "127.0.0.1", 1884, taken, ours=False) == Finding(
        "b", "fail", "port 1884 is in use", "end what listens there (ss -ltnp 'sport = :1884')"
    )
    assert checking.port_free("b", "127.0.0.1", 1884, taken, ours=True).verdict == "ok"
    assert checking.port_free("b", "127.0.0.1", 1884, None, ours=False).verdict == "ok"
    assert checking.port_free("b", "127.0.0.1", 1884, None, ours=True).verdict == "fail"


def test_a_wrong_configuration_is_a_finding_and_not_an_end(tmp_path: Path) -> None:
    file = tmp_path / "edgecore.yaml"
    file.write_text("modules: {edgeHub: {hartbeat: 1}}")
    found = {finding.subject: finding for finding in checking.look(file, Home(tmp_path))}
    assert found["configuration"].verdict == "fail"
    assert "did you mean heartbeat?" in found["configuration"].text
    assert found["disk"].verdict in ("ok", "warn")


def test_a_home_with_a_path_too_long_for_a_socket_or_with_spaces_fails(tmp_path: Path) -> None:
    for name in ("x" * 120, "my node"):
        home = Home(tmp_path / name)
        found = [finding for finding in checking.state_directory(home, NodeConfig()) if finding.subject == "paths"]
        assert [finding.verdict for finding in found] == ["fail"]


def over_quic(sim: CloudSim, *more: str) -> NodeConfig:
    config = to_cloud(sim, endpoints=list(more))
    section = msgspec.structs.replace(
        config.edge_hub,
        websocket=WebsocketSection(enable=False),
        quic=QuicSection(enable=True, server=f"127.0.0.1:{sim.quic_port}"),
    )
    return msgspec.structs.replace(config, edge_hub=section)


def test_quic_is_tried_for_each_endpoint(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "sim", quic_port=0) as sim, cloud(tmp_path / "other") as other:
            served, refused = await ways(over_quic(sim, "127.0.0.1:9"))
            assert served.startswith(f"ok 127.0.0.1:{sim.quic_port} answers over QUIC")
            assert refused == "fail 127.0.0.1:9: Connection refused"
            strange = other.certificate("edge-1")
            config = over_quic(sim)
            hub = msgspec.structs.replace(
                config.edge_hub, tls_cert_file=str(strange.certificate), tls_private_key_file=str(strange.key)
            )
            (said,) = await ways(msgspec.structs.replace(config, edge_hub=hub))
            assert "refuses our certificate" in said

    run(scenario())
