"""A CA, the server's certificate and node certificates in a directory, as CloudCore makes them.

The only file here that needs `cryptography`.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CENTURY: Final = datetime.timedelta(days=36500)
_YEAR: Final = datetime.timedelta(days=365)
_OWN_NAMES: Final = frozenset({"ca", "server"})
_SKEW: Final = datetime.timedelta(minutes=5)
"Certificates begin a little in the past: containers and hosts disagree about now."


def check_node_name(name: str) -> str:
    """The name, fit for a file; raises ValueError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}", name):
        raise ValueError(f"{name!r} is no node name (letters, digits, '-' and '.')")
    if name in _OWN_NAMES:
        raise ValueError(f"a node cannot be called {name!r}: that is one of the cloud's own files")
    return name


@dataclass(frozen=True, slots=True)
class Pair:
    """Files of one certificate and its key."""

    certificate: Path
    key: Path

    @property
    def exists(self) -> bool:
        return self.certificate.exists() and self.key.exists()


class Authority:
    """The CA in `directory`: `ca.crt` and `ca.key`, made on first use, kept afterwards.

    Files are 0600, the directory 0700. Existing files are not touched.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory
        self.ca = self.pair("ca")
        if not self.ca.exists:
            self._make_ca()
        self._certificate = x509.load_pem_x509_certificate(self.ca.certificate.read_bytes())
        key = serialization.load_pem_private_key(self.ca.key.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{self.ca.key} holds no EC key")
        self._key = key

    def pair(self, name: str) -> Pair:
        return Pair(self.directory / f"{name}.crt", self.directory / f"{name}.key")

    def server(self, hosts: Sequence[str]) -> Pair:
        """The hub's certificate with `hosts` as its names and addresses, made anew when they changed."""
        pair = self.pair("server")
        names = [_general_name(host) for host in dict.fromkeys(hosts)]
        if pair.exists and self._is_ours(pair) and self._has_names(pair, names):
            return pair
        self._issue(
            pair,
            subject=[(NameOID.ORGANIZATION_NAME, "KubeEdge"), (NameOID.COMMON_NAME, "KubeEdge")],
            usages=[ExtendedKeyUsageOID.SERVER_AUTH],
            names=names,
            lifetime=_CENTURY,
        )
        return pair

    def node(
        self,
        node: str,
        *,
        file_name: str | None = None,
        common_name: str | None = None,
        not_before: datetime.datetime | None = None,
        lifetime: datetime.timedelta = _YEAR,
        server_only: bool = False,
    ) -> Pair:
        """A node's certificate `<node>.crt`, `<node>.key`; made when it is not there.

        The other arguments make certificates that are wrong on purpose: another common name, another
        time, serverAuth in place of clientAuth. Raises ValueError for what is no node name.
        """
        pair = self.pair(check_node_name(file_name or node))
        if not pair.exists or not self._is_ours(pair):
            self._issue(
                pair,
                subject=[
                    (NameOID.ORGANIZATION_NAME, "system:nodes"),
                    (NameOID.COMMON_NAME, common_name or f"system:node:{node}"),
                ],
                usages=[ExtendedKeyUsageOID.SERVER_AUTH if server_only else ExtendedKeyUsageOID.CLIENT_AUTH],
                names=[],
                lifetime=lifetime,
                not_before=not_before,
            )
        return pair

    def _make_ca(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "KubeEdge")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1024)
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + _CENTURY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    key_encipherment=True,
                    key_cert_sign=True,
                    content_commitment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    crl_sign=False,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write_pair(self.ca, certificate, key)

    def _issue(
        self,
        pair: Pair,
        *,
        subject: Sequence[tuple[x509.ObjectIdentifier, str]],
        usages: Sequence[x509.ObjectIdentifier],
        names: Sequence[x509.GeneralName],
        lifetime: datetime.timedelta,
        not_before: datetime.datetime | None = None,
    ) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        begin = not_before or datetime.datetime.now(datetime.UTC) - _SKEW
        authority = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(oid, value) for oid, value in subject]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + lifetime)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority),
                critical=False,
            )
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        _write_pair(pair, builder.sign(self._key, hashes.SHA256()), key)

    def _is_ours(self, pair: Pair) -> bool:
        """Whether the certificate was issued by the present CA."""
        certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
        try:
            certificate.verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    @staticmethod
    def _has_names(pair: Pair, names: Sequence[x509.GeneralName]) -> bool:
        certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
        try:
            extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except x509.ExtensionNotFound:
            return False
        return set(extension.value) == set(names)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_pair(pair: Pair, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    _write(
        pair.key,
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        ),
    )
    _write(pair.certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _write(path: Path, data: bytes) -> None:
    """A file of mode 0600 from its first byte on, replaced in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.replace(path)
