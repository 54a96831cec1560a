"""Objects from the cloud that no module on this node owns yet: kept on disk until one declares their group.

CloudHub waits for the ACK of each object before it sends the next, so an ACK that nobody sends blocks all others.
An object without an owner is therefore parked, the last one of each resource, and acknowledged once that is
committed. When a module declares the group, the objects are handed over in order, one after another, and each is
deleted when its owner has handled it. New ones go behind them. What an owner refuses again and again goes to the
ledger, in the transaction that deletes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from modules.edgehub.store import OutboxFile, Parked, Store
from runtime.emp import EXPIRED, FENCED_REASON, GONE, OVERFLOW, OVERTAKEN, UNROUTABLE
from runtime.errors import MalformedMessage
from runtime.message import Message, from_cloud_json, to_cloud_json

log = logging.getLogger("modules.edgehub")

T = TypeVar("T")

REFUSED_BY_OWNER: Final = "refused-by-owner"
"In the ledger: the owner refused it so often that it was given up."
OUTBOX_DAMAGED: Final = "outbox-damaged"
NOBODY: Final = frozenset({UNROUTABLE, GONE})
"Refusals of the bus: nobody has the group now."
NOT_THE_OWNER: Final = NOBODY | {EXPIRED, FENCED_REASON, OVERTAKEN, OVERFLOW}
"Refusals that say nothing about what the owner thinks of the message."

_LOOK_SECONDS: Final = 15.0
"Presence events tell of a new module at once; should one be missed, an object is offered this often."
_PAUSE_SECONDS: Final = 1.0
"After an owner's refusal; doubles with each."


@dataclass(frozen=True, slots=True)
class ParkingLimits:
    """Of all owners together."""

    max_messages: int = 10_000
    max_bytes: int = 64 * 2**20
    refusals: int = 5
    "So often an owner may refuse an object before it is given up."
    pause_seconds: float = _PAUSE_SECONDS


def park_key(message: Message) -> str:
    """Under what an object is kept: of insert, update and delete only the last one of a resource counts."""
    if message.operation in ("insert", "update", "delete"):
        return message.resource
    return f"{message.resource}#{message.operation}#{message.id}"


class Parking:
    """`put` parks; everything else happens by itself in tasks that live only while something is parked."""

    def __init__(
        self,
        store: Store,
        tasks: asyncio.TaskGroup,
        limits: ParkingLimits,
        *,
        deliver: Callable[[str, Message], Awaitable[str | None]],
        presence: Callable[[], AsyncIterator[Any]],
        parked: Callable[[Message], None],
        is_full: Callable[[Message], None],
        wall_ms: Callable[[], int],
    ) -> None:
        """`deliver(owner, message)` returns the refusal, None when it was handled. `parked(message)` and
        `is_full(message)` are called in the loop and say what came of `put`."""
        self._store = store
        self._tasks = tasks
        self._limits = limits
        self._deliver = deliver
        self._presence = presence
        self._parked = parked
        self._is_full = is_full
        self._wall_ms = wall_ms
        self._totals, self._known = store.parked()
        self._pending: dict[str, list[Message]] = {}  # by owner: ordered to be parked, not committed
        self._in_flight: set[str] = set()
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._wake: dict[str, asyncio.Event] = {}
        self._waiting: set[asyncio.Future[Any]] = set()
        self.handed_over = 0
        self.given_up = 0

    def start(self) -> None:
        """Offer what the file holds."""
        for owner in self._totals:
            self._offer(owner)

    def stop(self) -> None:
        for task in [*self._workers.values(), *([self._watcher] if self._watcher else [])]:
            task.cancel()

    # --- state ---------------------------------------------------------------------------------

    @property
    def messages(self) -> int:
        return sum(messages for messages, _ in self._totals.values())

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self._totals.values())

    def by_owner(self) -> dict[str, int]:
        return {owner: messages for owner, (messages, _) in self._totals.items()}

    def holds(self, owner: str) -> bool:
        """Whether objects of this owner are parked, so that new ones must go behind them."""
        return owner in self._totals or owner in self._pending

    # --- in ------------------------------------------------------------------------------------

    def put(self, owner: str, message: Message) -> None:
        """Park it. With a full disk neither `parked` nor `is_full` is called until there is room again."""
        self._pending.setdefault(owner, []).append(message)
        payload = to_cloud_json(message)
        is_in_flight = owner in self._in_flight  # then the owner may be taking an object just now

        def work(file: OutboxFile) -> tuple[bool, dict[str, tuple[int, int]]]:
            if is_in_flight:
                file.know_owner(owner)
            is_parked = file.park(
                owner,
                park_key(message),
                payload,
                is_insert=message.operation == "insert",
                is_delete=message.operation == "delete",
                max_messages=self._limits.max_messages,
                max_bytes=self._limits.max_bytes,
            )
            return is_parked, file.parked()

        def done(outcome: tuple[bool, dict[str, tuple[int, int]]]) -> None:
            is_parked, self._totals = outcome
            pending = self._pending.get(owner, [])
            if message in pending:
                pending.remove(message)
            if not pending:
                self._pending.pop(owner, None)
            if is_parked:
                self._parked(message)
            else:
                self._is_full(message)
            if owner in self._totals:
                self._offer(owner)

        self._store.do(work, done)

    def known(self, owner: str) -> None:
        """`owner` has handled an object that was not parked: from now on deletes concern it."""
        if owner not in self._known:
            self._known.add(owner)
            self._store.do(lambda file: file.know_owner(owner), lambda _: None)

    def give_up(self, owner: str, message: Message, done: Callable[[], None]) -> None:
        """Write an object that never was parked into the ledger; `done` when that is committed."""
        payload = to_cloud_json(message)
        self.given_up += 1
        self._store.do(
            lambda file: file.note_object(REFUSED_BY_OWNER, owner, payload, self._wall_ms()), lambda _: done()
        )

    def damaged(self) -> tuple[int, list[Message]]:
        """The file was begun anew: how many objects are gone, and which were not parked yet."""
        gone = self.messages
        if gone:
            self._store.do(lambda file: file.note_objects(OUTBOX_DAMAGED, gone), lambda _: None)
        lost = [message for messages in self._pending.values() for message in messages]
        self._totals = {}
        self._pending.clear()
        self._known.clear()
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        return gone, lost

    # --- out -----------------------------------------------------------------------------------

    def _offer(self, owner: str) -> None:
        if owner not in self._workers:
            self._wake[owner] = asyncio.Event()
            self._workers[owner] = self._tasks.create_task(self._work(owner), name=f"parked for {owner}")
        if self._watcher is None:
            self._watcher = self._tasks.create_task(self._watch(), name="parked: who comes")

    async def _watch(self) -> None:
        async for presence in self._presence():
            if presence.event in ("attached", "back"):
                for wake in self._wake.values():
                    wake.set()

    async def _work(self, owner: str) -> None:
        """Hand over what is parked for one owner, in order."""
        suspect, refusals = 0, 0
        while (parked := await self._do(lambda file: file.first_parked(owner))) is not None:
            if parked.number != suspect:
                suspect, refusals = parked.number, 0
            self._wake[owner].clear()
            refusal = await self._hand_over(parked)
            if refusal is None:
                self.handed_over += 1
                await self._finish(parked, None)
            elif refusal in NOBODY:
                await self._wait_for(owner)
            elif refusal in NOT_THE_OWNER:
                await asyncio.sleep(self._limits.pause_seconds)
            else:
                refusals += 1
                log.warning("a parked object was refused owner=%s reason=%s times=%d", owner, refusal, refusals)
                if refusals >= self._limits.refusals:
                    self.given_up += 1
                    await self._finish(parked, REFUSED_BY_OWNER)
                else:
                    await asyncio.sleep(self._limits.pause_seconds * 2.0 ** (refusals - 1))
        # No await since the last answer: nothing can have been parked unseen.
        del self._workers[owner], self._wake[owner]
        if not self._workers and self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    async def _hand_over(self, parked: Parked) -> str | None:
        try:
            message = from_cloud_json(parked.payload)
        except MalformedMessage as fault:  # we wrote it ourselves: a damaged page
            return f"unreadable: {fault}"
        self._in_flight.add(parked.owner)
        try:
            return await self._deliver(parked.owner, message)
        finally:
            self._in_flight.discard(parked.owner)

    async def _finish(self, parked: Parked, reason: str | None) -> None:
        """Delete it; with a `reason` into the ledger, in the same transaction."""

        def work(file: OutboxFile) -> dict[str, tuple[int, int]]:
            file.know_owner(parked.owner)
            file.unpark(parked.number)
            if reason is not None:
                file.note_object(reason, parked.owner, parked.payload, self._wall_ms())
            return file.parked()

        self._known.add(parked.owner)
        totals = await self._do(work)
        if totals is not None:
            self._totals = totals

    async def _wait_for(self, owner: str) -> None:
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                await self._wake[owner].wait()
        except TimeoutError:
            pass

    async def _do(self, work: Callable[[OutboxFile], T]) -> T | None:
        """The result once it is committed; None when the file was begun anew meanwhile."""
        future: asyncio.Future[T | None] = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        self._store.do(work, lambda result: None if future.done() else future.set_result(result))
        try:
            return await future
        finally:
            self._waiting.discard(future)
