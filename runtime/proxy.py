"""An HTTP proxy on the way to the cloud: its address, the CONNECT request (RFC 9110, 9.3.6), its answer.

What goes through the tunnel is TLS between node and cloud: the proxy sees their addresses and nothing else. Its answer
comes from outside and is bounded; all that counts in it is the status line.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field, replace
from typing import Final
from urllib.parse import unquote, urlsplit

from runtime.errors import ConfigError, EdgezmqError

MAX_HEAD_BYTES: Final = 16 * 1024
"Of an answer; proxies send some hundred bytes."

_RULE: Final = "http://[USER[:PASSWORD]@]HOST:PORT, or the same with https"
_HTTP: Final = b"HTTP/1."
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: ([^\r\n]*))?\r?\n")
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
_SHOWN_CHARACTERS: Final = 80


class ProxyRefused(EdgezmqError):
    """The proxy did not open a tunnel; the text says why, and where to look."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where the proxy listens and who we are to it."""

    host: str
    port: int
    is_tls: bool = False
    "Whether the way to the proxy itself is TLS."
    user: str = ""
    password: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str, key: str) -> Proxy:
        """A proxy's URL, IPv6 in brackets, user and password percent-encoded.

        Raises ConfigError naming the setting `key`, without the password.
        """
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
            user, password = (
                unquote(parts.username or "", errors="strict"),
                unquote(parts.password or "", errors="strict"),
            )
        except ValueError:  # a port or a bracket that is none, an encoding that is none
            raise ConfigError(key, _without_secret(text), _RULE) from None
        if parts.scheme not in ("http", "https") or not host or not port or not host.isprintable() or " " in host:
            raise ConfigError(key, _without_secret(text), _RULE)
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ConfigError(key, _without_secret(text), _RULE)
        if ":" in user or (password and not user):
            raise ConfigError(key, _without_secret(text), f"{_RULE}; no colon in USER")
        return cls(host, port, parts.scheme == "https", user, password)

    def with_password(self, password: str) -> Proxy:
        return replace(self, password=password)

    def __str__(self) -> str:
        """The URL without user and password: for logs."""
        return f"{'https' if self.is_tls else 'http'}://{_address(self.host, self.port)}"

    def authorization(self) -> str:
        """The value of Proxy-Authorization (Basic, RFC 7617); empty without a user."""
        if not self.user:
            return ""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def request(self, host: str, port: int) -> bytes:
        """The head that asks for a tunnel to `host`:`port`."""
        target = _address(host, port)
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if authorization := self.authorization():
            lines.append(f"Proxy-Authorization: {authorization}")
        return "\r\n".join([*lines, "", ""]).encode()


class ConnectAnswer:
    """Reads the proxy's answer piece by piece. Holds MAX_HEAD_BYTES at most."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._head = b""

    def receive(self, data: bytes) -> bool:
        """True once the tunnel is open. Raises ProxyRefused for any other answer."""
        self._head += data
        while True:
            if not _HTTP.startswith(self._head[: len(_HTTP)]):
                raise ProxyRefused(f"what answers at {self._proxy} is no HTTP proxy: {self._head[:40]!r}")
            end = _HEAD_END.search(self._head, 0, MAX_HEAD_BYTES)
            if end is None:
                if len(self._head) >= MAX_HEAD_BYTES:
                    raise ProxyRefused(f"the proxy {self._proxy} sends headers without end: {MAX_HEAD_BYTES} bytes")
                return False
            line = _STATUS_LINE.match(self._head)
            if line is None:
                raise ProxyRefused(f"what answers at {self._proxy} is no HTTP proxy: {self._head[:40]!r}")
            status = int(line[1])
            if status >= 200:
                break
            self._head = self._head[end.end() :]  # 100 Continue and its like announce the answer proper
        if status >= 300:
            raise ProxyRefused(_explain(self._proxy, status, line[2] or b""))
        if end.end() != len(self._head):
            # In TLS the client speaks first: nothing can have come through the tunnel yet.
            raise ProxyRefused(f"the proxy {self._proxy} sends something of its own into the tunnel")
        return True

    def end(self) -> ProxyRefused:
        """What it means that the proxy hung up before its answer was whole."""
        heard = f" after {self._head[:40]!r}" if self._head else ""
        return ProxyRefused(f"the proxy {self._proxy} ended the connection{heard} instead of opening a tunnel")


def _explain(proxy: Proxy, status: int, reason: bytes) -> str:
    said = "".join(char for char in reason.decode("latin-1") if char.isprintable())[:_SHOWN_CHARACTERS].strip()
    match status:
        case 407 if proxy.user:
            advice = f"it does not know user {proxy.user!r}, or the password is wrong"
        case 407:
            advice = "it wants a user and a password (runtime.edgehub.proxy, proxyPasswordFile)"
        case 403 | 405:
            advice = "it does not allow tunnels to this host and port"
        case 502 | 503 | 504:
            advice = "it cannot reach CloudHub"
        case _:
            advice = "is that an HTTP proxy that knows CONNECT?"
    return f"the proxy {proxy} answered {f'{status} {said}'.rstrip()}: {advice}"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _without_secret(text: str) -> str:
    """What may be shown of a URL that did not parse: whatever stands before an @ may be a password."""
    scheme, separator, rest = text.rpartition("://")
    return f"{scheme}{separator}{'…@' if '@' in rest else ''}{rest.rpartition('@')[2]}"
