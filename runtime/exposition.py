"""What `/metrics` says, as Prometheus text (version 0.0.4); a pure core, documented in docs/metrics.md.

`METRICS` is the list of all there is; `render` makes the text of what the broker, supervisord and the kernel know.
Label values are bounded: names that nobody declared and supervisord does not run are summed up as `other`, and so
are reasons beyond the 32 most frequent of a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

OTHER: Final = "other"
"Stands for all that is not named."
MAX_REASONS: Final = 32
MAX_LANES: Final = 256
MAX_COUNTERS: Final = 256
"Of one module, as EMP allows (docs/emp.md, PING)."

MODULE_STATES: Final = ("attached", "draining", "silent", "absent")
LINK_STATES: Final = ("closed", "dialling", "greeting", "served", "unproven", "draining", "stopped")
"In the order of edgehub's counter `link_state`."

_PRIORITIES: Final = {0: "reply", 1: "request", 2: "signal", 3: "data"}


class Metric(NamedTuple):
    """One metric: `kind` is counter, gauge or histogram."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


_MODULE: Final = ("module",)
_LANE: Final = ("sender", "destination", "priority")
_PROGRAM: Final = ("program",)

METRICS: Final = (
    Metric("edgezmq_build_info", "gauge", "Always 1; what runs is in the labels.", ("version", "python", "node")),
    # The broker as a whole.
    Metric("edgezmq_broker_up", "gauge", "1 when the broker answered this scrape."),
    Metric("edgezmq_broker_uptime_seconds", "gauge", "Since the broker's start; its counters begin with it."),
    Metric("edgezmq_broker_held_messages", "gauge", "Messages in the broker, not settled."),
    Metric("edgezmq_broker_held_bytes", "gauge", "Bytes of them."),
    Metric("edgezmq_broker_byte_budget_bytes", "gauge", "Above it senders wait."),
    Metric("edgezmq_broker_retained_messages", "gauge", "Retained messages."),
    Metric("edgezmq_broker_waiting_senders", "gauge", "Senders that wait for room in the byte budget."),
    Metric("edgezmq_broker_resyncs_total", "counter", "How often the broker asked a peer who it is (WHO)."),
    Metric("edgezmq_broker_refused_frames_total", "counter", "Frames and connections refused, by code.", ("code",)),
    # One module's mailbox.
    Metric("edgezmq_module_state", "gauge", "1 for the state the module is in on the bus.", ("module", "state")),
    Metric("edgezmq_module_queued_messages", "gauge", "Waiting for the module in the broker.", _MODULE),
    Metric("edgezmq_module_queued_bytes", "gauge", "Waiting for it or in its hands.", _MODULE),
    Metric("edgezmq_module_in_flight_messages", "gauge", "Delivered, not acknowledged.", _MODULE),
    Metric("edgezmq_module_oldest_message_seconds", "gauge", "Age of the oldest message for the module.", _MODULE),
    Metric("edgezmq_module_suspect_lanes", "gauge", "Lanes on whose messages the module died repeatedly.", _MODULE),
    Metric("edgezmq_module_paced_messages", "gauge", "Its own, that wait for its quota.", _MODULE),
    Metric("edgezmq_module_last_heard_seconds", "gauge", "Since the last frame of the module.", _MODULE),
    Metric("edgezmq_module_delivered_messages_total", "counter", "Messages the module acknowledged.", _MODULE),
    Metric("edgezmq_module_redelivered_messages_total", "counter", "Messages it was given once more.", _MODULE),
    Metric(
        "edgezmq_module_refused_messages_total",
        "counter",
        "Refused by the module, or sent by it and refused by the broker; the sender was told.",
        ("module", "reason"),
    ),
    Metric(
        "edgezmq_module_latency_seconds",
        "histogram",
        "Time of messages for the module in the broker, from their arrival until they are acknowledged.",
        _MODULE,
    ),
    Metric("edgezmq_module_value", "gauge", "The module's own counters, as it names them.", ("module", "counter")),
    # One lane's account.
    Metric("edgezmq_lane_accepted_messages_total", "counter", "Messages that got their place in the lane.", _LANE),
    Metric("edgezmq_lane_delivered_messages_total", "counter", "Of them delivered.", _LANE),
    Metric("edgezmq_lane_refused_messages_total", "counter", "Of them refused; the sender was told.", _LANE),
    Metric("edgezmq_lane_held_messages", "gauge", "Of them still held, by sequence numbers.", _LANE),
    Metric(
        "edgezmq_lane_missing_messages", "gauge", "Accepted - delivered - refused - held: 0, or it is a bug.", _LANE
    ),
    # edgehub: the link and the outbox.
    Metric("edgezmq_cloud_link_state", "gauge", "1 for the state the link to the cloud is in.", ("state",)),
    Metric("edgezmq_cloud_link_up", "gauge", "1 when messages can go to the cloud."),
    Metric("edgezmq_cloud_link_served", "gauge", "1 when the cloud has proved that it serves this node."),
    Metric("edgezmq_cloud_link_connects_total", "counter", "Connections made."),
    Metric("edgezmq_cloud_link_round_trip_seconds", "gauge", "Smoothed time until a barrier is confirmed."),
    Metric("edgezmq_cloud_link_window_bytes", "gauge", "At most so many bytes are written and unconfirmed."),
    Metric("edgezmq_cloud_link_rate_bytes_per_second", "gauge", "Measured rate of what the cloud confirms."),
    Metric("edgezmq_cloud_received_messages_total", "counter", "Messages that came from the cloud."),
    Metric("edgezmq_outbox_waiting_messages", "gauge", "Not written to the link yet.", ("class",)),
    Metric("edgezmq_outbox_unconfirmed_messages", "gauge", "Written, not confirmed by the cloud."),
    Metric("edgezmq_outbox_held_bytes", "gauge", "Bytes in the outbox, in memory and on disk."),
    Metric("edgezmq_outbox_stored_messages", "gauge", "Messages on disk."),
    Metric("edgezmq_outbox_stored_bytes", "gauge", "Bytes of them."),
    Metric("edgezmq_outbox_written_bytes_total", "counter", "Bytes of messages written to the disk."),
    Metric("edgezmq_outbox_spilled_messages_total", "counter", "Messages that had to go to the disk."),
    Metric("edgezmq_outbox_failing", "gauge", "1 while the outbox cannot be written (full disk)."),
    Metric("edgezmq_outbox_damaged_total", "counter", "Damaged outbox files that were set aside."),
    Metric("edgezmq_outbox_restored_messages_total", "counter", "Found on disk when edgehub started."),
    Metric("edgezmq_outbox_accepted_messages_total", "counter", "Taken for the cloud."),
    Metric("edgezmq_outbox_confirmed_messages_total", "counter", "Confirmed by the cloud."),
    Metric("edgezmq_outbox_given_up_messages_total", "counter", "Given back to their senders as failed."),
    Metric(
        "edgezmq_outbox_dropped_messages_total",
        "counter",
        "Dropped after acceptance, by reason; `edgezmq ledger` has the last ones.",
        ("reason",),
    ),
    Metric("edgezmq_outbox_missing_messages", "gauge", "What edgehub's account lacks: 0 or below, or it is a bug."),
    Metric(
        "edgezmq_certificate_expiry_timestamp_seconds",
        "gauge",
        "When the node's certificate expires, in seconds since 1970; 0: there is none.",
    ),
    Metric("edgezmq_certificate_usable", "gauge", "1 while it can be dialled with: there, this node's, in its time."),
    Metric("edgezmq_certificate_joins_total", "counter", "Certificates got with a token."),
    Metric("edgezmq_certificate_rotations_total", "counter", "Certificates renewed in time."),
    Metric("edgezmq_certificate_refusals_total", "counter", "Tries of both that came to nothing."),
    # eventbus.
    Metric("edgezmq_mqtt_connected", "gauge", "1 when the MQTT broker is connected.", ("server",)),
    Metric(
        "edgezmq_mqtt_broker_dropped_messages_total",
        "counter",
        "What the MQTT broker says it dropped; absent when it says nothing.",
        ("server",),
    ),
    # Supervision.
    Metric("edgezmq_supervisord_up", "gauge", "1 when supervisord answered last."),
    Metric("edgezmq_program_running", "gauge", "1 when supervisord has the program running.", _PROGRAM),
    Metric("edgezmq_program_fatal", "gauge", "1 when supervisord gave the program up.", _PROGRAM),
    Metric("edgezmq_program_restarts_total", "counter", "Restarts seen since the watchdog's start.", _PROGRAM),
    Metric("edgezmq_program_storms_total", "counter", "Restart storms.", _PROGRAM),
    Metric("edgezmq_program_in_storm", "gauge", "1 during a restart storm.", _PROGRAM),
    Metric("edgezmq_program_resident_bytes", "gauge", "Resident memory of the process.", _PROGRAM),
    Metric("edgezmq_program_cpu_seconds_total", "counter", "Processor time of the process.", _PROGRAM),
    Metric(
        "edgezmq_watchdog_actions_total",
        "counter",
        "What the watchdog did: abort (SIGABRT to what hung), kill (SIGKILL after it), revive (start after FATAL).",
        ("program", "action"),
    ),
)

