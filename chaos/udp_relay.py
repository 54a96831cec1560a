"""A UDP relay that breaks the link it carries: `python -m chaos.udp_relay LISTEN_PORT TARGET_PORT`.

Its standard input takes one JSON object a line, {"do": WHAT}, as chaos.relay: drop, half-open, refuse, stall, throttle,
pass; and `lossy` with the shares `loss` and `reorder`. Datagrams that do not pass are gone, as on a line that is down.

`drop` stands for a router on the way that forgets the flow: the cloud sees it go on from another port (QUIC moves the
connection there). `half-open`: nothing of the flow passes ever again; one from another port of the node does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from random import Random
from typing import Any, Final, cast

_QUEUED_SECONDS: Final = 0.5
"On a throttled line so much waits in a buffer; what comes beyond is dropped, as routers do."
_LATE_SECONDS: Final = (0.005, 0.03)
"A datagram that is overtaken comes so much later."

Address = tuple[str, int]


class Line:
    """What happens to datagrams; one direction. Time is the caller's."""

    def __init__(self, chance: Random) -> None:
        self._chance = chance
        self.bytes_per_second = 0.0
        self.loss = self.reorder = 0.0
        self._free_at = 0.0

    def delay(self, size_bytes: int, now: float) -> float | None:
        """Seconds until the datagram comes out; None: it is lost."""
        if self.loss and self._chance.random() < self.loss:
            return None
        delay = self._chance.uniform(*_LATE_SECONDS) if self.reorder and self._chance.random() < self.reorder else 0.0
        if self.bytes_per_second:
            waits = max(0.0, self._free_at - now)
            if waits > _QUEUED_SECONDS:
                return None
            self._free_at = now + waits + size_bytes / self.bytes_per_second
            delay += self._free_at - now
        return delay


class Flow(asyncio.DatagramProtocol):
    """Datagrams of one address of the node; a socket of its own towards the cloud."""

    def __init__(self, relay: Relay, near: Address) -> None:
        self._relay = relay
        self.near = near
        self._far: asyncio.DatagramTransport | None = None
        self._early: list[bytes] = []
        self.is_deaf = False

    async def open(self) -> None:
        """A new socket, and so another port, towards the cloud."""
        old, self._far = self._far, None
        if old is not None:
            old.close()
        loop = asyncio.get_running_loop()
        self._far, _ = await loop.create_datagram_endpoint(lambda: self, remote_addr=("127.0.0.1", self._relay.target))
        early, self._early = self._early, []
        for data in early:
            self._far.sendto(data)

    def close(self) -> None:
        if self._far is not None:
            self._far.close()

    def to_cloud(self, data: bytes) -> None:
        if self._far is None:
            self._early.append(data)
        else:
            self._far.sendto(data)

    def datagram_received(self, data: bytes, _: Any) -> None:
        if not self.is_deaf:
            self._relay.carry(self._relay.down, data, lambda: self._relay.to_node(data, self.near))

    def error_received(self, _: Exception) -> None:
        pass  # nobody listens there (now): for the node it is silence


class Relay(asyncio.DatagramProtocol):
    def __init__(self, target: int) -> None:
        self.target = target
        chance = Random(target)
        self.up, self.down = Line(chance), Line(chance)
        self._flows: dict[Address, Flow] = {}
        self._is_down = False
        self._near: asyncio.DatagramTransport | None = None
        self._opening: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._near = cast("asyncio.DatagramTransport", transport)

    @property
    def is_at_rest(self) -> bool:
        """No flow waits for its socket."""
        return not self._opening

    def close(self) -> None:
        """The sockets towards the cloud; the other one is whose that made it."""
        for flow in self._flows.values():
            flow.close()

    def command(self, order: dict[str, Any]) -> None:
        what = order["do"]
        if what == "pass":
            self._is_down = False
        elif what in ("stall", "refuse"):
            self._is_down = True
        for line in (self.up, self.down):
            line.bytes_per_second = float(order["bytes_per_second"]) if what == "throttle" else 0.0
            line.loss, line.reorder = (order["loss"], order["reorder"]) if what == "lossy" else (0.0, 0.0)
        for flow in list(self._flows.values()):
            if what == "half-open":
                flow.is_deaf = True
            elif what == "drop":
                self._open(flow)

    def _open(self, flow: Flow) -> None:
        task = asyncio.get_running_loop().create_task(flow.open())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def datagram_received(self, data: bytes, address: Address) -> None:
        flow = self._flows.get(address)
        if flow is None:
            flow = self._flows[address] = Flow(self, address)
            self._open(flow)
        if not flow.is_deaf:
            self.carry(self.up, data, lambda: flow.to_cloud(data))

    def carry(self, line: Line, data: bytes, deliver: Callable[[], None]) -> None:
        if self._is_down:
            return
        loop = asyncio.get_running_loop()
        delay = line.delay(len(data), loop.time())
        if delay is not None:
            deliver() if delay == 0.0 else loop.call_later(delay, deliver)

    def to_node(self, data: bytes, address: Address) -> None:
        assert self._near is not None
        self._near.sendto(data, address)

    def error_received(self, _: Exception) -> None:
        pass  # the node's socket is gone: it has dialled anew, or died


async def _serve(port: int, target: int) -> None:
    loop = asyncio.get_running_loop()
    transport, relay = await loop.create_datagram_endpoint(lambda: Relay(target), local_addr=("127.0.0.1", port))
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    print(json.dumps({"port": transport.get_extra_info("sockname")[1]}), flush=True)  # noqa: T201
    while line := await orders.readline():
        relay.command(json.loads(line))
        print("{}", flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
