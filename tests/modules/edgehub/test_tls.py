"""The SSL context: what is presented, and which words an operator gets for what is wrong."""

import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from cloudsim.certificates import Authority
from modules.edgehub import tls
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.link import LinkRefused

DAY = 86400.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def config(authority: Authority, node: str = "edge-1", **files: Path) -> EdgeHubConfig:
    pair = authority.node("edge-1")
    paths: dict[str, Any] = {
        "ca_file": authority.ca.certificate,
        "cert_file": pair.certificate,
        "key_file": pair.key,
    } | files
    return EdgeHubConfig(
        node_name=node, endpoints=(Endpoint("cloud", 1),), **{key: str(path) for key, path in paths.items()}
    )


def test_the_context_verifies_the_server_and_offers_no_alpn(authority: Authority) -> None:
    context = tls.client_context(config(authority))
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_only_one_certificate_can_be_sent(authority: Authority) -> None:
    assert tls.send_one_certificate_only(tls.client_context(config(authority)))


@pytest.mark.parametrize(
    ("file", "key"),
    [("ca_file", "tlsCaFile"), ("cert_file", "tlsCertFile"), ("key_file", "tlsPrivateKeyFile")],
)
def test_a_missing_file_is_named(authority: Authority, tmp_path: Path, file: str, key: str) -> None:
    with pytest.raises(LinkRefused, match=rf"{key} .*nothing.pem: No such file"):
        tls.client_context(config(authority, **{file: tmp_path / "nothing.pem"}))


@pytest.mark.parametrize("file", ["ca_file", "cert_file", "key_file"])
def test_a_file_of_something_else_is_named(authority: Authority, tmp_path: Path, file: str) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_bytes(b"\xff\x00 not PEM")
    with pytest.raises(LinkRefused, match=r"junk\.pem"):
        tls.client_context(config(authority, **{file: junk}))


def test_a_directory_in_place_of_a_file_is_named(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(LinkRefused, match="Is a directory"):
        tls.client_context(config(authority, cert_file=tmp_path))


def test_a_key_of_another_certificate_is_refused(authority: Authority) -> None:
    other = authority.node("edge-2")
    with pytest.raises(LinkRefused, match="not the key of the certificate"):
        tls.client_context(config(authority, key_file=other.key))


def test_an_encrypted_key_is_refused_without_asking_for_a_password(authority: Authority, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "encrypted.key"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    with pytest.raises(LinkRefused, match="encrypted"):
        tls.client_context(config(authority, key_file=path))


def test_a_chain_in_place_of_one_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    chain = tmp_path / "chain.pem"
    chain.write_text(authority.node("edge-1").certificate.read_text() + authority.ca.certificate.read_text())
    with pytest.raises(LinkRefused, match="holds 2 certificates"):
        tls.client_context(config(authority, cert_file=chain))


def test_an_expired_certificate_is_refused_before_dialling(authority: Authority) -> None:
    with pytest.raises(LinkRefused, match=r"expired .* get a new one"):
        tls.client_context(config(authority), now=time.time() + 500 * 365 * DAY)


def test_a_certificate_from_the_future_points_at_the_clock(authority: Authority) -> None:
    with pytest.raises(LinkRefused, match=r"valid only from .* 1970-01-01 .* set the clock"):
        tls.client_context(config(authority), now=0.0)


def test_a_certificate_for_another_node_is_refused_before_dialling(authority: Authority) -> None:
    with pytest.raises(LinkRefused, match=r"CN='system:node:edge-1', expected 'system:node:edge-2'"):
        tls.client_context(config(authority, node="edge-2"))


def test_alerts_are_told_in_words() -> None:
    fault = ssl.SSLError(1, "[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca")
    fault.reason = "TLSV1_ALERT_UNKNOWN_CA"
    assert tls.explain(fault) == "CloudHub refuses our certificate: it is not of CloudHub's CA"
    assert tls.explain(ConnectionResetError("reset by peer")) == "reset by peer"
    assert tls.explain(TimeoutError()) == "TimeoutError"
