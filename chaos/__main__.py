"""`python -m chaos`: the kill matrix. docs/chaos.md says what it does and how to read it; `make chaos` calls it."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final

from chaos.account import percentile
from chaos.build import NotBuilt, build
from chaos.disk import build_shim
from chaos.harms import Cell, cells_of
from chaos.load import Load
from chaos.mixed import MODULES
from chaos.rig import Rig, RigBroken
from chaos.run import QUICK, Pace, Result, as_json, measure_capacity, run_cell, work
from chaos.table import render
from demo.around import LINKS, WSS
from demo.children import DemoFailed, Interrupts

BASELINE_SECONDS: Final = 12.0
CAPACITY_SECONDS: Final = 6.0
FLOOR_MS: Final = 2.0
"The undisturbed p99 is taken as at least this."
BAR_RECOVERY_S: Final = 2.0
"edgehub or broker after SIGKILL."
BAR_RATIO: Final = 2.0
REPEATS: Final = 2
"Of a cell whose ratio is beyond the bar: one cell's p99 rests on some twenty requests, the median of three counts."


@dataclass(frozen=True)
class Programs:
    """What a run builds at its start; for each what is not there, why."""

    shim: Path | None
    why_no_shim: str
    mixed: Mapping[str, Path]
    "The Go and the C module; empty where they could not be built."
    why_not_mixed: str

    @classmethod
    def built(cls, directory: Path) -> Programs:
        shim, why_no_shim = None, ""
        mixed: Mapping[str, Path] = {}
        why_not_mixed = ""
        try:
            shim = build_shim(directory)
        except (OSError, subprocess.CalledProcessError) as fault:
            why_no_shim = f"the shim could not be built: {fault}"
            say(why_no_shim)
        try:
            mixed = build(directory)
        except NotBuilt as fault:
            why_not_mixed = f"the Go and the C module could not be built: {fault}"
            say(f"{why_not_mixed}. The node runs without them")
        return cls(shim, why_no_shim, mixed, why_not_mixed)


class Run:
    """All cells of one call, over as many rigs as it takes."""

    def __init__(self, options: argparse.Namespace, directory: Path, programs: Programs) -> None:
        self.results: list[Result] = []
        self.calm: list[float] = []
        self.rates = (0.0, 0.0)
        self.capacity = (0.0, 0.0)
        self.rigs = 0
        self._options = options
        self._directory = directory
        self._programs = programs
        self._rig: Rig | None = None
        self._load: Load | None = None
        self._pace = QUICK if options.quick else Pace()

    def cell(self, cell: Cell, chance: Random) -> Result:
        """Run it and keep what it came to."""
        result = self._attempt(cell, chance)
        self.results.append(result)
        return result

    def again(self, cell: Cell, result: Result, chance: Random) -> Result:
        """Run the cell of `result` once more, for another look at the pair's latency."""
        repeated = self._attempt(cell, chance)
        result.again.append(repeated)
        return repeated

    def is_slow(self, result: Result) -> bool:
        """Whether the unrelated pair was beyond the bar."""
        base_ms = self._base_ms()
        p99 = percentile(result.disturbed, 0.99) if result.disturbed else None
        return p99 is not None and base_ms is not None and p99 * 1000 > BAR_RATIO * base_ms

    def _attempt(self, cell: Cell, chance: Random) -> Result:
        """On a fresh rig where the last one cannot serve. Never raises for a rig that breaks."""
        result = Result(cell.victim, cell.harm.name)
        if cell.harm.needs_shim and self._programs.shim is None:
            result.why_not = self._programs.why_no_shim
        elif cell.victim in MODULES and not self._programs.mixed:
            result.why_not = self._programs.why_not_mixed
        else:
            try:
                rig, load = self._whole_rig()
                result = run_cell(cell, rig, load, self.rates, chance, self._pace)
                self.calm += result.calm
            except (RigBroken, DemoFailed, OSError) as fault:
                result.why_not = f"{type(fault).__name__}: {fault}"
            if self._options.keep_logs and self._rig is not None:
                self._rig.keep_logs(self._directory / "failed" / f"{len(self.results):03d}")
            if not result.ran or not result.is_clean or result.total.lost or result.misses:
                self._give_up(cell)
        return result

    def _whole_rig(self) -> tuple[Rig, Load]:
        if self._rig is None or self._load is None:
            self.rigs += 1
            directory = self._directory / str(self.rigs)
            self._rig = rig = Rig(directory, self._programs.shim, self._options.link, self._programs.mixed)
            rig.start()
            self._load = load = Load(rig)
            self._warm(rig, load)
            if not self.rates[0]:
                self._measure(rig, load)
        return self._rig, self._load

    def _warm(self, rig: Rig, load: Load) -> None:
        """Until a message has crossed the node in each direction."""
        load.set_rates(20.0, 20.0, others=True)
        flows = (load.uploads, load.commands, load.kept, *load.mixed.flows.values())
        work(rig, load, lambda: all(flow.came_at for flow in flows), 30.0)
        if not all(flow.came_at for flow in flows):
            raise RigBroken("no message crosses the fresh node, or not in every way")
        load.set_rates(0.0, 0.0, others=False)
        work(rig, load, load.is_settled, 10.0)

    def _measure(self, rig: Rig, load: Load) -> None:
        seconds = CAPACITY_SECONDS / (2 if self._options.quick else 1)
        self.capacity = measure_capacity(rig, load, seconds)
        self.rates = self.capacity[0] / 2, self.capacity[1] / 2
        say(
            f"capacity, both directions at once: {self.capacity[0]:.0f} uploads/s, {self.capacity[1]:.0f} commands/s; "
            "the load is half of each"
        )
        load.begin_cell()
        load.set_rates(*self.rates, others=True)
        work(rig, load, lambda: False, 1.5)
        load.latencies.clear()
        work(rig, load, lambda: False, BASELINE_SECONDS / (4 if self._options.quick else 1))
        self.calm += [took for _, took in load.latencies]
        load.set_rates(0.0, 0.0, others=False)
        work(rig, load, load.is_settled, 20.0)
        say(f"unrelated pair, loaded and undisturbed: p99 {(percentile(self.calm, 0.99) or 0) * 1000:.2f} ms")

    def _give_up(self, cell: Cell) -> None:
        if self._rig is not None:
            name = f"{len(self.results):03d}-{cell.victim}-{cell.harm.name}".replace(" ", "_")
            self._rig.keep_logs(self._directory / "failed" / name)
        self.close()

    def close(self) -> None:
        if self._load is not None:
            self._load.close()
        if self._rig is not None:
            self._rig.close()
            shutil.rmtree(self._rig.directory, ignore_errors=True)
        self._load = self._rig = None

    # --- afterwards ---

    def document(self, seed: int, seconds: float) -> dict[str, Any]:
        calm = percentile(self.calm, 0.99)
        base_ms = self._base_ms()
        cells = []
        for result in self.results:
            p99s = [percentile(each.disturbed, 0.99) for each in (result, *result.again) if each.disturbed]
            all_ms = [p99 * 1000 for p99 in p99s if p99 is not None]
            ratios = [p99_ms / base_ms for p99_ms in all_ms] if base_ms else []
            cell = as_json(result, median(ratios) if ratios else None, median(all_ms) if all_ms else None)
            cells.append(
                cell | {"unrelated_p99_ratios": [round(each, 3) for each in ratios], "link": self._options.link}
            )
        return {
            "seed": seed,
            "link": self._options.link,
            "mixed": bool(self._programs.mixed),
            "why_not_mixed": self._programs.why_not_mixed,
            "seconds": round(seconds, 1),
            "capacity_uploads_per_s": round(self.capacity[0]),
            "capacity_commands_per_s": round(self.capacity[1]),
            "undisturbed_p99_ms": round(calm * 1000, 3) if calm is not None else None,
            "undisturbed_requests": len(self.calm),
            "rigs": self.rigs,
            "cores": os.cpu_count(),
            "load_average": round(os.getloadavg()[0], 2),
            "cells": cells,
        }

    def _base_ms(self) -> float | None:
        calm = percentile(self.calm, 0.99)
        return max(FLOOR_MS, calm * 1000) if calm is not None else None


