from __future__ import annotations

import shutil
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from cloudsim.certificates import Authority


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_all_files_are_for_the_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "pki"
    authority = Authority(directory)
    authority.server(["localhost"])
    authority.node("edge-a")
    assert directory.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in directory.iterdir()) == [
        "ca.crt",
        "ca.key",
        "edge-a.crt",
        "edge-a.key",
        "server.crt",
        "server.key",
    ]
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_the_certificates_look_like_the_real_ones(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    ca = load(authority.ca.certificate)
    assert ca.serial_number == 1024
    assert ca.subject.rfc4514_string() == "CN=KubeEdge"
    server = load(authority.server(["127.0.0.1", "cloud.example"]).certificate)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["cloud.example"]
    node = load(authority.node("edge-a").certificate)
    assert [item.value for item in node.subject] == ["system:nodes", "system:node:edge-a"]
    assert node.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    assert (node.not_valid_after_utc - node.not_valid_before_utc).days == 365


def test_existing_certificates_are_kept(tmp_path: Path) -> None:
    first = Authority(tmp_path)
    before = (first.node("edge-a").certificate.read_bytes(), first.server(["h"]).certificate.read_bytes())
    second = Authority(tmp_path)
    assert (second.node("edge-a").certificate.read_bytes(), second.server(["h"]).certificate.read_bytes()) == before


def test_another_host_makes_the_server_certificate_anew(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    before = authority.server(["one"]).certificate.read_bytes()
    assert authority.server(["one", "two"]).certificate.read_bytes() != before


def test_a_certificate_of_a_former_ca_is_made_anew(tmp_path: Path) -> None:
    Authority(tmp_path).node("edge-a")
    Authority(tmp_path / "other")
    for name in ("ca.crt", "ca.key"):
        shutil.copy(tmp_path / "other" / name, tmp_path / name)
    authority = Authority(tmp_path)
    load(authority.node("edge-a").certificate).verify_directly_issued_by(load(authority.ca.certificate))


@pytest.mark.parametrize("name", ["ca", "server"])
def test_a_node_cannot_take_the_name_of_the_clouds_own_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be called"):
        Authority(tmp_path).node(name)


def test_strict_verification_accepts_them(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server = authority.server(["localhost"])
    context = ssl.create_default_context(cafile=str(authority.ca.certificate))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listening.load_cert_chain(server.certificate, server.key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server, server_hostname="localhost")
    other = listening.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, other):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
    assert client.version() is not None
