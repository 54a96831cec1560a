"""One process per name: a file lock held for life, and death together with the parent.

The kernel drops a lock with its holder, so a stale lock file never keeps anybody out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from runtime.errors import AlreadyRunning

SUPERVISOR_PID_VARIABLE: Final = "EDGEZMQ_SUPERVISOR_PID"
"Set by `edgezmq up`: whose death ends the supervised processes."

HELD_VARIABLE: Final = "EDGEZMQ_HELD_LOCK"
"A lock that this process held already when it was another program: its pid, the descriptor, and the file's path."

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class Lock:
    """A held lock. It lives as long as its descriptor: until `release` or the end of the process."""

    __slots__ = ("_fd", "path")

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def release(self) -> None:
        """Give the name up. Idempotent. The file stays: removing it would let two holders in."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold(
    path: Path, *, inheritable: bool = False, read_only: bool = False, environ: Mapping[str, str] = os.environ
) -> Lock:
    """Take the lock at `path` and write our pid into it; one that this process took before an exec is ours already.

    `inheritable` keeps it over an exec, for a process that becomes another program; `read_only` leaves a descriptor
    with which that program cannot write the file.
    Raises AlreadyRunning (path, pid of the holder) at once, OSError when the file cannot be made.
    """
    held = environ.get(HELD_VARIABLE, "").split(":", 2)
    if held[0] == str(os.getpid()) and held[2:] == [str(path)]:
        return Lock(path, int(held[1]))
    # Not through a link: a directory that several users write to is not to choose the file.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    _take(fd, path)
    # A full disk must not keep a process down: the lock is what counts, the number is for people.
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    if read_only:
        os.close(fd)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        _take(fd, path)
    os.set_inheritable(fd, inheritable)
    return Lock(path, fd)


def _take(fd: int, path: Path) -> None:
    """Closes `fd` when it does not get the lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        pid = _read_pid(fd)
        os.close(fd)
        if fault.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise AlreadyRunning(str(path), pid) from None
        raise


def held_text(lock: Lock) -> str:
    """For `HELD_VARIABLE`, when this process is about to become another program."""
    return f"{os.getpid()}:{lock.fileno()}:{lock.path}"


def is_open_in(pid: int, path: Path) -> bool:
    """Whether the process `pid` has the file open; False for one that is gone, or that we may not look into."""
    try:
        return any(os.readlink(entry) == str(path) for entry in os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return False


def holder(path: Path) -> int | None:
    """The pid of the living process that holds the lock at `path`; None when nobody does.

    0 stands for a holder whose pid is not in the file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as fault:
        if fault.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return _read_pid(fd) or 0
    finally:
        os.close(fd)
    return None


def holders(directory: Path) -> Iterator[tuple[str, int]]:
    """Name and pid of every living holder of a lock in `directory`."""
    for path in sorted(directory.glob("*.lock")):
        pid = holder(path)
        if pid is not None:
            yield path.stem, pid


def _read_pid(fd: int) -> int | None:
    try:
        return int(os.pread(fd, 32, 0))
    except (OSError, ValueError):
        return None


def die_with_parent(environ: Mapping[str, str] = os.environ) -> None:
    """Ask the kernel to kill us when supervisord dies, so that no orphan keeps a socket or a lock.

    Only under our supervisord (EDGEZMQ_SUPERVISOR_PID); a module started from a shell may outlive it.
    SIGKILL and not SIGTERM, because a process that hangs would ignore the latter; what was accepted
    survives a kill in any case. Survives exec. Ends the process when the parent is gone already.
    """
    supervisor = environ.get(SUPERVISOR_PID_VARIABLE, "")
    if not supervisor.isdigit() or sys.platform != "linux":
        return
    import ctypes  # here, for it costs memory that an unsupervised process need not pay

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have died before the call: then nobody would tell us any more.
    if os.getppid() != int(supervisor) and not _is_alive(int(supervisor)):
        raise SystemExit("the supervisor is gone")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
