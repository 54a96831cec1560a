from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
import pytest

from cloudsim.hub import Action, Authorization, Drop, Forward, Hub, HubRules, Note, Peer, Read, Send
from cloudsim.rules import HubVersion
from cloudsim.wire import CloudMessage, Header, Route, decode


class Always(random.Random):
    """Chance that always, or never, strikes."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


def a_hub(race: bool = False, **rules: Any) -> Hub:
    ids = itertools.count(1)
    return Hub(
        rules=HubRules(**rules),
        new_id=lambda: f"hub-{next(ids)}",
        chance=Always(0.0 if race else 1.0),
        epoch=1000.0,
        cluster_ca="the CA",
    )


def connected(hub: Hub, node: str = "edge-a", number: int = 1, now: float = 0.0, **peer: Any) -> list[Action]:
    return hub.connect(number, Peer(node, **peer), now=now)


def up(
    operation: str,
    resource: str = "default/x/y",
    *,
    id: str = "m",
    parent: str = "",
    source: str = "edged",
    group: str = "meta",
) -> CloudMessage:
    return CloudMessage(Header(id, parent, 1), Route(source, "", group, operation, resource), "c")


def thing(uid: str, version: str = "1", operation: str = "insert") -> CloudMessage:
    return CloudMessage(
        Header(f"{uid}.{version}.{operation}", resourceversion=version),
        Route("edgecontroller", "", "resource", operation, f"node/edge-a/default/configmap/{uid}"),
        {"metadata": {"uid": uid}},
    )


def ack(hub: Hub, id: str, number: int = 1, now: float = 0.0) -> list[Action]:
    return hub.receive(number, CloudMessage(Header("x", id, 1), Route(operation="response")), now=now)


def sent(actions: list[Action], number: int = 1) -> list[str]:
    """Ids of what was written to a connection."""
    return [
        decode(action.payload).header.msg_id
        for action in actions
        if isinstance(action, Send) and action.connection == number
    ]


def drops(actions: list[Action]) -> list[int]:
    return [action.connection for action in actions if isinstance(action, Drop)]


def notes(actions: list[Action]) -> list[str]:
    return [action.what for action in actions if isinstance(action, Note)]


def forwarded(actions: list[Action]) -> list[tuple[str, str, str]]:
    return [
        (action.module, action.message.route.operation, action.message.route.resource)
        for action in actions
        if isinstance(action, Forward)
    ]


# --- connections ----------------------------------------------------------------------------------


def test_edgecontroller_hears_of_a_node_that_comes_and_goes() -> None:
    hub = a_hub()
    assert forwarded(connected(hub)) == [("edgecontroller", "connected", "node/edge-a")]
    actions = hub.disconnected(1, now=2.5)
    assert forwarded(actions) == [("edgecontroller", "disconnected", "node/edge-a")]
    event = next(action for action in actions if isinstance(action, Forward)).message
    assert (event.route.source, event.route.group) == ("cloudhub", "resource")
    assert msgspec.json.decode(event.content) == {
        "client_id": "edge-a",
        "event_type": "disconnected",
        "timestamp": 1002,
    }
    assert hub.disconnected(1, now=3.0) == []


def test_a_connection_without_keepalive_is_dropped_after_the_interval() -> None:
    hub = a_hub()
    connected(hub)
    assert hub.next_deadline() == 30.0
    assert hub.expire(now=29.99) == []
    assert drops(hub.expire(now=30.0)) == [1]
    assert hub.next_deadline() is None


def test_only_the_operation_keepalive_moves_the_limit() -> None:
    hub = a_hub(keepalive_seconds=4.0)
    connected(hub)
    for message in (up("update"), up("upload", group="user"), up("ping"), up("query", "k8s/ca.crt")):
        hub.receive(1, message, now=1.0)
    assert hub.next_deadline() == 4.0
    for _ in range(50):
        assert hub.receive(1, up("keepalive", "node", source="websocket", group="resource"), now=3.0) == []
    assert hub.next_deadline() == 7.0
    assert drops(hub.expire(now=7.0)) == [1]


@pytest.mark.parametrize("use", ["", "str"])
def test_a_connection_that_is_not_of_use_msg_has_a_session_and_is_never_read(use: str) -> None:
    hub = a_hub()
    assert Read(1, False) in connected(hub, use=use)
    assert hub.is_served("edge-a")
    assert drops(hub.expire(now=30.0)) == [1]


def test_a_connection_without_a_node_id_gets_a_session_under_the_empty_name() -> None:
    hub = a_hub()
    connected(hub, "")
    assert hub.is_served("")


def test_a_new_connection_of_a_node_replaces_the_old_one() -> None:
    hub = a_hub()
    connected(hub)
    actions = connected(hub, number=2, now=1.0)
    assert drops(actions) == [1]
    assert hub.connection_of("edge-a") == 2
    assert hub.disconnected(1, now=1.0) == []
    assert hub.is_served("edge-a")


def test_the_race_on_replacement_takes_the_new_connection_too() -> None:
    hub = a_hub(race=True)
    connected(hub)
    assert drops(connected(hub, number=2)) == [1, 2]
    assert not hub.is_served("edge-a")


def test_over_the_node_limit_a_connection_lives_without_a_session_and_is_never_told() -> None:
    hub = a_hub(node_limit=2)
    connected(hub, "edge-a", 1)
    connected(hub, "edge-b", 2)
    assert notes(connected(hub, "edge-c", 3)) == ["rejected"]
    # Upstream still works, downstream never.
    assert forwarded(hub.receive(3, up("upload", "a", group="user"), now=0.0)) == [
        ("router", "upload", "node/edge-c/a")
    ]
    assert sent(hub.receive(3, up("ping"), now=0.0), 3) == ["hub-3"]
    assert hub.receive(3, up("query", "k8s/ca.crt"), now=0.0) == []
    verdict, _ = hub.send("edge-c", thing("a"), now=0.0)
    assert verdict.dropped is not None
    hub.receive(1, up("keepalive"), now=20.0)
    hub.receive(2, up("keepalive"), now=20.0)
    assert hub.expire(now=49.0) == []
    assert [view.state for view in hub.sessions(now=49.0)] == ["served", "served", "rejected"]


def test_at_the_node_limit_a_node_cannot_replace_its_own_living_connection() -> None:
    hub = a_hub(node_limit=1)
    connected(hub)
    assert notes(connected(hub, number=2)) == ["rejected"]
    assert hub.connection_of("edge-a") == 1


@pytest.mark.parametrize(
    ("certificates", "common_name", "served"),
    [
        (1, "system:node:edge-a", True),
        (2, "system:node:edge-a", False),
        (1, "system:node:edge-b", False),
        (1, "kubeedge.io", False),
    ],
)
def test_enforced_authorization_wants_one_certificate_of_the_node(
    certificates: int, common_name: str, served: bool
) -> None:
    hub = a_hub(authorization=Authorization.ENFORCED)
    connected(hub, certificates=certificates, common_name=common_name)
    assert hub.is_served("edge-a") is served


def test_without_authorization_any_certificate_serves_any_node() -> None:
    hub = a_hub()
    connected(hub, certificates=2, common_name="kubeedge.io")
    assert hub.is_served("edge-a")


def test_a_kick_drops_rejected_connections_of_the_node_as_well() -> None:
    hub = a_hub(node_limit=1)
    connected(hub)
    connected(hub, number=2)
    assert drops(hub.kick("edge-a", now=1.0)) == [1, 2]


def test_messages_of_a_connection_that_has_ended_are_not_dispatched() -> None:
    hub = a_hub()
    connected(hub)
    hub.drop(1, now=0.0, reason="test")
    assert hub.receive(1, up("upload", group="user"), now=0.0) == []


# --- upstream --------------------------------------------------------------------------------------


def test_the_resource_is_prefixed_except_for_the_task_manager() -> None:
    hub = a_hub()
    connected(hub)
    assert forwarded(hub.receive(1, up("update", "default/nodestatus/edge-a"), now=0.0)) == [
        ("edgecontroller", "update", "node/edge-a/default/nodestatus/edge-a")
    ]
    assert forwarded(hub.receive(1, up("prepull", "r"), now=0.0)) == [("taskmanager", "prepull", "r")]


def test_the_cluster_ca_is_answered_without_needing_an_acknowledgement() -> None:
    hub = a_hub()
    connected(hub)
    (action,) = hub.receive(1, up("query", "k8s/ca.crt", id="q", source="metamanager"), now=0.5)
    assert isinstance(action, Send)
    assert decode(action.payload) == CloudMessage(
        Header("hub-2", "q", 1000500), Route("cloudhub", "", "resource", "response", "k8s/ca.crt"), "the CA"
    )


def test_control_operations_are_answered_with_the_route_of_the_request() -> None:
    hub = a_hub()
    connected(hub)
    (action,) = hub.receive(1, up("ping", "r", id="c", source="s", group="g"), now=0.0)
    assert isinstance(action, Send)
    assert decode(action.payload) == CloudMessage(
        Header("hub-2", "c", 1000000), Route("s", "", "g", "response", "r"), "ack"
    )


def test_enforced_authorization_drops_what_a_node_may_not_ask_and_admits_what_it_was_given() -> None:
    hub = a_hub(authorization=Authorization.ENFORCED)
    connected(hub, common_name="system:node:edge-a")
    query = "default/configmap/a"
    assert notes(hub.receive(1, up("query", query), now=0.0)) == ["not-admitted"]
    hub.send("edge-a", thing("a"), now=0.0)
    assert forwarded(hub.receive(1, up("query", query), now=0.0)) == [
        ("edgecontroller", "query", f"node/edge-a/{query}")
    ]


# --- downstream ------------------------------------------------------------------------------------


def test_a_message_goes_down_without_the_prefix_and_with_id_and_time() -> None:
    hub = a_hub()
    connected(hub)
    message = CloudMessage(route=Route("router_eventbus", "", "user", "publish", "node/edge-a/some/path"), content="x")
    verdict, (action,) = hub.send("edge-a", message, now=1.0)
    assert (verdict.queue, verdict.dropped) == ("no-ack", None)
    assert isinstance(action, Send)
    assert decode(action.payload) == CloudMessage(
        Header(verdict.id, "", 1001000), Route("router_eventbus", "", "user", "publish", "some/path"), "x"
    )


def test_sync_is_cleared_before_a_message_is_written() -> None:
    hub = a_hub()
    connected(hub)
    message = CloudMessage(Header("i", sync=True), Route(group="user"))
    _, (action,) = hub.send("edge-a", message, now=1.0)
    assert isinstance(action, Send)
    assert b"sync" not in action.payload


def test_no_acknowledgement_is_needed_for_what_passes_a_blocked_queue() -> None:
    hub = a_hub()
    connected(hub)
    assert sent(hub.send("edge-a", thing("a"), now=0.0)[1]) == ["a.1.insert"]
    assert sent(hub.send("edge-a", thing("b"), now=0.0)[1]) == []
    command = CloudMessage(Header("c1"), Route("router_eventbus", "", "user", "publish", "t"), "x")
    assert sent(hub.send("edge-a", command, now=0.0)[1]) == ["c1"]
    assert sent(ack(hub, "a.1.insert")) == ["b.1.insert"]


def test_retries_follow_the_clock_of_the_hub() -> None:
    hub = a_hub(keepalive_seconds=1000.0)
    connected(hub)
    hub.send("edge-a", thing("a"), now=100.0)
    times = []
    while len(times) < 7:
        deadline = hub.next_deadline()
        assert deadline is not None
        if sent(hub.expire(now=deadline)):
            times.append(deadline)
    assert times == [105.0, 110.0, 115.0, 120.0, 125.005, 130.005, 135.005]


def test_an_error_or_a_foreign_acknowledgement_does_not_acknowledge() -> None:
    hub = a_hub()
    connected(hub)
    connected(hub, "edge-b", 2)
    hub.send("edge-a", thing("a"), now=0.0)
    hub.receive(1, up("error", parent="a.1.insert"), now=0.0)
    hub.receive(1, up("response", "default/volume/v1", parent="a.1.insert"), now=0.0)
    ack(hub, "no-such")
    ack(hub, "a.1.insert", number=2)
    assert sent(hub.expire(now=5.0)) == ["a.1.insert"]
    assert notes(ack(hub, "a.1.insert", now=5.0)) == ["acknowledged"]
    assert ack(hub, "a.1.insert", now=5.0) == []


def test_what_was_acknowledged_is_not_sent_again_and_a_delete_forgets_it() -> None:
    hub = a_hub()
    connected(hub)

    def deliver(message: CloudMessage) -> list[str]:
        found = sent(hub.send("edge-a", message, now=0.0)[1])
        for id in found:
            ack(hub, id)
        return found

    assert deliver(thing("v1", "10")) == ["v1.10.insert"]
    assert deliver(thing("v1", "10")) == []
    assert deliver(thing("v1", "9", "update")) == []
    assert deliver(thing("v1", "11", "update")) == ["v1.11.update"]
    assert deliver(thing("v1", "11", "delete")) == ["v1.11.delete"]
    assert deliver(thing("v1", "11", "delete")) == ["v1.11.delete"]
    assert deliver(thing("v1", "11")) == ["v1.11.insert"]


def test_the_queue_is_thrown_away_when_the_node_connects_again() -> None:
    hub = a_hub()
    connected(hub)
    hub.send("edge-a", thing("a"), now=0.0)
    hub.send("edge-a", thing("b"), now=0.0)
    actions = connected(hub, number=2, now=1.0)
    assert sent(actions, 2) == []
    note = next(action for action in actions if isinstance(action, Note) and action.what == "disconnected")
    assert note.facts["discarded"] == 2
    hub.receive(2, up("keepalive"), now=2.0)
    assert sent(hub.expire(now=31.0), 2) == []


def test_a_message_for_an_absent_node_is_dropped_with_a_reason() -> None:
    verdict, actions = a_hub().send("nobody", thing("a"), now=0.0)
    assert verdict.dropped == "node 'nobody' has no session"
    assert notes(actions) == ["dropped"]


def test_an_invalid_object_is_dropped_with_a_reason_and_without_a_trace_on_the_wire() -> None:
    hub = a_hub()
    connected(hub)
    verdict, actions = hub.send("edge-a", thing("a", ""), now=0.0)
    assert verdict.dropped is not None
    assert sent(actions) == []


def test_nothing_is_written_while_the_node_does_not_read() -> None:
    hub = a_hub(keepalive_seconds=1000.0)
    connected(hub)
    assert hub.writable(1, False, now=0.0) == []
    command = CloudMessage(Header("c1"), Route("router_eventbus", "", "user", "publish", "t"), "x")
    assert sent(hub.send("edge-a", command, now=0.0)[1]) == []
    assert sent(hub.send("edge-a", thing("a"), now=0.0)[1]) == []
    assert hub.expire(now=60.0) == []
    assert sent(hub.writable(1, True, now=60.0)) == ["c1", "a.1.insert"]


def test_a_deleted_node_is_dropped_and_its_acknowledged_versions_forgotten() -> None:
    hub = a_hub()
    connected(hub)
    hub.send("edge-a", thing("a"), now=0.0)
    ack(hub, "a.1.insert")
    assert drops(hub.delete_node("edge-a", now=0.0)) == [1]
    connected(hub, number=2)
    assert sent(hub.send("edge-a", thing("a"), now=0.0)[1], 2) == ["a.1.insert"]


def test_a_restart_ends_all_and_keeps_what_was_acknowledged() -> None:
    hub = a_hub()
    connected(hub)
    connected(hub, "edge-b", 2)
    hub.send("edge-a", thing("a"), now=0.0)
    ack(hub, "a.1.insert")
    assert sorted(drops(hub.reset(now=1.0))) == [1, 2]
    connected(hub, number=3, now=2.0)
    assert sent(hub.send("edge-a", thing("a"), now=2.0)[1], 3) == []


# --- the hub of 2019 -------------------------------------------------------------------------------


def test_the_hub_of_2019_writes_once_and_forwards_the_acknowledgement() -> None:
    hub = a_hub(version=HubVersion.TREE_2019, keepalive_seconds=1000.0)
    connected(hub)
    assert sent(hub.send("edge-a", thing("a", ""), now=0.0)[1]) == ["a..insert"]
    assert hub.expire(now=60.0) == []
    assert forwarded(ack(hub, "a..insert", now=60.0)) == [("edgecontroller", "response", "node/edge-a/")]
    assert forwarded(hub.receive(1, up("query", "k8s/ca.crt"), now=60.0)) == [
        ("edgecontroller", "query", "node/edge-a/k8s/ca.crt")
    ]


def test_at_the_hub_of_2019_a_second_connection_waits_for_the_first() -> None:
    hub = a_hub(version=HubVersion.TREE_2019)
    connected(hub)
    assert connected(hub, number=2, now=1.0) == [Read(2, False)]
    assert hub.connection_of("edge-a") == 1
    assert Read(2, True) in hub.disconnected(1, now=2.0)
    assert hub.connection_of("edge-a") == 2


def test_at_the_hub_of_2019_the_second_connection_is_told_and_dropped_after_30_seconds() -> None:
    hub = a_hub(version=HubVersion.TREE_2019, keepalive_seconds=1000.0)
    connected(hub)
    connected(hub, number=2, now=1.0)
    actions = hub.expire(now=31.0)
    assert drops(actions) == [2]
    notice = next(action for action in actions if isinstance(action, Send))
    assert decode(notice.payload).route == Route("resource", "", "cloudhub", "disconnected")
    assert hub.connection_of("edge-a") == 1


# --- what is asked for, and what an operator changes -------------------------------------------------------


def test_a_race_that_is_asked_for_takes_the_next_replacement_and_no_other() -> None:
    hub = a_hub()
    hub.races_due["edge-a"] = 1
    connected(hub, number=1)
    assert drops(connected(hub, number=2)) == [1, 2]
    connected(hub, number=3)
    assert drops(connected(hub, number=4)) == [3]


def test_debugging_authorization_tells_and_admits() -> None:
    hub = a_hub(authorization=Authorization.DEBUG)
    assert "would-be-rejected" in notes(connected(hub, certificates=2))
    actions = hub.receive(1, up("query", "default/secret/s"), now=0.0)
    assert notes(actions) == ["would-not-be-admitted"]
    assert any(isinstance(action, Forward) for action in actions)


def test_the_hub_of_2019_has_no_authorization() -> None:
    hub = a_hub(version=HubVersion.TREE_2019, authorization=Authorization.ENFORCED)
    connected(hub, certificates=0)
    assert hub.is_served("edge-a")
    assert any(isinstance(action, Forward) for action in hub.receive(1, up("query", "default/secret/s"), now=0.0))


def test_over_its_limit_the_hub_of_2019_drops_what_comes_up() -> None:
    hub = a_hub(version=HubVersion.TREE_2019, node_limit=0)
    connected(hub)
    assert hub.receive(1, up("update"), now=0.0) == []


def test_a_message_of_2019_has_no_version_type_or_destination() -> None:
    hub = a_hub(version=HubVersion.TREE_2019)
    connected(hub)
    message = thing("a")
    message.header.type, message.route.destination = "channel", "there"
    _, (action,) = hub.send("edge-a", message, now=0.0)
    assert isinstance(action, Send)
    assert decode(action.payload) == CloudMessage(
        Header("a.1.insert", timestamp=1000_000),
        Route("edgecontroller", "", "resource", "insert", "default/configmap/a"),
        {"metadata": {"uid": "a"}},
    )


def test_at_the_hub_of_2019_a_node_that_does_not_read_holds_up_the_others() -> None:
    hub = a_hub(version=HubVersion.TREE_2019)
    connected(hub)
    connected(hub, "edge-b", 2)
    hub.writable(1, False, now=0.0)

    def send(node: str, name: str) -> tuple[str, list[str]]:
        verdict, actions = hub.send(node, thing(name), now=0.0)
        return verdict.queue, sent(actions, 2)

    assert [send("edge-a", f"a{number}")[0] for number in range(10)] == ["no-ack"] * 10
    assert send("edge-b", "b0") == ("no-ack", ["b0.1.insert"])
    assert send("edge-a", "a10") == ("held-up", [])
    assert send("edge-b", "b1") == ("held-up", [])
    actions = hub.writable(1, True, now=1.0)
    assert sent(actions, 1) == [f"a{number}.1.insert" for number in range(11)]
    assert sent(actions, 2) == ["b1.1.insert"]


def test_the_end_of_a_node_lets_the_dispatcher_of_2019_go_on() -> None:
    hub = a_hub(version=HubVersion.TREE_2019)
    connected(hub)
    connected(hub, "edge-b", 2)
    hub.writable(1, False, now=0.0)
    for number in range(11):
        hub.send("edge-a", thing(f"a{number}"), now=0.0)
    hub.send("edge-b", thing("b"), now=0.0)
    actions = hub.disconnected(1, now=1.0)
    assert sent(actions, 2) == ["b.1.insert"]
    assert "dropped" in notes(actions)
