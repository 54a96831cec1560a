"""Verdicts on paper; and docs/conformance.md has every check."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from runtime.conform import broker_checks, module_checks, report
from runtime.conform.module_stage import LACKING, Traits
from runtime.conform.play import FAIL, NOT_APPLICABLE, PASS, Check, Result

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "conformance.md").read_text()
EMP = (DOCS / "emp.md").read_text()
CHECK = Check("who", "9, 17 rule 8", "WHO is answered")
ALL = [*module_checks.ALL, *broker_checks.CHECKS]


def test_a_verdict_is_a_line_and_a_failure_shows_why() -> None:
    assert list(report.lines(Result(CHECK, PASS))) == ["pass  who                  WHO is answered"]
    assert list(report.lines(Result(CHECK, NOT_APPLICABLE, "it sends nothing"))) == [
        "n/a   who                  it sends nothing"
    ]
    assert list(report.lines(Result(CHECK, FAIL, "no HELLO", ("0.1 > WHO/1",), log="a line\nanother"))) == [
        "FAIL  who                  no HELLO",
        "      demanded: WHO is answered (docs/emp.md 9, 17 rule 8)",
        "      0.1 > WHO/1",
        "      it printed:",
        "      | a line",
        "      | another",
    ]


def test_the_last_line_and_the_document_count() -> None:
    results = [Result(CHECK, PASS), Result(CHECK, FAIL, "no", ("frame",)), Result(CHECK, NOT_APPLICABLE, "none")]
    assert report.summary(results, 1.26) == "passed=1 failed=1 not-applicable=1 seconds=1.3"
    document = json.loads(json.dumps(report.document(results, 1.26, Traits(name="echo", groups=("g",), answers=True))))
    assert (document["passed"], document["failed"], document["not_applicable"]) == (1, 1, 1)
    assert document["checks"][1] == {
        "name": "who",
        "section": "9, 17 rule 8",
        "says": "WHO is answered",
        "outcome": "fail",
        "why": "no",
        "frames": ["frame"],
        "seconds": 0.0,
        "log": "",
    }
    assert document["module"]["name"] == "echo"
    assert document["module"]["answers"]
    assert "module" not in report.document(results, 1.0)


def test_what_a_module_has_shown_is_told() -> None:
    traits = Traits(name="echo", groups=("a", "b"), liveness=3.0, answers=True, sends=True)
    assert report.traits_line(traits) == "module echo: answers, sends; groups a, b; liveness 3 s"
    assert report.traits_line(Traits(name="x")) == "module x: handles what it gets; no groups; liveness 15 s"
    assert traits.lacking(("answers", "groups")) == ""
    assert traits.lacking(("answers", "asks")) == LACKING["asks"]


def test_checks_are_chosen_by_pattern() -> None:
    assert report.choose(ALL, []) == ALL
    assert [check.name for check in report.choose(module_checks.ALL, ["resend-*", "who"])] == [
        "who",
        "resend-who",
        "resend-restart",
        "resend-part",
    ]
    assert list(report.listed([CHECK])) == ["who                  WHO is answered (9, 17 rule 8)"]


@pytest.mark.parametrize("check", ALL, ids=lambda check: check.name)
def test_every_check_is_in_the_page_and_names_a_section_of_emp_md(check: Check) -> None:
    assert f"| `{check.name}` | {check.says} | {check.section} |" in PAGE
    for place in check.section.split(", "):
        number, _, rest = place.partition(" ")
        assert re.search(rf"^## {number}\. ", EMP, re.M), place
        if rest.startswith("rule"):
            assert f"**R{rest[1:]}.**" in EMP, place
        elif rest:
            assert rest.lower() in EMP.lower(), place
    assert set(check.needs) <= set(LACKING)


def test_the_page_has_no_other_checks_and_counts_them() -> None:
    named = re.findall(r"^\| `([a-z-]+)` \|", PAGE[PAGE.index("## The checks of a module") :], re.M)
    assert named == [check.name for check in ALL]
    assert f"{len(module_checks.ALL)} checks." in PAGE
    assert f"{len(broker_checks.CHECKS)} checks." in PAGE
    for rows in (module_checks.ALL, broker_checks.CHECKS):
        names = [check.name for check in rows]
        assert len(set(names)) == len(names)
