"""Files that come with edgezmq and are no code: supervisord.conf, configurations, the examples.

A checkout has them beside the packages, an installed wheel in `share/edgezmq` of its environment (pyproject.toml,
data-files: https://setuptools.pypa.io/en/latest/userguide/datafiles.html).
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path


def places() -> list[Path]:
    """Where such files may be, the most likely first: checkout, environment, the interpreter's own data directory."""
    beside = Path(__file__).resolve().parent.parent
    shares = [Path(sys.prefix), Path(sysconfig.get_path("data"))]
    return list(dict.fromkeys([beside, *(share / "share" / "edgezmq" for share in shares)]))


def shipped(name: str, among: Sequence[Path] | None = None) -> Path:
    """Where the file or directory is, e.g. `supervisord.conf` or `examples/go`.

    Raises FileNotFoundError naming the places that were looked at.
    """
    candidates = [place / name for place in (places() if among is None else among)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"{name} of edgezmq is not there; looked for {', '.join(map(str, candidates))}")
