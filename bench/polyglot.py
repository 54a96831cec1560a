"""The two sides of the bus benchmark in other languages, on the clients of examples/: `bench/c`, `bench/go`.

Built here, where there are the tools. They talk as bench/worker.py does.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import report
from bench.children import Child, ChildFailed, await_ready
from bench.contenders import PEERS_DIRECTORY, Edgezmq

BENCH = Path(__file__).resolve().parent
BUILD_SECONDS = 600.0
"A first build fetches libraries and compiles Go's own."

C = "c"
GO = "go"


@functools.cache
def missing(language: str) -> str | None:
    """Why there is no program of this language here; None when there is one, which this builds."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/go/bin", str(BENCH.parent / ".go" / "bin")])
    program = _program(language)
    fresh = program.with_name(f"{program.name}.{os.getpid()}")
    tool, command, hint = {
        C: ("make", ["-B", f"OUT={fresh}"], "gcc, make, libzmq3-dev and libmsgpack-dev"),
        GO: ("go", ["build", "-mod=readonly", "-o", str(fresh), "."], "Go (tests/peers/install-go), libzmq3-dev"),
    }[language]
    found = shutil.which(tool, path=path)
    if found is None:
        return f"{tool} is not installed; needed are {hint}"
    PEERS_DIRECTORY.mkdir(exist_ok=True)
    (PEERS_DIRECTORY / ".gitignore").write_text("*\n")
    try:
        done = subprocess.run(
            [found, *command],
            cwd=BENCH / language,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as fault:
        return f"bench/{language} could not be built: {fault}"
    if done.returncode:
        return f"bench/{language} could not be built (needed are {hint}): {done.stderr.strip()[-500:]}"
    fresh.replace(program)  # as a whole: another bench may be running it
    return None


def start(language: str, role: str, arguments: Mapping[str, Any], *, log: Path) -> Child:
    """Start one side; it is ready when this returns. Raises ChildFailed."""
    command = [
        *(str(_program(language)), role, arguments["endpoint"], str(arguments["count"]), str(arguments["size"])),
        str(arguments.get("per_second", 0)),
    ]
    if language == GO:
        command.append(str(arguments.get("warm_up", 0)))
    elif role == "requester":
        raise ChildFailed("the client in C asks nobody")
    return await_ready(Child(command, log=log, ends_with_input=True))


def _program(language: str) -> Path:
    return PEERS_DIRECTORY / f"{language}-side"


class Polyglot(Edgezmq):
    """Our broker with a module in another language at one end, or at both."""

    def __init__(self, name: str, *, sender: str | None, receiver: str | None) -> None:
        """`sender` (who asks too) and `receiver` (who answers too): C, GO, or None for the Python SDK."""
        self.name = name
        self._languages = {"sender": sender, "requester": sender, "receiver": receiver, "responder": receiver}

    def missing(self) -> str | None:
        used = sorted({language for language in self._languages.values() if language})
        return super().missing() or next((why for language in used if (why := missing(language))), None)

    def start(self, role: str, arguments: Mapping[str, Any], log: Path) -> Child:
        language = self._languages[role]
        return start(language, role, arguments, log=log) if language else super().start(role, arguments, log)


def polyglots() -> list[Polyglot]:
    """The pairs that are measured."""
    return [
        Polyglot(report.C_TO_C, sender=C, receiver=C),
        Polyglot(report.GO_TO_GO, sender=GO, receiver=GO),
        Polyglot(report.C_TO_PYTHON, sender=C, receiver=None),
        Polyglot(report.PYTHON_TO_C, sender=None, receiver=C),
    ]
