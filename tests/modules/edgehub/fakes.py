"""A bus without a broker, deferrals that remember, a link without a network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.hub import EdgeHub
from modules.edgehub.link import Link, LinkEvent, LinkLost, Passed, Received, make_link
from modules.edgehub.outbox import Class
from runtime.client import Presence
from runtime.emp import Priority
from runtime.enrolment import Job, Outcome
from runtime.errors import Refused
from runtime.message import Delivery, Message, current_handling, from_cloud_json, to_cloud_json


class FakeDeferral:
    def __init__(self, message: Message, delivery: Delivery) -> None:
        self.message = message
        self.delivery = delivery
        self.outcome: str | None = None
        "None: open; `done`, or the reason of the refusal."

    def done(self) -> None:
        self.outcome = self.outcome or "done"

    def refuse(self, reason: str) -> None:
        self.outcome = self.outcome or reason


@dataclass
class Handling:
    """What the SDK's handler context gives."""

    delivery: Delivery
    deferrals: list[FakeDeferral] = field(default_factory=list)

    def defer(self, message: Message) -> FakeDeferral:
        self.deferrals.append(FakeDeferral(message, self.delivery))
        return self.deferrals[-1]

    def delivery_of(self, message: Message) -> Delivery:
        return self.delivery


def delivery(
    *, priority: int = Priority.DATA, expects_reply: bool = False, ttl_ms: int | None = None, sender: str = "tester"
) -> Delivery:
    return Delivery(
        sender=sender,
        destination="@hub",
        priority=priority,
        redelivered=False,
        retained=False,
        expects_reply=expects_reply,
        ttl_ms=ttl_ms,
    )


async def hand_over(module: Any, message: Message, **facts: Any) -> FakeDeferral | None:
    """Call `module.handle(message)` as the SDK does; the deferral it took, if any."""
    handling = Handling(delivery(**facts))
    token = current_handling.set(handling)
    try:
        await module.handle(message)
    finally:
        current_handling.reset(token)
    return handling.deferrals[0] if handling.deferrals else None


class FakeReceipt:
    def __init__(self) -> None:
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.refusal: str | None = None

    @property
    def settled(self) -> bool:
        return self._future.done()

    def settle(self, refusal: str | None = None) -> None:
        if not self._future.done():
            self.refusal = refusal
            self._future.set_result(None)

    def add_done_callback(self, fn: Callable[[FakeReceipt], None]) -> None:
        self._future.add_done_callback(lambda _: fn(self))

    def __await__(self) -> Any:
        yield from self._future
        if self.refusal is not None:
            raise Refused(self.refusal)


@dataclass
class Sent:
    to: str
    message: Message
    priority: int
    receipt: FakeReceipt


class FakeBus:
    """Keeps what was sent; settles at once, but for destinations in `slow` (by hand) and `refusing` (by reason)."""

    name = "edgehub"

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.replies: list[tuple[Message, Message]] = []
        self.retained: list[tuple[str, str, Message]] = []
        self.slow: set[str] = set()
        self.refusing: dict[str, str] = {}
        self.respond_fault: Exception | None = None
        self.who_comes: asyncio.Queue[Presence] = asyncio.Queue()

    async def send(
        self, to: str, message: Message, *, priority: Priority = Priority.DATA, ttl: float | None = None
    ) -> FakeReceipt:
        receipt = FakeReceipt()
        self.sent.append(Sent(to, message, priority, receipt))
        if to not in self.slow:
            receipt.settle(self.refusing.get(to))
        return receipt

    async def respond(self, request: Message, reply: Message) -> FakeReceipt:
        if self.respond_fault is not None:
            raise self.respond_fault
        self.replies.append((request, reply))
        receipt = FakeReceipt()
        receipt.settle(self.refusing.get("reply"))
        return receipt

    async def retain(self, group: str, key: str, message: Message, *, priority: Priority = Priority.SIGNAL) -> Any:
        self.retained.append((group, key, message))
        receipt = FakeReceipt()
        receipt.settle()
        return receipt

    async def presence(self) -> AsyncIterator[Presence]:
        while True:
            yield await self.who_comes.get()

    def attach(self, name: str) -> None:
        """Tell who watches that a module has come."""
        self.who_comes.put_nowait(Presence(name, "attached", 1))

    def sent_to(self, to: str) -> list[Message]:
        return [sent.message for sent in self.sent if sent.to == to]


