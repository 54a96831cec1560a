"""Through an HTTP proxy: the file with its password, TLS to the proxy itself, and streams to a TLS server behind it."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Final

from runtime.proxy import ConnectAnswer, Proxy, ProxyRefused

_MAX_PASSWORD_BYTES: Final = 4096
_READ_BYTES: Final = 4096


def with_password(proxy: Proxy, path: str) -> Proxy:
    """`proxy` with the password in the file; as it is where `path` is empty. Raises ProxyRefused naming the setting."""
    if not path:
        return proxy
    where = f"runtime.edgehub.proxyPasswordFile {path}"
    try:
        with Path(path).open("rb") as file:
            text = file.read(_MAX_PASSWORD_BYTES + 1).decode()
    except OSError as fault:
        raise ProxyRefused(f"{where}: {fault.strerror or fault}") from fault
    except UnicodeDecodeError as fault:
        raise ProxyRefused(f"{where}: expected a password in UTF-8") from fault
    password = text.rstrip("\r\n")
    if not password or len(text) > _MAX_PASSWORD_BYTES or "\n" in password:
        raise ProxyRefused(f"{where}: expected one line of at most {_MAX_PASSWORD_BYTES} bytes")
    return proxy.with_password(password)


def context_for(proxy: Proxy, ca_file: str) -> ssl.SSLContext | None:
    """For the way to an `https` proxy: its CA is `ca_file`, or the machine's. None for `http`. Raises ProxyRefused."""
    if not proxy.is_tls:
        return None
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except OSError as fault:  # ssl.SSLError is one
        raise ProxyRefused(f"runtime.edgehub.proxyCaFile {ca_file}: {fault.strerror or fault}") from fault


def refused_by_tls(proxy: Proxy, fault: ssl.SSLError) -> ProxyRefused:
    """What it means that TLS to the proxy itself fails."""
    if isinstance(fault, ssl.SSLCertVerificationError):
        return ProxyRefused(
            f"the certificate of the proxy {proxy} does not verify: {fault.verify_message} "
            "(runtime.edgehub.proxyCaFile names its CA)"
        )
    return ProxyRefused(f"no TLS with the proxy {proxy}: {fault.reason or fault}")


async def open_streams(
    proxy: Proxy, host: str, port: int, context: ssl.SSLContext, *, server_name: str, proxy_ca_file: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """TLS with `host`, verified by `context` and `server_name`, through a tunnel.

    Raises ProxyRefused, and ssl.SSLError and OSError of the server's own. Not bounded in time: cancel it.
    """
    outer = context_for(proxy, proxy_ca_file)
    try:
        reader, writer = await asyncio.open_connection(
            proxy.host, proxy.port, ssl=outer, server_hostname=proxy.host if outer else None
        )
    except ssl.SSLError as fault:
        raise refused_by_tls(proxy, fault) from fault
    except OSError as fault:
        raise ProxyRefused(f"the proxy {proxy} cannot be reached: {fault.strerror or fault}") from fault
    try:
        writer.write(proxy.request(host, port))
        answer, is_open = ConnectAnswer(proxy), False
        while not is_open:
            data = await reader.read(_READ_BYTES)
            if not data:
                raise answer.end()
            is_open = answer.receive(data)
        await writer.start_tls(context, server_hostname=server_name)
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer
