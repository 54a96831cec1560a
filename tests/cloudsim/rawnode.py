"""A node on a raw TLS socket, for tests that are about single frames and bytes."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cloudsim import CloudSim, SimConfig

VECTORS = Path(__file__).parents[1] / "vectors" / "cloudlink"
QUIET_SECONDS = 0.15
"How long nothing must come for a test to say that nothing comes."


def vectors(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((VECTORS / f"{name}.json").read_text())["vectors"]
    return loaded


def frame(opcode: int, payload: bytes = b"", *, final: bool = True, mask: bytes = b"\1\2\3\4") -> bytes:
    """A masked frame."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | size,))
    elif size < 65536:
        head = b"\xfe" + size.to_bytes(2, "big")
    else:
        head = b"\xff" + size.to_bytes(8, "big")
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    masked = (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")
    return bytes((opcode | (0x80 if final else 0),)) + head + mask + masked


def message(
    operation: str = "upload",
    resource: str = "t",
    *,
    source: str = "eventbus",
    group: str = "user",
    content: Any = "c",
    id: str = "m",
    parent: str | None = None,
) -> bytes:
    """The payload of an upstream message."""
    header: dict[str, Any] = {"msg_id": id, "timestamp": 1}
    if parent is not None:
        header["parent_msg_id"] = parent
    route = {"source": source, "group": group, "operation": operation, "resource": resource}
    return json.dumps({"header": header, "route": route, "content": content}).encode()


KEEPALIVE_FRAME = frame(1, message("keepalive", "node", source="websocket", group="resource"))


def client_context(
    sim: CloudSim, node: str | None, *, alpn: list[str] | None = None, version: ssl.TLSVersion | None = None
) -> ssl.SSLContext:
    """As a node's, with one certificate only: the CA is not in the context that presents it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if node is not None:
        pair = sim.certificate(node)
        context.load_cert_chain(pair.certificate, pair.key)
    if alpn:
        context.set_alpn_protocols(alpn)
    if version:
        context.minimum_version = context.maximum_version = version
    return context


class RawNode:
    """One connection. Reading past the end raises EOFError."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.response = ""

    @classmethod
    async def connect(cls, sim: CloudSim, context: ssl.SSLContext) -> RawNode:
        return cls(*await asyncio.open_connection("127.0.0.1", sim.port, ssl=context, limit=2**20))

    async def request(self, head: str) -> str:
        """Send a request's text, return the head of the answer."""
        self.writer.write(head.encode("latin-1"))
        self.response = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        return self.response

    async def upgrade(self, node: str, **headers: str) -> RawNode:
        await self.request(upgrade_text({"Node_id": node, "Connectionuse": "msg"} | headers))
        assert self.response.startswith("HTTP/1.1 101 "), self.response
        return self

    async def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))
        await self.writer.drain()

    async def frame(self) -> tuple[bool, int, bytes]:
        """FIN, opcode, payload of the next frame."""
        try:
            first, second = await self.reader.readexactly(2)
            assert not second & 0x80, "a server does not mask"
            size = second & 0x7F
            if size == 126:
                size = int.from_bytes(await self.reader.readexactly(2), "big")
            elif size == 127:
                size = int.from_bytes(await self.reader.readexactly(8), "big")
            return bool(first & 0x80), first & 0x0F, await self.reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionResetError) as end:
            raise EOFError from end

    async def message(self) -> dict[str, Any]:
        """The next whole text message."""
        payload = b""
        while True:
            final, opcode, piece = await self.frame()
            assert opcode in (0, 1), (opcode, piece)
            payload += piece
            if final:
                decoded: dict[str, Any] = json.loads(payload)
                return decoded

    async def barrier(self) -> None:
        """Ping, and wait for the pong: all sent before it has been dispatched. Nothing else may come."""
        await self.send(frame(9, b"barrier"))
        assert await self.frame() == (True, 10, b"barrier")

    async def is_quiet(self) -> bool:
        """Nothing comes for a while, and the connection stays open."""
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                await self.reader.read(1)
        except TimeoutError:
            return True
        return False

    async def ends(self) -> bool:
        """The next thing that comes is the end."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionResetError:
            return True

    async def aclose(self) -> None:
        self.writer.close()
        try:
            async with asyncio.timeout(1):
                await self.writer.wait_closed()
        except (OSError, TimeoutError):
            pass  # the other side is gone already, or says nothing by request


def upgrade_text(headers: Mapping[str, str], path: str = "/p/n/events") -> str:
    lines = {
        "Host": "127.0.0.1:10000",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "7Kq3FUnkFRFbJ2wBmxkmqg==",
    } | dict(headers)
    return f"GET {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"


@asynccontextmanager
async def cloud(directory: Path, **settings: Any) -> AsyncIterator[CloudSim]:
    """A cloudsim without control port and without its chances."""
    certain = {"control_port": None, "replacement_race": 0.0, "upstream_inversion": 0.0}
    config = SimConfig(directory=directory, **(certain | settings))
    async with CloudSim(config) as sim:
        yield sim


@asynccontextmanager
async def raw(sim: CloudSim, node: str | None, **settings: Any) -> AsyncIterator[RawNode]:
    """A TLS connection, not upgraded yet."""
    connection = await RawNode.connect(sim, client_context(sim, node, **settings))
    try:
        yield connection
    finally:
        await connection.aclose()


@asynccontextmanager
async def served(sim: CloudSim, node: str = "edge-a") -> AsyncIterator[RawNode]:
    """A node that has a session."""
    async with raw(sim, node) as connection:
        yield await connection.upgrade(node)


async def tls_failure(sim: CloudSim, context: ssl.SSLContext) -> str:
    """Why the server ends it: at the handshake (1.2) or at the first read (1.3)."""
    try:
        node = await RawNode.connect(sim, context)
        await node.send(upgrade_text({"node_id": "edge-a", "connectionuse": "msg"}).encode())
        data = await node.reader.read(100)
    except ssl.SSLError as error:
        return str(error.reason)
    await node.aclose()
    return data.decode()
