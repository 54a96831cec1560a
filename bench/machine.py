"""Facts about the machine, and how much of it others used while we measured."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.memory import cpu_seconds, ticks_to_seconds


def facts() -> dict[str, Any]:
    """What a reader must know to compare figures."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "loadavg_at_start": list(os.getloadavg()),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def parse_busy_ticks(stat: str) -> int:
    """Clock ticks all cores together spent on something, from the text of /proc/stat (proc(5))."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) for word in stat.split()[1:9])
    return user + nice + system + irq + softirq + steal


class OthersCpu:
    """How much of the machine others used in a stretch of time.

    A context manager; `percent` (of all cores) is there afterwards. Our own share is this process, the children it has
    waited for, and those named as `living`; other children must have ended inside the stretch.
    """

    percent = 0.0

    def __init__(self, living: Iterable[int] = ()) -> None:
        """`living`: process ids of children that are there all the time. Leaving raises OSError when one is gone."""
        self._living = tuple(living)

    def __enter__(self) -> OthersCpu:
        self._started = time.monotonic()
        self._others = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9) * (os.cpu_count() or 1)
        self.percent = max(0.0, 100 * (self._now() - self._others) / seconds)

    def _now(self) -> float:
        ours = sum(map(cpu_seconds, self._living))
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            usage = resource.getrusage(who)
            ours += usage.ru_utime + usage.ru_stime
        return ticks_to_seconds(parse_busy_ticks(Path("/proc/stat").read_text())) - ours


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
