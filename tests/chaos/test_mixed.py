"""The Go and the C module of a chaos node: the account of their messages, and a machine that cannot build them."""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import pytest

from chaos import build as building
from chaos.__main__ import Programs, Run, faults
from chaos.harms import CELLS, Cell
from chaos.mixed import GO, MODULES, C, Exchange

ROOT = Path(__file__).parents[2]


def exchange(*lines: str) -> Exchange:
    made = Exchange()
    for line in lines:
        made.sent(line.split(" "))
    return made


def test_a_message_counts_as_accepted_only_with_its_receipt() -> None:
    told = exchange("G go 0", "S k.go.0.1. 1.0", "S k.go.0.2. 1.0", "R k.go.0.2. 1.5")
    assert told.flows["k.go"].missing() == ["k.go.0.2."]
    assert not told.is_settled()
    assert told.has_arrived("k.go.0.2.", 1.4)
    assert told.is_settled()


def test_a_refusal_is_told_with_its_reason_and_is_no_loss() -> None:
    told = exchange("S m.c.0.1. 1.0")
    assert told.sent(["X:outbox-full", "m.c.0.1.", "1.5"]) == "outbox-full"
    assert told.is_settled()


def test_a_question_without_an_answer_in_its_time_is_lost() -> None:
    told = exchange("G go 0", "S q.go.0.1. 1.0", "S q.go.0.2. 1.0", "A q.go.0.1. 1.1")
    assert not told.is_settled()
    told.sent(["T", "q.go.0.2.", "31.0"])
    assert told.flows["q.go"].counts(harm_at=1.0, over_at=2.0, window_seconds=3.0).lost == 1


def test_a_process_that_dies_takes_its_questions_with_it_and_nobody_elses() -> None:
    told = exchange("G go 0", "S q.go.0.1. 1.0", "G c 1")
    assert not told.is_settled()
    told.sent(["G", "go", "1"])
    assert told.is_settled()
    assert told.flows["q.go"].counts(harm_at=1.0, over_at=2.0, window_seconds=3.0).lost == 0


def test_what_an_earlier_cell_sent_is_not_counted() -> None:
    told = exchange("R k.c.0.1. 1.5")
    assert not told.has_arrived("k.c.0.1.", 1.6)
    assert not told.has_arrived("u.1.0.5.", 1.6)
    assert told.is_settled()


def test_every_pass_harms_both_modules_and_has_one_replaced_while_it_stands_still() -> None:
    for name in MODULES:
        harms = {cell.harm.name: cell.harm for cell in CELLS if cell.victim == name}
        assert {"SIGKILL", "SIGTERM", "SIGSTOP", "SIGSTOP past liveness", "SIGSTOP replaced"} <= set(harms)
        assert harms["SIGSTOP replaced"].must_fence


def test_where_the_modules_cannot_be_built_their_cells_did_not_run_and_have_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "cc")
    assert building.missing() == ["Go 1.22", "C compiler"]
    programs = Programs.built(tmp_path)
    assert not programs.mixed
    run = Run(argparse.Namespace(link="wss", quick=True, keep_logs=False), tmp_path, programs)
    for name in (GO, C):
        run.cell(Cell(name, CELLS[0].harm), Random(1))
    document = run.document(1, 1.0)
    assert document["mixed"] is False
    for cell in document["cells"]:
        assert cell["ran"] is False
        assert cell["sent"] is cell["arrived"] is cell["lost"] is None
        assert "no Go 1.22, no C compiler" in cell["why_not"]
    assert len(faults(document["cells"])) == 2


def test_the_go_module_pins_what_the_example_pins() -> None:
    ours, examples = ROOT / "chaos" / "modules" / "go", ROOT / "examples" / "go"
    assert (ours / "go.sum").read_text() == (examples / "go.sum").read_text()
    pinned = {tuple(line.split()[:2]) for line in (examples / "go.mod").read_text().splitlines() if "\t" in line}
    assert pinned
    assert pinned <= {tuple(line.split()[:2]) for line in (ours / "go.mod").read_text().splitlines()}
