"""Building the Go and the C module of a chaos node (chaos/modules) with the clients of examples/."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from chaos.mixed import GO, C

_GO_AT_LEAST: Final = (1, 22)
_BUILD_SECONDS: Final = 300.0
_ROOT: Final = Path(__file__).resolve().parent.parent
_SOURCES: Final = _ROOT / "chaos" / "modules"
_C_CLIENT: Final = _ROOT / "examples" / "c"
_LIBRARIES: Final = ("-lzmq", "-lmsgpackc")


class NotBuilt(Exception):
    """Why the modules cannot be had here."""


def build(directory: Path) -> Mapping[str, Path]:
    """The program of each module, built in `directory`. Both or none: one without the other has nobody to talk to.

    Raises NotBuilt, with the reason in words.
    """
    lacking = missing()
    if lacking:
        raise NotBuilt(f"there is no {', no '.join(lacking)}")
    go, c = directory / GO, directory / C
    # The binding of ZeroMQ is cgo. What go.sum does not know is not taken.
    environment = {**os.environ, "CGO_ENABLED": "1", "GOFLAGS": "-mod=readonly"}
    _run(["go", "build", "-o", str(go), "."], _SOURCES / "go", environment)
    sources = [str(_SOURCES / "c" / "main.c"), str(_C_CLIENT / "emp.c")]
    options = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wpedantic", f"-I{_C_CLIENT}"]
    _run([_compiler(), *options, "-o", str(c), *sources, *_LIBRARIES], _SOURCES / "c", os.environ)
    return {GO: go, C: c}


def missing() -> list[str]:
    """What has to be installed first."""
    lacking = []
    if not _is_go_new_enough():
        lacking.append(f"Go {'.'.join(map(str, _GO_AT_LEAST))}")
    if shutil.which(_compiler()) is None:
        return [*lacking, "C compiler"]
    headers = (("zmq.h", "libzmq3-dev"), ("msgpack.h", "libmsgpack-dev"))
    return lacking + [f"{header} ({package})" for header, package in headers if not _has_header(header)]


def _compiler() -> str:
    return os.environ.get("CC", "cc")


def _is_go_new_enough() -> bool:
    if shutil.which("go") is None:
        return False
    done = subprocess.run(["go", "version"], cwd=_ROOT, capture_output=True, text=True, timeout=60)
    found = re.search(r"go(\d+)\.(\d+)", done.stdout)
    return found is not None and (int(found[1]), int(found[2])) >= _GO_AT_LEAST


def _has_header(name: str) -> bool:
    command = [_compiler(), "-E", "-x", "c", "-"]
    done = subprocess.run(command, input=f"#include <{name}>\n", capture_output=True, text=True, timeout=60)
    return done.returncode == 0


def _run(command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_BUILD_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise NotBuilt(f"{command[0]}: {fault}") from fault
    if done.returncode:
        raise NotBuilt(f"{command[0]}: {' '.join(done.stdout.split())[-300:]}")
