"""Every golden vector of a real CloudHub as one list, so that a test can tell when one is not looked at.

An entry of a file is one vector; where an entry is a table of measurements, each row is one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parents[1] / "vectors" / "cloudlink"
_TABLES = {"measured_behaviour"}
"Files whose entries are tables, where `decoded` is an object."


@dataclass(frozen=True)
class Vector:
    """One measurement; `value` is the entry, or the row's value."""

    file: str
    name: str
    value: Any

    def __str__(self) -> str:
        return f"{self.file}/{self.name}"


def every() -> list[Vector]:
    """All vectors of all files."""
    return [vector for path in sorted(DIRECTORY.glob("*.json")) for vector in of_file(path.stem)]


def of_file(file: str) -> list[Vector]:
    loaded = json.loads((DIRECTORY / f"{file}.json").read_text())
    found = []
    for entry in loaded["vectors"]:
        name, decoded = entry["name"], entry.get("decoded")
        if file in _TABLES and isinstance(decoded, dict):
            found += [Vector(file, f"{name}/{key}", value) for key, value in decoded.items()]
        else:
            found.append(Vector(file, name, entry))
    # Beside the list of entries a file may hold facts and tables of its own.
    for key, value in loaded.items():
        if key in ("format", "about", "vectors"):
            continue
        rows = value.items() if isinstance(value, dict) and key == "answers" else [(None, value)]
        found += [Vector(file, key if row is None else f"{key}/{row}", each) for row, each in rows]
    return found


def matching(vector: Vector, patterns: dict[str, str]) -> str | None:
    """What is said under the first pattern that the vector's name matches, or None."""
    for pattern, said in patterns.items():
        # A `[` in a vector's name is no character class.
        if fnmatchcase(str(vector), pattern.replace("[", "[[]")):
            return said
    return None
