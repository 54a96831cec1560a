"""One cell: load, harm, recovery, and the sums."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any, Final

from chaos.account import Counts, Flow
from chaos.harms import EVERYTHING, PAIR_CARRIERS, Cell, Scene, shimmed
from chaos.load import Load
from chaos.mixed import FLOWS, MODULES, way_in, way_out
from chaos.places import TOKEN
from chaos.rig import Rig

TICK_SECONDS: Final = 0.01
AFTER_SECONDS: Final = 5.0
"Of load after the recovery; the pair is watched as long."
RECOVERY_LIMIT_SECONDS: Final = 25.0
QUIET_SECONDS: Final = 0.7
"After everything has arrived: time for a duplicate to show."
MQTT_SECONDS: Final = 2.0
"Without progress, until what a dead MQTT broker had is given up."
PATIENCE_SECONDS: Final = 25.0
"Without any progress for so long, what has not arrived will not."
DRAIN_LIMIT_SECONDS: Final = 120.0
WINDOW_SECONDS: Final = 3.0
"A message that arrived so long before the harm may still have been unconfirmed."


_THROUGH_EDGE: Final = ("uploads", "answers", "module_uploads", "go_uploads", "c_uploads")
_OUTBOX_TABLES: Final = ("signal", "data")
"Of modules.edgehub.store."


@dataclass(frozen=True)
class Pace:
    """How long and how much."""

    before_seconds: tuple[float, float] = (1.5, 2.5)
    after_seconds: float = AFTER_SECONDS
    at_least: int = 1000
    "Messages each way."


QUICK: Final = Pace((0.7, 1.0), 1.0, 200)


@dataclass
class Result:
    """What a cell came to. None: not known, or not asked of this victim."""

    victim: str
    harm: str
    ran: bool = False
    why_not: str = ""
    flows: dict[str, Counts] = field(default_factory=dict)
    recovery_s: float | None = None
    caught_up_s: float | None = None
    "From the same moment until nothing was on its way any more, with the load taken off at its time."
    calm: list[float] = field(default_factory=list)
    "Latencies of the pair before the harm; after it."
    disturbed: list[float] | None = None
    pair_failed: int = 0
    unanswered: int = 0
    "Commands to which the application had no answer yet when the cell was over."
    refused: dict[str, int] = field(default_factory=dict)
    writes_refused: int | None = None
    life: dict[str, int] = field(default_factory=dict)
    "What the broker said of modules meanwhile: how often one was `silent`, `fenced`, `gone`."
    ledger: dict[str, Any] | None = None
    "`edgezmq ledger --json` at the end of the cell."
    misses: list[str] = field(default_factory=list)
    "What the cell was to show and did not."
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    is_settled: bool = False
    "Everything that was accepted had arrived, or had a reason not to, and nothing was on its way any more."
    is_mixed: bool = False
    "The node had the Go and the C module."
    is_clean: bool = False
    "The rig may serve another cell."
    again: list[Result] = field(default_factory=list)
    "The same cell run once more: its latencies count beside these, and so does all that it lost or did not show."

    @property
    def total(self) -> Counts:
        return sum(self.flows.values(), Counts())


def run_cell(cell: Cell, rig: Rig, load: Load, rates: tuple[float, float], chance: Random, pace: Pace) -> Result:
    result = Result(cell.victim, cell.harm.name)
    started = time.monotonic()

    def pause(seconds: float) -> None:
        work(rig, load, lambda: False, seconds)

    scene = Scene(rig, load, chance, pause, cell.victim)
    harm = cell.harm
    deaths = len(rig.mqtt_deaths)
    refused_before = sum(map(rig.control.refused, shimmed(cell.victim)))
    life_before = dict(rig.life())
    load.begin_cell()
    load.latencies.clear()
    load.set_rates(*rates, others=True)
    pause(chance.uniform(*pace.before_seconds))
    result.calm = [took for _, took in load.latencies]
    load.latencies.clear()
    harm_at = time.monotonic()
    if harm.offline_seconds:
        assert rig.link is not None
        rig.link.order(harm.offline_by)
        pause(harm.offline_seconds)
    recovery = _Recovery(cell, rig, load)
    since = time.monotonic()
    harm.begin(scene)
    if harm.is_kill:
        load.watch(since)
    work(rig, load, recovery.is_looked_for if harm.is_kill else lambda: False, chance.uniform(*harm.hold_seconds))
    if harm.end is not None:
        harm.end(scene)
    over_at = time.monotonic()
    if not harm.is_kill:
        since = over_at
        load.watch(over_at)

    def is_over() -> bool:
        recovery.look()
        if recovery.whole_at is None:
            return False
        enough = min(len(load.uploads.sent_at), load.commands_begun) >= pace.at_least
        return enough and time.monotonic() > max(recovery.whole_at, over_at) + pace.after_seconds

    work(rig, load, is_over, RECOVERY_LIMIT_SECONDS)
    end_of_load = time.monotonic()
    recovered = recovery.at
    if recovered is None:
        result.notes.append(f"no message came through within {RECOVERY_LIMIT_SECONDS:.0f} s")
    else:
        # A watchdog carries no messages: it is back when it holds its lock.
        is_back = recovery.whole_at if cell.victim == "watchdog" and harm.is_kill else None
        result.recovery_s = (is_back or recovered) - since
    until = max(recovered or end_of_load, over_at) + pace.after_seconds
    load.set_rates(0.0, 0.0, others=False)
    settled_at: float | None = None

    def is_quiet() -> bool:
        nonlocal settled_at
        now = time.monotonic()
        # A broker that forgot messages may still be about to hand over others.
        patience = MQTT_SECONDS if rig.mqtt_deaths[deaths:] else 0.3
        lost_until = _mqtt_outages(rig.mqtt_deaths[deaths:], load.sessions_lost, load.subscribed)
        if now > max(end_of_load, load.last_progress) + patience and load.is_settled(lost_until):
            settled_at = settled_at or now
            return now > settled_at + QUIET_SECONDS
        settled_at = None
        return now - max(load.last_progress, end_of_load) > PATIENCE_SECONDS

    work(rig, load, is_quiet, DRAIN_LIMIT_SECONDS)
    result.caught_up_s = settled_at - since if settled_at else None
    result.is_settled = settled_at is not None
    result.is_mixed = bool(rig.foreign)
    result.is_clean = result.is_settled and recovered is not None and rig.is_whole()
    _count(result, rig, load, harm_at, max(over_at, recovered or over_at), rig.mqtt_deaths[deaths:])
    result.life = {event: count - life_before.get(event, 0) for event, count in rig.life().items()}
    if cell.victim not in PAIR_CARRIERS:
        window = [took for at, took in load.latencies if harm_at <= at <= until]
        result.disturbed = window
        result.pair_failed = sum(took >= 20.0 for took in window)
    if harm.needs_shim and not rig.control.is_shimmed("broker"):
        result.notes.append("the shim is not in the processes")
    elif harm.has_to_write:
        result.writes_refused = sum(map(rig.control.refused, shimmed(cell.victim))) - refused_before
        result.notes.append(f"{result.writes_refused} writes met the full disk")
    result.ledger = rig.ledger()
    result.misses += _not_shown(result, cell, load, scene)
    result.ran = True
    result.seconds = time.monotonic() - started
    return result


class _Recovery:
    """When the victim was back: every program has a process, a new one where it was killed, and a message came through.

    Made before the harm, for it remembers the processes.
    """

    def __init__(self, cell: Cell, rig: Rig, load: Load) -> None:
        self._cell = cell
        self._rig = rig
        self._load = load
        self._old_pids = _pids_to_be_replaced(cell, rig)
        self._is_replaced = False
        self.at: float | None = None
        "When the message came."
        self.whole_at: float | None = None
        "When this was seen."

    def is_looked_for(self) -> bool:
        """Look, and let the load go on: False."""
        self.look()
        return False

    def look(self) -> None:
        if self.at is not None:
            return
        rig, load, harm = self._rig, self._load, self._cell.harm
        if not rig.is_whole() or any(rig.pid(name) in (0, pid) for name, pid in self._old_pids.items()):
            return
        if not self._is_replaced:
            self._is_replaced = True
            if harm.name == "SIGTERM":
                load.first.clear()  # what the old process did while it drained does not count
        times = [load.first.get((where, harm.is_kill)) for where in _ways_through(self._cell.victim)]
        self.at = max((at for at in times if at is not None), default=None) if None not in times else None
        if self.at is not None:
            self.whole_at = time.monotonic()


def _ways_through(victim: str) -> tuple[str, ...]:
    """The places of Load.first that a message must have reached for the victim to be back."""
    if victim in MODULES:
        return way_in(victim), way_out(victim)
    return ("keeper",) if victim in ("keeper", "maker") else ("cloud",)


def _not_shown(result: Result, cell: Cell, load: Load, scene: Scene) -> Iterator[str]:
    if cell.harm.has_to_write and not result.writes_refused:
        yield "no write met the full disk"
    if cell.harm.must_fence:
        late = sum(pid in scene.stopped and at > scene.continued_at for pid, at in load.handled)
        if late or not result.life.get("fenced"):
            yield f"the process that was stopped was not fenced, and handled {late} messages under its old name"
    if "past liveness" in cell.harm.name and cell.victim != "broker" and not result.life.get("silent"):
        yield "the broker did not give up the process that was stopped"
    if result.ledger is None:
        yield "no ledger: the broker does not answer"
    elif not result.ledger["balanced"] or result.ledger["dropped_messages"]:
        yield f"the ledger does not close, or tells of drops: {result.ledger}"


def _pids_to_be_replaced(cell: Cell, rig: Rig) -> dict[str, int]:
    """The processes that a kill ends; empty for other harms."""
    if not cell.harm.is_kill or cell.victim in ("link", "mqtt-link"):
        return {}
    names: tuple[str, ...] = (cell.victim,)
    if cell.victim in ("supervisord", EVERYTHING):
        names = ("supervisord", *rig.programs)
    return {name: rig.pid(name) for name in names}


def work(rig: Rig, load: Load, is_over: Callable[[], bool], seconds: float) -> None:
    """The load, for so long or until `is_over()`."""
    end = time.monotonic() + seconds
    while True:
        load.tick()
        rig.tend()
        if is_over() or time.monotonic() >= end:
            return
        time.sleep(TICK_SECONDS)


def _mqtt_outages(deaths: list[float], sessions_lost: list[float], subscriptions: list[float]) -> list[float]:
    """Until when an MQTT broker that died at each of `deaths` is to answer for what it acknowledged.

    For the moment of the death itself; and where it came back without the session of the one it was for, until that
    had subscribed again: until then it acknowledges what it then gives to nobody.
    """
    ends = []
    for death in deaths:
        lost = next((at for at in sessions_lost if at >= death), None)
        subscribed = next((at for at in subscriptions if lost is not None and at > lost), None)
        ends.append(death if subscribed is None else subscribed)
    return ends


def _count(result: Result, rig: Rig, load: Load, harm_at: float, over_at: float, deaths: list[float]) -> None:
    flows: dict[str, Flow] = {
        "uploads": load.uploads,
        "answers": load.answers,
        "module_uploads": load.made,
        "module_messages": load.kept,
        "objects": load.objects,
        "commands": load.commands,
        **{FLOWS[beginning]: flow for beginning, flow in load.mixed.flows.items()},
    }
    through_edge = (flows[name] for name in _THROUGH_EDGE if name in flows)
    stored = find_stored(rig) if any(flow.missing() for flow in through_edge) else set()
    for name, flow in flows.items():
        from_device = name in ("uploads", "answers")
        outages: list[float] = []
        if from_device:
            outages = _mqtt_outages(deaths, load.sessions_lost, load.subscribed)
        elif name == "commands":
            outages = _mqtt_outages(deaths, deaths, load.device_subscribed)
        result.flows[name] = flow.counts(
            harm_at=harm_at,
            over_at=over_at,
            window_seconds=WINDOW_SECONDS,
            stored=stored,
            node_has=load.node_has if from_device else None,
            mqtt_has=load.mqtt_has if name == "commands" else None,
            mqtt_lost_until=outages,
            cuts=load.cuts if name == "commands" else (),
        )
        examples = [key for key in flow.missing() if key not in stored][:5]
        if examples and (result.flows[name].lost or result.flows[name].lost_by_mqtt):
            result.notes.append(f"{name} missing: {' '.join(examples)}")
        if flow.damaged:
            result.notes.append(f"{name}: {flow.damaged} arrived damaged")
    result.unanswered = len(load.asked)
    result.refused = dict(load.refusals)


def find_stored(rig: Rig) -> set[str]:
    """Tokens that the outbox or mosquitto's database holds: they will go when they can.

    The outbox is asked as a database: what it has let go may still stand in a free page of its file.
    """
    texts: list[bytes] = []
    for path in rig.home.data.glob("*.db"):
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2.0)) as database,
        ):
            for table in _OUTBOX_TABLES:
                texts += [payload for (payload,) in database.execute(f"SELECT payload FROM {table}")]
    texts += [path.read_bytes() for path in (rig.disk.root / "mqtt").glob("*.db")]
    found = {token.decode() for text in texts for token in TOKEN.findall(text)}
    return found | {token[4:-1] for token in found if token.startswith("m.x.")}


# --- capacity ---------------------------------------------------------------------------------------------


def measure_capacity(rig: Rig, load: Load, seconds: float) -> tuple[float, float]:
    """Uploads and answered commands a second, both at once, with as many on their way as the node likes."""
    load.begin_cell()
    load.set_rates(0.0, 0.0, others=True)
    counted: list[tuple[float, int, int]] = []

    def flood() -> bool:
        now = time.monotonic()
        up = load.uploads
        for _ in range(max(0, 800 - (len(up.sent_at) - len(up.came_at)))):
            load.publish_one(now)
        fresh = max(0, 200 - len(load.asked))
        if fresh:
            load._ask([load.next_command(now) for _ in range(fresh)], [], now)
        counted.append((now, len(up.came_at), load.answered))
        return False

    work(rig, load, flood, seconds)
    late = [one for one in counted if one[0] > counted[0][0] + seconds / 4]
    spent = late[-1][0] - late[0][0]
    rates = (late[-1][1] - late[0][1]) / spent, (late[-1][2] - late[0][2]) / spent
    load.set_rates(0.0, 0.0, others=False)
    work(rig, load, load.is_settled, 20.0)
    return rates


def as_json(result: Result, ratio: float | None, p99_ms: float | None) -> dict[str, Any]:
    """One object of `cells`. A cell that did not run has null for every number."""
    total = result.total
    runs = (result, *result.again)
    head: dict[str, Any] = {"victim": result.victim, "harm": result.harm, "ran": result.ran}
    if not result.ran:
        names = ("sent", "arrived", "stored", "lost", "duplicated", "recovery_s", "unrelated_p99_ratio")
        return head | dict.fromkeys(names) | {"why_not": result.why_not}
    return head | {
        "sent": total.sent,
        "accepted": total.accepted,
        "arrived": total.arrived,
        "stored": total.stored,
        "lost": sum(each.total.lost for each in runs),
        "lost_by_mqtt_broker": total.lost_by_mqtt,
        "commands_lost_in_flight": total.cut,
        "commands_unanswered": result.unanswered,
        "settled": result.is_settled,
        "mixed": result.is_mixed,
        "ledger_balanced": None if result.ledger is None else result.ledger["balanced"],
        "dropped": None if result.ledger is None else result.ledger["dropped_messages"],
        "given_up_by_broker": result.life.get("silent", 0),
        "fenced": result.life.get("fenced", 0),
        "writes_refused": result.writes_refused,
        "duplicated": total.duplicated,
        "duplicated_marked": total.duplicated_marked,
        "duplicated_in_window": total.duplicated_in_window,
        "duplicated_unexplained": total.duplicated_unexplained,
        "recovery_s": _rounded(result.recovery_s),
        "caught_up_s": _rounded(result.caught_up_s),
        "unrelated_p99_ratio": _rounded(ratio),
        "unrelated_p99_ms": _rounded(p99_ms),
        "unrelated_failed": result.pair_failed,
        "refused": result.refused,
        "flows": {name: asdict(counts) for name, counts in result.flows.items()},
        "misses": [miss for each in runs for miss in each.misses]
        + [f"did not run again: {each.why_not}" for each in result.again if not each.ran],
        "notes": result.notes,
        "seconds": round(result.seconds, 1),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
