"""A cell in which the unrelated pair was slow is looked at again, and every run of it counts."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from chaos.__main__ import Programs, Run, faults
from chaos.account import Counts
from chaos.run import Result


def result(p99_ms: float, *, lost: int = 0, misses: tuple[str, ...] = ()) -> Result:
    return Result(
        "keeper",
        "SIGSTOP",
        ran=True,
        flows={"uploads": Counts(sent=1000, lost=lost)},
        recovery_s=0.1,
        disturbed=[p99_ms / 1000] * 100,
        is_settled=True,
        misses=list(misses),
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(argparse.Namespace(link="wss", quick=False, keep_logs=False), tmp_path, Programs(None, "", {}, ""))
    made.calm = [0.010] * 100
    return made


def cell_of(run: Run) -> dict[str, object]:
    (cell,) = run.document(1, 1.0)["cells"]
    return dict(cell)


def test_the_median_of_three_runs_counts(run: Run) -> None:
    first = result(25)
    run.results.append(first)
    assert run.is_slow(first)
    assert not run.is_slow(result(19))
    assert faults([cell_of(run)]) == ["keeper:SIGSTOP: the unrelated pair's p99 is 2.50 times the undisturbed one"]
    first.again += [result(12), result(18)]
    cell = cell_of(run)
    assert cell["unrelated_p99_ratio"] == 1.8
    assert cell["unrelated_p99_ratios"] == [2.5, 1.2, 1.8]
    assert faults([cell]) == []


def test_what_is_slow_again_misses_the_bar(run: Run) -> None:
    first = result(25)
    first.again += [result(12), result(40)]
    run.results.append(first)
    assert cell_of(run)["unrelated_p99_ratio"] == 2.5
    assert len(faults([cell_of(run)])) == 1


def test_what_a_repeat_lost_or_did_not_show_counts(run: Run) -> None:
    first = result(25)
    broken = Result("keeper", "SIGSTOP", why_not="the rig broke")
    first.again += [result(12, lost=3, misses=("not fenced",)), broken]
    run.results.append(first)
    assert faults([cell_of(run)]) == [
        "keeper:SIGSTOP: 3 lost",
        "keeper:SIGSTOP: not fenced",
        "keeper:SIGSTOP: did not run again: the rig broke",
    ]
