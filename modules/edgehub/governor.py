"""How fast messages may go up: a token bucket for each class, and a ramp for the backlog after an outage.

When a cloud comes back, every node has a backlog and all of them want to be rid of it at once. So after an outage
the data class begins at a modest rate, which doubles again and again until nothing limits it any more. Signals
are never ramped: there are few of them, and they are what the cloud waits for.
"""

from __future__ import annotations

import math
import random
from typing import Final

from modules.edgehub.outbox import Class
from modules.edgehub.window import TokenBucket

DOUBLING_SECONDS: Final = 1.0
"The ramp's rate doubles in this time, more or less: see JITTER."
JITTER: Final = 0.25
"Each ramp is by up to so much steeper or flatter than the last one, so that nodes do not climb in step."


class Ramp:
    """A rate that grows from `start_rate` messages a second, for `seconds`; then there is no limit.

    `begin` after an outage. Between two ramps nothing is limited. `seconds` 0: never a limit.
    """

    def __init__(self, chance: random.Random, *, start_rate: float, seconds: float) -> None:
        self._chance = chance
        self._start_rate = start_rate
        self._seconds = seconds
        self._began: float | None = None
        self._rate = start_rate
        self._doubling = DOUBLING_SECONDS
        self._used = 0

    def begin(self, *, now: float) -> None:
        """The link is open again; a backlog waits."""
        if self._seconds <= 0:
            return
        self._began = now
        self._rate = self._start_rate * self._chance.uniform(1 - JITTER, 1 + JITTER)
        self._doubling = DOUBLING_SECONDS * self._chance.uniform(1 - JITTER, 1 + JITTER)
        self._used = 0

    def is_active(self, *, now: float) -> bool:
        if self._began is not None and now - self._began >= self._seconds:
            self._began = None
        return self._began is not None

    def rate(self, *, now: float) -> float | None:
        """Messages a second that are allowed now; None: no limit."""
        if not self.is_active(now=now) or self._began is None:
            return None
        return self._rate * math.exp2((now - self._began) / self._doubling)

    def available(self, *, now: float) -> int | None:
        """Messages that may go now; None: without limit."""
        if not self.is_active(now=now) or self._began is None:
            return None
        # The integral of the rate since `begin`.
        scale = self._rate * self._doubling / math.log(2.0)
        allowed = scale * (math.exp2((now - self._began) / self._doubling) - 1.0)
        return max(0, int(allowed - self._used + 1e-6))

    def take(self, count: int) -> None:
        self._used += count

    def next_at(self) -> float | None:
        """When the next message may go; None: no limit."""
        if self._began is None:
            return None
        scale = self._rate * self._doubling / math.log(2.0)
        due = self._began + self._doubling * math.log2(1.0 + (self._used + 1) / scale)
        return min(due, self._began + self._seconds)


class Pace:
    """What the buckets and the ramp allow, by class."""

    def __init__(self, signals: TokenBucket, data: TokenBucket, ramp: Ramp) -> None:
        self._buckets = (signals, data)
        self.ramp = ramp

    def available(self, kind: Class, *, now: float) -> int | None:
        """Messages of the class that may go now; None: without limit."""
        available = self._buckets[kind].available(now=now)
        if kind is Class.DATA:
            ramped = self.ramp.available(now=now)
            if ramped is not None:
                available = ramped if available is None else min(available, ramped)
        return available

    def take(self, signals: int, data: int) -> None:
        self._buckets[Class.SIGNAL].take(signals)
        self._buckets[Class.DATA].take(data)
        self.ramp.take(data)

    def next_at(self, kind: Class) -> float | None:
        """When the next message of the class may go; None: without limit. After `available` only."""
        dues = [self._buckets[kind].next_at()]
        if kind is Class.DATA:
            dues.append(self.ramp.next_at())
        return max((due for due in dues if due is not None), default=None)
