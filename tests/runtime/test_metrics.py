"""runtime.metrics: the small HTTP server in the watchdog's loop, over real sockets, with the poller it is made for."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from runtime.exposition import CONTENT_TYPE
from runtime.metrics import ANSWER_SECONDS, CONNECTION_SECONDS, MAX_CONNECTIONS, MetricsServer, process_facts
from tests.support.deadline import DEADLINE


class Loop:
    """As the watchdog's, with a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asked = 0
        self.poller = zmq.Poller()
        self.server = MetricsServer("127.0.0.1", 0, self.poller, ask=self._ask, text=self._text)

    def _ask(self) -> None:
        self.asked += 1

    def _text(self, has_bus: bool) -> str:
        return f"bus {has_bus}\n" + "x" * 300_000

    def turn(self) -> None:
        self.server.ready(dict(self.poller.poll(10)), self.now)
        self.server.expire(self.now)

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end
            self.turn()

    def connect(self, data: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.server.port), timeout=DEADLINE)
        client.sendall(data)
        client.setblocking(False)
        return client

    def answer(self, client: socket.socket) -> bytes:
        """All that the server says until it closes."""
        parts = []
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            self.turn()
            try:
                part = client.recv(65536)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                break
            if not part:
                break
            parts.append(part)
        client.close()
        return b"".join(parts)


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.server.close()


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_scrape_is_answered_when_the_broker_has_answered(loop: Loop) -> None:
    client = loop.connect(GET)
    loop.until(lambda: loop.asked)
    loop.server.answered()
    head, _, body = loop.answer(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert f"Content-Type: {CONTENT_TYPE}".encode() in head
    assert f"Content-Length: {len(body)}".encode() in head
    assert body.startswith(b"bus True\n")
    assert len(body) == 300_009


def test_a_broker_that_hangs_is_waited_for_a_second_only(loop: Loop) -> None:
    client = loop.connect(GET)
    loop.until(lambda: loop.asked)
    assert loop.server.next_deadline() == loop.now + ANSWER_SECONDS
    loop.now += ANSWER_SECONDS
    assert b"bus False" in loop.answer(client)
    assert loop.server.next_deadline() is None


def test_several_scrapes_ask_the_broker_once(loop: Loop) -> None:
    clients = [loop.connect(GET) for _ in range(5)]
    loop.until(lambda: sum(connection.waits for connection in loop.server._connections.values()) == 5)
    assert loop.asked == 1
    loop.server.answered()
    assert all(b"bus True" in loop.answer(client) for client in clients)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"hello\r\n\r\n", b"400"),
        (b"\x16\x03\x01\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 20_000, b"431"),
    ],
    ids=["other path", "other method", "not HTTP", "TLS", "too long"],
)
def test_what_is_no_scrape_is_told_so(loop: Loop, request_: bytes, status: bytes) -> None:
    answer = loop.answer(loop.connect(request_))
    # A request that goes on after the answer may cut the answer off: then the connection was closed at least.
    assert answer.startswith(b"HTTP/1.1 " + status) or (status == b"431" and not answer)
    assert loop.asked == 0


def test_a_request_may_come_in_pieces_and_have_a_query(loop: Loop) -> None:
    client = loop.connect(b"GET /metrics?x=1 HT")
    loop.turn()
    client.sendall(b"TP/1.0\r\n\r\n")
    loop.until(lambda: loop.asked)
    client.close()


def test_who_says_nothing_is_cut_off_and_who_leaves_is_forgotten(loop: Loop) -> None:
    silent, leaver = loop.connect(), loop.connect(GET)
    loop.until(lambda: loop.asked)
    leaver.close()
    loop.until(lambda: len(loop.server._connections) == 1)
    loop.server.answered()  # to nobody
    loop.now += CONNECTION_SECONDS
    assert loop.answer(silent) == b""
    assert not loop.server._connections


def test_more_connections_than_the_limit_are_closed_at_once(loop: Loop) -> None:
    clients = [loop.connect() for _ in range(MAX_CONNECTIONS)]
    loop.until(lambda: len(loop.server._connections) == MAX_CONNECTIONS)
    assert loop.answer(loop.connect(GET)) == b""
    for client in clients:
        client.close()
    loop.until(lambda: not loop.server._connections)


def test_a_port_that_is_taken_is_an_error(loop: Loop) -> None:
    with pytest.raises(OSError, match="in use"):
        MetricsServer("127.0.0.1", loop.server.port, zmq.Poller(), ask=lambda: None, text=lambda _: "")


def test_the_kernel_tells_memory_and_time_of_a_process() -> None:
    resident_bytes, cpu_seconds = process_facts(os.getpid())
    assert resident_bytes is not None
    assert resident_bytes > 2**20
    assert cpu_seconds is not None
    assert cpu_seconds > 0
    assert process_facts(2**22 + 1) == (None, None)
