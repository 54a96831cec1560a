"""Install what the example modules need, build each, and see whether it keeps the protocol: `make examples`.

The languages go side by side: building and testing is waiting for the most part. On stdout stands one line a language,
`c …  passed=N failed=0`, or why it was not run. What goes wrong is told on stderr. Exit status 1 when anything failed,
or could not be installed or built.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
BUILD_SECONDS: Final = 900.0
CONFORM_SECONDS: Final = 600.0
"For a run that takes half a minute where the machine has nothing else to do."
SHOWN_LINES: Final = 30

_one_installs: Final = threading.Lock()
"Two apt-get at a time do not wait for each other: the second one fails."


class NotRun(Exception):
    """Why a language has no figures."""


@dataclass(frozen=True)
class Need:
    """Something that has to be there, and the packages of Debian or Ubuntu that bring it."""

    what: str
    is_there: Callable[[], bool]
    packages: tuple[tuple[str, ...], ...]
    "Alternatives: the first of which all packages can be had is installed."


@dataclass(frozen=True)
class Language:
    name: str
    libraries: str
    needs: tuple[Need, ...]
    build: tuple[str, ...]
    command: tuple[str, ...]
    transport: str = "ipc"

    @property
    def directory(self) -> Path:
        return HERE / self.name


def says(command: Sequence[str], text: str = "", **more: Any) -> str | None:
    """What it prints, None if it fails or is not there."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, **more)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


def is_new_enough(printed: str | None, least: tuple[int, ...]) -> bool:
    """Whether the first version in `printed` is `least` or newer."""
    found = re.search(r"(\d+)(?:\.(\d+))?", printed or "")
    return found is not None and tuple(int(part or 0) for part in found.groups())[: len(least)] >= least


def program(name: str, *packages: tuple[str, ...], least: tuple[int, ...] = (), version: str = "--version") -> Need:
    """A program, of a version that is `least` or newer."""

    def is_there() -> bool:
        return shutil.which(name) is not None and (not least or is_new_enough(says([name, version]), least))

    what = " ".join([name, ".".join(map(str, least))]).strip()
    return Need(what, is_there, packages or ((name,),))


def has_candidate(package: str) -> bool:
    found = re.search(r"Candidate: (\S+)", says(["apt-cache", "policy", package]) or "")
    return found is not None and found[1] != "(none)"


LIBZMQ: Final = Need(
    "libzmq's headers",
    lambda: says(["pkg-config", "--atleast-version=4.2", "libzmq"]) is not None,
    (("libzmq3-dev",),),
)
MSGPACK: Final = Need(
    "msgpack-c's headers",
    lambda: says(["gcc", "-E", "-"], "#include <msgpack.h>\n") is not None,
    (("libmsgpack-c-dev",), ("libmsgpack-dev",)),
)
GCC: Final = program("gcc", ("gcc", "libc6-dev"))
PKG_CONFIG: Final = program("pkg-config")
# Go of Debian 12 is too old and fetches no newer one; the peers of the tests have a way to get one.
GO: Final = Need("go 1.22", lambda: says(["go", "list", "-m"], cwd=HERE / "go") is not None, ())
CARGO: Final = program("cargo", ("cargo-web", "rustc-web"), ("cargo", "rustc"), least=(1, 75))

LANGUAGES: Final = (
    Language(
        "c", "libzmq, msgpack-c", (GCC, program("make"), PKG_CONFIG, LIBZMQ, MSGPACK), ("make",), ("c/c-example",)
    ),
    Language(
        "go",
        "zmq4, msgpack",
        (GCC, PKG_CONFIG, LIBZMQ, GO),
        ("go", "build", "-o", "go-example", "."),
        ("go/go-example",),
    ),
    Language(
        "rust",
        "zmq, rmpv",
        (GCC, PKG_CONFIG, LIBZMQ, CARGO),
        ("cargo", "build", "--release", "--locked", "--quiet"),
        ("rust/target/release/rust-example",),
    ),
    Language(
        "javascript",
        "zeromq, @msgpack/msgpack",
        (program("node", ("nodejs",), least=(18,)), program("npm")),
        ("npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"),
        ("node", "javascript/index.js"),
    ),
    Language(
        "java",
        "jeromq, msgpack-core",
        (program("javac", ("default-jdk-headless",), least=(17,)), program("mvn", ("maven",))),
        ("mvn", "--batch-mode", "--quiet", "package"),
        ("java", "-jar", "java/target/java-example.jar"),
        transport="tcp",
    ),
)


def tell(text: str) -> None:
    sys.stderr.write(text + "\n")  # in one piece: the languages are side by side
    sys.stderr.flush()


