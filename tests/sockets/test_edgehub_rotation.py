"""edgehub joins, renews and recovers by itself, on a real link to cloudsim; nothing is lost meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cloudsim import CloudSim
from cloudsim.certificate_api import ApiFault
from modules.edgehub import hub as hub_module
from modules.edgehub.certificate_keeper import do_in_a_process
from modules.edgehub.config import QUIC, WEBSOCKET, EdgeHubConfig, Endpoint
from modules.edgehub.hub import EdgeHub
from runtime import enrolling
from runtime.enrolment import Job, Outcome
from tests.modules.edgehub.fakes import FakeBus, FakeDeferral, hand_over, running, upload
from tests.modules.edgehub.simulated import NODE, cloud, state
from tests.support.aio import run, until
from tests.support.deadline import DEADLINE

ROTATIONS = 10
LIFETIME = 4
"Seconds. CloudCore's times are whole seconds, so a certificate has lived up to one when it is made."


def settings(sim: CloudSim, home: Path, **changes: Any) -> EdgeHubConfig:
    """A node that has nothing but the addresses (and a token, if that is among the changes)."""
    port = sim.quic_port if changes.get("protocol") == QUIC else sim.port
    assert port is not None
    values: dict[str, Any] = {
        "node_name": NODE,
        "endpoints": (Endpoint("127.0.0.1", port),),
        "certificate_server": f"https://127.0.0.1:{sim.certificate_port}",
        "ca_file": str(home / "ca.crt"),
        "cert_file": str(home / "node.crt"),
        "key_file": str(home / "node.key"),
        "rotate_certificates": True,
        "message_qps": 0.0,
        "retry_cap_seconds": 0.5,
        "drain_seconds": 1.0,
        "outbox_path": home / "outbox.db",
    }
    return EdgeHubConfig(**values | changes)


@asynccontextmanager
async def node(config: EdgeHubConfig) -> AsyncIterator[tuple[EdgeHub, FakeBus]]:
    async with running(config, enrol=enrolling.work) as (hub, bus):
        yield hub, bus


def lay(sim: CloudSim, config: EdgeHubConfig, *, certificate: bytes | None = None) -> None:
    """Files as an operator lays them by hand."""
    pair = sim.certificate(NODE)
    Path(config.ca_file).write_bytes(sim.ca.certificate.read_bytes())
    Path(config.key_file).write_bytes(pair.key.read_bytes())
    Path(config.cert_file).write_bytes(certificate or pair.certificate.read_bytes())


def content(path: str) -> bytes:
    return Path(path).read_bytes()


def words_of_processes(named: bytes) -> bytes:
    """Arguments and environment of every process that has `named` among its arguments."""
    shown = b""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes()
            if named in words:
                shown += words + (process / "environ").read_bytes()
    return shown


def ids(sim: CloudSim) -> set[str]:
    return {received.message.header.msg_id for received in sim.uploads()}


# --- ten rotations ------------------------------------------------------------------------------------------


def test_ten_rotations_under_load_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The load never pauses: the link is replaced as soon as that has been waited for.
    monkeypatch.setattr(hub_module, "_QUIET_PATIENCE_SECONDS", 0.3)

    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", certificate_port=0, signing_seconds=LIFETIME) as sim:
            config = settings(sim, tmp_path, token=sim.token())
            async with node(config) as (hub, _):
                taken: list[FakeDeferral] = []

                async def load() -> None:
                    while True:
                        deferral = await hand_over(hub, upload(len(taken)))
                        assert deferral is not None
                        taken.append(deferral)
                        await asyncio.sleep(0.005)

                async with asyncio.TaskGroup() as tasks:
                    loading = tasks.create_task(load())
                    await until(lambda: state(hub) == "served", "the first link")
                    first = not_after(hub)
                    while hub.counters()["certificate_rotations"] < ROTATIONS:
                        await asyncio.sleep(0.05)
                    assert time.time() > first, "the hub would not take the first certificate any more"
                    moves = hub.counters()["moves"]
                    await until(lambda: state(hub) == "served" and hub.counters()["moves"] > moves, "one link more")
                    loading.cancel()
                await until(lambda: all(deferral.outcome for deferral in taken), "everything settled")
                assert {deferral.outcome for deferral in taken} == {"done"}
                assert len(taken) > 10 * ROTATIONS
                await until(lambda: {deferral.message.id for deferral in taken} <= ids(sim), "everything in the cloud")
                assert hub.counters()["moves"] >= ROTATIONS / 2, "most new certificates were put to use"
                assert hub.counters()["ledger_mismatch"] == 0

    async def bounded() -> None:
        async with asyncio.timeout(2 * ROTATIONS * LIFETIME + 2 * DEADLINE):
            await scenario()

    asyncio.run(bounded())


def not_after(hub: EdgeHub) -> float:
    return float(hub.link_status()["certificate"]["not_after"])


@pytest.mark.parametrize("protocol", [WEBSOCKET, QUIC])
def test_a_rotation_keeps_the_link_until_a_quiet_moment(tmp_path: Path, protocol: str) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", certificate_port=0, quic_port=0) as sim:
            assert sim.certificates is not None
            sim.certificates.api.signing_seconds = LIFETIME
            config = settings(sim, tmp_path, token=sim.token(), protocol=protocol)
            async with node(config) as (hub, bus):
                await until(lambda: state(hub) == "served", "a link")
                sim.certificates.api.signing_seconds = 86_400.0
                bus.slow.add("eventbus")  # a command is in hand: no quiet moment
                sim.send_command(NODE, "a/b", {"on": True})
                await until(lambda: bus.sent_to("eventbus"), "the command")
                await until(lambda: hub.counters()["certificate_rotations"], "a rotation")
                assert hub.counters()["connects"] == 1
                assert hub.link_status()["move_wanted"] == "a new certificate"
                for sent in bus.sent:
                    sent.receipt.settle()
                await until(lambda: hub.counters()["connects"] == 2 and state(hub) == "served", "the new link")
                assert not_after(hub) > time.time() + 80_000

    run(scenario())


@pytest.mark.alone
def test_a_refused_rotation_disturbs_nobody_and_is_tried_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", certificate_port=0, signing_seconds=LIFETIME) as sim:
            assert sim.certificates is not None
            config = settings(sim, tmp_path, token=sim.token())
            async with node(config) as (hub, _):
                await until(lambda: state(hub) == "served", "a link")
                sim.certificates.api.signing_seconds = 86_400.0
                await sim.certificates.inject(ApiFault(fault="status", status=500, text="boom", count=2))
                await until(lambda: hub.counters()["certificate_refusals"] >= 1, "a refusal")
                status = hub.link_status()["certificate"]
                assert status["last_refusal"]["code"] == "cloud-failed"
                assert "boom" in status["warning"]
                assert state(hub) == "served"
                await until(lambda: hub.counters()["certificate_rotations"] == 1, "a rotation")
                assert hub.link_status()["certificate"]["warning"] is None

    run(scenario())


# --- joining by itself ----------------------------------------------------------------------------------------


def test_a_node_without_files_joins_by_itself_and_takes_messages_meanwhile(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", certificate_port=0) as sim:
            assert sim.certificates is not None
            await sim.certificates.inject(ApiFault(fault="refuse"))
            config = settings(sim, tmp_path, token=sim.token())
            async with node(config) as (hub, _):
                await until(lambda: hub.counters()["certificate_refusals"], "a refusal")
                status = hub.link_status()
                assert status["why"].startswith(f"joining: https://127.0.0.1:{sim.certificate_port}: nothing listens")
                assert status["certificate"]["standing"] == "missing"
                deferral = await hand_over(hub, upload(1))
                assert deferral is not None
                await until(lambda: deferral.outcome == "done", "the message on disk")
                assert not sim.uploads()
                await sim.certificates.inject(ApiFault(fault="clear"))
                await until(lambda: deferral.message.id in ids(sim), "the message in the cloud")
                assert hub.counters()["certificate_joins"] == 1
                assert hub.link_status()["certificate"]["warning"] is None

    run(scenario())


def test_the_process_that_edgehub_starts_to_join_does_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path / "cloud", certificate_port=0) as sim,
            running(settings(sim, tmp_path, token=sim.token())) as (hub, _),
        ):
            await until(lambda: state(hub) == "served", "a link")

    run(scenario())


def test_a_process_that_fails_to_join_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        wanted = Job(server="no address://", node_name=NODE, ca_file="", cert_file="", key_file="", token="x")
        outcome = await do_in_a_process(wanted)
        assert (outcome.issued, outcome.code) == (None, "internal")
        monkeypatch.setattr("sys.executable", "/bin/false")
        outcome = await do_in_a_process(wanted)
        assert outcome.text.startswith("python -m runtime.enrolling ended with status 1")
        monkeypatch.setattr("sys.executable", str(tmp_path / "nothing"))
        assert (await do_in_a_process(wanted)).code == "internal"

    run(scenario())


# --- expired ------------------------------------------------------------------------------------------------------


async def _expire(hub: EdgeHub, sim: CloudSim) -> None:
    """Let the certificate run out while the cloud's API does not answer; cut the link."""
    assert sim.certificates is not None
    await sim.certificates.inject(ApiFault(fault="refuse"))
    while time.time() <= not_after(hub):
        await asyncio.sleep(0.05)  # until it has expired
    await until(lambda: hub.link_status()["certificate"]["standing"] == "expired", "the expiry noticed")
    sim.kick(NODE)
    await until(lambda: state(hub) != "served", "the link cut")


