"""The HTTP server behind `/metrics`: a few non-blocking sockets in the watchdog's loop, no thread, no http library.

A scrape waits for the broker's status at most ANSWER_SECONDS; then it is answered without. Whoever sends slowly, too
much or nothing is cut off, and there are never more than MAX_CONNECTIONS, so that nobody on the port can hold up or
fill the watchdog.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from runtime.exposition import CONTENT_TYPE

MAX_CONNECTIONS: Final = 16
MAX_REQUEST_BYTES: Final = 8192
ANSWER_SECONDS: Final = 1.0
"The broker answers within a millisecond unless it hangs."
CONNECTION_SECONDS: Final = 5.0
"From its beginning to its end."

_POLLIN: Final = 1
_POLLOUT: Final = 2
"zmq.POLLIN and zmq.POLLOUT (zmq_poll(3))."


class Poller(Protocol):
    """What is used of zmq.Poller."""

    def register(self, socket: int, flags: int = ..., /) -> None: ...
    def unregister(self, socket: int, /) -> None: ...


class _Connection:
    __slots__ = ("deadline", "received", "sock", "to_send", "waits")

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self.received = b""
        self.to_send = b""
        self.waits = False  # for the text


class MetricsServer:
    """Listens on `address`:`port` (0 = any free one). `ask` asks the broker; `text` makes the answer."""

    def __init__(
        self, address: str, port: int, poller: Poller, *, ask: Callable[[], None], text: Callable[[bool], str]
    ) -> None:
        """Raises OSError when the port cannot be had."""
        self._poller = poller
        self._ask = ask
        self._text = text
        self._ask_until: float | None = None
        self._connections: dict[int, _Connection] = {}
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((address, port))
            self._listener.listen(MAX_CONNECTIONS)
            self._listener.setblocking(False)
        except BaseException:
            self._listener.close()
            raise
        poller.register(self._listener.fileno(), _POLLIN)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        self._poller.unregister(self._listener.fileno())
        self._listener.close()
        for connection in list(self._connections.values()):
            self._end(connection)

    def next_deadline(self) -> float | None:
        """When `expire` wants to be called next."""
        times = [connection.deadline for connection in self._connections.values()]
        if self._ask_until is not None:
            times.append(self._ask_until)
        return min(times, default=None)

    def expire(self, now: float) -> None:
        if self._ask_until is not None and now >= self._ask_until:
            self._answer(has_bus=False)
        for connection in list(self._connections.values()):
            if now >= connection.deadline:
                self._end(connection)

    def ready(self, fds: dict[int, int], now: float) -> None:
        """Serve those of our sockets that the poller found ready."""
        if self._listener.fileno() in fds:
            self._accept(now)
        for fd in fds.keys() & self._connections.keys():
            connection = self._connections[fd]
            if connection.to_send:
                self._send(connection)
            else:
                self._read(connection, now)

    def answered(self) -> None:
        """The broker's status came."""
        self._answer(has_bus=True)

    # --- how ---

    def _accept(self, now: float) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # nobody (more), or no descriptor left: those who wait are accepted later
            if len(self._connections) >= MAX_CONNECTIONS:
                sock.close()
                continue
            sock.setblocking(False)
            self._connections[sock.fileno()] = _Connection(sock, now + CONNECTION_SECONDS)
            self._poller.register(sock.fileno(), _POLLIN)

    def _read(self, connection: _Connection, now: float) -> None:
        try:
            data = connection.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or connection.waits:
            # Gone, or it says more than one request: one is all it gets.
            if not data:
                self._end(connection)
            return
        connection.received += data
        if b"\r\n\r\n" in connection.received or b"\n\n" in connection.received:
            self._request(connection, now)
        elif len(connection.received) > MAX_REQUEST_BYTES:
            self._reply(connection, "431 Request Header Fields Too Large", "the request is too long\n")

    def _request(self, connection: _Connection, now: float) -> None:
        words = connection.received.split(b"\n", 1)[0].strip().split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            self._reply(connection, "400 Bad Request", "expected GET /metrics HTTP/1.1\n")
        elif words[0] != b"GET":
            self._reply(connection, "405 Method Not Allowed", "expected GET\n")
        elif words[1].split(b"?", 1)[0] != b"/metrics":
            self._reply(connection, "404 Not Found", "there is only /metrics\n")
        else:
            connection.waits = True
            if self._ask_until is None:
                self._ask_until = now + ANSWER_SECONDS
                self._ask()

    def _answer(self, *, has_bus: bool) -> None:
        self._ask_until = None
        waiting = [connection for connection in self._connections.values() if connection.waits]
        if not waiting:
            return
        text = self._text(has_bus)
        for connection in waiting:
            connection.waits = False
            self._reply(connection, "200 OK", text, CONTENT_TYPE)

    def _reply(self, connection: _Connection, status: str, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        body = text.encode("utf-8", "replace")
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.to_send = head.encode() + body
        self._poller.unregister(connection.sock.fileno())
        self._poller.register(connection.sock.fileno(), _POLLOUT)
        self._send(connection)

    def _send(self, connection: _Connection) -> None:
        try:
            sent = connection.sock.send(connection.to_send)
        except BlockingIOError:
            return
        except OSError:
            self._end(connection)
            return
        connection.to_send = connection.to_send[sent:]
        if not connection.to_send:
            # Said to the end before the close, which would cut off what is not read yet of a request with a body.
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_WR)
            self._end(connection)

    def _end(self, connection: _Connection) -> None:
        fd = connection.sock.fileno()
        del self._connections[fd]
        self._poller.unregister(fd)
        connection.sock.close()


def process_facts(pid: int) -> tuple[int | None, float | None]:
    """Resident bytes and CPU seconds of a process; None where the kernel does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
        # The name in brackets may hold anything; the fields are behind it (proc(5): utime and stime are 14 and 15).
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
    except (OSError, ValueError, IndexError):
        return None, None
    return pages * os.sysconf("SC_PAGE_SIZE"), ticks / os.sysconf("SC_CLK_TCK")
