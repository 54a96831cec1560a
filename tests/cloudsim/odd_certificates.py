"""Client certificates that are wrong in one way each, as they were shown to the measured hub."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloudsim import CloudSim
from cloudsim.certificates import Authority, Pair
from tests.cloudsim.rawnode import client_context

_DAY = datetime.timedelta(days=1)


def odd_pair(sim: CloudSim, directory: Path, kind: str) -> Pair | None:
    """The certificate of a kind named as in measured_behaviour.json; None: there is none."""
    now = datetime.datetime.now(datetime.UTC)
    match kind:
        case "good" | "good cert, node_id of another node":
            return sim.certificate("edge-a")
        case "other_ca":
            return Authority(directory / "other").node("edge-a")
        case "expired":
            return sim.authority.node("edge-a", file_name="expired", not_before=now - 2 * _DAY, lifetime=_DAY)
        case "not_yet":
            return sim.authority.node("edge-a", file_name="not-yet", not_before=now + _DAY)
        case "server_eku":
            return sim.authority.node("edge-a", file_name="server-eku", server_only=True)
        case "wrong_cn":
            return sim.authority.node("edge-a", file_name="wrong-cn", common_name="system:node:edge-b")
        case "no_eku":
            return _issue(sim, "no-eku", "system:nodes", "system:node:edge-a", has_usage=False)
        case "old_style_cn":
            return _issue(sim, "old-style", "KubeEdge", "kubeedge.io")
        case "no_org":
            return _issue(sim, "no-org", None, "system:node:edge-a")
        case _:
            assert kind == "no client cert"
            return None


def odd_context(sim: CloudSim, directory: Path, kind: str, version: ssl.TLSVersion | None) -> ssl.SSLContext:
    context = client_context(sim, None, version=version)
    pair = odd_pair(sim, directory, kind)
    if pair is not None:
        context.load_cert_chain(pair.certificate, pair.key)
    return context


def _issue(sim: CloudSim, file: str, organisation: str | None, name: str, *, has_usage: bool = True) -> Pair:
    """A certificate of the CA that its own tools would not make."""
    ca = x509.load_pem_x509_certificate(sim.ca.certificate.read_bytes())
    ca_key = serialization.load_pem_private_key(sim.ca.key.read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if organisation is not None:
        subject.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation))
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(subject))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
    )
    if has_usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    pair = sim.authority.pair(file)
    pair.certificate.write_bytes(builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pair.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pair
