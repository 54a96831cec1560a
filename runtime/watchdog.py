"""The watchdog process: `python -m runtime.watchdog`, under supervisord.

It learns of deaths from the kernel (pidfd) and of hung modules from the broker (ADMIN presence), asks
supervisord over XML-RPC, and does what `runtime.watching` decides. It also answers `/metrics`. No asyncio and
few imports: it is to cost a node next to nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Final, NoReturn

from runtime import __version__
from runtime.admin import AdminClient, AdminRefused
from runtime.errors import AlreadyRunning
from runtime.exits import exit_disabled
from runtime.exposition import Facts, ProgramFacts, render
from runtime.home import Home, bus_endpoint, find_home
from runtime.lean import small_libraries
from runtime.locks import die_with_parent, hold
from runtime.memory import settle
from runtime.metrics import MetricsServer, process_facts
from runtime.supervisord import Supervisor, SupervisorError
from runtime.watching import (
    Abort,
    Action,
    AskBroker,
    Counts,
    KeepTraceback,
    Kill,
    Note,
    Poke,
    Seen,
    Start,
    Watching,
    WatchSettings,
)

with small_libraries():
    import zmq

NAME: Final = "watchdog"

_CALL_SECONDS: Final = 2.0
"For one call to supervisord: meanwhile nothing else is watched."


_TRACEBACKS: Final = 5
"Kept of each program, the last ones."
_TRACEBACK_BYTES: Final = 64 * 1024
_BIND_AGAIN_SECONDS: Final = 30.0
"A port that is taken is tried again this often."


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """`runtime.metrics` of the configuration."""

    enable: bool = True
    address: str = "127.0.0.1"
    port: int = 9477


class Watchdog:
    """Joins `Watching` with supervisord, the broker and the kernel."""

    def __init__(
        self, home: Home, endpoint: str, settings: WatchSettings, metrics: MetricsSettings, node_name: str = ""
    ) -> None:
        self._home = home
        self._node_name = node_name
        self._metrics_settings = metrics
        self._metrics: MetricsServer | None = None
        self._bind_at = time.monotonic()
        self._bind_fault = ""
        self._status_request = 0
        self._bus: dict[str, Any] | None = None
        self._supervisor_answers = False
        self._log_sizes: dict[str, int] = {}  # of programs that were aborted, before that
        self._supervisor = Supervisor(home.supervisor_socket, timeout_seconds=_CALL_SECONDS)
        self._admin = AdminClient(endpoint)
        self._core = Watching(settings, Random(), now=time.monotonic())
        self._poller = zmq.Poller()
        self._poller.register(self._admin.socket, zmq.POLLIN)
        self._watched: dict[int, int] = {}  # pid to pidfd
        self._written: dict[str, Counts] = {}

    def run(self) -> NoReturn:
        while True:
            self._step()

    def _step(self) -> None:
        due = self._core.next_deadline()
        if self._metrics is not None:
            due = min(due, self._metrics.next_deadline() or due)
        wait_seconds = max(0.0, due - time.monotonic())
        ready = dict(self._poller.poll(int(wait_seconds * 1000) + 1))
        # First what others said while we slept, then the deadlines: so nobody is called silent whose word lies here.
        for pid, fd in list(self._watched.items()):
            if fd in ready:
                self._forget(pid)
                self._perform(self._core.died(pid, now=time.monotonic()))
        self._hear_broker()
        if self._metrics is not None:
            self._metrics.ready(ready, time.monotonic())
            self._metrics.expire(time.monotonic())
        elif self._metrics_settings.enable and time.monotonic() >= self._bind_at:
            self._serve_metrics()
        self._perform(self._core.expire(now=time.monotonic()))
        self._watch_deaths()
        self._write_counts()

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Poke():
                    self._poke()
                case AskBroker():
                    # A new question each time: a renewed one would bring events, but no answer. The old
                    # streams end with their lease; what they repeat until then does no harm.
                    self._admin.ask_nowait("presence", {}, self._admin.new_request())
                case Abort(program=program, pid=pid):
                    self._log_sizes[program] = _size(self._log_of(program))
                    self._signal(program, pid, signal.SIGABRT, to_group=False)
                case Kill(program=program, pid=pid):
                    self._signal(program, pid, signal.SIGKILL, to_group=True)
                case Start(program=program):
                    self._start(program)
                case KeepTraceback(program=program):
                    self._keep_traceback(program)
                case Note(text=text, is_warning=is_warning):
                    log("WARNING" if is_warning else "INFO", text)

    def _poke(self) -> None:
        try:
            programs = self._supervisor.programs()
        except SupervisorError:
            self._supervisor_answers = False
            self._core.supervisor_silent(now=time.monotonic())
            return
        self._supervisor_answers = True
        seen = [Seen(program.name, program.state, program.pid) for program in programs]
        self._perform(self._core.programs(seen, now=time.monotonic()))

    def _signal(self, program: str, pid: int, number: signal.Signals, *, to_group: bool) -> None:
        with contextlib.suppress(ProcessLookupError):
            try:
                if to_group and os.getpgid(pid) == pid:
                    os.killpg(pid, number)
                else:
                    os.kill(pid, number)
            except PermissionError:
                # Another user's (docs/isolation.md): supervisord is root then, and reaches it.
                try:
                    self._supervisor.signal(program, number.name.removeprefix("SIG"))
                except SupervisorError as fault:
                    log("WARNING", f"signal failed program={program} signal={number.name} reason={fault}")

    def _start(self, program: str) -> None:
        try:
            self._supervisor.start(program)
        except SupervisorError as fault:
            log("WARNING", f"start failed program={program} reason={fault}")

    def _hear_broker(self) -> None:
        while True:
            try:
                answer = self._admin.receive()
            except AdminRefused as refusal:
                # An answer all the same: the broker lives, though it does not let us watch.
                log("WARNING", f"the broker refuses presence: {refusal}")
                self._core.broker_answered(now=time.monotonic())
                continue
            if answer is None:
                return
            self._core.broker_answered(now=time.monotonic())
            if answer[0] == self._status_request:
                if self._metrics is not None and isinstance(answer[2], dict):
                    self._bus = answer[2]
                    self._metrics.answered()
                    self._bus = None
                continue
            self._presence_of(answer[2])

    def _presence_of(self, body: Any) -> None:
        """One event, or the list of all modules that answers each question."""
        if not isinstance(body, dict):
            return
        modules = body.get("modules", [body])
        for module in modules if isinstance(modules, list) else []:
            if not isinstance(module, dict):
                continue
            name, pid = str(module.get("name")), module.get("pid")
            if not isinstance(pid, int) or pid <= 0:
                continue
            what = module.get("event") or module.get("state")
            now = time.monotonic()
            if what == "silent":
                self._perform(self._core.silent(name, self._supervised(pid), now=now))
            elif what in ("attached", "back"):
                self._perform(self._core.heard(self._supervised(pid), now=now))

    def _supervised(self, pid: int) -> int:
        """The supervised process that `pid` belongs to: supervisord makes each the leader of a group."""
        if pid not in self._watched:
            with contextlib.suppress(OSError):
                return os.getpgid(pid)
        return pid

    def _watch_deaths(self) -> None:
        pids = self._core.pids()
        for pid in self._watched.keys() - pids:
            self._forget(pid)
        for pid in pids - self._watched.keys():
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                self._perform(self._core.died(pid, now=time.monotonic()))
                continue
            except OSError:
                continue  # no pidfd on this kernel: supervisord's own look once a second has to do
            self._watched[pid] = fd
            self._poller.register(fd, zmq.POLLIN)

    def _forget(self, pid: int) -> None:
        fd = self._watched.pop(pid)
        self._poller.unregister(fd)
        os.close(fd)

    # --- tracebacks ---

    def _log_of(self, program: str) -> Path:
        return self._home.log / f"{program.rpartition(':')[2]}.log"

    def _keep_traceback(self, program: str) -> None:
        """Copy what the log got since the abort into a file of its own: the log will be rotated."""
        path = self._log_of(program)
        with contextlib.suppress(OSError):
            kept = keep_traceback(path, self._log_sizes.pop(program, 0))
            log("INFO", f"traceback of program={program} kept in {kept}")

    # --- metrics ---

    def _serve_metrics(self) -> None:
        settings = self._metrics_settings
        try:
            self._metrics = MetricsServer(
                settings.address, settings.port, self._poller, ask=self._ask_status, text=self._metrics_text
            )
        except OSError as fault:
            self._bind_at = time.monotonic() + _BIND_AGAIN_SECONDS
            if str(fault) != self._bind_fault:
                self._bind_fault = str(fault)
                log(
                    "WARNING",
                    f"no metrics: {settings.address}:{settings.port}: {fault} (runtime.metrics.port; tried again)",
                )
            return
        self._bind_fault = ""
        log("INFO", f"metrics on http://{settings.address}:{self._metrics.port}/metrics")
        self._replace(self._home.metrics_json, json.dumps({"address": settings.address, "port": self._metrics.port}))

    def _ask_status(self) -> None:
        self._status_request = self._admin.new_request()
        self._admin.ask_nowait("status", {}, self._status_request)

    def _metrics_text(self, has_bus: bool) -> str:
        counts = self._core.statistics()
        programs = []
        for seen in self._core.states():
            count = counts[seen.name]
            resident_bytes, cpu_seconds = process_facts(seen.pid) if seen.pid else (None, None)
            programs.append(
                ProgramFacts(
                    seen.name,
                    seen.state,
                    restarts=count.restarts,
                    storms=count.storms,
                    in_storm=count.in_storm,
                    aborts=count.hangs,
                    kills=count.kills,
                    revivals=count.revivals,
                    resident_bytes=resident_bytes,
                    cpu_seconds=cpu_seconds,
                )
            )
        python = ".".join(map(str, sys.version_info[:3]))
        bus = self._bus if has_bus else None
        return render(Facts(__version__, python, self._node_name, bus, self._supervisor_answers, programs))

    # --- counts for `status` ---

    def _write_counts(self) -> None:
        counts = self._core.statistics()
        if counts == self._written:
            return
        self._written = counts
        self._replace(self._home.watchdog_json, json.dumps({name: asdict(count) for name, count in counts.items()}))

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        scratch = path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # for `status` only
            scratch.write_text(text)
            scratch.replace(path)


def keep_traceback(path: Path, begin: int) -> Path:
    """Copy `path` from byte `begin` on into `NAME.hung-N.txt` beside it, and forget the oldest. Raises OSError.

    N counts up; the last five are kept, of each at most 64 KiB.
    """
    kept = {}
    for entry in path.parent.glob(f"{path.stem}.hung-*.txt"):
        number = entry.stem.rpartition("-")[2]
        if number.isdigit():
            kept[int(number)] = entry
    with path.open("rb") as file:
        if _size(path) < begin:
            begin = 0  # rotated since
        file.seek(begin)
        text = file.read(_TRACEBACK_BYTES)
    target = path.with_name(f"{path.stem}.hung-{max(kept, default=0) + 1}.txt")
    target.write_bytes(text)
    for old in sorted(kept)[: max(0, len(kept) + 1 - _TRACEBACKS)]:
        kept[old].unlink(missing_ok=True)
    return target


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def log(level: str, text: str) -> None:
    """One line as `runtime.logs` writes them; without `logging`, which costs memory. Never raises for a full disk."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{stamp}.{int(now * 1000) % 1000:03d}Z {level} runtime.watchdog {text}\n")
        sys.stderr.flush()


