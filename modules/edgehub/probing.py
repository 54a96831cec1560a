"""`python -m modules.edgehub.probing`: looks for every CloudHub of a configuration once, as far as TLS.

For `edgezmq check`, which has no QUIC of its own. Reads the node's configuration (JSON, as in run/node.json) from
standard input and writes one JSON line for each endpoint: `endpoint`, `fault` (null: none), `seconds`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import replace
from typing import Final

import msgspec

from modules.edgehub.config import EdgeHubConfig
from modules.edgehub.link import probe
from runtime.config import NodeConfig

PROBE_SECONDS: Final = 3.0
"For one endpoint."


async def look(config: EdgeHubConfig) -> None:
    for endpoint in config.endpoints:
        started = time.monotonic()
        fault = await probe(config, endpoint)
        found = {"endpoint": str(endpoint), "fault": fault, "seconds": time.monotonic() - started}
        sys.stdout.write(json.dumps(found) + "\n")


def main() -> None:
    node = msgspec.json.decode(sys.stdin.buffer.read(), type=NodeConfig)
    config = EdgeHubConfig.from_node(node)
    asyncio.run(look(replace(config, handshake_seconds=min(PROBE_SECONDS, config.handshake_seconds))))


if __name__ == "__main__":
    main()
