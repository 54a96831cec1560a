"""The frames of EMP/1 as sections 4 to 6 of docs/emp.md describe them, read with msgpack alone; and how they are shown.

`fault_of` is a second opinion beside `runtime.emp`: it goes by the page's tables, field by field, and by the types that
MessagePack itself has. A frame is good when both say so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgpack

from runtime import emp
from runtime.errors import MalformedFrame

MAX_HEADER_BYTES: Final = 262144
SHOWN_CHARS: Final = 40
"Of a string or bytes in a frame that is shown."
SHOWN_ITEMS: Final = 8

Check = Callable[[Any], bool]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REASON: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def _integer(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


_nat = _integer(0, 2**63 - 1)
_pos = _integer(1, 2**63 - 1)
_seq = _integer(1, 2**62)
_any_integer = _integer(-(2**63), 2**64 - 1)


def _bool(value: Any) -> bool:
    return type(value) is bool


def _text(most: int, least: int = 0) -> Check:
    return lambda value: type(value) is str and least <= len(value) <= most


def _name(value: Any) -> bool:
    return type(value) is str and _NAME.fullmatch(value) is not None


def _destination(value: Any) -> bool:
    return type(value) is str and _name(value.removeprefix("@"))


def _reason(value: Any) -> bool:
    return type(value) is str and len(value) <= 64 and _REASON.fullmatch(value) is not None


def _bytes(size: int) -> Check:
    return lambda value: type(value) is bytes and len(value) == size


def _some_bytes(value: Any) -> bool:
    return type(value) is bytes


def _or_nil(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _array(item: Check, most: int = 2**32) -> Check:
    return lambda value: type(value) is list and len(value) <= most and all(map(item, value))


def _tuple(*fields: Check, optional: int = 0) -> Check:
    """An array with these fields, of which the last `optional` ones may be left out; only such a one may grow."""
    return lambda value: (
        type(value) is list
        and (len(value) == len(fields) or (optional > 0 and len(value) >= len(fields) - optional))
        and all(check(each) for check, each in zip(fields, value, strict=False))
    )


def _counters(value: Any) -> bool:
    return (
        type(value) is dict
        and len(value) <= 256
        and all(type(key) is str and _any_integer(each) for key, each in value.items())
    )


class _Field(NamedTuple):
    name: str
    check: Check
    optional: bool = False


def _opt(name: str, check: Check) -> _Field:
    return _Field(name, check, True)


_refusals = _array(_tuple(_pos, _reason))

HEADERS: Final[dict[str, tuple[_Field, ...]]] = {
    "HELLO/1": (
        _Field("name", _name),
        _Field("groups", _array(_name, 64)),
        _Field("incarnation", _bytes(16)),
        _Field("generation", _integer(0, 2**62)),
        _Field("liveness_ms", _integer(100, 3_600_000)),
        _Field("sdk", _text(64)),
        _opt("prefetch_messages", _pos),
        _opt("prefetch_bytes", _pos),
        _opt("pid", _nat),
    ),
    "WELCOME/1": (
        _Field("epoch", _bytes(8)),
        _Field("session", _nat),
        _Field("generation", _pos),
        _Field("heartbeat_ms", _pos),
        _Field("late", _bool),
        _opt("limits", _tuple(_pos, _pos, _pos, _integer(1, 1024), _pos, optional=5)),
    ),
    "REFUSED/1": (_Field("code", _text(64)), _Field("text", _text(1024))),
    "SEND/1": (
        _Field("destination", _destination),
        _Field("priority", _integer(0, 3)),
        _Field("first", _seq),
        _Field("count", _integer(1, 1024)),
        _Field("floor", _seq),
        _opt("flags", _nat),
        _opt("ttl_ms", _or_nil(_nat)),
        _opt("requester", _or_nil(_bytes(16))),
        _opt("retain_key", _or_nil(_text(256, 1))),
        _opt("retain_counter", _or_nil(_nat)),
    ),
    "DELIVER/1": (
        _Field("session", _nat),
        _Field("lane", _nat),
        _Field("sender", _name),
        _Field("incarnation", _bytes(16)),
        _Field("generation", _nat),
        _Field("destination", _destination),
        _Field("priority", _integer(0, 3)),
        _Field("first", _pos),
        _Field("count", _pos),
        _Field("from", _pos),
        _Field("floor", _pos),
        _opt("void", _refusals),
        _opt("flags", _nat),
        _opt("ttl_ms", _or_nil(_nat)),
        _opt("requester", _or_nil(_bytes(16))),
        _opt("retain_key", _or_nil(_text(256, 1))),
        _opt("retain_version", _or_nil(_tuple(_nat, _nat))),
    ),
    "ACK/1": (_Field("session", _nat), _Field("lanes", _array(_tuple(_nat, _nat, _refusals), 65536))),
    "SETTLED/1": (
        _Field("destination", _destination),
        _Field("priority", _integer(0, 3)),
        _Field("cumulative", _nat),
        _opt("exceptions", _array(_tuple(_pos, _reason, _or_nil(_name)))),
        _opt("members", _array(_tuple(_pos, _pos, _array(_name)))),
    ),
    "PING/1": (
        _Field("nonce", _nat),
        _opt("counters", _counters),
        _opt("floors", _array(_tuple(_destination, _integer(0, 3), _seq), 4096)),
    ),
    "PONG/1": (_Field("nonce", _nat),),
    "WHO/1": (_opt("epoch", _some_bytes),),
    "FENCED/1": (_Field("generation", _nat),),
    "DRAIN/1": (_Field("deadline_ms", _nat),),
    "BYE/1": (_Field("leaving", _bool),),
    "ADMIN/1": (_Field("request", _nat), _Field("op", _text(32)), _opt("more", _bool)),
}
FROM_MODULE: Final = frozenset({"HELLO/1", "SEND/1", "ACK/1", "PING/1", "DRAIN/1", "BYE/1", "ADMIN/1"})
FROM_BROKER: Final = frozenset(
    {"WELCOME/1", "REFUSED/1", "DELIVER/1", "SETTLED/1", "PONG/1", "WHO/1", "FENCED/1", "ADMIN/1"}
)
BODY_REQUIRED: Final = frozenset({"SEND/1", "DELIVER/1"})

MESSAGE_FIELDS: Final[tuple[_Field, ...]] = (
    _opt("id", _text(2**32)),
    _opt("parent_id", _text(2**32)),
    _opt("timestamp", _any_integer),
    _opt("sync", _bool),
    _opt("resource_version", _text(2**32)),
    _opt("source", _text(2**32)),
    _opt("group", _text(2**32)),
    _opt("resource", _text(2**32)),
    _opt("operation", _text(2**32)),
    _opt("kind", lambda value: value in ("json", "text", "bytes")),
    _opt("content", _some_bytes),
    _opt("destination", _text(2**32)),
    _opt("type", _text(2**32)),
)


def verb_of(frames: Sequence[bytes]) -> str:
    return frames[0][:32].decode("ascii", "backslashreplace") if frames else ""


def fault_of(frames: Sequence[bytes], allowed: frozenset[str]) -> str | None:
    """What is wrong with one ZeroMQ message of EMP/1 that may have one of the `allowed` verbs; None: nothing."""
    if not 2 <= len(frames) <= 3:
        return f"{len(frames)} frames; a verb, a header and perhaps a body were expected"
    verb = verb_of(frames)
    if verb not in allowed:
        return f"{verb!r} is no verb of this side"
    if (len(frames) == 2 and verb in BODY_REQUIRED) or (len(frames) == 3 and verb not in BODY_REQUIRED | {"ADMIN/1"}):
        return f"{verb} with {'a' if len(frames) == 3 else 'no'} body"
    if len(frames[1]) > MAX_HEADER_BYTES:
        return f"{verb}: a header of {len(frames[1])} bytes"
    try:
        header = unpack(frames[1])
    except ValueError as fault:
        return f"{verb}: the header is no MessagePack: {fault}"
    if type(header) is not list:
        return f"{verb}: the header is no array"
    fields = HEADERS[verb]
    for place, field in enumerate(fields):
        if place >= len(header):
            if not field.optional:
                return f"{verb}: the field {field.name!r} is missing"
        elif not field.check(header[place]):
            return f"{verb}: the field {field.name!r} is {shown(header[place])}"
    return None


def body_fault(body: bytes, count: int) -> str | None:
    """What is wrong with the body of a SEND or DELIVER; None: nothing."""
    try:
        messages = unpack(body)
    except ValueError as fault:
        return f"the body is no MessagePack: {fault}"
    if type(messages) is not list or len(messages) != count:
        return f"the body is no array of {count} messages"
    return next(filter(None, map(_message_fault, messages)), None)


def messages_of(body: bytes) -> list[list[Any]]:
    """The messages of a body that are well formed, each with all its fields up to content."""
    try:
        found = unpack(body)
    except ValueError:
        return []
    if type(found) is not list:
        return []
    defaults: list[Any] = ["", "", 0, False, "", "", "", "", "", "json", b"null"]
    return [[*message, *defaults[len(message) :]] for message in found if _message_fault(message) is None]


def _message_fault(message: Any) -> str | None:
    if type(message) is not list:
        return f"a message is no array: {shown(message)}"
    for field, value in zip(MESSAGE_FIELDS, message, strict=False):
        if not field.check(value):
            return f"a message's {field.name!r} is {shown(value)}"
    return None


def sizes_of(body: bytes) -> list[int]:
    """The bytes of each message in a body; [] when it holds none."""
    unpacker = msgpack.Unpacker(max_buffer_size=0, raw=False, strict_map_key=False)
    unpacker.feed(body)
    try:
        count = unpacker.read_array_header()
        sizes, before = [], unpacker.tell()
        for _ in range(count):
            unpacker.skip()
            sizes.append(unpacker.tell() - before)
            before = unpacker.tell()
    except (ValueError, msgpack.exceptions.UnpackException):
        return []
    return sizes


def unpack(data: bytes) -> Any:
    """One MessagePack value. Raises ValueError for anything else."""
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as fault:
        raise ValueError(str(fault) or type(fault).__name__) from fault


def read(frames: Sequence[bytes], allowed: frozenset[str]) -> tuple[Any, str | None]:
    """The header as a value of `runtime.emp`, or None; and what is wrong with the frames, or None."""
    fault = fault_of(frames, allowed)
    try:
        _, header, _ = emp.decode(frames)
    except MalformedFrame as malformed:
        return None, fault or malformed.text
    return (None if fault is not None and verb_of(frames) not in allowed else header), fault


# --- writing as others might ---------------------------------------------------------------------------


def packed(*fields: Any) -> bytes:
    """A header as an array of `fields`."""
    data = msgpack.packb(list(fields))
    assert isinstance(data, bytes)
    return data


def packed_wide(value: Any) -> bytes:
    """`value` with every length and number in its widest form, which readers have to take as well."""
    if value is None or type(value) is bool:
        return packed(value)[1:]
    if type(value) is int:
        return b"\xcf" + value.to_bytes(8, "big")
    if type(value) is str:
        data = value.encode()
        return b"\xdb" + len(data).to_bytes(4, "big") + data
    if type(value) is bytes:
        return b"\xc6" + len(value).to_bytes(4, "big") + value
    return b"\xdd" + len(value).to_bytes(4, "big") + b"".join(map(packed_wide, value))


# --- showing ---------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value of MessagePack on one line, cut short."""
    if isinstance(value, str):
        return f'"{value[:SHOWN_CHARS]}{"…" if len(value) > SHOWN_CHARS else ""}"'.replace("\n", "\\n")
    if isinstance(value, bytes):
        return f"h'{value[: SHOWN_CHARS // 2].hex()}{'…' if len(value) > SHOWN_CHARS // 2 else ''}'"
    if isinstance(value, list):
        more = [f"… {len(value) - SHOWN_ITEMS} more"] if len(value) > SHOWN_ITEMS else []
        return f"[{', '.join([*map(shown, value[:SHOWN_ITEMS]), *more])}]"
    if isinstance(value, dict):
        pairs = [f"{shown(key)}: {shown(each)}" for key, each in list(value.items())[:SHOWN_ITEMS]]
        return f"{{{', '.join([*pairs, *['…'] * (len(value) > SHOWN_ITEMS)])}}}"
    if value is None:
        return "nil"
    return str(value).lower() if isinstance(value, bool) else str(value)[:SHOWN_CHARS]


