"""A narrow line: a TCP relay that passes so many bytes a second each way and buffers next to nothing.

It runs in threads of its own, so that what is measured is the line and not the test's event loop.
"""

import contextlib
import socket
import threading
import time
from types import TracebackType

_BUFFER_BYTES = 4096
_CHUNK_BYTES = 1024
_OVERSLEPT_SECONDS = 0.02


class NarrowLine:
    """`port` leads to `target_port` on loopback, at `bytes_per_second` in each direction."""

    def __init__(self, target_port: int, bytes_per_second: float) -> None:
        self._target_port = target_port
        self._rate = bytes_per_second
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)  # accepted sockets inherit it
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> "NarrowLine":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                node, _ = self._listener.accept()
                hub = socket.socket()
                hub.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
                hub.connect(("127.0.0.1", self._target_port))
                for each in (node, hub):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += [node, hub]
                threading.Thread(target=self._carry, args=(node, hub), daemon=True).start()
                threading.Thread(target=self._carry, args=(hub, node), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        due = time.monotonic()
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                # A byte arrives when the line has carried it. What sleeping too long cost is made up for; an idle
                # line has nothing else saved up.
                due = max(due, time.monotonic() - _OVERSLEPT_SECONDS) + len(data) / self._rate
                time.sleep(max(0.0, due - time.monotonic()))
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
