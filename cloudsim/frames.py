"""WebSocket frames (RFC 6455) as CloudHub's library reads and writes them.

No I/O: bytes in, parts out. What is a violation, its text and the moment it is noticed follow
gorilla/websocket 1.5.0, on which CloudHub stands (docs/cloudlink.md, Frames).
"""

from __future__ import annotations

from typing import Final

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform for which websockets has no C extension
    from websockets.utils import apply_mask

MESSAGE: Final = 0
"A whole text or binary message (the hub takes both alike); the payload."
PING: Final = 9
PONG: Final = 10
CLOSE: Final = 8
"A valid close frame; its payload. Nothing that follows it is read."
VIOLATION: Final = -1
"The peer broke the protocol: the text for the close frame 1002. Nothing that follows is read."
TOO_LARGE: Final = -2
"A message above the reader's limit; nothing that follows is read."

Part = tuple[int, bytes]
"One of the kinds above and its payload."

OPCODE_CONTINUATION: Final = 0
OPCODE_TEXT: Final = 1
OPCODE_BINARY: Final = 2
OPCODE_CLOSE: Final = 8
OPCODE_PING: Final = 9
OPCODE_PONG: Final = 10

MAX_CONTROL_BYTES: Final = 125
WRITE_BUFFER_BYTES: Final = 4082
"CloudHub's write buffer of 4096 bytes without the 14 it keeps for a frame's header."
DIRECT_WRITE_BYTES: Final = 8192
"Above twice its buffer the library writes the payload at once, then an empty final frame."

_CLOSE_CODES: Final = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013})


class FrameReader:
    """Cuts the client's bytes into parts; see the kinds above.

    `max_message_bytes` is the double's own bound (CloudHub has none): a larger message yields
    TOO_LARGE before its payload is held.
    """

    __slots__ = ("_fragments", "_held", "_limit", "_message_bytes", "_needed", "_open", "_over")

    def __init__(self, max_message_bytes: int) -> None:
        self._limit = max_message_bytes
        self._held = bytearray()
        self._needed = 2  # bytes without which parsing cannot go on
        self._fragments: list[bytes] = []
        self._message_bytes = 0
        self._open = False  # a message has begun and is not finished
        self._over = False

    @property
    def held_bytes(self) -> int:
        """Bytes kept for frames and messages that are not complete yet."""
        return len(self._held) + self._message_bytes

    def feed(self, data: bytes) -> list[Part]:
        """Take bytes as they came; returns the parts that are complete now, in order.

        After CLOSE, VIOLATION or TOO_LARGE the reader is at its end and returns nothing more.
        """
        parts: list[Part] = []
        if self._over:
            return parts
        if self._held:
            self._held += data
            if len(self._held) < self._needed:
                return parts
            data = bytes(self._held)
            self._held = bytearray()
        position, end = 0, len(data)
        while True:
            available = end - position
            if available < 2:
                self._needed = 2
                break
            first, second = data[position], data[position + 1]
            length = second & 0x7F
            # The common case first: one masked text frame that is the whole message.
            if first == 0x81 and second & 0x80 and not self._open:
                opcode, final = OPCODE_TEXT, True
            else:
                fault = self._violation(first, second)
                if fault:
                    parts.append((VIOLATION, fault.encode()))
                    self._over = True
                    return parts
                opcode, final = first & 0x0F, bool(first & 0x80)
            if length < 126:
                start = position + 6
            elif length == 126:
                start = position + 8
                if available < 8:
                    self._needed = 8
                    break
                length = data[position + 2] << 8 | data[position + 3]
            else:
                start = position + 14
                if available < 14:
                    self._needed = 14
                    break
                length = int.from_bytes(data[position + 2 : position + 10], "big")
            if self._message_bytes + length > self._limit and opcode < OPCODE_CLOSE:
                parts.append((TOO_LARGE, b""))
                self._over = True
                return parts
            stop = start + length
            if stop > end:
                self._needed = stop - position
                break
            payload = apply_mask(data[start:stop], data[start - 4 : start])
            position = stop
            if opcode < OPCODE_CLOSE:
                if final and not self._open:
                    parts.append((MESSAGE, payload))
                    continue
                self._open = not final
                self._fragments.append(payload)
                self._message_bytes += length
                if final:
                    parts.append((MESSAGE, b"".join(self._fragments)))
                    self._fragments.clear()
                    self._message_bytes = 0
            elif opcode == OPCODE_CLOSE:
                parts.append(_close_part(payload))
                self._over = True
                return parts
            else:
                parts.append((opcode, payload))
        if position < end:
            self._held += data[position:] if position else data
        return parts

    def _violation(self, first: int, second: int) -> str:
        """What is wrong with a frame's first two bytes, in the library's words and order; or empty."""
        faults = [f"RSV{number} set" for number, bit in ((1, 0x40), (2, 0x20), (3, 0x10)) if first & bit]
        opcode, final = first & 0x0F, first & 0x80
        if opcode in (OPCODE_CLOSE, OPCODE_PING, OPCODE_PONG):
            if second & 0x7F > MAX_CONTROL_BYTES:
                faults.append("len > 125 for control")
            if not final:
                faults.append("FIN not set on control")
        elif opcode in (OPCODE_TEXT, OPCODE_BINARY):
            if self._open:
                faults.append("data before FIN")
        elif opcode == OPCODE_CONTINUATION:
            if not self._open:
                faults.append("continuation after FIN")
        else:
            faults.append(f"bad opcode {opcode}")
        if not second & 0x80:
            faults.append("bad MASK")
        return ", ".join(faults)


