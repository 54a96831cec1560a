"""`edgezmq ledger`: what was refused, what was dropped, and the proof that nothing else is missing."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runtime.admin import AdminClient, AdminRefused, BrokerSilent
from runtime.cli.showing import size
from runtime.config import load
from runtime.emp import Priority
from runtime.home import Home, find_home
from runtime.ledger import OUTBOX_FILE, OutboxLedger, UnreadableOutbox, compose, read_outbox

EXIT_NOT_BALANCED: Final = 1

_ANSWER_SECONDS: Final = 2.0
_EXAMPLES: Final = 10
"Shown to people; --json has all that are kept."
_WIDE: Final = 200
_FRAMES: Final = {
    "denied": "denied: names (HELLO) and questions (ADMIN) that the policy does not grant",
    "turned-away": "turned-away: connections over tcp without a key that a rule names",
}


def show(*, as_json: bool) -> int:
    """Print the ledger; the exit status: 1 when the accounts do not close."""
    home = find_home()
    ledger = collect(home)
    if as_json:
        print(json.dumps(ledger, indent=2))
    else:
        console = Console()
        render(ledger, console if console.is_terminal else Console(width=_WIDE))
    return 0 if ledger["balanced"] else EXIT_NOT_BALANCED


def collect(home: Home) -> dict[str, Any]:
    """The ledger of the node in `home`; what could not be asked is named in `problems`."""
    problems: list[str] = []
    ledger = compose(_ask(home, problems), read(home, problems))
    return {**ledger, "problems": problems}


def read(home: Home, problems: list[str]) -> OutboxLedger | None:
    """edgehub's file; a file that cannot be read goes into `problems`."""
    try:
        return read_outbox(home.data / OUTBOX_FILE)
    except UnreadableOutbox as fault:
        problems.append(f"the outbox cannot be read: {fault}")
        return None


def _ask(home: Home, problems: list[str]) -> dict[str, Any] | None:
    try:
        with AdminClient(load(home.path).endpoint(home)) as admin:
            answer = admin.ask("status", timeout_seconds=_ANSWER_SECONDS if home.bus_socket.exists() else 0.3)
            return answer if isinstance(answer, dict) else None
    except (BrokerSilent, AdminRefused) as fault:
        problems.append(f"only the outbox file is shown: {fault}")
        return None


# --- show -----------------------------------------------------------------------------------------


def render(ledger: dict[str, Any], console: Console) -> None:
    """The ledger for people."""

    def say(text: str | Text) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    if ledger["is_live"]:
        say(f"refused (the sender was told; since the broker's start): {_count(ledger['refused_messages'])}")
        for each in ledger["refused"]:
            say(f"  {each['messages']:>10}  {each['reason']}, {each['module']}")
    for code, frames in sorted(ledger["refused_frames"].items()):
        say(f"  {frames:>10}  {_FRAMES.get(code, f'frames: {code}')}")
    say(f"dropped after acceptance (since the outbox was made): {_count(ledger['dropped_messages'])}")
    for each in ledger["dropped"]:
        say(f"  {each['messages']:>10}  {each['reason']}, {each['class']}, {size(each['bytes'])}")
    for each in ledger["examples"][:_EXAMPLES]:
        at = datetime.fromtimestamp(each["at_ms"] / 1000, UTC)
        head = "".join(char if char.isprintable() else "?" for char in each["head"][:120])
        say(f"    {at:%Y-%m-%d %H:%M:%SZ}  {each['reason']}  from {each['sender'] or '-'}: {head}")
    for each in ledger["stored"]:
        if each["messages"]:
            say(f"stored, waiting for the cloud: {each['messages']} {each['class']}, {size(each['bytes'])}")
    if ledger["is_live"]:
        dropped = ledger["mqtt_broker_dropped"]
        say(f"dropped by the MQTT broker (since its start): {'unknown' if dropped is None else dropped}")
        _show_accounts(ledger, console)
        verdict = "the accounts close" if ledger["balanced"] else "THE ACCOUNTS DO NOT CLOSE: messages are missing"
        say(Text(verdict, style="green" if ledger["balanced"] else "bold red"))
    for problem in ledger["problems"]:
        say(Text.assemble(("! ", "bold red"), problem))


def _show_accounts(ledger: dict[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("lane", "class"):
        table.add_column(name)
    for name in ("accepted", "delivered", "refused", "held", "dropped"):
        table.add_column(name, justify="right")
    table.add_column("")
    for lane in ledger["lanes"]:
        table.add_row(
            f"{lane['sender']} → {lane['destination']}",
            _priority(lane["priority"]),
            *(str(lane[name]) for name in ("accepted", "delivered", "refused", "held")),
            "0",  # the broker drops nothing: it delivers, refuses or holds
            "" if lane["balanced"] else "≠",
        )
    hub = ledger["edgehub"]
    if hub is not None:
        table.add_row(
            "edgehub → cloud",
            "",
            str(hub["accepted"] + hub["restored"]),
            *(str(hub[name]) for name in ("confirmed", "given_up", "held", "dropped")),
            "" if hub["balanced"] else f"≠ {hub['missing']} missing",
        )
    if table.row_count:
        console.print(table)


def _count(messages: int) -> str:
    return "none" if not messages else f"{messages} messages"


def _priority(number: int) -> str:
    try:
        return Priority(number).name.lower()
    except ValueError:
        return str(number)
