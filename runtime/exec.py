"""`edgezmq exec [--name NAME] [--user USER] [--memory SIZE] … -- COMMAND …`: a well-behaved child of supervisord.

Asks the kernel to end the process together with supervisord, takes the lock of its name, and becomes the
command: for programs in other languages, which do not do this themselves. With limits it gives the module a cgroup
of its own first, and with a user it becomes that one (docs/isolation.md). The process stays the same throughout: to
supervisord its pid is the module's.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from runtime.errors import AlreadyRunning, ConfigError, EdgezmqError, InvalidName
from runtime.home import BUS_VARIABLE, HOME_VARIABLE, Home, find_home
from runtime.locks import HELD_VARIABLE, Lock, die_with_parent, held_text, hold, is_open_in
from runtime.names import check_name

if TYPE_CHECKING:
    from runtime.confine import Limits

USAGE: Final = (
    "usage: edgezmq exec [--name NAME] [--user USER [--group GROUP]]\n"
    "                    [--memory SIZE] [--cpu PERCENT%] [--cpu-weight N] [--pids N] -- COMMAND [ARGUMENT …]"
)
LIMITS: Final = ("memory", "cpu", "cpu-weight", "pids")
_OPTIONS: Final = ("name", "user", "group", *LIMITS)
_ALONE: Final = {"user", "memory", "cpu", "cpu-weight", "pids"}
"These make something that is called after the module."

_DROPPED: Final = ("EDGEZMQ_", "SUPERVISOR_", "SUDO_", "SSH_", "XDG_", "DBUS_", "LISTEN_", "PYTHON", "VIRTUAL_ENV")
"Beginnings of variables that are the node's or root's own, not the module's."
_DROPPED_NAMES: Final = ("NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "INVOCATION_ID", "JOURNAL_STREAM", "MAIL")
_KEPT: Final = (
    "EDGEZMQ_BUS",
    "EDGEZMQ_CURVE_KEY",
    "EDGEZMQ_CURVE_SERVER",
    "EDGEZMQ_SUPERVISOR_PID",
    "EDGEZMQ_PYTHON",
    "PYTHONUNBUFFERED",
    "PYTHONNODEBUGRANGES",
)

_PR_SET_NO_NEW_PRIVS: Final = 38  # linux/prctl.h


class Call(NamedTuple):
    """The arguments."""

    options: Mapping[str, str]
    command: list[str]

    @property
    def name(self) -> str | None:
        return self.options.get("name")


class User(NamedTuple):
    """Whom the module runs as."""

    uid: int
    gid: int
    name: str
    "Empty for a uid that has none."
    home: str


def parse(arguments: Sequence[str]) -> Call:
    """Options and command out of the arguments; raises ValueError, InvalidName."""
    options: dict[str, str] = {}
    rest = list(arguments)
    while rest and rest[0] != "--" and rest[0].startswith("-"):
        option, has_value, value = rest.pop(0).partition("=")
        key = option.removeprefix("--")
        if key not in _OPTIONS or not option.startswith("--"):
            raise ValueError(f"unknown option {option}")
        if not has_value:
            if not rest or rest[0] == "--":
                raise ValueError(f"{option} has no value")
            value = rest.pop(0)
        options[key] = value
    command = rest[1:] if rest[:1] == ["--"] else rest
    if "name" in options:
        check_name(options["name"])
    elif wanting := sorted(_ALONE & options.keys()):
        raise ValueError(f"--{wanting[0]} wants --name: the limits and files of a module are kept under its name")
    if "group" in options and "user" not in options:
        raise ValueError("--group wants --user")
    if not command:
        raise ValueError("no command")
    return Call(options, command)


def limits_of(options: Mapping[str, str]) -> Limits | None:
    """None where no limit is given, which spares a module the import. Raises ConfigError."""
    if not any(option in options for option in LIMITS):
        return None
    from runtime import confine

    return confine.Limits(
        memory_bytes=confine.parse_memory(options["memory"]) if "memory" in options else None,
        cpu=confine.parse_cpu(options["cpu"]) if "cpu" in options else None,
        pids=confine.parse_pids(options["pids"]) if "pids" in options else None,
        cpu_weight=confine.parse_weight(options["cpu-weight"]) if "cpu-weight" in options else None,
    )


def find_user(options: Mapping[str, str]) -> User | None:
    """Raises ConfigError for a user or a group that this host does not know, and for root."""
    named = options.get("user")
    if named is None:
        return None
    import grp
    import pwd

    try:
        entry = pwd.getpwuid(int(named)) if _is_number(named) else pwd.getpwnam(named)
    except (KeyError, OverflowError) as fault:
        if not _is_number(named) or not 0 < int(named) < 2**32 - 1:
            raise ConfigError("--user", named, "a user of this host (useradd --system makes one), or a uid") from fault
        user = User(int(named), int(named), "", "/")
    else:
        user = User(entry.pw_uid, entry.pw_gid, entry.pw_name, entry.pw_dir)
    if user.uid == 0:
        raise ConfigError("--user", named, "another user than root, whom no limit and no permission binds")
    group = options.get("group")
    if group is None:
        return user
    try:
        return user._replace(gid=int(group) if _is_number(group) else grp.getgrnam(group).gr_gid)
    except KeyError as fault:
        raise ConfigError("--group", group, "a group of this host, or a gid") from fault


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def environment_of(environ: Mapping[str, str], user: User, home: Home, name: str) -> dict[str, str]:
    """What the module is told: its own home and socket, and nothing of the node's or of root's session."""
    found = {
        key: value
        for key, value in environ.items()
        if key in _KEPT or not (key.startswith(_DROPPED) or key in _DROPPED_NAMES)
    }
    found[HOME_VARIABLE] = str(home.own_home(name))
    found.setdefault(BUS_VARIABLE, f"ipc://{home.own_socket(name)}")
    found["HOME"] = found[HOME_VARIABLE]
    found["USER"] = found["LOGNAME"] = user.name or str(user.uid)
    found["SHELL"] = "/bin/sh"
    return found


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Becomes the command.

    Exits 2 for a wrong call or where limits or user cannot be had, 1 when the name is taken, 127 when there is no such
    command.
    """
    try:
        call = parse(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, InvalidName) as fault:
        sys.exit(_complain(f"{fault}\n{USAGE}", 2))
    try:
        environ = _become_module(call)
    except AlreadyRunning as fault:
        sys.exit(_complain(str(fault), 1))
    except EdgezmqError as fault:
        sys.exit(_complain(str(fault), 2))
    except OSError as fault:
        where = f"{fault.filename}: " if fault.filename else ""
        sys.exit(_complain(f"{where}{fault.strerror or fault}", 1))
    # After the change of the user, with which the kernel forgets it (prctl(2)).
    die_with_parent()
    try:
        os.execvpe(call.command[0], call.command, environ)
    except OSError as fault:
        sys.exit(_complain(f"{call.command[0]}: {fault.strerror}", 127))


