"""`edgezmq send`: one message onto the bus, settled before the command ends."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from runtime.cli.tapping import content_text, message_object
from runtime.client import Bus
from runtime.config import load
from runtime.errors import EdgezmqError, NotHandled, UsageError
from runtime.home import find_home
from runtime.message import Message
from runtime.names import Group, check_name

CLOUD: Final = "cloud"
"As a destination: whoever holds the link to the cloud."

CLOUD_GROUP: Final = "hub"


class NotSent(EdgezmqError):
    """The message was not handled; the text says why."""


def send(
    to: str,
    *,
    resource: str,
    operation: str,
    group: str,
    source: str,
    content: str,
    file: Path | None,
    request: bool,
    timeout: float,
    as_json: bool,
) -> int:
    """Send, wait, and print what came of it; the exit status."""
    destination = parse_destination(to)
    message = Message.build(
        source=source, group=group, resource=resource, operation=operation, content=read_content(content, file)
    )
    home = find_home()
    endpoint = load(home.path).endpoint(home)
    try:
        reply = asyncio.run(_exchange(endpoint, destination, message, request, timeout))
    except TimeoutError:
        raise NotSent(f"no word from {to} within {timeout:g} s (edgezmq status shows who is there)") from None
    except NotHandled as fault:
        raise NotSent(f"{to}: {fault}") from fault
    if reply is None:
        sys.stderr.write(f"edgezmq: handled by {to} (id {message.id})\n")
    elif as_json:
        print(json.dumps(message_object(reply), ensure_ascii=False, indent=2))
    else:
        sys.stderr.write(f"edgezmq: {reply.operation} from {reply.source or to} (parent id {reply.parent_id})\n")
        print(content_text(reply, 0))
    return 1 if reply is not None and reply.operation == "error" else 0


async def _exchange(
    endpoint: str, destination: str | Group, message: Message, request: bool, timeout_seconds: float
) -> Message | None:
    async with asyncio.timeout(timeout_seconds + 1.0), Bus.connect(f"send-{os.getpid()}", endpoint=endpoint) as bus:
        async with asyncio.timeout(timeout_seconds):
            if request:
                return await bus.request(destination, message, timeout=timeout_seconds)
            await (await bus.send(destination, message))
    return None


def parse_destination(text: str) -> str | Group:
    """`cloud`, `@group` or a module's name; raises InvalidName."""
    if text == CLOUD:
        return Group(CLOUD_GROUP)
    if text.startswith("@"):
        return Group(text[1:])
    return check_name(text)


def read_content(content: str, file: Path | None) -> Any:
    """What to send: JSON where the text is JSON, else text, else (from a file) bytes."""
    if file is None:
        return _parse(content)
    if content:
        raise UsageError("give --content or --file, not both")
    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    try:
        return _parse(data.decode())
    except UnicodeDecodeError:
        return data


def _parse(text: str) -> Any:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    # The text itself, so that numbers arrive as they were written; a JSON string is just text.
    return value if isinstance(value, str) else msgspec.Raw(text.strip().encode())
