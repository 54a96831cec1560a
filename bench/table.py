"""Tables of plain text for the terminal and for the docs. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from bench.stats import Summary

NOT_RUN = "not run"


def number(value: float) -> str:
    """A value with as many digits as mean something: 12.3 k stays readable, 0.82 s stays exact."""
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"


def cell(summary: Summary | None) -> str:
    """Median and range, or that there was no run."""
    if summary is None:
        return NOT_RUN
    if summary.rounds == 1:
        return number(summary.median)
    return f"{number(summary.median)} ({number(summary.low)} – {number(summary.high)})"


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first column is left-aligned, the others right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = (
        "|" + "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    )
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