_BY_NAME: Final = {metric.name: metric for metric in METRICS}


class ProgramFacts(NamedTuple):
    """What the watchdog knows of one program."""

    name: str
    state: str
    restarts: int = 0
    storms: int = 0
    in_storm: bool = False
    aborts: int = 0
    kills: int = 0
    revivals: int = 0
    resident_bytes: int | None = None
    cpu_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """All that one scrape tells. `bus` is the broker's status, None when it did not answer in time."""

    version: str
    python: str
    node: str
    bus: Mapping[str, Any] | None = None
    supervisord_up: bool = False
    programs: list[ProgramFacts] = field(default_factory=list)


class Samples:
    """Collects samples; every name and its labels must be in METRICS."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}

    def add(self, name: str, value: float, *labels: str) -> None:
        metric = _BY_NAME[name]
        self._add(metric, name, value, dict(zip(metric.labels, labels, strict=True)))

    def add_histogram(self, name: str, buckets: Iterable[tuple[str, int]], total: float, *labels: str) -> None:
        """`buckets`: upper bound as it is written and the count in this bucket alone; the last one is +Inf."""
        metric = _BY_NAME[name]
        named = dict(zip(metric.labels, labels, strict=True))
        count = 0
        for bound, number in buckets:
            count += number
            self._add(metric, f"{name}_bucket", count, {**named, "le": bound})
        self._add(metric, f"{name}_sum", total, named)
        self._add(metric, f"{name}_count", count, named)

    def _add(self, metric: Metric, name: str, value: float, labels: Mapping[str, str]) -> None:
        said = ",".join(f'{label}="{escape(text)}"' for label, text in labels.items())
        self._lines.setdefault(metric.name, []).append(f"{name}{{{said}}} {value}" if said else f"{name} {value}")

    def text(self) -> str:
        """Metrics in the order of METRICS; those without samples are left out."""
        parts = []
        for metric in METRICS:
            lines = self._lines.get(metric.name)
            if lines:
                said = metric.help.replace("\\", "\\\\").replace("\n", "\\n")
                parts.append(f"# HELP {metric.name} {said}\n# TYPE {metric.name} {metric.kind}\n")
                parts.append("\n".join(lines) + "\n")
        return "".join(parts)


def escape(text: str) -> str:
    """A label's value, as the text format wants it."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def render(facts: Facts) -> str:
    """The whole answer to a scrape."""
    samples = Samples()
    samples.add("edgezmq_build_info", 1, facts.version, facts.python, facts.node)
    samples.add("edgezmq_broker_up", int(facts.bus is not None))
    if facts.bus is not None:
        _broker(samples, facts.bus.get("broker") or {})
        known = {program.name for program in facts.programs}
        modules = facts.bus.get("modules") or []
        known |= {module["name"] for module in modules if module.get("declared")}
        past = (facts.bus.get("broker") or {}).get("refused_of_past") or {}
        _modules(samples, [*modules, *({"name": "", "refused": counts} for counts in past.values())], known)
        _lanes(samples, facts.bus.get("accounts") or [], known)
        for module in modules:
            counters = module.get("counters") or {}
            if module["name"] == "edgehub":
                _edgehub(samples, counters)
            elif module["name"] == "eventbus":
                _eventbus(samples, counters)
    samples.add("edgezmq_supervisord_up", int(facts.supervisord_up))
    for program in facts.programs:
        _program(samples, program)
    return samples.text()


