from __future__ import annotations

import pytest

from bench.stats import Summary
from bench.table import cell, number, render


@pytest.mark.parametrize(
    ("value", "text"), [(134567.8, "134 568"), (446.21, "446"), (12.34, "12.3"), (0.816, "0.82"), (0.0, "0.00")]
)
def test_a_number_shows_the_digits_that_mean_something(value: float, text: str) -> None:
    assert number(value) == text


def test_a_cell_shows_median_and_range() -> None:
    assert cell(Summary(3.0, 1.0, 5.0, 3)) == "3.00 (1.00 – 5.00)"


def test_one_round_has_no_range() -> None:
    assert cell(Summary(3.0, 3.0, 3.0, 1)) == "3.00"


def test_a_contender_that_did_not_run_is_said_not_to_have() -> None:
    assert cell(None) == "not run"


def test_columns_line_up() -> None:
    table = render(["what", "value"], [["a", "1"], ["longer", "1 000"]])
    assert table.splitlines() == [
        "| what   | value |",
        "|--------|------:|",
        "| a      |     1 |",
        "| longer | 1 000 |",
    ]
