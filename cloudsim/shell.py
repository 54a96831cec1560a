"""The asyncio side of the hub, whatever the transport: asks the core, performs, arms one timer."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Final, Protocol, assert_never

from cloudsim.edgecontroller import EdgeController
from cloudsim.faults import LASTING, Fault
from cloudsim.hub import Action, Drop, Forward, Hub, Note, Peer, Read, Send
from cloudsim.recorder import Recorder
from cloudsim.wire import CloudMessage, Codec, Undecodable

log = logging.getLogger("cloudsim")

_UNORDERED_MODULES: Final = frozenset({"edgecontroller", "devicecontroller"})
"CloudHub hands each of their messages over in a goroutine of its own."


class Wire(Protocol):
    """What the hub needs of a connection. None of it raises once the connection is gone."""

    def send(self, payload: bytes) -> None:
        """Write one message."""

    def drop(self) -> None:
        """End the connection without saying so in its protocol."""

    def read(self, wanted: bool) -> None:
        """Read from now on, or leave what comes in the socket."""

    def afflict(self, fault: Fault) -> None:
        """Suffer a fault of the line: half-open, stall, throttle, delay, slow-pong, close-mid-frame, clear."""


class HubShell:
    """Owns the core, the clock, the recorder and the connections."""

    def __init__(
        self,
        hub: Hub,
        recorder: Recorder,
        edgecontroller: EdgeController | None = None,
        *,
        inversion: float = 0.0,
        chance: random.Random | None = None,
    ) -> None:
        self.hub = hub
        self._inversion = inversion
        self._chance = chance or random.Random()
        self._overtaken: tuple[Forward, bytes, Codec] | None = None
        self.edgecontroller = edgecontroller
        self.recorder = recorder
        self.lasting: list[Fault] = []
        self._wires: dict[int, Wire] = {}
        self._nodes: dict[int, str] = {}
        self._codecs: dict[int, Codec] = {}
        self._drop_at: dict[str, list[_DropAt]] = {}
        self._reject_left: dict[int, int] = {}
        self._last_number = 0
        self._timer: asyncio.TimerHandle | None = None
        self._changed: list[asyncio.Future[None]] = []
        self._wall = time.time()

    def line_faults(self) -> list[Fault]:
        """Lasting faults that meet every connection, from its first byte on."""
        return [fault for fault in self.lasting if not fault.node]

    # --- what transports call --------------------------------------------------------------------

    def open(self, wire: Wire, peer: Peer) -> int:
        """A connection is upgraded; returns its number."""
        self._last_number += 1
        number = self._last_number
        self._wires[number] = wire
        self._nodes[number] = peer.node
        self._codecs[number] = peer.codec
        now = time.monotonic()
        if self._is_rejected_on_request(peer.node):
            actions = self.hub.connect_rejected(number, peer, "asked for by a fault", now=now)
        else:
            actions = self.hub.connect(number, peer, now=now)
        for fault in self.lasting:
            if fault.concerns(peer.node):
                wire.afflict(fault)
        self.perform(actions)
        self.settle()
        return number

    def receive(self, number: int, payload: bytes) -> bool:
        """One message's payload; False: the connection has ended, read no more of it.

        What cannot be decoded ends it. Call `settle` after a batch of these.
        """
        codec = self._codecs.get(number)
        if codec is None:
            return False
        try:
            message = codec.decode(payload)
        except Undecodable as fault:
            log.info("undecodable message connection=%d: %s", number, fault)
            self.perform(self.hub.drop(number, now=time.monotonic(), reason=f"undecodable message: {fault}"))
            return False
        return self.dispatch(number, message, payload)

    def dispatch(self, number: int, message: CloudMessage, payload: bytes) -> bool:
        """As `receive`, for a transport that decodes itself."""
        codec = self._codecs.get(number)
        if codec is None:
            return False
        if self._drop_at and self._must_drop(number, message, payload):
            return False
        for action in self.hub.receive(number, message, now=time.monotonic()):
            if type(action) is not Forward:
                self.perform([action])
            elif not self._inversion or action.module not in _UNORDERED_MODULES:
                self._hand_over(action, payload, codec)
            elif self._overtaken is None and self._chance.random() < self._inversion:
                self._overtaken = action, payload, codec
            else:
                self._hand_over(action, payload, codec)
                self._let_overtaken_go()
        return number in self._wires

    def _hand_over(self, action: Forward, payload: bytes, codec: Codec) -> None:
        """A cloud module gets a node's message."""
        self.recorder.message(action.node, action.module, action.message, payload, self._wall, codec)
        if self.edgecontroller is not None and action.module == "edgecontroller":
            for answer in self.edgecontroller.receive(action.node, action.message):
                self.send(action.node, answer)

    def _let_overtaken_go(self) -> None:
        if self._overtaken is not None:
            overtaken, self._overtaken = self._overtaken, None
            self._hand_over(*overtaken)

    def settle(self) -> None:
        """After a batch: wake who waits for events, arm the timer, take the time for the next batch."""
        self._let_overtaken_go()
        self._wall = time.time()
        if self._changed:
            waiting, self._changed = self._changed, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)
        self._arm()

    def closed(self, number: int, reason: str = "the node closed") -> None:
        """The connection is gone."""
        if self._wires.pop(number, None) is None:
            return
        self._forget(number)
        self.perform(self.hub.disconnected(number, now=time.monotonic(), reason=reason))
        self.settle()

    def _forget(self, number: int) -> None:
        self._nodes.pop(number, None)
        self._codecs.pop(number, None)

    def crash(self, reason: str) -> None:
        """CloudCore panics over what a node has sent: all connections end; somebody starts it again."""
        log.error("a real CloudCore would have crashed: %s", reason)
        self.recorder.happen("", "crashed", {"reason": reason}, time.time())
        self.reset()

    def writable(self, number: int, writable: bool) -> None:
        """The connection's write buffer is full, or empty again."""
        self.perform(self.hub.writable(number, writable, now=time.monotonic()))
        self.settle()

    # --- actions -----------------------------------------------------------------------------------

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(connection, payload):
                    if (wire := self._wires.get(connection)) is not None:
                        wire.send(payload)
                case Drop(connection, reason):
                    log.info("drop connection=%d reason=%s", connection, reason)
                    self._forget(connection)
                    if (wire := self._wires.pop(connection, None)) is not None:
                        wire.drop()
                case Read(connection, wanted):
                    if (wire := self._wires.get(connection)) is not None:
                        wire.read(wanted)
                case Forward(node, module, message):
                    self.recorder.from_hub(node, module, message, time.time())
                case Note(node, what, facts):
                    log.info("%s node=%s %s", what, node, facts)
                    self.recorder.happen(node, what, facts, time.time())
                    if what == "connected" and self.edgecontroller is not None:
                        for message in self.edgecontroller.connected(node):
                            self.send(node, message)
                case _:
                    assert_never(action)

    def send(self, node: str, message: CloudMessage) -> dict[str, str | None]:
        """A message for a node; returns its id, its queue and why it was dropped (or None)."""
        verdict, actions = self.hub.send(node, message, now=time.monotonic())
        self.perform(actions)
        self.settle()
        return {"id": verdict.id, "queue": verdict.queue, "dropped": verdict.dropped}

    def kick(self, node: str) -> None:
        self.perform(self.hub.kick(node, now=time.monotonic()))
        self.settle()

    def delete_node(self, node: str) -> None:
        self.perform(self.hub.delete_node(node, now=time.monotonic()))
        self.settle()

    def reset(self) -> None:
        self.perform(self.hub.reset(now=time.monotonic()))
        self.settle()

    async def change(self) -> None:
        """Returns after the next batch of events."""
        future = asyncio.get_running_loop().create_future()
        self._changed.append(future)
        await future

    def close(self) -> None:
        """Drop every connection and stop the timer."""
        self.reset()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        """Keep one timer for the core's next deadline; a keepalive only moves it later, and then it fires idle."""
        deadline = self.hub.next_deadline()
        if deadline is None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            return
        loop = asyncio.get_running_loop()
        # The loop's clock is time.monotonic as well (asyncio.BaseEventLoop.time).
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self.perform(self.hub.expire(now=time.monotonic()))
        self.settle()

    # --- faults ------------------------------------------------------------------------------------

    def afflict(self, fault: Fault) -> None:
        """A fault of connections; `refuse` and `restart` belong to the listener (see CloudSim)."""
        log.info("fault %s", fault)
        if fault.fault in LASTING:
            self.lasting = [old for old in self.lasting if (old.fault, old.node) != (fault.fault, fault.node)]
            self.lasting.append(fault)
        match fault.fault:
            case "drop":
                for number in self._concerned(fault):
                    self.perform(self.hub.drop(number, now=time.monotonic(), reason="fault: drop"))
            case "drop-at":
                assert fault.count is not None  # checked when the fault was made
                self._drop_at.setdefault(fault.node, []).append(_DropAt(fault.count, fault.dispatched))
            case "race":
                due = self.hub.races_due
                due[fault.node] = due.get(fault.node, 0) + (fault.count or 1)
            case "clear":
                self.lasting = [old for old in self.lasting if fault.node and old.node != fault.node]
                if fault.node:
                    self._drop_at.pop(fault.node, None)
                    self.hub.races_due.pop(fault.node, None)
                else:
                    self._drop_at.clear()
                    self.hub.races_due.clear()
                for number in self._concerned(fault):
                    self._wires[number].afflict(fault)
            case _:
                for number in self._concerned(fault):
                    self._wires[number].afflict(fault)
        self.settle()

    def _concerned(self, fault: Fault) -> list[int]:
        return [number for number, node in self._nodes.items() if fault.concerns(node)]

    def _is_rejected_on_request(self, node: str) -> bool:
        for index, fault in enumerate(self.lasting):
            if fault.fault == "reject" and fault.concerns(node):
                if fault.count == 1:
                    del self.lasting[index]
                elif fault.count is not None:
                    self.lasting[index] = Fault(fault="reject", node=fault.node, count=fault.count - 1)
                return True
        return False

    def _must_drop(self, number: int, message: CloudMessage, payload: bytes) -> bool:
        node = self._nodes.get(number, "")
        for key in (node, ""):
            for trap in self._drop_at.get(key, ()):
                trap.left -= 1
                if trap.left == 0:
                    self._drop_at[key].remove(trap)
                    if not self._drop_at[key]:
                        del self._drop_at[key]
                    if trap.dispatched:
                        self.dispatch(number, message, payload)
                    self.perform(self.hub.drop(number, now=time.monotonic(), reason="fault: drop-at"))
                    return True
        return False


class _DropAt:
    __slots__ = ("dispatched", "left")

    def __init__(self, left: int, dispatched: bool) -> None:
        self.left = left
        self.dispatched = dispatched
