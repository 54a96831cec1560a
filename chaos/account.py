"""What was sent, accepted, and what became of it. A core: it counts what it is told, and reads no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Final

_MARGIN_SECONDS: Final = 0.5
"Between what happened to the MQTT broker or the link and when it was noticed."


@dataclass(slots=True)
class Counts:
    """One flow of one cell."""

    sent: int = 0
    accepted: int = 0
    arrived: int = 0
    "Distinct ones."
    stored: int = 0
    "Accepted, not arrived, and still in a file of the node."
    lost: int = 0
    "Accepted, not arrived, not stored."
    lost_by_mqtt: int = 0
    "Acknowledged to the device by an MQTT broker that was killed before the node had acknowledged it to the broker."
    cut: int = 0
    "Not stored, of a kind that nobody acknowledges, and on its way when the link was cut."
    duplicated: int = 0
    "Arrivals beyond the first."
    duplicated_marked: int = 0
    duplicated_in_window: int = 0
    "Not marked, of messages that were on their way at the harm."
    duplicated_unexplained: int = 0

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(slots=True)
class Flow:
    """Numbered messages of one kind in one cell. Times are seconds of the caller's clock."""

    sent_at: dict[str, float] = field(default_factory=dict)
    accepted_at: dict[str, float] = field(default_factory=dict)
    came_at: dict[str, list[float]] = field(default_factory=dict)
    ids: dict[str, list[str]] = field(default_factory=dict)
    "Message ids of the arrivals, where they have any."
    marked: dict[str, int] = field(default_factory=dict)
    "Arrivals that came with a mark."
    damaged: int = 0

    def send(self, key: str, now: float) -> None:
        self.sent_at.setdefault(key, now)

    def accept(self, key: str, now: float) -> None:
        self.accepted_at.setdefault(key, now)

    def arrive(self, key: str, now: float, *, message_id: str = "", is_marked: bool = False) -> None:
        self.came_at.setdefault(key, []).append(now)
        self.ids.setdefault(key, []).append(message_id)
        if is_marked:
            self.marked[key] = self.marked.get(key, 0) + 1

    def missing(self) -> list[str]:
        """Accepted and not arrived."""
        return sorted(self.accepted_at.keys() - self.came_at.keys())

    def is_mqtts(self, key: str, lost_until: Iterable[float]) -> bool:
        """Whether the message was accepted by an MQTT broker that lost all it had at one of those moments."""
        return any(self.accepted_at[key] <= until + _MARGIN_SECONDS for until in lost_until)

    def was_under_way(self, key: str, last_cut: float | None) -> bool:
        """Whether the message was sent before the link was cut for the last time."""
        return last_cut is not None and self.sent_at[key] <= last_cut + _MARGIN_SECONDS

    def counts(
        self,
        *,
        harm_at: float,
        over_at: float,
        window_seconds: float,
        stored: Collection[str] = (),
        node_has: Collection[str] | None = None,
        mqtt_has: Collection[str] | None = None,
        mqtt_lost_until: Iterable[float] = (),
        cuts: Iterable[float] = (),
    ) -> Counts:
        """The sums. `node_has`: what the node acknowledged to the MQTT broker; `mqtt_has`: what the broker acknowledged
        to the node; where that is known. `mqtt_lost_until`: for what the MQTT broker accepted until then, and did not
        hand over, it is to blame.
        `cuts`: when the link was cut, for a flow that is acknowledged to nobody.

        A repetition without a mark is within the window when the message was sent before the harm was over, and
        its first arrival was not longer than `window_seconds` before the harm: nobody could know that it had arrived.
        """
        counts = Counts(sent=len(self.sent_at), accepted=len(self.accepted_at), arrived=len(self.came_at))
        outages = list(mqtt_lost_until)
        last_cut = max(cuts, default=None)
        for key in self.missing():
            if key in stored:
                counts.stored += 1
            elif ((node_has is not None and key not in node_has) or (mqtt_has is not None and key in mqtt_has)) and (
                self.is_mqtts(key, outages)
            ):
                counts.lost_by_mqtt += 1
            elif self.was_under_way(key, last_cut):
                counts.cut += 1
            else:
                counts.lost += 1
        for key, times in self.came_at.items():
            again = len(times) - 1
            if not again:
                continue
            counts.duplicated += again
            same_id = len(self.ids[key]) - len(set(self.ids[key])) if self.ids[key][0] else 0
            marked = min(again, max(self.marked.get(key, 0), same_id))
            counts.duplicated_marked += marked
            if again > marked:
                sent = self.sent_at.get(key, over_at)
                if sent <= over_at and times[0] >= harm_at - window_seconds:
                    counts.duplicated_in_window += again - marked
                else:
                    counts.duplicated_unexplained += again - marked
        return counts


def percentile(values: Collection[float], share: float) -> float | None:
    """None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
