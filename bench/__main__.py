"""`python -m bench`: measure, print the tables, and with `--json FILE` write what checks read."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from bench import report
from bench.bus import contenders, measure_bus
from bench.machine import facts
from bench.report import Results, as_json, as_text

ROUNDS = 5
QUICK_ROUNDS = 1

GROUPS = {
    "bus": (report.BUS_256, report.BUS_4096),
    "request": (report.REQUEST_P50,),
}
"What `--only` takes, and the measures behind each word."

NOISY_PERCENT = 10.0
"Of the machine used by others in a round: from there on we warn."


def main() -> int:
    options = _options()
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    wanted = options.only or list(GROUPS)
    results = Results(machine={**facts(), "quick": options.quick, "rounds": rounds})
    _say(f"{results.machine['cores']} cores, {results.machine['cpu']}, Python {results.machine['python']}")
    _say(f"load average {os.getloadavg()[0]:.2f}, {rounds} round(s)")
    measures = [measure for word in wanted for measure in GROUPS.get(word, ())]
    measure_bus(results, contenders(options.contender), rounds=rounds, quick=options.quick, measures=measures, say=_say)
    print("\n" + as_text(results))
    noise = max(results.others_cpu_percent, default=0.0)
    if noise > NOISY_PERCENT:
        print(f"\nnoisy: other processes used up to {noise:.0f} % of the machine during a round")
    if options.json:
        options.json.write_text(json.dumps(as_json(results), indent=2, ensure_ascii=False) + "\n")
        print(f"\nwritten: {options.json}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure edgezmq beside its peers.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--rounds", type=_positive, help=f"rounds of each measure (default {ROUNDS})")
    parser.add_argument("--only", action="append", choices=list(GROUPS), help="only this measure; may be repeated")
    parser.add_argument(
        "--contender",
        action="append",
        default=[],
        choices=[one.name for one in contenders()],
        help="only this contender; may be repeated",
    )
    parser.add_argument("--quick", action="store_true", help="short rounds, one of each: does it work at all?")
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