def _broker(samples: Samples, broker: Mapping[str, Any]) -> None:
    for name, key in (
        ("edgezmq_broker_uptime_seconds", "uptime_s"),
        ("edgezmq_broker_held_messages", "messages_held"),
        ("edgezmq_broker_held_bytes", "bytes_held"),
        ("edgezmq_broker_byte_budget_bytes", "byte_budget"),
        ("edgezmq_broker_retained_messages", "retained"),
        ("edgezmq_broker_waiting_senders", "senders_waiting_for_room"),
        ("edgezmq_broker_resyncs_total", "resyncs_asked"),
    ):
        samples.add(name, broker.get(key, 0))
    for code, count in bounded(broker.get("refused_frames") or {}, MAX_REASONS).items():
        samples.add("edgezmq_broker_refused_frames_total", count, code)


_OF_MODULE: Final = (
    ("edgezmq_module_queued_messages", "queued"),
    ("edgezmq_module_queued_bytes", "queued_bytes"),
    ("edgezmq_module_in_flight_messages", "in_flight"),
    ("edgezmq_module_suspect_lanes", "suspects"),
    ("edgezmq_module_paced_messages", "paced"),
    ("edgezmq_module_delivered_messages_total", "delivered"),
    ("edgezmq_module_redelivered_messages_total", "redelivered"),
)


