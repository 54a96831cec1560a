"""A CA, the server's certificate and node certificates in a directory, as CloudCore makes them.

The only file here that needs `cryptography`.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CENTURY: Final = datetime.timedelta(days=36500)
_YEAR: Final = datetime.timedelta(days=365)
_OWN_NAMES: Final = frozenset({"ca", "server"})
_SKEW: Final = datetime.timedelta(minutes=5)
"Certificates begin a little in the past: containers and hosts disagree about now."
_USAGES: Final = {
    0: ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    1: ExtendedKeyUsageOID.SERVER_AUTH,
    2: ExtendedKeyUsageOID.CLIENT_AUTH,
    3: ExtendedKeyUsageOID.CODE_SIGNING,
    4: ExtendedKeyUsageOID.EMAIL_PROTECTION,
    8: ExtendedKeyUsageOID.TIME_STAMPING,
    9: ExtendedKeyUsageOID.OCSP_SIGNING,
}
"Go's numbers (crypto/x509, ExtKeyUsage)."


ServerFault = Literal["expired", "not-yet-valid", "wrong-ca", "wrong-host"]
"What can be wrong with a server's certificate."
ELSEWHERE: Final = "elsewhere.invalid"
"The only name in a certificate for the wrong host."


class Unsignable(Exception):
    """A request that CloudCore does not sign; the text is CloudCore's."""


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
        if not (pair.exists and self._is_ours(pair) and self._has_names(pair, names)):
            self._issue_server(pair, hosts)
        return pair

    def rsa_server(self, hosts: Sequence[str]) -> Pair:
        """A certificate with an RSA key, as the hub of 2019 has it; made anew each time."""
        pair = self.pair("server-rsa")
        self._issue_server(pair, hosts, key=rsa.generate_private_key(65537, 2048))
        return pair

    def odd_server(self, fault: ServerFault, hosts: Sequence[str]) -> Pair:
        """A hub's certificate that no node should trust, in a file of its own; made anew each time."""
        if fault == "wrong-ca":
            return Authority(self.directory / "wrong-ca").server(hosts)
        pair = self.pair(f"server-{fault}")
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        match fault:
            case "expired":
                self._issue_server(pair, hosts, begin=now - 2 * day, lifetime=day)
            case "not-yet-valid":
                self._issue_server(pair, hosts, begin=now + day)
            case "wrong-host":
                self._issue_server(pair, [ELSEWHERE])
        return pair

    def _issue_server(
        self,
        pair: Pair,
        hosts: Sequence[str],
        *,
        begin: datetime.datetime | None = None,
        lifetime: datetime.timedelta = _CENTURY,
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
    ) -> None:
        self._issue(
            pair,
            subject=[(NameOID.ORGANIZATION_NAME, "KubeEdge"), (NameOID.COMMON_NAME, "KubeEdge")],
            usages=[ExtendedKeyUsageOID.SERVER_AUTH],
            names=[_general_name(host) for host in dict.fromkeys(hosts)],
            lifetime=lifetime,
            not_before=begin,
            key=key,
        )

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

    # --- what the certificate API asks for -------------------------------------------------------------

    @property
    def token_key(self) -> bytes:
        """With what CloudCore signs tokens: the DER (SEC1) of the CA's private key."""
        return self._key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )

    @property
    def ca_der(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.DER)

    def sign_request(
        self, request: bytes, *, usages: Sequence[int], lifetime: datetime.timedelta, now: datetime.datetime
    ) -> bytes:
        """The certificate (DER) for a PKCS#10 request (DER), as CloudCore makes it.

        Of the subject only O and CN are taken, and the subject alternative names; nothing is checked, not even
        the request's own signature. Valid from `now` to the second. Raises Unsignable.
        """
        try:
            wanted = x509.load_der_x509_csr(request)
            names = wanted.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            key = wanted.public_key()
        except (ValueError, UnsupportedAlgorithm) as fault:
            raise Unsignable(f"failed to parse csr, err: {_as_go_says(request)}") from fault
        if not names or not names[0].value:
            raise Unsignable("must specify a CommonName")
        if not usages:
            raise Unsignable("must specify at least one ExtKeyUsage")
        if not set(usages) <= _USAGES.keys():
            raise Unsignable("x509: unknown extended key usage")
        subject = [*wanted.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME), names[0]]
        builder = self._leaf(
            x509.Name(subject), key, [_USAGES[usage] for usage in usages], now.replace(microsecond=0), lifetime
        )
        builder = builder.add_extension(_key_usage(), critical=True)
        with contextlib.suppress(x509.ExtensionNotFound):
            alternatives = wanted.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            builder = builder.add_extension(alternatives.value, critical=alternatives.critical)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    def objection(self, certificate: bytes, now: datetime.datetime) -> str | None:
        """What Go's x509 says against a client certificate (DER) for this CA; None: it verifies."""
        leaf = x509.load_der_x509_certificate(certificate)
        what = "x509: certificate has expired or is not yet valid: current time"
        if now < leaf.not_valid_before_utc:
            return f"{what} {now:%Y-%m-%dT%H:%M:%SZ} is before {leaf.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}"
        if now > leaf.not_valid_after_utc:
            return f"{what} {now:%Y-%m-%dT%H:%M:%SZ} is after {leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
        if not self._has_issued(leaf):
            return "x509: certificate signed by unknown authority"
        try:
            usages = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        except x509.ExtensionNotFound:
            return None
        if usages.isdisjoint({ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}):
            return "x509: certificate specifies an incompatible key usage"
        return None

    @staticmethod
    def subject_of(certificate: bytes) -> tuple[list[str], str]:
        """Organisations and common name of a certificate (DER)."""
        subject = x509.load_der_x509_certificate(certificate).subject
        organisations = [str(each.value) for each in subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
        names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return organisations, str(names[0].value) if names else ""

    def foreign_ca_der(self) -> bytes:
        """The certificate of another CA of the same name."""
        return _make_ca(ec.generate_private_key(ec.SECP256R1())).public_bytes(serialization.Encoding.DER)

    def foreign_node_der(self, node: str) -> bytes:
        """A certificate of this CA for `node`, with a key that nobody has."""
        subject = [(NameOID.ORGANIZATION_NAME, "system:nodes"), (NameOID.COMMON_NAME, f"system:node:{node}")]
        name = x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
        now = datetime.datetime.now(datetime.UTC)
        builder = self._leaf(name, key, [ExtendedKeyUsageOID.CLIENT_AUTH], now, _YEAR)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    def _make_ca(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        _write_pair(self.ca, _make_ca(key), key)

    def _issue(
        self,
        pair: Pair,
        *,
        subject: Sequence[tuple[x509.ObjectIdentifier, str]],
        usages: Sequence[x509.ObjectIdentifier],
        names: Sequence[x509.GeneralName],
        lifetime: datetime.timedelta,
        not_before: datetime.datetime | None = None,
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
    ) -> None:
        key = key or ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
        begin = not_before or datetime.datetime.now(datetime.UTC) - _SKEW
        builder = self._leaf(name, key.public_key(), usages, begin, lifetime)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        _write_pair(pair, builder.sign(self._key, hashes.SHA256()), key)

    def _leaf(
        self,
        subject: x509.Name,
        key: CertificatePublicKeyTypes,
        usages: Sequence[x509.ObjectIdentifier],
        begin: datetime.datetime,
        lifetime: datetime.timedelta,
    ) -> x509.CertificateBuilder:
        authority = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + lifetime)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority),
                critical=False,
            )
        )

    def _is_ours(self, pair: Pair) -> bool:
        """Whether the certificate was issued by the present CA."""
        return self._has_issued(x509.load_pem_x509_certificate(pair.certificate.read_bytes()))

    def _has_issued(self, certificate: x509.Certificate) -> bool:
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


def _make_ca(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "KubeEdge")])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1024)
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _CENTURY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _key_usage(*, is_ca: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=True,
        key_cert_sign=is_ca,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _as_go_says(request: bytes) -> str:
    """What Go's encoding/asn1 says of bytes that are no PKCS#10 request."""
    if len(request) < 2:
        return "asn1: syntax error: sequence truncated"
    kind, size = request[:2]
    if kind != 0x30:
        found = f"{{class:{kind >> 6} tag:{kind & 31} length:{size} isCompound:{'true' if kind & 32 else 'false'}}}"
        wanted = (
            "{optional:false explicit:false application:false private:false defaultValue:<nil> tag:<nil> "
            "stringType:0 timeType:0 set:false omitEmpty:false}"
        )
        return f"asn1: structure error: tags don't match (16 vs {found}) {wanted} certificateRequest @2"
    return "asn1: syntax error: data truncated"


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_pair(pair: Pair, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
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
