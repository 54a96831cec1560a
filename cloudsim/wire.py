"""The JSON on the cloud's wire as Go reads and writes it.

Reading has two ways: a fast strict one for what well-behaved nodes send, and a slow one with all
the tolerance of Go's encoding/json (docs/cloudlink.md, What decoding accepts). Both end in the same
`CloudMessage`, or in Undecodable, on which the hub cuts the connection.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

MAX_DEPTH: Final = 900
"Deeper content is refused. Go allows 10,000, Python's decoders end at about 1,000."


class Undecodable(Exception):
    """The payload is not a message; the hub drops the connection without a close frame."""


class Header(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    msg_id: str = ""
    parent_msg_id: str = ""
    timestamp: int = 0
    resourceversion: str = ""
    sync: bool = False
    type: str = ""


class Route(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    source: str = ""
    destination: str = ""
    group: str = ""
    operation: str = ""
    resource: str = ""


class CloudMessage(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One message of the model (docs/cloudlink.md, Message model). Field names are the wire's."""

    header: Header = msgspec.field(default_factory=Header)
    route: Route = msgspec.field(default_factory=Route)
    content: Any = None


_decode_strict = msgspec.json.Decoder(CloudMessage).decode
_encode = msgspec.json.Encoder().encode
_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1


def decode(payload: bytes) -> CloudMessage:
    """The message in a payload, read as Go's decoder reads it. Raises Undecodable."""
    try:
        message = _decode_strict(payload)
    except (ValueError, RecursionError):  # msgspec's errors and UnicodeDecodeError are ValueErrors
        return decode_as_go(payload)
    if not _INT64_MIN <= message.header.timestamp <= _INT64_MAX:
        raise Undecodable(f"timestamp {message.header.timestamp} is no int64")
    return message


def decode_as_go(payload: bytes) -> CloudMessage:
    """The slow and tolerant way of `decode`.

    Keys match in any case, unknown ones are ignored, null leaves a field empty, what follows the
    first value is ignored, invalid UTF-8 and lone surrogates become U+FFFD.
    """
    text = payload.decode("utf-8", "cloudsim_go").lstrip(" \t\r\n")
    try:
        value, _end = _tolerant.raw_decode(text)
    except (ValueError, RecursionError) as fault:
        raise Undecodable(f"no JSON: {fault}") from fault
    message = CloudMessage()
    if value is None:
        return message
    for key, field in _pairs(value, "message"):
        match _field(key, ("header", "route", "content")):
            case "header":
                _fill(message.header, field, "header")
            case "route":
                _fill(message.route, field, "route")
            case "content":
                message.content = _mapped(field, _plain)
            case _:
                pass
    return message


def _fill(target: Header | Route, value: Any, where: str) -> None:
    if value is None:
        return
    names = target.__struct_fields__
    for key, field in _pairs(value, where):
        name = _field(key, names)
        if name is None or field is None:
            continue
        if name == "timestamp":
            fits = type(field) is int and _INT64_MIN <= field <= _INT64_MAX
        elif name == "sync":
            fits = isinstance(field, bool)
        else:
            fits = isinstance(field, str)
        if not fits:
            raise Undecodable(f"{where}.{name}: a JSON {type(field).__name__} does not fit")
        setattr(target, name, _without_surrogates(field) if isinstance(field, str) else field)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its keys in order: Go sees each of them, also the repeated ones."""


def _pairs(value: Any, where: str) -> _Pairs:
    if not isinstance(value, _Pairs):
        raise Undecodable(f"{where}: a JSON {type(value).__name__} where an object belongs")
    return value


def _field(key: str, names: tuple[str, ...]) -> str | None:
    """Go prefers the exact key and else folds the case."""
    if key in names:
        return key
    folded = key.casefold()
    return folded if folded in names else None


def _plain(value: Any) -> Any:
    """A string, number, true, false or null as it is inside the hub, where strings are valid Unicode."""
    return _without_surrogates(value) if isinstance(value, str) else value


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """`value` with `leaf` of everything that is in its lists and maps. Raises Undecodable beyond MAX_DEPTH.

    Without recursion: a message may be nested about as deeply as Python's stack is deep.
    """
    top: list[Any] = [value]
    waiting: list[tuple[Any, int]] = [(top, MAX_DEPTH + 1)]
    while waiting:
        container, depth = waiting.pop()
        if not depth:
            raise Undecodable(f"content is nested deeper than {MAX_DEPTH}")
        for key, item in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(item, _Pairs):
                item = {_without_surrogates(name): inner for name, inner in item}
            elif isinstance(item, dict | list):
                item = item.copy()
            else:
                container[key] = leaf(item)
                continue
            container[key] = item
            waiting.append((item, depth - 1))
    return top[0]


_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def _without_surrogates(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


def _replace_one_byte(error: UnicodeError) -> tuple[str, int]:
    """Go replaces each invalid byte by itself; Python would take a run of them as one."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd", error.start + 1