def _modules(samples: Samples, modules: Iterable[Mapping[str, Any]], known: set[str]) -> None:
    others = []
    for module in modules:
        name = module["name"]
        if name not in known:
            others.append(module)
            continue
        for state in MODULE_STATES:
            samples.add("edgezmq_module_state", int(module.get("state") == state), name, state)
        if module.get("last_heard_ms", -1) >= 0:
            samples.add("edgezmq_module_last_heard_seconds", module["last_heard_ms"] / 1000, name)
        _mailbox(samples, name, [module])
        for counter, value in bounded(module.get("counters") or {}, MAX_COUNTERS).items():
            samples.add("edgezmq_module_value", value, name, counter)
    if others:
        _mailbox(samples, OTHER, others)


def _mailbox(samples: Samples, name: str, modules: list[Mapping[str, Any]]) -> None:
    """The mailbox of one module, or of several together."""
    for metric, key in _OF_MODULE:
        samples.add(metric, sum(module.get(key, 0) for module in modules), name)
    oldest = max(module.get("oldest_age_ms", 0) for module in modules)
    samples.add("edgezmq_module_oldest_message_seconds", oldest / 1000, name)
    refused: dict[str, int] = {}
    for module in modules:
        for reason, count in (module.get("refused") or {}).items():
            refused[reason] = refused.get(reason, 0) + count
    for reason, count in bounded(refused, MAX_REASONS).items():
        samples.add("edgezmq_module_refused_messages_total", count, name, reason)
    latency: dict[str, int] = {}
    for module in modules:
        for bound, count in (module.get("latency") or {}).items():
            latency[bound] = latency.get(bound, 0) + count
    if latency:
        buckets = [("+Inf" if bound == "inf" else bound, count) for bound, count in latency.items()]
        total = round(sum(module.get("latency_sum_s", 0.0) for module in modules), 6)
        samples.add_histogram("edgezmq_module_latency_seconds", buckets, total, name)


def _lanes(samples: Samples, accounts: Iterable[Mapping[str, Any]], known: set[str]) -> None:
    """Lanes between known names and to groups; the rest is summed up."""
    keys = ("accepted", "delivered", "refused", "held")
    sums: dict[tuple[str, str, str], list[int]] = {}
    for account in accounts:
        sender, destination = account["sender"], account["destination"]
        lane = (
            sender if sender in known else OTHER,
            destination if destination in known or destination.startswith("@") else OTHER,
            _PRIORITIES.get(account["priority"], OTHER),
        )
        if lane not in sums and len(sums) >= MAX_LANES:
            lane = (OTHER, OTHER, OTHER)
        found = sums.setdefault(lane, [0, 0, 0, 0])
        for place, key in enumerate(keys):
            found[place] += account[key]
    for lane, (accepted, delivered, refused, held) in sums.items():
        samples.add("edgezmq_lane_accepted_messages_total", accepted, *lane)
        samples.add("edgezmq_lane_delivered_messages_total", delivered, *lane)
        samples.add("edgezmq_lane_refused_messages_total", refused, *lane)
        samples.add("edgezmq_lane_held_messages", held, *lane)
        samples.add("edgezmq_lane_missing_messages", accepted - delivered - refused - held, *lane)


