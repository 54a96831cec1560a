"""`python -m modules.edgehub`: the process."""

from __future__ import annotations

import logging
import sys

from modules.edgehub.config import EdgeHubConfig
from modules.edgehub.hub import EdgeHub
from modules.edgehub.link import make_link
from runtime import config, logs
from runtime.errors import ConfigError
from runtime.exits import exit_disabled
from runtime.home import find_home
from runtime.module import EXIT_CONFIG, run


def main() -> None:
    logs.setup(EdgeHub.name)
    log = logging.getLogger("modules.edgehub")
    try:
        node = config.load(find_home().path)
        if not node.edge_hub.enable:
            log.info("modules.edgeHub.enable is off: nothing to do")
            exit_disabled()
        make_link(EdgeHubConfig.from_node(node))  # a protocol without an adapter is an error of the configuration
    except ConfigError as fault:
        log.error("%s", fault)  # one line that names key, value and rule; a traceback would bury it
        sys.exit(EXIT_CONFIG)
    run(EdgeHub())


if __name__ == "__main__":
    main()
