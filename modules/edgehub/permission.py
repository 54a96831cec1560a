"""What each module may send to the cloud: `runtime.policy`, by the sender name that the broker vouches for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate

from runtime.message import Message

ANY = ("*",)


@dataclass(frozen=True, slots=True)
class Grant:
    """Messages that match one pattern of each. Patterns as in the shell; `*` matches slashes too."""

    groups: tuple[str, ...] = ANY
    operations: tuple[str, ...] = ANY
    resources: tuple[str, ...] = ANY


class Permission:
    """Grants by sender. A sender that has no entry is the node's own, and may send anything."""

    def __init__(self, grants: Mapping[str, Iterable[Grant]] | None) -> None:
        self._grants: dict[str, list[tuple[re.Pattern[str], ...]]] = {}
        self.adopt(grants)

    def adopt(self, grants: Mapping[str, Iterable[Grant]] | None) -> None:
        """Take other grants over. None: no policy is in force, and everybody may send anything.

        A sender that has no entry any more keeps those it had: what it sent under its rule may still be on its way,
        and must not pass for the node's own.
        """
        if grants is None:
            self._grants = {}
            return
        fresh: dict[str, list[tuple[re.Pattern[str], ...]]] = {
            sender: [(_any_of(grant.groups), _any_of(grant.operations), _any_of(grant.resources)) for grant in each]
            for sender, each in grants.items()
        }
        self._grants.update(fresh)

    def __bool__(self) -> bool:
        return bool(self._grants)

    def allows(self, sender: str, message: Message) -> bool:
        """Whether `sender` may send it up. What the body says of its source is not asked."""
        patterns = self._grants.get(sender)
        return patterns is None or any(
            group.match(message.group) and operation.match(message.operation) and resource.match(message.resource)
            for group, operation, resource in patterns
        )


def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression; no pattern at all matches nothing."""
    return re.compile("|".join(f"(?:{translate(pattern)})" for pattern in patterns) or r"(?!)")
