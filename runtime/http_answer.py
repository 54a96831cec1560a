"""One HTTP/1.1 answer out of bytes: strict, bounded, without I/O. For the certificate API, whose answers are small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_HEAD_BYTES: Final = 16 * 1024
MAX_BODY_BYTES: Final = 64 * 1024
"A certificate has 400 bytes, with RSA keys and many names a few thousand."
_MAX_ENCODED: Final = 4
"Chunks may make a body so many times larger."
_MAX_CHUNK_LINE: Final = 256


class MalformedAnswer(Exception):
    """Not HTTP/1.1, or more than the limits; the text says what."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    reason: str
    headers: dict[str, str]
    "Names in lower case; of several with one name the last."
    body: bytes


class AnswerReader:
    """`feed` what comes until it returns the answer; `end` when the connection ends before."""

    def __init__(self, *, max_head_bytes: int = MAX_HEAD_BYTES, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._max_head_bytes = max_head_bytes
        self._max_body_bytes = max_body_bytes
        self._data = bytearray()

    def feed(self, data: bytes) -> Answer | None:
        """Take what came. Raises MalformedAnswer, also as soon as more has come than the limits allow."""
        self._data += data
        answer = self._parse(has_ended=False)
        if answer is None and len(self._data) > self._max_head_bytes + _MAX_ENCODED * self._max_body_bytes:
            raise MalformedAnswer(f"{len(self._data)} bytes and still no end")
        return answer

    def end(self) -> Answer:
        """No more comes. Raises MalformedAnswer when the answer is not whole."""
        answer = self._parse(has_ended=True)
        if answer is None:
            raise MalformedAnswer(f"the answer ends early, after {len(self._data)} bytes")
        return answer

    def _parse(self, *, has_ended: bool) -> Answer | None:
        while True:
            head, found, rest = self._data.partition(b"\r\n\r\n")
            if len(head) > self._max_head_bytes:
                raise MalformedAnswer(f"a header of more than {self._max_head_bytes} bytes")
            if not b"HTTP/1.".startswith(head[:7]):
                raise MalformedAnswer(f"this is not HTTP: {printable(bytes(head[:60]))}")
            if not found:
                return None
            status, reason, headers = _head(bytes(head))
            if status >= 200:
                break
            self._data = rest  # 1xx: only the prelude
        if headers.get("transfer-encoding"):
            body = self._chunks(bytes(rest), headers["transfer-encoding"])
        else:
            body = self._plain(bytes(rest), headers.get("content-length"), has_ended=has_ended)
        return None if body is None else Answer(status, reason, headers, body)

    def _plain(self, rest: bytes, length: str | None, *, has_ended: bool) -> bytes | None:
        if length is None:
            self._bound(len(rest))
            return rest if has_ended else None
        if not length.isascii() or not length.isdigit():
            raise MalformedAnswer(f"Content-Length {printable(length.encode())}")
        size = int(length[:12])
        self._bound(size)
        return rest[:size] if len(rest) >= size else None

    def _chunks(self, rest: bytes, encoding: str) -> bytes | None:
        if encoding.lower() != "chunked":
            raise MalformedAnswer(f"Transfer-Encoding {printable(encoding.encode())}")
        body, at = b"", 0
        while True:
            end = rest.find(b"\r\n", at)
            if end < 0 or end - at > _MAX_CHUNK_LINE:
                if len(rest) - at > _MAX_CHUNK_LINE:
                    raise MalformedAnswer("a chunk without a size")
                return None
            digits = rest[at:end].partition(b";")[0].strip()
            if not digits or digits.strip(b"0123456789abcdefABCDEF"):
                raise MalformedAnswer(f"a chunk of size {printable(digits)}")
            size = int(digits[:12], 16)
            self._bound(len(body) + size)
            at = end + 2
            if size == 0:
                return body  # trailers, if any, are nothing to us
            if len(rest) < at + size + 2:
                return None
            if rest[at + size : at + size + 2] != b"\r\n":
                raise MalformedAnswer("a chunk longer than its size")
            body += rest[at : at + size]
            at += size + 2

    def _bound(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise MalformedAnswer(f"a body of more than {self._max_body_bytes} bytes")


def _head(head: bytes) -> tuple[int, str, dict[str, str]]:
    lines = head.decode("latin-1").split("\r\n")
    version, _, said = lines[0].partition(" ")
    code, _, reason = said.partition(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0") or len(code) != 3 or not code.isascii() or not code.isdigit():
        raise MalformedAnswer(f"this is not HTTP: {printable(head[:60])}")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise MalformedAnswer(f"a header line {printable(line[:60].encode())}")
        headers[name.lower()] = value.strip(" \t")
    return int(code), reason, headers


def printable(data: bytes, limit: int = 200) -> str:
    """Foreign bytes for a message to people: one line of ASCII, cut short."""
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data[:limit])
    return f"{text}..." if len(data) > limit else text
