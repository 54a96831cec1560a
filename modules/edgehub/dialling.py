"""From an endpoint to an encrypted connection: DNS, TCP to the quickest address, a proxy's tunnel, TLS.

Names are looked up anew at each dial, so that a cloud may move. All addresses of a name are tried, IPv6 and IPv4 in
turn, the next one when the last has not answered within 250 ms (RFC 8305). TLS is always between node and cloud, end
to end, also through a proxy.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any, Final

from modules.edgehub import tls
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.link import LinkLost, LinkRefused
from runtime import tunnel
from runtime.errors import EdgezmqError
from runtime.proxy import ConnectAnswer, Proxy, ProxyRefused

RESOLVE_SECONDS: Final = 10.0
"For one look-up; resolv.conf's own default is 5 s for each try."
STAGGER_SECONDS: Final = 0.25
"RFC 8305, 5: the recommended Connection Attempt Delay."
_LEAVE_SECONDS: Final = 1.0

Address = tuple[int, Any]
"Family and socket address."


class Unreachable(EdgezmqError):
    """No TCP connection; the text says why, for each address that was tried."""


async def open_tls(
    factory: Callable[[], asyncio.Protocol], endpoint: Endpoint, config: EdgeHubConfig, context: ssl.SSLContext
) -> None:
    """Connect `factory()` to a CloudHub whose certificate verifies; its `connection_made` has been called then.

    Raises LinkLost and LinkRefused naming the endpoint; leaves nothing open. Not bounded in time: cancel it.
    """
    name = config.server_name or endpoint.host
    loop = asyncio.get_running_loop()
    try:
        if config.proxy is None:
            connected = await connect(endpoint.host, endpoint.port)
            await loop.create_connection(factory, sock=connected, ssl=context, server_hostname=on_the_wire(name))
            return
        through = await _open_tunnel(config.proxy, endpoint, config)
        protocol = factory()
        transport = await loop.start_tls(through, protocol, context, server_hostname=on_the_wire(name))
        assert transport is not None
        protocol.connection_made(transport)
    except Unreachable as fault:
        raise LinkLost(f"{endpoint}: {fault}") from fault
    except ProxyRefused as fault:
        raise LinkRefused(f"{endpoint}: {fault}") from fault
    except ssl.SSLError as fault:
        raise LinkRefused(f"{endpoint}: {tls.explain(fault)}") from fault
    except OSError as fault:
        raise LinkLost(f"{endpoint}: {_explain(fault)}") from fault


async def probe(config: EdgeHubConfig, endpoint: Endpoint) -> str | None:
    """See whether a CloudHub answers there, as far as TLS, and leave again: what is wrong, None when nothing is.

    It does not show whether the hub would serve us: that takes a session, and so the end of the one that we have.
    """
    visit = _Visit()
    try:
        async with asyncio.timeout(config.handshake_seconds):
            await open_tls(lambda: visit, endpoint, config, tls.client_context(config))
    except TimeoutError:
        return f"{endpoint}: no TLS within {config.handshake_seconds:g} s"
    except (LinkLost, LinkRefused) as fault:
        return str(fault)
    await visit.leave()
    return None


class _Visit(asyncio.Protocol):
    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone.set()

    async def leave(self) -> None:
        assert self._transport is not None
        self._transport.close()
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):
                await self._gone.wait()
        except TimeoutError:
            pass
        self._transport.abort()


# --- TCP ------------------------------------------------------------------------------------------


async def connect(host: str, port: int) -> socket.socket:
    """A TCP connection to the first address of `host` that takes it. Raises Unreachable."""
    waiting = interleaved(await resolve(host, port))
    loop = asyncio.get_running_loop()
    tries: dict[asyncio.Task[socket.socket], Address] = {}
    faults: dict[str, str] = {}  # by address
    try:
        while waiting or tries:
            if waiting:
                address = waiting.pop(0)
                tries[loop.create_task(_connect_to(address))] = address
            done, _ = await asyncio.wait(
                tries, timeout=STAGGER_SECONDS if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                fault = attempt.exception()
                if fault is None:
                    del tries[attempt]
                    return attempt.result()
                if not isinstance(fault, OSError):
                    raise fault
                faults[str(tries.pop(attempt)[1][0])] = _explain(fault)
    finally:
        for attempt in tries:
            attempt.cancel()
        for outcome in await asyncio.gather(*tries, return_exceptions=True):
            if isinstance(outcome, socket.socket):
                outcome.close()
    if len(set(faults.values())) == 1:
        raise Unreachable(next(iter(faults.values())))
    raise Unreachable(", ".join(f"{address}: {why}" for address, why in faults.items()))


async def _connect_to(address: Address) -> socket.socket:
    family, where = address
    attempt = socket.socket(family, socket.SOCK_STREAM)
    try:
        attempt.setblocking(False)
        await asyncio.get_running_loop().sock_connect(attempt, where)
    except BaseException:
        attempt.close()
        raise
    return attempt


def interleaved(addresses: Sequence[Address]) -> list[Address]:
    """The families in turn, the resolver's first choice first, so that one that leads nowhere costs 250 ms."""
    first = [address for address in addresses if address[0] == addresses[0][0]]
    other = [address for address in addresses if address[0] != addresses[0][0]]
    return [each for each in chain.from_iterable(zip_longest(first, other)) if each is not None]


