"""CloudCore's certificate API: requests in, answers out (docs/cloudlink.md, Certificates).

A core: what is signed and verified with keys is asked of an `Authority`. The words of the refusals are CloudCore's
own and those of the Go libraries it uses, for operators read them, and a node tells them apart.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, Protocol

import msgspec

MAX_BODY_BYTES: Final = 2**20
YEAR_SECONDS: Final = 365 * 86400.0
TOKEN_SECONDS: Final = 24 * 3600.0
"A token's life: twice TokenRefreshDuration."

_TEXT: Final = "text/plain; charset=utf-8"
_BINARY: Final = "application/octet-stream"
_CLIENT_AUTH: Final = 2
_HASHES: Final = {"HS256": hashlib.sha256, "HS384": hashlib.sha384, "HS512": hashlib.sha512}
_OTHER_METHODS: Final = {
    "none": "*jwt.signingMethodNone",
    **{f"RS{bits}": "*jwt.SigningMethodRSA" for bits in (256, 384, 512)},
    **{f"PS{bits}": "*jwt.SigningMethodRSAPSS" for bits in (256, 384, 512)},
    **{f"ES{bits}": "*jwt.SigningMethodECDSA" for bits in (256, 384, 512)},
    "EdDSA": "*jwt.SigningMethodEd25519",
}


@dataclass(frozen=True, slots=True)
class ApiRequest:
    method: str
    path: str
    headers: Sequence[tuple[str, str]]
    "Names in lower case."
    body: bytes | None
    "None: above MAX_BODY_BYTES."
    certificate: bytes | None
    "DER of the client's own certificate, if it sent one. Unverified."

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key == name), "")


@dataclass(frozen=True, slots=True)
class ApiAnswer:
    status: int
    body: bytes
    content_type: str = _TEXT
    headers: Sequence[tuple[str, str]] = ()


class Signer(Protocol):
    """What the API needs of `cloudsim.certificates.Authority`; see there."""

    @property
    def ca_der(self) -> bytes: ...

    @property
    def token_key(self) -> bytes: ...

    def sign_request(self, request: bytes, *, usages: Sequence[int], lifetime: timedelta, now: datetime) -> bytes: ...

    def objection(self, certificate: bytes, now: datetime) -> str | None: ...

    def subject_of(self, certificate: bytes) -> tuple[list[str], str]: ...


class ApiFault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One fault of the API's answers, until cleared or `count` requests have met it.

    slow             the answer comes after `seconds`
    drip             its bytes come one by one, `seconds` apart
    garbage          bytes that are not HTTP
    truncated        the answer ends half-way, with the connection
    endless          a body without end
    hang-up          the connection is closed without an answer
    status           `status` with `text`, whatever was asked
    skew             the Date header is `seconds` ahead of the real time (below 0: behind)
    foreign-ca       /ca.crt is the certificate of another CA
    wrong-node       the certificate is made out to another node
    wrong-key        the certificate has another key than the request
    not-yet-valid    the certificate begins in `seconds`
    refuse           nothing listens
    clear            ends all faults
    """

    fault: Literal[
        "slow",
        "drip",
        "garbage",
        "truncated",
        "endless",
        "hang-up",
        "status",
        "skew",
        "foreign-ca",
        "wrong-node",
        "wrong-key",
        "not-yet-valid",
        "refuse",
        "clear",
    ]
    seconds: float = 0.0
    status: int = 503
    text: str = "no"
    path: str = ""
    "Only requests for this path; empty: all."
    count: int | None = None

    def __post_init__(self) -> None:
        if not 100 <= self.status <= 999:
            raise ValueError(f"`status` is {self.status}, expected 100 to 999")
        if self.fault in ("slow", "drip") and not 0 <= self.seconds <= 86400:
            raise ValueError(f"`seconds` is {self.seconds}, expected 0 to 86400")


