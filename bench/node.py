"""The measurements of a whole node: start, uploads, MQTT to the cloud, and what it takes while idle."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import msgspec

from bench import report
from bench.bus import WORK_SECONDS, Say, Scratch
from bench.children import ChildFailed, worker
from bench.memory import parse_cpu_ticks, parse_smaps_rollup, ticks_to_seconds
from bench.report import Idle, Results
from bench.rig import POLL_SECONDS, Rig, processes, rig, start_node, wait_gone, wait_served
from bench.stats import count_for

PROBE_UPLOADS = 500
WARM_UP_UPLOADS = 50
"Not counted: after a start the broker waits a moment for group members that it has not yet heard of."
MOST_UPLOADS = 200_000
ROUND_SECONDS = 2.0
QUICK_ROUND_SECONDS = 0.5

SETTLE_SECONDS = 5
"After `served`, before the idle window begins."
IDLE_SECONDS = 30
"Two of KubeEdge's keepalives (15 s)."
QUICK_IDLE_SECONDS = 5


def measure_node(results: Results, *, rounds: int, quick: bool, say: Say) -> None:
    """Start to served, MQTT to the cloud: each round a fresh start of the same node."""
    with Scratch() as directory, rig(directory) as around:
        say("node: one start that does not count, so that the others are warm")
        with start_node(around) as node:
            wait_served(around, node)
            upload(around, WARM_UP_UPLOADS)
            rate = publish(around, PROBE_UPLOADS)
        wait_gone(around)
        target = QUICK_ROUND_SECONDS if quick else ROUND_SECONDS
        count = count_for(PROBE_UPLOADS, PROBE_UPLOADS / rate, target, least=PROBE_UPLOADS, most=MOST_UPLOADS)
        results.message_counts[report.EVENTBUS] = {report.EDGEZMQ: count}
        for turn in range(1, rounds + 1):
            started = time.monotonic()
            with start_node(around) as node:
                wait_served(around, node)
                start = time.monotonic() - started
                results.add(report.START, report.EDGEZMQ, start)
                upload(around, WARM_UP_UPLOADS)
                from_mqtt = publish(around, count)
                results.add(report.EVENTBUS, report.EDGEZMQ, from_mqtt)
            wait_gone(around)
            say(f"node round {turn}/{rounds}: served after {start:.2f} s, MQTT to cloud {from_mqtt:,.0f}/s")


def upload(around: Rig, count: int) -> float:
    """Uploads a second, from a module's first send to its last receipt; all of them are in the cloud then."""
    before = around.arrived()
    log = around.home.parent / "uploader.log"
    with worker("cloud_side", "sender", {"endpoint": around.endpoint, "count": count}, log=log) as sending:
        sending.tell(go=True)
        sent = sending.answer(WORK_SECONDS)
    arrived = around.arrived() - before
    if sent["confirmed"] != count or arrived != count:
        raise ChildFailed(f"{count} uploads, {sent['confirmed']} confirmed, {arrived} in the cloud: expected all")
    return count * 1e9 / float(sent["finished_ns"] - sent["started_ns"])


