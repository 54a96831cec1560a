"""Getting a certificate from CloudCore: what a token says, what answers mean, when to renew. A core.

Joining: the CA is fetched without verification and pinned by the hash in the token; only then anything is sent, and
only to a server that the CA vouches for. Renewing: the same over mutual TLS with the present certificate. The
contract is docs/cloudlink.md, Certificates; who does it is runtime/enrolling.py.
"""

from __future__ import annotations

import runtime.libraries  # noqa: F401  (first: see there)

# isort: split

import base64
import binascii
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import msgspec

from runtime.errors import ConfigError, NotEnrolled
from runtime.http_answer import Answer, printable
from runtime.proxy import Proxy

# --- why no certificate came: the codes of NotEnrolled -------------------------------------------------

TOKEN_MALFORMED: Final = "token-malformed"
TOKEN_EXPIRED: Final = "token-expired"
TOKEN_REJECTED: Final = "token-rejected"
"The cloud does not know its signature."
CA_MISMATCH: Final = "ca-mismatch"
"The server's CA is not the token's: another cloud, or somebody in between."
NODE_NAME: Final = "node-name"
"The certificate is, or would be, another node's."
UNREACHABLE: Final = "unreachable"
TLS_FAILED: Final = "tls"
CLOCK: Final = "clock"
NOT_A_CLOUDHUB: Final = "not-a-cloudhub"
CLOUD_FAILED: Final = "cloud-failed"
BAD_CERTIFICATE: Final = "bad-certificate"
"What the cloud issued cannot be used, or the cloud does not take the certificate that we have."
FILES: Final = "files"
BUSY: Final = "busy"
"Another process is at it."
INTERNAL: Final = "internal"

PASSING: Final = frozenset({UNREACHABLE, CLOUD_FAILED, BUSY})
"These may pass by themselves; the others wait for a person, a clock or another token."

DEFAULT_PORT: Final = 10002
MAX_SKEW_SECONDS: Final = 300.0
"Clocks that differ by more make certificates that are not valid yet, or no more."
NODES: Final = "system:nodes"
_HEX: Final = frozenset("0123456789abcdef")
_MAX_TOKEN: Final = 16 * 1024
_NEVER: Final = 2**53
"Seconds since 1970 that no calendar has."


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted. With a token: join. Without: renew with the present certificate."""

    server: str
    "https://host:port of the certificate API."
    node_name: str
    ca_file: str
    cert_file: str
    key_file: str
    token: str = ""
    seconds: float = 30.0
    "For each request, name resolution and TLS included."
    server_name: str = ""
    "The name that the server's certificate must have; empty: the server's host."
    proxy: Proxy | None = None
    proxy_password_file: str = ""
    "In place of the password in `proxy`."
    proxy_ca_file: str = ""
    "Of an https proxy; empty: the machine's."

    def __repr__(self) -> str:
        return f"Job({'join' if self.token else 'renew'}, {self.server}, {self.node_name})"


class Issued(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate that is in its file now."""

    common_name: str
    not_before: float
    "Seconds since 1970."
    not_after: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a job went: `issued`, or a refusal's code and text."""

    issued: Issued | None = None
    code: str = ""
    text: str = ""


# --- what an operator gives ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Token:
    """`SHA256-OF-CA.JWT`. Only the cloud can tell whether the JWT is good."""

    ca_sha256: str
    jwt: str = field(repr=False)
    expires_at: float | None
    "Seconds since 1970, as it says itself; None: it says nothing."


def parse_token(text: str) -> Token:
    """Total: raises NotEnrolled (token-malformed), never with the token in its text."""
    words = text.strip()
    parts = words.split(".")
    if not words:
        raise _malformed_token("it is empty")
    if len(words) > _MAX_TOKEN or not words.isascii() or any(each.isspace() for each in words):
        raise _malformed_token("it holds blanks or other characters that no token has, or it is too long")
    if len(parts) == 3:
        raise _malformed_token("it has three parts: the hash of the CA before the first dot is missing")
    if len(parts) != 4:
        raise _malformed_token(f"it has {len(parts)} parts between dots, expected four")
    digest = parts[0].lower()
    if len(digest) != 64 or not _HEX.issuperset(digest):
        raise _malformed_token(f"its first part has {len(digest)} characters, expected 64 hexadecimal digits")
    try:
        claims = msgspec.json.decode(
            base64.b64decode(parts[2] + "=" * (-len(parts[2]) % 4), altchars=b"-_", validate=True)
        )
    except (binascii.Error, ValueError, RecursionError):
        raise _malformed_token("its third part is not JSON in base64url") from None
    expires = claims.get("exp") if isinstance(claims, dict) else None
    if not isinstance(expires, int | float) or abs(expires) >= _NEVER:
        expires = None
    return Token(digest, ".".join(parts[1:]), None if expires is None else float(expires))


