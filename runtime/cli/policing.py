"""`edgezmq policy` and `edgezmq reload`: who may do what on the bus, looked at and changed while the node runs."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from runtime import keys, policy
from runtime.access import ANY
from runtime.cli import settings
from runtime.cli.node import NodeError, check_path_lengths
from runtime.config import NodeConfig, PolicyRule, load, store
from runtime.errors import EdgezmqError
from runtime.home import Home, find_home
from runtime.locks import holder

TAKERS: Final = ("edgehub", "broker")
"""Who takes a policy over, in this order: a module whose rule is new gets in when the broker has it, and edgehub must
know by then that it is not the node's own."""

ANSWER_SECONDS: Final = 5.0


# --- check, show --------------------------------------------------------------------------------------


def check(file: Path | None) -> int:
    """Say what is wrong with the policy of a file, and what is odd; the exit status."""
    home = find_home()
    path = settings.find(file, home)
    try:
        config, _ = settings.read(path)
        _check_fully(config, home)
    except EdgezmqError as fault:
        print(f"{path}: {fault}")
        return 1
    section = config.runtime.policy
    for oddity in _oddities(config, home):
        print(f"warning: {oddity}")
    state = "in force" if section.enable else "not enabled: whoever may open the bus may do anything"
    print(f"{path}: rules for {', '.join(section.modules) or 'nobody'}; {state}")
    return 0


def _check_fully(config: NodeConfig, home: Home) -> None:
    """All that the broker would refuse it for, but for addresses that are taken. Raises ConfigError."""
    check_path_lengths(home, config)
    policy.make_access(config)


def _oddities(config: NodeConfig, home: Home) -> Iterator[str]:
    """What is allowed, and hardly meant."""
    section = config.runtime.policy
    known = {"edgehub", "eventbus", *config.runtime.modules, *section.modules}
    groups = {f"@{group}" for each in config.declared_modules().values() for group in each}
    own = home.run.stat().st_uid if home.run.is_dir() else os.geteuid()
    owners: dict[str, str] = {}
    for name, rule in section.modules.items():
        key = f"runtime.policy.modules.{name}"
        if name in ("edgehub", "eventbus"):
            yield f"{key}: binds a module of the node's own; without a rule it is for the node's user, unrestricted"
        elif name not in config.runtime.modules:
            yield f"{key}: runtime.modules has no {name}, so it may join no group, and nothing waits for it"
        for destination in rule.to:
            if destination != ANY and destination not in known and destination not in groups:
                yield f"{key}.to: nobody is declared as {destination}"
        if not rule.to:
            yield f"{key}.to is empty: it may only reply"
        if {"@hub", "edgehub", ANY}.intersection(rule.to) and not rule.cloud:
            yield f"{key}.cloud is empty: it may send to edgehub, which takes nothing of it for the cloud"
        for uid in policy.uids_of(config, name) if section.enable else ():
            if uid == own:
                yield f"{key}.users: uid {uid} is the node's own user, who may be every name that has no rule"
        for each in rule.keys:
            if each in owners:
                yield f"{key}.keys: the same key is {owners[each]}'s"
            owners[each] = name
        if rule.keys and not config.runtime.bus.listen:
            yield f"{key}.keys: runtime.bus.listen is empty, so nobody comes over tcp"


def show(name: str, file: Path | None, *, as_json: bool) -> None:
    """What the module `name` may do: by the policy in force, or by that of `file`."""
    home = find_home()
    config = settings.read(settings.find(file, home))[0] if file is not None else load(home.path)
    document = describe(config, home, name)
    if as_json:
        print(json.dumps(document, indent=2))
        return
    width = max(map(len, document))
    for key, value in document.items():
        print(f"{key.replace('_', ' '):{width}}  {_line(value)}")


def describe(config: NodeConfig, home: Home, name: str) -> dict[str, Any]:
    """The rule of `name` in words that an operator asks for."""
    section = config.runtime.policy
    rule = section.modules.get(name)
    groups = sorted(config.declared_modules().get(name, ()))
    if not section.enable:
        return {"module": name, "policy": "not enabled: whoever may open the bus may be it and do anything"}
    if rule is None:
        return {
            "module": name,
            "policy": "no rule",
            "may_be_it": ["the node's own user"],
            "may_send_to": ["anybody"],
            "to_the_cloud": ["anything"],
        }
    return {
        "module": name,
        "policy": "a rule",
        "may_be_it": [*(f"user {user}" for user in rule.users), *(f"key {_key(home, each)}" for each in rule.keys)],
        "through": str(home.own_socket(name)) if rule.own_socket else _ways(config, rule),
        "groups": groups,
        "may_send_to": ["anybody"] if ANY in rule.to else list(rule.to),
        "to_the_cloud": [msgspec.to_builtins(grant) for grant in rule.cloud],
        "quota": _quota(rule),
    }


