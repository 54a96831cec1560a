"""The results as a value, as the JSON document that checks read, and as tables. Pure.

The JSON (docs/benchmarks.md lists every key) holds medians at the top level, and under `ranges`,
`rounds` and `not_run` what is behind them. A contender that did not run is null, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.stats import Summary, ratio, summarise
from bench.table import NOT_RUN, cell, number, render

EDGEZMQ = "edgezmq"
NATS = "nats"
NATS_UVLOOP = "nats_uvloop"
MOSQUITTO = "mosquitto_qos1"

C_TO_C = "c_to_c"
GO_TO_GO = "go_to_go"
C_TO_PYTHON = "c_to_python"
PYTHON_TO_C = "python_to_c"
POLYGLOT: Mapping[str, str] = {
    EDGEZMQ: "Python → Python",
    C_TO_C: "C → C",
    GO_TO_GO: "Go → Go",
    C_TO_PYTHON: "C → Python",
    PYTHON_TO_C: "Python → C",
}
"Modules at both ends of our bus, by their languages, and how they are called in the table."

BUS_256 = "bus_256_msgs_per_s"
BUS_4096 = "bus_4096_msgs_per_s"
LATENCY_P50 = "bus_latency_p50_us"
LATENCY_P99 = "bus_latency_p99_us"
REQUEST_P50 = "request_p50_us"
REQUEST_P99 = "request_p99_us"
START = "start_to_connected_s"
UPLOADS = "uploads_confirmed_per_s"
DOWNLOADS = "downloads_per_s"
LINK_UPLOADS = "link_uploads_confirmed_per_s"
LINK_DOWNLOADS = "link_downloads_per_s"
NATIVE_UPLOADS = "native_uploads_confirmed_per_s"
LINK_UPLOADS_NATIVE_HUB = "link_uploads_confirmed_native_hub_per_s"
LINK_DOWNLOADS_NATIVE_HUB = "link_downloads_native_hub_per_s"
NATIVE_UPLOADS_NATIVE_HUB = "native_uploads_confirmed_native_hub_per_s"
EVENTBUS = "eventbus_confirmed_per_s"

WSS = "wss"
QUIC = "quic"

CLOUD_MEASURES: Mapping[str, str] = {
    UPLOADS: "uploads confirmed, module → cloudsim",
    DOWNLOADS: "downloads, cloudsim → module",
    LINK_UPLOADS: "uploads, edgehub's link alone → cloudsim",
    LINK_DOWNLOADS: "downloads, cloudsim → edgehub's link alone",
    NATIVE_UPLOADS: "uploads, Go node → cloudsim",
    LINK_UPLOADS_NATIVE_HUB: "uploads, edgehub's link alone → Go hub",
    LINK_DOWNLOADS_NATIVE_HUB: "downloads, Go hub → edgehub's link alone",
    NATIVE_UPLOADS_NATIVE_HUB: "uploads, Go node → Go hub",
}
"The measures of the cloud link, each over WSS and QUIC, and their names in the table."

CONTENDERS: Mapping[str, Sequence[str]] = {
    BUS_256: (*POLYGLOT, NATS, NATS_UVLOOP, MOSQUITTO),
    BUS_4096: (*POLYGLOT, NATS, NATS_UVLOOP, MOSQUITTO),
    LATENCY_P50: tuple(POLYGLOT),
    LATENCY_P99: tuple(POLYGLOT),
    REQUEST_P50: (EDGEZMQ, GO_TO_GO, PYTHON_TO_C, NATS, NATS_UVLOOP),
    REQUEST_P99: (EDGEZMQ, GO_TO_GO, PYTHON_TO_C, NATS, NATS_UVLOOP),
}
"The measures with peers, and who takes part. The client in C asks nobody, so it only answers."

LABELS: Mapping[str, str] = {
    BUS_256: "bus, one → one, 256 B, messages/s",
    BUS_4096: "bus, one → one, 4096 B, messages/s",
    LATENCY_P50: "one → one at 1000/s, p50, µs",
    LATENCY_P99: "one → one at 1000/s, p99, µs",
    REQUEST_P50: "request → reply, p50, µs",
    REQUEST_P99: "request → reply, p99, µs",
    START: "start to link served, warm, s",
    EVENTBUS: "MQTT QoS 1 → cloud, PUBACK after confirmation, messages/s",
}


@dataclass(frozen=True, slots=True)
class Idle:
    """One look at the idle node."""

    pss_mib: dict[str, float]
    "By process name."
    uss_mib: dict[str, float]
    window_seconds: float
    cpu_percent: float
    "Of one core, all processes of the node together, over the window."
    cpu_percent_by_process: dict[str, float]
    cloud_bytes: int | None
    "On the wire in both directions over the window, TCP and IP headers included; None: not measured."
    other_pythons: int
    "Python processes that were not the node's and may share pages with it, which makes PSS look smaller."


@dataclass(slots=True)
class Results:
    """What has been measured so far. `rounds[measure][contender]` grows by one value a round."""

    rounds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    "Contender or measure → why."
    arrived_short: dict[str, dict[str, int]] = field(default_factory=dict)
    "Measure → contender → messages that were sent and never arrived (at most once peers)."
    cpu_us_per_message: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    "Measure → contender → sender, receiver, server → one value a round."
    message_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    others_cpu_percent: list[float] = field(default_factory=list)
    "CPU that processes which are none of ours used during each round, in percent of the machine."
    edgehub_peak_mib: dict[str, float] = field(default_factory=dict)
    "By transport: the most that edgehub had resident through all measures of the cloud link."
    idle: Idle | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    def add(self, measure: str, contender: str, value: float) -> None:
        """Record one round."""
        self.rounds.setdefault(measure, {}).setdefault(contender, []).append(value)

    def summary(self, measure: str, contender: str = EDGEZMQ) -> Summary | None:
        """Median and range of a contender; None when it did not run."""
        return summarise(self.rounds.get(measure, {}).get(contender, []))


def as_json(results: Results) -> dict[str, Any]:
    """The document `--json` writes."""
    document: dict[str, Any] = {}
    ranges: dict[str, Any] = {}
    for measure, contenders in CONTENDERS.items():
        summaries = {contender: results.summary(measure, contender) for contender in contenders}
        document[measure] = {name: _rounded(summary) for name, summary in summaries.items()}
        ranges[measure] = {name: _range(summary) for name, summary in summaries.items()}
    for measure in CLOUD_MEASURES:
        summaries = {transport: results.summary(measure, transport) for transport in (WSS, QUIC)}
        document[measure] = {transport: _rounded(summary) for transport, summary in summaries.items()}
        ranges[measure] = {transport: _range(summary) for transport, summary in summaries.items()}
    document["edgehub_peak_mib"] = {name: _digits(peak) for name, peak in results.edgehub_peak_mib.items()}
    for measure in (START, EVENTBUS):
        summary = results.summary(measure)
        document[measure] = _rounded(summary)
        ranges[measure] = _range(summary)
    idle = results.idle
    document["idle_pss_mib"] = _with_node(idle.pss_mib) if idle else None
    document["idle_uss_mib"] = _with_node(idle.uss_mib) if idle else None
    document["idle_cpu_percent"] = round(idle.cpu_percent, 3) if idle else None
    document["idle_cpu_percent_by_process"] = _all_rounded(idle.cpu_percent_by_process, 3) if idle else None
    document["idle_window_s"] = round(idle.window_seconds, 1) if idle else None
    document["idle_cloud_bytes"] = idle.cloud_bytes if idle else None
    document["idle_other_pythons"] = idle.other_pythons if idle else None
    document["ranges"] = ranges
    document["rounds"] = {
        measure: {name: [_digits(value) for value in values] for name, values in by_contender.items()}
        for measure, by_contender in results.rounds.items()
    }
    document["message_counts"] = results.message_counts
    document["lost_by_at_most_once_peers"] = results.arrived_short
    document["cpu_us_per_message"] = {
        measure: {
            contender: {role: _rounded(summarise(values)) for role, values in roles.items()}
            for contender, roles in by_contender.items()
        }
        for measure, by_contender in results.cpu_us_per_message.items()
    }
    document["not_run"] = results.not_run
    document["machine"] = results.machine
    document["others_cpu_percent"] = [round(value, 1) for value in results.others_cpu_percent]
    return document


def as_text(results: Results) -> str:
    """The tables for the terminal."""
    parts = [
        _peer_table(results),
        _polyglot_table(results),
        _cpu_table(results),
        _cloud_table(results),
        _node_table(results),
    ]
    if results.not_run:
        parts.append("\n".join(f"not run: {what}: {why}" for what, why in results.not_run.items()))
    return "\n\n".join(part for part in parts if part)


def _peer_table(results: Results) -> str:
    rows = []
    for measure, contenders in CONTENDERS.items():
        if measure not in results.rounds or measure in (LATENCY_P50, LATENCY_P99):
            continue
        ours = results.summary(measure)
        by_name = {name: results.summary(measure, name) for name in contenders}
        rows.append(
            [
                LABELS[measure],
                *(cell(by_name[name]) if name in by_name else "–" for name in (EDGEZMQ, NATS, NATS_UVLOOP, MOSQUITTO)),
                *(_times(ratio(ours, by_name[peer])) if peer in contenders else "–" for peer in (NATS, MOSQUITTO)),
            ]
        )
    if not rows:
        return ""
    return render(
        ["median (range)", EDGEZMQ, NATS, "nats, uvloop", "mosquitto QoS 1", "÷ nats", "÷ mosquitto"],
        rows,
    )


def _polyglot_table(results: Results) -> str:
    rows = [
        [
            LABELS[measure],
            *(cell(results.summary(measure, name)) if name in contenders else "–" for name in POLYGLOT),
        ]
        for measure, contenders in CONTENDERS.items()
        if measure in results.rounds
    ]
    return render(["modules in other languages", *POLYGLOT.values()], rows) if rows else ""


def _cpu_table(results: Results) -> str:
    rows = []
    for measure, by_contender in results.cpu_us_per_message.items():
        if measure in CLOUD_MEASURES:
            continue
        for contender, roles in by_contender.items():
            cells = [cell(summarise(roles.get(role, []))) for role in ("sender", "server", "receiver")]
            rows.append([f"{LABELS.get(measure, measure)}: {contender}", *cells])
    return render(["CPU time, µs per message", "sender", "server", "receiver"], rows) if rows else ""


def _cloud_table(results: Results) -> str:
    roles = {"edgehub": ("edgehub", "node"), "cloud": ("cloudsim", "hub"), "broker": ("broker",), "module": ("module",)}
    rows = []
    for measure, label in CLOUD_MEASURES.items():
        for transport in results.rounds.get(measure, {}):
            spent = results.cpu_us_per_message.get(measure, {}).get(transport, {})
            costs = [summarise([value for name in names for value in spent.get(name, [])]) for names in roles.values()]
            rows.append(
                [
                    f"{label}, {transport}",
                    cell(results.summary(measure, transport)),
                    *("–" if cost is None else f"{cost.median:.1f}" for cost in costs),
                ]
            )
    for transport, peak in results.edgehub_peak_mib.items():
        rows.append([f"edgehub's peak memory, {transport}, MiB", f"{peak:.1f}", *("–" for _ in roles)])
    return render(["the cloud link", "messages/s", *(f"{role}, µs CPU" for role in roles)], rows) if rows else ""


def _node_table(results: Results) -> str:
    rows = [
        [LABELS[measure], cell(results.summary(measure))] for measure in (START, EVENTBUS) if measure in results.rounds
    ]
    if results.idle:
        idle = results.idle
        for name, pss in _with_node(idle.pss_mib).items():
            uss = _with_node(idle.uss_mib).get(name)
            rows.append(
                [f"idle memory of {name}, MiB PSS (USS)", f"{pss:.1f} ({NOT_RUN if uss is None else f'{uss:.1f}'})"]
            )
        rows.append(["idle CPU of the node, percent of one core", f"{idle.cpu_percent:.2f}"])
        if idle.cloud_bytes is not None:
            a_day = idle.cloud_bytes * 86400 / idle.window_seconds / 1e6
            rows.append(["idle traffic to and from the cloud, MB a day", number(a_day)])
        if idle.other_pythons:
            rows.append(["other Python processes beside the node (PSS then looks smaller)", str(idle.other_pythons)])
    return render(["the node", "median (range)"], rows) if rows else ""


def _times(value: float | None) -> str:
    return NOT_RUN if value is None else f"{value:.2f} ×"


def _digits(value: float) -> float:
    return round(value, 1) if abs(value) >= 100 else round(value, 4)


def _rounded(summary: Summary | None) -> float | None:
    return None if summary is None else _digits(summary.median)


def _range(summary: Summary | None) -> list[float] | None:
    return None if summary is None else [_digits(summary.low), _digits(summary.high)]


def _all_rounded(values: Mapping[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


def _with_node(values: Mapping[str, float]) -> dict[str, float]:
    return {**_all_rounded(values, 2), "node": round(sum(values.values()), 2)}
