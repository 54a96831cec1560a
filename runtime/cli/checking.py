"""`edgezmq check`: everything that can be known to be wrong beforehand, each with a verdict and what to do.

The judging is in functions that take values and return findings; what asks the machine is small beside it.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import platform
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from rich.console import Console
from rich.text import Text

from runtime import __version__, tunnel
from runtime.cli import settings
from runtime.cli.node import NODE_LOCK, NodeError, check_path_lengths, find_supervisord_conf
from runtime.config import EdgeHubExtras, NodeConfig
from runtime.enrolment_files import FileSet
from runtime.errors import ConfigError, EdgezmqError
from runtime.home import Home, find_home
from runtime.locks import holder
from runtime.proxy import Proxy, ProxyRefused

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: what it is, how it is, and (unless ok) what to do."""

    subject: str
    verdict: Verdict
    text: str
    advice: str = ""


EXPIRY_WARNING_DAYS: Final = 30
"Weeks before the end: renewing may need a person."

MIN_FREE_BYTES: Final = 64 * 2**20
LOW_FREE_BYTES: Final = 512 * 2**20

OLDEST_CLOCK: Final = datetime(2025, 1, 1, tzinfo=UTC)
"Before this program was written: the clock was never set (a board without a battery begins in 1970)."

_CONNECT_SECONDS: Final = 3.0
_START_SECONDS: Final = 10.0
"For another Python to start on a busy machine."
_STAGGER_SECONDS: Final = 0.25
"RFC 8305: until the next address of a name is tried."
_ALERT_SECONDS: Final = 0.5
_NAME_MISMATCHES: Final = (62, 64)
"X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH (openssl/x509_vfy.h)."

_LIBRARIES: Final = ("pyzmq", "msgpack", "msgspec", "websockets", "paho-mqtt", "cryptography", "supervisor", "aioquic")


def show(named: Path | None, *, as_json: bool) -> int:
    """Print all findings; the exit status: 1 when anything fails."""
    findings = list(look(named, find_home()))
    if as_json:
        fields = ("subject", "verdict", "text", "advice")
        print(json.dumps([{name: getattr(f, name) for name in fields} for f in findings], indent=2))
    else:
        console = Console()
        colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        for finding in findings:
            console.print(
                Text.assemble(
                    (f"{finding.verdict:<5}", colours[finding.verdict]), f"{finding.subject}: {finding.text}"
                ),
                soft_wrap=True,
            )
            if finding.advice:
                console.print(f"       → {finding.advice}", soft_wrap=True, markup=False, highlight=False)
    return 1 if any(finding.verdict == "fail" for finding in findings) else 0


def look(named: Path | None, home: Home) -> Iterator[Finding]:
    """All findings, in the order of reading. Never raises for what it finds."""
    yield from versions()
    yield clock(datetime.now(UTC))
    config: NodeConfig | None = None
    try:
        path = settings.find(named, home)
        config, warnings = settings.read(path)
        yield Finding("configuration", "ok", f"{path} is valid, node {config.node_name}")
        for warning in warnings:
            yield Finding("configuration", "warn", warning)
    except ConfigError as fault:
        yield Finding("configuration", "fail", str(fault), "correct this key; docs/configuration.md lists all")
    except (EdgezmqError, OSError) as fault:
        yield Finding("configuration", "fail", str(fault))
    yield from state_directory(home, config or NodeConfig())
    running = home.run.is_dir() and holder(home.lock(NODE_LOCK)) is not None
    yield Finding("node", "ok", f"{'runs' if running else 'does not run'} on {home.path}")
    if config is None:
        return
    if config.edge_hub.enable:
        yield from certificates(config, datetime.now(UTC))
        yield from cloud(config)
        yield bottleneck(config)
    if config.event_bus.enable:
        yield from mqtt(config, running=running)


