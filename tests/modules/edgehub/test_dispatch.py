import json
from pathlib import Path

import pytest

from modules.edgehub.dialect import BEFORE_1_17, CURRENT, TREE_2019
from modules.edgehub.dispatch import Received, Seen, destination
from runtime.message import Message, from_cloud_json
from runtime.names import Group

VECTORS = Path(__file__).parents[2] / "vectors" / "cloudlink"


@pytest.mark.parametrize(
    ("group", "source", "owner"),
    [
        ("resource", "edgecontroller", Group("meta")),
        ("resource", "devicecontroller", Group("meta")),
        ("func", "edgecontroller", Group("meta")),
        ("twin", "devicecontroller", Group("twin")),
        ("user", "router_eventbus", "eventbus"),
        ("user", "router_servicebus", "servicebus"),
        ("user", "router_rest", "servicebus"),
        ("user", "somebody", None),
        ("taskmanager", "taskmanager", Group("taskmanager")),
        ("cloudhub", "resource", None),
        ("", "", None),
    ],
)
def test_the_group_decides_and_for_user_the_source(group: str, source: str, owner: str | None) -> None:
    for dialect in (CURRENT, BEFORE_1_17):
        assert destination(Message(group=group, source=source), dialect) == owner
        assert destination(Message(group=group, source=source, parent_id="p"), dialect) == owner


@pytest.mark.parametrize(
    ("group", "source", "owner"),
    [
        ("resource", "edgecontroller", Group("meta")),
        ("func", "edgecontroller", Group("meta")),
        ("twin", "devicecontroller", Group("twin")),
        ("user", "router_eventbus", Group("bus")),
        ("user", "somebody", Group("bus")),
        ("taskmanager", "taskmanager", None),
        ("cloudhub", "resource", None),
    ],
)
def test_in_2019_the_group_alone_decides(group: str, source: str, owner: str | None) -> None:
    assert destination(Message(group=group, source=source), TREE_2019) == owner


def test_every_recorded_downstream_message_has_an_owner() -> None:
    for vector in json.loads((VECTORS / "ws_session.json").read_text())["vectors"]:
        if vector["direction"] == "cloud->edge":
            assert destination(from_cloud_json(vector["text"]), CURRENT) is not None, vector["name"]


def test_a_repeat_of_what_is_in_hand_or_done_is_known() -> None:
    received = Received()
    assert received.receive("a") is Seen.NEW
    assert received.receive("a") is Seen.IN_HAND
    received.handled("a")
    assert received.receive("a") is Seen.DONE


def test_what_was_refused_is_new_again() -> None:
    received = Received()
    received.receive("a")
    received.refused("a")
    assert received.receive("a") is Seen.NEW


def test_the_memory_is_bounded_and_the_oldest_is_forgotten() -> None:
    received = Received(capacity=3)
    for name in "abcd":
        received.receive(name)
        received.handled(name)
    assert len(received) == 3
    assert received.receive("d") is Seen.DONE
    assert received.receive("a") is Seen.NEW
    received.handled("never seen")
    assert len(received) == 3
