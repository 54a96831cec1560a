"""`python -m modules.eventbus`: the eventbus process."""

from __future__ import annotations

import logging
import sys

from modules.eventbus.config import from_node
from runtime import config, logs
from runtime.errors import ConfigError
from runtime.exits import exit_disabled
from runtime.home import find_home
from runtime.lean import TLS, TYPING, without


def main() -> None:
    logs.setup("eventbus")
    log = logging.getLogger("modules.eventbus")
    try:
        home = find_home()
        settings = from_node(config.load(home.path))
        if not settings.enable:
            log.info("modules.eventBus.enable is off: nothing to do")
            exit_disabled()
        needs_tls = any(server.tls is not None for server in settings.servers())
        # Only now: asyncio and paho take OpenSSL along wherever they find it.
        with without(*TYPING, *(() if needs_tls else TLS)):
            from modules.eventbus.bus import EventBus
            from runtime.module import run
        module = EventBus(settings, home.data)
    except ConfigError as fault:
        log.error("%s", fault)  # one line that names key, value and rule; a traceback would bury it
        sys.exit(2)
    run(module)


if __name__ == "__main__":
    main()
