"""What the broker's core holds: modules, their incarnations, lanes, outlets and batches.

Plain records, changed by `RoutingCore` alone, which keeps them true to one another. The terms are those of
runtime/routing.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final, NamedTuple

from runtime import emp
from runtime.access import Credentials, Pace
from runtime.names import is_group

Peer = tuple[int, bytes]
"The broker's socket and the routing id that libzmq gave the connection."

PRIORITIES: Final = len(emp.Priority)
LATENCY_BOUNDS_SECONDS: Final = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0)
"Upper bounds of the buckets in which a message's time in the broker is counted."


class Batch:
    __slots__ = (
        "arrived",
        "body",
        "deadline",
        "first",
        "flags",
        "from_",
        "last",
        "members",
        "pending",
        "requester",
        "retain_key",
        "retain_version",
        "routed",
        "size",
    )

    def __init__(self, header: emp.Send, from_: int, body: bytes, now: float) -> None:
        self.first = header.first
        self.last = header.first + header.count - 1
        self.from_ = from_
        self.body = body
        self.size = len(body)
        self.flags = header.flags
        self.deadline = None if header.ttl_ms is None else now + header.ttl_ms / 1000
        self.requester = header.requester
        self.retain_key = header.retain_key
        self.retain_version = None if header.retain_key is None else (0, header.retain_counter or 0)
        self.arrived = now
        self.pending = 0  # outlets that have not settled it
        self.routed = False
        self.members: list[str] | None = None  # of a group request


class Usage:
    """What one sender name has unsettled for one destination and priority, over its incarnations (rule 30).

    And its account: what was accepted is delivered, refused, or held, each counted where it happens.
    """

    __slots__ = ("accepted", "delivered", "lanes", "messages", "refused", "settled", "size")

    def __init__(self) -> None:
        self.lanes = 0  # that count here
        self.messages = 0
        self.size = 0
        self.accepted = 0  # got their place in a lane
        self.delivered = 0  # acknowledged by receivers; in a lane to a group once for each member
        self.settled = 0
        self.refused = 0  # settled with at least one refusal


class Lane:
    __slots__ = (
        "batches",
        "cumulative",
        "destination",
        "dirty",
        "exceptions",
        "floor",
        "key",
        "last",
        "number",
        "outlets",
        "priority",
        "reported",
        "sender",
        "to_group",
        "unreported_members",
        "usage",
    )

    def __init__(self, sender: Incarnation, destination: str, priority: int, floor: int, usage: Usage) -> None:
        self.sender = sender
        self.destination = destination
        self.priority = priority
        self.key = (destination, priority)
        self.to_group = is_group(destination)
        self.floor = floor
        self.last = floor - 1
        self.cumulative = floor - 1
        self.reported = floor - 1
        self.batches: deque[Batch] = deque()
        self.exceptions: dict[int, list[tuple[str, str | None]]] = {}
        self.outlets: dict[str, Outlet] = {}
        self.usage = usage
        self.dirty = False
        self.unreported_members: list[tuple[int, int, list[str]]] = []


class Feed:
    """All lanes of one sender incarnation towards one receiver.

    A newer incarnation's feed waits until the older one's is empty (rule 19).
    """

    __slots__ = ("blocked", "incarnation", "outlets", "pending")

    def __init__(self, incarnation: Incarnation, blocked: bool) -> None:
        self.incarnation = incarnation
        self.pending = 0
        self.blocked = blocked
        self.outlets: list[Outlet] = []


class Outlet:
    __slots__ = (
        "acked",
        "deaths",
        "delivered_to",
        "feed",
        "in_flight",
        "lane",
        "module",
        "number",
        "ready",
        "redelivered_to",
        "solo",
        "voided",
        "waiting",
    )

    def __init__(self, lane: Lane, module: Module, feed: Feed | None, acked: int) -> None:
        self.lane = lane
        self.module = module
        self.feed = feed
        self.waiting: deque[Batch] = deque()
        self.in_flight: deque[Batch] = deque()
        self.acked = acked
        self.delivered_to = acked  # the highest number delivered in this session
        self.redelivered_to = 0  # up to here a receiver may have seen it
        self.number = 0  # in the receiver's session; 0 = none yet
        self.ready = False
        self.voided: set[int] | None = None  # first numbers of batches that expired before they were delivered
        self.deaths: dict[int, int] | None = None
        self.solo = 0  # the number that is in flight alone


class Incarnation:
    __slots__ = (
        "attached",
        "counters",
        "credentials",
        "draining",
        "generation",
        "groups",
        "id",
        "lanes",
        "last_heard",
        "liveness",
        "module",
        "name",
        "next_number",
        "outlets",
        "peer",
        "pid",
        "prefetch_bytes",
        "prefetch_messages",
        "sdk",
        "session",
        "throttled",
        "untaken",
    )

    def __init__(self, module: Module, id: bytes, generation: int) -> None:
        self.module = module
        self.name = module.name
        self.id = id
        self.generation = generation
        self.session = 0
        self.peer: Peer | None = None
        self.attached = False
        self.draining = False
        self.throttled = False
        self.untaken: dict[Lane, int] = {}  # while throttled: lane → bytes of the batch that was not taken
        self.groups: frozenset[str] = frozenset()
        self.lanes: dict[tuple[str, int], Lane] = {}
        self.last_heard = 0.0
        self.liveness = 15.0
        self.pid = 0
        self.credentials = Credentials()
        self.sdk = ""
        self.prefetch_messages = 2048
        self.prefetch_bytes = 8 * 2**20
        self.outlets: dict[int, Outlet] = {}  # by number, of this session
        self.next_number = 1
        self.counters: Mapping[str, int] = {}


class Module:
    __slots__ = (
        "absent_since",
        "declared",
        "delivered",
        "feeds",
        "generation",
        "groups",
        "held",
        "held_messages",
        "holder",
        "in_flight",
        "in_flight_bytes",
        "interrupted",
        "latency",
        "latency_sum",
        "name",
        "outlets",
        "pace",
        "paced",
        "pumping",
        "ready",
        "redelivered",
        "refused",
        "seen",
        "state",
        "store_lanes",
        "suspects",
        "timed",
        "usages",
    )

    def __init__(self, name: str, *, declared: bool, groups: frozenset[str], now: float) -> None:
        self.name = name
        self.declared = declared
        self.groups = groups
        self.holder: Incarnation | None = None
        self.state = "absent"
        self.generation = 0
        self.absent_since = now
        self.seen = False
        self.outlets: dict[tuple[str, bytes, str, int], Outlet] = {}  # by name too: whoever got a message knows the id
        self.ready: tuple[deque[Outlet], ...] = tuple(deque() for _ in range(PRIORITIES))
        self.in_flight = [0] * PRIORITIES
        self.in_flight_bytes = [0] * PRIORITIES
        self.held = 0
        self.held_messages = 0
        self.feeds: dict[str, list[Feed]] = {}
        self.usages: dict[tuple[str, int], Usage] = {}
        self.interrupted: list[tuple[Outlet, int, int]] = []  # in flight when a session ended: first and last number
        self.store_lanes: dict[tuple[str, str], Lane] = {}  # by source and group
        self.suspects: dict[Outlet, int] = {}
        self.timed = 0  # batches in its mailbox that may expire
        self.pumping = False
        self.pace: Pace | None = None
        self.paced: deque[tuple[Lane, Batch]] = deque()  # its own, that wait for its pace
        self.delivered = 0
        self.redelivered = 0
        self.refused: dict[str, int] = {}
        self.latency = [0] * (len(LATENCY_BOUNDS_SECONDS) + 1)
        self.latency_sum = 0.0


def has_batches(incarnation: Incarnation) -> bool:
    return any(lane.batches for lane in incarnation.lanes.values())


class Retained(NamedTuple):
    header: emp.Send
    version: tuple[int, int]
    body: bytes
