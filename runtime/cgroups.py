"""Put this process into a cgroup of its own: what `runtime.confine` planned, done to the files of the kernel."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from runtime.confine import (
    EVENT_FILES,
    NODE_LEAF,
    V2,
    CannotConfine,
    Cgroup,
    Hierarchy,
    Limits,
    Struck,
    Write,
    base_of,
    group_of,
    parse_hierarchies,
    plan,
    struck,
)

_KILL_SECONDS: Final = 5.0
"For leftovers to be gone after SIGKILL; longer takes only a process that hangs in the kernel."
_LOOK_SECONDS: Final = 0.005
_SYSTEMD: Final = "/run/systemd/system"
"There when systemd is init (sd_booted(3))."


class Confinement:
    """The cgroup of module `name` of the node in `home`, with `limits`. Raises CannotConfine where it cannot be had."""

    def __init__(self, home: Path, name: str, limits: Limits) -> None:
        self._cgroups = plan(limits, _hierarchies(), _controllers, group=group_of(str(home)), name=name)

    def clear(self) -> int:
        """Kill what an earlier run left in it; the number of processes. Raises CannotConfine when they do not die."""
        return len({pid for cgroup in self._cgroups for pid in _empty(cgroup.directory)})

    def struck(self) -> Struck:
        """What the limits did to the run before, until `enter` begins a new account."""
        return struck(
            {
                controller: _read(f"{cgroup.directory}/{EVENT_FILES[cgroup.version][controller]}")
                for cgroup in self._cgroups
                for controller in cgroup.controllers
            }
        )

    def enter(self) -> None:
        """Make it, once it is `clear`, and move this process into it. Raises CannotConfine."""
        for cgroup in self._cgroups:
            _make(cgroup)
        for cgroup in self._cgroups:
            _write(cgroup.directory, Write("cgroup.procs", "0"))  # 0: the one who writes


def end_modules(home: Path, is_ours: Callable[[int], bool]) -> Iterator[tuple[str, int]]:
    """Kill what is left in the cgroups of modules of the node in `home`, and remove these; yields name and pid of each.

    Left alone is a cgroup with no process that `is_ours`. Only those are found that were made from our own cgroup.
    """
    for hierarchy in _hierarchies():
        parent = f"{base_of(hierarchy)}/{group_of(str(home))}"
        with contextlib.suppress(OSError):
            for entry in [entry for entry in os.scandir(parent) if entry.is_dir(follow_symlinks=False)]:
                left = _processes(entry.path)
                if left and not any(map(is_ours, left)):
                    continue
                for pid in sorted(_empty(entry.path)):
                    yield entry.name, pid
                _remove(entry.path)
            os.rmdir(parent)


def _hierarchies() -> list[Hierarchy]:
    with open("/proc/self/mountinfo") as mountinfo, open("/proc/self/cgroup") as own:
        return parse_hierarchies(mountinfo.read(), own.read())


def _controllers(directory: str) -> frozenset[str]:
    return frozenset(_read(f"{directory}/cgroup.controllers").split())


# --- leftovers ----------------------------------------------------------------------------------------


def _empty(directory: str) -> set[int]:
    """Kill all processes in it, and tell which. None may fork meanwhile where pids are limited."""
    left = _processes(directory)
    if not left:
        return left
    found = set(left)
    with contextlib.suppress(OSError):
        _put(f"{directory}/pids.max", "0")
    end = time.monotonic() + _KILL_SECONDS
    while left:
        if time.monotonic() > end:
            raise CannotConfine(f"processes of an earlier run do not die: {sorted(left)} in {directory}")
        try:
            _put(f"{directory}/cgroup.kill", "1")  # v2 since Linux 5.14
        except OSError:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_SECONDS)  # between two looks
        left = _processes(directory)
        found |= left
    return found


def _processes(directory: str) -> set[int]:
    return {int(pid) for pid in _read(f"{directory}/cgroup.procs").split()}


# --- making -------------------------------------------------------------------------------------------


def _make(cgroup: Cgroup) -> None:
    with _translated(cgroup.base):
        if cgroup.version == V2:
            with _alone(cgroup.base):
                _hand_on(cgroup)
        else:
            os.makedirs(cgroup.parent, exist_ok=True)
        # A new one counts events from nothing on, and has no limits of an older configuration.
        with contextlib.suppress(FileNotFoundError):
            _remove(cgroup.directory)
        os.makedirs(cgroup.directory, exist_ok=True)
    for write in cgroup.writes:
        _write(cgroup.directory, write)


def _remove(directory: str) -> None:
    """Cgroups within it first, which a module may have made. One that is still being torn down is used again."""
    end = time.monotonic() + _KILL_SECONDS
    while True:
        try:
            for inner in [entry.path for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]:
                _empty(inner)
                _remove(inner)
            os.rmdir(directory)
        except OSError as fault:
            if fault.errno != errno.EBUSY:
                raise
            if time.monotonic() > end:
                return
            time.sleep(_LOOK_SECONDS)  # processes that are dead leave it a moment later
        else:
            return


@contextlib.contextmanager
def _alone(base: str) -> Iterator[None]:
    """Modules start side by side; one of them at a time arranges what is above."""
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _hand_on(cgroup: Cgroup) -> None:
    """v2: have the controllers down in `parent`'s children."""
    text = " ".join(f"+{controller}" for controller in cgroup.controllers)
    missing = set(cgroup.controllers) - set(_read(f"{cgroup.base}/cgroup.subtree_control").split())
    if missing:
        try:
            _put(f"{cgroup.base}/cgroup.subtree_control", text)
        except OSError as fault:
            if fault.errno != errno.EBUSY:
                raise
            # "No internal processes": they move to a leaf beside the modules, and are the node's there.
            _check_ours(cgroup.base)
            _move_to_leaf(cgroup.base)
            _put(f"{cgroup.base}/cgroup.subtree_control", text)
    os.makedirs(cgroup.parent, exist_ok=True)
    _put(f"{cgroup.parent}/cgroup.subtree_control", text)


