"""What is subscribed at which broker: the fixed filters, those that the cloud asked for, and what is still to do.

The intent is stored before anything is done about it (`SubscriptionStore`), and made true at every connect: one
filter that a broker refuses holds up no other and is tried again. Times are seconds of a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Final

import msgspec

from modules.eventbus.topics import is_filter
from runtime.errors import EdgezmqError

ANSWER_SECONDS: Final = 30.0
"A SUBACK or UNSUBACK that has not come by then is asked for again."
RETRY_FIRST_SECONDS: Final = 1.0
RETRY_CAP_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One filter to subscribe, or to unsubscribe, at one broker."""

    topic_filter: str
    subscribe: bool


class Snapshot(msgspec.Struct, frozen=True):
    """What the store keeps."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    wanted: list[str] = []
    unwanted: list[str] = []
    "To be unsubscribed at each broker that still has it."


class DamagedStore(EdgezmqError):
    """The stored subscriptions cannot be read."""


def encode(snapshot: Snapshot) -> bytes:
    return msgspec.json.encode(snapshot)


def decode(data: bytes) -> Snapshot:
    """The snapshot in a file's bytes; raises DamagedStore."""
    try:
        snapshot = msgspec.json.decode(data, type=Snapshot)
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise DamagedStore(str(fault)) from fault
    for topic_filter in (*snapshot.wanted, *snapshot.unwanted):
        if not is_filter(topic_filter):
            raise DamagedStore(f"{topic_filter!r} is no topic filter")
    return snapshot


@dataclass(slots=True)
class _Link:
    """One broker's side."""

    is_connected: bool = False
    subscribed: set[str] = field(default_factory=set)
    "Confirmed in the broker's present session."
    unsubscribed: set[str] = field(default_factory=set)
    asked: dict[int, tuple[Ask, float]] = field(default_factory=dict)
    "By packet id, with the time it was sent."
    not_before: dict[str, float] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)


