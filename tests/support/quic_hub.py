"""A QUIC server that says what no CloudHub would, for tests of the edge's link."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aioquic.asyncio import QuicConnectionProtocol, serve
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from cloudsim.certificates import Authority
from runtime import viaduct
from runtime.message import Message
from runtime.viaduct import PackageReader


class Node(QuicConnectionProtocol):
    """One connection of a node: what it sent is in `messages`, by stream; `events` has the rest."""

    def __init__(self, hub: "QuicHub", *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.hub = hub
        self.messages: dict[int, list[Message]] = defaultdict(list)
        self.ends: list[events.QuicEvent] = []
        self._readers: dict[int, PackageReader] = {}
        hub.nodes.append(self)

    def quic_event_received(self, event: events.QuicEvent) -> None:
        if isinstance(event, events.StreamDataReceived):
            number = event.stream_id
            reader = self._readers.setdefault(number, PackageReader(has_use_type=number % 4 == 0 and number > 0))
            for payload in reader.receive(event.data):
                assert isinstance(payload, bytes)
                message = viaduct.decode_message(payload)
                self.messages[number].append(message)
                self.hub.talk(self, number, message)
        elif isinstance(event, events.StopSendingReceived | events.StreamReset | events.ConnectionTerminated):
            self.ends.append(event)

    @property
    def quic(self) -> QuicConnection:
        return self._quic

    def write(self, stream: int, data: bytes) -> None:
        self._quic.send_stream_data(stream, data)
        self.transmit()

    def say(self, stream: int, *messages: Message) -> None:
        self.write(stream, viaduct.packages(map(viaduct.encode_message, messages)))

    def open_stream(self, use_type: bytes = viaduct.MESSAGES) -> int:
        number = self._quic.get_next_available_stream_id()
        self.write(number, use_type)
        return number


Talk = Callable[[Node, int, Message], None]


def polite(node: Node, stream: int, message: Message) -> None:
    """Acknowledges the headers and answers barriers, as CloudHub does."""
    if stream == 0:
        node.say(0, message.response(viaduct.ACK))
    elif message.resource == "k8s/ca.crt":
        node.say(stream, message.response("CA"))


class QuicHub:
    def __init__(self, authority: Authority, talk: Talk) -> None:
        self.authority = authority
        self.talk = talk
        self.nodes: list[Node] = []
        self.port = 0

    @property
    def node(self) -> Node:
        return self.nodes[-1]


@asynccontextmanager
async def serving(
    directory: Path, talk: Talk = polite, *, names: Sequence[str] = ("127.0.0.1", "localhost"), **options: Any
) -> AsyncIterator[QuicHub]:
    """`names` in the server's certificate; `options` of its QuicConfiguration."""
    hub = QuicHub(Authority(directory), talk)
    pair = hub.authority.server(list(names))
    configuration = QuicConfiguration(is_client=False, **options)
    configuration.load_cert_chain(pair.certificate, pair.key)
    server = await serve(
        "127.0.0.1", 0, configuration=configuration, create_protocol=lambda *a, **o: Node(hub, *a, **o)
    )
    hub.port = server._transport.get_extra_info("sockname")[1]
    try:
        yield hub
    finally:
        server.close()
        await asyncio.sleep(0)  # the transport closes its socket in the next turn
