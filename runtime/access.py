"""Who may be whom on the bus, who may send to whom, and how much (docs/operations.md, Permission). A core.

Over ipc the kernel tells the broker each peer's uid, over tcp ZAP its CURVE key (docs/emp.md, Sockets): a *rule*
binds a name to some of them. With rules in force everything is denied that none of them grants; names without a rule
belong to the user whom the broker runs as, and may do what they like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import msgspec

from runtime import emp
from runtime.names import is_group

ANY: Final = "*"
"As a destination: every module and every group."
REPLY: Final = int(emp.Priority.REPLY)


class Credentials(msgspec.Struct, frozen=True):
    """What the kernel or ZAP says of a peer; -1 = unknown."""

    uid: int = -1
    gid: int = -1
    pid: int = -1
    key: str = ""
    "The CURVE public key that ZAP accepted, in Z85, or empty."
    socket: str = ""
    "The name whose own socket it came through; empty: one that all share."


class Pace:
    """What one module may send in a second: `messages` and `bytes`, 0 = without limit.

    Both are buckets that hold one second's worth. A batch goes as soon as neither is empty and may overdraw
    it; what follows waits until the debt is paid. So the rate holds on average whatever the size of batches.
    """

    __slots__ = ("_at", "_bytes", "_bytes_rate", "_messages", "_messages_rate")

    def __init__(self, messages: float, bytes: float) -> None:
        self._messages_rate = messages
        self._bytes_rate = bytes
        self._messages = messages
        self._bytes = bytes
        self._at: float | None = None

    def set_rates(self, other: Pace) -> None:
        """Take the rates of `other`; what is owed stays owed."""
        for rate, account in (("_messages_rate", "_messages"), ("_bytes_rate", "_bytes")):
            before, after = getattr(self, rate), getattr(other, rate)
            # An account that was without limit is no debt: it begins full.
            left = getattr(self, account) if before else after
            setattr(self, rate, after)
            setattr(self, account, min(left, after))

    def due_at(self, now: float) -> float:
        """When the next batch may go: `now` or later."""
        since = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        wait = 0.0
        if self._messages_rate:
            self._messages = min(self._messages_rate, self._messages + since * self._messages_rate)
            wait = -self._messages / self._messages_rate
        if self._bytes_rate:
            self._bytes = min(self._bytes_rate, self._bytes + since * self._bytes_rate)
            wait = max(wait, -self._bytes / self._bytes_rate)
        return now + max(0.0, wait)

    def take(self, messages: int, bytes: int) -> None:
        """A batch goes."""
        self._messages -= messages
        self._bytes -= bytes


class Access(Protocol):
    """What the broker's core asks."""

    def ruled(self) -> frozenset[str] | None:
        """The names that have a rule; None: there are no rules, and everybody may everything."""

    def refuse_hello(self, name: str, groups: tuple[str, ...], credentials: Credentials) -> str | None:
        """Why `credentials` may not be `name` in `groups`, or None."""

    def may_send(self, sender: str, destination: str, priority: int) -> bool: ...

    def may_ask(self, credentials: Credentials) -> bool:
        """Whether ADMIN is open to them: it shows what passes on the bus."""

    def pace(self, name: str) -> Pace | None:
        """A fresh account of what `name` may send; None: without limit."""


class Open:
    """Everybody on the socket may be anybody: the file's permissions are the policy."""

    def ruled(self) -> frozenset[str] | None:
        return None

    def refuse_hello(self, name: str, groups: tuple[str, ...], credentials: Credentials) -> str | None:
        return None

    def may_send(self, sender: str, destination: str, priority: int) -> bool:
        return True

    def may_ask(self, credentials: Credentials) -> bool:
        return True

    def pace(self, name: str) -> Pace | None:
        return None


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What is granted to one name."""

    uids: frozenset[int] = frozenset()
    "Over ipc: a process of one of them may have the name."
    keys: frozenset[str] = frozenset()
    "Over tcp: the owner of one of these CURVE public keys (Z85) may have it."
    groups: frozenset[str] = frozenset()
    "It may be a member of these."
    destinations: frozenset[str] = frozenset()
    "It may send to these modules and `@groups`, or `*`. Replies need no grant: see `Policy.may_send`."
    has_own_socket: bool = False
    "Only through the socket that is the name's own."
    messages_per_second: float = 0.0
    bytes_per_second: float = 0.0


class Policy:
    """Rules by name. `own_uid` is the user whom the broker runs as."""

    def __init__(self, rules: Mapping[str, Rule], *, own_uid: int) -> None:
        self._rules = dict(rules)
        self._own_uid = own_uid

    def ruled(self) -> frozenset[str] | None:
        return frozenset(self._rules)

    def refuse_hello(self, name: str, groups: tuple[str, ...], credentials: Credentials) -> str | None:
        rule = self._rules.get(name)
        if credentials.socket and credentials.socket != name:
            return f"this socket is {credentials.socket!r}'s alone, not {name!r}'s"
        if rule is None:
            if credentials.uid == self._own_uid:
                return None
            return f"no rule of runtime.policy says who may be {name!r}; {_who(credentials)} may not"
        if rule.has_own_socket and not credentials.socket:
            return f"{name!r} is reached through its own socket only"
        if credentials.uid not in rule.uids and (not credentials.key or credentials.key not in rule.keys):
            return f"{_who(credentials)} may not be {name!r}"
        foreign = sorted(set(groups) - rule.groups)
        if foreign:
            granted = ", ".join(sorted(rule.groups)) or "none"
            return f"{name!r} may not be in {', '.join(foreign)}: runtime.modules.{name}.groups has {granted}"
        return None

    def may_send(self, sender: str, destination: str, priority: int) -> bool:
        """A reply may go wherever a request can have come from: to whoever may send to the one who replies."""
        if self._grants(sender, destination):
            return True
        if priority != REPLY or is_group(destination):
            return False
        asker = self._rules.get(destination)
        if asker is None:
            return True
        mine = self._rules.get(sender)
        groups = {f"@{group}" for group in mine.groups} if mine is not None else set()
        return not asker.destinations.isdisjoint({sender, ANY} | groups)

    def _grants(self, sender: str, destination: str) -> bool:
        rule = self._rules.get(sender)
        return rule is None or destination in rule.destinations or ANY in rule.destinations

    def may_ask(self, credentials: Credentials) -> bool:
        return credentials.uid == self._own_uid and not credentials.socket

    def pace(self, name: str) -> Pace | None:
        rule = self._rules.get(name)
        if rule is None or not (rule.messages_per_second or rule.bytes_per_second):
            return None
        return Pace(rule.messages_per_second, rule.bytes_per_second)


def _who(credentials: Credentials) -> str:
    if credentials.key:
        return "the owner of this CURVE key"
    return f"uid {credentials.uid}" if credentials.uid >= 0 else "a peer that nothing is known of"
