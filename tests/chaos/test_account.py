"""What counts as lost, stored, or come twice for a reason."""

from __future__ import annotations

from typing import Any

from chaos.account import Counts, Flow, percentile
from chaos.table import render


def counts(flow: Flow, **facts: Any) -> Counts:
    return flow.counts(**{"harm_at": 10.0, "over_at": 12.0, "window_seconds": 1.0, **facts})


def flow_of(*keys: str, accepted: bool = True, sent_at: float = 9.5) -> Flow:
    flow = Flow()
    for key in keys:
        flow.send(key, sent_at)
        if accepted:
            flow.accept(key, sent_at)
    return flow


def test_what_was_accepted_and_did_not_arrive_is_lost() -> None:
    flow = flow_of("a", "b")
    flow.arrive("a", 10.0)
    assert counts(flow).lost == 1
    assert flow.missing() == ["b"]


def test_what_was_never_accepted_is_not_lost() -> None:
    assert counts(flow_of("a", accepted=False)).lost == 0


def test_what_is_stored_is_not_lost() -> None:
    found = counts(flow_of("a"), stored={"a"})
    assert (found.stored, found.lost) == (1, 0)


def test_a_killed_mqtt_broker_answers_only_for_what_the_node_had_not_acknowledged() -> None:
    flow = flow_of("a", "b")
    found = counts(flow, node_has={"a"}, mqtt_lost_until=[10.0])
    assert (found.lost, found.lost_by_mqtt) == (1, 1)


def test_a_living_mqtt_broker_answers_for_nothing() -> None:
    assert counts(flow_of("a"), node_has=set(), mqtt_lost_until=[]).lost == 1


def test_what_a_new_mqtt_broker_accepted_after_the_death_is_the_nodes() -> None:
    assert counts(flow_of("a", sent_at=15.0), node_has=set(), mqtt_lost_until=[10.0]).lost == 1


def test_a_command_that_was_on_its_way_at_a_cut_has_a_column_of_its_own() -> None:
    flow = flow_of("before", sent_at=9.5)
    flow.send("after", 15.0)
    flow.accept("after", 15.0)
    found = counts(flow, cuts=[4.0, 10.0])
    assert (found.cut, found.lost) == (1, 1)


def test_without_a_cut_a_command_that_does_not_come_is_lost() -> None:
    assert counts(flow_of("a"), cuts=[]).lost == 1
    assert counts(flow_of("a"), cuts=[3.0]).lost == 1, "the cut was before it was sent"


def test_a_killed_mqtt_broker_answers_for_commands_that_it_had_acknowledged() -> None:
    found = counts(flow_of("a", "b"), mqtt_has={"a"}, mqtt_lost_until=[10.0])
    assert (found.lost, found.lost_by_mqtt) == (1, 1)


def test_a_repetition_with_the_same_id_is_marked() -> None:
    flow = flow_of("a")
    flow.arrive("a", 9.0, message_id="1")
    flow.arrive("a", 11.0, message_id="1")
    found = counts(flow)
    assert (found.arrived, found.duplicated, found.duplicated_marked) == (1, 1, 1)


def test_a_repetition_under_another_id_is_excused_only_near_the_harm() -> None:
    near, far = flow_of("a"), flow_of("a", sent_at=2.0)
    for flow, first in ((near, 9.8), (far, 2.1)):
        flow.arrive("a", first, message_id="1")
        flow.arrive("a", 11.0, message_id="2")
    assert counts(near).duplicated_in_window == 1
    assert counts(far).duplicated_unexplained == 1


def test_a_repetition_of_what_was_sent_after_the_harm_is_unexplained() -> None:
    flow = flow_of("a", sent_at=13.0)
    flow.arrive("a", 13.1)
    flow.arrive("a", 13.2)
    assert counts(flow).duplicated_unexplained == 1


def test_a_redelivered_message_is_marked() -> None:
    flow = flow_of("a", sent_at=13.0)
    flow.arrive("a", 13.1)
    flow.arrive("a", 13.2, is_marked=True)
    assert counts(flow).duplicated_marked == 1


def test_sums_add_up() -> None:
    assert Counts(sent=1, lost=2) + Counts(sent=3, arrived=4) == Counts(sent=4, arrived=4, lost=2)


def test_the_percentile_of_nothing_is_unknown() -> None:
    assert percentile([], 0.99) is None
    assert percentile([float(n) for n in range(100)], 0.99) == 99.0


def test_a_cell_that_did_not_run_shows_no_number() -> None:
    cells = [{"victim": "edgehub", "harm": "disk full", "ran": False, "why_not": "no compiler"}]
    text = render(
        {"cells": cells, "capacity_uploads_per_s": 1, "capacity_commands_per_s": 1, "undisturbed_p99_ms": None}
    )
    assert "did not run: no compiler" in text
    assert "0" not in text.splitlines()[1]
