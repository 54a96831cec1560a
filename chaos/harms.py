"""Who is harmed, and how: the table of cells, and what each harm does to a rig."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Final

from chaos.load import Load
from chaos.mixed import GO, C
from chaos.rig import PROGRAMS, Rig
from demo.around import QUIC

EVERYTHING: Final = "everything"
SHIMMED: Final = ("supervisord", *PROGRAMS, C, "mosquitto")
"Go asks the kernel itself, past libc: the shim is not in its way."
_DAY_SECONDS: Final = 86_400.0

PAIR_CARRIERS: Final = frozenset({"broker", "supervisord", EVERYTHING})
"Victims that the unrelated pair itself depends on: no ratio for them."


def shimmed(victim: str) -> Sequence[str]:
    """The processes that a harm by the shim is done to."""
    return SHIMMED if victim == EVERYTHING else (victim,)


@dataclass
class Scene:
    """What a harm may touch."""

    rig: Rig
    load: Load
    chance: Random
    pause: Callable[[float], None]
    "Go on with the load for so many seconds."
    victim: str
    spare: subprocess.Popen[bytes] | None = None
    stopped: list[int] = field(default_factory=list)
    continued_at: float = float("inf")

    def pids(self) -> list[int]:
        names: Sequence[str] = (self.victim,)
        if self.victim == EVERYTHING:
            names = ("supervisord", *self.rig.programs, "mosquitto", "cloudsim")
        return [pid for pid in map(self.rig.pid, names) if pid]

    def signal(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@dataclass(frozen=True)
class Harm:
    """`begin`, `hold_seconds` of load, `end`. Recovery counts from the end, or from the kill where `is_kill`."""

    name: str
    begin: Callable[[Scene], None]
    end: Callable[[Scene], None] | None = None
    hold_seconds: tuple[float, float] = (0.0, 0.0)
    is_kill: bool = False
    offline_seconds: float = 0.0
    "The link is away for so long before, so that the node has to store what it accepts."
    offline_by: str = "stall"
    "What the relay does meanwhile: `stall` or `refuse`."
    needs_shim: bool = False
    has_to_write: bool = False
    "At least one write must have met the full disk, or the cell shows nothing."
    must_fence: bool = False
    "Whoever was stopped may handle nothing more under its name."


@dataclass(frozen=True)
class Cell:
    victim: str
    harm: Harm

    @property
    def name(self) -> str:
        return f"{self.victim}:{self.harm.name}"


# --- signals -----------------------------------------------------------------------------------------


def _kill(scene: Scene) -> None:
    scene.signal(signal.SIGKILL)


def _terminate(scene: Scene) -> None:
    scene.signal(signal.SIGTERM)


def _stop(scene: Scene) -> None:
    scene.stopped = scene.pids()
    scene.signal(signal.SIGSTOP)


def _continue(scene: Scene) -> None:
    scene.continued_at = time.monotonic()
    for pid in scene.stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _stop_unwatched(scene: Scene) -> None:
    """With the watchdog, which would kill it: so it comes back long after it was given up."""
    watchdog = scene.rig.pid("watchdog")
    os.kill(watchdog, signal.SIGSTOP)
    _stop(scene)
    scene.stopped.append(watchdog)


def _stop_and_replace(scene: Scene) -> None:
    """A second process takes the name over while the first is stopped; its lock is in a home of its own."""
    _stop_unwatched(scene)
    home = scene.rig.directory / "spare"
    home.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "EDGEZMQ_HOME": str(home),
        "EDGEZMQ_BUS": f"ipc://{scene.rig.home.bus_socket}",
        "CHAOS_RECORD": str(scene.rig.record),
    }
    with (scene.rig.log / "spare.log").open("ab") as log:
        scene.spare = subprocess.Popen(scene.rig.command(scene.victim), env=environment, stderr=log)


def _continue_and_let_go(scene: Scene) -> None:
    watchdog = scene.stopped.pop()  # it would abort what it takes for hung, before that can end by itself
    _continue(scene)
    scene.pause(1.0)  # the fenced one ends, supervisord starts the third, which takes over from the second
    os.kill(watchdog, signal.SIGCONT)
    if scene.spare is not None:
        scene.spare.kill()
        scene.spare.wait()
        scene.spare = None


# --- the link ------------------------------------------------------------------------------------------


def _order(what: str, **facts: float) -> Callable[[Scene], None]:
    def order(scene: Scene) -> None:
        relay = scene.rig.mqtt_link if scene.victim == "mqtt-link" else scene.rig.link
        assert relay is not None
        relay.order(what, **facts)

    return order


def _restart_hub(scene: Scene) -> None:
    scene.load.inject("restart", seconds=2.0)


# --- disk and clock ---------------------------------------------------------------------------------------


def _kill_on_full_disk(scene: Scene) -> None:
    _fill_disk(scene)
    _kill(scene)


def _fill_disk_of_logs(scene: Scene) -> None:
    """supervisord writes everybody's log, and its own when somebody dies."""
    _fill_disk(scene)
    os.kill(scene.rig.pid("keeper"), signal.SIGKILL)


