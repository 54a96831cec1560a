from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import polyglot, report
from tests.support.deadline import DEADLINE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.processes
def test_a_quick_run_measures_our_bus_and_writes_the_json(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench", "--quick", "--only", "request", "--contender", "edgezmq"]
    run = subprocess.run(
        [*command, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=3 * DEADLINE, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(out.read_text())
    assert document["request_p50_us"]["edgezmq"] > 0
    assert document["request_p99_us"]["edgezmq"] >= document["request_p50_us"]["edgezmq"]
    assert document["request_p50_us"]["nats"] is None
    assert document["bus_256_msgs_per_s"]["edgezmq"] is None
    assert "request → reply, p50" in run.stdout


@pytest.mark.processes
def test_a_quick_run_measures_the_cloud_link_over_both_transports(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", "--only", "cloud", "--no-native", "--json", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=6 * DEADLINE,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(out.read_text())
    for transport in ("wss", "quic"):
        for measure in ("uploads_confirmed_per_s", "downloads_per_s", "link_uploads_confirmed_per_s"):
            assert document[measure][transport] > 0
        assert document["cpu_us_per_message"]["uploads_confirmed_per_s"][transport].keys() == {
            *("edgehub", "broker", "cloudsim", "module")
        }
        assert document["edgehub_peak_mib"][transport] > 0
        assert document["native_uploads_confirmed_per_s"][transport] is None


@pytest.mark.processes
@pytest.mark.parametrize("contender", [report.C_TO_PYTHON, report.GO_TO_GO])
def test_a_quick_run_measures_modules_in_other_languages(contender: str, tmp_path: Path) -> None:
    languages = {report.C_TO_PYTHON: polyglot.C, report.GO_TO_GO: polyglot.GO}
    if why := polyglot.missing(languages[contender]):
        pytest.skip(why)
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench", "--quick", "--only", "latency", "--contender", contender]
    run = subprocess.run(
        [*command, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=3 * DEADLINE, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(out.read_text())
    assert document["bus_latency_p99_us"][contender] >= document["bus_latency_p50_us"][contender] > 0
    assert document["cpu_us_per_message"]["bus_latency_p50_us"][contender].keys() == {"sender", "server", "receiver"}


@pytest.mark.processes
def test_an_unknown_measure_is_refused_with_the_ones_there_are() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "bench", "--only", "nothing"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "bus" in run.stderr
    assert "idle" in run.stderr
