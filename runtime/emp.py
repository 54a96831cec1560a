"""EMP/1, the Edge Module Protocol: its frames as values, and both ways between the two.

`docs/emp.md` is the normative text; this file is its only implementation of the wire. Every header
is a MessagePack array; decoding is total (a value, or MalformedFrame), checks types and ranges, takes
trailing fields it does not know, and allocates in proportion to the bytes that came.
"""

from __future__ import annotations

import runtime.libraries  # noqa: F401  (first: see there)

# isort: split

from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from runtime.errors import MalformedFrame
from runtime.names import NAME_PATTERN

# --- verbs ---------------------------------------------------------------------------------------

HELLO: Final = b"HELLO/1"
WELCOME: Final = b"WELCOME/1"
REFUSED: Final = b"REFUSED/1"
SEND: Final = b"SEND/1"
DELIVER: Final = b"DELIVER/1"
ACK: Final = b"ACK/1"
SETTLED: Final = b"SETTLED/1"
PING: Final = b"PING/1"
PONG: Final = b"PONG/1"
WHO: Final = b"WHO/1"
FENCED: Final = b"FENCED/1"
DRAIN: Final = b"DRAIN/1"
BYE: Final = b"BYE/1"
ADMIN: Final = b"ADMIN/1"

# --- why a message was not handled (SETTLED, ACK) ------------------------------------------------

UNROUTABLE: Final = "unroutable"
DENIED: Final = "denied"
TOO_LARGE: Final = "too-large"
INVALID: Final = "invalid"
EXPIRED: Final = "expired"
FAILED: Final = "failed"
GONE: Final = "gone"
FENCED_REASON: Final = "fenced"
OVERTAKEN: Final = "overtaken"
OVERFLOW: Final = "overflow"

REASONS: Final = frozenset(
    {UNROUTABLE, DENIED, TOO_LARGE, INVALID, EXPIRED, FAILED, GONE, FENCED_REASON, OVERTAKEN, OVERFLOW}
)
"The refusal reasons of EMP/1. A receiver may give others (lower-case words joined by `-`)."

# --- why a HELLO, a header or a verb was refused (REFUSED) ----------------------------------------

NAME_TAKEN: Final = "name-taken"
HELLO_DENIED: Final = "denied"
BAD_VERSION: Final = "version"
BAD_HEADER: Final = "bad-header"
UNKNOWN_VERB: Final = "unknown-verb"
TOO_MANY: Final = "too-many"

# --- flags of SEND and DELIVER ---------------------------------------------------------------------

EXPECTS_REPLY: Final = 1
"The sender waits for a reply to each message of the batch."
REPLY: Final = 2
"The batch holds replies; `requester` says to which incarnation."
RESENT: Final = 4
"SEND: the sender sent this before; it may have been handled."
RETAIN: Final = 8
"Keep the (one) message under `retain_key` for members of the group that come later."
REDELIVERED: Final = 16
"DELIVER: it may have been handled before. False alarms are normal."
FROM_STORE: Final = 32
"DELIVER: a retained message out of the broker's store, not a fresh one."


class Priority(IntEnum):
    """Lane classes, served lowest first. A lane is (sender incarnation, destination, priority)."""

    REPLY = 0
    "Replies: no window, no prefetch, given to the waiter as they are read."
    REQUEST = 1
    "Messages that expect a reply; each is handled in a task of its own."
    SIGNAL = 2
    "Small and urgent."
    DATA = 3
    "Everything else."


# --- limits that no configuration exceeds -----------------------------------------------------------

MAX_HEADER_BYTES: Final = 256 * 1024
"A larger header frame is refused undecoded."
MAX_EXCEPTIONS: Final = 1000
"Refusals told in one SETTLED or one ACK; more follow in the next, so that headers stay below their limit."
MAX_BATCH_MESSAGES: Final = 1024
INCARNATION_BYTES: Final = 16
EPOCH_BYTES: Final = 8
MAX_GROUPS: Final = 64
MAX_REASON_CHARS: Final = 64
MAX_MESSAGE_BYTES: Final = 17 * 2**20
"Default limit for one message in its MessagePack form: the 16 MiB that may come down from the cloud, and its fields."

Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
LaneNumber = Annotated[int, Meta(ge=1, le=2**62)]
"A lane's number as its sender gives it: the last one of a batch still fits everywhere."
Name = Annotated[str, Meta(pattern=NAME_PATTERN, max_length=64)]
Destination = Annotated[str, Meta(pattern=r"^@?" + NAME_PATTERN[1:], max_length=65)]
Incarnation = Annotated[bytes, Meta(min_length=INCARNATION_BYTES, max_length=INCARNATION_BYTES)]
Epoch = Annotated[bytes, Meta(min_length=EPOCH_BYTES, max_length=EPOCH_BYTES)]
Reason = Annotated[str, Meta(min_length=1, max_length=MAX_REASON_CHARS)]
RetainKey = Annotated[str, Meta(min_length=1, max_length=256)]
Milliseconds = Natural