# --- machine --------------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    said = ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES)
    missing = [name for name in _LIBRARIES if _version(name) == "missing"]
    python = platform.python_version()
    if missing:
        yield Finding("versions", "fail", f"not installed: {', '.join(missing)}", "run: make venv")
    else:
        yield Finding("versions", "ok", f"edgezmq {__version__}, Python {python}, {said}")
    if sys.platform != "linux":
        yield Finding("versions", "fail", f"this is {sys.platform}", "edgezmq runs on Linux")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def clock(now: datetime) -> Finding:
    text = f"{now:%Y-%m-%d %H:%M} UTC"
    if now < OLDEST_CLOCK:
        return Finding(
            "clock",
            "fail",
            f"{text} cannot be",
            "set the clock (timedatectl set-ntp true): TLS rejects all certificates",
        )
    return Finding("clock", "ok", text)


def state_directory(home: Home, config: NodeConfig) -> Iterator[Finding]:
    try:
        check_path_lengths(home, config)
    except ConfigError as fault:
        yield Finding("paths", "fail", str(fault), "set EDGEZMQ_HOME to a short path, such as /var/lib/edgezmq")
    try:
        yield Finding("supervisord.conf", "ok", str(find_supervisord_conf()))
    except NodeError as fault:
        yield Finding("supervisord.conf", "fail", str(fault))
    existing = home.path
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            "state directory",
            "fail",
            f"{existing} cannot be written",
            "change its owner, or set EDGEZMQ_HOME to another",
        )
        return
    free = shutil.disk_usage(existing).free
    yield disk(home.path, free)
    if existing == home.path and home.path.stat().st_mode & 0o007:
        yield Finding(
            "state directory", "warn", f"{home.path} is open to other users", f"chmod o= {home.path}: it holds keys"
        )


def disk(path: Path, free_bytes: int) -> Finding:
    text = f"{path} has {free_bytes // 2**20} MiB free"
    if free_bytes < MIN_FREE_BYTES:
        return Finding("disk", "fail", text, "make room: what must survive a power failure is written there")
    if free_bytes < LOW_FREE_BYTES:
        return Finding("disk", "warn", text, "logs and the backlog of a long cloud outage need room")
    return Finding("disk", "ok", text)


# --- certificates ---------------------------------------------------------------------------------


def certificates(config: NodeConfig, now: datetime) -> Iterator[Finding]:
    """The node's three files: there, readable, of this node, in their time, and belonging together."""
    hub = config.edge_hub
    advice = (
        "get them with a token (edgezmq join), copy them from KubeEdge, or set the tls…File keys of modules.edgeHub"
    )
    missing = False
    files = FileSet(hub.tls_ca_file, hub.tls_cert_file, hub.tls_private_key_file)
    if hub.token and not files.exists:
        yield Finding(
            "certificate", "ok", f"none yet; edgehub joins with modules.edgeHub.token at {config.certificate_server()}"
        )
        return
    for key, name in (
        ("tlsCaFile", hub.tls_ca_file),
        ("tlsCertFile", hub.tls_cert_file),
        ("tlsPrivateKeyFile", hub.tls_private_key_file),
    ):
        try:
            Path(name).read_bytes()
        except OSError as fault:
            missing = True
            yield Finding("certificate", "fail", f"{key} {name}: {fault.strerror}", advice)
    if missing:
        return
    mode = Path(hub.tls_private_key_file).stat().st_mode
    if mode & 0o077:
        yield Finding(
            "certificate",
            "warn",
            f"tlsPrivateKeyFile {hub.tls_private_key_file} can be read by others (mode {mode & 0o777:o})",
            f"chmod 600 {hub.tls_private_key_file}",
        )
    for subject, name in (("CA certificate", hub.tls_ca_file), ("certificate", hub.tls_cert_file)):
        try:
            certificate = load_certificate(Path(name))
        except ValueError as fault:
            yield Finding(subject, "fail", f"{name} is no PEM certificate: {fault}", "replace the file")
            continue
        is_renewed = hub.rotate_certificates and subject == "certificate"
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        yield lifetime(subject, begin, end, now, is_renewed=is_renewed)
        if subject == "certificate":
            if Path(name).read_bytes().count(b"-----BEGIN CERTIFICATE-----") > 1:
                yield Finding(subject, "fail", f"{name} holds several certificates", "leave only the node's own in it")
            if config.runtime.edgehub.hub_version != "2019":  # then all nodes had one name
                yield common_name(_common_name(certificate), config.node_name)
    try:
        load_identity(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), config)
    except EncryptedKey as fault:
        yield Finding("certificate", "fail", str(fault), "take the password off it (openssl pkey), mode 600")
    except (ssl.SSLError, OSError) as fault:
        yield private_key(hub.tls_private_key_file, fault)
    if extra_file := config.runtime.edgehub.proxy_password_file:
        yield from secret_file("proxyPasswordFile", Path(extra_file))


