"""WebSocket frames (RFC 6455) for many messages at a time: a writer for a batch, a reader that skips.

The `websockets` library does the opening handshake; its frames are made and parsed one call each,
and a message beyond its limit ends the connection. Here a batch becomes one `bytes`, and a message
from the cloud that is too large is passed over while it streams, so that the link survives it.

CloudHub cuts what is longer than 4082 bytes into fragments, the last one often empty; it sends text,
and takes any fragmentation from us (docs/cloudlink.md, Frames). Each of our messages is one frame.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

_FIN: Final = 0x80
_MASKED: Final = 0x80
_MAX_CONTROL_BYTES: Final = 125  # RFC 6455, 5.5

MAX_HEADER_BYTES: Final = 14
"Of one frame that we write: 2, up to 8 for the length, 4 for the mask."

_short_head = struct.Struct("!BB").pack
_medium_head = struct.Struct("!BBH").pack
_long_head = struct.Struct("!BBQ").pack
_each_key = struct.Struct("4s").iter_unpack


@dataclass(frozen=True, slots=True)
class Text:
    """One whole message (text or binary: CloudHub takes both for the same, so do we)."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Skipped:
    """A message was too large and has been passed over."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Ping:
    payload: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    payload: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """The peer closes; `code` is 1005 when it gave none."""

    code: int
    reason: str


Event = Text | Skipped | Ping | Pong | Close


class FrameFault(Exception):
    """The peer broke RFC 6455; the connection cannot go on. Events read before it are in `events`."""

    def __init__(self, text: str, events: list[Event]) -> None:
        super().__init__(text)
        self.events = events


class FrameWriter:
    """Makes masked client frames.

    `random_bytes(n)` gives unpredictable bytes for the masks, `mask(data, key)` applies one
    (RFC 6455, 5.3): both are handed in, since the one is chance and the other a library's C code.
    """

    def __init__(self, random_bytes: Callable[[int], bytes], mask: Callable[[bytes, bytes], bytes]) -> None:
        self._random_bytes = random_bytes
        self._mask = mask

    def texts(self, payloads: Sequence[bytes]) -> list[bytes]:
        """The pieces of one text frame per payload, to be joined and written in one go."""
        keys = _each_key(self._random_bytes(4 * len(payloads)))
        mask = self._mask
        pieces: list[bytes] = []
        add = pieces.append
        for payload, (key,) in zip(payloads, keys, strict=True):
            size = len(payload)
            if size < 126:
                add(_short_head(_FIN | TEXT, _MASKED | size))
            elif size < 65536:
                add(_medium_head(_FIN | TEXT, _MASKED | 126, size))
            else:
                add(_long_head(_FIN | TEXT, _MASKED | 127, size))
            add(key)
            add(mask(payload, key))
        return pieces

    def control(self, opcode: int, payload: bytes = b"") -> bytes:
        """One control frame; the payload has at most 125 bytes."""
        if len(payload) > _MAX_CONTROL_BYTES:
            raise ValueError(f"a control frame holds {_MAX_CONTROL_BYTES} bytes, got {len(payload)}")
        key = self._random_bytes(4)
        return _short_head(_FIN | opcode, _MASKED | len(payload)) + key + self._mask(payload, key)

    def close(self, code: int, reason: str = "") -> bytes:
        return self.control(CLOSE, struct.pack("!H", code) + reason.encode()[: _MAX_CONTROL_BYTES - 2])


class FrameReader:
    """Turns the bytes of a server into events, wherever they are cut.

    A message of more than `max_message_bytes`, in one frame or in many, is not kept: its bytes are
    dropped as they come and one `Skipped` tells its size. Holds at most `max_message_bytes` and one
    read.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._rest = b""  # an incomplete frame header, or an incomplete small frame
        self._opcode = 0
        self._fin = False
        self._wanted = 0  # bytes of the payload under way that have not come yet
        self._pieces: list[bytes] | None = None  # payload under way; None between frames
        self._message: list[bytes] | None = None  # finished fragments of the message under way
        self._message_bytes = 0
        self._is_skipping = False

    @property
    def held_bytes(self) -> int:
        """What is kept of messages that are not complete."""
        held = len(self._rest) + sum(map(len, self._pieces or ()))
        return held + sum(map(len, self._message or ()))

    def receive(self, data: bytes) -> list[Event]:
        """The events that `data` completes. Raises FrameFault; the reader is then of no more use."""
        events: list[Event] = []
        try:
            self._receive(data, events)
        except ValueError as fault:
            raise FrameFault(str(fault), events) from fault
        return events

    def _receive(self, data: bytes, events: list[Event]) -> None:
        at = 0
        if self._pieces is not None:
            at = self._continue_payload(data, events)
            if self._pieces is not None:
                return
        elif self._rest:
            data = self._rest + data
            self._rest = b""
        end = len(data)
        while at < end:
            if end - at < 2:
                break
            first, second = data[at], data[at + 1]
            size = second & 0x7F
            start = at + 2
            if size == 126:
                if end - at < 4:
                    break
                size = int.from_bytes(data[at + 2 : at + 4], "big")
                start = at + 4
            elif size == 127:
                if end - at < 10:
                    break
                size = int.from_bytes(data[at + 2 : at + 10], "big")
                start = at + 10
            stop = start + size
            is_whole = first == _FIN | TEXT and second < _MASKED and stop <= end
            if is_whole and self._message is None and size <= self._max_message_bytes:
                # The usual case, a message in one frame in one read, without any detour.
                events.append(Text(data[start:stop]))
                at = stop
                continue
            self._begin_frame(first, second, size)
            if stop <= end:
                self._finish_frame(data[start:stop], events)
                at = stop
                continue
            self._pieces = []
            self._wanted = size
            at = end
            self._keep(data[start:end])
        if at < end:
            self._rest = data[at:]

    def _begin_frame(self, first: int, second: int, size: int) -> None:
        opcode = first & 0x0F
        if first & 0x70:
            raise ValueError("a reserved bit is set though no extension was agreed")
        if second & _MASKED:
            raise ValueError("a server's frame is masked")
        is_fin = first >= _FIN
        if opcode in (CLOSE, PING, PONG):
            if not is_fin or size > _MAX_CONTROL_BYTES:
                raise ValueError("a control frame is fragmented or longer than 125 bytes")
        elif opcode == CONTINUATION:
            if self._message is None:
                raise ValueError("a continuation without a beginning")
        elif opcode in (TEXT, BINARY):
            if self._message is not None:
                raise ValueError("a new message before the end of the last one")
            self._message = []
            self._message_bytes = 0
            self._is_skipping = False
        else:
            raise ValueError(f"unknown opcode {opcode}")
        self._opcode = opcode
        self._fin = is_fin
        if opcode < CLOSE:
            self._message_bytes += size
            if self._message_bytes > self._max_message_bytes:
                self._is_skipping = True
                self._message = []

    def _keep(self, piece: bytes) -> None:
        self._wanted -= len(piece)
        if self._pieces is not None and not (self._is_skipping and self._opcode < CLOSE):
            self._pieces.append(piece)

    def _continue_payload(self, data: bytes, events: list[Event]) -> int:
        """Take what belongs to the frame under way; returns where the next frame begins."""
        taken = min(self._wanted, len(data))
        self._keep(data[:taken])
        if self._wanted == 0:
            payload = b"".join(self._pieces or ())
            self._pieces = None
            self._finish_frame(payload, events)
        return taken

    def _finish_frame(self, payload: bytes, events: list[Event]) -> None:
        opcode = self._opcode
        if opcode == PING:
            events.append(Ping(payload))
        elif opcode == PONG:
            events.append(Pong(payload))
        elif opcode == CLOSE:
            if len(payload) == 1:
                raise ValueError("a close frame with half a code")
            code = int.from_bytes(payload[:2], "big") if payload else 1005
            events.append(Close(code, payload[2:].decode("utf-8", "replace")))
        else:
            message = self._message
            assert message is not None
            if not self._is_skipping:
                message.append(payload)
            if self._fin:
                if self._is_skipping:
                    events.append(Skipped(self._message_bytes))
                else:
                    events.append(Text(message[0] if len(message) == 1 else b"".join(message)))
                self._message = None
                self._is_skipping = False
