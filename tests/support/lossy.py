"""A lossy line for datagrams: a UDP relay in the test's own loop that drops, delays and goes silent on request."""

import asyncio
import random
import socket
from types import TracebackType

_BUFFER_BYTES = 4 * 2**20
_READ_DATAGRAMS = 64


class LossyLine:
    """`port` leads to `target_port` on loopback. `loss` is the share of datagrams that get lost, each way.

    As on a real path the far end sees the relay's address, another one for each of the node's addresses: a node that
    moves to another socket comes out of another port.
    """

    def __init__(self, target_port: int, *, loss: float = 0.0, delay_seconds: float = 0.0, seed: int = 1) -> None:
        self.loss = loss
        self.delay_seconds = delay_seconds
        self.is_silent = False
        "Nothing gets through any more, as when a cable is cut."
        self.bytes_per_second: float | None = None
        "Towards the target; what does not fit into a quarter of a second is dropped, as a router does."
        self.passed = 0
        self.dropped = 0
        self.ways: dict[object, socket.socket] = {}
        "By the node's address: the socket towards the target."
        self._target = ("127.0.0.1", target_port)
        self._chance = random.Random(seed)
        self._free_at = 0.0
        self._near = self._socket()
        self._near.bind(("127.0.0.1", 0))
        self.port: int = self._near.getsockname()[1]

    async def __aenter__(self) -> "LossyLine":
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._near, self._from_node)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in (self._near, *self.ways.values()):
            if each.fileno() >= 0:
                self._loop.remove_reader(each)
                each.close()

    def close_port(self) -> None:
        """Who sends to the port is refused from now on, as when the process behind it has died."""
        self._loop.remove_reader(self._near)
        self._near.close()

    @staticmethod
    def _socket() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        return made

    def _from_node(self) -> None:
        for _ in range(_READ_DATAGRAMS):
            try:
                datagram, address = self._near.recvfrom(65536)
            except (BlockingIOError, ConnectionRefusedError):
                return
            way = self.ways.get(address)
            if way is None:
                way = self.ways[address] = self._socket()
                way.connect(self._target)
                self._loop.add_reader(way, self._from_target, way, address)
            self._carry(datagram, way, None, self.bytes_per_second)

    def _from_target(self, way: socket.socket, address: tuple[str, int]) -> None:
        for _ in range(_READ_DATAGRAMS):
            try:
                datagram = way.recv(65536)
            except (BlockingIOError, ConnectionRefusedError):
                return
            self._carry(datagram, self._near, address, None)

    def _carry(self, datagram: bytes, out: socket.socket, address: tuple[str, int] | None, rate: float | None) -> None:
        if self.is_silent or self._chance.random() < self.loss:
            self.dropped += 1
            return
        delay = self.delay_seconds
        if rate is not None:
            now = self._loop.time()
            self._free_at = max(self._free_at, now) + len(datagram) / rate
            delay += self._free_at - now
            if self._free_at - now > 0.25:
                self._free_at -= len(datagram) / rate
                self.dropped += 1
                return
        self.passed += 1
        if delay:
            self._loop.call_later(delay, self._send, datagram, out, address)
        else:
            self._send(datagram, out, address)

    @staticmethod
    def _send(datagram: bytes, out: socket.socket, address: tuple[str, int] | None) -> None:
        try:
            if address is None:
                out.send(datagram)
            else:
                out.sendto(datagram, address)
        except OSError:
            pass  # gone, or its buffer is full: lost