def _malformed_token(what: str) -> NotEnrolled:
    return NotEnrolled(
        TOKEN_MALFORMED, f"this is no token: {what}. Copy the whole line that `keadm gettoken` prints in the cloud"
    )


def parse_server(text: str, key: str = "--server") -> tuple[str, int]:
    """Host and port of `https://host:port`, or `host`, or `host:port`. Raises ConfigError naming `key`."""
    rule = f"https://HOST:PORT or HOST[:PORT] (port {DEFAULT_PORT} if none is given), IPv6 in brackets"
    scheme, found, rest = text.strip().partition("://")
    if found and scheme.lower() != "https":
        raise ConfigError(key, text, rule)
    address = (rest if found else scheme).removesuffix("/")
    host, colon, port = address.rpartition(":")
    if not colon or (address.startswith("[") and address.endswith("]")):
        host, port = address, str(DEFAULT_PORT)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(key, text, rule)
    if not host or any(each in host for each in "/@?# ") or not port.isascii() or not port.isdigit():
        raise ConfigError(key, text, rule)
    if not 1 <= int(port[:6]) <= 65535:
        raise ConfigError(key, text, rule)
    return host, int(port)


def show_server(host: str, port: int) -> str:
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


# --- what is sent ---------------------------------------------------------------------------------------


def request_head(host: str, port: int, path: str, *, headers: Sequence[tuple[str, str]] = (), length: int = 0) -> bytes:
    """The head of a GET; CloudCore takes the CSR as the body of one."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"GET {path} HTTP/1.1", f"Host: {where}", "User-Agent: edgezmq", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    if length:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


# --- what an answer means ---------------------------------------------------------------------------------


def check_clock(date: str | None, now: float) -> None:
    """Compare this node's clock with an answer's Date header. Raises NotEnrolled (clock)."""
    theirs = http_date(date or "")
    if theirs is None or abs(theirs - now) <= MAX_SKEW_SECONDS:
        return
    raise NotEnrolled(
        CLOCK,
        f"this node's clock says {show_time(now)}, the cloud's {show_time(theirs)}: certificates would not be valid. "
        "Set the clock (timedatectl set-ntp true) and try again",
    )


def http_date(text: str) -> float | None:
    """A Date header as seconds since 1970; None for anything else."""
    try:
        return datetime.strptime(text, "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def judge_ca(answer: Answer, token: Token, server: str) -> bytes:
    """The CA's certificate (DER) out of the answer to /ca.crt. Raises NotEnrolled."""
    if answer.status != 200:
        raise _unexpected(answer, server)
    digest = hashlib.sha256(answer.body).hexdigest()
    if digest == token.ca_sha256:
        return answer.body
    if not answer.body.startswith(b"\x30"):
        raise _not_a_cloudhub(server, f"its /ca.crt is no certificate: {printable(answer.body, 60)}")
    raise NotEnrolled(
        CA_MISMATCH,
        f"{server}: its CA has the SHA-256 {digest}, the token wants {token.ca_sha256}. The token is of another cloud, "
        "or of a CA that was replaced, or somebody between here and the cloud answers in its place. "
        "Nothing was sent; get a new token from this cloud (keadm gettoken)",
    )


def judge_certificate(answer: Answer, server: str, *, node_name: str, token: Token | None, now: float) -> bytes:
    """The issued certificate (DER) out of the answer to /edge.crt; without `token` it was a renewal.

    Raises NotEnrolled.
    """
    said, whole = printable(answer.body), answer.body.decode("ascii", "replace")
    if answer.status == 200:
        if not answer.body.startswith(b"\x30"):
            raise _not_a_cloudhub(server, f"its /edge.crt is no certificate: {printable(answer.body, 60)}")
        return answer.body
    if answer.status != 401:
        raise _unexpected(answer, server)
    if token is None:
        if "node name is not match" in whole:
            raise NotEnrolled(
                NODE_NAME,
                f"{server} does not renew a certificate that is not made out to system:node:{node_name}: {said!r}. "
                "Set modules.edged.hostnameOverride to the name in the certificate, or join anew under this one",
            )
        advice = (
            "Join anew with a token" if "expired" in whole else "Is it of this cloud? If not, join anew with a token"
        )
        raise NotEnrolled(
            BAD_CERTIFICATE,
            f"{server} does not take this node's present certificate: {said!r}. {advice} (edgezmq join)",
        )
    if "expired" in whole:
        raise NotEnrolled(
            TOKEN_EXPIRED,
            f"{server}: the token is expired"
            + (f" since {show_time(token.expires_at)}" if token.expires_at is not None else "")
            + f", and it is {show_time(now)}. Tokens live for a day: get a new one (keadm gettoken)",
        )
    raise NotEnrolled(
        TOKEN_REJECTED,
        f"{server} does not take the token: {said!r}. It is of another cloud, or was cut or changed on its way: "
        "get a new one (keadm gettoken)",
    )