class Subscriptions:
    """The intent, and how far each broker is from it.

    `fixed` are always wanted; `obsolete` are filters of another setting (the tables of another KubeEdge version) that
    a session may still hold. `links` are the brokers' names.
    """

    def __init__(
        self,
        *,
        fixed: Sequence[str],
        links: Iterable[str],
        stored: Snapshot | None = None,
        obsolete: Iterable[str] = (),
        random: Random,
    ) -> None:
        stored = stored or Snapshot()
        self._fixed = dict.fromkeys(fixed)
        self._wanted = dict.fromkeys(stored.wanted)
        self._unwanted = dict.fromkeys(stored.unwanted)
        self._obsolete = dict.fromkeys(obsolete)
        self._links = {name: _Link() for name in links}
        self._random = random
        self.failed = 0
        "SUBACKs and UNSUBACKs that said no, or did not come."

    @property
    def filters(self) -> list[str]:
        """All that are wanted, the fixed ones first."""
        return list(self._fixed | self._wanted)

    @property
    def stored(self) -> int:
        return len(self._wanted)

    def snapshot(self) -> Snapshot:
        return Snapshot(wanted=list(self._wanted), unwanted=list(self._unwanted))

    def want(self, topic_filter: str) -> bool:
        """The cloud asks for it. True: the intent changed, store it before `asks` is called."""
        for link in self._links.values():
            link.unsubscribed.discard(topic_filter)
            link.not_before.pop(topic_filter, None)
        if topic_filter in self._wanted:
            return False
        self._wanted[topic_filter] = None
        self._unwanted.pop(topic_filter, None)
        return True

    def unwant(self, topic_filter: str) -> bool:
        """The cloud does not want it any more. True: the intent changed, store it before `asks` is called."""
        for link in self._links.values():
            link.unsubscribed.discard(topic_filter)
            link.not_before.pop(topic_filter, None)
        changed = topic_filter in self._wanted or topic_filter not in self._unwanted
        self._wanted.pop(topic_filter, None)
        if topic_filter in self._fixed:
            return changed
        self._unwanted[topic_filter] = None
        return changed

    def connected(self, name: str, *, session_present: bool) -> bool:
        """A connection is open. Without its session the broker has forgotten all subscriptions.

        Returns whether the store has to be written.
        """
        link = self._links[name]
        link.is_connected = True
        link.asked.clear()
        link.not_before.clear()
        link.failures.clear()
        if not session_present:
            link.subscribed.clear()
            link.unsubscribed = set(self._unwanted) | set(self._obsolete)
        return self._drop_settled()

    def _drop_settled(self) -> bool:
        """Forget the unwanted filters that no broker has any more."""
        gone = [each for each in self._unwanted if all(each in link.unsubscribed for link in self._links.values())]
        for topic_filter in gone:
            del self._unwanted[topic_filter]
        return bool(gone)

    def disconnected(self, name: str) -> None:
        link = self._links[name]
        link.is_connected = False
        link.asked.clear()

    def is_complete(self, name: str) -> bool:
        """Whether the broker has confirmed everything that is wanted."""
        return self._links[name].subscribed >= (self._fixed | self._wanted).keys()

    def missing(self, name: str) -> int:
        """How many wanted filters the broker has not confirmed."""
        return len((self._fixed | self._wanted).keys() - self._links[name].subscribed)

    def asks(self, name: str, *, now: float) -> list[Ask]:
        """What to send to the broker now; report each with `sent`."""
        link = self._links[name]
        if not link.is_connected:
            return []
        self._time_out(link, now)
        busy = {ask.topic_filter for ask, _ in link.asked.values()}
        asks = []
        wanted = self._fixed | self._wanted
        for topic_filter in wanted:
            if topic_filter not in link.subscribed and self._may_ask(link, topic_filter, busy, now):
                asks.append(Ask(topic_filter, True))
        for topic_filter in self._unwanted | self._obsolete:
            if (
                topic_filter not in wanted
                and topic_filter not in link.unsubscribed
                and self._may_ask(link, topic_filter, busy, now)
            ):
                asks.append(Ask(topic_filter, False))
        return asks

    def _may_ask(self, link: _Link, topic_filter: str, busy: set[str], now: float) -> bool:
        return topic_filter not in busy and link.not_before.get(topic_filter, now) <= now

    def _time_out(self, link: _Link, now: float) -> None:
        late = [mid for mid, (_, sent) in link.asked.items() if now - sent >= ANSWER_SECONDS]
        for mid in late:
            ask, _ = link.asked.pop(mid)
            self._delay(link, ask.topic_filter, now)

    def _delay(self, link: _Link, topic_filter: str, now: float) -> None:
        self.failed += 1
        count = link.failures.get(topic_filter, 0)
        link.failures[topic_filter] = count + 1
        bound = min(RETRY_FIRST_SECONDS * 2 ** min(count, 10), RETRY_CAP_SECONDS)
        link.not_before[topic_filter] = now + self._random.uniform(bound / 2, bound)

    def sent(self, name: str, mid: int, ask: Ask, *, now: float) -> None:
        link = self._links[name]
        link.asked[mid] = (ask, now)
        link.not_before.pop(ask.topic_filter, None)

    def answered(self, name: str, mid: int, *, accepted: bool, now: float) -> tuple[Ask | None, bool]:
        """A SUBACK or UNSUBACK. Returns what it answers (None: nothing of this connection), and whether the store
        has to be written because an unwanted filter is gone everywhere."""
        link = self._links[name]
        ask, _ = link.asked.pop(mid, (None, 0.0))
        if ask is None:
            return None, False
        topic_filter = ask.topic_filter
        if not accepted:
            self._delay(link, topic_filter, now)
            return ask, False
        link.failures.pop(topic_filter, None)
        link.not_before.pop(topic_filter, None)
        if ask.subscribe:
            link.subscribed.add(topic_filter)
            link.unsubscribed.discard(topic_filter)
            return ask, False
        link.subscribed.discard(topic_filter)
        # It may have been wanted again meanwhile: then the next `asks` subscribes it.
        link.unsubscribed.add(topic_filter)
        return ask, self._drop_settled()

    def next_deadline(self, name: str) -> float | None:
        """When `asks` may have something new although nothing came."""
        link = self._links[name]
        if not link.is_connected:
            return None
        times = [sent + ANSWER_SECONDS for _, sent in link.asked.values()]
        times += link.not_before.values()
        return min(times, default=None)
