"""`edgezmq exec [--name NAME] -- COMMAND …`: a foreign module as a well-behaved child of supervisord.

Asks the kernel to end the process together with supervisord, takes the lock of its name, and becomes the
command. For programs in other languages, which do not do this themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from runtime.errors import AlreadyRunning, InvalidName
from runtime.home import find_home
from runtime.locks import die_with_parent, hold
from runtime.names import check_name

USAGE = "usage: edgezmq exec [--name NAME] -- COMMAND [ARGUMENT …]"


def parse(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Name and command out of the arguments; raises ValueError, InvalidName."""
    name: str | None = None
    rest = list(arguments)
    while rest and rest[0] != "--":
        option = rest.pop(0)
        if option == "--name" and rest:
            name = check_name(rest.pop(0))
        elif option.startswith("--name="):
            name = check_name(option.removeprefix("--name="))
        elif option.startswith("-"):
            raise ValueError(f"unknown option {option}")
        else:
            return name, [option, *rest]
    if rest[1:]:
        return name, rest[1:]
    raise ValueError("no command")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Becomes the command; exits 2 for a wrong call, 1 when the name is taken, 127 when there is no such command."""
    try:
        name, command = parse(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, InvalidName) as fault:
        sys.exit(_complain(f"{fault}\n{USAGE}", 2))
    die_with_parent()
    if name is not None:
        try:
            hold(find_home().lock(name), inheritable=True)
        except (AlreadyRunning, OSError) as fault:
            sys.exit(_complain(str(fault), 1))
    try:
        os.execvp(command[0], command)
    except OSError as fault:
        sys.exit(_complain(f"{command[0]}: {fault.strerror}", 127))


def _complain(text: str, status: int) -> int:
    sys.stderr.write(f"edgezmq exec: {text}\n")
    return status


if __name__ == "__main__":
    main()
