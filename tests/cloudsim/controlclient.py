"""Requests to the control API."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from cloudsim import CloudSim


async def ask(sim: CloudSim, method: str, path: str, body: Any = None, head: str | None = None) -> tuple[int, Any]:
    """One request on a connection of its own; status and decoded body."""
    assert sim.control_port is not None
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.control_port)
    head = head or f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}"
    writer.write(head.encode() + b"\r\n\r\n" + data)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    first, _, rest = answer.partition(b"\r\n")
    found = rest.partition(b"\r\n\r\n")[2]
    if b"jsonl" in answer:
        return int(first.split()[1]), [json.loads(line) for line in found.splitlines()]
    return int(first.split()[1]), json.loads(found)
