"""Where a node keeps its files: everything under EDGEZMQ_HOME, nothing outside it.

    run/   bus.sock, node.json, <name>.lock, supervisor.sock, supervisord.pid, watchdog.json, metrics.json
    log/   <name>.log
    data/  each module's own files
    pki/   CA, certificate and key, where we make them; curve/ has keys for the bus over tcp
    bus/   sockets that are one module's own, where policy wants such
    homes/ of modules that run as users of their own: each has in it a home like this one

Two nodes may run on one machine with two homes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

HOME_VARIABLE: Final = "EDGEZMQ_HOME"
BUS_VARIABLE: Final = "EDGEZMQ_BUS"
CURVE_KEY_VARIABLE: Final = "EDGEZMQ_CURVE_KEY"
"Of a module that comes over tcp: the file with its secret key."
CURVE_SERVER_VARIABLE: Final = "EDGEZMQ_CURVE_SERVER"
"Likewise: the broker's public key, in Z85."

IPC_PATH_LIMIT: Final = 107
"Bytes of a unix socket's path (`sun_path` has 108 with its end mark, unix(7))."

_MODE: Final = 0o750
_PRIVATE_MODE: Final = 0o700
"For directories that hold secrets."


class Home:
    """The state directory of one node. Naming paths creates nothing; `prepare` does."""

    __slots__ = ("path",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Home({str(self.path)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Home) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def pki(self) -> Path:
        return self.path / "pki"

    @property
    def curve(self) -> Path:
        """CURVE keys for the bus over tcp (runtime/keys.py)."""
        return self.pki / "curve"

    def own_socket(self, name: str) -> Path:
        """The socket of the bus that is for the module `name` alone."""
        return self.path / "bus" / f"{name}.sock"

    @property
    def modules(self) -> Path:
        """The user's own supervisord programs: `*.conf`, included by supervisord.conf."""
        return self.path / "modules.d"

    @property
    def bus_socket(self) -> Path:
        return self.run / "bus.sock"

    @property
    def node_json(self) -> Path:
        """The checked configuration, as `edgezmq up` wrote it."""
        return self.run / "node.json"

    @property
    def supervisor_socket(self) -> Path:
        return self.run / "supervisor.sock"

    @property
    def watchdog_json(self) -> Path:
        """What the watchdog has counted, for `edgezmq status`."""
        return self.run / "watchdog.json"

    @property
    def metrics_json(self) -> Path:
        """Where the watchdog serves `/metrics`: address and port."""
        return self.run / "metrics.json"

    def open_own_sockets(self) -> None:
        """Make their directory, and let other users pass through to it; they can list nothing. Raises OSError."""
        self._open(self.path / "bus")

    def own_home(self, name: str) -> Path:
        """The home of a module that runs as a user of its own, who cannot enter this one."""
        return self.path / "homes" / name

    def open_own_homes(self) -> None:
        """Make their directory, and let other users pass through to it. Raises OSError."""
        self._open(self.path / "homes")

    def _open(self, directory: Path) -> None:
        """Others may pass through `directory` and list nothing. What is so already may belong to somebody else."""
        directory.mkdir(mode=0o711, exist_ok=True)
        if directory.stat().st_mode & 0o777 != 0o711:
            directory.chmod(0o711)
        mode = self.path.stat().st_mode
        if not mode & 0o001:
            self.path.chmod(mode | 0o001)

    def lock(self, name: str) -> Path:
        return self.run / f"{name}.lock"

    def prepare(self) -> Home:
        """Make the directories, closed to others (data and pki to the group too). Idempotent; raises OSError."""
        self.path.mkdir(mode=_MODE, parents=True, exist_ok=True)
        for directory, mode in (
            (self.run, _MODE),
            (self.log, _MODE),
            (self.modules, _MODE),
            (self.data, _PRIVATE_MODE),
            (self.pki, _PRIVATE_MODE),
        ):
            directory.mkdir(mode=mode, exist_ok=True)
        return self


def find_home(environ: Mapping[str, str] = os.environ) -> Home:
    """The home that the environment names, else `$XDG_STATE_HOME/edgezmq` or `~/.local/state/edgezmq`."""
    named = environ.get(HOME_VARIABLE)
    if named:
        return Home(Path(named).absolute())
    state = environ.get("XDG_STATE_HOME")
    # The XDG base directory specification: a relative path there is to be ignored.
    base = Path(state) if state and os.path.isabs(state) else Path.home() / ".local" / "state"
    return Home(base / "edgezmq")


def bus_endpoint(home: Home, configured: str = "", environ: Mapping[str, str] = os.environ) -> str:
    """The endpoint of the bus: EDGEZMQ_BUS, else what configuration says, else the socket in `home`."""
    return environ.get(BUS_VARIABLE) or configured or f"ipc://{home.bus_socket}"
