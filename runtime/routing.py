"""The broker's core: who is attached, what waits for whom, who is told what. No I/O, no clock.

`RoutingCore.receive` takes the frames of one peer, `expire` the passing of time, `died` a process's
death; what has to be sent comes out of `flush`, which the shell calls once a turn so that deliveries
and settlements are made per batch and never per message. Times are seconds of one monotonic clock.

The rules in here are those of docs/emp.md; "rule n" in a comment names one of its numbered rules.

A *lane* belongs to a sender: (incarnation, destination as addressed, priority). It holds *batches* until they are
settled. An *outlet* is one lane's way to one receiver: a group lane has one for each member. A *module* is a
name with its mailbox, which is its outlets; its *incarnation* is the process that holds the name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from runtime import emp
from runtime.access import Access, Credentials, Open, Pace
from runtime.errors import MalformedFrame
from runtime.inspection import Inspection
from runtime.message import split_batch
from runtime.names import group_name, is_group
from runtime.routing_state import (
    LATENCY_BOUNDS_SECONDS,
    PRIORITIES,
    Batch,
    Feed,
    Incarnation,
    Lane,
    Module,
    Outlet,
    Peer,
    Retained,
    Usage,
    has_batches,
)

REPLY: Final = int(emp.Priority.REPLY)
_BROKERS_FLAGS: Final = emp.FROM_STORE | emp.REDELIVERED
"In a SEND they say nothing."
TURNED_AWAY: Final = "turned-away"
MAX_GENERATION: Final = 2**62
MAX_ACCOUNTS: Final = 256
"Of a declared module: accounts of destinations that are kept when none of its processes has a lane there."
MAX_PAST: Final = 256
"Names that were let go and whose refusals are still told one by one."
MAX_PEERS: Final = 65536
"Connections that have not said HELLO are forgotten, oldest first, beyond this."


class Out(NamedTuple):
    """Send `frames` to `peer`."""

    peer: Peer
    frames: list[bytes]


class Life(NamedTuple):
    """A module came or went; for the log and for who watches processes."""

    name: str
    event: str
    "attached, back, silent, gone, fenced or denied."
    pid: int
    credentials: Credentials


class BrokerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the broker holds at the most, and how long it waits."""

    limits: emp.Limits = emp.Limits()
    byte_budget: int = 64 * 2**20
    "Message bytes held over all lanes. Beyond it senders wait; a receiver's own reserve still passes."
    reserve_bytes: int = 256 * 1024
    "What one receiver may hold when the budget is used up, so that one slow module does not stop the others."
    heartbeat_seconds: float = 5.0
    grace_seconds: float = 0.5
    "After its start the broker waits this long for modules to come back before it calls a name unknown."
    absent_limit_seconds: float = 30.0
    "An undeclared module that is away longer is let go; its messages are refused as `gone`."
    solo_after_deaths: int = 2
    "So many deaths of its receiver make a message delivered alone."
    poison_after_deaths: int = 5
    "So many make it refused as `failed`."
    max_lanes: int = 4096
    "Lanes per sender."
    max_modules: int = 4096
    max_retained: int = 1024
    max_retained_bytes: int = 8 * 2**20


def _fault_of_flags(header: emp.Send) -> str | None:
    """What of a SEND's fields does not go together. Priority 0 has no window: it is for replies and nothing else."""
    if bool(header.flags & emp.REPLY) != (header.priority == REPLY):
        return f"SEND/1: priority {header.priority} with flags {header.flags}; priority 0 and REPLY go together"
    if header.flags & emp.REPLY and header.requester is None:
        return "SEND/1: REPLY without requester"
    if header.flags & emp.RETAIN and (
        header.count != 1
        or header.retain_key is None
        or header.retain_counter is None
        or not is_group(header.destination)
    ):
        return "SEND/1: RETAIN needs one message, a group, retain_key and retain_counter"
    return None


