"""`edgezmq status`: joining what supervisord and the bus know, and showing it."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runtime.cli import showing
from runtime.cli.showing import _problems_of, collect, duration, join, render, size
from runtime.home import Home
from runtime.supervisord import Program


def program(name: str, state: str = "RUNNING", pid: int = 7, exit_status: int = 0) -> Program:
    return Program(name, state, pid, exit_status, 65 if pid else 0, "detail")


def on_bus(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "state": "attached",
        "pid": 7,
        "incarnation": "0123456789abcdef",
        "queued": 3,
        "in_flight": 5,
        "oldest_age_ms": 1500,
        "delivered": 1000,
        "redelivered": 2,
        "refused": {"denied": 1, "expired": 0},
        "latency": {},
        **more,
    }


def status(*modules: dict[str, Any], link: dict[str, Any] | None = None) -> dict[str, Any]:
    for module in modules:
        module |= {"pss_bytes": 15 * 2**20, "rss_bytes": 30 * 2**20}
    return {
        "running": True,
        "node": "edge-1",
        "home": "/h",
        "supervisor": {"pid": 1, "pss_bytes": 2**24, "rss_bytes": 2**25},
        "broker": {"bytes_held": 2048, "byte_budget": 64 * 2**20},
        "modules": list(modules),
        "link": link,
        "problems": [problem for module in modules for problem in _problems_of(module)],
    }


def shown(document: dict[str, Any], width: int = 200) -> str:
    out = io.StringIO()
    render(document, Console(file=out, width=width, force_terminal=True, color_system=None))
    return out.getvalue()


def test_a_program_and_its_module_are_one_row_and_strangers_follow() -> None:
    counts = {"edgehub": {"restarts": 4, "hangs": 1, "in_storm": False}}
    rows = join([program("broker"), program("edgehub")], [on_bus("cam"), on_bus("edgehub")], counts)
    assert [row["name"] for row in rows] == ["broker", "edgehub", "cam"]
    broker, edgehub, cam = rows
    assert (broker["state"], broker["process"]) == (None, "running")
    assert (edgehub["state"], edgehub["restarts"], edgehub["queued"]) == ("attached", 4, 3)
    assert (cam["process"], cam["pid"]) == (None, 7)
    assert "latency" not in cam


def test_the_table_shows_each_modules_numbers() -> None:
    [row] = join([program("edgehub")], [on_bus("edgehub")], {})
    text = shown(status(row, link={"state": "served", "endpoint": "cloud:10000"}))
    assert "cloud link served (cloud:10000)" in text
    why = {"state": "served", "why": "served by cloud:10000", "endpoint": "cloud:10000"}
    assert "cloud link served (cloud:10000)" in shown(status(row, link=why))
    away = {"state": "closed", "why": "refused", "waiting": 5, "unconfirmed": 1, "stored": 4}
    assert "cloud link closed (refused), 6 on their way up (4 on disk)" in shown(status(row, link=away))
    assert "cloud link dialling (refused)" in shown(status(row, link={"state": "dialling", "why": "refused"}))
    assert "bus 2.0 KiB of 64.0 MiB held" in text
    cells = next(line.split() for line in text.splitlines() if line.startswith("edgehub"))
    expected = "edgehub attached 7 1 m 5 s 3 5 1 s 1000 2 1 0 15.0 30.0 01234567"
    assert " ".join(cells) == expected
    assert "refused by or for edgehub: denied 1\n" in text


def test_a_narrow_terminal_loses_columns_and_no_line_is_broken() -> None:
    [row] = join([program("edgehub")], [on_bus("edgehub")], {})
    text = shown(status(row), width=70)
    assert "RSS" not in text
    assert "queued" in text
    assert max(map(len, text.splitlines()[2:])) <= 70


def test_a_module_that_configuration_disables_is_shown_as_disabled() -> None:
    [row] = join([program("mqtt-broker", "EXITED", 0)], [], {})
    assert "disabled" in shown(status(row))
    assert _problems_of(row) == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (join([program("x", "FATAL", 0, 1)], [], {}), "x does not start: detail (edgezmq logs x)"),
        (join([program("x")], [], {"x": {"in_storm": True}}), "x is restarted again and again (edgezmq logs x)"),
        (join([program("x")], [on_bus("x", state="silent")], {}), "x is silent: it hangs or blocks"),
        (
            join([], [on_bus("x", state="absent", declared=True)], {}),
            "x is absent: 3 messages wait for it, and their senders with them",
        ),
    ],
)
def test_what_is_wrong_is_said_in_words(row: list[dict[str, Any]], problem: str) -> None:
    assert _problems_of(row[0]) == [problem]


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ({"state": "dialling", "why": "connection refused"}, "no link to the cloud: dialling (connection refused)"),
        ({"state": "unproven"}, "the link is unproven: CloudHub is older than 1.17, or has rejected this node"),
        ({"state": "served", "bottleneck": "messageQPS"}, "uploads are held back by messageQPS"),
    ],
)
def test_a_link_that_is_not_well_is_a_problem(link: dict[str, Any], problem: str) -> None:
    assert showing._link_problems(link) == [problem]


def test_without_a_node_the_status_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEZMQ_BUS", raising=False)
    document = collect(Home(tmp_path))
    assert (document["running"], document["problems"], document["modules"]) == (False, [], [])
    assert "not running" in shown(document)


def test_numbers_are_for_people() -> None:
    assert [size(n) for n in (None, 0, 1023, 2048, 3 * 2**20, 5 * 2**30)] == [
        *("-", "0 B", "1023 B", "2.0 KiB", "3.0 MiB", "5.0 GiB")
    ]
    assert [duration(s) for s in (None, 0.25, 4, 200, 7500, 273_600)] == [
        *("-", "250 ms", "4 s", "3 m 20 s", "2 h 5 m", "3 d 4 h")
    ]
