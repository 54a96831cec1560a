from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.machine import OthersCpu, parse_busy_ticks
from bench.memory import Memory, cpu_seconds, parse_cpu_ticks, parse_peak_mib, parse_smaps_rollup

ROLLUP = """\
55d0c1a4c000-7ffd3a9e5000 ---p 00000000 00:00 0                          [rollup]
Rss:               15360 kB
Pss:               10240 kB
Pss_Dirty:          4096 kB
Shared_Clean:       6144 kB
Shared_Dirty:          0 kB
Private_Clean:      1024 kB
Private_Dirty:      4096 kB
"""


def test_pss_and_uss_are_read_in_mib() -> None:
    assert parse_smaps_rollup(ROLLUP) == Memory(pss_mib=10.0, uss_mib=5.0)


def test_the_peak_is_the_most_that_was_ever_resident() -> None:
    assert parse_peak_mib("Name:\tpython\nVmHWM:\t   20480 kB\nVmRSS:\t   10240 kB\n") == 20.0
    with pytest.raises(ValueError, match="VmHWM"):
        parse_peak_mib("Name:\tkthread\n")


def test_a_rollup_without_its_fields_is_an_error() -> None:
    with pytest.raises(ValueError, match="Private_Clean"):
        parse_smaps_rollup("Pss: 1 kB\n")


def test_cpu_time_survives_a_process_name_with_spaces_and_parentheses() -> None:
    fields = " ".join(str(number) for number in range(3, 53))
    assert parse_cpu_ticks(f"42 (tmux: (server) x) {fields}") == 14 + 15


def test_our_own_cpu_time_can_be_read() -> None:
    assert cpu_seconds(os.getpid()) > 0


def test_idle_and_waiting_are_not_busy() -> None:
    assert parse_busy_ticks("cpu  1 2 4 1000 2000 8 16 32 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n") == 1 + 2 + 4 + 8 + 16 + 32


def test_what_children_that_live_on_use_is_not_others_cpu() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            with OthersCpu() as with_child, OthersCpu([child.pid]) as without:
                before = cpu_seconds(child.pid)
                while cpu_seconds(child.pid) < before + 0.2:
                    pass
        finally:
            child.kill()
    assert without.percent < with_child.percent
