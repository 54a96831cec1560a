"""ZAP (ZeroMQ RFC 27): libzmq asks, for each connection over tcp, whether a CURVE key may come in. A core.

The key becomes the connection's `User-Id`, which libzmq hands out with every message of it; what the key may do is
for runtime/access.py.
"""

from __future__ import annotations

from base64 import b85encode
from collections.abc import Collection, Sequence
from typing import Final

ENDPOINT: Final = "inproc://zeromq.zap.01"
"Where libzmq asks, within the process."

_VERSION: Final = b"1.0"
_KEY_BYTES: Final = 32
_FRAMES: Final = 7
"version, request id, domain, address, routing id, mechanism, credentials (CURVE: the key)"
_Z85: Final = bytes.maketrans(
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~",
    b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#",
)
"Python's base85 digits to those of Z85 (ZeroMQ RFC 32)."


def z85(key: bytes) -> str:
    """32 bytes of a CURVE key as 40 characters."""
    return b85encode(key).translate(_Z85).decode()


def fingerprint(public: str) -> str:
    """What logs show of a key: the first 16 hex digits of the SHA-256 of its Z85 form."""
    from hashlib import sha256  # brings OpenSSL along, which a broker without CURVE does without

    return sha256(public.encode()).hexdigest()[:16]


def answer(request: Sequence[bytes], admitted: Collection[str]) -> tuple[list[bytes], str]:
    """The frames to answer with, and the key that was turned away ("" when it was not, or there was none)."""
    request_id = request[1] if len(request) > 1 else b""
    if len(request) != _FRAMES or request[0] != _VERSION:
        return [_VERSION, request_id, b"500", b"ZAP 1.0 with CURVE expected", b"", b""], ""
    if request[5] != b"CURVE" or len(request[6]) != _KEY_BYTES:
        return [_VERSION, request_id, b"400", b"CURVE expected", b"", b""], ""
    key = z85(request[6])
    if key not in admitted:
        return [_VERSION, request_id, b"400", b"no rule of this node names the key", b"", b""], key
    return [_VERSION, request_id, b"200", b"OK", key.encode(), b""], ""
