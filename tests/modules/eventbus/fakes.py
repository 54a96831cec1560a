"""A bus, and a host for the module, without broker and sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from modules.eventbus.bus import EventBus
from runtime.errors import Congested, MessageTooLarge, Refused
from runtime.message import Delivery, Message, current_handling


class FakeReceipt:
    def __init__(self) -> None:
        self.settled = False
        self.refusal: str | None = None
        self._callbacks: list[Callable[[FakeReceipt], None]] = []

    def add_done_callback(self, callback: Callable[[FakeReceipt], None]) -> None:
        if self.settled:
            asyncio.get_running_loop().call_soon(callback, self)
        else:
            self._callbacks.append(callback)

    def settle(self, refusal: str | None = None) -> None:
        self.settled, self.refusal = True, refusal
        for callback in self._callbacks:
            callback(self)


class FakeBus:
    """Settles what is sent by `policy` (message -> reason or None), or holds it while `is_holding`."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.delivered: list[Message] = []
        self.held: list[tuple[Message, FakeReceipt]] = []
        self.replies: list[tuple[Message, Message]] = []
        self.policy: Callable[[Message], str | None] = lambda message: None
        self.is_holding = False
        self.window = 1 << 30
        self.max_message_bytes = 1 << 30
        self._room = asyncio.Event()

    def send_nowait(self, to: str, message: Message) -> FakeReceipt:
        if len(message.content) > self.max_message_bytes:
            raise MessageTooLarge(len(message.content), self.max_message_bytes)
        if len(self.held) >= self.window:
            raise Congested("no room in the window")
        receipt = FakeReceipt()
        self.sent.append((to, message))
        self.held.append((message, receipt))
        if not self.is_holding:
            asyncio.get_running_loop().call_soon(self.release)
        return receipt

    async def send(self, to: str, message: Message) -> FakeReceipt:
        while len(self.held) >= self.window:
            self._room.clear()
            await self._room.wait()
        return self.send_nowait(to, message)

    async def respond(self, request: Message, reply: Message) -> FakeReceipt:
        self.replies.append((request, reply))
        receipt = FakeReceipt()
        receipt.settle()
        return receipt

    def release(self, number: int | None = None) -> None:
        """Settle what is held, or the oldest `number` of it."""
        count = len(self.held) if number is None else number
        now, self.held = self.held[:count], self.held[count:]
        for message, receipt in now:
            self.settle(message, receipt)
        self._room.set()

    def settle(self, message: Message, receipt: FakeReceipt) -> None:
        reason = self.policy(message)
        if reason is None:
            self.delivered.append(message)
        receipt.settle(reason)

    @property
    def payloads(self) -> list[bytes]:
        return [message.content for message in self.delivered]


class FakeDeferral:
    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.outcome: str | None = None

    def done(self) -> None:
        self.outcome = self.outcome or "done"

    def refuse(self, reason: str) -> None:
        self.outcome = self.outcome or reason


class _Handling:
    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self.deferral: FakeDeferral | None = None

    def defer(self, message: Message) -> FakeDeferral:
        self.deferral = FakeDeferral(self._delivery)
        return self.deferral

    def delivery_of(self, message: Message) -> Delivery:
        return self._delivery


class Host:
    """Runs one module as the SDK would."""

    def __init__(self, module: EventBus, bus: FakeBus) -> None:
        self.module = module
        self.bus = bus

    async def deliver(self, message: Message, *, sender: str = "edgehub", expects_reply: bool = False) -> FakeDeferral:
        """Hand a message to the handler. Returns how it is, or will be, settled."""
        delivery = Delivery(
            sender=sender,
            destination="eventbus",
            priority=3,
            redelivered=False,
            retained=False,
            expects_reply=expects_reply,
            ttl_ms=None,
        )
        handling = _Handling(delivery)
        token = current_handling.set(handling)
        settled = FakeDeferral(delivery)
        try:
            await self.module.handle(message)
            settled.done()
        except Refused as refusal:
            settled.refuse(refusal.reason)
        finally:
            current_handling.reset(token)
        return handling.deferral or settled

    def count(self, name: str) -> int:
        return self.module.counters().get(name, 0)


@asynccontextmanager
async def hosted(module: EventBus, bus: FakeBus | None = None) -> AsyncIterator[Host]:
    """The module running with a fake bus; stopped in good order at the end."""
    bus = bus or FakeBus()
    async with asyncio.TaskGroup() as tasks:
        module.bus = bus
        module.tasks = tasks
        await module.start()
        try:
            yield Host(module, bus)
        finally:
            await module.stop()


@asynccontextmanager
async def killed(module: EventBus, bus: FakeBus) -> AsyncIterator[Host]:
    """The module running with a fake bus; at the end it is gone without a word to anybody, as after SIGKILL."""

    class Gone(Exception):
        pass

    try:
        async with asyncio.TaskGroup() as tasks:
            module.bus = bus
            module.tasks = tasks
            await module.start()
            yield Host(module, bus)
            for side in module._sides:
                if side.connection._wire is not None:
                    side.connection._wire._transport.abort()
            raise Gone
    except* Gone:
        pass