codecs.register_error("cloudsim_go", _replace_one_byte)


def _go_float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"number {text[:20]} does not fit a float64")
    return number


def _go_int(text: str) -> int:
    # Go would refuse it only in content; as a timestamp it does not fit an int64 either.
    _go_float(text)
    return int(text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_tolerant = json.JSONDecoder(
    object_pairs_hook=_Pairs, parse_float=_go_float, parse_int=_go_int, parse_constant=_no_constant
)


def seen_in_cloud(content: Any) -> Any:
    """Content as a cloud module sees it: Go decodes every number of it as a float64.

    Whole numbers stay Python ints where they fit, so that a comparison with what was sent works.
    """
    return _mapped(content, _float64)


def _float64(value: Any) -> Any:
    if type(value) is not int or abs(value) <= 2**53:
        return value
    try:
        return int(float(value))
    except OverflowError:  # above 308 digits; Go would have refused the message (docs/cloudsim.md, differences)
        return value


class _HeaderOut(msgspec.Struct, omit_defaults=True, gc=False):
    msg_id: str
    parent_msg_id: str | msgspec.UnsetType
    timestamp: int
    resourceversion: str = ""
    sync: bool = False
    type: str = ""


class _MessageOut(msgspec.Struct, gc=False):
    header: _HeaderOut
    route: Route
    content: Any


_HTML: Final = (
    (b"<", b"\\u003c"),
    (b">", b"\\u003e"),
    (b"&", b"\\u0026"),
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
)


def content_data(content: Any) -> bytes:
    """Content as the bytes that a receiver in the cloud works with (beehive's GetContentData).

    Bytes and text as they are, null as nothing, anything else as JSON.
    """
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode()
    return b"" if content is None else escaped(_encode(content))


def json_content(content: Any) -> Any:
    """Content as a cloud module that expects JSON reads it: over QUIC it comes as bytes. None where it is no JSON."""
    if not isinstance(content, bytes):
        return content
    try:
        return msgspec.json.decode(content)
    except (ValueError, RecursionError):
        return None


def to_json_object(message: CloudMessage) -> dict[str, Any]:
    """The message as a JSON object's dict, with what CloudHub would leave out left out."""
    value: dict[str, Any] = msgspec.json.decode(encode(message))
    return value


def encode(message: CloudMessage) -> bytes:
    """The payload CloudHub writes: Go's order of keys, its escapes, and the final newline.

    Raises TypeError or ValueError for content that has no JSON form.
    """
    header = message.header
    data = _encode(
        _MessageOut(
            header=_HeaderOut(
                msg_id=header.msg_id,
                parent_msg_id=header.parent_msg_id or msgspec.UNSET,
                timestamp=header.timestamp,
                resourceversion=header.resourceversion,
                sync=header.sync,
                type=header.type,
            ),
            route=message.route,
            content=message.content,
        )
    )
    return escaped(data) + b"\n"


def escaped(data: bytes) -> bytes:
    """JSON text with Go's escapes. Outside of strings JSON has none of these bytes, so a plain replacement does."""
    for plain, escape in _HTML:
        if plain in data:
            data = data.replace(plain, escape)
    return data


@dataclass(frozen=True, slots=True)
class Codec:
    """A message's form on one transport."""

    transport: str
    encode: Callable[[CloudMessage], bytes]
    "Raises TypeError or ValueError for content without a form."
    decode: Callable[[bytes], CloudMessage]
    "Raises Undecodable."
    has_control: bool
    "Whether the connection layer answers operations ping, pong and config among the messages."


JSON_CODEC: Final = Codec("websocket", encode, decode, has_control=True)
