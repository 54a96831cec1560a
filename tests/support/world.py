"""One broker core and several SDK cores in a room, under a random schedule of delays and faults.

`World(seed).run()` plays one schedule: messages, group messages and requests with deferred, raising and refusing
handlers, while connections break, processes are killed, stopped and restarted, and the broker restarts.
Then it heals everything, lets it settle, and checks what must hold (`Violation` otherwise):

* settled as delivered means handled to its end by every receiver that the broker owed it to;
* everything sent by a process that still lives is settled; the broker holds nothing; nothing is stuck;
* FIFO per lane and receiver incarnation, and nothing handled twice within one incarnation;
* no process begins a message after a newer one of its name has begun one (fencing);
* windows are kept.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from runtime import emp
from runtime.access import Credentials, Open, Pace
from runtime.client_core import (
    Arrival,
    Attached,
    ClientCore,
    Complaint,
    Ended,
    InLane,
    Members,
    OutBatch,
    Replied,
    State,
    Woken,
)
from runtime.message import Message, encode_message
from runtime.routing import BrokerLimits, RoutingCore
from runtime.routing_state import Peer

LIVENESS = 1.0
HEARTBEAT = 0.3
GRACE = 0.2
ABSENT = 3.0


class Violation(AssertionError):
    """A schedule that broke a promise."""


@dataclass
class Sent:
    """One message of ours and what its sender was told."""

    id: str
    destination: str
    priority: int
    number: int
    batch: OutBatch
    declared_members: tuple[str, ...]

    def outcome(self) -> list[tuple[str, str | None]] | None:
        """None while open, [] when delivered, the refusals otherwise."""
        if self.batch.settled < self.number:
            return None
        return (self.batch.refusals or {}).get(self.number, [])


@dataclass
class Job:
    lane: InLane
    number: int
    message: Message
    header: emp.Deliver


@dataclass
class Process:
    """One incarnation of a module: the SDK's core, its shell's queues, its connection."""

    name: str
    serial: int
    pid: int
    core: ClientCore
    peer: Peer | None = None
    up: deque[list[bytes]] = field(default_factory=deque)
    down: deque[list[bytes]] = field(default_factory=deque)
    queues: dict[int, deque[Job]] = field(default_factory=lambda: defaultdict(deque))
    lanes: dict[int, InLane] = field(default_factory=dict)
    running: list[Job] = field(default_factory=list)
    deferred: list[Job] = field(default_factory=list)
    begun: set[tuple[bytes, str, int, int]] = field(default_factory=set)
    begun_ids: set[str] = field(default_factory=set)
    last_begun: dict[tuple[bytes, str, int], int] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    replies: dict[str, int] = field(default_factory=dict)
    stopped: bool = False
    dead: bool = False
    ended: bool = False
    said_bye: bool = False


class Paced(Open):
    def __init__(self, paces: dict[str, tuple[float, float]]) -> None:
        self.paces = paces

    def pace(self, name: str) -> Pace | None:
        return Pace(*self.paces[name]) if name in self.paces else None


class World:
    """One schedule. `modules`: name → (groups, declared). `paced`: two of them have a quota."""

    MODULES = {
        "alpha": ({"g"}, True),
        "beta": ({"g"}, True),
        "gamma": (set(), True),
        "drifter": ({"g"}, False),
    }

    def __init__(
        self, seed: int, *, steps: int = 220, window: int = 12, prefetch: int = 5, batch: int = 4, paced: bool = False
    ) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.steps = steps
        self.now = 100.0
        self.window = window
        self.prefetch = prefetch
        self.limits = BrokerLimits(
            limits=emp.Limits(1 << 20, window, 1 << 20, batch, 4096),
            heartbeat_seconds=HEARTBEAT,
            grace_seconds=GRACE,
            absent_limit_seconds=ABSENT,
            poison_after_deaths=1000,
            solo_after_deaths=self.random.choice((1, 2, 1000)),
            byte_budget=self.random.choice((1 << 20, 1 << 20, 1500)),
            reserve_bytes=200,
        )
        self.serial = 0
        self.message_serial = 0
        self.processes: list[Process] = []
        self.current: dict[str, Process] = {}
        self.stale: list[tuple[Peer, deque[list[bytes]]]] = []
        self.handled: dict[str, set[str]] = defaultdict(set)  # message id → names that handled it to its end
        self.newest_begun: dict[str, Process] = {}
        self.pending_deaths: list[tuple[str, int]] = []
        self.broker_serial = 0
        self.attached_generations: dict[int, int] = {}
        self.trace: list[str] = []
        self.broker: RoutingCore | None = None
        self.access = Paced({"alpha": (20.0, 0.0), "drifter": (0.0, 2000.0)} if paced else {})
        self.start_broker()
        for name in self.MODULES:
            self.start(name)

    # --- processes ------------------------------------------------------------------------------------

    def start_broker(self) -> None:
        self.broker_serial += 1
        self.broker = RoutingCore(
            epoch=self.broker_serial.to_bytes(emp.EPOCH_BYTES, "big"),
            session_base=self.broker_serial << 24,
            clock_ms=int(self.now * 1000),
            now=self.now,
            limits=self.limits,
            declared={name: groups for name, (groups, declared) in self.MODULES.items() if declared},
            access=self.access,
        )

    def start(self, name: str) -> Process:
        self.serial += 1
        groups, _ = self.MODULES[name]
        process = Process(
            name,
            self.serial,
            1000 + self.serial,
            ClientCore(
                name,
                incarnation=self.serial.to_bytes(emp.INCARNATION_BYTES, "big"),
                groups=tuple(groups),
                liveness_seconds=LIVENESS,
                prefetch_messages=self.prefetch,
                pid=1000 + self.serial,
            ),
        )
        self.processes.append(process)
        self.current[name] = process
        self.connect(process)
        return process

    def connect(self, process: Process) -> None:
        if self.broker is None or process.dead or process.ended:
            return
        self.serial += 1
        process.peer = (0, self.serial.to_bytes(5, "big"))
        process.core.connected(self.now)
        self.collect(process)

    def cut(self, process: Process) -> None:
        """The connection breaks: what was on its way up may still be read, later or never; down likewise."""
        if process.peer is None:
            return
        if process.up and self.random.random() < 0.5:
            self.stale.append((process.peer, process.up))
        process.up = deque()
        if self.random.random() < 0.5:
            process.down = deque()
        peer, process.peer = process.peer, None
        if not process.dead:
            process.core.disconnected(self.now)
            process.core.out.clear()
            self.settle_events(process)
        if self.broker is not None and self.random.random() < 0.5:
            self.broker.lost(peer, self.now)

    def kill(self, process: Process) -> None:
        self.note(f"kill {process.name}#{process.serial}")
        process.dead = True
        self.cut(process)
        if self.random.random() < 0.8:
            self.pending_deaths.append((process.name, process.pid))

    def kill_broker(self) -> None:
        self.note("kill broker")
        self.broker = None
        self.stale.clear()
        for process in self.processes:
            if process.peer is not None and not process.dead:
                self.cut(process)

    def note(self, what: str) -> None:
        self.trace.append(f"{self.now:.3f} {what}")

    # --- one party acts -----------------------------------------------------------------------------------

    def collect(self, process: Process) -> None:
        """Frames of the core go on the wire; its events to the shell."""
        out, process.core.out = process.core.out, []
        if process.peer is not None:
            process.up.extend(out)
        self.settle_events(process)

    def settle_events(self, process: Process) -> None:
        events, process.core.events = process.core.events, []
        for event in events:
            match event:
                case Arrival(lane, first, messages, header):
                    process.lanes[id(lane)] = lane
                    for number, message in enumerate(messages, first):
                        process.queues[id(lane)].append(Job(lane, number, message, header))
                case Replied(waiter, _, _):
                    process.replies[waiter] = process.replies.get(waiter, 0) + 1
                    process.core.forget(waiter)
                case Ended(_, _):
                    process.ended = True
                    self.note(f"ended {process.name}#{process.serial}")
                case Attached(_, _):
                    pass
                case Complaint(code, text):
                    raise Violation(f"{process.name} was told {code}: {text}")
                case Members() | Woken():
                    pass
                case _:
                    pass

    def flush_broker(self) -> None:
        if self.broker is None:
            return
        for out in self.broker.flush(self.now):
            for process in self.processes:
                if process.peer == out.peer and not process.dead:
                    process.down.append(out.frames)
                    break
            else:
                self.broker.lost(out.peer, self.now)

    def step_up(self, process: Process) -> None:
        if self.broker is not None and process.up and process.peer is not None:
            frames = process.up.popleft()
            self.broker.receive(process.peer, frames, self.now, Credentials(0, 0, process.pid))

    def step_down(self, process: Process) -> None:
        if process.down:
            process.core.receive(process.down.popleft(), self.now)
            self.collect(process)
            assert len(process.core.lanes) < 100

    def send(self, process: Process, destination: str, priority: int, *, request: bool = False) -> None:
        core = process.core
        lane = core.lane(destination, priority)
        self.message_serial += 1
        message = Message(id=f"m{self.message_serial}", source=process.name, content=b"1")
        data = encode_message(message)
        if not core.has_room(lane, len(data)):
            if lane.messages < self.window and lane.size < 1 << 19:
                raise Violation("no room in a window that is not full")
            return
        before = lane.messages
        if request:
            core.expect(message.id, message.id)
        deadline = self.now + self.random.uniform(0.05, 2.0) if self.random.random() < 0.1 else None
        batch = core.put_with(lane, data, emp.EXPECTS_REPLY if request else 0, deadline, None)
        if core.epoch and lane.messages > self.window and lane.messages > 1 and before >= self.window:
            raise Violation(f"window exceeded: {lane.messages}")
        members = tuple(
            name for name, (groups, declared) in self.MODULES.items() if declared and destination[1:] in groups
        )
        process.sent.append(
            Sent(message.id, destination, priority, lane.next - 1, batch, members if destination[0] == "@" else ())
        )

    def begin(self, process: Process) -> bool:
        """Begin one queued message, as the shell does: lanes one by one, requests at once."""
        if process.core.draining:
            return False
        ready = [
            queue
            for key, queue in process.queues.items()
            if queue
            and (
                queue[0].header.flags & emp.EXPECTS_REPLY
                or not any(job.lane is process.lanes[key] for job in process.running)
            )
        ]
        if not ready:
            return False
        if not process.core.is_fresh(self.now):
            process.core.ask_fresh(self.now)
            self.collect(process)
            return False
        job = self.random.choice(ready).popleft()
        lane = job.lane
        key = (lane.incarnation, lane.destination, lane.priority)
        if (*key, job.number) in process.begun or job.message.id in process.begun_ids:
            raise Violation(f"{process.name} handles {job.message.id} twice")
        if job.number <= process.last_begun.get(key, 0):
            raise Violation(f"{process.name}: {job.number} after {process.last_begun[key]} on {key}")
        process.last_begun[key] = job.number
        process.begun.add((*key, job.number))
        process.begun_ids.add(job.message.id)
        newest = self.newest_begun.get(process.name)
        if newest is not None and process.core.generation < newest.core.generation and not newest.dead:
            # A newer one that has died leaves the name to whom the broker finds, even an older one.
            raise Violation(
                f"{process.name}: generation {process.core.generation} begins after {newest.core.generation}"
            )
        if newest is None or newest.dead or process.core.generation > newest.core.generation:
            self.newest_begun[process.name] = process
        process.running.append(job)
        return True

    def end(self, process: Process) -> None:
        """A running handler returns, fails, or defers."""
        if process.deferred and (not process.running or self.random.random() < 0.4):
            job = process.deferred.pop(self.random.randrange(len(process.deferred)))
            self.complete(process, job)
            return
        if not process.running:
            return
        job = process.running.pop(self.random.randrange(len(process.running)))
        if self.random.random() < 0.25:
            process.deferred.append(job)
            return
        self.complete(process, job)

    def complete(self, process: Process, job: Job) -> None:
        if self.random.random() < 0.08:
            process.core.finish(job.lane, job.number, emp.FAILED)
            return
        self.handled[job.message.id].add(process.name)
        if job.header.flags & emp.EXPECTS_REPLY:
            core = process.core
            self.message_serial += 1
            reply = Message(id=f"r{self.message_serial}", parent_id=job.message.id, source=process.name, content=b"1")
            lane = core.lane(job.header.sender, 0)
            core.put_with(lane, encode_message(reply), emp.REPLY, None, job.header.incarnation)
        process.core.finish(job.lane, job.number)

    def expire(self, process: Process) -> None:
        process.core.expire(self.now)
        self.collect(process)

    # --- the schedule ---------------------------------------------------------------------------------------

    def living(self) -> list[Process]:
        return [process for process in self.processes if not process.dead and not process.ended]

    def step(self) -> None:
        r = self.random
        self.now += r.choice((0.0, 0.001, 0.005, 0.02, 0.06))
        roll = r.random()
        if roll < 0.04:
            self.fault()
            return
        awake = [process for process in self.living() if not process.stopped]
        if not awake:
            return
        process = r.choice(awake)
        action = r.random()
        if action < 0.22:
            destination = r.choice(("alpha", "beta", "gamma", "drifter", "@g", "nobody"))
            request = r.random() < 0.25
            self.send(process, destination, 1 if request else r.choice((2, 3, 3)), request=request)
        elif action < 0.34:
            if r.random() < 0.3:
                process.core.flush_lazy()
            process.core.flush(self.now)
            self.collect(process)
        elif action < 0.54:
            self.step_up(process)
        elif action < 0.74:
            self.step_down(process)
        elif action < 0.86:
            self.begin(process)
        elif action < 0.95:
            self.end(process)
        else:
            self.expire(process)
        if self.broker is not None and r.random() < 0.5:
            if r.random() < 0.2:
                self.broker.expire(self.now)
            self.flush_broker()
        if self.stale and self.broker is not None and r.random() < 0.1:
            peer, frames = r.choice(self.stale)
            if frames:
                self.broker.receive(peer, frames.popleft(), self.now, Credentials())
        if self.pending_deaths and self.broker is not None and r.random() < 0.3:
            self.broker.died(*self.pending_deaths.pop(), self.now)
        if process.peer is None and r.random() < 0.5:
            self.connect(process)

    def fault(self) -> None:
        self.check_accounts()
        r = self.random
        roll = r.random()
        living = self.living()
        process = r.choice(living) if living else None
        if process is None:
            return
        if roll < 0.35:
            self.note(f"cut {process.name}#{process.serial}")
            self.cut(process)
        elif roll < 0.55:
            self.kill(process)
            if r.random() < 0.7:
                self.start(process.name)
        elif roll < 0.70:
            self.note(f"stop {process.name}#{process.serial}")
            process.stopped = True
            if r.random() < 0.5:
                self.now += r.uniform(0.2, 2.5)
                if self.broker is not None:
                    self.broker.expire(self.now)
            if r.random() < 0.5:
                self.start(process.name)
        elif roll < 0.82:
            for other in living:
                other.stopped = False
        elif roll < 0.92:
            self.kill_broker()
            self.now += r.uniform(0.0, 0.5)
            self.start_broker()
        elif self.broker is not None and not process.stopped and process.core.state is State.ATTACHED:
            # A clean stop: drain, BYE, and perhaps a new start.
            self.note(f"bye {process.name}#{process.serial}")
            process.core.drain(0.0)
            process.core.bye(leaving=r.random() < 0.3, now=self.now)
            self.collect(process)
            while process.up:
                self.step_up(process)
            process.said_bye = True
            process.dead = True
            process.peer = None
            if r.random() < 0.8:
                self.start(process.name)

    def heal(self) -> None:
        """No more faults: everybody awake, one living process per name, until nothing moves."""
        if self.broker is None:
            self.start_broker()
        for process in self.living():
            process.stopped = False
        self.stale.clear()
        for name in self.MODULES:
            if not any(process.name == name for process in self.living()):
                self.start(name)
        for round_ in range(400):
            self.now += 0.01 if round_ % 10 else 0.25
            assert self.broker is not None
            for process in self.living():
                if process.peer is None:
                    self.connect(process)
                self.expire(process)
                process.core.flush(self.now)
                self.collect(process)
                while process.up and process.peer is not None:
                    self.step_up(process)
            if not any(process.name == name for name in self.MODULES for process in self.living()):
                raise Violation("all processes have ended")
            for name in self.MODULES:
                if not any(process.name == name for process in self.living()):
                    self.start(name)
            self.broker.expire(self.now)
            self.flush_broker()
            for process in self.living():
                while process.down:
                    self.step_down(process)
                while self.begin(process):
                    pass
                while process.running:
                    self.complete(process, process.running.pop(0))
                while process.deferred:
                    self.complete(process, process.deferred.pop(0))
                process.core.flush_lazy()
                process.core.flush(self.now)
                self.collect(process)
            if round_ > 340 and self.quiet():
                return
        raise Violation(f"stuck: {self.stuck()}")

    def quiet(self) -> bool:
        assert self.broker is not None
        return (
            all(sent.outcome() is not None for process in self.living() for sent in process.sent)
            and self.broker.statistics(self.now)["broker"]["messages_held"] == 0
        )

    def stuck(self) -> str:
        assert self.broker is not None
        opened = [
            (process.name, process.serial, process.core.state, sent.id, sent.destination, sent.priority, sent.number)
            for process in self.living()
            for sent in process.sent
            if sent.outcome() is None
        ]
        statistics = self.broker.statistics(self.now)
        return f"open {opened[:5]} broker {statistics}"

    def check(self) -> None:
        """What every receipt says is true."""
        for process in self.processes:
            for sent in process.sent:
                outcome = sent.outcome()
                if outcome is None or outcome:
                    continue
                if sent.destination.startswith("@"):
                    for member in sent.declared_members:
                        if member not in self.handled[sent.id]:
                            raise Violation(
                                f"{sent.id} to {sent.destination} told delivered, {member} never handled it"
                            )
                elif sent.destination not in self.handled[sent.id]:
                    raise Violation(f"{sent.id} to {sent.destination} told delivered, it was never handled")
        assert self.broker is not None
        held = self.broker.statistics(self.now)["broker"]
        if held["bytes_held"] != 0 or held["messages_held"] != 0:
            raise Violation(f"the broker still holds {held}")
        for module in self.broker.statistics(self.now)["modules"]:
            if module["in_flight"] or module["queued"] or module["queued_bytes"]:
                raise Violation(f"accounts do not close: {module}")
        self.check_accounts()

    def check_accounts(self) -> None:
        """At any time, in every lane: what was accepted is delivered, refused or held."""
        if self.broker is not None:
            for account in self.broker.statistics(self.now)["accounts"]:
                if not account["balanced"]:
                    raise Violation(f"accepted is not delivered + refused + held: {account}")

    def run(self) -> None:
        try:
            for _ in range(self.steps):
                self.step()
            self.heal()
            self.check()
        except Violation:
            raise
        except Exception as fault:
            raise Violation(f"seed {self.seed}: {type(fault).__name__}: {fault}") from fault


def play(seed: int, **options: Any) -> None:
    """Run one schedule; a Violation names the seed and the faults."""
    world = World(seed, **options)
    try:
        world.run()
    except Violation as violation:
        raise Violation(f"seed {seed}: {violation}\n" + "\n".join(world.trace[-40:])) from violation
