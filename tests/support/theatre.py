"""Plays of the conformance runner with no process and no socket: a puppet, or a broker's core, in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from runtime.conform.broker_stage import BrokerStage
from runtime.conform.module_stage import ModuleStage, Traits
from runtime.conform.play import Check, Close, Open, Play, Rebind, Settings, Signal, Start, Tell
from runtime.routing import RoutingCore
from tests.support.puppet import Puppet

SETTINGS = Settings()
STEP = 0.001
"Seconds that pass at least, when nothing else happens."


class ModulePlay:
    """One check of a module, played with a puppet that has these faults."""

    def __init__(
        self,
        check: Check,
        faults: Iterable[str] = (),
        traits: Traits | None = None,
        kind: Callable[[Iterable[str], bytes], Puppet] = Puppet,
    ) -> None:
        self.faults = frozenset(faults)
        self.kind = kind
        self.now = 100.0
        self.processes = 0
        self.connections = 0
        self.end = ""
        self.puppet: Puppet | None = None
        self.inbox: list[list[bytes]] | None = None  # while it is stopped
        self.play = Play(check, ModuleStage(SETTINGS, traits), self.now)
        self._run()

    def _connect(self) -> None:
        assert self.puppet is not None
        self.connections += 1
        routing_id = b"mine" if "own-routing-id" in self.faults else b"\0" + self.connections.to_bytes(4, "big")
        self.end = routing_id.hex()
        self.puppet.connected(self.now)

    def _run(self) -> None:
        while self.play.result is None:
            if not self._act():
                due = self.play.deadline()
                if self.puppet is not None and self.inbox is None:
                    due = min(due, self.puppet.deadline())
                self.now = max(self.now + STEP, due)
                if self.puppet is not None and self.inbox is None:
                    self.puppet.expire(self.now)
                self._pass_on()
                self.play.expire(self.now)

    def _act(self) -> bool:
        """Perform what the stage wants, and carry what comes of it; whether there was anything."""
        actions = self.play.stage.actions
        busy = bool(actions)
        while actions and self.play.result is None:
            action = actions.pop(0)
            match action:
                case Start():
                    self.processes += 1
                    self.inbox = None
                    self.puppet = self.kind(self.faults, f"puppet {self.processes}........"[:16].encode())
                    self._connect()
                case Signal("TERM"):
                    if self.puppet is not None:
                        self.puppet.terminate(self.now)
                case Signal("KILL"):
                    if self.puppet is not None:
                        self.puppet.exit(-9)
                case Signal("STOP"):
                    self.inbox = []
                case Signal("CONT"):
                    inbox, self.inbox = self.inbox or [], None
                    assert self.puppet is not None
                    for frames in inbox:
                        self.puppet.receive(frames, self.now)
                    self.puppet.expire(self.now)
                case Tell(end, frames):
                    if end == self.end and self.puppet is not None:
                        if self.inbox is not None:
                            self.inbox.append(list(frames))
                        else:
                            self.puppet.receive(list(frames), self.now)
                case Rebind():
                    if self.puppet is not None:
                        self.puppet.disconnected(self.now)
                        self._connect()
            self._pass_on()
        return busy

    def _pass_on(self) -> None:
        puppet = self.puppet
        if puppet is None:
            return
        while puppet.out and self.play.result is None:
            frames = puppet.out.pop(0)
            self.play.receive(self.end, frames, self.now)
        if puppet.status is not None and self.play.result is None:
            self.puppet = None
            self.play.ended(puppet.status, self.now)


class BrokerPlay:
    """One check of a broker, played with a core that a test may have mangled.

    `hear` and `say` are between the wire and the core: they take (peer, frames) and give what gets through.
    """

    def __init__(self, check: Check, core: RoutingCore, mangler: Mangler | None = None, tag: str = "test") -> None:
        self.core = core
        self.mangler = mangler or Mangler()
        self.now = 10.0
        core.expire(self.now)
        self.peers: dict[bytes, str] = {}
        self.play = Play(check, BrokerStage(SETTINGS, tag), self.now)
        self._run()

    def _run(self) -> None:
        while self.play.result is None:
            if not self._act():
                self.now = max(self.now + STEP, min(self.play.deadline(), self.core.next_deadline(self.now)))
                self.core.expire(self.now)
                self._pass_on()
                self.play.expire(self.now)
        self._act()

    def _act(self) -> bool:
        actions = self.play.stage.actions
        busy = bool(actions)
        while actions:
            action = actions.pop(0)
            match action:
                case Open(end):
                    self.peers[end.encode()] = end
                case Close(end):
                    self.peers.pop(end.encode(), None)
                case Tell(end, frames):
                    for heard in self.mangler.hear(end, list(frames)):
                        self.core.receive((0, end.encode()), heard, self.now)
            self._pass_on()
        return busy

    def _pass_on(self) -> None:
        while outs := self.core.flush(self.now):
            said: list[tuple[str, list[bytes]]] = []
            for out in outs:
                end = self.peers.get(out.peer[1])
                if end is None:
                    self.core.lost(out.peer, self.now)
                else:
                    said.append((end, list(out.frames)))
            for end, frames in self.mangler.say(said):
                if end in self.peers.values():
                    self.play.receive(end, frames, self.now)


class Mangler:
    """Between the wire and a broker's core; this one lets everything through."""

    def __init__(self) -> None:
        self.memory: dict[Any, Any] = {}

    def hear(self, end: str, frames: list[bytes]) -> list[list[bytes]]:
        return [frames]

    def say(self, said: list[tuple[str, list[bytes]]]) -> list[tuple[str, list[bytes]]]:
        return said