def settings_of(node: dict[str, Any]) -> tuple[bool, WatchSettings]:
    """Whether the watchdog is enabled, and its settings, from a parsed and checked `node.json`."""
    section = node.get("runtime", {}).get("watchdog", {})
    defaults = WatchSettings()
    return section.get("enable", True), WatchSettings(
        poll_seconds=section.get("pollSeconds", defaults.poll_seconds),
        hang_grace_seconds=section.get("hangGraceSeconds", defaults.hang_grace_seconds),
        broker_silence_seconds=section.get("brokerSilenceSeconds", defaults.broker_silence_seconds),
        broker_question_seconds=min(
            defaults.broker_question_seconds,
            section.get("brokerSilenceSeconds", defaults.broker_silence_seconds) / 3,
        ),
        revive_first_seconds=section.get("reviveFirstSeconds", defaults.revive_first_seconds),
        revive_cap_seconds=section.get("reviveCapSeconds", defaults.revive_cap_seconds),
        storm_restarts=section.get("stormRestarts", defaults.storm_restarts),
        storm_seconds=section.get("stormSeconds", defaults.storm_seconds),
    )


def metrics_settings_of(node: dict[str, Any]) -> MetricsSettings:
    """From a parsed and checked `node.json`."""
    section = node.get("runtime", {}).get("metrics", {})
    defaults = MetricsSettings()
    return MetricsSettings(
        enable=section.get("enable", defaults.enable),
        address=section.get("address", defaults.address),
        port=section.get("port", defaults.port),
    )


def main() -> NoReturn:
    die_with_parent()
    faulthandler.enable()
    home = find_home()
    # Read as plain JSON, not with runtime.config: msgspec would be a tenth of this process. The CLI has checked it.
    try:
        node = json.loads(home.node_json.read_bytes())
    except FileNotFoundError:
        node = {}
    except (OSError, ValueError) as fault:
        log("ERROR", f"{home.node_json}: {fault}: run `edgezmq up` again")
        sys.exit(2)
    enabled, settings = settings_of(node)
    if not enabled:
        log("INFO", "disabled by runtime.watchdog.enable: false")
        exit_disabled()
    try:
        lock = hold(home.lock(NAME))
    except AlreadyRunning as taken:
        log("ERROR", str(taken))
        sys.exit(1)
    endpoint = bus_endpoint(home, node.get("runtime", {}).get("bus", {}).get("endpoint", ""))
    log("INFO", f"watching supervisor={home.supervisor_socket} broker={endpoint}")
    with lock:
        watchdog = Watchdog(home, endpoint, settings, metrics_settings_of(node), node.get("node_name", ""))
        settle()
        watchdog.run()


if __name__ == "__main__":
    main()
