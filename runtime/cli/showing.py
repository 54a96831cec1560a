"""`edgezmq status`: what supervisord, the broker, the kernel and edgehub each know, in one table or one JSON object."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runtime import ledger
from runtime.admin import AdminClient, AdminRefused, BrokerSilent
from runtime.cli.node import NODE_LOCK
from runtime.config import NodeConfig, load
from runtime.home import Home, find_home
from runtime.locks import holder
from runtime.supervisord import Program, Supervisor, SupervisorError

EXIT_NOT_RUNNING: Final = 3
"As `systemctl status` gives for a unit that does not run."

_ANSWER_SECONDS: Final = 2.0


def show(*, as_json: bool, watch_seconds: float) -> int:
    """Print the status once, or for ever; the exit status."""
    home = find_home()
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    while True:
        status = collect(home)
        if as_json:
            print(json.dumps(status, indent=None if watch_seconds else 2), flush=True)
        else:
            if watch_seconds:
                console.clear()
            render(status, console)
        if not watch_seconds:
            return 0 if status["running"] else EXIT_NOT_RUNNING
        time.sleep(watch_seconds)  # between two tables


# --- collect --------------------------------------------------------------------------------------


def collect(home: Home) -> dict[str, Any]:
    """Everything that can be said of the node in `home`; what does not answer is named in `problems`."""
    problems: list[str] = []
    config = load(home.path)
    pid = holder(home.lock(NODE_LOCK)) if home.run.is_dir() else None
    status: dict[str, Any] = {
        "running": pid is not None,
        "node": config.node_name,
        "home": str(home.path),
        "supervisor": {"pid": pid, **_memory(pid or 0)},
        "broker": None,
        "modules": [],
        "link": None,
        "ledger": None,
        "problems": problems,
    }
    programs = _programs(home, problems) if pid is not None else []
    bus = _bus(config.endpoint(home), problems, expected=pid is not None)
    if bus is not None:
        status["running"] = True
        status["broker"] = bus.get("broker")
        status["lanes"] = bus.get("lanes", [])
    counts = _watchdog_counts(home)
    status["modules"] = join(programs, bus.get("modules", []) if bus else [], counts)
    for module in status["modules"]:
        module.update(_memory(module["pid"]))
        problems += _problems_of(module)
    status["ledger"] = _ledger(home, bus, problems)
    if any(module["name"] == "edgehub" and module["state"] == "attached" for module in status["modules"]):
        status["link"] = _link(config, home, problems)
        problems += _link_problems(status["link"])
    return status


def _programs(home: Home, problems: list[str]) -> list[Program]:
    try:
        return Supervisor(home.supervisor_socket).programs()
    except SupervisorError as fault:
        problems.append(str(fault))
        return []


def _bus(endpoint: str, problems: list[str], *, expected: bool) -> dict[str, Any] | None:
    if not expected and endpoint.startswith("ipc://") and not Path(endpoint.removeprefix("ipc://")).exists():
        return None
    try:
        with AdminClient(endpoint) as admin:
            answer = admin.ask("status", timeout_seconds=_ANSWER_SECONDS if expected else 0.3)
            return answer if isinstance(answer, dict) else None
    except (BrokerSilent, AdminRefused) as fault:
        if expected:
            problems.append(str(fault))
        return None


def _ledger(home: Home, bus: dict[str, Any] | None, problems: list[str]) -> dict[str, Any]:
    """The sums of the loss ledger; `edgezmq ledger` has the whole."""
    outbox = None
    try:
        outbox = ledger.read_outbox(home.data / ledger.OUTBOX_FILE)
    except ledger.UnreadableOutbox as fault:
        problems.append(f"the outbox cannot be read: {fault}")
    whole = ledger.compose(bus, outbox)
    problems += ledger.problems(whole)
    return {
        key: whole[key]
        for key in ("refused_messages", "dropped_messages", "dropped", "stored", "mqtt_broker_dropped", "balanced")
    }


def _watchdog_counts(home: Home) -> dict[str, Any]:
    try:
        counts = json.loads(home.watchdog_json.read_bytes())
    except (OSError, ValueError):
        return {}
    return counts if isinstance(counts, dict) else {}


def join(programs: list[Program], on_bus: list[dict[str, Any]], counts: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per name: programs in supervisord's order, then modules that only the bus knows."""
    by_name = {module["name"]: module for module in on_bus}
    entries = []
    for program in programs:
        entries.append(_entry(program, by_name.pop(program.name, None), counts.get(program.name, {})))
    entries += [_entry(None, module, {}) for module in by_name.values()]
    return entries


