"""Which module a message from the cloud is for, and what was seen of it before."""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum
from typing import Final

from runtime.message import Message
from runtime.names import Group

EVENTBUS: Final = "eventbus"
SERVICEBUS: Final = "servicebus"

_BY_GROUP: Final[dict[str, str]] = {
    "resource": Group("meta"),
    "func": Group("meta"),
    "twin": Group("twin"),
    "taskmanager": Group("taskmanager"),
}
_USER_BY_SOURCE: Final[dict[str, str]] = {
    "router_eventbus": EVENTBUS,
    "router_servicebus": SERVICEBUS,
    "router_rest": SERVICEBUS,  # the 2019 cloud's name for it
}


def destination(message: Message) -> str | None:
    """The module or group that owns a message from the cloud; None: nobody here knows such messages.

    KubeEdge's table (HEAD), `messagehandler`; a parent id plays no part: an answer that nobody waits for is an
    ordinary message of its group (KubeEdge drops it).
    """
    if message.group == "user":
        return _USER_BY_SOURCE.get(message.source)
    return _BY_GROUP.get(message.group)


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
