"""Which module a message from the cloud is for, and what was seen of it before."""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum

from modules.edgehub.dialect import Dialect
from runtime.message import Message


def destination(message: Message, dialect: Dialect) -> str | None:
    """The module or group that owns a message from the cloud; None: nobody here knows such messages.

    A parent id plays no part: an answer that nobody waits for is an ordinary message of its group (KubeEdge drops it).
    """
    if message.group == "user" and dialect.owners_of_user is not None:
        return dialect.owners_of_user.get(message.source)
    return dialect.owners.get(message.group)


class Seen(Enum):
    NEW = "new"
    IN_HAND = "in hand"
    DONE = "done"


class Received:
    """Ids of messages that CloudHub repeats until they are acknowledged: every 5 s, under the same id.

    A repeat of something still in hand is dropped, of something handled only acknowledged again. Of what was refused
    the next repeat is a new try; how often it was is remembered. The oldest of more than `capacity` ids is forgotten:
    then a repeat is handled again, which its module must bear anyhow. So it is after a restart of edgehub, which
    remembers nothing: the repeat carries the same message id.
    """

    def __init__(self, capacity: int = 8192) -> None:
        """`capacity` above the number of messages that may be in hand: those are not forgotten."""
        self._capacity = capacity
        self._states: OrderedDict[str, Seen] = OrderedDict()
        self._refusals: OrderedDict[str, int] = OrderedDict()

    def receive(self, message_id: str) -> Seen:
        """What is known of it; a new one is in hand from now on. Without an id all are new."""
        if not message_id:
            return Seen.NEW
        state = self._states.get(message_id)
        if state is not None:
            return state
        self._states[message_id] = Seen.IN_HAND
        if len(self._states) > self._capacity:
            self._states.popitem(last=False)
        return Seen.NEW

    def handled(self, message_id: str) -> None:
        if message_id in self._states:
            self._states[message_id] = Seen.DONE
            self._refusals.pop(message_id, None)

    def refused(self, message_id: str, *, by_owner: bool = False) -> int:
        """Not handled. Returns how often its owner has refused it: only those refusals count."""
        self._states.pop(message_id, None)
        if not by_owner or not message_id:
            return 0
        count = self._refusals.pop(message_id, 0) + 1
        self._refusals[message_id] = count
        if len(self._refusals) > self._capacity:
            self._refusals.popitem(last=False)
        return count

    def in_hand(self, message_id: str) -> None:
        """After `refused`: it is not left to the next repeat after all."""
        if message_id:
            self._states[message_id] = Seen.IN_HAND

    def __len__(self) -> int:
        return len(self._states)