def _fill_disk(scene: Scene) -> None:
    for name in shimmed(scene.victim):
        scene.rig.control.set_full(name, True)


def _free_disk(scene: Scene) -> None:
    for name in shimmed(scene.victim):
        scene.rig.control.set_full(name, False)


def _jump(seconds: float) -> Callable[[Scene], None]:
    def jump(scene: Scene) -> None:
        for name in shimmed(scene.victim):
            scene.rig.control.set_clock(name, seconds)

    return jump


def _lose_power(scene: Scene) -> None:
    """Everything on the machine dies at once; `Rig.tend` puts the files together and starts it again."""
    rig = scene.rig
    rig.power_lost = True
    pids = rig.node_pids()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert rig.link is not None
    assert rig.mqtt_link is not None
    end = time.monotonic() + 5.0
    while rig.node_pids() and time.monotonic() < end:
        time.sleep(0.005)  # the kernel needs a moment; nothing may write after this


# --- the table ------------------------------------------------------------------------------------------------

SIGKILL: Final = Harm("SIGKILL", _kill, is_kill=True)
SIGTERM: Final = Harm("SIGTERM", _terminate, is_kill=True)
SIGSTOP: Final = Harm("SIGSTOP", _stop, _continue, (2.0, 4.0))
SIGSTOP_LONG: Final = Harm("SIGSTOP until killed", _stop, _continue, (7.0, 8.0))
SIGSTOP_PAST_LIVENESS: Final = Harm("SIGSTOP past liveness", _stop_unwatched, _continue, (15.5, 16.5))
"The liveness time of a module is 15 s, unless it says otherwise; keeper, the Go and the C module say 3 s."
SIGSTOP_PAST_3_S: Final = replace(SIGSTOP_PAST_LIVENESS, hold_seconds=(4.0, 5.0))
SIGSTOP_REPLACED: Final = Harm("SIGSTOP replaced", _stop_and_replace, _continue_and_let_go, (3.5, 4.0), must_fence=True)
SIGKILL_OFFLINE: Final = Harm("SIGKILL offline", _kill, _order("pass"), (1.0, 2.0), is_kill=False, offline_seconds=2.5)
DISK_FULL: Final = Harm("disk full", _fill_disk, _free_disk, (5.5, 6.0), needs_shim=True, has_to_write=True)
DISK_FULL_OF_LOGS: Final = Harm(
    "disk full", _fill_disk_of_logs, _free_disk, (3.0, 4.0), needs_shim=True, has_to_write=True
)
SIGKILL_DISK_FULL: Final = Harm(
    "SIGKILL disk full", _kill_on_full_disk, _free_disk, (3.0, 4.0), is_kill=True, needs_shim=True, has_to_write=True
)


def _free_disk_and_link(scene: Scene) -> None:
    _free_disk(scene)
    _order("pass")(scene)


