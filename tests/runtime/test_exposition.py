"""runtime.exposition: valid Prometheus text of everything, with bounded labels, documented and drawn."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from modules.edgehub.session import LinkState
from runtime.emp import REPLY, Priority
from runtime.exposition import (
    LINK_STATES,
    MAX_LANES,
    MAX_REASONS,
    METRICS,
    Facts,
    ProgramFacts,
    Samples,
    bounded,
    escape,
    render,
)
from tests.support.bus_pair import DATA, BrokerRoom

ROOT = Path(__file__).parents[2]

SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (-?[0-9.e+-]+)')

EDGEHUB = {
    "link_state": 3,
    "link_up": 1,
    "link_served": 1,
    "rtt_us": 1500,
    "accepted": 10,
    "restored": 2,
    "confirmed": 7,
    "held": 2,
    "dropped": 3,
    "dropped_too-old": 2,
    "dropped_outbox-full": 1,
    "given_up": 0,
    "waiting_signals": 1,
    "waiting_data": 5,
}


def bus() -> dict[str, Any]:
    """The status of a broker that has seen some of everything, from the broker's own core."""
    room = BrokerRoom(declared={"edgehub": ["hub"], "eventbus": []})
    hub, source, guest = room.peer("edgehub", groups=["hub"]), room.peer("eventbus"), room.peer("status-123")
    source.send("@hub", 1, 3)
    source.send("nobody", 1)
    guest.send("edgehub", 1)
    room.pass_time(0.003)
    hub.ack_all()
    status = room.core.statistics(room.now)
    for module in status["modules"]:
        module["counters"] = {"edgehub": EDGEHUB, "eventbus": {"mqtt_connected": 1, "mqtt_broker_dropped": 4}}.get(
            module["name"], {}
        )
    return status


def facts(status: dict[str, Any] | None = None) -> Facts:
    programs = [
        ProgramFacts("broker", "RUNNING", resident_bytes=2**24, cpu_seconds=1.5),
        ProgramFacts("cam", "FATAL", restarts=7, storms=1, in_storm=True, aborts=2, kills=1, revivals=3),
    ]
    return Facts("1.0", "3.11.7", "edge-1", status, True, programs)