def _ways(config: NodeConfig, rule: PolicyRule) -> list[str]:
    ways = ["the node's bus socket"] if rule.users else []
    return ways + (list(config.runtime.bus.listen) if rule.keys else [])


def _key(home: Home, public: str) -> str:
    """Its fingerprint, and the name of its file where this node has one."""
    from runtime.zap import fingerprint

    files = keys.public_keys(home.curve) if home.curve.is_dir() else {}
    named = [name for name, each in files.items() if each == public]
    return fingerprint(public) + (f" ({named[0]})" if named else "")


def _quota(rule: PolicyRule) -> list[str]:
    rates = (("messages", rule.messages_per_second), ("bytes", rule.bytes_per_second))
    return [f"{rate:g} {what}/s" for what, rate in rates if rate]


def _line(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {' '.join(each)}" for key, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(_line, value)) or "none"
    return str(value)


# --- reload -------------------------------------------------------------------------------------------


def reload(named: Path | None) -> None:
    """Have the running node take over `runtime.policy`, `runtime.modules` and `runtime.bus.listen` of the file.

    Raises NodeError when there is none, or it did not: then the policy before is in force. Raises ConfigError, OSError.
    """
    home = find_home()
    _check_may_reload(home)
    path = settings.find(named, home)
    config, warnings = settings.read(path)
    _check_fully(config, home)
    with _alone(home):
        if not holder(home.lock("broker")):
            raise NodeError(f"no broker runs on {home.path}; `edgezmq up` reads the whole file")
        before = load(home.path)
        after = policy.with_policy_of(before, config)
        for text in (*warnings, *_oddities(after, home)):
            sys.stderr.write(f"warning: {text}\n")
        left = list(_differences(msgspec.to_builtins(after), msgspec.to_builtins(config)))
        if left:
            sys.stderr.write(f"warning: changed as well, and for the next `edgezmq up`: {', '.join(left)}\n")
        store(after, home)
        taken = []
        try:
            for name in TAKERS:
                if _hand_over(home, name, policy.mark_of(after)):
                    taken.append(name)
        except NodeError:
            store(before, home)
            for name in TAKERS:
                _signal(home, name)
            raise
    print(f"policy {policy.mark_of(after)} of {path} is in force in {' and '.join(reversed(taken))}")


def _check_may_reload(home: Home) -> None:
    if not home.run.is_dir():
        raise NodeError(f"no node runs on {home.path} (start it: edgezmq up)")
    owner = home.run.stat().st_uid
    if os.geteuid() not in (0, owner):
        raise NodeError(f"only root and the node's own user (uid {owner}) may change the policy of {home.path}")


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    """One reload at a time."""
    directory = os.open(home.run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _hand_over(home: Home, name: str, mark: str) -> bool:
    """Wait until the process `name` goes by the policy `mark`; False: it does not run, and will read it at its start.

    Raises NodeError when it says why not, or nothing.
    """
    policy.forget(home, name)
    if not _signal(home, name):
        return False
    end = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < end:
        said = policy.told(home, name)
        if said is not None and said.fault:
            raise NodeError(f"{name} keeps the policy it has: {said.fault}")
        if said is not None and said.mark == mark:
            return True
        # One that was just starting may have died of the signal: whoever follows it reads the file.
        time.sleep(0.01)
    raise NodeError(f"{name} did not answer within {ANSWER_SECONDS:g} s; all keep the policy they had")


def _signal(home: Home, name: str) -> bool:
    pid = holder(home.lock(name))
    if not pid:
        return False
    try:
        os.kill(pid, signal.SIGHUP)
    except ProcessLookupError:
        return False
    except PermissionError as fault:
        raise NodeError(f"{name} (pid {pid}) is another user's: only that user and root may ask it") from fault
    return True


def _differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Keys, in the configuration's form, whose values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from _differences(one.get(key), other.get(key), f"{place}.{key}" if place else str(key))
    elif one != other:
        yield place
