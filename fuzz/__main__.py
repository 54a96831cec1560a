"""`python -m fuzz`: every target for its share of the time; exit status 1 when a fault was found (docs/fuzzing.md)."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Final

from fuzz.seeds import ROOT
from fuzz.target import TARGETS, Target

STATE: Final = ROOT / ".fuzz"
"corpus/TARGET grows from run to run, crashes/TARGET holds what broke something, log/TARGET.txt what was said."
DEFAULT_SECONDS: Final = 120.0
MAX_INPUT_BYTES: Final = 16 * 1024
RSS_LIMIT_MB: Final = 768
"Of one target's process, some 150 MB of which are Python, its libraries and libFuzzer's own tables."
HANG_SECONDS: Final = 10
"For one input; the usual one takes well under a millisecond."
GRACE_SECONDS: Final = 60.0
"libFuzzer first reads the whole corpus and looks at the clock between two inputs only."

NO_ATHERIS: Final = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description="Feed every decoder of outside bytes with nonsense.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="only these")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="for all together (default 120)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time (default: one per core)")
    parser.add_argument("--list", action="store_true", help="what targets there are")
    parser.add_argument("--replay", action="append", type=Path, metavar="FILE", help="feed one TARGET this input")
    options = parser.parse_args(arguments)
    is_fuzzing = not options.list and not options.replay
    if is_fuzzing and importlib.util.find_spec("atheris") is None:
        print("atheris is not installed; there is none for every Python and machine (docs/fuzzing.md)", file=sys.stderr)
        return NO_ATHERIS
    load(is_instrumented=is_fuzzing)
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"no such target: {', '.join(sorted(unknown))} (--list shows them)")
    chosen = [TARGETS[name] for name in options.targets or TARGETS]
    if options.list:
        for target in chosen:
            print(f"{target.name:20} {target.what}")
        return 0
    if options.replay:
        if len(chosen) != 1:
            parser.error("--replay needs one TARGET")
        return replay(chosen[0], options.replay)
    return fuzz(chosen, options.seconds, max(1, min(options.jobs, len(chosen))))


def load(*, is_instrumented: bool) -> None:
    """Fill TARGETS. Only what is ours is instrumented; everything else in a target is a library."""
    instrumented: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if is_instrumented:
        import atheris

        instrumented = atheris.instrument_imports(
            include=["runtime", "modules", "cloudsim"], enable_loader_override=False
        )
    # atheris names every file it instruments.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), instrumented:
        import fuzz.targets  # noqa: F401


# --- fuzzing ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """One target at work in a process of its own, forked from ours, where all is imported."""

    target: Target
    process: ForkProcess
    log: Path
    known: frozenset[Path]
    "Crashes of former runs."
    ends_at: float


def fuzz(targets: Sequence[Target], seconds: float, jobs: int) -> int:
    share = max(1, round(seconds * jobs / len(targets)))
    print(f"{len(targets)} targets, {share} s each, {jobs} at a time", flush=True)
    waiting, running, results = list(targets), list[Run](), list[Result]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(start(waiting.pop(0), share))
            for run in list(running):
                if run.process.exitcode is None and time.monotonic() > run.ends_at:
                    run.process.kill()
                    run.process.join()
                if run.process.exitcode is not None:
                    running.remove(run)
                    results.append(finish(run))
            time.sleep(0.05)  # between two looks at the processes
    finally:  # Ctrl-C
        for run in running:
            run.process.kill()
            run.process.join()
    return report(results)


def start(target: Target, seconds: int) -> Run:
    corpus, crashes, log = (STATE / kind / target.name for kind in ("corpus", "crashes", "log"))
    for directory in (corpus, crashes, log.parent):
        directory.mkdir(parents=True, exist_ok=True)
    (STATE / ".gitignore").write_text("*\n")
    for seed in target.seeds():
        (corpus / digest(seed)).write_bytes(seed)
    arguments = [
        "fuzz",
        str(corpus),
        f"-max_total_time={seconds}",
        f"-timeout={HANG_SECONDS}",
        f"-rss_limit_mb={RSS_LIMIT_MB}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-artifact_prefix={crashes}/",
        "-print_final_stats=1",
        "-len_control=0",
    ]
    if target.tokens:
        dictionary = log.with_suffix(".dict")
        dictionary.write_text("".join(f'"{_escaped(token)}"\n' for token in target.tokens))
        arguments.append(f"-dict={dictionary}")
    output = log.with_suffix(".txt")
    process = multiprocessing.get_context("fork").Process(target=work, args=(target, arguments, crashes, output))
    known = frozenset(crashes.iterdir())
    process.start()
    return Run(target, process, output, known, time.monotonic() + seconds + GRACE_SECONDS)


def work(target: Target, arguments: list[str], crashes: Path, output: Path) -> None:
    """The forked process. libFuzzer ends it: with 0, with 77 after an exception, with others for what it finds."""
    import atheris

    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def check(data: bytes) -> None:
        try:
            target.check(data)
        except BaseException:
            # libFuzzer would write it at the exit of a whole interpreter, which a forked one does not have.
            (crashes / f"crash-{digest(data)}").write_bytes(data)
            raise

    atheris.Setup(arguments, check)
    atheris.Fuzz()


def digest(data: bytes) -> str:
    """How libFuzzer names files."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Result:
    target: Target
    runs: int
    is_fault: bool
    crashes: list[Path]
    "Of this run."
    said: str


def finish(run: Run) -> Result:
    """What came of it; prints a line."""
    said = run.log.read_text(errors="replace")
    counted = re.search(r"stat::number_of_executed_units:\s*(\d+)", said)
    result = Result(
        run.target,
        int(counted[1]) if counted else 0,
        run.process.exitcode != 0,
        sorted(set((STATE / "crashes" / run.target.name).iterdir()) - run.known),
        said,
    )
    print(f"  {run.target.name:20} {result.runs:9,} runs  {'FAULT' if result.is_fault else 'ok'}", flush=True)
    return result


def _escaped(token: bytes) -> str:
    """As libFuzzer's dictionaries have it."""
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in token)


def report(results: Sequence[Result]) -> int:
    failed = [result for result in results if result.is_fault]
    for result in failed:
        print(f"\n== {result.target.name}: {result.target.what}")
        # libFuzzer's own words come around the traceback; the last lines hold both.
        print("\n".join(result.said.splitlines()[-40:]) or "it said nothing")
        for crash in result.crashes:
            data = crash.read_bytes()
            print(f"input of {len(data)} bytes: {data[:200].hex(' ')}{' …' if len(data) > 200 else ''}")
            print(f"again: python -m fuzz {result.target.name} --replay {crash.relative_to(ROOT)}")
    runs = sum(result.runs for result in results)
    print(f"{len(results)} targets, {runs:,} runs, {len(failed)} with a fault")
    return 1 if failed else 0


def replay(target: Target, files: Sequence[Path]) -> int:
    broken = 0
    for file in files:
        try:
            target.check(file.read_bytes())
        except Exception:
            broken = 1
            print(f"{file}:")
            traceback.print_exc(file=sys.stdout)
        else:
            print(f"{file}: ok")
    return broken


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