class FakeCloud:
    """Makes FakeLinks, one per dial; `links[-1]` is the newest. `faults` are raised by the first dials."""

    def __init__(self, *, greets: bool = True, answers_barriers: bool = True) -> None:
        self.links: list[FakeLink] = []
        self.faults: list[Exception] = []
        self.greets = greets
        self.answers_barriers = answers_barriers

    def __call__(self, config: EdgeHubConfig) -> FakeLink:
        return FakeLink(self)

    @property
    def link(self) -> FakeLink:
        return self.links[-1]

    def written(self) -> list[Message]:
        """What went up over all links, without keepalives and greetings."""
        messages = [from_cloud_json(payload) for link in self.links for payload in link.written]
        return [m for m in messages if m.operation != "keepalive" and m.resource != "k8s/ca.crt"]


class FakeLink:
    """A Link whose far end is the test: it reads `written`, feeds `arrive`, ends with `lose`."""

    keeps_kinds_apart = False

    def __init__(self, cloud: FakeCloud) -> None:
        self.cloud = cloud
        self.opened: list[Endpoint] = []
        self.written: list[bytes] = []
        self.barriers: list[int] = []
        self.closed: list[bool] = []
        self.acknowledged = 0
        self.has_room = True
        self._events: list[LinkEvent] = []
        self._arrival = asyncio.Event()
        self._lost: LinkLost | None = None

    async def open(self, endpoint: Endpoint) -> None:
        self.opened.append(endpoint)
        self.cloud.links.append(self)
        if self.cloud.faults:
            raise self.cloud.faults.pop(0)

    def write(self, payloads: Sequence[bytes], barrier: int | None = None, *, kind: Class = Class.DATA) -> None:
        if self._lost is not None:
            return
        self.written += payloads
        for payload in payloads:
            if self.cloud.greets and b"k8s/ca.crt" in payload:
                self.down(from_cloud_json(payload).response("CA"))
        if barrier is not None:
            self.barriers.append(barrier)
            if self.cloud.answers_barriers:
                self.arrive(Passed(barrier))

    def down(self, message: Message) -> None:
        """Send a message to the node."""
        self.arrive(Received(to_cloud_json(message)))

    def is_writable(self, kind: Class) -> bool:
        return self.has_room

    async def wait_writable(self, kind: Class) -> None:
        while not self.has_room:
            await asyncio.sleep(0)

    async def receive(self) -> list[LinkEvent]:
        while not self._events:
            if self._lost is not None:
                raise self._lost
            self._arrival.clear()
            await self._arrival.wait()
        events, self._events = self._events, []
        return events

    def acknowledged_bytes(self) -> int:
        return self.acknowledged

    def fit_send_buffer(self, window_bytes: int) -> None:
        pass

    async def close(self, *, is_polite: bool) -> None:
        self.closed.append(is_polite)
        self.lose("closed")

    def arrive(self, *events: LinkEvent) -> None:
        self._events += events
        self._arrival.set()

    def lose(self, why: str, *, is_cut_by_cloud: bool = True) -> None:
        if self._lost is None:
            self._lost = LinkLost(why, is_cut_by_cloud=is_cut_by_cloud)
        self._arrival.set()


@asynccontextmanager
async def running(
    config: EdgeHubConfig,
    *,
    seed: int = 1,
    factory: Callable[[EdgeHubConfig], Link] = make_link,
    enrol: Callable[[Job], Awaitable[Outcome]] | None = None,
) -> AsyncIterator[tuple[EdgeHub, FakeBus]]:
    """An EdgeHub on a fake bus, started; stopped at the end as the SDK does it."""
    hub, bus = EdgeHub(config, chance=random.Random(seed), factory=factory, enrol=enrol), FakeBus()
    hub.bus = bus  # type: ignore[assignment]
    async with asyncio.TaskGroup() as tasks:
        hub.tasks = tasks
        await hub.start()
        try:
            yield hub, bus
        finally:
            await hub.stop()
            for task in list(tasks._tasks):
                task.cancel()


def upload(number: int, **content: Any) -> Message:
    return Message.upload(f"default/device/{number % 7}", {"number": number, **content}, source="bus")
