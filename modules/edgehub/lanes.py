"""The way from the cloud to the modules: one lane per destination, so that a slow one holds up itself only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

from runtime.emp import FAILED, INVALID, TOO_LARGE, Priority
from runtime.errors import MessageTooLarge, NotHandled, Refused, UsageError
from runtime.message import Message

_DATA_DESTINATIONS: Final = frozenset({"eventbus", "servicebus"})
"Bulk traffic of cloud applications; everything else from the cloud is small and urgent."


class Receipt(Protocol):
    """What the bus promises of one message sent (`runtime.client.Receipt`)."""

    @property
    def settled(self) -> bool: ...

    @property
    def refusal(self) -> str | None: ...

    def add_done_callback(self, fn: Callable[[Any], None], /) -> None: ...


class Sender(Protocol):
    """The part of the bus that lanes use."""

    async def send(self, to: str, message: Message, *, priority: Priority) -> Receipt: ...


class _Waiting(NamedTuple):
    message: Message
    size_bytes: int


class Lanes:
    """Sends messages on in order per destination, and tells `settled` of each what became of it.

    Holds at most `max_messages` and `max_bytes` over all lanes, counted from `put` to settlement: the caller asks
    `is_full` and then stops reading the socket, so that TCP pushes back on the cloud and nothing is dropped.
    """

    def __init__(
        self,
        bus: Sender,
        tasks: asyncio.TaskGroup,
        settled: Callable[[Message, str | None], None],
        *,
        max_messages: int,
        max_bytes: int,
    ) -> None:
        """`settled(message, refusal)` is called in the loop; refusal None: its module has handled it."""
        self._bus = bus
        self._tasks = tasks
        self._settled = settled
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._queues: dict[str, asyncio.Queue[_Waiting]] = {}
        self._workers: list[asyncio.Task[None]] = []
        self._held_messages = 0
        self._held_bytes = 0
        self._room = asyncio.Event()

    @property
    def held_messages(self) -> int:
        return self._held_messages

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @property
    def is_full(self) -> bool:
        return self._held_messages >= self._max_messages or self._held_bytes >= self._max_bytes

    async def wait_room(self) -> None:
        while self.is_full:
            self._room.clear()
            await self._room.wait()

    def put(self, destination: str, message: Message, size_bytes: int) -> None:
        """Queue a message for its owner. Never waits; keep an eye on `is_full`."""
        queue = self._queues.get(destination)
        if queue is None:
            # As many lanes as there are rows in the dispatch table, never more.
            queue = self._queues[destination] = asyncio.Queue()
            worker = self._tasks.create_task(self._work(destination, queue), name=f"lane to {destination}")
            self._workers.append(worker)
        self._held_messages += 1
        self._held_bytes += size_bytes
        queue.put_nowait(_Waiting(message, size_bytes))

    def stop(self) -> None:
        """End the lanes. What waits in them was not acknowledged to the cloud, which sends it again."""
        for worker in self._workers:
            worker.cancel()

    async def _work(self, destination: str, queue: asyncio.Queue[_Waiting]) -> None:
        priority = Priority.DATA if destination in _DATA_DESTINATIONS else Priority.SIGNAL
        while True:
            message, size_bytes = await queue.get()
            try:
                # Waits for room in the bus's window; not for the receipt, so that the lane stays full.
                receipt = await self._bus.send(destination, message, priority=priority)
            except MessageTooLarge:
                self._done(message, size_bytes, TOO_LARGE)
            except UsageError:
                self._done(message, size_bytes, INVALID)
            except Refused as refused:
                self._done(message, size_bytes, refused.reason)
            except NotHandled:
                self._done(message, size_bytes, FAILED)
            else:
                receipt.add_done_callback(partial(self._on_settled, message, size_bytes))

    def _on_settled(self, message: Message, size_bytes: int, receipt: Receipt) -> None:
        self._done(message, size_bytes, receipt.refusal)

    def _done(self, message: Message, size_bytes: int, refusal: str | None) -> None:
        self._held_messages -= 1
        self._held_bytes -= size_bytes
        self._room.set()
        self._settled(message, refusal)
