"""`python -m cloudsim`: the double as a process. `cert NODE`: a node's certificate; `token`: one to join with."""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cloudsim.certificate_api import TOKEN_SECONDS, make_token
from cloudsim.certificates import Authority, check_node_name
from cloudsim.config import SERVER_NAMES, SimConfig
from cloudsim.hub import Authorization
from cloudsim.rules import HubVersion
from cloudsim.sim import CloudSim

_LOG_LEVELS = ("debug", "info", "warning", "error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 0 after SIGTERM or SIGINT, 1 for a failure, 2 for wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["cert"]:
        return _cert(words[1:])
    if words[:1] == ["token"]:
        return _token(words[1:])
    if words[:1] == ["serve"]:
        words = words[1:]
    options = _serve_parser().parse_args(words)
    logging.basicConfig(
        level=options.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    config = SimConfig(
        directory=options.dir,
        host=options.host,
        port=options.port,
        quic_port=options.quic_port,
        quic_client_certificates=options.quic_certificates == "required",
        quic_alpn=tuple(options.quic_alpn),
        control_port=options.control_port,
        certificate_port=options.certificate_port,
        signing_seconds=options.signing_seconds,
        nodes=tuple(options.node),
        names=(*SERVER_NAMES, *options.san),
        keepalive_seconds=options.keepalive,
        node_limit=options.node_limit,
        enforce_authorization=options.authorization == "enforced",
        debug_authorization=options.authorization == "debug",
        has_cluster_ca=not options.no_cluster_ca,
        hub_version=HubVersion(options.hub_version),
        edgecontroller=options.edgecontroller,
        replacement_race=options.replacement_race,
        upstream_inversion=options.upstream_inversion,
        seed=options.seed,
        receive_buffer_bytes=options.receive_buffer,
    )
    try:
        asyncio.run(_serve(config))
    except OSError as error:
        print(f"cloudsim: {_explain(error, config)}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"cloudsim: {options.dir}: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(config: SimConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with CloudSim(config) as sim:
        ready = {"url": sim.url, **sim.ports(), "dir": str(config.directory)}
        print(f"cloudsim ready {json.dumps(ready)}", flush=True)
        await stop.wait()


def _cert(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cloudsim cert", description="Make a node's certificate and key with the CA in DIR."
    )
    parser.add_argument("node", type=_node_name, metavar="NODE")
    parser.add_argument("--dir", type=Path, required=True, help="where the CA and all certificates are")
    options = parser.parse_args(words)
    try:
        authority = Authority(options.dir)
        pair = authority.node(options.node)
    except (OSError, ValueError) as error:
        print(f"cloudsim: {options.dir}: {error}", file=sys.stderr)
        return 1
    print(f"ca={authority.ca.certificate} certificate={pair.certificate} key={pair.key}")
    return 0


def _token(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cloudsim token", description="Print a token to join with, of the CA in DIR."
    )
    parser.add_argument("--dir", type=Path, required=True, help="where the CA and all certificates are")
    parser.add_argument(
        "--expires-in", type=float, default=TOKEN_SECONDS, metavar="SECONDS", help="below 0: expired (default: a day)"
    )
    options = parser.parse_args(words)
    try:
        print(make_token(Authority(options.dir), expires_at=time.time() + options.expires_in))
    except (OSError, ValueError) as error:
        print(f"cloudsim: {options.dir}: {error}", file=sys.stderr)
        return 1
    return 0


def _serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cloudsim",
        description="A CloudHub double: websocket and QUIC with mutual TLS, and an HTTP API on loopback to control it. "
        "`python -m cloudsim cert NODE --dir DIR` makes a node's certificate, `python -m cloudsim token --dir DIR` "
        "a token to join with.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dir", type=Path, required=True, help="for the CA, certificates, keys and ports.json; made if missing")
    add("--host", default="127.0.0.1", help="address the websocket listens on")
    add("--port", type=_port, default=10000, help="websocket port; 0: a free one")
    add("--quic-port", type=_port, default=None, help="UDP port of QUIC version 1; 0: a free one")
    add(
        "--quic-certificates",
        choices=("required", "unseen"),
        default="required",
        help="demand client certificates over QUIC, or see none, as over Google's QUIC",
    )
    add("--quic-alpn", action="append", default=[], metavar="NAME", help="a protocol the QUIC port takes (ALPN)")
    add("--control-port", type=_port, default=10080, help="control API port on 127.0.0.1; 0: a free one")
    add("--certificate-port", type=_port, default=None, help="certificate API; 0: a free one; CloudCore: 10002")
    add("--signing-seconds", type=_lifetime, default=365 * 86400.0, help="how long nodes' certificates are valid")
    add("--node", type=_node_name, action="append", default=[], metavar="NAME", help="make this node's certificate")
    add("--san", action="append", default=[], metavar="HOST", help="one more name in the server's certificate")
    add("--keepalive", type=_seconds, default=30.0, help="seconds without a keepalive until a node is dropped")
    add("--node-limit", type=int, default=None, help="nodes served at once; default 500, or 10 for 2019")
    add(
        "--authorization",
        choices=[each.value for each in Authorization],
        default=Authorization.OFF.value,
        help="check certificates against node names, and messages; debug: tell of it and admit everything",
    )
    add("--no-cluster-ca", action="store_true", help="answer k8s/ca.crt with nothing in it")
    add("--hub-version", choices=[version.value for version in HubVersion], default=HubVersion.CURRENT.value)
    add("--edgecontroller", action="store_true", help="answer queries and status updates of nodes")
    add("--replacement-race", type=float, default=0.04, help="chance that a reconnect is dropped with the old one")
    add("--upstream-inversion", type=float, default=0.046, help="chance that a controller's message is overtaken")
    add("--seed", type=int, default=None, help="for the chances above")
    add("--receive-buffer", type=int, default=None, metavar="BYTES", help="SO_RCVBUF of node connections")
    add("--log-level", choices=_LOG_LEVELS, default="warning")
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port (0 to 65535)")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds above 0")
    return value


def _lifetime(text: str) -> float:
    if not text.isdigit() or not 1 <= int(text) <= 36500 * 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole seconds, at most 100 years")
    return float(text)


def _node_name(text: str) -> str:
    try:
        return check_node_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _explain(error: OSError, config: SimConfig) -> str:
    if error.errno == errno.EADDRINUSE:
        ports = [
            (f"{config.host}:{config.port}", "--port"),
            (f"{config.host}:{config.quic_port}", "--quic-port"),
            (f"{config.host}:{config.certificate_port}", "--certificate-port"),
        ]
        ports.append((f"{config.control_host}:{config.control_port}", "--control-port"))
        named = ", ".join(f"{where} ({option})" for where, option in ports if not where.endswith(":None"))
        return f"a port is in use: {named}. Port 0 takes a free one."
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
