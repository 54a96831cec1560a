"""The way to a CloudHub: names, addresses, proxies, and the words for what is wrong with each."""

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloudsim.certificates import Authority
from modules.edgehub import dialling
from modules.edgehub.config import Endpoint
from modules.edgehub.dialling import Unreachable, connect, interleaved, resolve
from modules.edgehub.link import LinkLost, LinkRefused
from modules.edgehub.websocket import WebSocketLink
from runtime.proxy import Proxy
from tests.modules.edgehub.fakes import hand_over, running, upload
from tests.modules.edgehub.simulated import NODE, cloud, settings, state
from tests.support.aio import run, until
from tests.support.connect_proxy import ConnectProxy, proxying

V4, V6 = socket.AF_INET, socket.AF_INET6
LookUp = Callable[..., list[tuple[Any, ...]]]


# --- names and addresses ------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, Any]] | Exception | threading.Event]:
    """What the resolver says: addresses, a fault, or an event to wait for; changed by the test as it goes."""
    known: dict[str, list[tuple[int, Any]] | Exception | threading.Event] = {}
    real = socket.getaddrinfo

    def look_up(host: bytes, port: int, **facts: Any) -> list[tuple[Any, ...]]:
        if host.decode() not in known or facts.get("flags"):
            return list(real(host, port, **facts))
        answer = known[host.decode()]
        if isinstance(answer, threading.Event):
            answer.wait(30.0)
            return []
        if isinstance(answer, Exception):
            raise answer
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in answer]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_an_address_needs_no_resolver(address: str) -> None:
    [(_, where)] = run(resolve(address, 10000))
    assert where[:2] == (address, 10000)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "DNS knows no address of cloud.test"),
        (socket.gaierror(socket.EAI_NODATA, "No address"), "DNS knows no address of cloud.test"),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "the name server does not answer, cloud.test"),
        (socket.gaierror(socket.EAI_FAIL, "Non-recoverable"), "cloud.test cannot be looked up: Non-recoverable"),
        (UnicodeError("label too long"), "'cloud.test' is no host name: label too long"),
    ],
)
def test_a_resolver_that_fails_is_told_in_words(names: dict[str, Any], fault: Exception, words: str) -> None:
    names["cloud.test"] = fault
    with pytest.raises(Unreachable, match=words):
        run(resolve("cloud.test", 1))


def test_a_name_without_addresses_is_told(names: dict[str, Any]) -> None:
    names["cloud.test"] = []
    with pytest.raises(Unreachable, match="DNS knows no address"):
        run(resolve("cloud.test", 1))


def test_a_resolver_that_hangs_holds_up_neither_the_loop_nor_the_end(names: dict[str, Any]) -> None:
    names["cloud.test"] = threading.Event()

    async def scenario() -> None:
        with pytest.raises(Unreachable, match=r"no answer from DNS about cloud.test within 0\.05 s"):
            await resolve("cloud.test", 1, seconds=0.05)

    run(scenario())  # asyncio.run would wait for a thread of the loop's executor
    names["cloud.test"].set()


def test_families_take_turns_and_the_resolvers_first_choice_is_first() -> None:
    a, b, c, d = (V6, "a"), (V6, "b"), (V4, "c"), (V6, "d")
    assert interleaved([a, b, c, d]) == [a, c, b, d]
    assert interleaved([c, a, b]) == [c, a, b]
    assert interleaved([c]) == [c]


def test_an_address_that_refuses_does_not_keep_us_from_the_next(names: dict[str, Any]) -> None:
    names["cloud.test"] = [(V6, "::1"), (V4, "127.0.0.1")]

    async def scenario() -> None:
        listener = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        connected = await connect("cloud.test", port)
        assert connected.getpeername() == ("127.0.0.1", port)
        connected.close()
        listener.close()

    run(scenario())


