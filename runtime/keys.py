"""CURVE keys of modules that come over tcp, and of the broker: files in EDGEZMQ_HOME/pki/curve.

The files are ZeroMQ's own certificate format (`NAME.key` and `NAME.key_secret`, RFC 26 libraries of other languages
read them); a secret never leaves its file but into a socket, and logs name keys by their fingerprint.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zmq.auth.certs import create_certificates, load_certificate

from runtime.errors import EdgezmqError
from runtime.names import check_name
from runtime.zap import fingerprint

BROKER: Final = "broker"
"The name of the broker's own pair."
_PUBLIC_MODE: Final = 0o644
_SECRET_MODE: Final = 0o600


class KeyFault(EdgezmqError):
    """A key file that is missing, damaged, or open to others."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Z85, 40 characters each."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair({fingerprint(self.public)})"


def make(directory: Path, name: str) -> KeyPair:
    """Make the pair of `name`. Raises KeyFault when there is one, InvalidName, OSError."""
    check_name(name)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret_file = directory / f"{name}.key_secret"
    if secret_file.exists() or (directory / f"{name}.key").exists():
        raise KeyFault(f"{secret_file}: there is a key of that name already; remove both files to make a new one")
    # Made under a name that nobody looks for, closed, then shown: no moment with a secret that others may read.
    before = os.umask(0o077)
    try:
        public_scratch, secret_scratch = create_certificates(directory, f".{name}.{os.getpid()}")
    finally:
        os.umask(before)
    os.chmod(public_scratch, _PUBLIC_MODE)
    os.replace(secret_scratch, secret_file)
    os.replace(public_scratch, directory / f"{name}.key")
    return load(secret_file)


def load(secret_file: Path) -> KeyPair:
    """Read a secret key's file. Raises KeyFault, also when others than its owner may read it."""
    try:
        mode = secret_file.stat().st_mode & 0o777
        public, secret = load_certificate(secret_file)
    except (OSError, ValueError) as fault:
        raise KeyFault(f"{secret_file}: {fault}; expected a file that `edgezmq keys make` wrote") from fault
    if mode & 0o077:
        raise KeyFault(f"{secret_file}: mode {mode:04o}, expected 0600: others could take its place")
    if secret is None or not (len(public) == len(secret) == 40):
        raise KeyFault(f"{secret_file}: no secret key in it (is it the public file?)")
    return KeyPair(public.decode(), secret.decode())


def load_or_make(directory: Path, name: str) -> KeyPair:
    """The pair of `name`, made where there is none."""
    secret_file = directory / f"{name}.key_secret"
    return load(secret_file) if secret_file.exists() else make(directory, name)


def public_keys(directory: Path) -> dict[str, str]:
    """Name to public key of every pair (or only public file) in `directory`; unreadable ones raise KeyFault."""
    found = {}
    for file in sorted(directory.glob("*.key")):
        if file.name.startswith("."):
            continue
        try:
            public, _ = load_certificate(file)
        except (OSError, ValueError) as fault:
            raise KeyFault(f"{file}: {fault}") from fault
        found[file.name.removesuffix(".key")] = public.decode()
    return found
