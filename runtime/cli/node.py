"""`edgezmq up`, `down`, `restart`, `logs`: the node as a whole, through supervisord."""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from runtime import cgroups
from runtime.cli import settings
from runtime.config import NodeConfig, store
from runtime.errors import AlreadyRunning, ConfigError, EdgezmqError
from runtime.home import IPC_PATH_LIMIT, Home, find_home
from runtime.locks import SUPERVISOR_PID_VARIABLE, hold, holder, holders
from runtime.shipped import shipped
from runtime.supervisord import SHUTDOWN_STATE, Program, Supervisor, SupervisorError, SupervisorFault

NODE_LOCK: Final = "node"
"Held by supervisord for life; taken by `up` before it becomes supervisord."

CONF_VARIABLE: Final = "EDGEZMQ_SUPERVISORD_CONF"

READY_SECONDS: Final = 15.0
"How long `up -d` waits for the node before it returns with a word on what is missing."

_UMASK: Final = 0o027


class NodeError(EdgezmqError):
    """What was asked of the node cannot be done; the text says why and what to do."""


# --- up -------------------------------------------------------------------------------------------


def up(named: Path | None, *, detach: bool) -> None:
    home = find_home()
    config, path = _read(named, home)
    conf = find_supervisord_conf()
    home.prepare()
    try:
        lock = hold(home.lock(NODE_LOCK), inheritable=True)
    except AlreadyRunning as taken:
        who = f" (supervisord, pid {taken.pid})" if taken.pid else ""
        raise NodeError(
            f"a node runs on {home.path} already{who}. `edgezmq status` shows it, `edgezmq down` ends it; "
            "for a second node set EDGEZMQ_HOME to another directory"
        ) from None
    for name, pid in end_leftovers(home):
        _say(f"ended a leftover of an earlier run: {name} (pid {pid})")
    store(config, home)
    os.umask(_UMASK)
    _say(f"node {config.node_name}: configuration {path}, state {home.path}")
    if detach:
        _up_detached(home, config, conf, lock.fileno())
    else:
        _say("Ctrl-C stops the node. In another terminal: edgezmq status")
        _become_supervisord(home, conf, lock.fileno(), "-n")


def store_configuration(named: Path | None) -> None:
    """What `up` does before it starts anything."""
    home = find_home()
    config, path = _read(named, home)
    home.prepare()
    store(config, home)
    _say(f"node {config.node_name}: configuration {path}, written to {home.node_json}")


def _read(named: Path | None, home: Home) -> tuple[NodeConfig, Path]:
    path = settings.find(named, home)
    config, warnings = settings.read(path)
    for warning in (*warnings, *_missing_files(config)):
        _say(f"warning: {warning}")
    check_path_lengths(home, config)
    return config, path


def _missing_files(config: NodeConfig) -> Iterator[str]:
    """Not an error here: the node runs without the cloud until the files are there, or joins by itself."""
    hub = config.edge_hub
    if hub.enable and not hub.token:
        for key, path in (
            ("tlsCaFile", hub.tls_ca_file),
            ("tlsCertFile", hub.tls_cert_file),
            ("tlsPrivateKeyFile", hub.tls_private_key_file),
        ):
            if not os.access(path, os.R_OK):
                yield f"modules.edgeHub.{key}: {path} cannot be read, so there will be no link (see: edgezmq check)"


def _become_supervisord(home: Home, conf: Path, lock_fd: int, *options: str) -> NoReturn:
    """Exec: our process id, and the lock on it, become supervisord's."""
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, b"%d\n" % os.getpid(), 0)
    _compile()
    environment = dict(os.environ)
    environment["EDGEZMQ_HOME"] = str(home.path)
    environment["EDGEZMQ_PYTHON"] = sys.executable
    environment[SUPERVISOR_PID_VARIABLE] = str(os.getpid())
    # For supervisord itself what supervisord.conf sets for its children: less memory.
    environment.setdefault("MALLOC_ARENA_MAX", "1")
    environment.setdefault("PYTHONNODEBUGRANGES", "1")
    arguments = [sys.executable, "-m", "runtime.supervise", "-c", str(conf), *options]
    os.execve(sys.executable, arguments, environment)


def _compile() -> None:
    """Byte code for what the processes import, even where PYTHONDONTWRITEBYTECODE is set.

    Compiling it anew at every start would cost each of them time and about 2 MiB. Quick when there is nothing to do;
    where the directory is not ours to write to, it stays as it is.
    """
    import compileall

    root = Path(__file__).parents[2]
    for package in ("runtime", "modules"):
        compileall.compile_dir(root / package, quiet=2)