def _close_part(payload: bytes) -> Part:
    if len(payload) >= 2:
        code = int.from_bytes(payload[:2], "big")
        if code not in _CLOSE_CODES and not 3000 <= code <= 4999:
            return VIOLATION, f"bad close code {code}".encode()
        try:
            payload[2:].decode()
        except UnicodeDecodeError:
            return VIOLATION, b"invalid utf8 payload in close frame"
    return CLOSE, payload


def echoed_close(payload: bytes) -> bytes:
    """The close frame that answers a valid one: the same code without its text, or empty."""
    return control_frame(OPCODE_CLOSE, payload[:2] if len(payload) >= 2 else b"")


def violation_close(text: bytes) -> bytes:
    """The close frame 1002 that answers a violation."""
    return control_frame(OPCODE_CLOSE, (1002).to_bytes(2, "big") + text)


def control_frame(opcode: int, payload: bytes) -> bytes:
    """An unmasked control frame."""
    return bytes((0x80 | opcode, len(payload))) + payload


def message_frames(payload: bytes) -> bytes:
    """One text message cut into frames as CloudHub cuts it (docs/cloudlink.md, Frames).

    Up to 4082 bytes one frame; up to 8192 bytes frames of 4082 and the rest; above that the whole
    payload in one frame without FIN and an empty final continuation.
    """
    size = len(payload)
    if size <= WRITE_BUFFER_BYTES:
        return _header(0x81, size) + payload
    if size > DIRECT_WRITE_BYTES:
        return b"".join((_header(0x01, size), payload, b"\x80\x00"))
    pieces: list[bytes] = []
    for start in range(0, size, WRITE_BUFFER_BYTES):
        piece = payload[start : start + WRITE_BUFFER_BYTES]
        first = (0x80 if start + WRITE_BUFFER_BYTES >= size else 0) | (OPCODE_CONTINUATION if start else OPCODE_TEXT)
        pieces += (_header(first, len(piece)), piece)
    return b"".join(pieces)


def _header(first: int, size: int) -> bytes:
    if size < 126:
        return bytes((first, size))
    if size < 65536:
        return bytes((first, 126)) + size.to_bytes(2, "big")
    return bytes((first, 127)) + size.to_bytes(8, "big")
