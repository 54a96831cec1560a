"""What was sent and what became of it. A core: it counts what it is told, and reads no clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Traffic:
    """Numbered messages of one direction: which were sent, and how often each one got there."""

    sent_at: dict[int, float] = field(default_factory=dict)
    "When each number was sent first; seconds of the caller's clock."
    came: dict[int, int] = field(default_factory=dict)
    "How often each number came."

    def send(self, number: int, now: float) -> None:
        """Repeating a number changes nothing: it is still one message."""
        self.sent_at.setdefault(number, now)

    def arrive(self, number: int) -> None:
        """Numbers that were never sent are not counted."""
        if number in self.sent_at:
            self.came[number] = self.came.get(number, 0) + 1

    @property
    def sent(self) -> int:
        return len(self.sent_at)

    @property
    def arrived(self) -> int:
        """Distinct ones."""
        return len(self.came)

    @property
    def lost(self) -> int:
        return self.sent - self.arrived

    @property
    def duplicated(self) -> int:
        """Arrivals beyond the first of each number."""
        return sum(self.came.values()) - len(self.came)

    def missing(self) -> list[int]:
        return sorted(self.sent_at.keys() - self.came.keys())

    def arrived_since(self, moment: float, numbers: Iterable[int]) -> bool:
        """Whether one of `numbers` was sent after `moment`."""
        return any(self.sent_at.get(number, moment) > moment for number in numbers)


@dataclass(slots=True)
class Kill:
    """One process killed on purpose. Times are seconds of the caller's clock."""

    program: str
    old_pid: int
    at: float
    new_pid: int = 0
    "0: no new process has shown yet."
    back_at: float = 0.0
    "When the new process was there."
    served_at: float = 0.0
    "When the first message that was sent after the kill had come through."

    @property
    def is_over(self) -> bool:
        return bool(self.new_pid and self.served_at)


@dataclass(slots=True)
class Tally:
    """Both directions and the kills: everything the last line tells."""

    uploads: Traffic = field(default_factory=Traffic)
    commands: Traffic = field(default_factory=Traffic)
    "`came` counts the device's answers that reached the cloud."
    at_device: Traffic = field(default_factory=Traffic)
    "The same commands, as the device gets them: a repeated one comes twice."
    kills: list[Kill] = field(default_factory=list)

    @property
    def current_kill(self) -> Kill | None:
        """The last one, while it is not over."""
        return self.kills[-1] if self.kills and not self.kills[-1].is_over else None

    def is_complete(self, kills: int) -> bool:
        """All has arrived, and `kills` kills have been made and recovered from."""
        return not self.uploads.lost and not self.commands.lost and self.recovered == kills

    @property
    def recovered(self) -> int:
        return sum(kill.is_over for kill in self.kills)

    def line(self) -> str:
        """The last line of the demo; its form is fixed, for programs to read."""
        up, down = self.uploads, self.commands
        return (
            f"uploads sent={up.sent} arrived={up.arrived} lost={up.lost} duplicated={up.duplicated} "
            f"commands sent={down.sent} answered={down.arrived} lost={down.lost} "
            f"duplicated={self.at_device.duplicated} kills={self.recovered}"
        )