class EncryptedKey(EdgezmqError):
    """The node's private key wants a password."""


def load_identity(context: ssl.SSLContext, config: NodeConfig) -> None:
    """Put the node's certificate and key into `context`. Raises EncryptedKey, ssl.SSLError, OSError."""
    hub = config.edge_hub

    def no_password() -> str:  # without it OpenSSL would ask on the terminal
        raise EncryptedKey(f"tlsPrivateKeyFile {hub.tls_private_key_file} is encrypted, and nobody is there to ask")

    context.load_cert_chain(hub.tls_cert_file, hub.tls_private_key_file, password=no_password)


def private_key(name: str, fault: OSError) -> Finding:
    """What it means that OpenSSL did not take certificate and key."""
    if "KEY_VALUES_MISMATCH" in str(fault):
        return Finding(
            "certificate",
            "fail",
            f"certificate and private key do not fit: {name} is the key of another one",
            "use the key that was made with the certificate",
        )
    return Finding("certificate", "fail", f"{name} is no PEM private key: {fault}", "replace the file")


def secret_file(key: str, path: Path) -> Iterator[Finding]:
    try:
        mode = path.stat().st_mode
        path.read_bytes()
    except OSError as fault:
        yield Finding("proxy", "fail", f"{key} {path}: {fault.strerror}", "make it, or correct the key")
        return
    if mode & 0o077:
        yield Finding(
            "proxy", "warn", f"{key} {path} can be read by others (mode {mode & 0o777:o})", f"chmod 600 {path}"
        )


def load_certificate(path: Path) -> Any:
    """The first certificate in a PEM file; raises ValueError."""
    from cryptography import x509

    return x509.load_pem_x509_certificate(path.read_bytes())


def _common_name(certificate: Any) -> str:
    from cryptography.x509.oid import NameOID

    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def lifetime(subject: str, begin: datetime, end: datetime, now: datetime, *, is_renewed: bool = False) -> Finding:
    if now < begin:
        return Finding(
            subject,
            "fail",
            f"valid only from {begin:%Y-%m-%d %H:%M} UTC, and now it is {now:%Y-%m-%d %H:%M} UTC",
            "the clock is wrong, or the certificate was made on a machine whose clock is",
        )
    if now >= end:
        return Finding(
            subject,
            "fail",
            f"expired on {end:%Y-%m-%d %H:%M} UTC",
            "get a new one, for the cloud refuses this one: edgezmq join, with a token",
        )
    days = (end - now).days
    if days < EXPIRY_WARNING_DAYS:
        return Finding(
            subject,
            "warn",
            f"expires in {days} days, on {end:%Y-%m-%d}",
            "edgehub renews it in time; edgezmq status says when, or why not" if is_renewed else "renew it now",
        )
    return Finding(subject, "ok", f"valid until {end:%Y-%m-%d}")


def common_name(name: str, node_name: str) -> Finding:
    """edgehub does not dial with another node's certificate: a CloudHub with authorization on rejects it in silence."""
    wanted = f"system:node:{node_name}"
    if name == wanted:
        return Finding("certificate", "ok", f"made out to {name}")
    return Finding(
        "certificate",
        "fail",
        f"made out to {name!r}, not to {wanted!r}",
        "set modules.edged.hostnameOverride to the name in the certificate, or get a certificate for this node",
    )


# --- network --------------------------------------------------------------------------------------


def cloud(config: NodeConfig) -> Iterator[Finding]:
    hub = config.edge_hub
    if hub.quic.enable:
        yield from _try_quic(config)
        return
    proxy = config.cloud_proxy()
    if proxy is None and (name := next((name for name in ("HTTPS_PROXY", "https_proxy") if os.environ.get(name)), "")):
        yield Finding(
            "proxy",
            "warn",
            f"{name} is set, and edgehub does not read it",
            "if the cloud can be reached only through it: runtime.edgehub.proxy",
        )
    for server in (hub.websocket.server, *config.runtime.edgehub.endpoints):
        yield reachable("cloud", server, _try_tls(server, config, proxy))


def _try_quic(config: NodeConfig) -> Iterator[Finding]:
    """Ask edgehub's code, in a process of its own, to look for each CloudHub: QUIC is a large library."""
    command = [sys.executable, "-m", "modules.edgehub.probing"]
    seconds = 5.0 * (1 + len(config.runtime.edgehub.endpoints)) + _START_SECONDS
    try:
        asked = msgspec.json.encode(config)
        done = subprocess.run(command, input=asked, capture_output=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError) as fault:
        yield Finding("cloud", "warn", f"QUIC to {config.edge_hub.quic.server}: not tried: {fault}")
        return
    for line in done.stdout.splitlines():
        found = json.loads(line)
        if found["fault"] is None:
            yield Finding("cloud", "ok", f"{found['endpoint']} answers over QUIC ({found['seconds'] * 1000:.0f} ms)")
        else:
            advice = "KubeEdge's released CloudHub speaks an older QUIC: is yours known to fit? Else use the websocket"
            yield Finding("cloud", "fail", str(found["fault"]), advice)


def _try_tls(server: str, config: NodeConfig, proxy: Proxy | None) -> Exception | float:
    """Connect as edgehub does, as far as TLS with both certificates: seconds it took, or what went wrong."""
    host, _, port = server.rpartition(":")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(config.edge_hub.tls_ca_file)
        load_identity(context, config)
        if proxy is not None:
            proxy = tunnel.with_password(proxy, config.runtime.edgehub.proxy_password_file)
        return asyncio.run(_visit(host.strip("[]"), int(port), context, config.runtime.edgehub, proxy))
    except (OSError, ValueError, EdgezmqError) as fault:
        return fault


async def _visit(host: str, port: int, context: ssl.SSLContext, extra: EdgeHubExtras, proxy: Proxy | None) -> float:
    name = extra.server_name or host
    started = time.monotonic()
    async with asyncio.timeout(_CONNECT_SECONDS):
        if proxy is None:
            reader, writer = await asyncio.open_connection(
                host, port, ssl=context, server_hostname=name, happy_eyeballs_delay=_STAGGER_SECONDS
            )
        else:
            reader, writer = await tunnel.open_streams(
                proxy, host, port, context, server_name=name, proxy_ca_file=extra.proxy_ca_file
            )
    took = time.monotonic() - started
    try:
        async with asyncio.timeout(_ALERT_SECONDS):
            await reader.read(1)
    except TimeoutError:
        pass  # as it should be: with TLS 1.3 a refusal of our certificate comes behind the handshake
    finally:
        writer.transport.abort()
    return took


def reachable(subject: str, server: str, result: Exception | float) -> Finding:
    """A verdict on one try to connect: what failed decides what to do."""
    match result:
        case float():
            return Finding(subject, "ok", f"{server} answers ({result * 1000:.0f} ms)")
        case ProxyRefused():
            return Finding(subject, "fail", f"{server}: {result}", "correct runtime.edgehub.proxy, or ask who runs it")
        case EncryptedKey():
            return Finding(subject, "warn", f"{server}: not tried: {result}")
        case ssl.SSLCertVerificationError() if result.verify_code in _NAME_MISMATCHES:
            return Finding(
                subject,
                "fail",
                f"{server}: its certificate is for other names ({result.verify_message})",
                "use a name or address that is in it (CloudCore's advertiseAddress), or set runtime.edgehub.serverName",
            )
        case ssl.SSLCertVerificationError():
            return Finding(
                subject,
                "fail",
                f"{server}: its certificate is not of the CA in tlsCaFile ({result.verify_message})",
                "take rootCA.crt from this cloud; if the message speaks of time, set the clock",
            )
        case ssl.SSLError():
            if "_ALERT_" in str(result):
                return Finding(
                    subject,
                    "fail",
                    f"{server} refuses this node's certificate: {_alert(result)}",
                    "take all three files from this cloud, and compare both clocks",
                )
            return Finding(
                subject,
                "fail",
                f"{server}: {getattr(result, 'reason', None) or result}",
                "is that CloudHub's websocket port?",
            )
        case socket.gaierror():
            return Finding(
                subject, "fail", f"{server}: unknown host", "correct the address, or the DNS of this machine"
            )
        case ConnectionRefusedError():
            return Finding(subject, "fail", f"{server}: nothing listens there", "start CloudHub, or correct the port")
        case TimeoutError():
            return Finding(
                subject, "fail", f"{server}: no answer within {_CONNECT_SECONDS:g} s", "look at firewall and route"
            )
        case _:
            return Finding(subject, "fail", f"{server}: {result}")