@pytest.mark.alone
@pytest.mark.parametrize("by", ["files", "token"])
def test_with_an_expired_certificate_messages_are_stored_and_the_node_recovers(tmp_path: Path, by: str) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", certificate_port=0, signing_seconds=LIFETIME) as sim:
            assert sim.certificates is not None
            config = settings(sim, tmp_path, token=sim.token())
            # As the operator's own: with a token the node helps itself, without one it waits for files.
            outcome: Outcome = await enrolling.work(_join(config))
            assert outcome.issued is not None
            changes: dict[str, Any] = {} if by == "token" else {"token": "", "rotate_certificates": False}
            async with node(settings(sim, tmp_path, **{"token": config.token} | changes)) as (hub, _):
                await until(lambda: state(hub) == "served" or not hub.counters()["certificate_usable"], "a link")
                await _expire(hub, sim)
                deferral = await hand_over(hub, upload(1))
                assert deferral is not None
                await until(lambda: deferral.outcome == "done", "the message on disk")
                warning = hub.link_status()["certificate"]["warning"]
                assert ("joining: " if by == "token" else "expired") in warning
                sim.certificates.api.signing_seconds = 86_400.0
                if by == "token":
                    await sim.certificates.inject(ApiFault(fault="clear"))
                else:
                    lay(sim, config)
                await until(lambda: deferral.message.id in ids(sim), "the message in the cloud")
                await until(lambda: hub.link_status()["certificate"]["standing"] == "valid", "the new one noticed")

    run(scenario())


