"""`edgezmq config import`: the `edge.yaml` of 2019 becomes an `edgecore.yaml`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from runtime.cli import settings
from runtime.edge2019 import convert
from runtime.errors import EdgezmqError
from runtime.home import find_home

MODULES_FILE: Final = "modules.yaml"
"Beside `edge.yaml`: which modules ran."
_HEAD: Final = """\
# Made of {name} by `edgezmq config import`. edgecore.example.yaml and docs/configuration.md explain every key.
"""
_MODE: Final = 0o600  # it may hold a password


class FileExists(EdgezmqError):
    """The file to be written is there already."""


def import_2019(file: Path, output: str, *, cloud: str, force: bool) -> None:
    """Write the new configuration to `output` (`-`: stdout; empty: where `up` looks for it); notes go to stderr.

    Raises ConfigError, FileExists, OSError; then nothing is written.
    """
    document = settings.parse(file)
    beside = file.with_name(MODULES_FILE)
    if isinstance(document, dict) and "modules" not in document and beside.is_file():
        modules = settings.parse(beside)
        document |= {"modules": modules["modules"]} if isinstance(modules, dict) and "modules" in modules else {}
    imported = convert(document, cloud=cloud)
    text = _HEAD.format(name=file.name) + settings.dump(imported.document)
    if output == "-":
        print(text, end="")
    else:
        target = Path(output) if output else find_home().path / "edgecore.yaml"
        if target.exists() and not force:
            raise FileExists(f"{target} is there already; --force replaces it, --output - only shows the new one")
        target.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        settings.write(target, text, mode=_MODE)
        _say(f"wrote {target}; look at it, then: edgezmq check")
    for remark in imported.remarks:
        _say(f"note: {remark}")
    for key in imported.left_out:
        _say(f"not carried over: {key}")


def _say(text: str) -> None:
    sys.stderr.write(f"edgezmq: {text}\n")
