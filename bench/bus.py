"""The measurements of the bus beside its peers: one → one rate and latency, and request → reply latency."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bench import report
from bench.children import ChildFailed
from bench.contenders import Contender, Edgezmq, Mosquitto, Nats
from bench.machine import OthersCpu
from bench.polyglot import polyglots
from bench.report import Results
from bench.stats import count_for, percentile

SIZES = {report.BUS_256: 256, report.BUS_4096: 4096}
REQUEST_BYTES = 256
REQUESTS = 5_000
QUICK_REQUESTS = 500
WARM_UP_REQUESTS = 200
"Before the counted ones: connections, caches, the interpreter's specialisation."

PER_SECOND = 1_000
PACED = 2_500
QUICK_PACED = 700
"Messages whose latency is taken, sent at this rate; the first WARM_UP_REQUESTS of them do not count."

ROUND_SECONDS = 1.5
QUICK_ROUND_SECONDS = 0.4
NOISY_PERCENT = 10.0
"Of the machine used by others in a round: it is run again, and when that does not help we warn."
ATTEMPTS = 3

WORK_SECONDS = 180.0
"For one round of one contender, whatever happens."

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Flow:
    """What one run of sender and receiver came to."""

    sent: int
    received: int
    seconds: float
    cpu_seconds: dict[str, float]
    "sender, receiver, server."
    took_us: list[float] = field(default_factory=list)
    "Of each message, from its send to its handler, where they were paced."

    @property
    def rate(self) -> float:
        return self.received / self.seconds


def contenders(only: Sequence[str] = ()) -> list[Contender]:
    """All who may take part, or those named."""
    everybody: list[Contender] = [Edgezmq(), Nats(), Nats(uvloop=True), Mosquitto(), *polyglots()]
    return [one for one in everybody if not only or one.name in only]


def measure_bus(
    results: Results, who: Sequence[Contender], *, rounds: int, quick: bool, measures: Sequence[str], say: Say
) -> None:
    """Rates and latencies, round robin over the contenders that are installed; each server fresh for each run."""
    able = []
    for contender in who:
        why = contender.missing()
        if why is None:
            able.append(contender)
            results.machine.setdefault("contenders", {})[contender.name] = contender.version()
        else:
            results.not_run[contender.name] = why
            say(f"{contender.name}: not run: {why}")
    for measure, size in SIZES.items():
        if measure in measures:
            _measure_flow(results, able, measure, size, rounds, quick, say)
    if report.LATENCY_P50 in measures:
        _measure_latency(results, able, rounds, quick, say)
    if report.REQUEST_P50 in measures:
        _measure_requests(results, able, rounds, quick, say)


def _measure_flow(
    results: Results, who: Sequence[Contender], measure: str, size: int, rounds: int, quick: bool, say: Say
) -> None:
    target = QUICK_ROUND_SECONDS if quick else ROUND_SECONDS
    counts: dict[str, int] = {}
    for contender in who:
        try:
            probe = flow(contender, contender.probe_messages, size)
        except ChildFailed as fault:
            results.not_run[f"{measure} {contender.name}"] = str(fault)
            say(f"{measure} {contender.name}: FAILED: {fault}")
            continue
        counts[contender.name] = count_for(
            probe.sent, probe.seconds, target, least=contender.probe_messages, most=contender.most_messages
        )
    results.message_counts[measure] = counts
    for turn in range(1, rounds + 1):
        for contender in who:
            if contender.name not in counts:
                continue
            try:
                run, others = quietest(partial(flow, contender, counts[contender.name], size), quick)
            except ChildFailed as fault:
                results.not_run[f"{measure} {contender.name} round {turn}"] = str(fault)
                say(f"{measure} {contender.name} round {turn}: FAILED: {fault}")
                continue
            results.others_cpu_percent.append(others)
            results.add(measure, contender.name, run.rate)
            if run.received < run.sent:
                short = results.arrived_short.setdefault(measure, {})
                short[contender.name] = short.get(contender.name, 0) + run.sent - run.received
            _note_cpu(results, measure, contender, run.cpu_seconds, run.sent)
            say(
                f"{measure} round {turn}/{rounds} {contender.name:15} {run.rate:10,.0f}/s"
                f"  {run.received} of {run.sent} in {run.seconds:.2f} s, others' CPU {others:.0f} %"
            )


def flow(contender: Contender, count: int, size: int, per_second: int = 0) -> Flow:
    """Send `count` messages of `size` bytes from one process to another. Raises ChildFailed.

    `per_second`: how many are sent a second, and how long each was under way is in the result; 0: as fast as it goes.
    """
    with Scratch() as directory, contender.serve(directory) as server:
        arguments = {**server.arguments, "count": count, "size": size, "per_second": per_second}
        receiving = contender.start("receiver", arguments, directory / "receiver.log")
        with receiving, contender.start("sender", arguments, directory / "sender.log") as sending:
            before = server.child.cpu_seconds()
            receiving.tell(go=True)
            sending.tell(go=True)
            sent = sending.answer(WORK_SECONDS)
            got = receiving.answer(WORK_SECONDS)
            server_cpu = server.child.cpu_seconds() - before
        return _checked(contender, count, sent, got, server_cpu)


def _checked(contender: Contender, count: int, sent: dict[str, Any], got: dict[str, Any], server_cpu: float) -> Flow:
    confirmed = sent["confirmed"]
    if confirmed is None:
        # At most once: the time ends with the last arrival, and what did not arrive does not count.
        finished = got["last_ns"]
    else:
        finished = max(sent["finished_ns"], got["last_ns"])
        if confirmed != count or got["received"] != count or got["skips"]:
            raise ChildFailed(
                f"{contender.name}: {count} sent, {confirmed} confirmed, {got['received']} received, "
                f"{got['skips']} out of order: expected all, in order"
            )
    return Flow(
        sent=count,
        received=got["received"],
        seconds=(finished - sent["started_ns"]) / 1e9,
        cpu_seconds={"sender": sent["cpu_seconds"], "receiver": got["cpu_seconds"], "server": server_cpu},
        took_us=got.get("took_us", []),
    )


def _measure_latency(results: Results, who: Sequence[Contender], rounds: int, quick: bool, say: Say) -> None:
    count = QUICK_PACED if quick else PACED
    for turn in range(1, rounds + 1):
        for contender in who:
            if contender.name not in report.CONTENDERS[report.LATENCY_P50]:
                continue
            try:
                run, others = quietest(partial(flow, contender, count, REQUEST_BYTES, PER_SECOND), quick)
            except ChildFailed as fault:
                results.not_run[f"{report.LATENCY_P50} {contender.name} round {turn}"] = str(fault)
                say(f"{report.LATENCY_P50} {contender.name} round {turn}: FAILED: {fault}")
                continue
            results.others_cpu_percent.append(others)
            took_us = run.took_us[WARM_UP_REQUESTS:]
            median, tail = percentile(took_us, 0.5), percentile(took_us, 0.99)
            results.add(report.LATENCY_P50, contender.name, median)
            results.add(report.LATENCY_P99, contender.name, tail)
            results.message_counts.setdefault(report.LATENCY_P50, {})[contender.name] = len(took_us)
            _note_cpu(results, report.LATENCY_P50, contender, run.cpu_seconds, run.sent)
            say(
                f"latency round {turn}/{rounds} {contender.name:15} p50 {median:7.1f} µs"
                f"  p99 {tail:7.1f} µs, others' CPU {others:.0f} %"
            )


def _measure_requests(results: Results, who: Sequence[Contender], rounds: int, quick: bool, say: Say) -> None:
    count = QUICK_REQUESTS if quick else REQUESTS
    for turn in range(1, rounds + 1):
        for contender in who:
            if contender.name not in report.CONTENDERS[report.REQUEST_P50]:
                continue
            try:
                (took_us, cpu), others = quietest(partial(requests, contender, count), quick)
            except ChildFailed as fault:
                results.not_run[f"{report.REQUEST_P50} {contender.name} round {turn}"] = str(fault)
                say(f"{report.REQUEST_P50} {contender.name} round {turn}: FAILED: {fault}")
                continue
            results.others_cpu_percent.append(others)
            median, tail = percentile(took_us, 0.5), percentile(took_us, 0.99)
            results.add(report.REQUEST_P50, contender.name, median)
            results.add(report.REQUEST_P99, contender.name, tail)
            results.message_counts.setdefault(report.REQUEST_P50, {})[contender.name] = count
            _note_cpu(results, report.REQUEST_P50, contender, cpu, count + WARM_UP_REQUESTS)
            say(
                f"request → reply round {turn}/{rounds} {contender.name:15} p50 {median:7.1f} µs"
                f"  p99 {tail:7.1f} µs, others' CPU {others:.0f} %"
            )


def requests(contender: Contender, count: int) -> tuple[list[float], dict[str, float]]:
    """Ask `count` times, one after another: what each took, in µs, and the CPU seconds of the three processes.

    Raises ChildFailed.
    """
    with Scratch() as directory, contender.serve(directory) as server:
        arguments = {**server.arguments, "count": count, "size": REQUEST_BYTES, "warm_up": WARM_UP_REQUESTS}
        with (
            contender.start("responder", arguments, directory / "responder.log") as answering,
            contender.start("requester", arguments, directory / "requester.log") as asking,
        ):
            who = {"sender": asking, "receiver": answering, "server": server.child}
            before = {role: child.cpu_seconds() for role, child in who.items()}
            asking.tell(go=True)
            took: list[float] = asking.answer(WORK_SECONDS)["took_us"]
            return took, {role: child.cpu_seconds() - before[role] for role, child in who.items()}


def _note_cpu(results: Results, measure: str, contender: Contender, cpu: dict[str, float], messages: int) -> None:
    costs = results.cpu_us_per_message.setdefault(measure, {}).setdefault(contender.name, {})
    for role, seconds in cpu.items():
        costs.setdefault(role, []).append(seconds * 1e6 / messages)


def quietest(
    run: Callable[[], T], quick: bool, *, attempts: int = ATTEMPTS, living: Iterable[int] = ()
) -> tuple[T, float]:
    """Run until others leave the machine alone, at most `attempts` times: the quietest run's result, and its noise.

    Chosen by what others did and never by the result, so that every contender is treated alike. `living`: see
    OthersCpu. Raises what `run` raises.
    """
    best: tuple[T, float] | None = None
    for _ in range(1 if quick else attempts):
        with OthersCpu(living) as others:
            result = run()
        if best is None or others.percent < best[1]:
            best = result, others.percent
        if best[1] <= NOISY_PERCENT:
            break
    assert best is not None  # there is at least one attempt
    return best


class Scratch(tempfile.TemporaryDirectory[str]):
    """A directory with a short path (an ipc socket's may have 107 bytes), gone afterwards."""

    def __init__(self) -> None:
        super().__init__(prefix="ezb-", ignore_cleanup_errors=True)

    def __enter__(self) -> Path:  # type: ignore[override]  # a Path is what everybody here wants
        return Path(super().__enter__())
