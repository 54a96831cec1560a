"""Several CloudHubs: over to the next one, back to the first, nothing lost and nothing twice on the way."""

import asyncio
from pathlib import Path

import pytest

from cloudsim import CloudSim
from modules.edgehub import hub as hub_module
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.hub import EdgeHub
from tests.modules.edgehub.fakes import FakeDeferral, hand_over, running, upload
from tests.modules.edgehub.simulated import NODE, cloud, served, settings, state
from tests.support.aio import run, until
from tests.support.mosquitto import free_port


def two(first: int, second: CloudSim, **changes: object) -> EdgeHubConfig:
    """Both hubs have the CA of one directory."""
    endpoints = (Endpoint("127.0.0.1", first), Endpoint("127.0.0.1", second.port))
    values: dict[str, object] = {"endpoints": endpoints, "retry_cap_seconds": 0.2, "failback_seconds": 0.3}
    return settings(second, **values | changes)


async def serving(hub: EdgeHub, port: int) -> None:
    await until(
        lambda: state(hub) == "served" and hub.link_status()["endpoint"] == f"127.0.0.1:{port}", f"service by {port}"
    )


def numbers(*sims: CloudSim) -> list[int]:
    return [received.content["number"] for sim in sims for received in sim.uploads(NODE)]


def test_a_first_endpoint_that_comes_back_is_returned_to_and_nothing_is_lost_or_repeated(tmp_path: Path) -> None:
    async def scenario() -> None:
        first_port = free_port()
        async with cloud(tmp_path) as second, running(two(first_port, second)) as (hub, _):
            await serving(hub, second.port)
            deferrals: list[FakeDeferral] = []
            is_over = asyncio.Event()

            async def device() -> None:
                while not is_over.is_set():
                    deferral = await hand_over(hub, upload(len(deferrals)))
                    assert deferral is not None
                    deferrals.append(deferral)
                    await asyncio.sleep(0.002)

            task = asyncio.create_task(device())
            await until(lambda: hub.counters()["probes"] >= 2, "the first endpoint to be looked for in vain")
            assert hub.counters()["connects"] == 1
            async with cloud(tmp_path, port=first_port) as first:
                await serving(hub, first_port)
                count = len(deferrals)
                await until(lambda: len(deferrals) > count + 20, "uploads over the first")
                is_over.set()
                await task
                await until(lambda: all(d.outcome == "done" for d in deferrals), "all settled")
                assert numbers(second, first) == list(range(len(deferrals)))
                assert not second.is_served(NODE)
                assert hub.counters()["moves"] == 1

    run(scenario())


def test_a_link_that_is_never_quiet_is_held_back_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_QUIET_PATIENCE_SECONDS", 0.3)

    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim, spill_seconds=60.0) as (hub, _):
            await sim.inject("slow-pong", NODE, seconds=0.1)
            deferrals: list[FakeDeferral] = []

            async def device() -> None:
                while hub.counters()["connects"] == 1 or len(deferrals) % 100:
                    deferral = await hand_over(hub, upload(len(deferrals)))
                    assert deferral is not None
                    deferrals.append(deferral)
                    await asyncio.sleep(0.001)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(device())
                await until(lambda: len(deferrals) > 50, "load")
                hub.reconnect_quietly("new certificate")
            await until(lambda: all(d.outcome == "done" for d in deferrals), "all settled")
            assert numbers(sim) == list(range(len(deferrals))), "none is repeated: all were confirmed before the cut"

    run(scenario())


@pytest.mark.alone
def test_a_first_endpoint_that_rejects_us_is_left_again_and_tried_less_and_less(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, node_limit=0) as full, cloud(tmp_path) as second:
            config = two(full.port, second, greeting_seconds=0.2, failback_seconds=0.1)
            async with running(config) as (hub, _):
                await until(lambda: hub.counters()["moves"] >= 3, "three returns")
                await serving(hub, second.port)
                assert hub._session._failback_pause >= 0.8, "0.1 s, doubled three times"
                deferral = await hand_over(hub, upload(1))
                assert deferral is not None
                await until(lambda: deferral.outcome == "done", "an upload")

    run(scenario())


def test_a_first_endpoint_with_a_strange_certificate_is_no_reason_to_move(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path / "strange") as strange,
            cloud(tmp_path / "ours") as second,
            running(two(strange.port, second, failback_seconds=0.05)) as (hub, _),
        ):
            await serving(hub, second.port)
            await until(lambda: hub.counters()["probes"] >= 3, "three looks")
            assert state(hub) == "served"
            assert hub.counters()["moves"] == 0

    run(scenario())


def test_a_link_is_replaced_on_request_without_a_pause(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, served(sim, retry_cap_seconds=60.0) as (hub, _):
            hub.reconnect_quietly("new certificate")
            assert hub.link_status()["move_wanted"] == "new certificate"
            await until(lambda: hub.counters()["connects"] == 2 and state(hub) == "served", "another link")
            assert hub.link_status()["move_wanted"] is None

    run(scenario())