def _join(config: EdgeHubConfig) -> Job:
    return Job(
        server=config.certificate_server,
        node_name=NODE,
        ca_file=config.ca_file,
        cert_file=config.cert_file,
        key_file=config.key_file,
        token=config.token,
    )


# --- files of others ------------------------------------------------------------------------------------------------


def test_a_certificate_that_an_operator_renews_by_hand_is_put_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modules.edgehub.certificate_plan._LOOK_SECONDS", 0.1)

    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", certificate_port=0) as sim:
            config = settings(sim, tmp_path)
            lay(sim, config)
            async with node(config) as (hub, _):
                await until(lambda: state(hub) == "served", "a link")
                outcome = await enrolling.work(_join(settings(sim, tmp_path, token=sim.token())))
                assert outcome.issued is not None
                await until(lambda: hub.counters()["connects"] == 2 and state(hub) == "served", "the new link")
                assert not_after(hub) == outcome.issued.not_after

    run(scenario())


@pytest.mark.parametrize(
    ("spoil", "standing", "words"),
    [
        ("other node", "other-node", "is for CN='system:node:other'"),
        ("junk", "broken", "expected one PEM certificate"),
    ],
)
def test_files_that_are_wrong_are_complained_about_and_left_alone(
    tmp_path: Path, spoil: str, standing: str, words: str
) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", certificate_port=0) as sim:
            config = settings(sim, tmp_path, token=sim.token())
            other = sim.certificate("other").certificate.read_bytes()
            lay(sim, config, certificate=other if spoil == "other node" else b"junk")
            laid = content(config.cert_file)
            async with node(config) as (hub, _):
                await until(lambda: words in hub.link_status()["why"], "a failed dial")
                status = hub.link_status()["certificate"]
                assert status["standing"] == standing
                assert words in status["warning"]
                assert hub.counters()["certificate_usable"] == 0
            assert content(config.cert_file) == laid
            assert sim.certificates is not None
            assert not sim.certificates.requests

    run(scenario())


