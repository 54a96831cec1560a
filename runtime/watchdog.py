"""The watchdog process: `python -m runtime.watchdog`, under supervisord.

It learns of deaths from the kernel (pidfd) and of hung modules from the broker (ADMIN presence), asks
supervisord over XML-RPC, and does what `runtime.watching` decides. No asyncio and few imports: it is to
cost a node next to nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from random import Random
from typing import Any, Final, NoReturn

import zmq

from runtime.admin import AdminClient, AdminRefused
from runtime.errors import AlreadyRunning
from runtime.exits import exit_disabled
from runtime.home import Home, bus_endpoint, find_home
from runtime.locks import die_with_parent, hold
from runtime.memory import settle
from runtime.supervisord import Supervisor, SupervisorError
from runtime.watching import Abort, Action, AskBroker, Counts, Kill, Note, Poke, Seen, Start, Watching, WatchSettings

NAME: Final = "watchdog"

_CALL_SECONDS: Final = 2.0
"For one call to supervisord: meanwhile nothing else is watched."


class Watchdog:
    """Joins `Watching` with supervisord, the broker and the kernel."""

    def __init__(self, home: Home, endpoint: str, settings: WatchSettings) -> None:
        self._home = home
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
        wait_seconds = max(0.0, self._core.next_deadline() - time.monotonic())
        ready = dict(self._poller.poll(int(wait_seconds * 1000) + 1))
        # First what others said while we slept, then the deadlines: so nobody is called silent whose word lies here.
        for pid, fd in list(self._watched.items()):
            if fd in ready:
                self._forget(pid)
                self._perform(self._core.died(pid, now=time.monotonic()))
        self._hear_broker()
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
                case Abort(program=_, pid=pid):
                    _signal(pid, signal.SIGABRT, to_group=False)
                case Kill(program=_, pid=pid):
                    _signal(pid, signal.SIGKILL, to_group=True)
                case Start(program=program):
                    self._start(program)
                case Note(text=text, is_warning=is_warning):
                    log("WARNING" if is_warning else "INFO", text)

    def _poke(self) -> None:
        try:
            programs = self._supervisor.programs()
        except SupervisorError:
            self._core.supervisor_silent(now=time.monotonic())
            return
        seen = [Seen(program.name, program.state, program.pid) for program in programs]
        self._perform(self._core.programs(seen, now=time.monotonic()))

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

    def _write_counts(self) -> None:
        counts = self._core.statistics()
        if counts == self._written:
            return
        self._written = counts
        path = self._home.watchdog_json
        scratch = path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # for `status` only
            scratch.write_text(json.dumps({name: asdict(count) for name, count in counts.items()}))
            scratch.replace(path)


def _signal(pid: int, number: signal.Signals, *, to_group: bool) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if to_group and os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)


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
        watchdog = Watchdog(home, endpoint, settings)
        settle()
        watchdog.run()


if __name__ == "__main__":
    main()