class _Header(msgspec.Struct, array_like=True, frozen=True, gc=False):
    pass


class Limits(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What the broker allows this module; part of WELCOME."""

    message_bytes: Positive = MAX_MESSAGE_BYTES
    "The largest message, in its MessagePack form."
    window_messages: Positive = 4096
    "Unsettled messages per lane."
    window_bytes: Positive = 8 * 2**20
    "Unsettled bytes per lane. An empty lane always admits one message."
    batch_messages: Annotated[int, Meta(ge=1, le=MAX_BATCH_MESSAGES)] = 512
    batch_bytes: Positive = 256 * 1024
    "A batch is closed when it has this many; one message alone may be larger."


class Hello(_Header, frozen=True):
    """module → broker: who I am. The first frame, and the answer to WHO."""

    name: Name
    groups: Annotated[list[Name], Meta(max_length=MAX_GROUPS)]
    incarnation: Incarnation
    "Random, new for each start of the process."
    generation: Natural
    "What the last WELCOME said; 0 when there was none."
    liveness_ms: Annotated[int, Meta(ge=100, le=3_600_000)]
    "Silence after which the broker takes this module for hung."
    sdk: Annotated[str, Meta(max_length=64)]
    prefetch_messages: Positive = 2048
    "Deliveries it wants in flight per priority, in messages."
    prefetch_bytes: Positive = 8 * 2**20
    pid: Natural = 0
    "Its process id, or 0. The kernel's word (ipc) wins over it."


class Welcome(_Header, frozen=True):
    """broker → module: you are in."""

    epoch: Epoch
    "Random per broker process."
    session: Natural
    "Never used again, not even by a later broker."
    generation: Positive
    heartbeat_ms: Positive
    "PING at least this often."
    late: bool
    "Group messages may have passed this module by: it was unknown when they were routed."
    limits: Limits = Limits()


class Refused(_Header, frozen=True):
    """broker → module: no. After a HELLO the module is not attached."""

    code: Annotated[str, Meta(max_length=64)]
    text: Annotated[str, Meta(max_length=1024)]


class Send(_Header, frozen=True):
    """module → broker: one batch for one lane; the body is an array of `count` messages."""

    destination: Destination
    priority: Annotated[int, Meta(ge=0, le=3)]
    first: LaneNumber
    "Lane sequence number of the first message."
    count: Annotated[int, Meta(ge=1, le=MAX_BATCH_MESSAGES)]
    floor: LaneNumber
    "The lowest number of the lane that is not settled."
    flags: Natural = 0
    ttl_ms: Milliseconds | None = None
    "Milliseconds left, or nil: without limit. 0 = expired, sent to keep its place."
    requester: Incarnation | None = None
    "For replies: the incarnation of the requester."
    retain_key: RetainKey | None = None
    retain_counter: Natural | None = None


class Deliver(_Header, frozen=True):
    """broker → module: messages for you; the body is the sender's."""

    session: Natural
    lane: Natural
    "The broker's number for the lane, valid in this session."
    sender: str
    incarnation: Incarnation
    generation: Natural
    destination: str
    priority: int
    first: Positive
    count: Positive
    from_: Positive
    "The first number that is meant for you; the ones before it in the body are not."
    floor: Positive
    void: list[tuple[int, str]] = []
    "Refusals of numbers in [floor, from)."
    flags: Natural = 0
    ttl_ms: Milliseconds | None = None
    requester: Incarnation | None = None
    retain_key: str | None = None
    retain_version: tuple[int, int] | None = None
    "Generation of the source when it was sent, and its counter."


AckEntry = tuple[Natural, Natural, list[tuple[Positive, Reason]]]


class Ack(_Header, frozen=True):
    """module → broker: per lane the number up to which all is handled, and what was refused."""

    session: Natural
    lanes: Annotated[list[AckEntry], Meta(max_length=65536)]
    "[lane, cumulative number, [[number, reason], …]]"


class Settled(_Header, frozen=True):
    """broker → module: up to `cumulative` the lane is settled, delivered but for the exceptions."""

    destination: str
    priority: int
    cumulative: Natural
    exceptions: list[tuple[int, str, str | None]] = []
    "[number, reason, member or nil]"
    members: list[tuple[int, int, list[str]]] = []
    "For group requests: [first, count, the members each of these went to]."


class Ping(_Header, frozen=True):
    nonce: Natural
    counters: Annotated[dict[str, int], Meta(max_length=256)] = {}
    "The module's own counters, for status and metrics."
    floors: Annotated[list[tuple[str, int, int]], Meta(max_length=4096)] = []
    "[destination, priority, floor] of lanes on which exceptions came."


class Pong(_Header, frozen=True):
    nonce: Natural


class Who(_Header, frozen=True):
    """broker → module: I do not know you on this connection; say HELLO and send again."""

    epoch: bytes = b""


class Fenced(_Header, frozen=True):
    """broker → module: `generation` has your name now; exit."""

    generation: Natural


class Drain(_Header, frozen=True):
    """module → broker: no new deliveries, I am going to stop."""

    deadline_ms: Milliseconds


class Bye(_Header, frozen=True):
    """module → broker: the last frame."""

    leaving: bool
    "True: forget me. False: I come back, keep my mailbox."


class Admin(_Header, frozen=True):
    """Either way: a question of the CLI, the metrics or the watchdog, and its answers."""

    request: Natural
    op: Annotated[str, Meta(max_length=32)]
    more: bool = False
    "In an answer: others follow."


AnyHeader = (
    Hello | Welcome | Refused | Send | Deliver | Ack | Settled | Ping | Pong | Who | Fenced | Drain | Bye | Admin
)

_TYPES: Final[dict[bytes, type[Any]]] = {
    HELLO: Hello,
    WELCOME: Welcome,
    REFUSED: Refused,
    SEND: Send,
    DELIVER: Deliver,
    ACK: Ack,
    SETTLED: Settled,
    PING: Ping,
    PONG: Pong,
    WHO: Who,
    FENCED: Fenced,
    DRAIN: Drain,
    BYE: Bye,
    ADMIN: Admin,
}
_DECODERS: Final = {verb: msgspec.msgpack.Decoder(kind).decode for verb, kind in _TYPES.items()}
_FRAMES_WITH_BODY: Final = frozenset({SEND, DELIVER, ADMIN})
_BODY_REQUIRED: Final = frozenset({SEND, DELIVER})
VERBS: Final = frozenset(_TYPES)

_pack = msgspec.msgpack.Encoder().encode

H = TypeVar("H", bound=_Header)


def encode(verb: bytes, header: _Header, body: bytes | None = None) -> list[bytes]:
    """The frames of one message."""
    if body is None:
        return [verb, _pack(header)]
    return [verb, _pack(header), body]


def decode(frames: Sequence[bytes]) -> tuple[bytes, Any, bytes | None]:
    """Verb, header and body (or None) of the frames one peer sent.

    Raises MalformedFrame with code `unknown-verb`, `version` or `bad-header`.
    """
    if not 2 <= len(frames) <= 3:
        raise MalformedFrame(BAD_HEADER, f"expected 2 or 3 frames, got {len(frames)}")
    verb, packed = frames[0], frames[1]
    decoder = _DECODERS.get(verb)
    if decoder is None:
        raise _unknown_verb(verb)
    if len(packed) > MAX_HEADER_BYTES:
        raise MalformedFrame(
            BAD_HEADER, f"{_verb_text(verb)}: header of {len(packed)} bytes, the limit is {MAX_HEADER_BYTES}"
        )
    body = frames[2] if len(frames) == 3 else None
    if body is None:
        if verb in _BODY_REQUIRED:
            raise MalformedFrame(BAD_HEADER, f"{_verb_text(verb)}: expected a body frame, got none")
    elif verb not in _FRAMES_WITH_BODY:
        raise MalformedFrame(BAD_HEADER, f"{_verb_text(verb)}: expected no body frame, got one")
    try:
        return verb, decoder(packed), body
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise MalformedFrame(BAD_HEADER, f"{_verb_text(verb)}: {fault}") from fault


def _verb_text(verb: bytes) -> str:
    return verb[:24].decode("ascii", "backslashreplace")


def _unknown_verb(verb: bytes) -> MalformedFrame:
    name, _, version = verb[:24].partition(b"/")
    if name + b"/1" in VERBS and version != b"1":
        return MalformedFrame(BAD_VERSION, f"{_verb_text(verb)}: this broker speaks EMP/1 ({_verb_text(name)}/1)")
    return MalformedFrame(UNKNOWN_VERB, f"{_verb_text(verb)!r} is no verb of EMP/1")
