"""What the kernel says of a process: memory from smaps_rollup, CPU time from stat. Parsing is pure."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

KIB_PER_MIB = 1024

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Memory:
    """PSS: own pages, and of each shared page its share. USS: own pages alone. In MiB."""

    pss_mib: float
    uss_mib: float


def parse_smaps_rollup(text: str) -> Memory:
    """The memory in the text of a /proc/PID/smaps_rollup. Raises ValueError when a field is missing."""
    fields: dict[str, int] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        words = value.split()
        if colon and len(words) == 2 and words[1] == "kB":
            fields[key] = int(words[0])
    try:
        private = fields["Private_Clean"] + fields["Private_Dirty"]
        return Memory(fields["Pss"] / KIB_PER_MIB, private / KIB_PER_MIB)
    except KeyError as missing:
        raise ValueError(f"smaps_rollup has no {missing.args[0]}") from missing


def parse_peak_mib(text: str) -> float:
    """The most memory a process has had resident, from the text of a /proc/PID/status. Raises ValueError."""
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / KIB_PER_MIB
    raise ValueError("status has no VmHWM")


def parse_cpu_ticks(stat: str) -> int:
    """User and system time in clock ticks, from the text of a /proc/PID/stat."""
    # The command in parentheses may hold spaces and parentheses itself; fields 14 and 15 follow the last one (proc(5)).
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def cpu_seconds(pid: int) -> float:
    """CPU time a living process has used. Raises OSError when it is gone."""
    return parse_cpu_ticks(Path(f"/proc/{pid}/stat").read_text()) / _CLOCK_TICKS


def peak_mib(pid: int) -> float:
    """The most memory a living process has had resident, pages it shares included. Raises OSError when it is gone."""
    return parse_peak_mib(Path(f"/proc/{pid}/status").read_text())


def ticks_to_seconds(ticks: int) -> float:
    return ticks / _CLOCK_TICKS
