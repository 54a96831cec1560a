from __future__ import annotations

import struct
from pathlib import Path

import pytest

from bench.node import read_samples
from bench.relay import HEADER_BYTES, wire_bytes

ROLLUP = "Pss: 2048 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 1024 kB\n"


def stat(ticks: int) -> str:
    """A /proc/PID/stat with so much user time."""
    return f"7 (python) S {' '.join(['0'] * 10)} {ticks} 0 {' '.join(['0'] * 30)}"


def write_samples(directory: Path, pids: dict[str, int]) -> None:
    for name in ("stat.before", "stat.after", "rollup"):
        (directory / name).mkdir(parents=True)
    for pid in pids.values():
        (directory / "stat.before" / str(pid)).write_text(stat(100))
        (directory / "stat.after" / str(pid)).write_text(stat(130))
        (directory / "rollup" / str(pid)).write_text(ROLLUP)
    (directory / "uptime").write_text("1000.0\n1030.0\n")


def test_samples_become_memory_cpu_and_traffic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.memory._CLOCK_TICKS", 100)
    pids = {"broker": 7, "edgehub": 8}
    write_samples(tmp_path, pids)
    relay = tmp_path / "relay.txt"
    relay.write_text("1500\n2700\n")
    idle = read_samples(tmp_path, pids, relay_output=relay)
    assert idle.pss_mib == {"broker": 2.0, "edgehub": 2.0}
    assert idle.uss_mib == {"broker": 1.0, "edgehub": 1.0}
    assert idle.window_seconds == 30.0
    assert idle.cpu_percent_by_process == {"broker": pytest.approx(1.0), "edgehub": pytest.approx(1.0)}
    assert idle.cpu_percent == pytest.approx(2.0)
    assert idle.cloud_bytes == 1200
    assert idle.other_pythons == 0


def test_other_pythons_beside_the_node_are_counted(tmp_path: Path) -> None:
    write_samples(tmp_path, {"broker": 7})
    relay = tmp_path / "relay.txt"
    relay.write_text("0\n0\n")
    (tmp_path / "pythons").write_text("11\n12\n")
    assert read_samples(tmp_path, {"broker": 7}, relay_output=relay).other_pythons == 2


def test_samples_of_a_process_that_ended_are_an_error_and_no_zero(tmp_path: Path) -> None:
    write_samples(tmp_path, {"broker": 7})
    (tmp_path / "rollup" / "7").write_text("")
    relay = tmp_path / "relay.txt"
    relay.write_text("0\n0\n")
    with pytest.raises(ValueError, match="smaps_rollup has no"):
        read_samples(tmp_path, {"broker": 7}, relay_output=relay)


def test_bytes_on_the_wire_include_the_headers_of_every_segment() -> None:
    info = bytearray(256)
    struct.pack_into("=QQ", info, 120, 1000, 500)
    struct.pack_into("=II", info, 136, 10, 8)
    assert wire_bytes(bytes(info)) == 1500 + 18 * HEADER_BYTES
