"""The report on how nodes came back."""

from __future__ import annotations

from bench.links import report


def test_the_report_counts_dials_and_tells_when_nodes_were_served() -> None:
    text = report(2.0, [-1.0, -0.5, 0.01, 0.02, 0.03, 1.0], [0.1, 0.2, 0.7, 3.0])
    lines = text.splitlines()
    assert lines[0] == "cloud away for 2 s, 4 nodes: 2 dials meanwhile, 4 after it; at most 3 in 0.1 s"
    assert "half after 0.2 s" in lines[1]
    assert "the last after 3.0 s" in lines[1]
    assert [line.split()[:3:2] for line in lines[2:]] == [["0.0", "2"], ["0.5", "1"], ["3.0", "1"]]
