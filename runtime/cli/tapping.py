"""`edgezmq tap`: messages as they pass the broker, decoded here and not there."""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, Final

from runtime import emp
from runtime.admin import AdminClient
from runtime.config import load
from runtime.errors import MalformedMessage
from runtime.home import find_home
from runtime.message import JSON, TEXT, Message, decode_batch

MAX_BATCH_BYTES: Final = 2**20
"A larger batch is shown as its header only."


def show(
    *,
    sender: str,
    destination: str,
    resource: str,
    operation: str,
    count: int,
    rate: int,
    width: int,
    as_json: bool,
) -> None:
    """Print messages until `count` were shown, or Ctrl-C."""
    home = find_home()
    question = {
        "filter": {"sender": sender, "destination": destination},
        # Credit lasts from one renewal to the next.
        "credit": max(1, int(rate * RENEWAL_SECONDS)),
        "content_bytes": MAX_BATCH_BYTES,
    }
    shown = dropped = 0
    try:
        with AdminClient(load(home.path).endpoint(home)) as admin:
            if sys.stderr.isatty():
                sys.stderr.write("edgezmq: tapping; Ctrl-C ends it\n")
            for answer in admin.stream("tap", question):
                if not isinstance(answer, dict) or "sender" not in answer:
                    continue
                if answer.get("dropped", 0) > dropped:
                    sys.stderr.write(f"edgezmq: {answer['dropped'] - dropped} messages not shown (see --rate)\n")
                    dropped = answer["dropped"]
                for message, number in messages_of(answer):
                    if not matches(message, resource, operation):
                        continue
                    line = as_object(answer, message, number) if as_json else as_line(answer, message, number, width)
                    sys.stdout.write(line + "\n")
                    shown += 1
                    if count and shown >= count:
                        return
                sys.stdout.flush()
    except KeyboardInterrupt:
        return


RENEWAL_SECONDS: Final = 3.0


def messages_of(answer: dict[str, Any]) -> Iterator[tuple[Message | None, int]]:
    """Each message of a tapped batch with its lane number; None for a body too large to be shown, or strange."""
    first = int(answer.get("first", 0))
    body = answer.get("body") or b""
    try:
        messages = decode_batch(body) if body else []
    except MalformedMessage:
        messages = []
    if not messages:
        yield None, first
    for index, message in enumerate(messages):
        yield message, first + index


def matches(message: Message | None, resource: str, operation: str) -> bool:
    if message is None:
        return not resource and not operation
    return (not resource or fnmatchcase(message.resource, resource)) and operation in ("", message.operation)


def as_line(answer: dict[str, Any], message: Message | None, number: int, width: int) -> str:
    now = time.time()
    stamp = time.strftime("%H:%M:%S", time.localtime(now)) + f".{int(now * 1000) % 1000:03d}"
    route = f"{stamp} {answer['sender']} > {answer['destination']} {_priority(answer)} #{number}"
    if message is None:
        return f"{route} ({answer.get('count')} messages, {answer.get('body_bytes')} bytes)"
    head = f"{route} {message.group} {message.operation} {_plain(message.resource)}"
    if message.parent_id:
        head += f" reply-to={message.parent_id}"
    return f"{head} {content_text(message, width)}"


def content_text(message: Message, width: int) -> str:
    """The content on one line, at most `width` characters of it (0: all)."""
    text = f"({len(message.content)} bytes) " + base64.b64encode(message.content).decode()
    if message.kind in (JSON, TEXT):
        try:
            text = message.content.decode()
        except UnicodeDecodeError:
            pass
    text = _plain(text)
    return text if not width or len(text) <= width else f"{text[:width]}… ({len(message.content)} bytes)"


def _plain(text: str) -> str:
    """What a message says must not move the cursor or colour the terminal."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def as_object(answer: dict[str, Any], message: Message | None, number: int) -> str:
    record: dict[str, Any] = {
        "time": round(time.time(), 3),
        "sender": answer["sender"],
        "destination": answer["destination"],
        "priority": _priority(answer),
        "number": number,
        "dropped": answer.get("dropped", 0),
    }
    if message is None:
        record |= {"count": answer.get("count"), "body_bytes": answer.get("body_bytes")}
    else:
        record |= message_object(message)
    return json.dumps(record, ensure_ascii=False)


def message_object(message: Message) -> dict[str, Any]:
    """A message as plain JSON values; content that is neither JSON nor text is in base64."""
    kind: str = message.kind
    try:
        content: Any = message.json() if kind == JSON else message.text() if kind == TEXT else None
    except MalformedMessage:
        content = None
        kind = "bytes"
    if kind not in (JSON, TEXT):
        content = base64.b64encode(message.content).decode()
    return {
        "id": message.id,
        "parent_id": message.parent_id,
        "timestamp": message.timestamp,
        "source": message.source,
        "group": message.group,
        "resource": message.resource,
        "operation": message.operation,
        "kind": kind,
        "content": content,
    }


def _priority(answer: dict[str, Any]) -> str:
    try:
        return emp.Priority(answer.get("priority", 3)).name.lower()
    except ValueError:
        return str(answer.get("priority"))
