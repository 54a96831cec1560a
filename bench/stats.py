"""What the rounds of a measurement say together: median, range, percentiles. Pure.

A contender that did not run has no values; nothing here turns that into a zero.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIN_PROBE_SECONDS = 0.05
"A probe shorter than this says nothing of the rate; it is taken to have lasted this long."


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and range of one contender's rounds, in the unit of the measure."""

    median: float
    low: float
    high: float
    rounds: int


def summarise(values: Sequence[float]) -> Summary | None:
    """The summary of the rounds that ran; None when none did."""
    if not values:
        return None
    return Summary(statistics.median(values), min(values), max(values), len(values))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed (nearest rank).

    Raises ValueError without values or with a share outside 0 to 1.
    """
    if not values:
        raise ValueError("percentile of no values")
    if not 0 <= share <= 1:
        raise ValueError(f"share {share!r} is not between 0 and 1")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def count_for(probe_count: int, probe_seconds: float, target_seconds: float, *, least: int, most: int) -> int:
    """How many messages take about `target_seconds`, from a probe of `probe_count` of them."""
    rate = probe_count / max(probe_seconds, MIN_PROBE_SECONDS)
    return max(least, min(most, round(rate * target_seconds)))


def ratio(ours: Summary | None, theirs: Summary | None) -> float | None:
    """Our median over theirs; None when one of the two did not run."""
    if ours is None or theirs is None or theirs.median == 0:
        return None
    return ours.median / theirs.median


def per_day(amount: float, window_seconds: float) -> float:
    """What `amount` in a window of that many seconds comes to in a day."""
    return amount * 86400 / window_seconds