def test_an_address_that_never_answers_costs_a_quarter_of_a_second(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names["cloud.test"] = [(V4, "127.0.0.2"), (V4, "127.0.0.1")]
    tried: list[str] = []

    async def connect_to(address: tuple[int, Any]) -> socket.socket:
        tried.append(address[1][0])
        if address[1][0] == "127.0.0.2":
            await asyncio.get_running_loop().create_future()  # a black hole
        return socket.socket(address[0], socket.SOCK_STREAM)

    monkeypatch.setattr(dialling, "_connect_to", connect_to)

    async def scenario() -> None:
        (await connect("cloud.test", 1)).close()
        assert tried == ["127.0.0.2", "127.0.0.1"]
        assert len(asyncio.all_tasks()) == 1, "the slower try is given up"

    run(scenario())


def test_two_addresses_that_answer_at_once_leave_one_connection(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names["cloud.test"] = [(V4, "127.0.0.2"), (V4, "127.0.0.1")]
    made: list[socket.socket] = []
    both = asyncio.Event()

    async def connect_to(address: tuple[int, Any]) -> socket.socket:
        made.append(socket.socket(address[0], socket.SOCK_STREAM))
        if len(made) == 2:
            both.set()
        await both.wait()
        return made[-1] if address[1][0] == "127.0.0.1" else made[0]

    monkeypatch.setattr(dialling, "_connect_to", connect_to)

    async def scenario() -> None:
        winner = await connect("cloud.test", 1)
        assert sorted(each.fileno() == -1 for each in made) == [False, True]
        winner.close()

    run(scenario())


def test_all_addresses_in_vain_are_told_each_with_its_reason(names: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        names["cloud.test"] = [(V4, "127.0.0.1"), (V4, "127.0.0.1")]
        with pytest.raises(Unreachable, match=r"^Connection refused$"):
            run(connect("cloud.test", port))
        names["cloud.test"] = [(V4, "127.0.0.1"), (V4, "255.255.255.255")]
        with pytest.raises(Unreachable, match=r"127\.0\.0\.1: Connection refused, 255\.255\.255\.255: \w+"):
            run(connect("cloud.test", port))


def test_a_name_that_moves_is_followed_at_the_next_dial(tmp_path: Path, names: dict[str, Any]) -> None:
    async def scenario() -> None:
        names["cloudcore"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure")
        async with cloud(tmp_path) as sim:
            config = settings(sim, endpoints=(Endpoint("cloudcore", sim.port),), retry_cap_seconds=0.2)
            async with running(config) as (hub, _):
                await until(lambda: "the name server does not answer" in hub.link_status()["why"], "the reason")
                names["cloudcore"] = [(V4, "127.0.0.2")]
                await until(lambda: "Connection refused" in hub.link_status()["why"], "the first address")
                names["cloudcore"] = [(V4, "127.0.0.1")]
                await until(lambda: state(hub) == "served", "the next address")

    run(scenario())


def test_a_cloud_on_ipv6_serves_us(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, host="::1") as sim:
            config = settings(sim, endpoints=(Endpoint.parse(f"[::1]:{sim.port}", "server"),))
            async with running(config) as (hub, _):
                await until(lambda: state(hub) == "served", "a served link")

    run(scenario())


# --- proxies --------------------------------------------------------------------------------------------


def proxy_to(proxy: ConnectProxy, **facts: Any) -> Proxy:
    return Proxy("127.0.0.1", proxy.port, **facts)


def test_a_proxy_carries_the_link_and_reads_none_of_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, enforce_authorization=True) as sim, proxying(ConnectProxy()) as proxy:
            async with running(settings(sim, proxy=proxy_to(proxy))) as (hub, _):
                await until(lambda: state(hub) == "served", "a served link")
                deferral = await hand_over(hub, upload(1))
                assert deferral is not None
                await until(lambda: deferral.outcome == "done", "the upload")
            assert proxy.asked == [f"127.0.0.1:{sim.port}"]
            assert proxy.seen[:1] == b"\x16", "TLS from the first byte on"
            assert len(sim.uploads(NODE)) == 1

    run(scenario())


def test_a_proxy_that_wants_a_password_gets_it_from_the_file_and_no_log_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "password"

    async def scenario() -> None:
        wanted = Proxy("p", 1, user="node", password="s3cret").authorization()
        async with cloud(tmp_path / "sim") as sim, proxying(ConnectProxy(wanted)) as proxy:
            file.write_text("wrong\n")
            changes = {"proxy": proxy_to(proxy, user="node"), "proxy_password_file": str(file)}
            async with running(settings(sim, **changes, retry_cap_seconds=0.1)) as (hub, _):
                await until(lambda: "does not know user 'node'" in hub.link_status()["why"], "the reason")
                file.write_text("s3cret\n")
                await until(lambda: state(hub) == "served", "a served link")
                assert hub.link_status()["proxy"] == f"http://127.0.0.1:{proxy.port}"
                assert "s3cret" not in caplog.text + repr(hub.link_status())

    run(scenario())


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"", "one line"), (b"a\nb\n", "one line"), (b"\xff", "UTF-8"), (b"x" * 5000, "one line")],
)
def test_a_password_file_that_is_none_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)

    async def scenario() -> None:
        async with cloud(tmp_path / "sim") as sim:
            config = settings(sim, proxy=Proxy("127.0.0.1", 1, user="node"), proxy_password_file=str(file))
            with pytest.raises(LinkRefused, match=rf"proxyPasswordFile .*{words}"):
                await WebSocketLink(config).open(config.endpoints[0])

    run(scenario())


