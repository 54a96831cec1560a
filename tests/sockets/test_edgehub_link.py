"""The websocket adapter on loopback TLS, against a server of our own that says what no CloudHub would."""

import asyncio
import base64
import hashlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cloudsim.certificates import Authority
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.link import LinkEvent, LinkLost, LinkRefused, Passed, Received, SkippedMessage
from modules.edgehub.outbox import Class
from modules.edgehub.websocket import WebSocketLink
from tests.modules.edgehub.test_frames import server_frame, unmask
from tests.support.aio import run, until

PING, PONG, CLOSE, TEXT = 9, 10, 8, 1
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Accepts TLS connections of a node and hands each to `talk`."""

    def __init__(self, authority: Authority, talk: Talk, *, host: str = "127.0.0.1") -> None:
        self.authority = authority
        self.talk = talk
        self.host = host
        self.port = 0
        self.certificates: list[int] = []

    def context(self) -> ssl.SSLContext:
        pair = self.authority.server(["127.0.0.1", "localhost"])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        context.load_verify_locations(cafile=self.authority.ca.certificate)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.transport.abort()


@asynccontextmanager
async def serving(directory: Path, talk: Talk) -> AsyncIterator[Server]:
    server = Server(Authority(directory), talk)
    listener = await asyncio.start_server(server.accept, "0.0.0.0", 0, ssl=server.context())
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()


def config(server: Server, **changes: Any) -> EdgeHubConfig:
    pair = server.authority.node("edge-1")
    values: dict[str, Any] = {
        "node_name": "edge-1",
        "endpoints": (Endpoint("127.0.0.1", server.port),),
        "ca_file": str(server.authority.ca.certificate),
        "cert_file": str(pair.certificate),
        "key_file": str(pair.key),
        "handshake_seconds": 5.0,
        "max_frame_bytes": 2**20,
    }
    return EdgeHubConfig(**values | changes)


async def read_request(reader: asyncio.StreamReader) -> dict[str, str]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
    return headers | {"": head[0]}


def accept_key(headers: dict[str, str]) -> str:
    text = headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    return base64.b64encode(hashlib.sha1(text.encode()).digest()).decode()


async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, behind: bytes = b"") -> dict[str, str]:
    headers = await read_request(reader)
    writer.write(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        + f"Sec-WebSocket-Accept: {accept_key(headers)}\r\n\r\n".encode()
        + behind
    )
    await writer.drain()
    return headers


def saying(*pieces: bytes, then_wait: bool = True) -> Talk:
    """A server that upgrades and then writes `pieces`, one write each."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if then_wait:
            await reader.read()

    return talk


async def opened(server: Server, **changes: Any) -> WebSocketLink:
    settings = config(server, **changes)
    link = WebSocketLink(settings)
    await link.open(settings.endpoints[0])
    return link


async def receive(link: WebSocketLink, count: int) -> list[LinkEvent]:
    events: list[LinkEvent] = []
    while len(events) < count:
        events += await link.receive()
    return events


def test_the_request_says_who_we_are_and_offers_nothing(tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await upgrade(reader, writer))
        tls = writer.get_extra_info("ssl_object")
        seen.append({"alpn": str(tls.selected_alpn_protocol()), "version": tls.version()})

    async def scenario() -> None:
        async with serving(tmp_path, talk) as server:
            link = await opened(server)
            with pytest.raises(LinkLost):
                await link.receive()
            await link.close(is_polite=False)
        request, tls = seen
        assert request[""] == "GET /e632aba927ea4ac2b575ec1603d56f10/edge-1/events HTTP/1.1"
        assert (request["node_id"], request["connectionuse"]) == ("edge-1", "msg")
        assert request["project_id"] == "e632aba927ea4ac2b575ec1603d56f10"
        assert not {"sec-websocket-extensions", "sec-websocket-protocol", "origin"} & request.keys()
        assert tls == {"alpn": "None", "version": "TLSv1.3"}

    run(scenario())


def test_many_messages_and_their_barrier_go_out_in_one_write(tmp_path: Path) -> None:
    reads: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        while data := await reader.read(2**20):
            reads.append(data)

    async def scenario() -> None:
        async with serving(tmp_path, talk) as server:
            link = await opened(server)
            payloads = [f'{{"n":{n}}}\n'.encode() for n in range(500)]
            link.write(payloads, 7)
            await until(lambda: len(unmask_whole(b"".join(reads))) == 501, "all frames")
            assert unmask_whole(b"".join(reads)) == [(0x80 | TEXT, p) for p in payloads] + [(0x80 | PING, b"7")]
            assert len(reads) <= 2, "one write of one TLS record or two"
            await link.close(is_polite=True)

    run(scenario())


def unmask_whole(stream: bytes) -> list[tuple[int, bytes]]:
    try:
        return unmask(stream)
    except (IndexError, AssertionError):
        return []


def test_messages_pongs_and_what_is_too_large_come_in_order(tmp_path: Path) -> None:
    talk = saying(
        server_frame(TEXT, b"one") + server_frame(PONG, b"3") + server_frame(TEXT, b"x" * (2**20 + 1))[:5000],
        server_frame(TEXT, b"x" * (2**20 + 1))[5000:] + server_frame(PONG, b"not ours") + server_frame(TEXT, b"two"),
    )

    async def scenario() -> None:
        async with serving(tmp_path, talk) as server:
            link = await opened(server)
            events = await receive(link, 4)
            assert events == [Received(b"one"), Passed(3), SkippedMessage(2**20 + 1), Received(b"two")]
            await link.close(is_polite=False)

    run(scenario())


def test_what_comes_right_behind_the_upgrade_is_not_lost(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer, behind=server_frame(TEXT, b"at once"))
        await reader.read()

    async def scenario() -> None:
        async with serving(tmp_path, talk) as server:
            link = await opened(server)
            assert await link.receive() == [Received(b"at once")]
            await link.close(is_polite=False)

    run(scenario())


def test_a_ping_is_answered_and_a_close_echoed(tmp_path: Path) -> None:
    answers: list[tuple[int, bytes]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        writer.write(server_frame(PING, b"hello") + server_frame(CLOSE, b"\x03\xe9going"))
        answers.extend(unmask(await reader.read()))

    async def scenario() -> None:
        async with serving(tmp_path, talk) as server:
            link = await opened(server)
            with pytest.raises(LinkLost, match="code 1001 going") as lost:
                await link.receive()
            assert lost.value.is_cut_by_cloud
            await until(lambda: len(answers) == 2, "both answers")
            assert answers == [(0x80 | PONG, b"hello"), (0x80 | CLOSE, b"\x03\xe9")]
            await link.close(is_polite=True)

    run(scenario())


def test_a_connection_that_ends_without_a_close_frame_is_a_cut_by_the_cloud(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, saying(server_frame(TEXT, b"last"), then_wait=False)) as server:
            link = await opened(server)
            assert await link.receive() == [Received(b"last")], "what came before it is not lost"
            with pytest.raises(LinkLost) as lost:
                await link.receive()
            assert lost.value.is_cut_by_cloud
            link.write([b"into the void"])
            with pytest.raises(LinkLost):
                await link.wait_writable(Class.DATA)
            await link.close(is_polite=True)

    run(scenario())


def test_a_broken_frame_ends_the_link_with_1002_after_what_came_before_it(tmp_path: Path) -> None:
    answers: list[tuple[int, bytes]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        writer.write(server_frame(TEXT, b"good") + server_frame(5, b"bad"))
        answers.extend(unmask(await reader.read()))

    async def scenario() -> None:
        async with serving(tmp_path, talk) as server:
            link = await opened(server)
            assert await link.receive() == [Received(b"good")]
            with pytest.raises(LinkLost, match="unknown opcode 5"):
                await link.receive()
            await until(lambda: answers, "the close frame")
            assert answers[0][1][:2] == b"\x03\xea"

    run(scenario())


def test_unread_messages_push_back_on_the_sender(tmp_path: Path) -> None:
    written: list[int] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        for number in range(400):
            writer.write(server_frame(TEXT, b"x" * 100_000))
            await writer.drain()
            written.append(number)
        await reader.read()

    async def scenario() -> None:
        async with serving(tmp_path, talk) as server:
            link = await opened(server)
            await until(lambda: written, "the first message")
            before = -1
            while len(written) != before:
                before = len(written)
                await asyncio.sleep(0.2)
            assert len(written) < 400, "40 MB did not go into memory"
            assert len(await receive(link, 400)) == 400, "and none is lost"
            await link.close(is_polite=False)

    run(scenario())


def test_acknowledged_bytes_grow_with_what_the_peer_took(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, saying()) as server:
            link = await opened(server)
            before = link.acknowledged_bytes()
            link.write([b"x" * 100_000])
            await until(lambda: link.acknowledged_bytes() >= before + 100_000, "the acknowledgements")
            await link.close(is_polite=False)

    run(scenario())


def test_the_write_buffer_tells_when_it_is_full_and_when_it_has_drained(tmp_path: Path) -> None:
    go = asyncio.Event

    async def scenario() -> None:
        reading = go()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await upgrade(reader, writer)
            writer.transport.pause_reading()
            await reading.wait()
            writer.transport.resume_reading()
            while await reader.read(2**20):
                pass

        async with serving(tmp_path, talk) as server:
            link = await opened(server)
            for _ in range(100):
                link.write([b"x" * 2**20])
            assert not link.is_writable(Class.DATA)
            waiting = asyncio.create_task(link.wait_writable(Class.DATA))
            await asyncio.sleep(0)
            assert not waiting.done()
            reading.set()
            await waiting
            assert link.is_writable(Class.DATA)
            await link.close(is_polite=False)

    run(scenario())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "HTTP 403 Forbidden"),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad", "HTTP 400 Bad Request"),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: wrong\r\n\r\n",
            "not valid",
        ),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "CloudHub"),
        (b"x" * 100_000, "no CloudHub"),
    ],
)
def test_an_answer_that_is_no_upgrade_is_told(tmp_path: Path, answer: bytes, words: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        await writer.drain()
        await reader.read()

    async def scenario() -> None:
        async with serving(tmp_path, talk) as server:
            with pytest.raises(LinkRefused, match=words):
                await opened(server)

    run(scenario())


def test_a_server_that_hangs_up_during_the_upgrade_is_a_lost_link(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)

    async def scenario() -> None:
        async with serving(tmp_path, talk) as server:
            with pytest.raises(LinkLost, match=r"before the upgrade.*certificate"):
                await opened(server)

    run(scenario())


def test_a_server_that_says_nothing_is_left_after_the_handshake_time(tmp_path: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def scenario() -> None:
        async with serving(tmp_path, talk) as server:
            with pytest.raises(LinkLost, match=r"no link within 0\.2 s"):
                await opened(server, handshake_seconds=0.2)

    run(scenario())


def test_a_port_where_nobody_listens_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            server = Server(Authority(tmp_path), saying())
            server.port = unused.getsockname()[1]
            with pytest.raises(LinkLost, match="refused"):
                await opened(server)

    run(scenario())


def test_a_server_of_another_ca_is_not_trusted(tmp_path: Path) -> None:
    async def scenario() -> None:
        other = Authority(tmp_path / "other")
        async with serving(tmp_path / "one", saying()) as server:
            with pytest.raises(LinkRefused, match="does not verify"):
                await opened(server, ca_file=str(other.ca.certificate))

    run(scenario())


def test_a_server_under_another_name_is_not_trusted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, saying()) as server:
            settings = config(server)
            link = WebSocketLink(settings)
            with pytest.raises(LinkRefused, match="does not verify"):
                await link.open(Endpoint("127.0.0.2", server.port))

    run(scenario())


def test_a_node_certificate_of_another_ca_is_refused_by_the_cloud_in_words(tmp_path: Path) -> None:
    strange = Authority(tmp_path / "other").node("edge-1")
    server = Server(Authority(tmp_path / "one"), saying())
    listener = socket.create_server(("127.0.0.1", 0))
    server.port = listener.getsockname()[1]

    def accept_once() -> None:
        # Not asyncio's server, which closes without sending the alert; Go's sends it, as OpenSSL itself does.
        connection, _ = listener.accept()
        tls = server.context().wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with pytest.raises(ssl.SSLError):
            tls.do_handshake()
        with socket.socket(fileno=tls.detach()) as plain:
            while plain.recv(4096):  # closing with something unread would send a reset, which overtakes the alert
                pass

    async def scenario() -> None:
        accepting = asyncio.create_task(asyncio.to_thread(accept_once))
        with pytest.raises(LinkRefused, match="refuses our certificate: it is not of CloudHub's CA"):
            await opened(server, cert_file=str(strange.certificate), key_file=str(strange.key))
        await accepting

    with listener:
        run(scenario())


def test_closing_twice_and_closing_what_was_never_open_do_no_harm(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, saying()) as server:
            await WebSocketLink(config(server)).close(is_polite=True)
            link = await opened(server)
            await link.close(is_polite=True)
            await link.close(is_polite=True)
            await link.close(is_polite=False)

    run(scenario())