class CertificateApi:
    """`answer` each request. `is_node` tells whether the cluster has a node of that name."""

    def __init__(
        self, signer: Signer, is_node: Callable[[str], bool], *, signing_seconds: float = YEAR_SECONDS
    ) -> None:
        self._signer = signer
        self._is_node = is_node
        self.signing_seconds = signing_seconds
        "EdgeCertSigningDuration; may be changed at any time."

    def answer(self, request: ApiRequest, *, now: float) -> ApiAnswer | None:
        """None: the connection is closed without a word, for the handler of the real one crashes."""
        path = request.path.partition("?")[0]
        if path in ("/ca.crt", "/edge.crt") or path.startswith("/node/"):
            if request.method != "GET":
                return ApiAnswer(405, b"405: Method Not Allowed", headers=(("Allow", "GET"),))
            if path == "/ca.crt":
                return ApiAnswer(200, self._signer.ca_der, _BINARY)
            if path == "/edge.crt":
                return self._edge_certificate(request, datetime.fromtimestamp(now, UTC))
            name = path.removeprefix("/node/")
            if name and "/" not in name:
                return ApiAnswer(200, b"Node found") if self._is_node(name) else ApiAnswer(404, b"Node not found")
        return ApiAnswer(404, b"404: Page Not Found")

    def _edge_certificate(self, request: ApiRequest, now: datetime) -> ApiAnswer | None:
        node = request.header("nodename")
        if request.certificate is not None:
            # A token beside a certificate is not looked at.
            failed = f"failed to verify the certificate for edgenode: {node}, err: "
            if (objection := self._signer.objection(request.certificate, now)) is not None:
                return _text(401, f"{failed}failed to verify edge certificate: {objection}")
            organisations, name = self._signer.subject_of(request.certificate)
            if not organisations:
                return None  # index out of range
            is_old_style = organisations[0] == "KubeEdge" and name == "kubeedge.io"
            if not is_old_style and (organisations[0] != "system:nodes" or name != f"system:node:{node}"):
                return _text(401, f"{failed}request node name is not match with the certificate")
        elif (refusal := token_refusal(request.header("authorization"), self._signer.token_key, now)) is not None:
            return _text(401, f"token validation failure, {refusal}")
        return self._sign(request, node, now)

    def _sign(self, request: ApiRequest, node: str, now: datetime) -> ApiAnswer:
        failed = f"failed to sign certs for edgenode {node}, err: "
        usages: list[int] = [_CLIENT_AUTH]
        if header := request.header("extkeyusages"):
            try:
                usages = msgspec.json.decode(header, type=list[int])
            except ValueError:
                what = f"invalid character {header[0]!r} looking for beginning of value"
                return _text(500, f"{failed}unmarshal http header ExtKeyUsages fail, err: {what}")
        if request.body is None:
            return _text(500, f"{failed}fail to read file when signing the cert, err: http: request body too large")
        try:
            certificate = self._signer.sign_request(
                request.body, usages=usages, lifetime=timedelta(seconds=self.signing_seconds), now=now
            )
        except Exception as fault:  # whatever a request makes of the libraries: the hub answers 500 as well
            return _text(500, f"{failed}fail to signCerts, err: {fault}")
        return ApiAnswer(200, certificate, _BINARY)


def _text(status: int, text: str) -> ApiAnswer:
    return ApiAnswer(status, text.encode())


# --- tokens ---------------------------------------------------------------------------------------


def make_token(signer: Signer, *, expires_at: float | None, algorithm: str = "HS256") -> str:
    """A token as `keadm gettoken` shows it: the CA's hash, and a JWT that expires (seconds since 1970)."""
    head = _encode(json.dumps({"alg": algorithm, "typ": "JWT"}, separators=(",", ":")).encode())
    claims = {} if expires_at is None else {"exp": int(expires_at)}
    said = f"{head}.{_encode(json.dumps(claims, separators=(',', ':')).encode())}"
    digest = _HASHES.get(algorithm)
    signature = hmac.new(signer.token_key, said.encode(), digest).digest() if digest is not None else b""
    return f"{hashlib.sha256(signer.ca_der).hexdigest()}.{said}.{_encode(signature)}"


def token_refusal(authorization: str, key: bytes, now: datetime) -> str | None:
    """What is wrong with an Authorization header, in CloudCore's words; None: nothing."""
    if not authorization:
        return "token is empty"
    words = authorization.split(" ")
    if len(words) != 2:
        return "token cannot be split"
    fault = _jwt_fault(words[1], key, now)
    return None if fault is None else f"err: {fault}"


def _jwt_fault(text: str, key: bytes, now: datetime) -> str | None:
    parts = text.split(".")
    if len(parts) != 3:
        return "token is malformed: token contains an invalid number of segments"
    try:
        header = msgspec.json.decode(_decode(parts[0]), type=dict[str, object])
        claims = msgspec.json.decode(_decode(parts[1]), type=dict[str, object])
    except (ValueError, RecursionError):
        return "token is malformed: could not base64 decode header"
    algorithm = header.get("alg")
    if not isinstance(algorithm, str):
        return "token is unverifiable: signing method (alg) is unspecified"
    if algorithm in _OTHER_METHODS:
        found = _OTHER_METHODS[algorithm]
        wrong = f"invalid token method type, want *jwt.SigningMethodHMAC, but is {found}"
        return f"token is unverifiable: error while executing keyfunc: {wrong}"
    digest = _HASHES.get(algorithm)
    if digest is None:
        return "token is unverifiable: signing method (alg) is unavailable"
    try:
        signature = _decode(parts[2])
    except ValueError:
        return "token is malformed: could not base64 decode signature"
    wanted = hmac.new(key, f"{parts[0]}.{parts[1]}".encode(), digest).digest()
    if not hmac.compare_digest(signature, wanted):
        return "token signature is invalid: signature is invalid"
    expires = claims.get("exp")
    if isinstance(expires, int | float) and now.timestamp() >= expires:
        return "token has invalid claims: token is expired"
    return None


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as fault:
        raise ValueError(str(fault)) from fault
