"""The payload all contenders carry: a number, and filler up to the size. The receiver checks the numbers. Pure."""

from __future__ import annotations

from typing import Any

NUMBER_BYTES = 8
STAMP_BYTES = 8
READING_BYTES = 256
FIRST_READING = 1_000_000
"So that all numbers have the same length."
_READING_FILLER = "x" * (READING_BYTES - len(f'{{"number":{FIRST_READING},"filler":""}}'))


def filler(size: int) -> bytes:
    """What follows the number in a payload of `size` bytes."""
    return b"x" * (size - NUMBER_BYTES)


def stamped(size: int, at_ns: int) -> bytes:
    """The same, with the monotonic time of sending, in ns, behind the number."""
    return at_ns.to_bytes(STAMP_BYTES, "big") + b"x" * (size - NUMBER_BYTES - STAMP_BYTES)


def stamp_of(payload: bytes | bytearray) -> int:
    """When a stamped payload was sent, in ns."""
    return int.from_bytes(payload[NUMBER_BYTES : NUMBER_BYTES + STAMP_BYTES], "big")


def reading(number: int) -> dict[str, Any]:
    """What a device might say to the cloud: 256 bytes of JSON."""
    return {"number": FIRST_READING + number, "filler": _READING_FILLER}


class Sequence:
    """Counts numbered payloads and notices any that is out of order, missing or repeated."""

    __slots__ = ("expected", "received", "skips")

    def __init__(self) -> None:
        self.received = 0
        self.expected = 0
        self.skips = 0
        "Payloads that were not the next one."

    def take(self, payload: bytes | bytearray) -> int:
        """Count one payload; how many have come."""
        number = int.from_bytes(payload[:NUMBER_BYTES], "big")
        if number != self.expected:
            self.skips += 1
        self.expected = number + 1
        self.received += 1
        return self.received