def _alert(fault: ssl.SSLError) -> str:
    """`[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca (…)` → `unknown ca`."""
    alert = re.search(r"ALERT_(\w+)", str(fault))
    return alert[1].replace("_", " ").lower() if alert else str(fault)


def bottleneck(config: NodeConfig) -> Finding:
    """KubeEdge's default admits 30 uploads a second, and every file that keadm makes says so."""
    rate = config.edge_hub.message_qps
    if rate == 0:
        return Finding("messageQPS", "ok", "no limit on uploads")
    if rate <= 100:
        return Finding(
            "messageQPS",
            "warn",
            f"at most {rate} uploads a second reach the cloud; what comes faster waits",
            "raise modules.edgeHub.messageQPS, or set it to 0 for no limit",
        )
    return Finding("messageQPS", "ok", f"{rate} uploads a second")


def mqtt(config: NodeConfig, *, running: bool) -> Iterator[Finding]:
    bus = config.event_bus
    if bus.mqtt_mode >= 1:
        host, port = mqtt_address(bus.mqtt_server_external)
        fault = _try_port(host, port)
        if fault is None:
            yield Finding("MQTT broker", "ok", f"{bus.mqtt_server_external} answers")
        else:
            yield Finding(
                "MQTT broker",
                "fail",
                f"{bus.mqtt_server_external}: {_say(fault)}",
                "start an MQTT broker (apt install mosquitto), correct mqttServerExternal, "
                "or set mqttMode: 0 for the built-in one",
            )
    if bus.mqtt_mode <= 1:
        host, port = mqtt_address(bus.mqtt_server_internal)
        yield port_free("built-in MQTT broker", host, port, _try_bind(host, port), ours=running)


def mqtt_address(url: str) -> tuple[str, int]:
    """Host and port of tcp://HOST[:PORT] and its like; ports as MQTT has them."""
    scheme, _, rest = url.partition("://")
    host, colon, port = rest.rstrip("/").rpartition(":")
    if colon and port.isdigit():
        return host.strip("[]"), int(port)
    return rest.strip("/[]"), 8883 if scheme in ("ssl", "tls", "mqtts") else 1883


def port_free(subject: str, host: str, port: int, fault: OSError | None, *, ours: bool) -> Finding:
    if fault is None:
        if ours:
            return Finding(subject, "fail", f"nothing listens on {host}:{port}", "see: edgezmq logs mqtt-broker")
        return Finding(subject, "ok", f"port {port} is free")
    if ours and fault.errno == errno.EADDRINUSE:
        return Finding(subject, "ok", f"listens on {host}:{port}")
    if fault.errno == errno.EADDRINUSE:
        return Finding(
            subject, "fail", f"port {port} is in use", f"end what listens there (ss -ltnp 'sport = :{port}')"
        )
    return Finding(
        subject, "fail", f"{host}:{port}: {_say(fault)}", "use an address of this machine and a port above 1023"
    )


def _say(fault: OSError) -> str:
    return "no answer" if isinstance(fault, TimeoutError) else fault.strerror or str(fault)


def _try_port(host: str, port: int) -> OSError | None:
    return _fault_of(lambda: socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close())


def _try_bind(host: str, port: int) -> OSError | None:
    def bind() -> None:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))

    return _fault_of(bind)


def _fault_of(attempt: Callable[[], None]) -> OSError | None:
    try:
        attempt()
    except OSError as fault:
        return fault
    return None