def _unexpected(answer: Answer, server: str) -> NotEnrolled:
    said = printable(answer.body)
    if answer.status >= 500:
        return NotEnrolled(
            CLOUD_FAILED, f"{server} failed: {answer.status} {said!r}, expected 200. Look at CloudCore's log; try again"
        )
    return _not_a_cloudhub(server, f"it answers {answer.status} {printable(answer.reason.encode())}: {said!r}")


def _not_a_cloudhub(server: str, what: str) -> NotEnrolled:
    return NotEnrolled(
        NOT_A_CLOUDHUB,
        f"{server} is no CloudCore: {what}. Is that the address of its certificate API (port {DEFAULT_PORT}), "
        "and nothing else in between?",
    )


def malformed(server: str, what: object) -> NotEnrolled:
    """For an answer that is not HTTP."""
    return _not_a_cloudhub(server, str(what))


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is in an issued certificate, read by whoever has an X.509 library."""

    common_name: str
    organisations: tuple[str, ...]
    not_before: float
    not_after: float
    has_our_key: bool
    is_of_ca: bool
    "Signed by the CA that the token names, or that is in tlsCaFile."
    is_for_clients: bool


def judge_issued(facts: Facts, server: str, *, node_name: str, now: float) -> Issued:
    """The certificate, if it can serve this node. Raises NotEnrolled."""
    wanted = f"system:node:{node_name}"
    if facts.common_name != wanted:
        raise NotEnrolled(
            NODE_NAME,
            f"{server} made the certificate out to {printable(facts.common_name.encode())!r}, expected {wanted!r}. "
            "Is the node's name as the cloud knows it (--node-name, modules.edged.hostnameOverride)?",
        )
    faults = (
        ("its key is not the one that was asked for", not facts.has_our_key),
        ("it is not signed by the cloud's CA", not facts.is_of_ca),
        (f"its organisation is {list(facts.organisations)}, expected {NODES}", facts.organisations[:1] != (NODES,)),
        ("it is not for client authentication", not facts.is_for_clients),
    )
    for what, is_so in faults:
        if is_so:
            raise NotEnrolled(BAD_CERTIFICATE, f"{server} issued a certificate that is of no use: {what}")
    if facts.not_before > now + MAX_SKEW_SECONDS or facts.not_after <= now:
        raise NotEnrolled(
            CLOCK,
            f"{server} issued a certificate that is valid from {show_time(facts.not_before)} to "
            f"{show_time(facts.not_after)}, and this node's clock says {show_time(now)}. Set the clock here "
            "(timedatectl set-ntp true), or in the cloud",
        )
    return Issued(common_name=facts.common_name, not_before=facts.not_before, not_after=facts.not_after)


# --- when to renew -------------------------------------------------------------------------------------------

EARLIEST: Final = 0.7
LATEST: Final = 0.9
"Of the lifetime, as KubeEdge has it; by chance between the two, so that a fleet does not come at once."
_RETRY_FIRST_SECONDS: Final = 2.0
_RETRY_CAP_SECONDS: Final = 300.0
_RETRY_SHARE: Final = 0.02
"No pause between two tries is longer than this share of the lifetime."


class RotationSchedule:
    """When the certificate that is valid in `not_before` … `not_after` is to be renewed. Chance is handed in.

    `due` is in seconds since 1970, as validity is; pauses between tries are not, for that clock may be set meanwhile.
    """

    def __init__(self, chance: random.Random, *, not_before: float, not_after: float) -> None:
        self._chance = chance
        self._lifetime = max(not_after - not_before, 0.0)
        self._failures = 0
        self.due = not_before + self._lifetime * chance.uniform(EARLIEST, LATEST)

    def failed(self) -> float:
        """A try failed: how many seconds until the next."""
        longest = min(
            _RETRY_FIRST_SECONDS * 2.0 ** min(self._failures, 16), _RETRY_CAP_SECONDS, self._lifetime * _RETRY_SHARE
        )
        self._failures += 1
        return longest * self._chance.uniform(0.5, 1.0)


def show_time(seconds: float) -> str:
    """A time for people: 2026-11-23 17:09:21 UTC."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return "a time beyond all calendars"