def test_a_crash_between_two_files_of_a_rotation_is_mended_at_the_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", certificate_port=0) as sim:
            config = settings(sim, tmp_path)
            lay(sim, config)
            fresh = tmp_path / ".node.crt.new"
            fresh.write_bytes(content(config.cert_file))
            lay(sim, config, certificate=ssl.DER_cert_to_PEM_cert(sim.authority.foreign_node_der(NODE)).encode())
            (tmp_path / ".node.crt.journal").write_text(f'[["{fresh}", "{config.cert_file}"]]')
            async with node(config) as (hub, _):
                await until(lambda: state(hub) == "served", "a link")
            assert not fresh.exists()

    run(scenario())


def test_a_journal_that_cannot_be_finished_is_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", certificate_port=0) as sim:
            config = settings(sim, tmp_path)
            lay(sim, config)
            (tmp_path / ".node.crt.journal").write_text("junk")
            async with node(config) as (hub, _):
                words = ".node.crt.journal: a replacement was cut short"
                await until(lambda: words in hub.link_status()["why"], "a failed dial")

    run(scenario())


def test_no_secret_is_in_the_environment_or_the_arguments_of_the_process(tmp_path: Path) -> None:
    """Seen from outside while it waits for a cloud that does not answer."""

    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", certificate_port=0) as sim:
            assert sim.certificates is not None
            await sim.certificates.inject(ApiFault(fault="slow", seconds=DEADLINE))
            config = settings(sim, tmp_path, token=sim.token())
            joining = asyncio.create_task(do_in_a_process(_join(config)))
            await until(lambda: sim.certificates is not None and sim.certificates.requests, "the request")
            secret = config.token.rpartition(".")[2].encode()
            shown = words_of_processes(b"runtime.enrolling")
            assert shown
            assert secret not in shown
            joining.cancel()
            await asyncio.wait([joining])

    run(scenario())


def test_files_that_cannot_even_be_looked_for_are_missing_and_edgehub_lives(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "file").write_bytes(b"in the place of a directory")
        async with cloud(tmp_path / "cloud", certificate_port=0) as sim:
            config = settings(sim, tmp_path, cert_file=str(tmp_path / "file" / "node.crt"), token=sim.token())
            async with node(config) as (hub, _):
                await until(lambda: hub.counters()["certificate_refusals"], "a refusal")
                status = hub.link_status()["certificate"]
                assert (status["standing"], status["last_refusal"]["code"]) == ("missing", "files")

    run(scenario())
