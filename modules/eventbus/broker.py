"""`python -m modules.eventbus.broker`: the built-in MQTT broker, for a node that has no other.

It is amqtt (MQTT 3.1.1), a process of its own beside eventbus, in a virtual environment of its own because it pins an
older `websockets` than the rest of the node uses (requirements-amqtt.txt). Where `mqttMode` does not ask for a
built-in broker this exits with status 0. It keeps sessions in memory: see docs/eventbus.md for what that means.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from modules.eventbus.config import EventBusConfig, from_node, parse_server
from runtime import config, locks, logs
from runtime.errors import AlreadyRunning, ConfigError
from runtime.exits import exit_disabled
from runtime.home import find_home

log = logging.getLogger("modules.eventbus.broker")

LOCK_NAME: Final = "mqtt-broker"
NOT_INSTALLED: Final = 3
MAIN: Final = Path(__file__).with_name("amqtt_main.py")


def broker_config(settings: EventBusConfig) -> dict[str, Any]:
    """amqtt's configuration: one listener at `mqttServerInternal`, open to whoever reaches it, as KubeEdge's is."""
    host, port, _ = parse_server("mqttServerInternal", settings.server_internal)
    bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return {
        "listeners": {"default": {"type": "tcp", "bind": bind}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }


def candidates(settings: EventBusConfig, prefix: str = sys.prefix) -> list[str]:
    """Interpreters that may have amqtt, best first: the configured one alone, else the neighbour's and our own."""
    if settings.broker_python:
        return [settings.broker_python]
    return [f"{prefix}-amqtt/bin/python", sys.executable]


def find_python(interpreters: Sequence[str]) -> str | None:
    """The first interpreter that is there and can import amqtt."""
    for python in interpreters:
        try:
            check = subprocess.run([python, "-c", "import amqtt.broker"], capture_output=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if check.returncode == 0:
            return python
    return None


def how_to_install(settings: EventBusConfig, prefix: str = sys.prefix) -> str:
    environment = f"{prefix}-amqtt"
    if settings.broker_python:
        return f"runtime.eventbus.brokerPython is {settings.broker_python}, which has no amqtt"
    return (
        f"amqtt is not installed; install it with `python3 -m venv {environment} && {environment}/bin/pip install "
        "-r requirements-amqtt.txt`, or use an installed broker with modules.eventBus.mqttMode: 2"
    )


def main() -> None:
    """Check, lock, then become amqtt's process; does not return."""
    logs.setup("mqtt-broker")
    home = find_home()
    try:
        settings = from_node(config.load(home.path))
        if not settings.enable or not settings.wants_internal:
            log.info("not asked for: enable=%s mqttMode=%d", settings.enable, settings.mode)
            exit_disabled()
        python = find_python(candidates(settings))
        if python is None:
            log.error("%s", how_to_install(settings))
            sys.exit(NOT_INSTALLED)
        home.prepare()
        locks.hold(home.lock(LOCK_NAME), inheritable=True)  # it lives as long as amqtt does
    except (ConfigError, AlreadyRunning) as fault:
        log.error("%s", fault)
        sys.exit(2)
    locks.die_with_parent()
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    os.execve(python, [python, str(MAIN), json.dumps(broker_config(settings))], environment)


if __name__ == "__main__":
    main()
