"""TLS of the hub's websocket port, and what a client's certificate says."""

from __future__ import annotations

import ssl
import warnings
from typing import Any, Final

from cloudsim.certificates import Pair

_TLS12_SUITES: Final = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305"


def server_context(server: Pair, ca: Pair) -> ssl.SSLContext:
    """TLS 1.2 and 1.3, a client certificate of `ca` required, h2 preferred as Go's server does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_TLS12_SUITES)
    context.load_cert_chain(server.certificate, server.key)
    context.load_verify_locations(ca.certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2", "http/1.1"])
    # Each connection shows its chain anew: a resumed session has none to count.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    return context


def server_context_2019(server: Pair) -> ssl.SSLContext:
    """The hub of 2019: TLS 1.2 with one RSA suite. It asks for a client certificate and does not look at it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
    context.load_cert_chain(server.certificate, server.key)
    context.options |= ssl.OP_NO_TICKET
    return context


def outdated_server_context(server: Pair, ca: Pair) -> ssl.SSLContext:
    """A server that knows nothing newer than TLS 1.1."""
    context = server_context(server, ca)
    context.set_ciphers("ALL:@SECLEVEL=0")  # without which OpenSSL has no TLS 1.1 left
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the point of it is to be deprecated
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


def presented_certificates(connection: ssl.SSLObject) -> int:
    """How many certificates the client sent, its own included."""
    # Public only from Python 3.13 on; the underlying object has had it since 3.10.
    chain = connection._sslobj.get_unverified_chain()  # type: ignore[attr-defined]
    return len(chain or ())


def common_name(connection: ssl.SSLObject) -> str:
    """The CN of the client's certificate, or empty."""
    certificate: dict[str, Any] = connection.getpeercert() or {}
    for names in certificate.get("subject", ()):
        for key, value in names:
            if key == "commonName":
                return str(value)
    return ""
