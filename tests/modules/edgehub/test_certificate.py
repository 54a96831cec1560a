"""Reading a certificate's name and dates, against the `cryptography` library."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from modules.edgehub.certificate import Certificate, MalformedCertificate, parse

KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(name: x509.Name, not_before: datetime, not_after: datetime) -> bytes:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "KubeEdge")]))
        .public_key(KEY.public_key())
        .serial_number(1024)
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .sign(KEY, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


def subject(common_name: str | None) -> x509.Name:
    names = [x509.NameAttribute(NameOID.COUNTRY_NAME, "CN"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "o" * 60)]
    if common_name is not None:
        names.append(x509.NameAttribute(NameOID.COMMON_NAME, common_name))
    return x509.Name(names)


NOW = datetime(2026, 11, 23, 18, 0, 0, tzinfo=UTC)
GOOD = certificate(subject("system:node:edge-1"), NOW, NOW + timedelta(days=365))


@pytest.mark.parametrize("common_name", ["system:node:edge-1", "edge-é-你", "x" * 64, None])
@pytest.mark.parametrize(
    ("not_before", "not_after"),
    [
        (NOW, NOW + timedelta(days=365)),
        (datetime(1970, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (NOW, datetime(2126, 1, 1, tzinfo=UTC)),  # beyond 2049: GeneralizedTime
    ],
)
def test_name_and_dates_are_read(common_name: str | None, not_before: datetime, not_after: datetime) -> None:
    der = certificate(subject(common_name), not_before, not_after)
    assert parse(der) == Certificate(common_name or "", not_before.timestamp(), not_after.timestamp())


@given(st.binary(max_size=80))
def test_other_bytes_are_no_certificate(data: bytes) -> None:
    with pytest.raises(MalformedCertificate):
        parse(data)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_a_damaged_certificate_is_read_or_refused(at: int, byte: int) -> None:
    damaged = GOOD[:at] + bytes((byte,)) + GOOD[at + 1 :]
    for data in (damaged, GOOD[:at]):
        try:
            parse(data)
        except MalformedCertificate:
            pass
