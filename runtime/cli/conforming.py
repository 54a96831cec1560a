"""`edgezmq conform`: does a module, or a broker, do what docs/emp.md says?"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Sequence
from typing import Final

from runtime.conform import broker_checks, module_checks, report, shell
from runtime.conform.module_stage import Traits
from runtime.conform.play import FAIL, Check, Result, Settings
from runtime.errors import UsageError

EXIT_FAILED: Final = 1


def show(
    command: Sequence[str],
    *,
    broker: str,
    only: Sequence[str],
    list_them: bool,
    transport: str,
    jobs: int,
    stretch: float,
    as_json: bool,
) -> int:
    """Run the checks and print the verdicts; the exit status: 1 when one failed."""
    if bool(broker) == bool(command) and not list_them:
        raise UsageError("expected either a module's command (edgezmq conform -- COMMAND …) or --broker ENDPOINT")
    checks = choose(broker_checks.CHECKS if broker else module_checks.ALL, only)
    if list_them:
        for line in report.listed(checks):
            print(line)
        return 0
    settings = Settings().stretched(stretch)
    began = time.monotonic()
    lock = threading.Lock()

    def tell(result: Result) -> None:
        if not as_json:
            with lock:
                print("\n".join(report.lines(result)), flush=True)

    traits: Traits | None = None
    if broker:
        run = shell.BrokerRun(endpoint=broker, settings=settings, jobs=jobs)
        results = shell.check_broker(run, checks, tell)
    else:
        if shutil.which(command[0]) is None:
            raise UsageError(f"{command[0]}: no such program")
        module = shell.ModuleRun(command=command, transport=transport, settings=settings, jobs=jobs)
        traits, results = shell.check_module(module, checks, tell)
    seconds = time.monotonic() - began
    if as_json:
        print(json.dumps(report.document(results, seconds, traits), indent=2, ensure_ascii=False))
    else:
        if traits is not None and traits.name:
            print(report.traits_line(traits))
        print(report.summary(results, seconds))
    return EXIT_FAILED if any(result.outcome == FAIL for result in results) else 0


def choose(checks: Sequence[Check], only: Sequence[str]) -> list[Check]:
    """The checks that `only` names. Raises UsageError when there are none."""
    chosen = report.choose(checks, only)
    if not chosen:
        raise UsageError(f"no check is called {', '.join(only)} (edgezmq conform --list)")
    return chosen
