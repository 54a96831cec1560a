"""`python -m bench`: measure, print the tables, and with `--json FILE` write what checks read."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from bench import report
from bench.bus import NOISY_PERCENT, contenders, measure_bus
from bench.children import ChildFailed
from bench.cloudlink import measure_cloud
from bench.machine import facts
from bench.node import become_idle_sampler, measure_node, resume
from bench.report import Results, as_json, as_text

ROUNDS = 5
QUICK_ROUNDS = 1

GROUPS = {
    "bus": (report.BUS_256, report.BUS_4096),
    "latency": (report.LATENCY_P50,),
    "request": (report.REQUEST_P50,),
    "cloud": (report.UPLOADS,),
    "node": (report.START,),
    "idle": (),
}
"What `--only` takes, and the measures behind each word."


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = _options()
    if options.resume:
        state = resume(options.resume)
        return _finish(state.results, Path(state.json_path) if state.json_path else None)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    wanted = options.only or list(GROUPS)
    results = Results(machine={**facts(), "quick": options.quick, "rounds": rounds})
    _say(f"{results.machine['cores']} cores, {results.machine['cpu']}, Python {results.machine['python']}")
    _say(f"load average {os.getloadavg()[0]:.2f}, {rounds} round(s)")
    measures = [measure for word in wanted for measure in GROUPS[word]]
    measure_bus(results, contenders(options.contender), rounds=rounds, quick=options.quick, measures=measures, say=_say)
    if "cloud" in wanted:
        measure_cloud(results, rounds=rounds, quick=options.quick, with_native=options.native, say=_say)
    if "node" in wanted:
        try:
            measure_node(results, rounds=rounds, quick=options.quick, say=_say)
        except ChildFailed as fault:
            results.not_run["node"] = str(fault)
            _say(f"node: FAILED: {fault}")
    if "idle" in wanted:
        try:
            become_idle_sampler(results, quick=options.quick, json_path=options.json, say=_say)
        except ChildFailed as fault:
            results.not_run["idle"] = str(fault)
            _say(f"idle: FAILED: {fault}")
    return _finish(results, options.json)


def _finish(results: Results, json_path: Path | None) -> int:
    """Print and write; the exit status is 1 when something of ours that was asked for failed."""
    print("\n" + as_text(results))
    noise = max(results.others_cpu_percent, default=0.0)
    if noise > NOISY_PERCENT:
        print(f"\nnoisy: other processes used up to {noise:.0f} % of the machine during a round")
    if json_path:
        json_path.write_text(json.dumps(as_json(results), indent=2, ensure_ascii=False) + "\n")
        print(f"\nwritten: {json_path}")
    return 1 if any(is_ours(what) for what in results.not_run) else 0


def is_ours(what: str) -> bool:
    """Whether what was not run is of edgezmq itself, and not a peer that is not installed."""
    if any(f" {name}" in what for name in report.POLYGLOT):  # not: its tools are not installed
        return True
    return report.EDGEZMQ in what or what in ("node", "idle") or what.startswith("cloud ")


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
    parser.add_argument("--no-native", dest="native", action="store_false", help="cloud: without the peers in Go")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)  # see node.become_idle_sampler
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
