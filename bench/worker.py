"""One side of one measurement: `python -m bench.worker MODULE ROLE ARGUMENTS`, started by the bench.

Says `{"ready": true}` when it is connected, waits for a line, does its work, says its result, and
stays until its standard input ends, so that a receiver is still there while the last acknowledgements pass.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

Arguments = dict[str, Any]

ROLES = ("sender", "receiver", "requester", "responder")
SIDES = ("edgezmq_side", "nats_side", "mosquitto_side", "cloud_side", "link_side")


class Gate:
    """The talk with the bench: ready, go, result, stay."""

    def __init__(self) -> None:
        self._cpu = 0.0

    def ready(self) -> None:
        self._cpu = time.process_time()
        _say({"ready": True})

    def wait(self) -> None:
        """Until the bench says the word. Blocks: call it in a thread where a loop has to live on."""
        sys.stdin.readline()
        self._cpu = time.process_time()

    def result(self, **values: Any) -> None:
        """Say the result, with the CPU time since `wait` returned (without a wait: since `ready`)."""
        _say({**values, "cpu_seconds": time.process_time() - self._cpu})

    def stay(self) -> None:
        """Until the bench closes standard input. Blocks."""
        while sys.stdin.readline():
            pass


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    module, role, arguments = sys.argv[1:]
    if module not in SIDES or role not in ROLES:
        raise SystemExit(f"expected one of {SIDES} and one of {ROLES}, got {module!r} and {role!r}")
    side = importlib.import_module(f"bench.{module}")
    getattr(side, role)(json.loads(arguments), Gate())


if __name__ == "__main__":
    main()