def perform(command: Sequence[str], directory: Path, seconds: float = BUILD_SECONDS) -> None:
    """Run it; the end of what it prints is shown when it fails. Raises NotRun."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise NotRun(str(fault)) from fault
    if done.returncode:
        tell("\n".join(done.stdout.splitlines()[-SHOWN_LINES:]))
        raise NotRun(f"`{' '.join(command)}` ended with status {done.returncode}")


@cache
def refresh_package_lists(*root: str) -> None:
    """Once is enough. Raises NotRun."""
    perform([*root, "apt-get", "update", "-qq"], ROOT)


def install(needs: Sequence[Need]) -> None:
    """Raises NotRun when something is missing and cannot be had."""
    with _one_installs:
        _install(needs)


def _install(needs: Sequence[Need]) -> None:
    missing = [need for need in needs if not need.is_there()]
    if not missing:
        return
    if GO in missing:
        perform([str(ROOT / "tests" / "peers" / "install-go")], ROOT)
    if any(need.packages for need in missing):
        root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        names = ", ".join(need.what for need in missing)
        if shutil.which("apt-get") is None or (root and says([*root, "true"]) is None):
            raise NotRun(f"there is no {names}, and to install it takes apt-get and root or sudo")
        tell(f"installing {names}")
        refresh_package_lists(*root)
        wanted: list[str] = []
        for need in missing:
            can_be_had = [each for each in need.packages if all(map(has_candidate, each))]
            wanted += can_be_had[0] if can_be_had else ()
        environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
        perform([*root, *environment, "apt-get", "install", "-y", "-qq", "--no-install-recommends", *wanted], ROOT)
    still = [need.what for need in missing if not need.is_there()]
    if still:
        raise NotRun(f"there is no {', '.join(still)}")


def conform(language: Language, options: Sequence[str]) -> dict[str, Any]:
    """What the conformance runner says of it. Raises NotRun."""
    command = [str(HERE / part) if "/" in part else part for part in language.command]
    runner = [str(Path(sys.executable).with_name("edgezmq")), "conform", "--json", *options]
    if language.transport == "tcp":
        runner.append("--tcp")
    try:
        done = subprocess.run(
            [*runner, "--", *command], capture_output=True, text=True, timeout=CONFORM_SECONDS, cwd=ROOT
        )
        found: dict[str, Any] = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as fault:
        raise NotRun(f"the conformance runner came to no verdict: {fault}") from fault
    if not found["passed"] + found["failed"]:
        raise NotRun("the conformance runner had nothing to check")
    return found


def verdict(language: Language, found: dict[str, Any]) -> str:
    """The line for stdout."""
    rest = f"not-applicable={found['not_applicable']}, {found['seconds']:.0f} s"
    about = f"{language.transport}, {language.libraries}, {rest}"
    return f"{language.name:<11} {about:<62}  passed={found['passed']} failed={found['failed']}"


def attend(language: Language, options: Sequence[str], *, only_build: bool = False) -> tuple[str, bool]:
    """Install, build, test; the line for stdout, and whether all is well."""
    try:
        install(language.needs)
        perform(language.build, language.directory)
        if only_build:
            return f"{language.name:<11} built", True
        found = conform(language, options)
    except NotRun as why:
        return f"{language.name:<11} not run: {why}", False
    for check in found["checks"]:
        if check["outcome"] == "fail":
            tell("\n".join([f"{language.name}: {check['name']}: {check['why']}", *check["frames"], check["log"] or ""]))
    return verdict(language, found), bool(found["failed"] == 0)


def main() -> int:
    names = [language.name for language in LANGUAGES]
    parser = argparse.ArgumentParser(prog="make examples", description=__doc__)
    parser.add_argument("languages", nargs="*", metavar="LANGUAGE", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--jobs", default="4", help="checks at a time")
    parser.add_argument("--stretch", default="1", help="so many times as long for every reaction: for a slow machine")
    parser.add_argument("--only-build", action="store_true", help="install and build, and do not test")
    wanted = parser.parse_args()
    if unknown := sorted(set(wanted.languages) - set(names)):
        parser.error(f"no example in {', '.join(unknown)}; there are {', '.join(names)}")
    # Where their installers put them, whatever the shell knows.
    ways = [ROOT / ".go" / "bin", Path("/usr/local/go/bin"), Path.home() / ".cargo" / "bin"]
    os.environ["PATH"] = os.pathsep.join([*map(str, ways), os.environ.get("PATH", os.defpath)])
    chosen = [language for language in LANGUAGES if not wanted.languages or language.name in wanted.languages]
    options = ["--jobs", wanted.jobs, "--stretch", wanted.stretch]
    is_well = True
    with ThreadPoolExecutor(len(chosen)) as side_by_side:
        for line, language_is_well in side_by_side.map(
            partial(attend, options=options, only_build=wanted.only_build), chosen
        ):
            print(line, flush=True)  # in the order of the table, each as soon as it is known
            is_well = is_well and language_is_well
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