DISK_FULL_OFFLINE: Final = Harm(
    "disk full offline",
    _fill_disk,
    _free_disk_and_link,
    (3.0, 4.0),
    offline_seconds=1.0,
    offline_by="refuse",
    needs_shim=True,
    has_to_write=True,
)
CLOCK_FORWARD: Final = Harm("clock forward", _jump(_DAY_SECONDS * 30), _jump(0.0), (2.5, 3.5), needs_shim=True)
CLOCK_BACK: Final = Harm("clock back", _jump(-_DAY_SECONDS * 365), _jump(0.0), (2.5, 3.5), needs_shim=True)
DROPPED: Final = Harm("dropped", _order("drop"), is_kill=True)
HALF_OPEN: Final = Harm("half-open", _order("half-open"), is_kill=True)
STALLED: Final = Harm("stalled", _order("stall"), _order("pass"), (3.0, 5.0))
THROTTLED: Final = Harm("throttled", _order("throttle", bytes_per_second=60_000), _order("pass"), (4.0, 5.0))
LOSSY: Final = Harm("lossy", _order("lossy", loss=0.03, reorder=0.05), _order("pass"), (4.0, 5.0))
"Of datagrams, so for QUIC only: a relay of TCP cannot lose anything."
RESTART: Final = Harm("restart", _restart_hub, None, (2.0, 2.0))
POWER_LOSS: Final = Harm("power loss", _lose_power, is_kill=True, needs_shim=True)
POWER_LOSS_OFFLINE: Final = Harm(
    "power loss offline", _lose_power, _order("pass"), (2.0, 3.0), offline_seconds=2.5, needs_shim=True
)

_SIGNALS: Final = (SIGKILL, SIGSTOP, SIGTERM)
_CLOCKS: Final = (CLOCK_FORWARD, CLOCK_BACK)
_MIXED: Final = (*_SIGNALS, SIGSTOP_LONG, SIGSTOP_PAST_3_S, SIGSTOP_REPLACED)

_MATRIX: Final[Sequence[tuple[str, Sequence[Harm]]]] = (
    ("broker", (*_SIGNALS, SIGSTOP_LONG, SIGSTOP_PAST_LIVENESS, SIGKILL_DISK_FULL, *_CLOCKS)),
    ("edgehub", (*_SIGNALS, SIGSTOP_PAST_LIVENESS, SIGKILL_OFFLINE, SIGKILL_DISK_FULL, DISK_FULL_OFFLINE, *_CLOCKS)),
    ("eventbus", (*_SIGNALS, SIGSTOP_PAST_LIVENESS, SIGKILL_DISK_FULL, *_CLOCKS)),
    ("keeper", (*_SIGNALS, SIGSTOP_LONG, SIGSTOP_PAST_3_S, SIGSTOP_REPLACED, SIGKILL_DISK_FULL, CLOCK_FORWARD)),
    ("maker", (*_SIGNALS, SIGKILL_DISK_FULL)),
    (GO, _MIXED),
    (C, _MIXED),
    ("watchdog", (*_SIGNALS, SIGKILL_DISK_FULL, *_CLOCKS)),
    ("supervisord", (*_SIGNALS, DISK_FULL_OF_LOGS, *_CLOCKS)),
    ("mosquitto", (*_SIGNALS, DISK_FULL, CLOCK_FORWARD)),
    ("mqtt-link", (DROPPED, HALF_OPEN, STALLED)),
    ("cloudsim", (*_SIGNALS, RESTART)),
    ("link", (DROPPED, HALF_OPEN, STALLED, THROTTLED)),
    (EVERYTHING, (SIGKILL, SIGSTOP, SIGTERM, DISK_FULL_OFFLINE, *_CLOCKS, POWER_LOSS, POWER_LOSS_OFFLINE)),
)

CELLS: Final = tuple(Cell(victim, harm) for victim, harms in _MATRIX for harm in harms)


def cells_of(link: str) -> Sequence[Cell]:
    """What can be done where the cloud is reached by `link`."""
    if link != QUIC:
        return CELLS
    # No packet tells that a way for UDP is gone: edgehub finds out by silence, and stores what waits only then.
    slower = replace(DISK_FULL_OFFLINE, hold_seconds=(9.0, 10.0))
    cells = [replace(cell, harm=slower) if cell.harm is DISK_FULL_OFFLINE else cell for cell in CELLS]
    return *cells, Cell("link", LOSSY)
