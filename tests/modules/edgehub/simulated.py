"""EdgeHub against cloudsim in one process, for tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cloudsim import CloudMessage, CloudSim, Header, Route, SimConfig
from modules.edgehub.config import QUIC, EdgeHubConfig, Endpoint
from modules.edgehub.hub import EdgeHub
from runtime.message import new_id
from tests.modules.edgehub.fakes import FakeBus, running
from tests.support.aio import until

NODE = "edge-1"


def settings(sim: CloudSim, *more: Endpoint, **changes: Any) -> EdgeHubConfig:
    """To reach `sim`, over `protocol` if that is among the changes."""
    pair = sim.certificate(NODE)
    port = sim.quic_port if changes.get("protocol") == QUIC else sim.port
    assert port is not None
    values: dict[str, Any] = {
        "node_name": NODE,
        "endpoints": (Endpoint("127.0.0.1", port), *more),
        "ca_file": str(sim.ca.certificate),
        "cert_file": str(pair.certificate),
        "key_file": str(pair.key),
        "message_qps": 0.0,
        "retry_cap_seconds": 1.0,
        "drain_seconds": 1.0,
    }
    return EdgeHubConfig(**values | changes)


@asynccontextmanager
async def cloud(directory: Path, **changes: Any) -> AsyncIterator[CloudSim]:
    config: dict[str, Any] = {"replacement_race": 0.0, "control_port": None, "seed": 1}
    async with CloudSim(SimConfig(directory=directory, **config | changes)) as sim:
        yield sim


@asynccontextmanager
async def served(sim: CloudSim, **changes: Any) -> AsyncIterator[tuple[EdgeHub, FakeBus]]:
    async with running(settings(sim, **changes)) as (hub, bus):
        await until(lambda: state(hub) == "served", "a served link")
        yield hub, bus


def state(hub: EdgeHub) -> str:
    return str(hub.link_status()["state"])


def command(number: int) -> CloudMessage:
    return CloudMessage(
        Header(msg_id=new_id(), timestamp=1),
        Route(source="router_eventbus", group="user", operation="publish", resource="a/b"),
        {"number": number},
    )


def config_map(name: str, version: int, **data: Any) -> CloudMessage:
    return CloudMessage(
        Header(msg_id=new_id(), timestamp=1, resourceversion=str(version)),
        Route(source="edgecontroller", group="resource", operation="update", resource=f"default/configmap/{name}"),
        {"metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version)}, "data": data},
    )