def faults(cells: Sequence[dict[str, Any]]) -> list[str]:
    """What misses the bar, in words."""
    found = []
    for cell in cells:
        name = f"{cell['victim']}:{cell['harm']}"
        if not cell["ran"]:
            found.append(f"{name} did not run: {cell['why_not']}")
            continue
        if cell["lost"]:
            found.append(f"{name}: {cell['lost']} lost")
        if not cell["settled"]:
            found.append(f"{name}: did not come to rest, {cell['commands_unanswered']} commands unanswered")
        found += [f"{name}: {miss}" for miss in cell["misses"]]
        if cell["duplicated_unexplained"]:
            found.append(f"{name}: {cell['duplicated_unexplained']} duplicates neither marked nor in the window")
        if cell["recovery_s"] is None:
            found.append(f"{name}: did not recover")
        elif _is_barred(cell) and cell["recovery_s"] >= BAR_RECOVERY_S:
            found.append(f"{name}: recovery took {cell['recovery_s']:.2f} s")
        ratio = cell["unrelated_p99_ratio"]
        if ratio is not None and ratio > BAR_RATIO:
            found.append(f"{name}: the unrelated pair's p99 is {ratio:.2f} times the undisturbed one")
    return found


def _is_barred(cell: dict[str, Any]) -> bool:
    return cell["harm"] == "SIGKILL" and cell["victim"] in ("edgehub", "broker")


