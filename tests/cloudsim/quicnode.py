"""A node on a bare QUIC connection, for tests that are about single streams and bytes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration

from cloudsim import CloudMessage, CloudSim, Header, Route, viaduct
from runtime.viaduct import PackageReader, packages
from tests.cloudsim.rawnode import cloud

QUIET_SECONDS = 0.15
"How long nothing must come for a test to say that nothing comes."


def quic_message(
    operation: str = "upload",
    resource: str = "t",
    *,
    source: str = "eventbus",
    group: str = "user",
    content: Any = b"c",
    id: str = "m",
    parent: str = "",
) -> bytes:
    """A package with an upstream message."""
    message = CloudMessage(
        Header(id, parent, 1),
        Route(source=source, group=group, operation=operation, resource=resource),
        content,
    )
    return packages([viaduct.encode(message)])


def header_package(node: str = "edge-a", *, content: Any = None) -> bytes:
    """The first package on the control stream."""
    headers = {"Node_id": [node], "Project_id": ["p"]} if content is None else content
    return quic_message("header", "header", source="", group="", content=headers, id="header")


CA_QUERY = quic_message("query", "k8s/ca.crt", source="metamanager", group="meta", content=None, id="ca")


class QuicNode(QuicConnectionProtocol):
    """One connection. What comes is kept by stream; `wait` waits for a condition over it."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.data: dict[int, bytearray] = {}
        self.resets: dict[int, int] = {}
        self.stops: dict[int, int] = {}
        self.ended: events.ConnectionTerminated | None = None
        self._changed = asyncio.Event()

    @property
    def quic(self) -> Any:
        return self._quic

    def quic_event_received(self, event: events.QuicEvent) -> None:
        match event:
            case events.StreamDataReceived():
                self.data.setdefault(event.stream_id, bytearray()).extend(event.data)
            case events.StreamReset():
                self.resets[event.stream_id] = event.error_code
            case events.StopSendingReceived():
                self.stops[event.stream_id] = event.error_code
            case events.ConnectionTerminated():
                self.ended = event
            case _:
                return
        self._changed.set()

    def write(self, stream: int, data: bytes, *, end: bool = False) -> None:
        self._quic.send_stream_data(stream, data, end)
        self.transmit()

    async def wait(self, condition: Callable[[], Any]) -> Any:
        while not (found := condition()):
            self._changed.clear()
            await self._changed.wait()
        return found

    def payloads(self, stream: int) -> list[bytes]:
        """The packages that have come on a stream; one that the hub opened begins with its use type."""
        reader = PackageReader(has_use_type=bool(stream & 1))
        return cast(list[bytes], reader.receive(bytes(self.data.get(stream, b""))))

    def messages(self, stream: int | None = None) -> list[CloudMessage]:
        """The messages that have come, of one stream or of all but the control stream."""
        streams = [stream] if stream is not None else sorted(self.data.keys() - {0})
        return [viaduct.decode(payload) for each in streams for payload in self.payloads(each)]

    async def message(self, count: int = 1, stream: int | None = None) -> CloudMessage:
        """The count-th message."""
        await self.wait(lambda: len(self.messages(stream)) >= count)
        return self.messages(stream)[count - 1]

    async def greet(self, node: str = "edge-a") -> QuicNode:
        """Send the headers and wait for the ack."""
        self.write(0, header_package(node))
        answer = await self.message(1, 0)
        assert answer.content == b"ack", answer
        return self

    async def barrier(self, stream: int = 4) -> None:
        """A query that the hub answers: what was sent on this stream before has been read."""
        before = len([each for each in self.messages() if each.route.source == "cloudhub"])
        self.write(stream, CA_QUERY)
        await self.wait(
            lambda: len([each for each in self.messages() if each.route.source == "cloudhub"]) > before or self.ended
        )
        assert self.ended is None, self.ended

    async def is_quiet(self) -> bool:
        """Nothing comes for a while, and the connection stays open."""
        before = {stream: len(data) for stream, data in self.data.items()}
        await asyncio.sleep(QUIET_SECONDS)
        return self.ended is None and before == {stream: len(data) for stream, data in self.data.items()}


def client_configuration(
    sim: CloudSim, node: str | None, *, alpn: list[str] | None = None, **settings: Any
) -> QuicConfiguration:
    """As a node's, with one certificate; the server is verified."""
    configuration = QuicConfiguration(
        is_client=True,
        alpn_protocols=alpn,
        cafile=str(sim.ca.certificate),
        server_name="localhost",
        verify_mode=ssl.CERT_REQUIRED,
        **settings,
    )
    if node is not None:
        pair = sim.certificate(node)
        configuration.load_cert_chain(pair.certificate, pair.key)
    return configuration


@asynccontextmanager
async def quic_cloud(directory: Path, **settings: Any) -> AsyncIterator[CloudSim]:
    async with cloud(directory, **({"quic_port": 0} | settings)) as sim:
        yield sim


@asynccontextmanager
async def quic_raw(
    sim: CloudSim, node: str | None = "edge-a", *, configuration: QuicConfiguration | None = None
) -> AsyncIterator[QuicNode]:
    """A connection that has said nothing yet."""
    assert sim.quic_port is not None
    async with connect(
        "127.0.0.1",
        sim.quic_port,
        configuration=configuration or client_configuration(sim, node),
        create_protocol=QuicNode,
    ) as protocol:
        assert isinstance(protocol, QuicNode)
        yield protocol


@asynccontextmanager
async def quic_served(sim: CloudSim, node: str = "edge-a") -> AsyncIterator[QuicNode]:
    """A node that has a session, and an open message stream 4."""
    async with quic_raw(sim, node) as connection:
        await connection.greet(node)
        connection.write(4, b"msg")
        yield connection