_OF_EDGEHUB: Final = (
    ("edgezmq_cloud_link_up", "link_up", 1),
    ("edgezmq_cloud_link_served", "link_served", 1),
    ("edgezmq_cloud_link_connects_total", "connects", 1),
    ("edgezmq_cloud_link_round_trip_seconds", "rtt_us", 1e-6),
    ("edgezmq_cloud_link_window_bytes", "window_bytes", 1),
    ("edgezmq_cloud_link_rate_bytes_per_second", "rate_bytes_per_second", 1),
    ("edgezmq_cloud_received_messages_total", "received", 1),
    ("edgezmq_outbox_unconfirmed_messages", "unconfirmed", 1),
    ("edgezmq_outbox_held_bytes", "held_bytes", 1),
    ("edgezmq_outbox_stored_messages", "stored", 1),
    ("edgezmq_outbox_stored_bytes", "stored_bytes", 1),
    ("edgezmq_outbox_written_bytes_total", "store_bytes_written", 1),
    ("edgezmq_outbox_spilled_messages_total", "spilled", 1),
    ("edgezmq_outbox_failing", "store_failing", 1),
    ("edgezmq_outbox_damaged_total", "outbox_damaged", 1),
    ("edgezmq_outbox_restored_messages_total", "restored", 1),
    ("edgezmq_outbox_accepted_messages_total", "accepted", 1),
    ("edgezmq_outbox_confirmed_messages_total", "confirmed", 1),
    ("edgezmq_outbox_given_up_messages_total", "given_up", 1),
    ("edgezmq_certificate_expiry_timestamp_seconds", "certificate_not_after", 1),
    ("edgezmq_certificate_usable", "certificate_usable", 1),
    ("edgezmq_certificate_joins_total", "certificate_joins", 1),
    ("edgezmq_certificate_rotations_total", "certificate_rotations", 1),
    ("edgezmq_certificate_refusals_total", "certificate_refusals", 1),
)
_DROPPED: Final = "dropped_"


def _edgehub(samples: Samples, counters: Mapping[str, int]) -> None:
    if not counters:
        return  # not attached, or before its first PING
    for metric, key, factor in _OF_EDGEHUB:
        value = counters.get(key, 0)
        samples.add(metric, value if factor == 1 else round(value * factor, 6))
    state = counters.get("link_state", -1)
    for number, name in enumerate(LINK_STATES):
        samples.add("edgezmq_cloud_link_state", int(state == number), name)
    samples.add("edgezmq_outbox_waiting_messages", counters.get("waiting_signals", 0), "signal")
    samples.add("edgezmq_outbox_waiting_messages", counters.get("waiting_data", 0), "data")
    dropped = counters.get("dropped", 0)
    reasons = {key[len(_DROPPED) :]: count for key, count in counters.items() if key.startswith(_DROPPED)}
    if dropped > sum(reasons.values()) or not reasons:
        reasons[OTHER] = dropped - sum(reasons.values())
    for reason, count in bounded(reasons, MAX_REASONS).items():
        samples.add("edgezmq_outbox_dropped_messages_total", count, reason)
    accepted = counters.get("accepted", 0) + counters.get("restored", 0)
    gone = sum(counters.get(name, 0) for name in ("confirmed", "held", "dropped", "given_up"))
    samples.add("edgezmq_outbox_missing_messages", accepted - gone)


def _eventbus(samples: Samples, counters: Mapping[str, int]) -> None:
    for metric, key in (
        ("edgezmq_mqtt_connected", "mqtt_connected"),
        ("edgezmq_mqtt_broker_dropped_messages_total", "mqtt_broker_dropped"),
    ):
        for prefix in ("external", "internal"):
            if f"{prefix}_{key}" in counters:
                samples.add(metric, counters[f"{prefix}_{key}"], prefix)
        if key in counters:
            samples.add(metric, counters[key], "mqtt")


def _program(samples: Samples, program: ProgramFacts) -> None:
    name = program.name
    samples.add("edgezmq_program_running", int(program.state == "RUNNING"), name)
    samples.add("edgezmq_program_fatal", int(program.state == "FATAL"), name)
    samples.add("edgezmq_program_restarts_total", program.restarts, name)
    samples.add("edgezmq_program_storms_total", program.storms, name)
    samples.add("edgezmq_program_in_storm", int(program.in_storm), name)
    for action, count in (("abort", program.aborts), ("kill", program.kills), ("revive", program.revivals)):
        samples.add("edgezmq_watchdog_actions_total", count, name, action)
    if program.resident_bytes is not None:
        samples.add("edgezmq_program_resident_bytes", program.resident_bytes, name)
    if program.cpu_seconds is not None:
        samples.add("edgezmq_program_cpu_seconds_total", program.cpu_seconds, name)


def bounded(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """At most `most` entries, the largest; the others are summed up as `other`."""
    if len(counts) <= most:
        return dict(counts)
    by_size = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept = dict(by_size[: most - 1])
    kept[OTHER] = kept.get(OTHER, 0) + sum(count for _, count in by_size[most - 1 :])
    return kept
