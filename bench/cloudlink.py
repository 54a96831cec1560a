"""The cloud link's speed over both transports: uploads confirmed and downloads, of a module and of edgehub alone.

Each transport has a site of its own (cloudsim, broker, edgehub as processes), and the two take turns. cloudsim is a
double in Python on the same cores; `bench.native` puts a hub and a node in Go in its place and in edgehub's.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec

from bench import native, report
from bench.bus import WORK_SECONDS, Say, Scratch, quietest
from bench.children import Child, ChildFailed, worker
from bench.cloudsite import LINK, NODE, TRANSPORTS, Cpu, Measured, Run, Site, link_arguments, site
from bench.memory import peak_mib
from bench.payload import reading
from bench.report import WSS, Results
from bench.stats import count_for

PROBE = 2_000
"Messages that size the rounds, and warm up; they do not count."
MOST = 200_000
ROUND_SECONDS = 1.0
QUICK_ROUND_SECONDS = 0.3

ATTEMPTS = 2
"Of a round while others use the machine."

POST_MESSAGES = 1_000
"In one request to cloudsim: it does nothing else while it reads them."


def upload(around: Site, count: int) -> Run:
    """From a module's first send to its last receipt; cloudsim must have all of them then."""
    who = {"edgehub": around.edgehub, "broker": around.broker, "cloudsim": around.cloud}
    arguments = {"endpoint": f"ipc://{around.home.bus_socket}", "count": count}
    return _upload(around, "cloud_side", arguments, who, count)


def link_upload(around: Site, count: int) -> Run:
    """The same of edgehub's end of the link alone."""
    return _upload(around, "link_side", link_arguments(around, count), {"cloudsim": around.cloud}, count)


def _upload(around: Site, side: str, arguments: dict[str, Any], who: dict[str, Child], count: int) -> Run:
    with worker(side, "sender", arguments, log=around.directory / "sender.log") as sending:
        before = _distinct(around)
        cpu = Cpu(who)
        sending.tell(go=True)
        sent = sending.answer(WORK_SECONDS)
        spent = cpu.spent()
    arrived = _distinct(around) - before
    if sent["confirmed"] != count or arrived != count:
        raise ChildFailed(f"{count} uploads, {sent['confirmed']} confirmed, {arrived} in the cloud: expected all")
    spent["edgehub" if side == "link_side" else "module"] = float(sent["cpu_seconds"])
    return Run(count * 1e9 / float(sent["finished_ns"] - sent["started_ns"]), spent)


def download(around: Site, count: int) -> Run:
    """From the first command that cloudsim is given to the last that the module has handled."""
    who = {"edgehub": around.edgehub, "broker": around.broker, "cloudsim": around.cloud}
    arguments = {"endpoint": f"ipc://{around.home.bus_socket}", "count": count}
    return _download(around, "cloud_side", NODE, arguments, who, count)


def link_download(around: Site, count: int) -> Run:
    """The same of edgehub's end of the link alone."""
    arguments = link_arguments(around, count)
    return _download(around, "link_side", LINK, arguments, {"cloudsim": around.cloud}, count)


def _download(around: Site, side: str, node: str, arguments: dict[str, Any], who: dict[str, Child], count: int) -> Run:
    commands = [_commands(first, min(first + POST_MESSAGES, count)) for first in range(0, count, POST_MESSAGES)]
    with worker(side, "receiver", arguments, log=around.directory / "receiver.log") as receiving:
        cpu = Cpu(who)
        receiving.tell(go=True)
        started = time.monotonic_ns()
        for batch in commands:
            around.ask(f"/nodes/{node}/messages/batch", batch)
        got = receiving.answer(WORK_SECONDS)
        spent = cpu.spent()
    skips = got.get("skips") if around.transport == WSS else None  # over QUIC the hub uses all streams at once
    if got["received"] != count or skips:
        raise ChildFailed(f"{count} commands, {got['received']} came, {skips} out of order: expected all")
    spent["edgehub" if side == "link_side" else "module"] = float(got["cpu_seconds"])
    return Run(count * 1e9 / float(got["last_ns"] - started), spent)


def _commands(first: int, end: int) -> bytes:
    route = {"source": "router_eventbus", "group": "user", "operation": "publish", "resource": "bench/command"}
    return msgspec.json.encode([{"route": route, "content": reading(number)} for number in range(first, end)])


def _distinct(around: Site) -> int:
    return int(around.ask("/received")["distinct"])


MEASURES = {
    report.UPLOADS: upload,
    report.DOWNLOADS: download,
    report.LINK_UPLOADS: link_upload,
    report.LINK_DOWNLOADS: link_download,
}


def measure_cloud(results: Results, *, rounds: int, quick: bool, with_native: bool, say: Say) -> None:
    """Every measure over every transport, and the native peers where there is Go; a transport that fails says so."""
    with Scratch() as directory, ExitStack() as stack:
        sites: dict[str, Site] = {}
        for transport in TRANSPORTS:
            try:
                sites[transport] = stack.enter_context(site(directory / transport, transport))
            except ChildFailed as fault:
                _failed(results, f"cloud {transport}", fault, say)
        runs: dict[tuple[str, str], Measured] = {
            (measure, transport): partial(run, around)
            for measure, run in MEASURES.items()
            for transport, around in sites.items()
        }
        living = [pid for around in sites.values() for pid in around.pids]
        if with_native:
            possible, pids = native.runs(results, stack, directory, sites, say)
            runs |= possible
            living += pids
        target = QUICK_ROUND_SECONDS if quick else ROUND_SECONDS
        counts: dict[tuple[str, str], int] = {}
        for turn in range(rounds + 1):
            for (measure, transport), run in runs.items():
                try:
                    if turn == 0:
                        probe = run(PROBE)
                        count = count_for(PROBE, PROBE / probe.rate, target, least=PROBE, most=MOST)
                        counts[measure, transport] = count
                        results.message_counts.setdefault(measure, {})[transport] = count
                    elif count := counts.get((measure, transport), 0):
                        done, others = quietest(partial(run, count), quick, attempts=ATTEMPTS, living=living)
                        results.others_cpu_percent.append(others)
                        _note(results, measure, transport, done, count, f"{turn}/{rounds}", say)
                except (ChildFailed, OSError) as fault:
                    _failed(results, f"cloud {measure} {transport} round {turn}", fault, say)
        for transport, around in sites.items():
            if around.edgehub.is_alive():
                results.edgehub_peak_mib[transport] = peak_mib(around.edgehub.pid)


def _note(results: Results, measure: str, transport: str, run: Run, count: int, turn: str, say: Say) -> None:
    results.add(measure, transport, run.rate)
    costs = results.cpu_us_per_message.setdefault(measure, {}).setdefault(transport, {})
    for role, seconds in run.cpu_seconds.items():
        costs.setdefault(role, []).append(seconds * 1e6 / count)
    spent = ", ".join(f"{role} {seconds * 1e6 / count:.1f}" for role, seconds in run.cpu_seconds.items())
    others = results.others_cpu_percent[-1]
    say(f"{measure} round {turn} {transport:4} {run.rate:9,.0f}/s, µs of CPU: {spent}; others' CPU {others:.0f} %")


def _failed(results: Results, what: str, fault: Exception, say: Say) -> None:
    results.not_run[what] = str(fault)
    say(f"{what}: FAILED: {fault}")
