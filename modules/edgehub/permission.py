"""What each module may send to the cloud: `runtime.policy`, by the sender name that the broker vouches for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import NamedTuple

from runtime.message import Message

ANY = ("*",)
_DOTS = re.compile(r"(?:\A|/)\.\.?(?:/|\Z)")


@dataclass(frozen=True, slots=True)
class Grant:
    """Messages that match one pattern of each. Patterns as in the shell; `*` matches slashes too.

    A resource with a part `.` or `..` matches nothing but `*` itself: whoever makes a path of it in the cloud would
    come out somewhere else than where the pattern points.
    """

    groups: tuple[str, ...] = ANY
    operations: tuple[str, ...] = ANY
    resources: tuple[str, ...] = ANY


class Permission:
    """Grants by sender. A sender that has no entry is the node's own, and may send anything."""

    def __init__(self, grants: Mapping[str, Iterable[Grant]] | None) -> None:
        self._grants: dict[str, list[_Patterns]] = {}
        self.adopt(grants)

    def adopt(self, grants: Mapping[str, Iterable[Grant]] | None) -> None:
        """Take other grants over. None: no policy is in force, and everybody may send anything.

        A sender that has no entry any more keeps those it had: what it sent under its rule may still be on its way,
        and must not pass for the node's own.
        """
        if grants is None:
            self._grants = {}
            return
        self._grants.update({sender: [_Patterns.of(grant) for grant in each] for sender, each in grants.items()})

    def __bool__(self) -> bool:
        return bool(self._grants)

    def allows(self, sender: str, message: Message) -> bool:
        """Whether `sender` may send it up. What the body says of its source is not asked."""
        grants = self._grants.get(sender)
        return grants is None or any(patterns.match(message) for patterns in grants)


class _Patterns(NamedTuple):
    groups: re.Pattern[str]
    operations: re.Pattern[str]
    resources: re.Pattern[str]
    takes_dots: bool

    @classmethod
    def of(cls, grant: Grant) -> _Patterns:
        return cls(_any_of(grant.groups), _any_of(grant.operations), _any_of(grant.resources), "*" in grant.resources)

    def match(self, message: Message) -> bool:
        return bool(
            self.groups.match(message.group)
            and self.operations.match(message.operation)
            and self.resources.match(message.resource)
            and (self.takes_dots or not _DOTS.search(message.resource))
        )


def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression; no pattern at all matches nothing."""
    return re.compile("|".join(f"(?:{translate(pattern)})" for pattern in patterns) or r"(?!)")
