"""`runtime.policy` between the file and those who keep it: users looked up, and word of what each process took over.

`edgezmq reload` writes run/node.json and signals edgehub and the broker (SIGHUP: the kernel lets nobody but root and
their own user do that). Each reads it again, takes it over as a whole or not at all, and says which in a file.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from zlib import crc32

import msgspec

from runtime.access import Access, Open, Policy, Rule
from runtime.config import NodeConfig
from runtime.errors import ConfigError
from runtime.home import Home


class Adopted(msgspec.Struct, frozen=True):
    """What a process says of the policy that it was last given."""

    pid: int
    mark: str
    "Of the policy in force (`mark_of`)."
    fault: str = ""
    "Why it did not take over the one it was given; empty: it did."


def mark_of(config: NodeConfig) -> str:
    """Tells one policy from another: all that `edgezmq reload` takes over, in eight digits."""
    section = config.runtime
    return f"{crc32(msgspec.json.encode((section.policy, section.modules, section.bus.listen), order='sorted')):08x}"


def with_policy_of(config: NodeConfig, other: NodeConfig) -> NodeConfig:
    """`config` with what `edgezmq reload` takes over from `other`, and nothing else of it."""
    taken, section = other.runtime, config.runtime
    bus = msgspec.structs.replace(section.bus, listen=taken.bus.listen)
    changed = msgspec.structs.replace(section, policy=taken.policy, modules=taken.modules, bus=bus)
    return msgspec.structs.replace(config, runtime=changed)


def tell(home: Home, name: str, mark: str, fault: str = "") -> None:
    """Say which policy the process `name` goes by. A disk that is full loses only the word of it."""
    path = _adopted_path(home, name)
    scratch = path.with_suffix(".tmp")
    try:
        scratch.write_bytes(msgspec.json.encode(Adopted(os.getpid(), mark, fault)))
        scratch.replace(path)
    except OSError:
        pass


def told(home: Home, name: str) -> Adopted | None:
    """What `tell` said last; None: nothing, or nothing that can be read."""
    try:
        return msgspec.json.decode(_adopted_path(home, name).read_bytes(), type=Adopted)
    except (OSError, msgspec.DecodeError):
        return None


def forget(home: Home, name: str) -> None:
    """So that what is told next is new. Raises OSError."""
    _adopted_path(home, name).unlink(missing_ok=True)


def _adopted_path(home: Home, name: str) -> Path:
    return home.run / f"{name}.policy.json"


def make_access(config: NodeConfig) -> Access:
    """Who may do what, as `runtime.policy` says. Raises ConfigError for a user that this host does not know."""
    policy = config.runtime.policy
    if not policy.enable:
        return Open()
    declared = config.declared_modules()
    return Policy(
        {
            name: Rule(
                uids=uids_of(config, name),
                keys=frozenset(rule.keys),
                groups=frozenset(declared.get(name, ())),
                destinations=frozenset(rule.to),
                has_own_socket=rule.own_socket,
                messages_per_second=rule.messages_per_second,
                bytes_per_second=rule.bytes_per_second,
            )
            for name, rule in policy.modules.items()
        },
        own_uid=os.geteuid(),
    )


def uids_of(config: NodeConfig, name: str) -> frozenset[int]:
    """The users of one rule. Raises ConfigError."""
    return frozenset(_uid(name, user) for user in config.runtime.policy.modules[name].users)


def admitted_keys(config: NodeConfig) -> frozenset[str]:
    """The CURVE keys that may connect over tcp."""
    return frozenset(key for rule in config.runtime.policy.modules.values() for key in rule.keys)


def _uid(name: str, user: str | int) -> int:
    if isinstance(user, int):
        return user
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as fault:
        raise ConfigError(f"runtime.policy.modules.{name}.users", user, "a user of this host, or a uid") from fault