def _entry(program: Program | None, module: dict[str, Any] | None, counts: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": program.name if program else module["name"] if module else "",
        "process": program.state.lower() if program else None,
        "detail": program.detail if program else None,
        "exit_status": program.exit_status if program and not program.pid else None,
        "uptime_s": program.seconds_up if program and program.pid else None,
        "state": None,
        "pid": program.pid if program else 0,
        "restarts": counts.get("restarts", 0),
        "hangs": counts.get("hangs", 0),
        "storms": counts.get("storms", 0),
        "revivals": counts.get("revivals", 0),
        "in_storm": counts.get("in_storm", False),
    }
    if module is not None:
        entry |= {key: value for key, value in module.items() if key not in ("name", "pid", "latency")}
        entry["pid"] = module.get("pid") or entry["pid"]
    return entry


def _memory(pid: int) -> dict[str, int | None]:
    """PSS and RSS in bytes; None where the kernel does not tell us."""
    sizes: dict[str, int | None] = {"pss_bytes": None, "rss_bytes": None}
    if pid:
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
                name, size = line.split()[:2]
                if name in ("Pss:", "Rss:"):
                    sizes[f"{name[:-1].lower()}_bytes"] = int(size) * 1024
    return sizes


def _link(config: NodeConfig, home: Home, problems: list[str]) -> dict[str, Any] | None:
    """edgehub's own word on the cloud link."""
    from runtime.client import Bus
    from runtime.errors import EdgezmqError
    from runtime.message import Message

    async def ask() -> Any:
        question = Message.build(source="edgezmq", group="edgezmq", resource="edgehub/link", operation="status")
        async with Bus.connect(f"status-{os.getpid()}", endpoint=config.endpoint(home)) as bus:
            return (await bus.request("edgehub", question, timeout=_ANSWER_SECONDS)).json()

    try:
        answer = asyncio.run(asyncio.wait_for(ask(), _ANSWER_SECONDS + 1.0))
    except (EdgezmqError, TimeoutError) as fault:
        problems.append(f"edgehub does not tell the state of the link: {fault or 'no answer'}")
        return None
    return answer if isinstance(answer, dict) else None


# --- judge ----------------------------------------------------------------------------------------


def _problems_of(module: dict[str, Any]) -> list[str]:
    name = module["name"]
    problems = []
    if module["process"] in ("fatal", "backoff"):
        problems.append(f"{name} does not start: {module['detail']} (edgezmq logs {name})")
    if module["in_storm"]:
        problems.append(f"{name} is restarted again and again (edgezmq logs {name})")
    if module["state"] == "silent":
        problems.append(f"{name} is silent: it hangs or blocks")
    if module["state"] == "absent" and module.get("declared") and module.get("queued"):
        problems.append(f"{name} is absent: {module['queued']} messages wait for it, and their senders with them")
    return problems


def _link_problems(link: dict[str, Any] | None) -> list[str]:
    if not link:
        return []
    problems = []
    state = link.get("state")
    if state == "unproven" and link.get("hub_version", "1.17") == "1.17":
        problems.append("the link is unproven: CloudHub is older than 1.17, or has rejected this node")
    elif state not in ("served", "unproven", "open", None):
        why = link.get("why") or link.get("reason")
        problems.append(f"no link to the cloud: {state}" + (f" ({why})" if why else ""))
    certificate = link.get("certificate") or {}
    if (warning := certificate.get("warning")) and warning not in (link.get("why") or ""):
        problems.append(f"certificate: {warning}")
    if link.get("rate_limited") or link.get("bottleneck"):
        problems.append(f"uploads are held back by {link.get('bottleneck') or 'messageQPS'}")
    return problems


# --- show -----------------------------------------------------------------------------------------

_COLOURS: Final = {
    "attached": "green",
    "running": "green",
    "served": "green",
    "silent": "red",
    "fatal": "red",
    "backoff": "red",
    "absent": "yellow",
    "draining": "yellow",
    "starting": "yellow",
    "stopping": "yellow",
}


