from __future__ import annotations

import json

from cloudsim.recorder import Happened, Received, Recorder
from cloudsim.wire import CloudMessage, Header, Route, encode


def a_message(id: str = "m", content: object = "c") -> CloudMessage:
    return CloudMessage(Header(id, timestamp=1), Route("bus", "", "user", "upload", "t"), content)


def put(recorder: Recorder, message: CloudMessage, module: str = "router") -> None:
    recorder.message("edge-a", module, message, encode(message), 1.5)


def test_a_message_is_shown_as_the_cloud_module_sees_it() -> None:
    recorder = Recorder(10, 10_000, 10)
    put(recorder, a_message(content={"i": 9007199254740993}))
    (received,) = recorder.received()
    assert json.loads(received.line()) == {
        "seq": 1,
        "at": 1.5,
        "event": "message",
        "node": "edge-a",
        "to": "router",
        "message": {
            "header": {"msg_id": "m", "timestamp": 1},
            "route": {"source": "bus", "group": "user", "operation": "upload", "resource": "node/edge-a/t"},
            "content": {"i": 9007199254740992},
        },
    }
    assert (received.resource, received.route.resource) == ("t", "node/edge-a/t")


def test_the_task_manager_and_the_hubs_own_messages_get_no_prefix() -> None:
    recorder = Recorder(10, 10_000, 10)
    put(recorder, a_message(), "taskmanager")
    recorder.from_hub("edge-a", "edgecontroller", CloudMessage(route=Route(resource="node/edge-a")), 1.5)
    assert [received.route.resource for received in recorder.received()] == ["t", "node/edge-a"]


def test_repeated_ids_are_counted() -> None:
    recorder = Recorder(10, 10_000, 10)
    for id in ("a", "b", "a", "a"):
        put(recorder, a_message(id))
    counts = recorder.counts()
    assert (counts["messages"], counts["distinct"], counts["repeated"]) == (4, 2, 2)
    assert recorder.ids() == {"a": 3, "b": 1}


def test_ids_beyond_the_limit_are_forgotten_and_that_is_counted() -> None:
    recorder = Recorder(10, 10_000, 2)
    for id in ("a", "b", "c"):
        put(recorder, a_message(id))
    assert recorder.ids() == {"b": 1, "c": 1}
    assert recorder.counts()["forgotten_ids"] == 1


def test_the_oldest_events_go_first_and_are_counted() -> None:
    recorder = Recorder(2, 10_000, 10)
    for id in ("a", "b", "c"):
        put(recorder, a_message(id))
    missed, events = recorder.since(0)
    assert missed == 1
    assert [event.seq for event in events] == [2, 3]
    assert recorder.counts()["dropped_events"] == 1


def test_payload_is_bounded_but_one_event_is_always_held() -> None:
    recorder = Recorder(10, 500, 10)
    put(recorder, a_message("a"))
    put(recorder, a_message("b", "x" * 1000))
    assert [received.id for received in recorder.received()] == ["b"]


def test_since_gives_what_follows_a_number() -> None:
    recorder = Recorder(10, 10_000, 10)
    recorder.happen("edge-a", "connected", {"connection": 1}, 1.0)
    put(recorder, a_message("a"))
    missed, events = recorder.since(1)
    assert (missed, [event.seq for event in events]) == (0, [2])
    assert recorder.since(2) == (0, [])
    assert recorder.since(99) == (0, [])
    first = recorder.since(0)[1][0]
    assert isinstance(first, Happened)
    assert json.loads(first.line()) == {"seq": 1, "at": 1.0, "event": "connected", "node": "edge-a", "connection": 1}


def test_clearing_forgets_all_but_the_sequence() -> None:
    recorder = Recorder(10, 10_000, 10)
    put(recorder, a_message("a"))
    recorder.clear()
    assert recorder.counts()["messages"] == 0
    put(recorder, a_message("a"))
    (received,) = recorder.received(module="router", node="edge-a")
    assert isinstance(received, Received)
    assert received.seq == 2
    assert recorder.counts()["distinct"] == 1
    assert list(recorder.received(node="edge-b")) == []
