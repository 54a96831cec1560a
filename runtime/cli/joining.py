"""`edgezmq join`: a certificate for this node out of a token, and a configuration where there is none yet."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime import enrolment
from runtime.backoff import Backoff
from runtime.cli import settings
from runtime.config import NodeConfig, default_node_name
from runtime.edgecore import API_VERSION, KIND, from_edgecore
from runtime.enrolling import enrol
from runtime.enrolment import Issued, Job
from runtime.errors import ConfigError, NotEnrolled
from runtime.home import Home, find_home

TOKEN_VARIABLE: Final = "EDGEZMQ_TOKEN"
CLOUDHUB_PORT: Final = 10_000
_MAX_TOKEN_FILE: Final = 64 * 1024
_RETRY_CAP_SECONDS: Final = 60.0


def join(
    *,
    token: str,
    token_file: str,
    server: str,
    cloudhub: str,
    node_name: str,
    named: Path | None,
    timeout_seconds: float,
) -> int:
    """Join; the exit status: 0 joined, 1 refused. What may pass by itself is tried again until the time is over."""
    home = find_home()
    place = find_place(home, named, server=server, cloudhub=cloudhub, node_name=node_name)
    secret = read_token(token, token_file, os.environ) or place.config.edge_hub.token
    if not secret:
        raise ConfigError("--token", "", f"a token (also --token-file FILE, - for stdin; or {TOKEN_VARIABLE})")
    home.prepare()
    hub, extra = place.config.edge_hub, place.config.runtime.edgehub
    job = Job(
        server=enrolment.show_server(*enrolment.parse_server(server)) if server else place.config.certificate_server(),
        node_name=place.config.node_name,
        ca_file=hub.tls_ca_file,
        cert_file=hub.tls_cert_file,
        key_file=hub.tls_private_key_file,
        token=secret,
        server_name=extra.server_name,
        proxy=place.config.cloud_proxy(),
        proxy_password_file=extra.proxy_password_file,
        proxy_ca_file=extra.proxy_ca_file,
    )
    try:
        issued = _persist(job, timeout_seconds)
    except NotEnrolled as refusal:
        _say(f"edgezmq: not joined ({refusal.code}): {refusal.text}")
        return 1
    if place.new_text:
        settings.write(place.path, place.new_text)
    _report(job, issued, place, home)
    return 0


def _persist(job: Job, timeout_seconds: float) -> Issued:
    backoff = Backoff(random.Random(), cap_seconds=_RETRY_CAP_SECONDS)
    end = time.monotonic() + timeout_seconds
    tries = 0
    while True:
        try:
            return asyncio.run(enrol(job))
        except NotEnrolled as refusal:
            delay = backoff.delay(tries)
            tries += 1
            if refusal.code not in enrolment.PASSING or time.monotonic() + delay > end:
                raise
            _say(f"edgezmq: not yet ({refusal.code}): {refusal.text}. Trying again in {delay:.1f} s")
            time.sleep(delay)


def _report(job: Job, issued: Issued, place: Place, home: Home) -> None:
    print(f"joined {job.server} as {issued.common_name}, until {enrolment.show_time(issued.not_after)}")
    print(f"certificate {job.cert_file}, key {job.key_file}, CA {job.ca_file}")
    if place.new_text:
        print(f"wrote {place.path}: look at it, then start the node: edgezmq up")
    elif (renewing := place.config.certificate_server()) != job.server:
        print(
            f"note: by {place.path} the certificate is to be renewed at {renewing}. "
            f"Set modules.edgeHub.httpServer to {job.server}"
        )


# --- where it goes -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """The configuration that says where the files are."""

    path: Path
    config: NodeConfig
    new_text: str
    "To be written to `path` once we have joined; empty where there is a configuration already."


def find_place(home: Home, named: Path | None, *, server: str, cloudhub: str, node_name: str) -> Place:
    """The configuration that is there, or a new one. Raises ConfigError, NotEnrolled (node-name), OSError."""
    try:
        path = settings.find(named, home)
    except settings.NoConfiguration:
        if named is not None or not server:
            raise
        return _new_place(home, server=server, cloudhub=cloudhub, node_name=node_name)
    config, _ = settings.read(path)
    if node_name and node_name != config.node_name:
        raise NotEnrolled(
            enrolment.NODE_NAME,
            f"--node-name {node_name}: {path} says that this node is {config.node_name!r}. "
            "Set modules.edged.hostnameOverride there, or leave --node-name out",
        )
    return Place(path, config, "")


def _new_place(home: Home, *, server: str, cloudhub: str, node_name: str) -> Place:
    host, port = enrolment.parse_server(server)
    where = f"[{host}]" if ":" in host else host
    document = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "modules": {
            "edged": {"hostnameOverride": node_name or default_node_name()},
            "edgeHub": {
                "httpServer": enrolment.show_server(host, port),
                "tlsCaFile": "pki/rootCA.crt",
                "tlsCertFile": "pki/server.crt",
                "tlsPrivateKeyFile": "pki/server.key",
                "websocket": {"enable": True, "server": cloudhub or f"{where}:{CLOUDHUB_PORT}"},
            },
        },
    }
    config, _ = from_edgecore(document, directory=home.path.absolute())
    return Place(home.path / "edgecore.yaml", config, _HEAD + settings.dump(document))


_HEAD: Final = """\
# Written by `edgezmq join`. edgecore.example.yaml and docs/configuration.md explain every key.
# MQTT is taken from tcp://127.0.0.1:1883 (modules.eventBus); uploads are limited to 30 a second (edgeHub.messageQPS).
"""


# --- the token ----------------------------------------------------------------------------------------------


def read_token(token: str, token_file: str, environ: Mapping[str, str]) -> str:
    """The token that was given, empty when none was. Raises ConfigError, OSError."""
    if token and token_file:
        raise ConfigError("--token-file", token_file, "one of --token and --token-file")
    if token:
        return token.strip()
    if token_file:
        if token_file == "-":
            return sys.stdin.read(_MAX_TOKEN_FILE).strip()
        with Path(token_file).open(encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_TOKEN_FILE).strip()
    return environ.get(TOKEN_VARIABLE, "").strip()


def without_token(arguments: Sequence[str], token_file: str) -> tuple[list[str], str]:
    """The arguments with `--token VALUE` replaced by `--token-file FILE`, and the value (empty: none)."""
    words, secret = list(arguments), ""
    for index, word in enumerate(words):
        if word == "--token" and index + 1 < len(words):
            secret = words[index + 1]
            words[index : index + 2] = ["--token-file", token_file]
            break
        if word.startswith("--token="):
            secret = word.removeprefix("--token=")
            words[index : index + 1] = ["--token-file", token_file]
            break
    return words, secret


def hide_token() -> None:
    """Where a token stands among our arguments, begin anew without it: others read them in `ps`.

    It goes through a file in memory that only this process has. Returns when there is nothing to hide.
    """
    if not sys.executable or not without_token(sys.orig_argv, "")[1]:
        return
    descriptor = os.memfd_create("token", 0)
    words, secret = without_token(sys.orig_argv, f"/dev/fd/{descriptor}")
    os.write(descriptor, secret.encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.execv(sys.executable, [sys.executable, *words[1:]])


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
