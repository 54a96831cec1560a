"""Processes of other users, who may not be able to reach the Python that runs the tests (as root, out of a home)."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = (Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT)
"Where Python, its libraries and the code under test lie."


def closed_above(path: Path) -> Path | None:
    """The topmost directory on the way to `path` that others may not enter."""
    return next((each for each in [*reversed(path.parents), path] if not each.stat().st_mode & 0o001), None)


def opening(needed: Iterable[Path] = NEEDED) -> list[str]:
    """What to put before a command so that for its processes `needed` is open to all; changes nothing for others.

    Empty when it is open anyway. A mount namespace of its own, in which each closed directory is replaced by an
    empty one with nothing in it but what is needed: only as root.
    """
    closed: dict[Path, list[Path]] = {}
    for path in needed:
        top = closed_above(path)
        if top is not None:
            closed.setdefault(top, []).append(path)
    if not closed:
        return []
    lines = ["set -e", "keep=$(mktemp -d)"]
    for number, (top, paths) in enumerate(closed.items()):
        for inner, path in enumerate(paths):
            lines += [f"mkdir $keep/{number}-{inner}", f"mount --bind {shlex.quote(str(path))} $keep/{number}-{inner}"]
        lines.append(f"mount -t tmpfs -o mode=0755 none {shlex.quote(str(top))}")
        for inner, path in enumerate(paths):
            where = shlex.quote(str(path))
            lines += [f"mkdir -p {where}", f"mount --bind $keep/{number}-{inner} {where}"]
            lines += [f"umount $keep/{number}-{inner}", f"rmdir $keep/{number}-{inner}"]
    lines += ["rmdir $keep", 'exec "$@"']
    unshare = shutil.which("unshare") or "unshare"
    return [unshare, "--mount", "--propagation", "private", "--", "sh", "-c", "\n".join(lines), "sh"]