def samples(text: str) -> dict[str, float]:
    """Every sample by its name and labels as written."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match, line
            key = match[1] + (f"{{{match[2]}}}" if match[2] else "")
            assert key not in found, f"twice: {key}"
            found[key] = float(match[3])
    return found


def test_every_line_is_valid_and_every_metric_has_its_help_and_type_once_and_its_samples_together() -> None:
    text = render(facts(bus()))
    assert text.endswith("\n")
    assert samples(text)
    order = []
    for line in text.splitlines():
        if line.startswith("# HELP "):
            order.append(line.split()[2])
        elif line.startswith("# TYPE "):
            assert line.split()[2] == order[-1]
            assert line.split()[3] in ("counter", "gauge", "histogram")
        else:
            name = re.split(r"[{ ]", line)[0]
            assert name == order[-1] or name in {f"{order[-1]}_{part}" for part in ("bucket", "sum", "count")}
    assert len(order) == len(set(order))


def test_a_node_that_has_seen_some_of_everything_has_every_metric() -> None:
    told = {line.split()[2] for line in render(facts(bus())).splitlines() if line.startswith("# TYPE ")}
    not_yet = {"edgezmq_broker_refused_frames_total"}  # nobody broke the protocol
    assert told == {metric.name for metric in METRICS} - not_yet


def test_a_broker_that_does_not_answer_leaves_the_watchdogs_own_metrics() -> None:
    found = samples(render(facts(None)))
    assert found["edgezmq_broker_up"] == 0
    assert found['edgezmq_program_fatal{program="cam"}'] == 1
    assert not any(name.startswith("edgezmq_module") for name in found)


def test_the_figures_are_those_of_the_broker_and_of_edgehub() -> None:
    found = samples(render(facts(bus())))
    assert found['edgezmq_lane_accepted_messages_total{sender="eventbus",destination="@hub",priority="data"}'] == 3
    assert found['edgezmq_lane_missing_messages{sender="eventbus",destination="@hub",priority="data"}'] == 0
    assert found['edgezmq_module_delivered_messages_total{module="edgehub"}'] == 4
    assert found['edgezmq_module_refused_messages_total{module="eventbus",reason="unroutable"}'] == 1
    assert found['edgezmq_module_state{module="edgehub",state="attached"}'] == 1
    assert found['edgezmq_cloud_link_state{state="served"}'] == 1
    assert found["edgezmq_cloud_link_round_trip_seconds"] == 0.0015
    assert found['edgezmq_outbox_dropped_messages_total{reason="too-old"}'] == 2
    assert found["edgezmq_outbox_missing_messages"] == 0
    assert found['edgezmq_mqtt_broker_dropped_messages_total{server="mqtt"}'] == 4
    assert found['edgezmq_watchdog_actions_total{program="cam",action="revive"}'] == 3


def test_histogram_buckets_are_cumulative_and_end_with_all() -> None:
    found = samples(render(facts(bus())))
    name = "edgezmq_module_latency_seconds"
    buckets = [value for key, value in found.items() if key.startswith(f'{name}_bucket{{module="edgehub"')]
    assert buckets == sorted(buckets)
    assert buckets[0] == 0  # 3 ms are more than 1 ms …
    assert buckets[1] == 4  # … and less than 5 ms
    assert found[f'{name}_bucket{{module="edgehub",le="+Inf"}}'] == found[f'{name}_count{{module="edgehub"}}'] == 4
    assert found[f'{name}_sum{{module="edgehub"}}'] == pytest.approx(0.012)


def test_names_that_nobody_declared_are_summed_up() -> None:
    room = BrokerRoom(declared={"edgehub": []})
    for number in range(300):
        room.peer(f"status-{number}").send("edgehub", 1)
    text = render(facts(room.core.statistics(room.now)))
    assert "status-" not in text
    found = samples(text)
    assert found['edgezmq_lane_accepted_messages_total{sender="other",destination="edgehub",priority="data"}'] == 300
    assert found['edgezmq_module_queued_messages{module="other"}'] == 0


def test_label_values_are_bounded_whatever_modules_invent() -> None:
    room = BrokerRoom(declared={"edgehub": [], "s": []})
    sender = room.peer("s")
    for number in range(MAX_LANES + 50):
        sender.send(f"@group{number}", 1)
    status = room.core.statistics(room.now)
    for module in status["modules"]:
        module["refused"] = {f"reason-{number}": number for number in range(1000)}
    found = samples(render(facts(status)))
    assert sum(key.startswith("edgezmq_lane_held_messages") for key in found) <= MAX_LANES + 1
    refused = {key: value for key, value in found.items() if 'refused_messages_total{module="s"' in key}
    assert len(refused) == MAX_REASONS
    assert sum(refused.values()) == sum(range(1000))


def test_bounding_keeps_the_largest_and_the_sum() -> None:
    assert bounded({"a": 1, "b": 5, "c": 2}, 3) == {"a": 1, "b": 5, "c": 2}
    assert bounded({"a": 1, "b": 5, "c": 2, "d": 3}, 3) == {"b": 5, "d": 3, "other": 3}


def test_label_values_are_escaped() -> None:
    assert escape('a"b\\c\nd') == 'a\\"b\\\\c\\nd'
    status = bus()
    status["modules"][0]["counters"] = {'odd "name"\n\\': 1}
    assert 'counter="odd \\"name\\"\\n\\\\"' in render(facts(status))
    assert samples(render(facts(status)))


def test_a_sample_that_is_not_in_the_list_or_has_other_labels_is_a_bug() -> None:
    with pytest.raises(KeyError):
        Samples().add("edgezmq_unheard_of", 1)
    with pytest.raises(ValueError):
        Samples().add("edgezmq_program_running", 1)


def test_its_tables_are_those_of_the_code_they_speak_of() -> None:
    assert tuple(state.value for state in LinkState) == LINK_STATES
    for priority in Priority:
        room = BrokerRoom(declared={"a": [], "b": []})
        peer, other = room.peer("a"), room.peer("b")
        as_reply: dict[str, Any] = (
            {"flags": REPLY, "requester": other.incarnation} if priority is Priority.REPLY else {}
        )
        peer.send("b", 1, priority=priority, **as_reply)
        assert f'priority="{priority.name.lower()}"' in render(facts(room.core.statistics(room.now)))
    assert DATA == Priority.DATA


def test_the_page_lists_every_metric_with_its_type_and_labels() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(edgezmq_\w+)` \| (\w+) \| ([^|]*) \| ([^|]+) \|$", text, re.MULTILINE)
    assert [(name, kind, tuple(re.findall(r"`(\w+)`", labels)), said.strip()) for name, kind, labels, said in rows] == [
        (metric.name, metric.kind, metric.labels, metric.help) for metric in METRICS
    ]


def test_the_dashboard_is_json_and_asks_only_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(expressions) > 15
    known = {metric.name for metric in METRICS}
    known |= {f"{m.name}_{part}" for m in METRICS if m.kind == "histogram" for part in ("bucket", "sum", "count")}
    for expression in expressions:
        named = set(re.findall(r"edgezmq_\w+", expression))
        assert named, expression
        assert named <= known, expression
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_promtool_finds_nothing_wrong() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=render(facts(bus())), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