def render(status: dict[str, Any], console: Console) -> None:
    """The table for people."""
    if not status["running"]:
        console.print(f"node {status['node']}: not running ({status['home']}). Start it: edgezmq up", soft_wrap=True)
        return
    link = status["link"]
    cloud = Text("cloud link ")
    if link:
        cloud.append(str(link.get("state", "?")), style=_COLOURS.get(str(link.get("state")), "yellow"))
        said = link.get("endpoint") if link.get("state") == "served" else link.get("why") or link.get("endpoint")
        if said:
            cloud.append(f" ({said})")
        if waiting := (link.get("waiting") or 0) + (link.get("unconfirmed") or 0):
            cloud.append(f", {waiting} on their way up ({link.get('stored') or 0} on disk)")
    else:
        cloud.append("unknown", style="yellow")
    broker = status["broker"] or {}
    held = f"{size(broker.get('bytes_held'))} of {size(broker.get('byte_budget'))} held" if broker else "broker silent"
    console.print(
        Text.assemble(("node ", "bold"), (status["node"], "bold"), f"  {status['home']}\n", cloud, f"   bus {held}"),
        soft_wrap=True,
    )
    console.print(_table(status, console.width))
    for module in status["modules"]:
        if reasons := {reason: n for reason, n in (module.get("refused") or {}).items() if n}:
            said = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items()))
            console.print(f"refused by or for {module['name']}: {said}", soft_wrap=True)
    for problem in status["problems"]:
        console.print(Text.assemble(("! ", "bold red"), problem), soft_wrap=True)


def _table(status: dict[str, Any], width: int) -> Table:
    """One row per module; on a narrow terminal without the columns that are missed least."""
    rows = [_cells(module) for module in status["modules"]]
    supervisor = status["supervisor"]
    if supervisor["pid"]:
        rows.append(
            {
                "module": Text("supervisord"),
                "state": Text("running", style="green"),
                "pid": Text(str(supervisor["pid"])),
                "PSS MiB": mebibytes(supervisor["pss_bytes"]),
                "RSS MiB": mebibytes(supervisor["rss_bytes"]),
            }
        )
    widths = {name: max([len(name), *(len(row.get(name, Text("-"))) for row in rows)]) for name in _COLUMNS}
    shown = list(_COLUMNS)
    for name in _OPTIONAL:
        if sum(widths[column] + 2 for column in shown) > width:
            shown.remove(name)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in shown:
        table.add_column(
            name,
            justify="left" if name in ("module", "state", "incarnation") else "right",
            no_wrap=True,
            min_width=widths[name],
        )
    for row in rows:
        table.add_row(*(row.get(name, Text("-", style="dim")) for name in shown))
    return table


_WIDE: Final = 200
"Columns to assume where no terminal tells."

_COLUMNS: Final = (
    *("module", "state", "pid", "up", "queued", "in hand", "oldest", "delivered", "redelivered", "refused"),
    *("restarts", "PSS MiB", "RSS MiB", "incarnation"),
)
_OPTIONAL: Final = ("RSS MiB", "up", "incarnation", "restarts", "oldest", "redelivered")
"Left out in this order; --json has them all."


def _cells(module: dict[str, Any]) -> dict[str, Text]:
    cells = {
        "module": Text(module["name"]),
        "state": _state(module),
        "restarts": Text(str(module["restarts"]), style="yellow" if module["in_storm"] else ""),
        "PSS MiB": mebibytes(module["pss_bytes"]),
        "RSS MiB": mebibytes(module["rss_bytes"]),
    }
    if module["pid"]:
        cells["pid"] = Text(str(module["pid"]))
    if module["uptime_s"] is not None:
        cells["up"] = Text(duration(module["uptime_s"]))
    for key in ("queued", "delivered", "redelivered"):
        if key in module:
            cells[key] = Text(str(module[key]))
    if "in_flight" in module:
        cells["in hand"] = Text(str(module["in_flight"]))  # delivered and not yet acknowledged
    if module.get("oldest_age_ms"):
        cells["oldest"] = Text(duration(module["oldest_age_ms"] / 1000))
    if "refused" in module:
        refused = sum(module["refused"].values())
        cells["refused"] = Text(str(refused), style="yellow" if refused else "")
    if module.get("incarnation"):
        cells["incarnation"] = Text(module["incarnation"][:8])
    return cells


def mebibytes(count: int | None) -> Text:
    return Text("-", style="dim") if count is None else Text(f"{count / 2**20:.1f}")


def _state(module: dict[str, Any]) -> Text:
    process, state = module["process"], module["state"]
    if process == "exited" and module["exit_status"] == 0:
        return Text("disabled", style="dim")
    if process in (None, "running") and state:
        return Text(state + ("" if process else " (unsupervised)"), style=_COLOURS.get(state, ""))
    return Text(process or "-", style=_COLOURS.get(process or "", ""))


def size(count: int | None) -> str:
    """Bytes for people: 512 B, 3.2 MiB."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def duration(seconds: float | None) -> str:
    """Seconds for people: 250 ms, 4 s, 3 m 20 s, 2 h 5 m, 3 d 4 h."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} m"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
