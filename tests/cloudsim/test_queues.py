from __future__ import annotations

from cloudsim.queues import AckQueue, PlainQueue
from cloudsim.wire import CloudMessage, Header, Route, decode


def thing(uid: str, version: str = "1", operation: str = "insert", id: str = "") -> CloudMessage:
    return CloudMessage(
        Header(id or f"{uid}.{version}.{operation}", resourceversion=version),
        Route("edgecontroller", "", "resource", operation, f"default/configmap/{uid}"),
        {"metadata": {"uid": uid}},
    )


def offer(queue: AckQueue, *messages: CloudMessage, acknowledged: int | None = None) -> None:
    for message in messages:
        assert queue.offer(message, acknowledged) is None


def run(queue: AckQueue, now: float) -> list[str]:
    """The ids written at `now`."""
    return [decode(payload).header.msg_id for payload in queue.advance(now)[0]]


def test_one_object_is_in_flight_until_it_is_acknowledged() -> None:
    queue = AckQueue(10)
    offer(queue, thing("a"), thing("b"))
    assert run(queue, 0.0) == ["a.1.insert"]
    assert run(queue, 1.0) == []
    assert queue.acknowledge("b.1.insert") is None
    assert queue.acknowledge("a.1.insert") is not None
    assert run(queue, 1.0) == ["b.1.insert"]


def test_an_object_is_sent_at_0_5_10_15_and_20_seconds_and_given_up_at_25() -> None:
    queue = AckQueue(10)
    offer(queue, thing("a"), thing("b"))
    for second in (0.0, 5.0, 10.0, 15.0, 20.0):
        assert run(queue, second) == ["a.1.insert"]
        assert run(queue, second + 4.9) == []
        assert queue.next_deadline() == second + 5.0
    writes, given_up = queue.advance(25.0)
    assert [decode(payload).header.msg_id for payload in writes] == ["b.1.insert"]
    assert [lost.item.key for lost in given_up] == ["a"]


def test_a_given_up_object_goes_to_the_end_of_the_queue_and_comes_again() -> None:
    queue = AckQueue(10)
    offer(queue, thing("a"), thing("b"))
    for second in (0.0, 5.0, 10.0, 15.0, 20.0, 25.0):
        run(queue, second)
    assert queue.acknowledge("b.1.insert") is not None
    assert run(queue, 26.0) == ["a.1.insert"]


def test_the_only_object_comes_back_after_a_delay_that_doubles() -> None:
    queue = AckQueue(10)
    offer(queue, thing("a"))
    now = 0.0
    for delay in (0.005, 0.010, 0.020):
        for _ in range(5):
            assert run(queue, now) == ["a.1.insert"]
            now += 5.0
        assert run(queue, now) == []
        assert queue.next_deadline() == now + delay
        now += delay


def test_a_newer_version_replaces_the_queued_older_one() -> None:
    queue = AckQueue(10)
    offer(queue, thing("a"), thing("b", "2"), thing("b", "3", "update"))
    assert run(queue, 0.0) == ["a.1.insert"]
    queue.acknowledge("a.1.insert")
    assert run(queue, 0.0) == ["b.3.update"]
    queue.acknowledge("b.3.update")
    assert run(queue, 0.0) == []


def test_versions_compare_as_integers() -> None:
    queue = AckQueue(10)
    offer(queue, thing("a", "9"))
    assert queue.offer(thing("a", "10"), None) is None
    assert queue.offer(thing("a", "9"), None) is not None
    assert queue.offer(thing("b", "100"), 99) is None
    assert queue.offer(thing("c", "99"), 100) is not None


def test_an_update_of_the_object_in_flight_follows_it() -> None:
    queue = AckQueue(10)
    offer(queue, thing("a", "1"))
    assert run(queue, 0.0) == ["a.1.insert"]
    offer(queue, thing("a", "2", "update"))
    assert run(queue, 5.0) == ["a.1.insert"]
    queue.acknowledge("a.1.insert")
    assert run(queue, 6.0) == ["a.2.update"]
    assert len(queue) == 1


def test_the_same_or_an_older_version_than_the_acknowledged_one_is_dropped() -> None:
    queue = AckQueue(10)
    assert queue.offer(thing("a", "10"), 10) == "version 10 is acknowledged already"
    assert queue.offer(thing("a", "9"), 10) is not None
    assert queue.offer(thing("a", "11"), 10) is None


def test_a_delete_is_always_sent_and_is_not_overtaken_by_an_update() -> None:
    queue = AckQueue(10)
    offer(queue, thing("a", "11", "delete"), acknowledged=11)
    assert queue.offer(thing("a", "12", "update"), 11) is not None
    assert run(queue, 0.0) == ["a.11.delete"]


def test_an_object_that_is_being_deleted_counts_as_a_delete() -> None:
    queue = AckQueue(10)
    going = thing("a", "1", "update")
    going.content["metadata"]["deletionTimestamp"] = "2026-11-23T17:00:00Z"
    offer(queue, going, acknowledged=5)
    assert queue.offer(thing("a", "9", "update"), None) is not None


def test_an_answer_to_a_query_is_sent_though_its_version_is_acknowledged() -> None:
    queue = AckQueue(10)
    offer(queue, thing("a", "5", "response"), acknowledged=5)
    assert run(queue, 0.0) == ["a.5.response"]


def test_a_full_queue_says_no_to_one_object_more_and_yes_to_a_newer_version() -> None:
    queue = AckQueue(2)
    offer(queue, thing("a"), thing("b"))
    assert queue.offer(thing("c"), None) == "the queue is full (2 objects)"
    assert queue.offer(thing("b", "2"), None) is None


def test_messages_without_acknowledgement_keep_their_order_and_have_a_limit() -> None:
    queue = PlainQueue(10)
    assert queue.offer(b"x" * 50) is None  # the first always
    assert queue.offer(b"y") is not None
    assert queue.take() == [b"x" * 50]
    assert [queue.offer(b"12345"), queue.offer(b"67890")] == [None, None]
    assert queue.take() == [b"12345", b"67890"]
    assert queue.take() == []
