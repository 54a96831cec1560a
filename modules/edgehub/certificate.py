"""What edgehub must know of its own certificate: whose it is and when it is valid.

Just enough DER (X.690) and X.509 (RFC 5280) to read the subject's common name and the validity: a
whole X.509 library costs a node 15 MiB of memory in a process that otherwise needs none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

_INTEGER: Final = 0x02
_OBJECT_ID: Final = 0x06
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18
_SEQUENCE: Final = 0x30
_SET: Final = 0x31
_VERSION: Final = 0xA0
_COMMON_NAME: Final = bytes.fromhex("550403")  # 2.5.4.3


class MalformedCertificate(Exception):
    """Bytes that are no X.509 certificate."""


@dataclass(frozen=True, slots=True)
class Certificate:
    common_name: str
    "Of the subject; empty when it has none."
    not_before: float
    "Seconds since 1970."
    not_after: float


def parse(der: bytes) -> Certificate:
    """Read a certificate. Total: raises MalformedCertificate for anything else."""
    try:
        (_, body) = next(_values(_only(der, _SEQUENCE)))
        fields = list(_values(body))
        if fields[0][0] == _VERSION:
            del fields[0]
        # serial, signature algorithm, issuer, validity, subject, …
        tags = [tag for tag, _ in fields[:5]]
        if tags != [_INTEGER, _SEQUENCE, _SEQUENCE, _SEQUENCE, _SEQUENCE]:
            raise MalformedCertificate("the fields of a certificate are not where they should be")
        not_before, not_after = (_time(tag, value) for tag, value in _values(fields[3][1]))
        return Certificate(_common_name(fields[4][1]), not_before, not_after)
    except (IndexError, ValueError, StopIteration) as fault:
        raise MalformedCertificate(f"not a certificate: {fault}") from fault


def _only(data: bytes, tag: int) -> bytes:
    found, value = next(_values(data))
    if found != tag:
        raise MalformedCertificate(f"expected tag {tag:#x}, got {found:#x}")
    return value


def _values(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The tag and value of each element in `data`, one after another."""
    at = 0
    while at < len(data):
        tag, size = data[at], data[at + 1]
        at += 2
        if size & 0x80:
            octets = size & 0x7F
            if not 1 <= octets <= 4:
                raise ValueError("a length of more than four octets")
            size = int.from_bytes(data[at : at + octets], "big")
            at += octets
        if at + size > len(data):
            raise ValueError("cut short")
        yield tag, data[at : at + size]
        at += size


def _common_name(subject: bytes) -> str:
    for tag, names in _values(subject):
        if tag != _SET:
            continue
        for _, pair in _values(names):
            (_, kind), (_, value) = list(_values(pair))[:2]
            if kind == _COMMON_NAME:
                return value.decode("utf-8", "replace")
    return ""


def _time(tag: int, value: bytes) -> float:
    text = value.decode("ascii")
    if tag == _UTC_TIME:
        # RFC 5280, 4.1.2.5.1: two digits, 50 to 99 are the last century.
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError(f"tag {tag:#x} is no time")
    if len(text) != 15 or not text[:14].isdigit() or text[14] != "Z":
        raise ValueError(f"{text!r} is no time in UTC")
    # Not strptime: it brings calendar along.
    fields = [int(text[:4]), *(int(text[at : at + 2]) for at in range(4, 14, 2))]
    return datetime(*fields, tzinfo=UTC).timestamp()  # type: ignore[arg-type,misc]  # year to second, six of them