def _become_module(call: Call) -> dict[str, str]:
    """Lock, cgroup, user; the environment for the command. Raises EdgezmqError, OSError."""
    environ = dict(os.environ)
    environ.pop(HELD_VARIABLE, None)
    name = call.name
    if name is None:
        return environ
    limits, user = limits_of(call.options), find_user(call.options)
    if user is not None and os.geteuid() not in (0, user.uid):
        raise ConfigError(
            "--user", call.options["user"], "root, who alone can become another user; or a systemd unit with User="
        )
    home = find_home()
    # What comes after has the descriptor, and another user is not to write into the file with it.
    take = partial(hold, home.lock(name), inheritable=True, read_only=user is not None)
    lock = take() if limits is None else _confine(home, name, limits, take)
    if user is None:
        environ[HELD_VARIABLE] = held_text(lock)
        return environ
    own = home.own_home(name)
    if os.geteuid() == 0:
        _make_home(home, own, user)
        _become(user)
    if not os.access(".", os.R_OK | os.X_OK):
        os.chdir(own)
    return environment_of(environ, user, home, name)


def _confine(home: Home, name: str, limits: Limits, take: Callable[[], Lock]) -> Lock:
    """Enter the module's cgroup, after the end of what an earlier run left in it."""
    from runtime.cgroups import Confinement

    confinement = Confinement(home.path, name, limits)
    killed = 0
    try:
        lock = take()
    except AlreadyRunning as taken:
        # What a module has started has its lock too, and may outlive it.
        if taken.pid is not None and is_open_in(taken.pid, home.lock(name)):
            raise
        killed = confinement.clear()
        lock = take()
    before = confinement.struck()
    killed += confinement.clear()
    confinement.enter()
    if before.is_worth_a_warning:
        _say(f"the last run of {name} hit its limits: {before}")
    if killed:
        _say(f"killed what the last run of {name} left behind: processes={killed}")
    return lock


def _make_home(home: Home, own: Path, user: User) -> None:
    home.open_own_homes()
    own.mkdir(mode=0o700, exist_ok=True)
    # The directory it stands in is root's, so nobody else chooses what this is.
    if own.stat(follow_symlinks=False).st_uid != user.uid:
        os.chown(own, user.uid, user.gid, follow_symlinks=False)


def _become(user: User) -> None:
    """For good: no setuid program brings anything back."""
    import ctypes
    import stat

    for fd in (1, 2):
        # supervisord's pipes, for programs that open /dev/stdout.
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.fchown(fd, user.uid, -1)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    if user.name:
        os.initgroups(user.name, user.gid)
    else:
        os.setgroups([])
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def _say(text: str) -> None:
    sys.stderr.write(f"edgezmq exec: {text}\n")
    sys.stderr.flush()


def _complain(text: str, status: int) -> int:
    _say(text)
    return status


if __name__ == "__main__":
    main()
