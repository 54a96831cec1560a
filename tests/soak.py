"""`make soak`: random schedules over the bus's cores (tests/support/world.py), on all processors.

Goes on until Ctrl-C, or for as many as `--schedules` says. A schedule that breaks a rule is shown with its seed, which
belongs into ONCE_BROKEN of tests/runtime/test_schedules.py once the fault is found; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any

from tests.support.world import Violation, play

CHUNK = 50
"Schedules a worker plays before it reports."

# Windows, prefetch and batches from the narrowest to more than a schedule ever fills; None: the world's own choice.
OPTIONS: Sequence[dict[str, Any] | None] = (
    None,
    {"window": 1, "prefetch": 1, "batch": 1},
    {"window": 3, "prefetch": 9, "batch": 8},
    {"window": 40, "prefetch": 40, "batch": 16},
    {"paced": True},
    {"window": 3, "prefetch": 9, "batch": 8, "paced": True},
)


def run_chunk(first: int) -> tuple[int, list[str]]:
    """Play CHUNK schedules from seed `first`; how many, and what broke."""
    broken = []
    for seed in range(first, first + CHUNK):
        options = OPTIONS[seed % len(OPTIONS)] or {}
        try:
            play(seed, **options)
        except Violation as violation:
            broken.append(f"{violation}\noptions {options}")
        except Exception:
            broken.append(f"seed {seed} options {options}\n{traceback.format_exc(limit=-4)}")
    return CHUNK, broken


def ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make soak ARGS=", description=__doc__)
    parser.add_argument("--schedules", type=int, default=0, metavar="N", help="end after about N; 0: go on")
    parser.add_argument(
        "--first", type=int, default=None, metavar="SEED", help="begin with this seed; default: by chance"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    options = parser.parse_args(arguments)
    first = random.randrange(2**31) if options.first is None else options.first
    print(f"soak: schedules from seed {first}, {options.jobs} processes; Ctrl-C ends it", flush=True)

    seeds: Iterator[int] = itertools.count(first, CHUNK)
    if options.schedules:
        seeds = itertools.islice(seeds, -(-options.schedules // CHUNK))
    started = told = time.monotonic()
    played = broken = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=ignore_interrupt) as pool:
        # One chunk more than workers, so that none waits for us.
        open_chunks = {pool.submit(run_chunk, seed) for seed in itertools.islice(seeds, options.jobs + 1)}
        try:
            while open_chunks:
                done, open_chunks = wait(open_chunks, return_when=FIRST_COMPLETED)
                open_chunks |= {pool.submit(run_chunk, seed) for seed in itertools.islice(seeds, len(done))}
                for chunk in done:
                    count, violations = chunk.result()
                    played += count
                    broken += len(violations)
                    for violation in violations:
                        print(f"\nBROKEN: {violation}\n", flush=True)
                if time.monotonic() - told > 5:
                    told = time.monotonic()
                    print(f"soak: {played} schedules, {played / (told - started):.0f}/s, {broken} broken", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
    seconds = time.monotonic() - started
    print(f"soak: {played} schedules from seed {first} in {seconds:.0f} s: {broken} broken", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