def _up_detached(home: Home, config: NodeConfig, conf: Path, lock_fd: int) -> None:
    output = home.log / "supervisord.out"
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            with open(os.devnull, "rb") as nothing, open(output, "wb") as out:
                os.dup2(nothing.fileno(), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            _become_supervisord(home, conf, lock_fd, "-n", "-s")
        except BaseException as fault:
            os.write(2, f"{fault}\n".encode())
        finally:
            os._exit(1)
    started = time.monotonic()
    missing = "supervisord"
    while time.monotonic() - started < READY_SECONDS:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            raise NodeError(f"supervisord ended at once: {output.read_text(errors='replace').strip()[-2000:]}")
        missing = what_is_missing(home, config)
        if not missing:
            _say(f"up (pid {pid}) after {time.monotonic() - started:.1f} s. Look: edgezmq status. End: edgezmq down")
            return
        time.sleep(0.02)  # each look also wakes supervisord
    _say(f"started (pid {pid}), but not there after {READY_SECONDS:g} s: {missing}. See: edgezmq status, edgezmq check")


def what_is_missing(home: Home, config: NodeConfig) -> str:
    """What a node that was just started still lacks, in words; empty when it is ready."""
    try:
        programs = Supervisor(home.supervisor_socket).programs()
    except SupervisorError:
        return "supervisord"
    for program in programs:
        if program.state == "FATAL":
            return f"{program.name} does not start: {program.detail} (edgezmq logs {program.name})"
    if any(program.state in ("STOPPED", "BACKOFF") for program in programs):
        return ", ".join(program.name for program in programs if program.state in ("STOPPED", "BACKOFF"))
    from runtime.admin import AdminClient, AdminRefused, BrokerSilent

    try:
        with AdminClient(config.endpoint(home)) as admin:
            modules = admin.ask("status", timeout_seconds=0.2)["modules"]
    except BrokerSilent:
        return "broker"
    except AdminRefused:
        # We are root and the broker is not (docs/isolation.md): that it answers is all it tells us.
        return ""
    attached = {module["name"] for module in modules if module["state"] == "attached"}
    ours = {"edgehub", "eventbus"} & config.declared_modules().keys()
    return ", ".join(sorted(ours - attached))


def end_leftovers(home: Home) -> Iterator[tuple[str, int]]:
    """Kill what an earlier supervisord of this home left behind; yields name and pid of each.

    Only processes that a supervisord of ours started and that hold a lock here: a module that somebody
    runs from a shell is left alone.
    """
    for name, pid in list(holders(home.run)):
        if name == NODE_LOCK or not pid or not _was_supervised(pid):
            continue
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
        yield name, pid
        end = time.monotonic() + 5.0
        while holder(home.lock(name)) is not None and time.monotonic() < end:
            time.sleep(0.01)  # the kernel drops the lock with the process
    # What a module with limits has forked off, out of reach of its own death.
    yield from cgroups.end_modules(home.path, _was_supervised)


def _was_supervised(pid: int) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(entry.startswith(SUPERVISOR_PID_VARIABLE.encode() + b"=") for entry in environment)


def check_path_lengths(home: Home, config: NodeConfig) -> None:
    """Raise ConfigError when a unix socket's path does not fit into the kernel's address, or supervisord's file."""
    if any(char.isspace() for char in str(home.path)):
        # supervisord separates the patterns of [include] by spaces, and has no way to quote them.
        raise ConfigError("EDGEZMQ_HOME", str(home.path), "a path without spaces")
    # supervisord binds a name with its pid behind it first, and renames that.
    sockets = [str(home.supervisor_socket) + ".4194304"]
    endpoint = config.endpoint(home)
    if endpoint.startswith("ipc://"):
        sockets.append(endpoint.removeprefix("ipc://"))
    sockets += [str(home.own_socket(name)) for name, rule in config.runtime.policy.modules.items() if rule.own_socket]
    for path in sockets:
        if len(os.fsencode(path)) > IPC_PATH_LIMIT:
            raise ConfigError(
                "EDGEZMQ_HOME", str(home.path), f"a shorter path: {path} has more than {IPC_PATH_LIMIT} bytes"
            )


def find_supervisord_conf() -> Path:
    """The shipped supervisord.conf, or the one that EDGEZMQ_SUPERVISORD_CONF names. Raises NodeError."""
    named = os.environ.get(CONF_VARIABLE)
    if named:
        if Path(named).is_file():
            return Path(named)
        raise NodeError(f"{CONF_VARIABLE} is {named}: no such file")
    try:
        return shipped("supervisord.conf")
    except FileNotFoundError as fault:
        raise NodeError(f"{fault}; {CONF_VARIABLE} may name another") from None


# --- down -----------------------------------------------------------------------------------------


def down(timeout_seconds: float) -> None:
    home = find_home()
    pid = holder(home.lock(NODE_LOCK)) if home.run.is_dir() else None
    if pid is None:
        for name, left in end_leftovers(home):
            _say(f"ended a leftover of an earlier run: {name} (pid {left})")
        _say(f"no node runs on {home.path}")
        return
    supervisor = Supervisor(home.supervisor_socket)
    started = time.monotonic()
    asked = False
    while holder(home.lock(NODE_LOCK)) is not None:
        if time.monotonic() - started > timeout_seconds:
            _say(f"not stopped after {timeout_seconds:g} s: killing supervisord (pid {pid}) and all under it")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            break
        try:
            if asked:
                supervisor.state()  # wakes it, so that it goes on at once
            else:
                supervisor.shutdown()
                asked = True
        except SupervisorFault as fault:
            asked = asked or fault.code == SHUTDOWN_STATE
        except SupervisorError:
            if not asked and time.monotonic() - started > 2.0:
                # It does not listen (any more, or yet): a signal reaches it all the same.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                asked = True
        time.sleep(0.03)  # between two looks
    end = time.monotonic() + 5.0
    while holder(home.lock(NODE_LOCK)) is not None and time.monotonic() < end:
        time.sleep(0.02)
    for name, left in end_leftovers(home):
        _say(f"killed {name} (pid {left})")
    _say(f"down after {time.monotonic() - started:.1f} s")


# --- restart --------------------------------------------------------------------------------------


def restart(name: str) -> None:
    supervisor = running_supervisor(find_home())
    for program in _named(supervisor, name):
        _restart(supervisor, program)


def _restart(supervisor: Supervisor, program: Program) -> None:
    started = time.monotonic()
    old = program.pid
    supervisor.stop(program.name, wait=False)
    current = _wait(supervisor, program.name, lambda p: p.state not in ("RUNNING", "STARTING", "STOPPING"), 20.0)
    if current.state not in ("BACKOFF",):
        supervisor.start(program.name)
    current = _wait(supervisor, program.name, lambda p: p.state in ("RUNNING", "EXITED", "FATAL", "BACKOFF"), 20.0)
    seconds = time.monotonic() - started
    if current.state == "RUNNING":
        _say(f"{program.name}: pid {old or '-'} → {current.pid} in {seconds:.1f} s")
    elif current.state == "EXITED" and current.exit_status == 0:
        _say(f"{program.name}: ended with status 0, as a module does that configuration disables")
    else:
        raise NodeError(f"{program.name} does not start: {current.detail}. See: edgezmq logs {program.name}")


def _wait(supervisor: Supervisor, name: str, is_there: Any, seconds: float) -> Program:
    end = time.monotonic() + seconds
    while True:
        [program] = [program for program in supervisor.programs() if program.name == name]
        if is_there(program):
            return program
        if time.monotonic() > end:
            raise NodeError(f"{name} is still {program.state} after {seconds:g} s")
        time.sleep(0.02)  # each look also wakes supervisord


def _named(supervisor: Supervisor, name: str) -> list[Program]:
    programs = supervisor.programs()
    if name == "all":
        return programs
    chosen = [program for program in programs if program.name == name]
    if not chosen:
        raise NodeError(_unknown(name, [program.name for program in programs]))
    return chosen


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "there are " + ", ".join(known)
    return f"no program {name!r} ({hint})"


def running_supervisor(home: Home) -> Supervisor:
    """The supervisord of `home`; raises NodeError when none answers."""
    supervisor = Supervisor(home.supervisor_socket)
    try:
        supervisor.pid()
    except SupervisorError as fault:
        raise NodeError(f"no node runs on {home.path} (start it: edgezmq up): {fault}") from fault
    return supervisor


# --- logs -----------------------------------------------------------------------------------------


def logs(name: str, *, follow: bool, lines: int) -> None:
    home = find_home()
    path = home.log / f"{name}.log"
    if "/" in name or not path.is_file():
        known = sorted(entry.stem for entry in home.log.glob("*.log"))
        if not known:
            raise NodeError(f"no logs in {home.log}: no node has run there yet")
        raise NodeError(_unknown(name, known).replace("no program", "no log of"))
    try:
        for text in _tail(path, lines, follow):
            sys.stdout.write(text)
            if follow:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return


def _tail(path: Path, lines: int, follow: bool) -> Iterator[str]:
    file = path.open(errors="replace")
    try:
        yield from deque(file, maxlen=lines)
        while follow:
            text = file.read()
            if text:
                yield text
                continue
            with contextlib.suppress(FileNotFoundError):
                here, there = os.fstat(file.fileno()), path.stat()
                if there.st_ino != here.st_ino or there.st_size < file.tell():
                    file.close()
                    file = path.open(errors="replace")  # rotated
                    continue
            time.sleep(0.1)  # between two looks at the file
    finally:
        file.close()


def _say(text: str) -> None:
    sys.stderr.write(f"edgezmq: {text}\n")
    sys.stderr.flush()