class RoutingCore:
    """Decides where messages go, who hears of it, who holds a name.

    `session_base` makes session numbers unique over brokers: a random number shifted left by 24 bits.
    `clock_ms` is CLOCK_BOOTTIME at the start: generations never go below it (rule 22).
    """

    def __init__(
        self,
        *,
        epoch: bytes,
        session_base: int,
        clock_ms: int,
        now: float,
        limits: BrokerLimits | None = None,
        declared: Mapping[str, Iterable[str]] | None = None,
        access: Access | None = None,
    ) -> None:
        self.epoch = epoch
        self.limits = limits or BrokerLimits()
        self._access = access or Open()
        self._closed: frozenset[int] = frozenset()  # sockets that configuration has given up
        self._paces: dict[str, Pace] = {}  # of names with a quota; they outlive a module that is let go and comes back
        self._session = session_base
        self._started = now
        self._grace_until: float | None = now + self.limits.grace_seconds
        self._modules: dict[str, Module] = {}
        self._peers: dict[Peer, Incarnation] = {}
        self._asked: dict[Peer, bool] = {}  # peers that got a WHO and have not said HELLO since
        self._departed: dict[tuple[str, bytes], Incarnation] = {}  # let go while messages of theirs were unsettled
        self._past: dict[str, Module] = {}  # let go: what they owe and what they were refused is taken up again
        self._parked: list[Lane] = []
        self._dirty_lanes: list[Lane] = []
        self._dirty_modules: list[Module] = []
        self._out: list[Out] = []
        self._held_bytes = 0
        self._held_messages = 0
        self._throttled: list[Incarnation] = []
        self._paced: list[Module] = []  # senders with batches that wait for their pace
        self.paced_until = math.inf
        "When the first of those may go on; `flush` sees to it then."
        self._freed = False  # a mailbox has become smaller since the throttled were last looked at
        self._retained: dict[tuple[str, str, str], Retained] = {}
        self._retained_bytes = 0
        self._generation = clock_ms
        self._now = now
        self._refused_frames: dict[str, int] = {}
        self._refused_of_past: dict[str, int] = {}
        self._who = 0
        self._sources: dict[str, Incarnation] = {}  # whose retained messages the broker delivers itself
        self.life: list[Life] = []
        "What happened to modules since the shell last cleared it."
        self.inspection = Inspection(self.statistics)
        for name, groups in (declared or {}).items():
            self._modules[name] = self._new_module(name, frozenset(groups), now, declared=True)
        self._handlers: Final[dict[bytes, Callable[[Peer, Incarnation, Any, bytes | None, float], None]]] = {
            emp.SEND: self._on_send,
            emp.ACK: self._on_ack,
            emp.PING: self._on_ping,
            emp.DRAIN: self._on_drain,
            emp.BYE: self._on_bye,
        }

    # --- what the shell calls ---------------------------------------------------------------------

    def receive(self, peer: Peer, frames: list[bytes], now: float, credentials: Credentials | None = None) -> None:
        """Take the frames of one peer. `credentials` are needed only while the peer is not attached."""
        self._now = now
        incarnation = self._peers.get(peer)
        if incarnation is not None:
            incarnation.last_heard = now
        try:
            verb, header, body = emp.decode(frames)
        except MalformedFrame as fault:
            self._refuse_frame(peer, fault.code, fault.text)
            return
        handler = self._handlers.get(verb)
        if handler is not None:
            if incarnation is None:
                self._ask(peer)
            else:
                handler(peer, incarnation, header, body, now)
        elif verb == emp.HELLO:
            self._on_hello(peer, header, credentials or Credentials(), now)
        elif verb == emp.ADMIN:
            known = credentials or (Credentials() if incarnation is None else incarnation.credentials)
            if self._access.may_ask(known):
                self._out.extend(Out(peer, answer) for answer in self.inspection.ask(peer, header, body, now))
            else:
                self._refuse_frame(peer, emp.DENIED, "ADMIN/1 is for the user whom the broker runs as")
        else:
            self._refuse_frame(peer, emp.UNKNOWN_VERB, f"{verb.decode()} goes from broker to module only")

    def is_attached(self, peer: Peer) -> bool:
        """Whether `peer` has said HELLO: the shell looks up credentials only for those that have not."""
        return peer in self._peers

    def turned_away(self) -> None:
        """Somebody came over tcp with a key that no rule names, or with none: counted with what is refused."""
        self._refused_frames[TURNED_AWAY] = self._refused_frames.get(TURNED_AWAY, 0) + 1

    def lost(self, peer: Peer, now: float) -> None:
        """The connection is gone (libzmq could not send): what was in flight waits for the next HELLO."""
        self._asked.pop(peer, None)
        self.inspection.forget(peer)
        incarnation = self._peers.pop(peer, None)
        if incarnation is not None and incarnation.peer == peer:
            self._end_session(incarnation, now, died=False)

    def died(self, name: str, pid: int, now: float) -> None:
        """The process `pid` that held `name` is dead (pidfd). Nothing happens if the name has another holder."""
        module = self._modules.get(name)
        if module is None or module.holder is None or module.holder.credentials.pid != pid:
            return
        incarnation = module.holder
        self._end_session(incarnation, now, died=True)
        module.holder = None
        self._drop_empty_lanes(incarnation)
        module.state = "absent"
        module.absent_since = now
        self._event(module, "gone", pid, now)

    def adopt(
        self,
        access: Access,
        declared: Mapping[str, Iterable[str]],
        now: float,
        closed: Collection[int] = (),
    ) -> None:
        """Take another policy and other declarations over. `closed`: the sockets that are given up with it.

        What was taken before goes on to its receivers. A module that may no longer be who it is gets REFUSED with
        the reason and WHO; what waits for it stays, for as long as for any module that is away. What a name has sent
        whose rule is withdrawn is refused as `denied`: without a rule the name is the node's own, and receivers must
        not take it for that.
        """
        self._now = now
        before, after = self._access.ruled(), access.ruled()
        withdrawn = before - after if before is not None and after is not None else frozenset()
        self._access = access
        self._closed |= frozenset(closed)
        # Those who still may ask for a stream renew it within the lease.
        self.inspection.forget_all()
        for incarnation in list(self._peers.values()):
            why = self._refusal(incarnation.peer, incarnation.name, incarnation.groups, incarnation.credentials)
            if why is not None:
                self._dismiss(incarnation, why, now)
        if withdrawn:
            self._withdraw(withdrawn)
        wanted = {name: frozenset(groups) for name, groups in declared.items()}
        for name, groups in wanted.items():
            if name not in self._modules:
                self._modules[name] = self._new_module(name, groups, now, declared=True)
        for module in self._modules.values():
            is_attached = module.holder is not None and module.holder.attached
            if module.declared and module.name not in wanted and not is_attached:
                module.absent_since = now
            module.declared = module.name in wanted
            before = module.groups
            said = module.holder.groups if module.holder is not None and is_attached else frozenset()
            module.groups = said | wanted.get(module.name, frozenset())
            if is_attached and module.groups - before:
                self._deliver_retained(module, now, module.groups - before)
            self._set_pace(module, now)

    def _withdraw(self, names: frozenset[str]) -> None:
        """Refuse all that `names` have sent and nobody has acknowledged."""
        for key in [key for key in self._retained if key[0] in names]:
            self._retained_bytes -= len(self._retained.pop(key).body)
        for lane in self._parked:
            if lane.sender.name in names:
                for batch in [batch for batch in lane.batches if not batch.routed]:
                    self._refuse_batch(lane, batch, emp.DENIED)
        for module in (*self._modules.values(), *self._past.values()):
            if module.name in names:
                while module.paced:
                    self._refuse_batch(*module.paced.popleft(), emp.DENIED)
            for outlet in list(module.outlets.values()):
                if outlet.lane.sender.name in names:
                    self._take_back(outlet)
                    self._void_all(outlet, emp.DENIED)
                    self._settle_voided(outlet)
            self._wake(module)

    @staticmethod
    def _take_back(outlet: Outlet) -> None:
        """What is in flight takes no room of the prefetch any more; an ACK of it will come too late to count."""
        module, priority = outlet.module, outlet.lane.priority
        if outlet.solo:
            module.in_flight[priority] = 0
            outlet.solo = 0
        for batch in outlet.in_flight:
            if not (outlet.voided and batch.first in outlet.voided):
                module.in_flight[priority] -= batch.last - batch.from_ + 1
                module.in_flight_bytes[priority] -= batch.size

    def _refusal(self, peer: Peer | None, name: str, groups: Iterable[str], credentials: Credentials) -> str | None:
        if peer is not None and peer[0] in self._closed:
            return "this endpoint is no longer one of the node's"
        return self._access.refuse_hello(name, tuple(groups), credentials)

    def _dismiss(self, incarnation: Incarnation, why: str, now: float) -> None:
        """Its name is no longer for it: say so, and ask WHO, for REFUSED to the HELLO that follows ends a module."""
        peer, module = incarnation.peer, incarnation.module
        assert peer is not None
        self._refuse_frame(peer, emp.HELLO_DENIED, why)
        self._ask(peer)
        if module.holder is incarnation:
            module.holder = None
        self._drop_empty_lanes(incarnation)
        self.life.append(Life(module.name, "denied", incarnation.pid, incarnation.credentials))
        shown = self.inspection.presence(module.name, "gone", incarnation.pid, now)
        self._out.extend(Out(*each) for each in shown)

    def _set_pace(self, module: Module, now: float) -> None:
        module.pace = self._pace_of(module.name)
        if module.pace is None:
            while module.paced:
                self._route_batch(*module.paced.popleft(), now)
        if module.paced:
            self.paced_until = now  # a larger quota counts from here on

    def _pace_of(self, name: str) -> Pace | None:
        """One account for each name: whoever leaves and comes back has no more for it."""
        fresh = self._access.pace(name)
        known = self._paces.get(name)
        if fresh is None:
            self._paces.pop(name, None)
        elif known is None:
            self._paces[name] = fresh
        else:
            known.set_rates(fresh)
            return known
        return fresh

    def expire(self, now: float) -> None:
        """Time has passed: silent modules, absent ones, the grace after the start, expired messages."""
        self._now = now
        if self._grace_until is not None and now >= self._grace_until:
            self._end_grace(now)
        for module in list(self._modules.values()):
            holder = module.holder
            if holder is not None and module.state != "silent" and now - holder.last_heard > holder.liveness:
                self._end_session(holder, now, died=True)
                module.state = "silent"
                self._event(module, "silent", holder.pid, now)
            if (
                not module.declared
                and (holder is None or not holder.attached)
                and now - module.absent_since > self.limits.absent_limit_seconds
            ):
                self._let_go(module, now)
            elif module.timed:
                self._expire_mailbox(module, now)
        self.inspection.expire(now)

    def next_deadline(self, now: float) -> float:
        """When `expire` wants to be called next."""
        if self._grace_until is not None:
            return self._grace_until
        return now + 0.5

    def flush(self, now: float) -> list[Out]:
        """What to send, after any number of calls of the others."""
        self._now = now
        if now >= self.paced_until:
            self._release_paced(now)
        if self._dirty_modules:
            dirty, self._dirty_modules = self._dirty_modules, []
            for module in dirty:
                module.pumping = False
                self._pump(module, now)
        if self._dirty_lanes:
            lanes, self._dirty_lanes = self._dirty_lanes, []
            for lane in lanes:
                lane.dirty = False
                self._report(lane)
        if self._throttled and self._freed:
            self._freed = False
            self._release()
        out, self._out = self._out, []
        return out

    # --- HELLO, names, sessions -----------------------------------------------------------------

    def _on_hello(self, peer: Peer, hello: emp.Hello, credentials: Credentials, now: float) -> None:
        self._asked.pop(peer, None)
        bound = self._peers.get(peer)
        if bound is not None and (bound.id != hello.incarnation or bound.name != hello.name):
            self.lost(peer, now)
        if hello.generation > MAX_GENERATION:
            self._refuse_frame(
                peer, emp.BAD_HEADER, f"HELLO/1: generation {hello.generation} is above {MAX_GENERATION}"
            )
            return
        why = self._refusal(peer, hello.name, hello.groups, credentials)
        if why is not None:
            self._refuse_frame(peer, emp.HELLO_DENIED, why)
            return
        module = self._modules.get(hello.name)
        late = False
        if module is None:
            if len(self._modules) >= self.limits.max_modules:
                self._refuse_frame(peer, emp.TOO_MANY, f"{self.limits.max_modules} names are in use, the most allowed")
                return
            module = self._new_module(hello.name, frozenset(hello.groups), now)
            self._modules[hello.name] = module
            late = hello.generation > 0 and self._grace_until is None
        holder = module.holder
        returning = holder is not None and holder.id == hello.incarnation
        if not returning:
            if hello.generation == 0:
                if holder is not None and now - holder.last_heard <= holder.liveness:
                    self._refuse_frame(
                        peer,
                        emp.NAME_TAKEN,
                        f"{hello.name!r} is held by pid {holder.pid}, heard {now - holder.last_heard:.1f} s ago",
                    )
                    return
                self._generation += 1
                generation = max(module.generation + 1, self._generation)
            elif hello.generation <= module.generation:
                self._out.append(Out(peer, emp.encode(emp.FENCED, emp.Fenced(module.generation))))
                return
            else:
                generation = hello.generation
            if holder is not None:
                self._fence(holder, generation, now)
            departed = self._departed.pop((hello.name, hello.incarnation), None)
            if departed is not None:
                holder = departed
                holder.module = module
                holder.generation = generation
            else:
                holder = Incarnation(module, hello.incarnation, generation)
            before, module.holder = module.holder, holder
            module.generation = generation
            if before is not None:
                self._drop_empty_lanes(before)
        assert holder is not None
        if holder.attached:
            self._end_session(holder, now, died=False)
        if holder.peer is not None and holder.peer != peer:
            self._peers.pop(holder.peer, None)
        self._session += 1
        holder.session = self._session
        holder.peer = peer
        holder.attached = True
        holder.draining = False
        holder.throttled = False
        holder.untaken = {}
        module.interrupted = []
        holder.last_heard = now
        holder.liveness = hello.liveness_ms / 1000
        holder.groups = frozenset(hello.groups)
        holder.credentials = credentials
        holder.pid = credentials.pid if credentials.pid > 0 else hello.pid
        holder.sdk = hello.sdk
        holder.prefetch_messages = hello.prefetch_messages
        holder.prefetch_bytes = min(hello.prefetch_bytes, self.limits.byte_budget)
        module.groups = frozenset(hello.groups) | (module.groups if module.declared else frozenset())
        module.state = "attached"
        module.seen = True
        self._peers[peer] = holder
        self._out.append(
            Out(
                peer,
                emp.encode(
                    emp.WELCOME,
                    emp.Welcome(
                        self.epoch,
                        holder.session,
                        holder.generation,
                        int(self.limits.heartbeat_seconds * 1000),
                        late,
                        self.limits.limits,
                    ),
                ),
            )
        )
        for lane in holder.lanes.values():  # rule 11
            lane.reported = lane.floor - 1
            lane.unreported_members = [
                (batch.from_, batch.last - batch.from_ + 1, batch.members) for batch in lane.batches if batch.members
            ]
            self._touch(lane)
        if not returning:
            self._drop_old_replies(module, hello.incarnation)
            self._deliver_retained(module, now)
        self._wake(module)
        self._event(module, "back" if returning else "attached", holder.pid, now)

    def _new_module(self, name: str, groups: frozenset[str], now: float, *, declared: bool = False) -> Module:
        module = Module(name, declared=declared, groups=groups, now=now)
        module.pace = self._pace_of(name)
        past = self._past.pop(name, None)
        if past is not None:
            # Or leaving and coming back would give another window, another quota, and nothing in the ledger.
            module.usages, module.refused, module.paced = past.usages, past.refused, past.paced
            self._paced = [module if each is past else each for each in self._paced]
        return module

    def _remember(self, module: Module) -> None:
        """It is let go. Those who owe nothing are forgotten, oldest first, beyond MAX_PAST."""
        if module.refused or module.paced or any(usage.messages for usage in module.usages.values()):
            self._past[module.name] = module
        if len(self._past) > MAX_PAST:
            for name, past in list(self._past.items()):
                if not past.paced and not any(usage.messages for usage in past.usages.values()):
                    del self._past[name]
                    for reason, count in past.refused.items():
                        self._refused_of_past[reason] = self._refused_of_past.get(reason, 0) + count
                    return

    def _fence(self, holder: Incarnation, generation: int, now: float) -> None:
        """`holder` loses its name to a process of `generation`."""
        if holder.peer is not None:
            self._out.append(Out(holder.peer, emp.encode(emp.FENCED, emp.Fenced(generation))))
            self._peers.pop(holder.peer, None)
            self._event(holder.module, "fenced", holder.pid, now)
        # A holder that is replaced without having said BYE has died or hangs: its deliveries count (rule 32).
        self._end_session(holder, now, died=True)

    def _end_session(self, incarnation: Incarnation, now: float, *, died: bool) -> None:
        """What was in flight goes back to the mailbox, in its order, to be delivered again."""
        module = incarnation.module
        incarnation.attached = False
        if incarnation.peer is not None:
            self._peers.pop(incarnation.peer, None)
            incarnation.peer = None
        incarnation.outlets = {}
        incarnation.next_number = 1
        if module.holder is not incarnation:
            return
        module.state = "absent"
        module.absent_since = now
        module.in_flight = [0] * PRIORITIES
        module.in_flight_bytes = [0] * PRIORITIES
        for ready in module.ready:
            ready.clear()
        for outlet in list(module.outlets.values()):
            outlet.number = 0
            outlet.ready = False
            if outlet.in_flight or outlet.solo:
                first = outlet.acked + 1
                if outlet.in_flight:
                    first = max(first, outlet.in_flight[0].from_)
                module.interrupted.append((outlet, first, outlet.delivered_to))
                outlet.redelivered_to = max(outlet.redelivered_to, outlet.delivered_to)
                outlet.waiting.extendleft(reversed(outlet.in_flight))
                outlet.in_flight.clear()
                outlet.solo = 0
            outlet.delivered_to = outlet.acked
            self._settle_voided(outlet)
            self._offer(outlet)
        if died:
            self._blame(module)

    def _blame(self, module: Module) -> None:
        """The process is dead: count it against the first unacknowledged message of each lane (rule 32).

        The connection may have been lost before; nothing is counted when the same process comes back.
        """
        interrupted, module.interrupted = module.interrupted, []
        for outlet, first, last in interrupted:
            if outlet.acked >= first:
                continue
            if outlet.deaths is None:
                outlet.deaths = {}
            deaths = outlet.deaths[first] = outlet.deaths.get(first, 0) + 1
            if deaths >= self.limits.solo_after_deaths:
                # The first may be innocent, handled and not yet acknowledged: each of them is delivered alone.
                module.suspects[outlet] = max(first, last, module.suspects.get(outlet, 0))

    def _let_go(self, module: Module, now: float) -> None:
        """Forget an undeclared module that is gone; what waits for it is refused as `gone` (rule 25)."""
        for outlet in list(module.outlets.values()):
            self._refuse_all(outlet, emp.GONE)
        self._modules.pop(module.name, None)
        self._remember(module)
        holder, module.holder = module.holder, None
        if holder is not None:
            holder.peer = None
            self._drop_empty_lanes(holder)
            # It may come back, and what it has sent may still be on its way: one lane must not become two.
            self._departed = {id: other for id, other in self._departed.items() if has_batches(other)}
            if has_batches(holder):
                self._departed[(holder.name, holder.id)] = holder

    def _drop_old_replies(self, module: Module, incarnation: bytes) -> None:
        """Replies to an earlier incarnation of the requester are settled as `gone` (rule 28)."""
        for outlet in list(module.outlets.values()):
            if outlet.lane.priority != REPLY:
                continue
            for batch in outlet.waiting:
                if batch.requester != incarnation and not (outlet.voided and batch.first in outlet.voided):
                    self._void(outlet, batch, emp.GONE)
            self._settle_voided(outlet)

    # --- SEND -------------------------------------------------------------------------------------

    def _on_send(self, peer: Peer, sender: Incarnation, header: emp.Send, body: bytes | None, now: float) -> None:
        assert body is not None
        if (header.flags or not header.priority) and (fault := _fault_of_flags(header)):
            self._refuse_frame(peer, emp.BAD_HEADER, fault)
            return
        if header.flags & _BROKERS_FLAGS:
            header = msgspec.structs.replace(header, flags=header.flags & ~_BROKERS_FLAGS)
        lane = sender.lanes.get((header.destination, header.priority))
        if lane is None:
            if header.first > header.floor:  # rule 3; a batch that is settled in part begins below the floor
                if not sender.throttled:
                    self._ask(peer)
                return
            if len(sender.lanes) >= self.limits.max_lanes and not self._forget_lanes(sender):
                self._refuse_frame(
                    peer, emp.TOO_MANY, f"{self.limits.max_lanes} destinations are in use, the most allowed"
                )
                return
            lane = self._new_lane(sender, header)
        elif header.first > lane.last + 1:
            if not sender.throttled:
                self._ask(peer)
            return
        if header.floor > lane.floor:
            lane.floor = min(header.floor, lane.last + 1)
            if lane.exceptions:
                self._prune(lane)
        last = header.first + header.count - 1
        if last <= lane.last:
            return  # seen before; what is known of it was told after WELCOME
        from_ = max(header.first, lane.last + 1)
        batch = Batch(header, from_, body, now)
        if not self._admit(peer, lane, batch, now):
            return
        if self.inspection.taps:
            self._out.extend(Out(*shown) for shown in self.inspection.tap(sender.name, header, body, now))
        self._route(lane, batch, now)

    def _new_lane(self, sender: Incarnation, header: emp.Send) -> Lane:
        module = sender.module
        key = (header.destination, header.priority)
        usage = module.usages.get(key)
        if usage is None:
            usage = module.usages[key] = Usage()
        usage.lanes += 1
        lane = sender.lanes[key] = Lane(sender, header.destination, header.priority, header.floor, usage)
        return lane

    def _forget_lanes(self, sender: Incarnation) -> bool:
        """Forget lanes that are empty and whose settlement the sender has seen (rule 5)."""
        idle = [key for key, lane in sender.lanes.items() if not lane.batches and lane.floor > lane.last]
        for key in idle:
            self._drop_lane(sender.lanes.pop(key))
        return bool(idle)

    def _drop_lane(self, lane: Lane) -> None:
        for outlet in lane.outlets.values():
            self._drop_outlet(outlet)
        lane.outlets = {}
        usages = lane.sender.module.usages
        lane.usage.lanes -= 1
        if not lane.usage.lanes and usages.get(lane.key) is lane.usage:
            # The account of a declared module outlives its processes; replies go to whoever asked, and leave none.
            is_kept = lane.sender.module.declared and lane.priority != REPLY and len(usages) <= MAX_ACCOUNTS
            if not is_kept:
                del usages[lane.key]

    def _drop_empty_lanes(self, sender: Incarnation) -> None:
        """`sender` holds its name no more: only what is open of it is kept, so that the short-lived leave nothing."""
        for key, lane in list(sender.lanes.items()):
            if not lane.batches:
                del sender.lanes[key]
                self._drop_lane(lane)

    def _drop_outlet(self, outlet: Outlet) -> None:
        module = outlet.module
        key = (outlet.lane.sender.name, outlet.lane.sender.id, outlet.lane.destination, outlet.lane.priority)
        if module.outlets.get(key) is outlet:
            del module.outlets[key]
        if outlet.number and module.holder is not None:
            module.holder.outlets.pop(outlet.number, None)
        feed = outlet.feed
        if feed is None:
            return
        try:
            feed.outlets.remove(outlet)
        except ValueError:
            pass
        feeds = module.feeds.get(feed.incarnation.name)
        if not feed.outlets and not feed.pending and feeds is not None and feed in feeds:
            feeds.remove(feed)
            if feeds:
                self._unblock(feeds[0])
            else:
                del module.feeds[feed.incarnation.name]

    def _admit(self, peer: Peer, lane: Lane, batch: Batch, now: float) -> bool:
        """Whether the batch gets its place in the lane (perhaps only to be refused there)."""
        limits = self.limits.limits
        usage = lane.usage
        count = batch.last - batch.from_ + 1
        reason = None
        if batch.size > max(limits.message_bytes, limits.batch_bytes) + 16:
            reason = emp.TOO_LARGE
        elif not self._access.may_send(lane.sender.name, lane.destination, lane.priority):
            reason = emp.DENIED
        elif usage.messages and (
            usage.messages + count > 2 * limits.window_messages
            or usage.size + batch.size > 2 * limits.window_bytes + limits.message_bytes
        ):
            reason = emp.OVERFLOW
        elif self._held_bytes + batch.size > self.limits.byte_budget and self._must_wait(lane, batch):
            # Not taken: the sender keeps it, and is asked to send again when there is room.
            if not lane.sender.throttled:
                lane.sender.throttled = True
                self._throttled.append(lane.sender)
            lane.sender.untaken.setdefault(lane, batch.size)
            return False
        lane.last = batch.last
        if reason is not None:
            batch.body = b""
            batch.size = 0
        lane.batches.append(batch)
        usage.accepted += count
        usage.messages += count
        usage.size += batch.size
        self._held_bytes += batch.size
        self._held_messages += count
        if reason is not None:
            self._refuse_batch(lane, batch, reason)
            return False
        return True

    def _must_wait(self, lane: Lane, batch: Batch) -> bool:
        """With the budget used up, only a receiver that holds nearly nothing gets more."""
        if lane.sender.module.paced:
            return True
        return lane.priority != REPLY and self._is_beyond_reserve(lane, batch.size)

    def _is_beyond_reserve(self, lane: Lane, size: int) -> bool:
        if lane.to_group:
            receivers = self._members(group_name(lane.destination))
        else:
            receivers = [module for module in (self._modules.get(lane.destination),) if module is not None]
        return any(module.held and module.held + size > self.limits.reserve_bytes for module in receivers)

    def _release(self) -> None:
        """There is room again: ask those whose messages were not taken to send them again.

        Room in the budget, or, while a mailbox of others fills that up, in the receiver's reserve.
        """
        room = self._held_bytes < self.limits.byte_budget * 3 // 4
        least = self.limits.reserve_bytes // 2
        throttled, self._throttled = self._throttled, []
        for sender in throttled:
            if (
                not room
                and sender.throttled
                and (
                    sender.module.paced
                    or all(self._is_beyond_reserve(lane, max(size, least)) for lane, size in sender.untaken.items())
                )
            ):
                self._throttled.append(sender)
                continue
            sender.throttled = False
            sender.untaken = {}
            if sender.attached and sender.peer is not None:
                peer = sender.peer
                self._ask(peer)

    def _route(self, lane: Lane, batch: Batch, now: float) -> None:
        if self._grace_until is not None:
            if lane.batches[0] is not batch and not lane.batches[-2].routed:
                return  # behind a parked one
            if not self._can_route_now(lane):
                self._parked.append(lane)
                return
        if lane.sender.module.pace is None:
            self._route_batch(lane, batch, now)
        else:
            self._keep_pace(lane.sender.module, lane, batch, now)

    def _keep_pace(self, sender: Module, lane: Lane, batch: Batch, now: float) -> None:
        """Route it, or let it wait in its lane: the sender's window fills, and it waits as well."""
        assert sender.pace is not None
        due = now if sender.paced else sender.pace.due_at(now)
        if sender.paced or due > now:
            if not sender.paced:
                self._paced.append(sender)
                self.paced_until = min(self.paced_until, due)
            sender.paced.append((lane, batch))
            return
        sender.pace.take(batch.last - batch.from_ + 1, batch.size)
        self._route_batch(lane, batch, now)

    def _release_paced(self, now: float) -> None:
        waiting, self._paced = self._paced, []
        self.paced_until = math.inf
        for sender in waiting:
            pace = sender.pace
            if pace is None:
                continue  # a new policy has let them go
            due = now
            while sender.paced and (due := pace.due_at(now)) <= now:
                lane, batch = sender.paced.popleft()
                pace.take(batch.last - batch.from_ + 1, batch.size)
                self._route_batch(lane, batch, now)
            if sender.paced:
                self._paced.append(sender)
                self.paced_until = min(self.paced_until, due)

    def _can_route_now(self, lane: Lane) -> bool:
        """During the grace only what goes to a declared or attached module directly, and keeps no pace."""
        if lane.to_group or lane.sender.module.pace is not None:
            return False
        module = self._modules.get(lane.destination)
        return module is not None and (module.declared or module.seen) and (lane.priority != REPLY or module.seen)

    def _end_grace(self, now: float) -> None:
        self._grace_until = None
        parked, self._parked = self._parked, []
        for lane in parked:
            for batch in list(lane.batches):
                if not batch.routed:
                    self._route(lane, batch, now)

    def _route_batch(self, lane: Lane, batch: Batch, now: float) -> None:
        batch.routed = True
        if lane.to_group:
            members = self._members(group_name(lane.destination))
            if batch.flags & emp.RETAIN and batch.retain_key is not None and not self._retain(lane, batch):
                self._refuse_batch(lane, batch, emp.OVERFLOW)
                return
            if not members:
                if batch.flags & emp.RETAIN:
                    self._advance(lane)
                else:
                    self._refuse_batch(lane, batch, emp.UNROUTABLE)
                return
            if batch.flags & emp.EXPECTS_REPLY:
                batch.members = [module.name for module in members]
                lane.unreported_members.append((batch.from_, batch.last - batch.from_ + 1, batch.members))
                self._touch(lane)
            batch.pending = len(members)
            for module in members:
                self._enqueue(lane, module, batch)
            return
        receiver = self._modules.get(lane.destination)
        if receiver is None:
            self._refuse_batch(lane, batch, emp.GONE if lane.priority == REPLY else emp.UNROUTABLE)
            return
        if lane.priority == REPLY and (receiver.holder is None or receiver.holder.id != batch.requester):
            self._refuse_batch(lane, batch, emp.GONE)
            return
        batch.pending = 1
        self._enqueue(lane, receiver, batch)

    def _members(self, group: str) -> list[Module]:
        return [module for module in self._modules.values() if group in module.groups]

    def _enqueue(self, lane: Lane, module: Module, batch: Batch) -> None:
        outlet = lane.outlets.get(module.name)
        if outlet is None or outlet.module is not module:
            outlet = self._new_outlet(lane, module, batch.from_ - 1)
        outlet.waiting.append(batch)
        if outlet.feed is not None:
            outlet.feed.pending += 1
        module.held += batch.size
        module.held_messages += batch.last - batch.from_ + 1
        if batch.deadline is not None:
            module.timed += 1
        if not outlet.ready:
            self._offer(outlet)

    def _new_outlet(self, lane: Lane, module: Module, acked: int) -> Outlet:
        # Replies wait for nobody; the store's lanes (generation 0) have no older incarnation.
        feed = None if lane.priority == REPLY or not lane.sender.generation else self._feed(lane.sender, module)
        outlet = Outlet(lane, module, feed, acked)
        lane.outlets[module.name] = outlet
        module.outlets[(lane.sender.name, lane.sender.id, lane.destination, lane.priority)] = outlet
        if feed is not None:
            feed.outlets.append(outlet)
        return outlet

    def _feed(self, sender: Incarnation, module: Module) -> Feed:
        feeds = module.feeds.setdefault(sender.name, [])
        for feed in feeds:
            if feed.incarnation is sender:
                return feed
        while feeds and not feeds[0].pending:
            self._retire(module, feeds.pop(0))
        feed = Feed(sender, blocked=bool(feeds))
        feeds.append(feed)
        return feed

    def _retire(self, module: Module, feed: Feed) -> None:
        """An older incarnation's lanes are done with."""
        for outlet in list(feed.outlets):
            self._drop_outlet(outlet)
            outlet.lane.outlets.pop(module.name, None)

    def _fed(self, module: Module, feed: Feed) -> None:
        """A feed has run empty: the next incarnation's may begin (rule 19)."""
        feeds = module.feeds.get(feed.incarnation.name)
        if feeds is None or len(feeds) < 2:
            return
        while len(feeds) > 1 and not feeds[0].pending:
            self._retire(module, feeds.pop(0))
        self._unblock(feeds[0])

    def _unblock(self, feed: Feed) -> None:
        if feed.blocked:
            feed.blocked = False
            for outlet in feed.outlets:
                self._offer(outlet)

    # --- deliveries ---------------------------------------------------------------------------------

    def _offer(self, outlet: Outlet) -> None:
        """Put an outlet in its receiver's turn, if it has something to deliver and may."""
        if outlet.ready or not outlet.waiting or (outlet.feed is not None and outlet.feed.blocked):
            return
        outlet.ready = True
        module = outlet.module
        module.ready[outlet.lane.priority].append(outlet)
        self._wake(module)

    def _wake(self, module: Module) -> None:
        if not module.pumping:
            module.pumping = True
            self._dirty_modules.append(module)

    def _pump(self, module: Module, now: float) -> None:
        """Deliver what the receiver's prefetch has room for: replies, requests, signals, data."""
        holder = module.holder
        if holder is None or not holder.attached:
            return
        if module.suspects:
            self._pump_alone(module, holder, now)
            return
        for priority in range(PRIORITIES):
            if holder.draining and priority != REPLY:
                return
            ready = module.ready[priority]
            while ready:
                flying = module.in_flight[priority]
                if (
                    priority != REPLY
                    and flying
                    and (
                        flying >= holder.prefetch_messages or module.in_flight_bytes[priority] >= holder.prefetch_bytes
                    )
                ):
                    break
                outlet = ready[0]
                if not outlet.waiting:
                    ready.popleft()
                    outlet.ready = False
                    continue
                batch = outlet.waiting[0]
                if (
                    batch.deadline is not None
                    and batch.deadline <= now
                    and not (outlet.voided and batch.first in outlet.voided)
                ):
                    self._void(outlet, batch, emp.EXPIRED)
                if outlet.voided and batch.first in outlet.voided:
                    outlet.waiting.popleft()
                    outlet.in_flight.append(batch)
                    self._settle_voided(outlet)
                    continue
                count = batch.last - max(batch.from_, outlet.acked + 1) + 1
                if (
                    priority != REPLY
                    and flying
                    and (
                        flying + count > holder.prefetch_messages
                        or module.in_flight_bytes[priority] + batch.size > holder.prefetch_bytes
                    )
                ):
                    break  # rule 29: a batch larger than the rest goes when nothing else is in flight
                self._launch(outlet, holder, now)
                if outlet.waiting:
                    if len(ready) > 1:
                        ready.rotate(-1)
                else:
                    ready.popleft()
                    outlet.ready = False

    def _launch(self, outlet: Outlet, holder: Incarnation, now: float) -> None:
        """Deliver the next batch of an outlet."""
        batch = outlet.waiting.popleft()
        self._deliver(outlet, batch, holder, now)
        outlet.in_flight.append(batch)
        priority = outlet.lane.priority
        module = outlet.module
        module.in_flight[priority] += batch.last - batch.from_ + 1
        module.in_flight_bytes[priority] += batch.size

    def _deliver(
        self, outlet: Outlet, batch: Batch, holder: Incarnation, now: float, alone: bytes | None = None
    ) -> None:
        lane = outlet.lane
        sender = lane.sender
        if not outlet.number:
            outlet.number = holder.next_number
            holder.next_number += 1
            holder.outlets[outlet.number] = outlet
        from_ = max(batch.from_, outlet.acked + 1)
        flags = batch.flags & (emp.EXPECTS_REPLY | emp.REPLY | emp.RETAIN | emp.FROM_STORE)
        module = outlet.module
        if batch.flags & emp.RESENT or from_ <= outlet.redelivered_to:
            flags |= emp.REDELIVERED
            module.redelivered += 1 if alone is not None else batch.last - from_ + 1
        void: list[tuple[int, str]] = []
        if lane.exceptions:
            void = [
                (number, reason)
                for number, refusals in lane.exceptions.items()
                if lane.floor <= number < from_
                for reason, member in refusals
                if member is None or member == module.name
            ]
        header = emp.Deliver(
            holder.session,
            outlet.number,
            sender.name,
            sender.id,
            sender.generation,
            lane.destination,
            lane.priority,
            from_ if alone is not None else batch.first,
            1 if alone is not None else batch.last - batch.first + 1,
            from_,
            min(lane.floor, from_),
            void,
            flags,
            None if batch.deadline is None else max(0, int((batch.deadline - now) * 1000)),
            batch.requester,
            batch.retain_key,
            batch.retain_version,
        )
        outlet.delivered_to = from_ if alone is not None else batch.last
        assert holder.peer is not None
        self._out.append(Out(holder.peer, emp.encode(emp.DELIVER, header, batch.body if alone is None else alone)))

    def _pump_alone(self, module: Module, holder: Incarnation, now: float) -> None:
        """While messages are suspected of killing their receiver: one at a time (rule 32)."""
        ready = module.ready[REPLY]
        while ready:
            outlet = ready.popleft()
            outlet.ready = False
            while outlet.waiting:
                if outlet.voided and outlet.waiting[0].first in outlet.voided:
                    outlet.in_flight.append(outlet.waiting.popleft())
                else:
                    self._launch(outlet, holder, now)
            self._settle_voided(outlet)
        if holder.draining or any(module.in_flight[1:]):
            return
        for outlet, number in list(module.suspects.items()):
            if outlet.feed is not None and outlet.feed.blocked:
                continue
            if outlet.acked >= number or not outlet.waiting:
                self._cleared(outlet)
                continue
            batch = outlet.waiting[0]
            if outlet.voided and batch.first in outlet.voided:
                self._settle_voided(outlet)
                continue
            number = max(batch.from_, outlet.acked + 1)
            alone = split_batch(bytes(batch.body), number - batch.first)
            deaths = outlet.deaths.get(number, 0) if outlet.deaths is not None else 0
            if alone is None or deaths >= self.limits.poison_after_deaths:
                self._refuse_number(outlet, number, emp.FAILED if alone is not None else emp.INVALID)
                self._cleared(outlet)
                continue
            self._deliver(outlet, batch, holder, now, alone)
            outlet.solo = number
            module.in_flight[outlet.lane.priority] += 1
            return
        if not module.suspects:
            self._wake(module)

    def _cleared(self, outlet: Outlet) -> None:
        outlet.module.suspects.pop(outlet, None)
        if outlet.deaths is not None:
            outlet.deaths = {number: n for number, n in outlet.deaths.items() if number > outlet.acked} or None
        self._wake(outlet.module)

    def _refuse_number(self, outlet: Outlet, number: int, reason: str) -> None:
        """Refuse the one message `number`, which is the next of the outlet."""
        lane = outlet.lane
        self._except(lane, number, reason, outlet.module)
        outlet.acked = number
        outlet.delivered_to = max(outlet.delivered_to, number)
        self._pop_acked(outlet)
        self._advance(lane)

    # --- ACK and settlement ---------------------------------------------------------------------------

    def _on_ack(self, peer: Peer, receiver: Incarnation, ack: emp.Ack, body: bytes | None, now: float) -> None:
        if ack.session != receiver.session:  # rule 6
            return
        module = receiver.module
        for number, cumulative, exceptions in ack.lanes:
            outlet = receiver.outlets.get(number)
            if outlet is None or cumulative > outlet.delivered_to:
                self._refuse_frame(
                    peer,
                    emp.BAD_HEADER,
                    f"ACK/1: lane {number} up to {cumulative}, delivered was "
                    + (f"up to {outlet.delivered_to}" if outlet is not None else "nothing of that lane"),
                )
                continue
            if cumulative <= outlet.acked:
                continue
            before = outlet.acked
            delivered = cumulative - before
            for refused, reason in exceptions:
                # An ACK may repeat what an earlier one said.
                if before < refused <= cumulative and not self._is_excepted(outlet, refused):
                    self._except(outlet.lane, refused, reason, module)
            if outlet.lane.exceptions:
                # Also those that the broker itself has refused since, and which the receiver need not repeat.
                delivered -= sum(
                    before < refused <= cumulative and self._is_excepted(outlet, refused)
                    for refused in outlet.lane.exceptions
                )
            module.delivered += delivered
            outlet.lane.usage.delivered += delivered
            priority = outlet.lane.priority
            if outlet.solo:
                module.in_flight[priority] = 0
                outlet.solo = 0
            in_flight = outlet.in_flight
            lane = outlet.lane
            while in_flight:
                batch = in_flight[0]
                if outlet.voided and batch.first in outlet.voided:
                    outlet.voided.discard(batch.first)
                elif batch.last <= cumulative:
                    module.in_flight[priority] -= batch.last - batch.from_ + 1
                    module.in_flight_bytes[priority] -= batch.size
                else:
                    break
                in_flight.popleft()
                outlet.acked = batch.last
                self._resolved(outlet, batch)
            outlet.acked = max(outlet.acked, cumulative)
            self._pop_acked(outlet)
            if outlet in module.suspects and outlet.acked >= module.suspects[outlet]:
                self._cleared(outlet)
            elif outlet.deaths is not None:
                outlet.deaths = {n: deaths for n, deaths in outlet.deaths.items() if n > outlet.acked} or None
            self._advance(lane)
        self._wake(module)

    def _pop_acked(self, outlet: Outlet) -> None:
        """Batches that wait though all of them is acknowledged (delivered one by one, or refused)."""
        while not outlet.in_flight and outlet.waiting and outlet.waiting[0].last <= outlet.acked:
            self._resolved(outlet, outlet.waiting.popleft())
        self._settle_voided(outlet)

    def _resolved(self, outlet: Outlet, batch: Batch) -> None:
        """`outlet` is done with `batch`."""
        module = outlet.module
        module.held -= batch.size
        self._freed = True
        count = batch.last - batch.from_ + 1
        module.held_messages -= count
        waited = self._now - batch.arrived
        module.latency_sum += waited * count
        for place, bound in enumerate(LATENCY_BOUNDS_SECONDS):
            if waited <= bound:
                module.latency[place] += count
                break
        else:
            module.latency[-1] += count
        if batch.deadline is not None:
            module.timed -= 1
        batch.pending -= 1
        feed = outlet.feed
        if feed is not None:
            feed.pending -= 1
            if not feed.pending:
                self._fed(module, feed)

    def _advance(self, lane: Lane) -> None:
        """Settle what all receivers of the lane are done with, in order."""
        batches = lane.batches
        cumulative = lane.cumulative
        while batches:
            batch = batches[0]
            if batch.pending or not batch.routed:
                if not lane.to_group and batch.routed:
                    outlet = lane.outlets.get(lane.destination)
                    if outlet is not None and outlet.acked > cumulative:
                        cumulative = min(outlet.acked, batch.last)
                break
            batches.popleft()
            cumulative = batch.last
            count = batch.last - batch.from_ + 1
            lane.usage.messages -= count
            lane.usage.size -= batch.size
            self._held_bytes -= batch.size
            self._held_messages -= count
        if cumulative > lane.cumulative:
            lane.usage.settled += cumulative - lane.cumulative
            if lane.exceptions:
                lane.usage.refused += sum(lane.cumulative < number <= cumulative for number in lane.exceptions)
            lane.cumulative = cumulative
            self._touch(lane)
        if not batches and lane.sender.module.holder is not lane.sender and lane.sender.lanes.get(lane.key) is lane:
            del lane.sender.lanes[lane.key]
            self._drop_lane(lane)

    def _touch(self, lane: Lane) -> None:
        if not lane.dirty:
            lane.dirty = True
            self._dirty_lanes.append(lane)

    def _report(self, lane: Lane) -> None:
        """Tell the sender how far the lane is settled. Nobody to tell: WELCOME will be followed by it (rule 11)."""
        sender = lane.sender
        if not sender.attached or sender.peer is None:
            return
        exceptions: list[tuple[int, str, str | None]] = []
        if lane.exceptions:
            for number, refusals in sorted(lane.exceptions.items()):
                if not lane.reported < number <= lane.cumulative:
                    continue
                if exceptions and len(exceptions) + len(refusals) > emp.MAX_EXCEPTIONS:
                    self._settled(lane, number - 1, exceptions)
                    exceptions = []
                exceptions += [(number, reason, member) for reason, member in refusals]
        self._settled(lane, lane.cumulative, exceptions)

    def _settled(self, lane: Lane, cumulative: int, exceptions: list[tuple[int, str, str | None]]) -> None:
        lane.reported = cumulative
        members, lane.unreported_members = lane.unreported_members, []
        assert lane.sender.peer is not None
        self._out.append(
            Out(
                lane.sender.peer,
                emp.encode(emp.SETTLED, emp.Settled(lane.destination, lane.priority, cumulative, exceptions, members)),
            )
        )

    def _except(self, lane: Lane, number: int, reason: str, module: Module | None) -> None:
        member = module.name if module is not None and lane.to_group else None
        lane.exceptions.setdefault(number, []).append((reason, member))
        counted = module if module is not None else lane.sender.module
        counted.refused[reason] = counted.refused.get(reason, 0) + 1

    def _is_excepted(self, outlet: Outlet, number: int) -> bool:
        """Whether the broker refused it itself (expired): the receiver repeats what `void` told it."""
        refusals = outlet.lane.exceptions.get(number)
        if not refusals:
            return False
        member = outlet.module.name if outlet.lane.to_group else None
        return any(known is None or known == member for _, known in refusals)

    def _prune(self, lane: Lane) -> None:
        lane.exceptions = {number: why for number, why in lane.exceptions.items() if number >= lane.floor}  # rule 12

    def _refuse_batch(self, lane: Lane, batch: Batch, reason: str) -> None:
        """Refuse a whole batch; it keeps its place in the lane (rule 5)."""
        batch.routed = True
        for number in range(batch.from_, batch.last + 1):
            self._except(lane, number, reason, None)
        self._advance(lane)

    def _void(self, outlet: Outlet, batch: Batch, reason: str) -> None:
        """Refuse what waits in one mailbox; it is settled when the ones before it are."""
        if outlet.voided is None:
            outlet.voided = set()
        outlet.voided.add(batch.first)
        for number in range(max(batch.from_, outlet.acked + 1), batch.last + 1):
            self._except(outlet.lane, number, reason, outlet.module)

    def _settle_voided(self, outlet: Outlet) -> None:
        if not outlet.voided:
            return
        moved = False
        while outlet.voided:
            if outlet.in_flight:
                batch = outlet.in_flight[0]
                if batch.first not in outlet.voided:
                    break
                outlet.in_flight.popleft()
            elif outlet.waiting and outlet.waiting[0].first in outlet.voided:
                batch = outlet.waiting.popleft()
            else:
                break
            outlet.voided.discard(batch.first)
            outlet.acked = max(outlet.acked, batch.last)
            outlet.delivered_to = max(outlet.delivered_to, outlet.acked)
            self._resolved(outlet, batch)
            moved = True
        if moved:
            self._advance(outlet.lane)

    def _refuse_all(self, outlet: Outlet, reason: str) -> None:
        self._void_all(outlet, reason)
        outlet.ready = False
        self._settle_voided(outlet)
        self._drop_outlet(outlet)
        outlet.lane.outlets.pop(outlet.module.name, None)
        outlet.module.suspects.pop(outlet, None)

    def _void_all(self, outlet: Outlet, reason: str) -> None:
        for batch in (*outlet.in_flight, *outlet.waiting):
            if not (outlet.voided and batch.first in outlet.voided):
                self._void(outlet, batch, reason)

    def _expire_mailbox(self, module: Module, now: float) -> None:
        """Only what waits in the mailbox expires; once delivered, the ACK decides (rule 33)."""
        for outlet in list(module.outlets.values()):
            for batch in outlet.waiting:
                if batch.deadline is None or batch.deadline > now:
                    break
                if not (outlet.voided and batch.first in outlet.voided) and not outlet.solo:
                    self._void(outlet, batch, emp.EXPIRED)
            self._settle_voided(outlet)

    # --- PING, DRAIN, BYE, retained -------------------------------------------------------------------

    def _on_ping(self, peer: Peer, incarnation: Incarnation, ping: emp.Ping, body: bytes | None, now: float) -> None:
        incarnation.counters = ping.counters
        for destination, priority, floor in ping.floors:
            lane = incarnation.lanes.get((destination, priority))
            if lane is not None and lane.floor < floor <= lane.last + 1:
                lane.floor = floor
                if lane.exceptions:
                    self._prune(lane)
        self._out.append(Out(peer, emp.encode(emp.PONG, emp.Pong(ping.nonce))))

    def _on_drain(self, peer: Peer, incarnation: Incarnation, drain: emp.Drain, body: bytes | None, now: float) -> None:
        incarnation.draining = True
        incarnation.module.state = "draining"

    def _on_bye(self, peer: Peer, incarnation: Incarnation, bye: emp.Bye, body: bytes | None, now: float) -> None:
        module = incarnation.module
        self._end_session(incarnation, now, died=False)
        if module.holder is not incarnation:
            return
        module.holder = None
        module.interrupted = []  # a clean end: what was not begun killed nobody
        self._drop_empty_lanes(incarnation)
        self._event(module, "gone", incarnation.pid, now)
        if bye.leaving and not module.declared:
            self._let_go(module, now)

    def _retain(self, lane: Lane, batch: Batch) -> bool:
        """Keep the batch's message for later members; False when the store is full."""
        assert batch.retain_key is not None
        sender = lane.sender
        version = (sender.generation, batch.retain_version[1] if batch.retain_version else 0)
        key = (sender.name, lane.destination, batch.retain_key)
        known = self._retained.get(key)
        batch.retain_version = version
        if known is not None and known.version >= version:
            return True
        size = self._retained_bytes + batch.size - (len(known.body) if known else 0)
        if size > self.limits.max_retained_bytes or (known is None and len(self._retained) >= self.limits.max_retained):
            return False
        self._retained_bytes = size
        header = emp.Send(
            lane.destination, lane.priority, 1, 1, 1, emp.RETAIN | emp.FROM_STORE, None, None, batch.retain_key
        )
        self._retained[key] = Retained(header, version, batch.body)
        return True

    def _source(self, name: str) -> Incarnation:
        source = self._sources.get(name)
        if source is None:
            number = len(self._sources).to_bytes(emp.INCARNATION_BYTES - emp.EPOCH_BYTES, "big")
            module = Module(name, declared=True, groups=frozenset(), now=self._started)
            source = self._sources[name] = Incarnation(module, self.epoch + number, 0)
        return source

    def _deliver_retained(self, module: Module, now: float, groups: frozenset[str] | None = None) -> None:
        """Give a process that has just come the last version of what its groups (or only `groups`) retain.

        They come on lanes of the broker's own, with the source's name and an incarnation made of epoch and number.
        """
        for (name, destination, _), kept in self._retained.items():
            if group_name(destination) not in (module.groups if groups is None else groups):
                continue
            lane = module.store_lanes.get((name, destination))
            if lane is None:
                # Sessions only rise: numbers never used before towards a process that may know an earlier lane of ours.
                first = module.holder.session if module.holder is not None else 1
                lane = Lane(self._source(name), destination, kept.header.priority, first, Usage())
                module.store_lanes[(name, destination)] = lane
            waiting = next((batch for batch in lane.batches if batch.retain_key == kept.header.retain_key), None)
            if waiting is not None:
                # An earlier process died before it handled what it was given: still one, and the last version.
                grown = len(kept.body) - waiting.size
                module.held += grown
                lane.usage.size += grown
                self._held_bytes += grown
                waiting.body, waiting.size, waiting.retain_version = kept.body, len(kept.body), kept.version
                continue
            number = lane.last = lane.last + 1
            lane.floor = lane.cumulative + 1
            batch = Batch(msgspec.structs.replace(kept.header, first=number), number, kept.body, now)
            batch.retain_version = kept.version
            batch.routed = True
            batch.pending = 1
            lane.batches.append(batch)
            self._held_bytes += batch.size
            self._held_messages += 1
            lane.usage.messages += 1
            lane.usage.size += batch.size
            self._enqueue(lane, module, batch)

    # --- answers to peers --------------------------------------------------------------------------

    def _ask(self, peer: Peer) -> None:
        """WHO: say HELLO and send again. At most one until then (rule 10)."""
        incarnation = self._peers.pop(peer, None)
        if incarnation is not None and incarnation.peer == peer:
            self._end_session(incarnation, self._now, died=False)
        if peer in self._asked:
            return
        if len(self._asked) >= MAX_PEERS:
            self._asked.pop(next(iter(self._asked)))
        self._asked[peer] = True
        self._who += 1
        self._out.append(Out(peer, emp.encode(emp.WHO, emp.Who(self.epoch))))

    def _refuse_frame(self, peer: Peer, code: str, text: str) -> None:
        self._refused_frames[code] = self._refused_frames.get(code, 0) + 1
        self._out.append(Out(peer, emp.encode(emp.REFUSED, emp.Refused(code, text[:1024]))))

    def _event(self, module: Module, event: str, pid: int, now: float) -> None:
        holder = module.holder
        self.life.append(Life(module.name, event, pid, holder.credentials if holder else Credentials()))
        self._out.extend(Out(*shown) for shown in self.inspection.presence(module.name, event, pid, now))

    # --- what can be seen -------------------------------------------------------------------------------

    def statistics(self, now: float) -> dict[str, Any]:
        """What `edgezmq status` shows; keys as in docs/emp.md, ADMIN."""
        return {
            "broker": {
                "epoch": self.epoch.hex(),
                "uptime_s": round(now - self._started, 3),
                "bytes_held": self._held_bytes,
                "messages_held": self._held_messages,
                "byte_budget": self.limits.byte_budget,
                "retained": len(self._retained),
                "refused_frames": dict(self._refused_frames),
                "refused_of_past": self._count_past(),
                "resyncs_asked": self._who,
                "senders_waiting_for_room": len(self._throttled),
            },
            "modules": [self._module_statistics(module, now) for module in self._modules.values()],
            "accounts": self._accounts(),
        }

    def _count_past(self) -> dict[str, dict[str, int]]:
        """What modules were refused that have been let go, by name; "" stands for those of long ago."""
        counts = {name: dict(module.refused) for name, module in self._past.items() if module.refused}
        if self._refused_of_past:
            counts[""] = dict(self._refused_of_past)
        return counts

    def _accounts(self) -> list[dict[str, Any]]:
        """Of each lane, over its sender's incarnations: accepted = delivered + refused + held, or `balanced` is false.

        `held` comes from the lanes' sequence numbers, the others are counted where they happen.
        """
        lanes = {id(lane): lane for lane in self._parked}
        for sender in self._paced:
            lanes.update((id(lane), lane) for lane, _ in sender.paced)
        for module in self._modules.values():
            if module.holder is not None:
                lanes.update((id(lane), lane) for lane in module.holder.lanes.values())
            lanes.update((id(outlet.lane), outlet.lane) for outlet in module.outlets.values())
        held: dict[int, int] = {}
        for lane in lanes.values():
            held[id(lane.usage)] = held.get(id(lane.usage), 0) + lane.last - lane.cumulative
        accounts = []
        for module in self._modules.values():
            for (destination, priority), usage in module.usages.items():
                if not usage.accepted:
                    continue
                # Each member of a group acknowledges for itself: there "delivered" is what all of them have.
                delivered = usage.settled - usage.refused if is_group(destination) else usage.delivered
                kept = held.get(id(usage), 0)
                accounts.append(
                    {
                        "sender": module.name,
                        "destination": destination,
                        "priority": priority,
                        "accepted": usage.accepted,
                        "delivered": delivered,
                        "refused": usage.refused,
                        "held": kept,
                        "balanced": usage.accepted == delivered + usage.refused + kept,
                    }
                )
        return accounts

    def _module_statistics(self, module: Module, now: float) -> dict[str, Any]:
        holder = module.holder
        oldest = min(
            (
                batches[0].arrived
                for outlet in module.outlets.values()
                for batches in (outlet.in_flight, outlet.waiting)
                if batches
            ),
            default=None,
        )
        return {
            "name": module.name,
            "state": module.state,
            "declared": module.declared,
            "groups": sorted(module.groups),
            "pid": holder.pid if holder else 0,
            "uid": holder.credentials.uid if holder else -1,
            "incarnation": holder.id.hex() if holder else "",
            "generation": holder.generation if holder else module.generation,
            "sdk": holder.sdk if holder else "",
            "queued": module.held_messages - sum(module.in_flight),
            "queued_bytes": module.held,
            "in_flight": sum(module.in_flight),
            "delivered": module.delivered,
            "redelivered": module.redelivered,
            "refused": dict(module.refused),
            "suspects": len(module.suspects),
            "paced": sum(batch.last - batch.from_ + 1 for _, batch in module.paced),
            "oldest_age_ms": int((now - oldest) * 1000) if oldest is not None else 0,
            "latency": dict(zip((*map(str, LATENCY_BOUNDS_SECONDS), "inf"), module.latency, strict=True)),
            "latency_sum_s": round(module.latency_sum, 6),
            "last_heard_ms": int((now - holder.last_heard) * 1000) if holder else -1,
            "counters": dict(holder.counters) if holder else {},
            "lanes": [
                {
                    "sender": outlet.lane.sender.name,
                    "destination": outlet.lane.destination,
                    "priority": outlet.lane.priority,
                    "unsettled": outlet.lane.last - outlet.lane.cumulative,
                    "waiting": len(outlet.waiting),
                    "in_flight": len(outlet.in_flight),
                }
                for outlet in module.outlets.values()
                if outlet.waiting or outlet.in_flight
            ],
        }
