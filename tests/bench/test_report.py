from __future__ import annotations

import json

from bench import report
from bench.report import Idle, Results, as_json, as_text


def idle() -> Idle:
    return Idle(
        pss_mib={"broker": 13.0, "edgehub": 20.5},
        uss_mib={"broker": 9.0, "edgehub": 15.0},
        window_seconds=20.0,
        cpu_percent=0.4,
        cpu_percent_by_process={"broker": 0.1, "edgehub": 0.3},
        cloud_bytes=900,
        other_pythons=0,
    )


def test_the_document_has_every_key_that_checks_read_even_when_nothing_ran() -> None:
    document = as_json(Results())
    assert document["bus_256_msgs_per_s"] == {
        "edgezmq": None,
        "nats": None,
        "nats_uvloop": None,
        "mosquitto_qos1": None,
        "c_to_c": None,
        "go_to_go": None,
        "c_to_python": None,
        "python_to_c": None,
    }
    assert document["bus_4096_msgs_per_s"].keys() == document["bus_256_msgs_per_s"].keys()
    assert document["request_p50_us"] == {
        "edgezmq": None,
        "nats": None,
        "nats_uvloop": None,
        "go_to_go": None,
        "python_to_c": None,
    }
    assert document["bus_latency_p50_us"].keys() == {"edgezmq", "c_to_c", "go_to_go", "c_to_python", "python_to_c"}
    assert document["request_p99_us"].keys() == document["request_p50_us"].keys()
    for key in ("idle_pss_mib", "start_to_connected_s", "eventbus_confirmed_per_s", "idle_cpu_percent"):
        assert document[key] is None
    for key in ("uploads_confirmed_per_s", "downloads_per_s", "native_uploads_confirmed_per_s"):
        assert document[key] == {"wss": None, "quic": None}
    assert {"ranges", "machine", "not_run", "idle_cloud_bytes"} <= document.keys()


def test_the_document_gives_medians_and_ranges() -> None:
    results = Results()
    for value in (300.0, 100.0, 200.0):
        results.add(report.BUS_256, report.EDGEZMQ, value)
        results.add(report.START, report.EDGEZMQ, value / 100)
    document = as_json(results)
    assert document["bus_256_msgs_per_s"]["edgezmq"] == 200.0
    assert document["ranges"]["bus_256_msgs_per_s"]["edgezmq"] == [100.0, 300.0]
    assert document["start_to_connected_s"] == 2.0
    assert document["rounds"]["bus_256_msgs_per_s"]["edgezmq"] == [300.0, 100.0, 200.0]


def test_modules_in_other_languages_have_a_table_and_what_is_not_measured_of_them_a_dash() -> None:
    results = Results()
    results.add(report.REQUEST_P50, report.EDGEZMQ, 600.0)
    results.add(report.REQUEST_P50, report.PYTHON_TO_C, 400.0)
    table = as_text(results).split("\n\n")[1]
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[2:-1]] == ["600", "–", "not run", "–", "400"]


def test_the_cloud_link_has_figures_for_each_transport() -> None:
    results = Results(edgehub_peak_mib={"wss": 41.25})
    results.add(report.UPLOADS, report.WSS, 50_000.0)
    results.add(report.UPLOADS, report.WSS, 60_000.0)
    results.add(report.NATIVE_UPLOADS, report.QUIC, 7_000.0)
    results.cpu_us_per_message[report.UPLOADS] = {"wss": {"edgehub": [8.0, 9.0], "cloudsim": [7.0, 7.0]}}
    results.cpu_us_per_message[report.NATIVE_UPLOADS] = {"quic": {"node": [31.25]}}
    document = as_json(results)
    assert document["uploads_confirmed_per_s"] == {"wss": 55_000.0, "quic": None}
    assert document["ranges"]["uploads_confirmed_per_s"]["wss"] == [50_000.0, 60_000.0]
    assert document["edgehub_peak_mib"] == {"wss": 41.25}
    assert document["cpu_us_per_message"]["uploads_confirmed_per_s"]["wss"]["edgehub"] == 8.5
    ours, native, peak = (
        " ".join(line.split())
        for line in as_text(results).splitlines()
        if line.rstrip().endswith("|") and "," in line
        if "µs CPU" not in line
    )
    assert "wss | 55 000 (50 000 – 60 000) | 8.5 | 7.0 | – | – |" in ours
    assert "quic | 7 000" in native
    assert "31.2" in native
    assert "wss, MiB | 41.2 |" in peak


def test_the_node_is_the_sum_of_its_processes() -> None:
    assert as_json(Results(idle=idle()))["idle_pss_mib"] == {"broker": 13.0, "edgehub": 20.5, "node": 33.5}


def test_the_document_is_json() -> None:
    results = Results(idle=idle(), machine={"cores": 2})
    results.add(report.REQUEST_P50, report.NATS, 446.2)
    assert json.loads(json.dumps(as_json(results)))["request_p50_us"]["nats"] == 446.2


def test_the_table_says_not_run_and_never_zero_for_a_peer_that_is_missing() -> None:
    results = Results(not_run={report.NATS: "nats-server is not installed"})
    results.add(report.BUS_256, report.EDGEZMQ, 250_000.0)
    text = as_text(results)
    assert "250 000" in text
    assert "not run: nats: nats-server is not installed" in text
    row = next(line for line in text.splitlines() if line.startswith("| bus, one → one, 256 B"))
    assert row.count("not run") == 5  # three peers and both ratios


def test_the_table_compares_with_each_peer() -> None:
    results = Results()
    results.add(report.BUS_256, report.EDGEZMQ, 300_000.0)
    results.add(report.BUS_256, report.NATS, 150_000.0)
    results.add(report.BUS_256, report.MOSQUITTO, 12_000.0)
    row = next(line for line in as_text(results).splitlines() if "256 B" in line)
    assert "2.00 ×" in row
    assert "25.0" in row


def test_the_table_shows_idle_memory_and_daily_traffic() -> None:
    text = " ".join(as_text(Results(idle=idle())).split())
    assert "idle memory of node, MiB PSS (USS) | 33.5 (24.0)" in text
    assert "3.89" in text  # MB a day