async def resolve(host: str, port: int, *, seconds: float = RESOLVE_SECONDS) -> list[Address]:
    """The addresses of a name, as the machine's resolver orders them. Raises Unreachable.

    In a thread of its own that nobody waits for: the loop's executor would hold up the end of the process for as long
    as a dead name server does.
    """
    try:
        return _look_up(host, port, socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        pass  # a name, then
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[Address]] = loop.create_future()

    def tell(found: list[Address] | None, fault: Exception | None) -> None:
        if not answer.done():
            if found:
                answer.set_result(found)
            else:
                answer.set_exception(fault or Unreachable(f"DNS knows no address of {host}"))

    def ask() -> None:
        found, fault = None, None
        try:
            found = _look_up(host, port, 0)
        except (OSError, UnicodeError) as error:
            fault = Unreachable(_explain_look_up(host, error))
        try:
            loop.call_soon_threadsafe(tell, found, fault)
        except RuntimeError:
            pass  # the loop has ended meanwhile

    threading.Thread(target=ask, name=f"look up {host}", daemon=True).start()
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError:
        raise Unreachable(f"no answer from DNS about {host} within {seconds:g} s") from None


def on_the_wire(host: str) -> Any:
    """A host's name as socket and ssl take it. Of ASCII bytes, for of a str both ask the codec idna, which is large."""
    return host.encode("ascii") if host.isascii() else host


def _look_up(host: str, port: int, flags: int) -> list[Address]:
    found = socket.getaddrinfo(on_the_wire(host), port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, where) for family, _, _, _, where in found]


def _explain_look_up(host: str, fault: OSError | UnicodeError) -> str:
    if isinstance(fault, UnicodeError):
        return f"{host!r} is no host name: {fault}"
    if fault.errno == socket.EAI_AGAIN:
        return f"the name server does not answer, {host} cannot be looked up"
    if fault.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
        return f"DNS knows no address of {host}"
    return f"{host} cannot be looked up: {fault.strerror or fault}"


def _explain(fault: OSError) -> str:
    if fault.errno is None:
        return fault.strerror or str(fault)
    return os.strerror(fault.errno)  # asyncio's own text repeats the address and leaves out the reason


# --- proxy ----------------------------------------------------------------------------------------


class _Tunnel(asyncio.Protocol):
    """Waits for the proxy's answer; the TLS of the link takes its place then."""

    def __init__(self, proxy: Proxy) -> None:
        self._answer = ConnectAnswer(proxy)
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        if self.opened.done():
            return
        try:
            if self._answer.receive(data):
                self.opened.set_result(None)
        except ProxyRefused as fault:
            self.opened.set_exception(fault)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(self._answer.end())


async def _open_tunnel(proxy: Proxy, endpoint: Endpoint, config: EdgeHubConfig) -> asyncio.Transport:
    proxy = tunnel.with_password(proxy, config.proxy_password_file)
    context = tunnel.context_for(proxy, config.proxy_ca_file)
    try:
        connected = await connect(proxy.host, proxy.port)
        transport, protocol = await asyncio.get_running_loop().create_connection(
            lambda: _Tunnel(proxy), sock=connected, ssl=context, server_hostname=proxy.host if context else None
        )
    except ssl.SSLError as fault:
        raise tunnel.refused_by_tls(proxy, fault) from fault
    except Unreachable as fault:
        raise Unreachable(f"the proxy {proxy} cannot be reached: {fault}") from fault
    try:
        transport.write(proxy.request(endpoint.host, endpoint.port))
        await protocol.opened
    except BaseException:
        transport.abort()
        raise
    return transport