def _check_ours(base: str) -> None:
    """Under systemd only what it has delegated may be rearranged (systemd.io, Control Group APIs and Delegation)."""
    if not os.path.isdir(_SYSTEMD):
        return
    for attribute in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(base, attribute) == b"1":
                return
    raise CannotConfine(
        f"{base} is systemd's: start the node as a service with Delegate=yes, not from a shell (docs/isolation.md)"
    )


def _move_to_leaf(base: str) -> None:
    leaf = f"{base}/{NODE_LEAF}"
    os.makedirs(leaf, exist_ok=True)
    end = time.monotonic() + _KILL_SECONDS
    while (left := _processes(base)) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                _put(f"{leaf}/cgroup.procs", str(pid))


# --- files --------------------------------------------------------------------------------------------


def _write(directory: str, write: Write) -> None:
    path = f"{directory}/{write.file}"
    try:
        _put(path, write.value)
    except FileNotFoundError:
        if write.is_wanted:
            raise CannotConfine(f"{path} is not there: this kernel has no such limit") from None
    except OSError as fault:
        if write.is_wanted:
            raise CannotConfine(f"{path} takes no {write.value!r}: {fault.strerror}") from fault


@contextlib.contextmanager
def _translated(base: str) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        if fault.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what = "mounted read-only" if fault.errno == errno.EROFS else "closed to this user"
            raise CannotConfine(
                f"cgroups below {base} are {what}: limits need root, or a systemd unit with Delegate=yes; "
                "or give the module a systemd unit of its own (docs/isolation.md)"
            ) from fault
        raise CannotConfine(f"{fault.filename or base}: {fault.strerror}") from fault


def _put(path: str, value: str) -> None:
    """One write(2), as the kernel wants it; never makes a file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