def chosen(options: argparse.Namespace) -> list[Cell]:
    known = cells_of(options.link)
    cells = [cell for cell in known if not options.only or cell.name in options.only]
    unknown = set(options.only or ()) - {cell.name for cell in known}
    if unknown:
        raise SystemExit(f"chaos: no such cell: {', '.join(sorted(unknown))}. See: python -m chaos --list")
    return cells


def schedule(cells: Sequence[Cell], runs: int, chance: Random) -> list[Cell]:
    """One pass in the table's order; a long form of `runs` cells is whole passes, each in an order of its own."""
    if not runs:
        return list(cells)
    found: list[Cell] = []
    while len(found) < runs:
        found += chance.sample(list(cells), len(cells))
    return found[:runs]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.list:
        for cell in cells_of(options.link):
            say(cell.name, to=sys.stdout)
        return 0
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    chance = Random(seed)
    cells = schedule(chosen(options), options.runs, chance)
    Interrupts().listen()
    directory = Path(tempfile.mkdtemp(prefix="ezc-", dir="/tmp"))
    started = time.monotonic()
    say(f"seed {seed}, {len(cells)} cells, link {options.link}")
    run = Run(options, directory, Programs.built(directory))
    status = 1
    try:
        for number, cell in enumerate(cells, 1):
            begun = time.monotonic()
            result = run.cell(cell, Random(chance.getrandbits(32)))
            say(f"{number:3}/{len(cells)} {_line(result, time.monotonic() - begun)}")
            if options.json:
                options.json.write_text(json.dumps(run.document(seed, time.monotonic() - started), indent=1) + "\n")
        slow = [(cell, result) for cell, result in zip(cells, run.results, strict=True) if run.is_slow(result)]
        for cell, result in slow:
            for _ in range(REPEATS):
                begun = time.monotonic()
                repeated = run.again(cell, result, Random(chance.getrandbits(32)))
                say(f"  again {_line(repeated, time.monotonic() - begun)}")
        document = run.document(seed, time.monotonic() - started)
        say(render(document), to=sys.stdout)
        missed = faults(document["cells"])
        for text in missed:
            say(f"NOT as it should be: {text}", to=sys.stdout)
        say(
            f"chaos seed={seed} cells={len(cells)} lost={sum(cell['lost'] or 0 for cell in document['cells'])} "
            f"missed={len(missed)} seconds={document['seconds']:.0f}",
            to=sys.stdout,
        )
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
        status = 1 if missed else 0
    except KeyboardInterrupt:
        status = 130
    finally:
        run.close()
        if (directory / "failed").is_dir():
            say(f"logs of the cells that failed: {directory / 'failed'}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return status


def _line(result: Result, seconds: float) -> str:
    name = f"{result.victim}:{result.harm}"
    if not result.ran:
        return f"{name:32} DID NOT RUN: {result.why_not}"
    total = result.total
    recovery = "never" if result.recovery_s is None else f"{result.recovery_s:.2f} s"
    p99 = percentile(result.disturbed, 0.99) if result.disturbed else None
    notes = f"  ({'; '.join(result.notes)})" if result.notes else ""
    return (
        f"{name:32} sent {total.sent:6} lost {total.lost} mqtt {total.lost_by_mqtt} stored {total.stored} "
        f"twice {total.duplicated} (marked {total.duplicated_marked}, window {total.duplicated_in_window}, "
        f"unexplained {total.duplicated_unexplained}) back after {recovery}, "
        f"pair p99 {'-' if p99 is None else f'{p99 * 1000:.1f} ms'}, {seconds:.0f} s{notes}"
    )


def say(text: str, to: Any = None) -> None:
    print(text, file=to or sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m chaos",
        description="Break a loaded node in every way, and count what was lost. "
        "Exit status 0 only if all is as promised.",
    )
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the results there; written anew after each cell")
    add("--runs", type=int, default=0, metavar="N", help="the long form: N cells in random order; default: each once")
    add("--seed", type=int, help="of all chances; default: a random one, printed")
    add("--link", choices=LINKS, default=WSS, help="how edgehub reaches the cloud; default: wss")
    add("--only", action="append", metavar="VICTIM:HARM", help="only this cell; may be repeated")
    add("--quick", action="store_true", help="short cells with few messages: does it work at all?")
    add("--keep-logs", action="store_true", help="of all cells, not only of those that failed")
    add("--list", action="store_true", help="the names of the cells")
    return parser


if __name__ == "__main__":
    sys.exit(main())