@pytest.mark.parametrize(
    ("proxy", "fault", "words"),
    [
        (ConnectProxy("Basic eDp5"), LinkRefused, "407 Proxy Authentication Required: it wants a user"),
        (ConnectProxy(answer=b"HTTP/1.1 403 Forbidden\r\n\r\n"), LinkRefused, "403 Forbidden: it does not allow"),
        (ConnectProxy(answer=b"HTTP/1.1 502 Bad Gateway\r\n\r\n"), LinkRefused, "502 Bad Gateway: it cannot reach"),
        (ConnectProxy(answer=b"220 smtp.example ESMTP\r\n"), LinkRefused, "is no HTTP proxy: b'220 smtp"),
        (ConnectProxy(answer=b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000), LinkRefused, "headers without end"),
        (ConnectProxy(answer=b"HTTP/1.1 2"), LinkRefused, "ended the connection after b'HTTP/1.1 2'"),
        (ConnectProxy(answer=b"HTTP/1.1 200 OK\r\n\r\nhello"), LinkRefused, "something of its own into the tunnel"),
        (ConnectProxy(wait_seconds=60.0), LinkLost, "no link within 0.3 s"),
    ],
    ids=["407", "403", "502", "garbage", "endless", "cut", "chatty", "slow"],
)
def test_a_proxy_that_opens_no_tunnel_is_told_in_words(
    tmp_path: Path, proxy: ConnectProxy, fault: type[Exception], words: str
) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim, proxying(proxy):
            config = settings(sim, proxy=proxy_to(proxy), handshake_seconds=0.3 if proxy.wait_seconds else 10.0)
            with pytest.raises(fault, match=words):
                await WebSocketLink(config).open(config.endpoints[0])

    run(scenario())


def test_a_proxy_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path) as sim:
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                config = settings(sim, proxy=Proxy("127.0.0.1", taken.getsockname()[1]))
                with pytest.raises(LinkLost, match=r"the proxy http://127\.0\.0\.1:\d+ cannot be reached: Connection"):
                    await WebSocketLink(config).open(config.endpoints[0])

    run(scenario())


def test_a_hub_that_the_proxy_leads_to_must_still_be_the_right_one(tmp_path: Path) -> None:
    """A proxy that leads elsewhere, or reads along, is found by the certificate."""

    async def scenario() -> None:
        async with cloud(tmp_path / "one") as sim, cloud(tmp_path / "two") as other, proxying(ConnectProxy()) as proxy:
            config = settings(sim, endpoints=(Endpoint("127.0.0.1", other.port),), proxy=proxy_to(proxy))
            with pytest.raises(LinkRefused, match="CloudHub's certificate does not verify"):
                await WebSocketLink(config).open(config.endpoints[0])

    run(scenario())


def test_a_proxy_over_tls_is_verified_itself(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "proxy")
    pair = authority.server(["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)

    async def scenario() -> None:
        async with cloud(tmp_path / "sim") as sim, proxying(ConnectProxy(), context) as proxy:
            config = settings(sim, proxy=proxy_to(proxy, is_tls=True), proxy_ca_file=str(authority.ca.certificate))
            async with running(config) as (hub, _):
                await until(lambda: state(hub) == "served", "a served link")
                deferral = await hand_over(hub, upload(1))
                assert deferral is not None
                await until(lambda: deferral.outcome == "done", "the upload")
            strange = settings(sim, proxy=proxy_to(proxy, is_tls=True))  # whose CA the machine does not know
            with pytest.raises(LinkRefused, match=r"certificate of the proxy https://.* does not verify"):
                await WebSocketLink(strange).open(strange.endpoints[0])
            missing = settings(sim, proxy=proxy_to(proxy, is_tls=True), proxy_ca_file=str(tmp_path / "nothing.crt"))
            with pytest.raises(LinkRefused, match=r"proxyCaFile .*nothing\.crt: No such file"):
                await WebSocketLink(missing).open(missing.endpoints[0])

    run(scenario())