def describe(frames: Sequence[bytes]) -> str:
    """One ZeroMQ message on one line: its verb, its header's fields by name, its first message."""
    verb = verb_of(frames)
    if len(frames) < 2:
        return verb or "(no frames)"
    try:
        header = unpack(frames[1])
    except ValueError:
        header = frames[1]
    if isinstance(header, list):
        names = [field.name for field in HEADERS.get(verb, ())]
        last = len(header)
        while last > 5 and header[last - 1] in (None, [], {}, 0):
            last -= 1  # the defaults at the end say nothing
        fields = [
            f"{names[place]}={_header_value(header[place])}" if place < len(names) else shown(header[place])
            for place in range(last)
        ]
        text = f"{verb} {' '.join(fields)}"
    else:
        text = f"{verb} {shown(header)}"
    if len(frames) > 2:
        text += f" + {len(frames[2])} B"
        messages = messages_of(frames[2]) if len(frames[2]) < 2**16 else []
        if messages and verb in BODY_REQUIRED:
            first = messages[0]
            text += f": {shown(first[8])} {shown(first[7])} {shown(first[10])}"
    return text


def _header_value(value: Any) -> str:
    # An incarnation is told by its first bytes.
    return value[:4].hex() if isinstance(value, bytes) and len(value) == 16 else shown(value)