def publish(around: Rig, count: int) -> float:
    """MQTT messages a second, from the device's first publish until the cloud has the last one."""
    before = around.arrived()
    log = around.home.parent / "device.log"
    with worker("cloud_side", "requester", {"port": around.mqtt_port, "count": count}, log=log) as device:
        device.tell(go=True)
        deadline = time.monotonic() + WORK_SECONDS
        while (arrived := around.arrived() - before) < count:
            if time.monotonic() > deadline:
                raise ChildFailed(f"{count} published, {arrived} in the cloud after {WORK_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
        finished = time.monotonic_ns()
        sent = device.answer(WORK_SECONDS)
    return count * 1e9 / float(max(finished, sent["finished_ns"]) - sent["started_ns"])


# --- idle ---------------------------------------------------------------------------------------


class IdleState(msgspec.Struct):
    """What the bench must know again after it was replaced by `sample-idle` for a while."""

    results: Results
    json_path: str | None
    scratch: str
    home: str
    pids: dict[str, int]
    "The node's processes by name."
    others: list[int]
    "Servers to end: cloudsim, relay, mosquitto."
    finished: bool = False


def become_idle_sampler(results: Results, *, quick: bool, json_path: Path | None, say: Say) -> NoReturn:
    """Start a node, then become `sample-idle`, which becomes `python -m bench --resume` again.

    PSS divides a page among all who map it. A Python bench beside the node would share the interpreter
    with it and make it look smaller, so for that moment the bench is no Python. Raises ChildFailed.
    """
    directory = Path(tempfile.mkdtemp(prefix="ezb-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        around = stack.enter_context(rig(directory, with_relay=True))
        node = stack.enter_context(start_node(around))
        wait_served(around, node)
        pids = processes(around, node)
        assert around.relay
        window = QUICK_IDLE_SECONDS if quick else IDLE_SECONDS
        state = IdleState(
            results=results,
            json_path=str(json_path.absolute()) if json_path else None,
            scratch=str(directory),
            home=str(around.home),
            pids=pids,
            others=[around.cloud.pid, around.relay.pid, around.mqtt.pid],
        )
        state_file = directory / "state.json"
        state_file.write_bytes(msgspec.json.encode(state))
        say(f"idle: {', '.join(pids)}; {SETTLE_SECONDS} s to settle, {window} s to look")
        pythons = f"{around.cloud.pid} {around.relay.pid}"
        command = [
            str(Path(__file__).with_name("sample-idle")),
            *(str(directory / "idle"), str(SETTLE_SECONDS), str(window), str(around.relay.pid), pythons),
            " ".join(str(pid) for pid in pids.values()),
            *(sys.executable, "-m", "bench", "--resume", str(state_file)),
        ]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(command[0], command)


def resume(state_file: Path) -> IdleState:
    """Back from `sample-idle`: end what still runs, and put what was seen into the results."""
    state = msgspec.json.decode(state_file.read_bytes(), type=IdleState)
    try:
        state.results.idle = read_samples(
            Path(state.scratch) / "idle", state.pids, relay_output=Path(state.scratch) / "relay.txt"
        )
        state.finished = True
    except (OSError, ValueError, IndexError) as fault:
        state.results.not_run["idle"] = f"the samples are not complete: {fault!r}"
    finally:
        _end_all(state)
        shutil.rmtree(state.scratch, ignore_errors=True)
    return state


def read_samples(samples: Path, pids: dict[str, int], *, relay_output: Path) -> Idle:
    """What `sample-idle` wrote, as figures. Raises OSError, ValueError or IndexError when it is not complete."""
    before, after = (float(word) for word in (samples / "uptime").read_text().split())
    window = after - before
    memory = {name: parse_smaps_rollup((samples / "rollup" / str(pid)).read_text()) for name, pid in pids.items()}
    cpu = {}
    for name, pid in pids.items():
        ticks = [parse_cpu_ticks((samples / when / str(pid)).read_text()) for when in ("stat.before", "stat.after")]
        cpu[name] = 100 * ticks_to_seconds(ticks[1] - ticks[0]) / window
    first, last = (int(word) for word in relay_output.read_text().split()[:2])
    pythons = samples / "pythons"
    return Idle(
        pss_mib={name: seen.pss_mib for name, seen in memory.items()},
        uss_mib={name: seen.uss_mib for name, seen in memory.items()},
        window_seconds=window,
        cpu_percent=sum(cpu.values()),
        cpu_percent_by_process=cpu,
        cloud_bytes=last - first,
        other_pythons=len(pythons.read_text().split()) if pythons.exists() else 0,
    )


def _end_all(state: IdleState) -> None:
    """The node first, then its servers. All are still our children: an exec keeps them."""
    supervisord = state.pids["supervisord"]
    for pid, seconds in [(supervisord, 30.0), *((pid, 5.0) for pid in state.others)]:
        _signal(pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while not _reaped(pid):
            if time.monotonic() > deadline:
                _signal(pid, signal.SIGKILL)
            time.sleep(0.02)
    for pid in state.pids.values():
        if pid != supervisord and Path(f"/proc/{pid}").exists():
            _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
