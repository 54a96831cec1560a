"""Names of modules and groups, and how a destination is written."""

from __future__ import annotations

import re
from typing import Final

from runtime.errors import InvalidName

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
"1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit (docs/emp.md, Names); `$` would let a newline follow."

ADDRESS_PATTERN: Final = r"(?:\[(?P<literal>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<name>[\w.-]+)):(?P<port>[0-9]{1,5})"
"host:port of a cloud, IPv6 in brackets; whether the port is one (1 to 65535) is for who matches to say."

_NAME = re.compile(NAME_PATTERN)
_GROUP_MARK: Final = "@"


def check_name(name: str) -> str:
    """Return `name`, or raise InvalidName saying what is allowed."""
    if not isinstance(name, str) or _NAME.match(name) is None:
        raise InvalidName(
            f"{name!r} is no name: expected 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"
        )
    return name


class Group(str):
    """A group as a destination. `Group("hub")` is the text `@hub`, as it stands in frames.

    A plain `str` is a module's name, so both can be used as they are wherever a destination is wanted.
    """

    __slots__ = ()

    def __new__(cls, name: str) -> Group:
        return super().__new__(cls, _GROUP_MARK + check_name(name))

    @property
    def name(self) -> str:
        return self[1:]

    def __repr__(self) -> str:
        return f"Group({self.name!r})"


def is_group(destination: str) -> bool:
    """Whether a destination as written in frames addresses a group."""
    return destination.startswith(_GROUP_MARK)


def group_name(destination: str) -> str:
    """The group's bare name out of a destination such as `@hub`."""
    return destination[1:]


def check_destination(destination: str) -> str:
    """Return `destination` (a module's name, or `@` and a group's), or raise InvalidName."""
    check_name(destination[1:] if is_group(destination) else destination)
    return destination
