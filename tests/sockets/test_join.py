"""Joining cloudsim over https: what comes of it, and every refusal, which leaves the old files as they were."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from cloudsim import CloudSim, SimConfig
from cloudsim.certificate_api import ApiFault
from runtime import enrolment
from runtime.enrolling import enrol
from runtime.enrolment import Issued, Job, Outcome
from runtime.errors import NotEnrolled
from runtime.proxy import Proxy
from tests.support.aio import run
from tests.support.connect_proxy import ConnectProxy, proxying
from tests.support.deadline import DEADLINE

NODE = "edge-1"
OLD = b"what was there before"


@asynccontextmanager
async def cloud(directory: Path, **settings: object) -> AsyncIterator[CloudSim]:
    config = SimConfig(directory=directory, certificate_port=0, control_port=None, **settings)  # type: ignore[arg-type]
    async with CloudSim(config) as sim:
        yield sim


def job(home: Path, sim: CloudSim | None, *, token: str = "", server: str = "", **changes: object) -> Job:
    return msgspec.structs.replace(
        Job(
            server=server or f"https://127.0.0.1:{sim.certificate_port if sim else 1}",
            node_name=NODE,
            ca_file=str(home / "ca" / "rootCA.crt"),
            cert_file=str(home / "certs" / "server.crt"),
            key_file=str(home / "certs" / "server.key"),
            token=token,
            seconds=DEADLINE,
        ),
        **changes,
    )


def files(wanted: Job) -> list[Path]:
    return [Path(wanted.ca_file), Path(wanted.cert_file), Path(wanted.key_file)]


def lay_old_files(wanted: Job) -> None:
    for path in files(wanted):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(OLD)


async def refused(wanted: Job) -> NotEnrolled:
    """Try, see that the old files stay, and that the secret of the token is not in the words."""
    lay_old_files(wanted)
    with pytest.raises(NotEnrolled) as caught:
        await enrol(wanted)
    assert [path.read_bytes() for path in files(wanted)] == [OLD] * 3
    assert not list(Path(wanted.cert_file).parent.glob(".*.new")), "no half-made file stays behind"
    if wanted.token:
        assert wanted.token.rpartition(".")[2] not in caught.value.text
    return caught.value


# --- it works -----------------------------------------------------------------------------------------------


def test_a_node_joins_with_a_token(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim:
            wanted = job(tmp_path, sim, token=sim.token())
            issued = await enrol(wanted)
            assert issued.common_name == f"system:node:{NODE}"
            assert issued.not_after - issued.not_before == 365 * 86400
            ca, certificate, key = (path.read_bytes() for path in files(wanted))
            assert ssl.PEM_cert_to_DER_cert(ca.decode()) == sim.authority.ca_der
            spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            public = load_pem_private_key(key, None).public_key().public_bytes(*spki)
            assert x509.load_pem_x509_certificate(certificate).public_key().public_bytes(*spki) == public
            assert all(path.stat().st_mode & 0o777 == 0o600 for path in files(wanted))

    run(scenario())


def test_a_node_that_joined_is_served_and_its_rotation_needs_no_token(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", enforce_authorization=True) as sim:
            await enrol(job(tmp_path, sim, token=sim.token()))
            assert sim.certificates is not None
            before = [path.read_bytes() for path in files(job(tmp_path, sim))]
            await enrol(job(tmp_path, sim))
            after = [path.read_bytes() for path in files(job(tmp_path, sim))]
            assert [new == old for new, old in zip(after, before, strict=True)] == [True, False, False]
            *_, rotation = sim.certificates.requests
            assert not rotation.header("authorization")
            assert rotation.certificate is not None

    run(scenario())


def test_the_ca_is_pinned_before_anything_is_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim, cloud(tmp_path / "other") as other:
            told = await refused(job(tmp_path, sim, token=other.token()))
            assert told.code == enrolment.CA_MISMATCH
            assert sim.certificates is not None
            (only,) = sim.certificates.requests
            assert (only.path, only.body) == ("/ca.crt", b"")
            assert not only.header("authorization")
            assert not only.header("nodename")

    run(scenario())


def test_the_process_that_joins_is_given_its_secret_by_pipe_and_answers_in_json(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim:
            wanted = job(tmp_path, sim, token=sim.token())
            done = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "runtime.enrolling"],
                input=msgspec.json.encode(wanted),
                capture_output=True,
                check=True,
                timeout=DEADLINE,
                cwd=Path(__file__).parents[2],
            )
            outcome = msgspec.json.decode(done.stdout, type=Outcome)
            assert outcome.issued is not None
            assert outcome.issued.common_name == f"system:node:{NODE}"
            assert done.stderr == b""

    run(scenario())


@pytest.mark.parametrize("authorization", ["", "Basic bWU6c2VjcmV0"], ids=["open", "with a password"])
def test_a_node_joins_through_a_proxy(tmp_path: Path, authorization: str) -> None:
    async def scenario() -> None:
        async with (
            cloud(tmp_path / "cloud") as sim,
            proxying(ConnectProxy(authorization=authorization)) as proxy,
        ):
            (tmp_path / "password").write_text("secret\n")
            wanted = job(tmp_path, sim, token=sim.token(), proxy=Proxy("127.0.0.1", proxy.port, user="me"))
            await enrol(msgspec.structs.replace(wanted, proxy_password_file=str(tmp_path / "password")))
            assert proxy.asked == [f"127.0.0.1:{sim.certificate_port}"] * 2

    run(scenario())


def test_a_proxy_that_refuses_a_join_is_told_from_the_cloud(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim, proxying(ConnectProxy(authorization="Basic x")) as proxy:
            told = await refused(job(tmp_path, sim, token=sim.token(), proxy=Proxy("127.0.0.1", proxy.port)))
            assert told.code == enrolment.UNREACHABLE
            assert "it wants a user and a password" in told.text
            told = await refused(job(tmp_path, sim, token=sim.token(), proxy=Proxy("127.0.0.1", 1)))
            assert "the proxy http://127.0.0.1:1 cannot be reached" in told.text

    run(scenario())


# --- every refusal --------------------------------------------------------------------------------------------


def spoilt(token: str) -> str:
    head, _, signature = token.rpartition(".")
    return f"{head}.{signature[::-1]}"


@pytest.mark.parametrize(
    ("code", "make", "words"),
    [
        (enrolment.TOKEN_MALFORMED, lambda sim: "not.a.SECRET", "the hash of the CA before the first dot is missing"),
        (enrolment.TOKEN_REJECTED, lambda sim: spoilt(sim.token()), "signature is invalid"),
        (enrolment.TOKEN_EXPIRED, lambda sim: sim.token(expires_in=-60.0), "the token is expired since"),
    ],
    ids=["malformed", "rejected", "expired"],
)
def test_a_join_with_a_bad_token_is_refused(
    tmp_path: Path, code: str, make: Callable[[CloudSim], str], words: str
) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim:
            told = await refused(job(tmp_path, sim, token=make(sim)))
            assert told.code == code
            assert words in told.text
            assert "keadm gettoken" in told.text

    run(scenario())


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (ApiFault(fault="foreign-ca"), enrolment.CA_MISMATCH, "Nothing was sent"),
        (ApiFault(fault="wrong-node"), enrolment.NODE_NAME, "expected 'system:node:edge-1'"),
        (ApiFault(fault="wrong-key"), enrolment.BAD_CERTIFICATE, "its key is not the one"),
        (ApiFault(fault="not-yet-valid", seconds=3600), enrolment.CLOCK, "Set the clock"),
        (ApiFault(fault="skew", seconds=-86400), enrolment.CLOCK, "the cloud's "),
        (ApiFault(fault="skew", seconds=7200), enrolment.CLOCK, "this node's clock says"),
        (ApiFault(fault="garbage"), enrolment.NOT_A_CLOUDHUB, "this is not HTTP: SSH-2.0"),
        (ApiFault(fault="garbage", path="/edge.crt"), enrolment.NOT_A_CLOUDHUB, "this is not HTTP: SSH-2.0"),
        (ApiFault(fault="truncated"), enrolment.NOT_A_CLOUDHUB, "the answer ends early"),
        (ApiFault(fault="endless"), enrolment.NOT_A_CLOUDHUB, "a body of more than 65536 bytes"),
        (ApiFault(fault="hang-up", path="/edge.crt"), enrolment.UNREACHABLE, "closed the connection without an answer"),
        (ApiFault(fault="status", status=500, text="boom"), enrolment.CLOUD_FAILED, "failed: 500 'boom'"),
        (ApiFault(fault="status", status=404, text="nothing"), enrolment.NOT_A_CLOUDHUB, "answers 404"),
        (ApiFault(fault="status", status=200, text="<html>"), enrolment.NOT_A_CLOUDHUB, "is no certificate: <html>"),
        (ApiFault(fault="refuse"), enrolment.UNREACHABLE, "nothing listens there"),
    ],
    ids=lambda value: f"{value.fault}{value.path}{value.status}" if isinstance(value, ApiFault) else "",
)
def test_a_join_that_the_cloud_spoils_is_refused(tmp_path: Path, fault: ApiFault, code: str, words: str) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim:
            assert sim.certificates is not None
            await sim.certificates.inject(fault)
            wanted = job(tmp_path, sim, token=sim.token())
            told = await refused(wanted)
            assert told.code == code
            assert words in told.text
            assert f"127.0.0.1:{sim.certificate_port}" in told.text or code == enrolment.CLOCK
            # And it recovers by itself once the fault is gone.
            await sim.certificates.inject(ApiFault(fault="clear"))
            assert (await enrol(wanted)).common_name == f"system:node:{NODE}"

    run(scenario())


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_a_join_waits_for_no_answer_longer_than_told(tmp_path: Path, fault: str) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim:
            assert sim.certificates is not None
            await sim.certificates.inject(ApiFault(fault=fault, seconds=60.0))  # type: ignore[arg-type]
            told = await refused(job(tmp_path, sim, token=sim.token(), seconds=0.3))
            assert told.code == enrolment.UNREACHABLE
            assert "no answer within 0.3 s" in told.text

    run(scenario())


def test_a_join_of_a_name_that_does_not_resolve_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim:
            told = await refused(job(tmp_path, sim, token=sim.token(), server="https://no-such-host.invalid"))
            assert told.code == enrolment.UNREACHABLE
            assert "cannot be resolved" in told.text

    run(scenario())


def test_a_join_of_something_that_does_not_speak_tls_is_refused(tmp_path: Path) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n")
        writer.close()

    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim, await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            told = await refused(job(tmp_path, sim, token=sim.token(), server=f"127.0.0.1:{port}"))
            assert told.code == enrolment.NOT_A_CLOUDHUB
            assert "does not speak TLS" in told.text

    run(scenario())


def test_a_join_at_a_server_whose_certificate_names_another_host_is_refused(tmp_path: Path) -> None:
    """The right CA is not enough: another server of the same cloud must not get the token."""

    async def scenario() -> None:
        async with cloud(tmp_path / "cloud", host="127.0.0.2", names=("cloudcore",)) as sim:
            relay = await _relay_to("127.0.0.2", sim.certificate_port or 0)
            async with relay:
                port = relay.sockets[0].getsockname()[1]
                told = await refused(job(tmp_path, sim, token=sim.token(), server=f"127.0.0.1:{port}"))
            assert told.code == enrolment.TLS_FAILED
            assert "advertiseAddress" in told.text
            assert sim.certificates is not None
            assert [each.path for each in sim.certificates.requests] == ["/ca.crt"], "the token was not sent"

    run(scenario())


async def _relay_to(host: str, port: int) -> asyncio.Server:
    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection(host, port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(4096):
                sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, here), pump(there, writer), return_exceptions=True)

    return await asyncio.start_server(relay, "127.0.0.1", 0)


def test_a_join_with_a_clock_of_1970_is_refused_before_the_token_is_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim:
            wanted = job(tmp_path, sim, token=sim.token())
            lay_old_files(wanted)
            with pytest.raises(NotEnrolled, match="1970-01-01") as caught:
                await enrol(wanted, clock=lambda: 1000.0)
            assert caught.value.code == enrolment.CLOCK
            assert sim.certificates is not None
            assert [each.path for each in sim.certificates.requests] == ["/ca.crt"]

    run(scenario())


def test_a_join_into_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "certs").write_bytes(b"a file in the way")
        async with cloud(tmp_path / "cloud") as sim:
            with pytest.raises(NotEnrolled) as caught:
                await enrol(job(tmp_path, sim, token=sim.token()))
            assert caught.value.code == enrolment.FILES

    run(scenario())


# --- rotation refused -------------------------------------------------------------------------------------------


async def rotation_refused(tmp_path: Path, spoil: Callable[[CloudSim], Awaitable[Job]]) -> NotEnrolled:
    async with cloud(tmp_path / "cloud") as sim:
        wanted = await spoil(sim)
        before = [path.read_bytes() for path in files(wanted)]
        with pytest.raises(NotEnrolled) as caught:
            await enrol(wanted)
        assert [path.read_bytes() for path in files(wanted)] == before
        return caught.value


def test_a_rotation_with_an_expired_certificate_says_to_join_anew(tmp_path: Path) -> None:
    async def spoil(sim: CloudSim) -> Job:
        assert sim.certificates is not None
        sim.certificates.api.signing_seconds = 1
        wanted = job(tmp_path, sim, token=sim.token())
        issued = await enrol(wanted)
        while time.time() <= issued.not_after:
            await asyncio.sleep(0.05)  # until it has expired
        return msgspec.structs.replace(wanted, token="")

    async def scenario() -> None:
        told = await rotation_refused(tmp_path, spoil)
        assert told.code == enrolment.BAD_CERTIFICATE
        assert "certificate has expired" in told.text
        assert "Join anew with a token" in told.text

    run(scenario())


def test_a_rotation_under_another_name_is_refused_by_the_cloud(tmp_path: Path) -> None:
    async def spoil(sim: CloudSim) -> Job:
        await enrol(job(tmp_path, sim, token=sim.token()))
        return job(tmp_path, sim, node_name="edge-2")

    async def scenario() -> None:
        told = await rotation_refused(tmp_path, spoil)
        assert told.code == enrolment.NODE_NAME
        assert "hostnameOverride" in told.text

    run(scenario())


def test_a_rotation_without_usable_files_is_refused_and_says_which(tmp_path: Path) -> None:
    async def spoil(sim: CloudSim) -> Job:
        wanted = job(tmp_path, sim)
        lay_old_files(wanted)
        return wanted

    async def scenario() -> None:
        told = await rotation_refused(tmp_path, spoil)
        assert told.code == enrolment.FILES
        assert "server.crt" in told.text

    run(scenario())


def test_a_rotation_at_another_cloud_is_refused_by_us(tmp_path: Path) -> None:
    async def spoil(sim: CloudSim) -> Job:
        await enrol(job(tmp_path, sim, token=sim.token()))
        (tmp_path / "ca" / "rootCA.crt").write_bytes(ssl.DER_cert_to_PEM_cert(sim.authority.foreign_ca_der()).encode())
        return job(tmp_path, sim)

    async def scenario() -> None:
        assert (await rotation_refused(tmp_path, spoil)).code == enrolment.TLS_FAILED

    run(scenario())


def leave_half_done(key: Path) -> None:
    """As a crash between the journal and the first rename does."""
    fresh = key.with_name(".server.key.new")
    key.rename(fresh)
    key.with_name(".server.crt.journal").write_bytes(msgspec.json.encode([[str(fresh), str(key)]]))


def test_a_crash_of_an_earlier_join_is_finished_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path / "cloud") as sim:
            wanted = job(tmp_path, sim, token=sim.token())
            issued: Issued = await enrol(wanted)
            leave_half_done(Path(wanted.key_file))
            renewed = await enrol(msgspec.structs.replace(wanted, token=""))
            assert renewed.common_name == issued.common_name

    run(scenario())


def test_a_join_at_a_port_that_never_answers_ends_in_time(tmp_path: Path) -> None:
    async def scenario(port: int) -> None:
        token = "0" * 64 + ".e30.e30.c2ln"
        told = await refused(job(tmp_path, None, token=token, server=f"127.0.0.1:{port}", seconds=0.2))
        assert told.code == enrolment.UNREACHABLE
        assert "no answer within 0.2 s" in told.text

    with socket.create_server(("127.0.0.1", 0)) as silent:
        run(scenario(silent.getsockname()[1]))
