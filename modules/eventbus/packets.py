"""MQTT packets as they come from a broker: cut out of the stream, and PUBLISH decoded.

PUBLISH is the one packet that comes by the thousand. Decoding it here costs a tenth of what the MQTT library needs,
which makes an object tree of each message's (always empty) properties. All other packets go to the library as they
are. References are to MQTT 5; 3.1.1 differs only in having no properties.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from runtime.errors import EdgezmqError

_PUBLISH: Final = 0x30
_MAX_LENGTH_BYTES: Final = 4


class MalformedPacket(EdgezmqError):
    """Bytes that are no MQTT packet, or one that we did not ask for: the connection has to end (MQTT 5, 4.13)."""


class InPublish(NamedTuple):
    """A PUBLISH from the broker."""

    mid: int
    "Packet id; 0 at QoS 0."
    qos: int
    "0 or 1: we subscribe at 1."
    dup: bool
    topic: str | None
    "None: not UTF-8."
    payload: bytes | None
    "None: longer than the reader's limit, and skipped."
    size_bytes: int
    "Of the packet without its fixed header."


class PacketReader:
    """Cuts packets out of a stream. Holds at most `limit_bytes` of one packet and what was fed beside it.

    A PUBLISH beyond the limit is not kept: its head is reported, its payload skipped while it streams. Any other
    packet that long is malformed.
    """

    def __init__(self, *, is_mqtt5: bool, limit_bytes: int) -> None:
        self._is_mqtt5 = is_mqtt5
        self._limit = limit_bytes
        self._buffer = bytearray()
        self._position = 0
        self._to_skip = 0

    @property
    def unread_bytes(self) -> int:
        return len(self._buffer) - self._position

    def feed(self, data: bytes) -> None:
        if self._to_skip:
            skipped = min(self._to_skip, len(data))
            self._to_skip -= skipped
            data = data[skipped:]
        if self._position:
            del self._buffer[: self._position]
            self._position = 0
        self._buffer += data

    def next(self) -> InPublish | bytes | None:
        """The next packet: a PUBLISH decoded, any other as its bytes; None: feed more. Raises MalformedPacket."""
        buffer, start = self._buffer, self._position
        length, shift, body = 0, 0, start + 1
        while True:
            if body >= len(buffer):
                return None
            byte = buffer[body]
            body += 1
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift >= 7 * _MAX_LENGTH_BYTES:
                raise MalformedPacket("remaining length of more than four bytes")
        first, end = buffer[start], body + length
        if length > self._limit:
            return self._too_long(first, body, length)
        if end > len(buffer):
            return None
        self._position = end
        if first & 0xF0 != _PUBLISH:
            return bytes(buffer[start:end])
        mid, topic, payload_at = self._head(first, body, end)
        return InPublish(
            mid, first >> 1 & 3, bool(first & 8), _text(topic), bytes(memoryview(buffer)[payload_at:end]), length
        )

    def _head(self, first: int, body: int, end: int) -> tuple[int, bytes, int]:
        """Packet id, topic and where the payload begins, of a PUBLISH whose body is at `body`."""
        buffer = self._buffer
        topic_at = body + 2
        at = topic_at + (buffer[body] << 8 | buffer[body + 1]) if topic_at <= end else end + 1
        if at > end:
            raise MalformedPacket("PUBLISH: topic longer than the packet")
        topic = bytes(buffer[topic_at:at])
        mid = 0
        if first & 0x06:
            if first & 0x06 != 0x02:
                raise MalformedPacket("PUBLISH at QoS 2 or 3, subscribed was 1")
            if at + 2 > end:
                raise MalformedPacket("PUBLISH: no packet id")
            mid = buffer[at] << 8 | buffer[at + 1]
            if not mid:
                raise MalformedPacket("PUBLISH: packet id 0")
            at += 2
        if self._is_mqtt5:
            at = self._after_properties(at, end)
        return mid, topic, at

    def _after_properties(self, at: int, end: int) -> int:
        """Where the properties end. None concerns us: a broker uses topic aliases only where a client allows them."""
        length = shift = 0
        while True:
            if at >= end or shift >= 7 * _MAX_LENGTH_BYTES:
                raise MalformedPacket("PUBLISH: property length")
            byte = self._buffer[at]
            at += 1
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        if at + length > end:
            raise MalformedPacket("PUBLISH: properties longer than the packet")
        return at + length

    def _too_long(self, first: int, body: int, length: int) -> InPublish | None:
        if first & 0xF0 != _PUBLISH:
            raise MalformedPacket(f"packet type {first >> 4} of {length} bytes")
        # Enough for the longest topic, the packet id and more properties than a broker ever forwards.
        if len(self._buffer) - body < min(length, _HEAD_BYTES):
            return None
        mid, topic, _ = self._head(first, body, min(body + length, len(self._buffer)))
        self._position = min(body + length, len(self._buffer))
        self._to_skip = body + length - self._position
        return InPublish(mid, first >> 1 & 3, bool(first & 8), _text(topic), None, length)


_HEAD_BYTES: Final = 2 * 65536 + 4096


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def puback(mid: int) -> bytes:
    """PUBACK with reason Success, which may be left out (MQTT 5, 3.4.2.1), and so the same in 3.1.1."""
    return b"\x40\x02" + mid.to_bytes(2, "big")
