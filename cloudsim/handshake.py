"""The HTTP/1.1 side of a connection to CloudHub: requests in, an upgrade or a refusal out.

The order of the checks and the answers are those of Go's net/http and gorilla/websocket 1.5.0
(docs/cloudlink.md, Handshake).
"""

from __future__ import annotations

import base64
import hashlib
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

MAX_REQUEST_BYTES: Final = 64 * 1024
"Request line and headers. Go allows 1 MiB; nothing legitimate comes near this."

_MAGIC: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class BadRequest(Exception):
    """Not HTTP; the connection is answered 400 and closed."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request's head."""

    method: str
    target: str
    headers: Sequence[tuple[str, str]]
    "Names in lower case, in the order they came."

    def header(self, name: str) -> str:
        """The first value of a header, or empty: that is what CloudHub looks at."""
        return next((value for key, value in self.headers if key == name), "")

    def has_token(self, name: str, token: str) -> bool:
        """Whether one of the comma-separated values of a header is `token`, in any case."""
        return any(
            item.strip().lower() == token for key, value in self.headers if key == name for item in value.split(",")
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What to write; `upgraded` says that frames follow."""

    data: bytes
    upgraded: bool = False


def parse_request(head: bytes) -> Request:
    """A request's head without its final empty line. Raises BadRequest."""
    try:
        lines = head.decode("latin-1").split("\r\n")
        method, target, version = lines[0].split(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0"):
            raise BadRequest(f"version {version!r}")
        headers = []
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise BadRequest(f"header line {line[:60]!r}")
            headers.append((name.lower(), value.strip(" \t")))
    except ValueError as fault:
        raise BadRequest(f"request line {head[:60]!r}") from fault
    request = Request(method, target, tuple(headers))
    if version == "HTTP/1.1" and not request.header("host"):
        raise BadRequest("missing required Host header")
    return request


def answer(request: Request, http_date: str) -> Answer:
    """The answer to a request: 101, or the refusal CloudHub would give."""
    path = request.target.partition("?")[0]
    clean = posixpath.normpath("/" + path.lstrip("/")) + ("/" if path.endswith("/") and path.strip("/") else "")
    if clean != path and request.method != "CONNECT":
        return _redirect(clean, http_date)
    if not request.has_token("connection", "upgrade") or not request.has_token("upgrade", "websocket"):
        return refuse(400, "Bad Request", http_date)
    if request.method != "GET":
        return refuse(405, "Method Not Allowed", http_date)
    if not request.has_token("sec-websocket-version", "13"):
        return refuse(400, "Bad Request", http_date)
    origin = request.header("origin")
    if origin and urlsplit(origin).netloc.lower() != request.header("host").lower():
        return refuse(403, "Forbidden", http_date)
    key = request.header("sec-websocket-key")
    if not key:
        return refuse(400, "Bad Request", http_date)
    accept = base64.b64encode(hashlib.sha1(key.encode("latin-1") + _MAGIC).digest()).decode()
    # No subprotocol and no extension is ever chosen, whatever was offered.
    return Answer(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode(),
        upgraded=True,
    )


def refuse(status: int, reason: str, http_date: str) -> Answer:
    """A refusal as the websocket library writes it; the connection stays open for the next request."""
    body = f"{reason}\n"
    return Answer(
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: text/plain; charset=utf-8\r\nSec-Websocket-Version: 13\r\n"
        f"X-Content-Type-Options: nosniff\r\nDate: {http_date}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )


def refuse_broken(fault: str) -> bytes:
    """The last words to something that is not a request."""
    reason = "400 Bad Request" + (f": {fault}" if fault.startswith("missing") else "")
    return f"HTTP/1.1 {reason}\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n{reason}".encode()


def _redirect(location: str, http_date: str) -> Answer:
    body = f'<a href="{location}">Temporary Redirect</a>.\n\n'
    return Answer(
        f"HTTP/1.1 307 Temporary Redirect\r\nContent-Type: text/html; charset=utf-8\r\nLocation: {location}\r\n"
        f"Date: {http_date}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
