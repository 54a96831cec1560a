"""Modules' questions to the cloud, and who waits for the answers (KubeEdge's syncKeeper).

A question is registered before it is written, so that no answer is too fast; it has its own time limit;
it outlives the link. An answer that comes too late is known as such, for a while.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

T = TypeVar("T")

ASKED_AGAIN: Final = frozenset({"query", "get"})
"Operations that change nothing: asked again over a new link when the old one may have taken the answer with it."


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    id: str
    token: T
    "Who asked; the shell knows what to do with it."
    payload: bytes
    "As it was written, to ask again."
    is_repeatable: bool
    resource: str
    due: float


@dataclass(frozen=True, slots=True)
class Late:
    """An answer to a question that nobody waits for any more."""


LATE: Final = Late()


class SyncKeeper(Generic[T]):
    """At most `capacity` open questions; `register` says no beyond. Remembers as many that timed out."""

    def __init__(self, capacity: int = 4096) -> None:
        self._capacity = capacity
        self._open: dict[str, Question[T]] = {}
        self._due: list[tuple[float, str]] = []
        self._expired: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def register(
        self, message_id: str, token: T, payload: bytes, *, operation: str, resource: str, seconds: float, now: float
    ) -> bool:
        """Wait for the answer to `message_id`. False: too many are open, or this id already is."""
        if len(self._open) >= self._capacity or message_id in self._open or not message_id:
            return False
        question = Question(message_id, token, payload, operation in ASKED_AGAIN, resource, now + seconds)
        self._open[message_id] = question
        heapq.heappush(self._due, (question.due, message_id))
        return True

    def answer(self, parent_id: str) -> Question[T] | Late | None:
        """Who asked; LATE when it was asked and given up; None when no such question is known."""
        question = self._open.pop(parent_id, None)
        if question is not None:
            return question
        return LATE if parent_id in self._expired else None

    def answer_about(self, resource: str) -> Question[T] | None:
        """Who asked about `resource`, where one alone did; for replies that do not say which question they answer."""
        found = [question for question in self._open.values() if question.resource == resource]
        return self._open.pop(found[0].id) if len(found) == 1 else None

    def is_open(self, message_id: str) -> bool:
        return message_id in self._open

    def expire(self, *, now: float) -> list[Question[T]]:
        """The questions whose time is over; their answers are late from now on."""
        over: list[Question[T]] = []
        while self._due and self._due[0][0] <= now:
            due, message_id = heapq.heappop(self._due)
            question = self._open.get(message_id)
            if question is None or question.due != due:
                continue  # answered, and perhaps asked again under the same id
            del self._open[message_id]
            self._expired[message_id] = None
            if len(self._expired) > self._capacity:
                self._expired.popitem(last=False)
            over.append(question)
        return over

    def next_deadline(self) -> float | None:
        while self._due and self._due[0][1] not in self._open:
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def to_ask_again(self) -> list[Question[T]]:
        """Open questions that may be repeated over a new link, in the order they were asked."""
        return [question for question in self._open.values() if question.is_repeatable]
