"""Verdicts as lines for people and as a document for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

from runtime.conform.module_stage import Traits
from runtime.conform.play import FAIL, NOT_APPLICABLE, PASS, Check, Result

WORDS: Final = {PASS: "pass", FAIL: "FAIL", NOT_APPLICABLE: "n/a"}
_NAME_WIDTH: Final = 20


def choose(checks: Iterable[Check], patterns: Sequence[str]) -> list[Check]:
    """The checks whose names match one of the patterns; all without patterns."""
    return [check for check in checks if not patterns or any(fnmatchcase(check.name, each) for each in patterns)]


def listed(checks: Iterable[Check]) -> Iterator[str]:
    """A line for each check: its name, where it stands, what is demanded."""
    for check in checks:
        yield f"{check.name:<{_NAME_WIDTH}} {check.says} ({check.section})"


def lines(result: Result) -> Iterator[str]:
    """A verdict; with the frames that show it when it is a failure."""
    check = result.check
    word = WORDS[result.outcome]
    if result.outcome == PASS:
        yield f"{word:<5} {check.name:<{_NAME_WIDTH}} {check.says}"
        return
    if result.outcome == NOT_APPLICABLE:
        yield f"{word:<5} {check.name:<{_NAME_WIDTH}} {result.why}"
        return
    yield f"{word:<5} {check.name:<{_NAME_WIDTH}} {result.why}"
    yield f"      demanded: {check.says} (docs/emp.md {check.section})"
    yield from (f"      {frame}" for frame in result.frames)
    if result.log:
        yield "      it printed:"
        yield from (f"      | {line}" for line in result.log.splitlines())


def traits_line(traits: Traits) -> str:
    """What a module has shown of itself."""
    shown = [word for word in ("answers", "echoes", "sends", "asks", "retains") if getattr(traits, word)]
    groups = f"; groups {', '.join(traits.groups)}" if traits.groups else "; no groups"
    return f"module {traits.name}: {', '.join(shown) or 'handles what it gets'}{groups}; liveness {traits.liveness:g} s"


def summary(results: Iterable[Result], seconds: float) -> str:
    """The last line."""
    counts = Counter(result.outcome for result in results)
    return f"passed={counts[PASS]} failed={counts[FAIL]} not-applicable={counts[NOT_APPLICABLE]} seconds={seconds:.1f}"


def document(results: Sequence[Result], seconds: float, traits: Traits | None = None) -> dict[str, Any]:
    """All of it, for `--json`."""
    counts = Counter(result.outcome for result in results)
    found: dict[str, Any] = {
        "passed": counts[PASS],
        "failed": counts[FAIL],
        "not_applicable": counts[NOT_APPLICABLE],
        "seconds": round(seconds, 1),
        "checks": [
            {
                "name": result.check.name,
                "section": result.check.section,
                "says": result.check.says,
                "outcome": result.outcome,
                "why": result.why,
                "frames": list(result.frames),
                "seconds": result.seconds,
                "log": result.log,
            }
            for result in results
        ],
    }
    if traits is not None:
        found["module"] = {
            "name": traits.name,
            "groups": list(traits.groups),
            "liveness_seconds": traits.liveness,
            **{word: getattr(traits, word) for word in ("answers", "echoes", "sends", "asks", "retains")},
        }
    return found
