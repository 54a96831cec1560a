"""A node whose local address changes under it, in a network of its own.

    unshare -n python -m tests.support.moving DIR

Prints one line: the addresses that the cloud saw, the number of links, the uploads that arrived.
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from modules.edgehub.config import QUIC, Endpoint
from tests.modules.edgehub.fakes import hand_over, running, upload
from tests.modules.edgehub.simulated import NODE, cloud, settings, state
from tests.support.aio import run, until

CLOUD = "10.9.0.1"
NODES = ("10.9.0.2", "10.9.0.3")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def leave_by(address: str) -> None:
    """The node's way to the cloud begins at `address` from now on."""
    ip("route", "replace", "local", CLOUD, "dev", "lo", "table", "local", "src", address)


def prepare() -> None:
    ip("link", "set", "lo", "up")
    for address in (CLOUD, *NODES):
        ip("address", "add", f"{address}/32", "dev", "lo")
    leave_by(NODES[0])


async def scenario(directory: Path) -> None:
    async with cloud(directory, host=CLOUD, quic_port=0) as sim:
        endpoint = Endpoint(CLOUD, sim.quic_port or 0)
        async with running(settings(sim, protocol=QUIC, endpoints=(endpoint,))) as (hub, _):
            await until(lambda: state(hub) == "served", "a served link")
            assert hub._connection is not None
            link = hub._connection._link

            def local() -> str:
                return str(link._socket.getsockname()[0])  # type: ignore[attr-defined]

            seen = [local()]
            first = [await hand_over(hub, upload(number)) for number in range(10)]
            await asyncio.to_thread(leave_by, NODES[1])
            await until(lambda: local() != seen[0], "the move")
            seen.append(local())
            second = [await hand_over(hub, upload(number)) for number in range(10, 20)]
            await until(lambda: all(each and each.outcome == "done" for each in first + second), "the settlement")
            arrived = [json.loads(each.content)["number"] for each in sim.uploads(NODE)]
            print(json.dumps({"addresses": seen, "links": hub.counters()["connects"], "arrived": arrived}))


if __name__ == "__main__":
    prepare()
    run(scenario(Path(sys.argv[1])))
