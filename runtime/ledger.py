"""The loss ledger: what was refused, what was dropped after it was accepted, and whether the accounts close.

*Refused*: the sender was told; the broker counts it. *Dropped after acceptance*: only edgehub's outbox can do that, and
writes it into its file in the transaction that drops. Between them stands the proof: of each lane of the bus, and of
edgehub, what was accepted is delivered, refused, dropped or still held.

`compose` joins what the broker and the outbox file say and is pure; `read_outbox` reads the file, also of a node
that is down.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

OUTBOX_FILE: Final = "outbox.db"
"Of edgehub, in the node's data directory (docs/edgehub.md)."

LET_GO: Final = "(let go)"
"In place of names that are long gone."

CLASSES: Final = ("signal", "data")

_BUSY_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class OutboxLedger:
    """What the outbox file holds and what it has dropped."""

    dropped: list[dict[str, Any]] = field(default_factory=list)
    "`reason`, `class`, `messages`, `bytes`; since the file was made."
    examples: list[dict[str, Any]] = field(default_factory=list)
    "`at_ms`, `reason`, `class`, `sender`, `head` (the beginning of the message); newest first."
    stored: list[dict[str, Any]] = field(default_factory=list)
    "`class`, `messages`, `bytes`: accepted, waiting for the cloud."


class UnreadableOutbox(Exception):
    """The file is there and cannot be read."""


def read_outbox(path: Path) -> OutboxLedger | None:
    """The ledger in edgehub's file; None when there is no file. Read-only: edgehub may be writing beside us.

    Raises UnreadableOutbox.
    """
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_SECONDS)) as db:
            db.text_factory = lambda raw: raw.decode("utf-8", "replace")
            db.execute("BEGIN")  # one moment for all that is read
            return OutboxLedger(_dropped(db), _examples(db), [_stored(db, name) for name in CLASSES])
    except (sqlite3.Error, TypeError, ValueError, OverflowError) as fault:  # SQLite holds any type in any column
        raise UnreadableOutbox(f"{path}: {fault}") from fault


def _dropped(db: sqlite3.Connection) -> list[dict[str, Any]]:
    found = db.execute("SELECT reason, class, messages, bytes FROM dropped ORDER BY reason, class")
    return [dict(zip(("reason", "class", "messages", "bytes"), row, strict=True)) for row in found]


def _examples(db: sqlite3.Connection) -> list[dict[str, Any]]:
    found = db.execute("SELECT at_ms, reason, class, sender, head FROM example ORDER BY number DESC")
    return [
        {
            "at_ms": at_ms,
            "reason": reason,
            "class": kind,
            "sender": sender,
            "head": memoryview(head).tobytes().decode("utf-8", "replace"),
        }
        for at_ms, reason, kind, sender, head in found
    ]


def _stored(db: sqlite3.Connection, name: str) -> dict[str, Any]:
    # Two look-ups: SQLite finds min and max by the key only when they are asked for one by one.
    first = db.execute(f"SELECT min(row) FROM {name}").fetchone()[0]
    last = db.execute(f"SELECT max(row) FROM {name}").fetchone()[0]
    size = db.execute("SELECT value FROM meta WHERE key = ?", (f"bytes.{name}",)).fetchone()
    if first is None:
        return {"class": name, "messages": 0, "bytes": 0}
    return {"class": name, "messages": last - first + 1, "bytes": int(size[0]) if size else 0}


# --- accounts ---------------------------------------------------------------------------------------


def refusals(modules: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """From the broker's modules: `module`, `reason`, `messages`, most first."""
    found = [
        {"module": module["name"], "reason": reason, "messages": count}
        for module in modules
        for reason, count in module.get("refused", {}).items()
        if count
    ]
    return sorted(found, key=lambda each: (-each["messages"], each["module"], each["reason"]))


def edgehub_account(counters: Mapping[str, int]) -> dict[str, Any] | None:
    """edgehub's own account over the life of its process, from the counters of its last PING; None without them.

    `missing` is what was accepted (or found in the file at the start) and is neither confirmed by the cloud, nor held,
    nor dropped into the ledger, nor given back to its sender. Below 0: the outbox dropped what was under way, and
    the cloud got it all the same.
    """
    if "accepted" not in counters:
        return None
    account = {
        name: counters.get(name, 0) for name in ("accepted", "restored", "confirmed", "held", "dropped", "given_up")
    }
    missing = (
        account["accepted"]
        + account["restored"]
        - account["confirmed"]
        - account["held"]
        - account["dropped"]
        - account["given_up"]
    )
    return {**account, "missing": missing, "balanced": missing <= 0}


def mqtt_broker_dropped(counters: Mapping[str, int]) -> int | None:
    """What the MQTT brokers say they dropped; None when none of them says it."""
    told = [count for name, count in counters.items() if name.endswith("mqtt_broker_dropped")]
    return sum(told) if told else None


def compose(bus: Mapping[str, Any] | None, outbox: OutboxLedger | None) -> dict[str, Any]:
    """The ledger in JSON values. `bus`: the broker's status, or None when it does not answer."""
    modules = list(bus.get("modules", [])) if bus else []
    counters = {module["name"]: module.get("counters") or {} for module in modules}
    outbox = outbox or OutboxLedger()
    lanes = list(bus.get("accounts", [])) if bus else []
    edgehub = edgehub_account(counters.get("edgehub", {}))
    past = bus.get("broker", {}).get("refused_of_past", {}) if bus else {}
    refused = refusals([*modules, *({"name": name or LET_GO, "refused": counts} for name, counts in past.items())])
    return {
        "is_live": bus is not None,
        "refused": refused,
        "refused_messages": sum(each["messages"] for each in refused),
        "refused_frames": dict(bus.get("broker", {}).get("refused_frames", {})) if bus else {},
        "dropped": outbox.dropped,
        "dropped_messages": sum(each["messages"] for each in outbox.dropped),
        "examples": outbox.examples,
        "stored": outbox.stored,
        "lanes": lanes,
        "edgehub": edgehub,
        "mqtt_broker_dropped": mqtt_broker_dropped(counters.get("eventbus", {})),
        "balanced": all(lane["balanced"] for lane in lanes) and (edgehub is None or edgehub["balanced"]),
    }


def problems(ledger: Mapping[str, Any]) -> list[str]:
    """What somebody should know of it, in words."""
    found = []
    if ledger["dropped_messages"]:
        found.append(f"{ledger['dropped_messages']} messages were dropped after they were accepted (edgezmq ledger)")
    if not ledger["balanced"]:
        found.append("the accounts do not close: messages are missing (edgezmq ledger)")
    if ledger["mqtt_broker_dropped"]:
        found.append(f"the MQTT broker dropped {ledger['mqtt_broker_dropped']} messages before we saw them")
    return found
