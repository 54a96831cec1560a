"""The results as a table of plain text. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

_COLUMNS: Final[Sequence[tuple[str, str]]] = (
    ("victim", "victim"),
    ("harm", "harm"),
    ("sent", "sent"),
    ("arrived", "arrived"),
    ("stored", "stored"),
    ("lost", "lost"),
    ("mqtt lost", "lost_by_mqtt_broker"),
    ("cut cmds", "commands_lost_in_flight"),
    ("twice", "duplicated"),
    ("marked", "duplicated_marked"),
    ("window", "duplicated_in_window"),
    ("unexpl.", "duplicated_unexplained"),
    ("back s", "recovery_s"),
    ("p99 ratio", "unrelated_p99_ratio"),
)


def render(document: Mapping[str, Any]) -> str:
    """All cells, one a line; `-` where a number does not apply."""
    rows = [[title for title, _ in _COLUMNS]]
    for cell in document["cells"]:
        if cell["ran"]:
            rows.append([_text(cell[key]) for _, key in _COLUMNS])
        else:
            rows.append([cell["victim"], cell["harm"], f"did not run: {cell['why_not']}"])
    widths = [max(len(row[at]) for row in rows if len(row) == len(_COLUMNS)) for at in range(len(_COLUMNS))]
    lines = []
    for row in rows:
        shown = [
            text.ljust(width) if at < 2 else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(shown).rstrip())
    lines.append(
        f"\ncapacity {document['capacity_uploads_per_s']} uploads/s and {document['capacity_commands_per_s']} "
        f"commands/s at once, load half of it; undisturbed p99 of the pair {document['undisturbed_p99_ms']} ms"
    )
    return "\n".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
