"""The numbered rules of docs/emp.md, each by the short schedule that breaks a bus without it.

A rule that binds both sides is tested on both, or with frames carried between the two.
"""

from __future__ import annotations

import asyncio

import pytest

from runtime import client, emp
from runtime.access import Open
from runtime.client_core import Attached, Complaint, Ended, Members, Replied
from runtime.errors import Congested, NameTaken
from runtime.message import Message, current_handling, encode_message
from tests.support.aio import run
from tests.support.bus_pair import DATA, REPLY, REQUEST, SIGNAL, BrokerRoom, Pair, RawBroker, make_body


class Denying(Open):
    """An access policy that denies what its set names: (sender, destination)."""

    def __init__(self) -> None:
        self.denied: set[tuple[str, str]] = set()

    def may_send(self, sender: str, destination: str, priority: int) -> bool:
        return (sender, destination) not in self.denied


# --- lanes and sequence numbers -------------------------------------------------------------------


def test_rule_01_the_broker_keeps_one_number_of_three_lanes_apart() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver", groups=["g"])
    sender = room.peer("sender")
    sender.send("receiver", 1)
    sender.send("@g", 1)
    sender.send("receiver", 1, priority=SIGNAL)
    delivered = receiver.take(emp.DELIVER)
    assert {(header.destination, header.priority) for header in delivered} == {
        ("receiver", DATA),
        ("@g", DATA),
        ("receiver", SIGNAL),
    }
    assert len({header.lane for header in delivered}) == 3


def test_rule_01_the_receivers_book_has_the_whole_key() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1, lane=1)
    broker.deliver(1, lane=2, destination="@g")
    broker.deliver(1, lane=3, priority=SIGNAL)
    broker.deliver(1, lane=4, incarnation=b"T" * 16, generation=6)
    assert broker.arrived() == [1, 1, 1, 1]


def test_rule_02_an_expired_message_keeps_its_place_in_what_is_sent_again() -> None:
    broker = RawBroker()
    broker.welcome()
    lane = broker.core.lane("x", DATA)
    broker.core.put(lane, b"\x90")
    broker.core.put_with(lane, b"\x90", 0, broker.now + 1.0, None)
    broker.core.put(lane, b"\x90")
    broker.flush()
    broker.now += 5.0
    again = [emp.decode(frames)[1] for frames in broker.welcome() if frames[0] == emp.SEND]
    assert [(send.first, send.ttl_ms) for send in again] == [(1, None), (2, 0), (3, None)]


def test_rule_02_a_broker_without_memory_takes_the_lane_with_an_expired_message_in_it() -> None:
    pair = Pair(declared={"receiver": ()})
    sender = pair.join("sender")
    first, expired, third = sender.send("receiver"), sender.send("receiver", deadline=101.0), sender.send("receiver")
    pair.settle()
    pair.room.now += 5.0
    pair.restart_broker()
    sender.connect()
    receiver = pair.join("receiver")
    pair.settle()
    assert receiver.finish() == ["sender-1", "sender-3"]
    pair.settle()
    assert (first.outcome, expired.outcome, third.outcome) == ([], [("expired", None)], [])


def test_rule_02_neither_giving_up_a_request_nor_its_reply_frees_its_number() -> None:
    broker = RawBroker()
    broker.welcome()
    lane = broker.core.lane("x", REQUEST)
    for name in ("given up", "answered"):
        broker.core.expect(name, name)
        broker.core.put_with(lane, encode_message(Message(id=name)), emp.EXPECTS_REPLY, None, None)
    broker.flush()
    broker.core.forget("given up")
    reply = encode_message(Message(id="r", parent_id="answered"))
    broker.deliver(
        1,
        sender="x",
        priority=REPLY,
        flags=emp.REPLY,
        requester=broker.core.incarnation,
        body=b"\x91" + reply,
    )
    assert [event.waiter for event in broker.events(Replied)] == ["answered"]
    assert lane.messages == 2
    again = [emp.decode(frames)[1] for frames in broker.welcome() if frames[0] == emp.SEND]
    assert [(send.first, send.count) for send in again] == [(1, 2)]
    broker.give(emp.SETTLED, emp.Settled("x", REQUEST, 2))
    assert lane.messages == 0


def test_rule_03_a_gap_is_answered_with_who() -> None:
    room = BrokerRoom(declared={"receiver": ()})
    sender = room.peer("sender")
    sender.send("receiver", 1)
    sender.send("receiver", 3)
    assert len(sender.take(emp.WHO)) == 1
    receiver = room.peer("receiver")
    assert [header.first for header in receiver.take(emp.DELIVER)] == [1]


def test_rule_03_an_unknown_lane_begins_at_its_floor() -> None:
    room = BrokerRoom(declared={"receiver": ()})
    sender = room.peer("sender")
    sender.send("receiver", 2, floor=1)  # 1 was lost with the connection
    assert sender.take(emp.WHO)
    sender.hello()
    sender.send("receiver", 1, 2, floor=1)
    receiver = room.peer("receiver")
    assert [(header.first, header.count) for header in receiver.take(emp.DELIVER)] == [(1, 2)]
    other = room.peer("other")
    other.send("receiver", 8, floor=8)  # after a broker's restart
    assert not other.take(emp.WHO)
    assert [header.first for header in receiver.take(emp.DELIVER)] == [8]


def test_rule_03_an_overlap_is_kept_with_from_moved_on_and_a_duplicate_is_ignored() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver")
    sender = room.peer("sender")
    sender.send("receiver", 1, 2)
    sender.send("receiver", 2, 2)
    sender.send("receiver", 1, 3)
    sender.send("receiver", 3)
    assert [(header.first, header.count, header.from_) for header in receiver.take(emp.DELIVER)] == [
        (1, 2, 1),
        (2, 2, 3),
    ]


def test_rule_04_only_hello_and_ping_go_out_until_welcome_then_all_in_order() -> None:
    broker = RawBroker()
    broker.welcome()
    lane = broker.core.lane("x", DATA)
    for _ in range(2):
        broker.core.put(lane, b"\x90")
        broker.flush()
    broker.give(emp.SETTLED, emp.Settled("x", DATA, 1))
    broker.give(emp.WHO, emp.Who(b""))
    broker.core.put(lane, b"\x90")
    for _ in range(3):
        broker.core.flush(broker.now)
        broker.now += 1.0
        broker.core.expire(broker.now)
    assert {frames[0] for frames in broker.take()} <= {emp.HELLO, emp.PING}
    sent = [emp.decode(frames)[1] for frames in broker.welcome() if frames[0] == emp.SEND]
    assert [(send.first, send.floor, send.flags) for send in sent] == [(2, 2, emp.RESENT), (3, 2, 0)]


def test_rule_05_a_refusal_consumes_its_number_and_is_told_in_its_turn() -> None:
    access = Denying()
    room = BrokerRoom(access=access)
    receiver = room.peer("receiver")
    sender = room.peer("sender")
    sender.send("receiver", 1)
    access.denied.add(("sender", "receiver"))
    sender.send("receiver", 2)
    access.denied.clear()
    sender.send("receiver", 3)
    assert sender.settled() == (0, [])  # 2 is denied, but 1 is not handled
    delivered = receiver.take(emp.DELIVER)
    assert [header.first for header in delivered] == [1, 3]
    receiver.ack(delivered[0].lane, 1)
    assert sender.settled() == (2, [(2, "denied", None)])
    receiver.ack(delivered[0].lane, 3)
    assert sender.settled()[0] == 3


def test_rule_05_a_lane_is_forgotten_only_when_its_sender_knows_it_settled() -> None:
    room = BrokerRoom(max_lanes=2)
    receiver = room.peer("receiver", groups=["a", "b", "c"])
    sender = room.peer("sender")
    sender.send("@a", 1)
    sender.send("@b", 1)
    receiver.ack_all()
    sender.send("@c", 1)  # both are empty, but the floor that says so has not come
    assert [refused.code for refused in sender.take(emp.REFUSED)] == [emp.TOO_MANY]
    sender.put(emp.PING, emp.Ping(1, {}, [("@a", DATA, 2)]))
    sender.send("@c", 1)
    assert not sender.take(emp.REFUSED)
    sender.send("@a", 2, floor=2)  # where the forgotten lane goes on: there is no room for a third one yet
    assert [refused.code for refused in sender.take(emp.REFUSED)] == [emp.TOO_MANY]


def test_rule_05_ping_tells_the_floor_of_a_lane_that_has_fallen_silent() -> None:
    broker = RawBroker()
    broker.welcome()
    lane = broker.core.lane("once", DATA)
    broker.core.put(lane, b"\x90")
    broker.flush()
    broker.give(emp.SETTLED, emp.Settled("once", DATA, 1))
    broker.core.ping(broker.now)
    assert broker.flush(emp.PING)[0].floors == [("once", DATA, 2)]
    broker.core.ping(broker.now)
    assert broker.flush(emp.PING)[0].floors == []


# --- sessions, epochs, acknowledgements -----------------------------------------------------------


def test_rule_06_an_ack_of_another_session_settles_nothing() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver")
    sender = room.peer("sender")
    sender.send("receiver", 1)
    (delivered,) = receiver.take(emp.DELIVER)
    old = receiver.session
    receiver.hello()
    assert receiver.session != old
    receiver.ack(delivered.lane, 1, session=old)
    assert sender.settled() == (0, [])
    (again,) = receiver.take(emp.DELIVER)
    receiver.ack(again.lane, 1)
    assert sender.settled() == (1, [])


def test_rule_07_one_deferred_message_holds_up_only_its_own_lane() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver")
    slow, quick = room.peer("slow"), room.peer("quick")
    slow.send("receiver", 1)
    quick.send("receiver", 1)
    lanes = {header.sender: header.lane for header in receiver.take(emp.DELIVER)}
    receiver.ack(lanes["quick"], 1)
    assert quick.settled() == (1, [])
    assert slow.settled() == (0, [])


def test_rule_07_an_ack_covers_only_what_this_session_delivered() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1, 3)
    (arrival,) = [event for event in broker.core.events if hasattr(event, "lane")]
    for number in (1, 2, 3):
        broker.core.finish(arrival.lane, number)
    broker.welcome(epoch=2)  # before the ACK went out
    broker.flush()
    broker.deliver(1, lane=9)
    assert broker.acks() == [(9, 1, [])]
    broker.deliver(2, 2, lane=9)
    assert broker.acks() == [(9, 3, [])]


def test_rule_07_an_ack_of_what_was_not_delivered_is_refused() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver")
    sender = room.peer("sender")
    sender.send("receiver", 1)
    (delivered,) = receiver.take(emp.DELIVER)
    receiver.ack(delivered.lane, 2)
    receiver.ack(delivered.lane + 1, 1)
    assert [refused.code for refused in receiver.take(emp.REFUSED)] == [emp.BAD_HEADER] * 2
    assert sender.settled() == (0, [])


def test_rule_08_a_late_old_hello_is_healed_by_the_next_ping() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver", generation=0)
    dead = receiver.address
    receiver.move()
    receiver.hello()
    sender = room.peer("sender")
    # The dead connection's HELLO is read only now and takes the session with it.
    receiver.raw(emp.encode(emp.HELLO, receiver.hello_header()), address=dead)
    sender.send("receiver", 1)
    assert not receiver.take(emp.DELIVER)
    receiver.put(emp.PING, emp.Ping(1))
    assert receiver.take(emp.WHO)
    receiver.hello()
    assert [header.first for header in receiver.take(emp.DELIVER)] == [1]


def test_rule_08_frames_of_the_dead_connection_count_for_nothing() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver")
    sender = room.peer("sender")
    dead = sender.address
    sender.move()
    sender.hello()
    sender.raw(emp.encode(emp.SEND, emp.Send("receiver", DATA, 1, 1, 1), make_body(1)), address=dead)
    assert not receiver.take(emp.DELIVER)


def test_rule_08_an_idle_module_pings() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.now = broker.core.next_deadline(broker.now)
    broker.core.expire(broker.now)
    assert broker.flush(emp.PING)


def test_rule_09_a_delivery_of_an_old_session_is_handled_but_not_acknowledged() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.welcome(epoch=2)
    broker.deliver(1, session=1)
    (arrival,) = [event for event in broker.core.events if hasattr(event, "messages")]
    broker.core.finish(arrival.lane, 1)
    assert broker.acks() == []
    broker.deliver(1, session=2, lane=4)
    assert broker.core.duplicates == 1
    assert broker.acks() == [(4, 1, [])]


def test_rule_09_a_settlement_of_an_old_epoch_counts() -> None:
    broker = RawBroker()
    broker.welcome()
    lane = broker.core.lane("x", DATA)
    broker.core.put(lane, b"\x90")
    broker.flush()
    broker.core.disconnected(broker.now)
    broker.give(emp.SETTLED, emp.Settled("x", DATA, 1))
    assert lane.messages == 0


def test_rule_10_one_who_until_the_peer_says_hello() -> None:
    room = BrokerRoom()
    sender = room.peer("sender")
    sender.send("nobody", 5)
    for number in range(6, 10):
        sender.send("nobody", number)
    assert sender.verbs().count(emp.WHO) == 1
    sender.hello()
    sender.send("nobody", 5)
    assert sender.verbs().count(emp.WHO) == 2


def test_rule_10_the_sdk_ignores_who_while_its_hello_is_open_and_repeats_hello() -> None:
    broker = RawBroker()
    broker.core.connected(broker.now)
    for _ in range(5):
        broker.give(emp.WHO, emp.Who(b""))
    assert [frames[0] for frames in broker.take()] == [emp.HELLO]
    broker.now = broker.core.next_deadline(broker.now)
    broker.core.expire(broker.now)
    assert [frames[0] for frames in broker.take()] == [emp.HELLO]


def test_rule_11_welcome_is_followed_by_settled_for_every_lane() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver")
    sender = room.peer("sender")
    sender.send("receiver", 1, 2)
    sender.send("nobody", 1)
    receiver.ack_all()
    sender.move()  # with the connection both SETTLED are lost
    sender.hello()
    assert sender.verbs()[0] == emp.WELCOME
    told = {header.destination: (header.cumulative, header.exceptions) for header in sender.take(emp.SETTLED)}
    assert told == {"receiver": (2, []), "nobody": (1, [(1, "unroutable", None)])}


def test_rule_12_exceptions_are_told_again_until_a_floor_passes_them() -> None:
    room = BrokerRoom()
    sender = room.peer("sender")
    sender.send("nobody", 1)
    sender.send("nobody", 2)
    sender.inbox.clear()
    sender.hello()
    assert sender.settled() == (2, [(1, "unroutable", None), (2, "unroutable", None)])
    sender.send("nobody", 3, floor=2)
    sender.inbox.clear()
    sender.hello()
    assert sender.settled() == (3, [(2, "unroutable", None), (3, "unroutable", None)])
    sender.put(emp.PING, emp.Ping(1, {}, [("nobody", DATA, 4)]))
    sender.inbox.clear()
    sender.hello()
    assert sender.settled() == (3, [])


def test_rule_12_a_denied_message_is_not_told_as_delivered_after_a_lost_settlement() -> None:
    pair = Pair()
    sender = pair.join("sender")
    sent = sender.send("nobody")
    pair.room.core.receive(sender.address or (0, b""), _flushed(sender), pair.room.now)
    pair.room.core.flush(pair.room.now)  # SETTLED, lost with the connection
    sender.cut()
    sender.connect()
    pair.settle()
    assert sent.outcome == [("unroutable", None)]


def _flushed(party: object) -> list[bytes]:
    core = party.core  # type: ignore[attr-defined]
    core.flush(100.0)
    (frames,) = core.out
    core.out = []
    return list(frames)


def test_rule_13_what_was_sent_again_is_delivered_as_redelivered() -> None:
    pair = Pair()
    sender, receiver = pair.join("sender"), pair.join("receiver")
    sender.send("receiver")
    pair.settle()
    assert not receiver.arrivals[0].header.flags & emp.REDELIVERED
    receiver.finish()  # handled, and then receiver and broker die before the ACK
    pair.parties.remove(receiver)
    pair.restart_broker(declared={"receiver": ()})
    sender.connect()
    fresh = pair.join("receiver")
    assert fresh.waiting == ["sender-1"]
    assert fresh.arrivals[0].header.flags & emp.REDELIVERED


# --- the receiver ---------------------------------------------------------------------------------


def test_rule_14_a_number_below_the_highest_is_not_a_duplicate_by_that_alone() -> None:
    access = Denying()
    access.denied.add(("sender", "receiver"))
    pair = Pair(access=access, declared={"receiver": ()})
    sender, receiver = pair.join("sender"), pair.join("receiver")
    denied = sender.send("receiver")
    pair.room.core.receive(sender.address or (0, b""), _flushed(sender), pair.room.now)
    access.denied.clear()
    allowed = sender.send("receiver")
    pair.room.core.receive(sender.address or (0, b""), _flushed(sender), pair.room.now)
    for out in pair.room.core.flush(pair.room.now):
        if out.peer == receiver.address:
            receiver.core.receive(out.frames, pair.room.now)  # the sender's SETTLED is lost
    pair.settle()
    assert receiver.finish() == ["sender-2"]
    pair.restart_broker()
    sender.connect()
    receiver.connect()
    pair.settle()
    assert receiver.waiting == []
    assert (denied.outcome, allowed.outcome) == ([("denied", None)], [])


def test_rule_15_numbers_before_from_are_booked_and_answered_from_the_book() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(5, floor=2, void=[(3, "denied")])
    assert broker.arrived() == [5]
    broker.welcome(epoch=2)
    broker.deliver(2, 4, floor=2, lane=6)
    assert broker.arrived() == []
    assert broker.acks() == [(6, 4, [(3, "denied")])]  # 2 and 4: an earlier one of us had them


def test_rule_15_the_broker_tells_what_it_refused_between_floor_and_from() -> None:
    access = Denying()
    room = BrokerRoom(access=access)
    receiver = room.peer("receiver")
    sender = room.peer("sender")
    access.denied.add(("sender", "receiver"))
    sender.send("receiver", 1)
    access.denied.clear()
    sender.send("receiver", 2)
    (delivered,) = receiver.take(emp.DELIVER)
    assert (delivered.from_, delivered.floor, delivered.void) == (2, 1, [(1, "denied")])


def test_rule_15_an_unknown_number_below_the_highest_is_refused_as_overtaken() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(5, floor=5)
    assert broker.arrived() == [5]
    broker.welcome(epoch=2)
    broker.deliver(4, 2, floor=4, lane=2)
    assert broker.arrived() == []
    assert broker.acks() == [(2, 4, [(4, "overtaken")])]


def test_rule_16_a_running_message_is_not_begun_again() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1)
    (arrival,) = [event for event in broker.core.events if hasattr(event, "messages")]
    assert broker.arrived() == [1]
    broker.welcome()
    broker.deliver(1, flags=emp.REDELIVERED, lane=3)
    assert broker.arrived() == []
    assert broker.acks() == []
    broker.core.finish(arrival.lane, 1)
    assert broker.acks() == [(3, 1, [])]


def test_rule_16_a_failed_message_stays_failed_when_its_refusal_was_lost() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1)
    (arrival,) = [event for event in broker.core.events if hasattr(event, "messages")]
    broker.core.finish(arrival.lane, 1, emp.FAILED)
    assert broker.acks() == [(1, 1, [(1, "failed")])]
    broker.arrived()
    broker.welcome()
    broker.deliver(1, lane=8)
    assert broker.arrived() == []
    assert broker.acks() == [(8, 1, [(1, "failed")])]


def test_rule_17_a_refusal_in_ack_is_final() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver")
    sender = room.peer("sender")
    sender.send("receiver", 1, 2)
    (delivered,) = receiver.take(emp.DELIVER)
    receiver.ack(delivered.lane, 2, [(1, "failed")])
    assert sender.settled() == (2, [(1, "failed", None)])
    receiver.hello()
    room.pass_time(1.0)
    assert not receiver.take(emp.DELIVER)


def test_rule_18_outcomes_below_the_floor_are_forgotten() -> None:
    broker = RawBroker()
    broker.welcome()
    for number in range(1, 200):
        broker.deliver(number, floor=max(1, number - 3))
        (arrival,) = [event for event in broker.core.events if hasattr(event, "messages")]
        broker.arrived()
        broker.core.finish(arrival.lane, number, emp.FAILED)
        assert len(arrival.lane.failed) <= 5


def test_rule_18_an_older_incarnations_book_goes_when_nothing_of_it_is_open() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1, incarnation=b"1" * 16, generation=1, lane=1)
    broker.deliver(1, incarnation=b"1" * 16, generation=1, lane=2, destination="@g")
    first, second = [event for event in broker.core.events if hasattr(event, "messages")]
    broker.arrived()
    broker.core.finish(first.lane, 1)
    broker.acks()
    broker.deliver(1, incarnation=b"2" * 16, generation=2, lane=3)
    assert {key[1:3] for key in broker.core._in} == {(b"1" * 16, "@g"), (b"2" * 16, "receiver")}
    broker.core.finish(second.lane, 1)
    assert broker.acks() == [(2, 1, [])]


def test_rule_18_the_books_have_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.client_core.MAX_IN_LANES", 10)
    broker = RawBroker()
    broker.welcome()
    for number in range(100):
        broker.deliver(1, incarnation=number.to_bytes(16, "big"), sender=f"s{number}", lane=number + 1)
        (arrival,) = [event for event in broker.core.events if hasattr(event, "messages")]
        broker.arrived()
        broker.core.finish(arrival.lane, 1)
        broker.acks()
    assert len(broker.core._in) <= 10
    assert len(broker.core._generations) <= 10


def test_rule_18_the_book_unused_longest_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.client_core.MAX_IN_LANES", 10)
    broker = RawBroker()
    broker.welcome()
    for number in range(30):
        for first, lane, sender in ((number + 1, 1, "steady"), (1, number + 2, f"passing{number}")):
            broker.deliver(first, sender=sender, incarnation=sender.encode().ljust(16), lane=lane)
            (arrival,) = [event for event in broker.core.events if hasattr(event, "messages")]
            broker.arrived()
            broker.core.finish(arrival.lane, first)
            broker.acks()
    broker.welcome()
    broker.deliver(30, sender="steady", incarnation=b"steady".ljust(16), floor=30)
    assert broker.arrived() == []


def test_rule_19_a_newer_incarnations_messages_wait_for_the_older_ones() -> None:
    room = BrokerRoom(declared={"receiver": ()})
    old = room.peer("sender", generation=0)
    old.send("receiver", 1)
    receiver = room.peer("receiver")
    (first,) = receiver.take(emp.DELIVER)
    old.put(emp.BYE, emp.Bye(False))
    new = room.peer("sender")
    new.send("receiver", 1)
    new.send("receiver", 1, priority=SIGNAL)
    assert not receiver.take(emp.DELIVER)
    receiver.ack(first.lane, 1)
    assert {header.incarnation for header in receiver.take(emp.DELIVER)} == {new.incarnation}


def test_rule_20_a_zombie_of_a_lower_generation_is_refused_as_fenced() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1, incarnation=b"n" * 16, generation=9)
    assert broker.arrived() == [1]
    broker.deliver(1, 2, incarnation=b"z" * 16, generation=8, lane=2)
    assert broker.arrived() == []
    assert broker.acks() == [(2, 2, [(1, "fenced"), (2, "fenced")])]


def test_rule_21_a_receiver_that_was_stopped_asks_before_it_works_on() -> None:
    broker = RawBroker(liveness_seconds=10.0)
    broker.welcome()
    assert broker.core.is_fresh(broker.now)
    broker.core.ping(broker.now)  # its PONG will lie in the pipe while we are stopped
    old = broker.flush(emp.PING)[0].nonce
    broker.now += 60.0
    assert not broker.core.is_fresh(broker.now)
    broker.core.ask_fresh(broker.now)
    fresh = broker.flush(emp.PING)[0].nonce
    broker.give(emp.PONG, emp.Pong(old))
    assert not broker.core.is_fresh(broker.now)
    broker.give(emp.PONG, emp.Pong(fresh))
    assert broker.core.is_fresh(broker.now)


def test_rule_21_an_old_welcome_is_no_word_that_we_are_alive() -> None:
    broker = RawBroker()
    broker.welcome(fresh=False)
    assert not broker.core.is_fresh(broker.now)
    broker.core.expire(broker.now)
    broker.core.ask_fresh(broker.now)


# --- names and fencing ----------------------------------------------------------------------------


def test_rule_22_a_zombie_is_fenced_by_its_number_even_when_it_comes_first_to_a_new_broker() -> None:
    room = BrokerRoom()
    zombie = room.peer("s")
    zombie.put(emp.BYE, emp.Bye(False))
    right = room.peer("s")
    assert right.generation > zombie.generation
    for newcomer in (True, False):
        later = BrokerRoom(epoch=2, clock_ms=5000)
        first, second = (zombie, right) if newcomer else (right, zombie)
        a = later.peer("s", incarnation=first.incarnation, generation=first.generation)
        b = later.peer("s", incarnation=second.incarnation, generation=second.generation)
        loser, winner = (a, b) if newcomer else (b, a)
        assert [header.generation for header in loser.take(emp.FENCED)] == [right.generation]
        assert emp.FENCED not in winner.verbs()
        winner.send("nobody", 1)
        assert winner.settled()[0] == 1


def test_rule_22_a_fenced_process_that_missed_the_word_is_told_again() -> None:
    room = BrokerRoom()
    zombie = room.peer("s", liveness=1.0)
    room.pass_time(5.0)
    room.peer("s")
    zombie.inbox.clear()  # FENCED was lost
    zombie.hello()
    assert zombie.verbs() == [emp.FENCED]


def test_rule_22_generations_are_never_below_the_brokers_clock() -> None:
    before = BrokerRoom(clock_ms=1000).peer("s").generation
    after = BrokerRoom(epoch=2, clock_ms=2000).peer("s").generation
    assert after > before >= 1000


def test_rule_22_the_sdk_ends_when_it_is_fenced_and_shows_its_generation_in_hello() -> None:
    broker = RawBroker()
    broker.welcome(generation=12)
    broker.core.disconnected(broker.now)
    broker.core.connected(broker.now)
    assert broker.flush(emp.HELLO)[0].generation == 12
    broker.give(emp.FENCED, emp.Fenced(11))
    assert not broker.events(Ended)
    broker.give(emp.FENCED, emp.Fenced(13))
    assert [event.fenced for event in broker.events(Ended)] == [13]


def test_rule_23_a_first_start_over_a_living_holder_is_refused_and_over_a_silent_one_wins() -> None:
    room = BrokerRoom()
    holder = room.peer("s", liveness=5.0)
    second = room.peer("s")
    assert [refused.code for refused in second.take(emp.REFUSED)] == [emp.NAME_TAKEN]
    room.pass_time(5.1)
    second.hello()
    assert second.verbs()[0] == emp.WELCOME
    assert holder.take(emp.FENCED) or room.status("s")["incarnation"] == second.incarnation.hex()


def test_rule_23_a_first_start_over_a_dead_holder_wins_at_once() -> None:
    room = BrokerRoom()
    holder = room.peer("s")
    room.core.died("s", holder.pid, room.now)
    assert emp.WELCOME in room.peer("s").verbs()


def test_rule_23_a_reconnect_is_never_a_second_hello() -> None:
    room = BrokerRoom()
    holder = room.peer("s")
    generation = holder.generation
    holder.generation = 0  # it has not read the WELCOME
    holder.move()
    holder.hello()
    assert emp.WELCOME in holder.verbs()
    assert holder.generation == generation


def test_rule_23_the_sdk_tries_a_taken_name_for_one_liveness_period() -> None:
    broker = RawBroker(liveness_seconds=3.0)
    broker.core.connected(broker.now)
    taken = emp.Refused(emp.NAME_TAKEN, "held")
    broker.give(emp.REFUSED, taken)
    broker.now += 2.9
    broker.core.expire(broker.now)
    assert broker.flush(emp.HELLO)
    broker.give(emp.REFUSED, taken)
    assert not broker.events(Ended)
    broker.now += 0.2
    broker.give(emp.REFUSED, taken)
    (ended,) = broker.events(Ended)
    assert isinstance(ended.error, NameTaken)


# --- groups ---------------------------------------------------------------------------------------


def test_rule_24_membership_is_fixed_when_the_batch_is_routed() -> None:
    room = BrokerRoom()
    first = room.peer("first", groups=["g"])
    sender = room.peer("sender")
    sender.send("@g", 1)
    later = room.peer("later", groups=["g"])
    assert not later.take(emp.DELIVER)
    first.ack_all()
    assert sender.settled() == (1, [])
    sender.send("@g", 2)
    assert [header.from_ for header in later.take(emp.DELIVER)] == [2]


def test_rule_24_a_declared_member_is_waited_for_and_an_undeclared_one_learns_that_it_is_late() -> None:
    room = BrokerRoom(declared={"declared": ["g"]}, grace=0.5)
    sender = room.peer("sender")
    sender.send("@g", 1)
    room.pass_time(1.0)
    stranger = room.peer("stranger", groups=["g"], generation=5)
    (welcome,) = stranger.take(emp.WELCOME)
    assert welcome.late
    assert not stranger.take(emp.DELIVER)
    assert sender.settled() == (0, [])
    declared = room.peer("declared", groups=["g"], generation=4)
    (welcome,) = declared.take(emp.WELCOME)
    assert not welcome.late
    assert declared.ack_all()
    assert sender.settled() == (1, [])


def test_rule_24_the_sdk_tells_the_module_that_it_is_late() -> None:
    broker = RawBroker()
    broker.welcome(late=True)
    assert [event.late for event in broker.events(Attached)] == [True]


def test_rule_25_an_undeclared_member_that_leaves_is_let_go_at_once() -> None:
    room = BrokerRoom()
    stays, leaves = room.peer("stays", groups=["g"]), room.peer("leaves", groups=["g"])
    sender = room.peer("sender")
    sender.send("@g", 1)
    stays.ack_all()
    leaves.put(emp.BYE, emp.Bye(True))
    assert sender.settled() == (1, [(1, "gone", "leaves")])
    sender.send("@g", 2)
    stays.ack_all()
    assert sender.settled() == (2, [])


def test_rule_25_an_undeclared_member_that_dies_is_let_go_after_the_limit() -> None:
    room = BrokerRoom(absent_limit_seconds=30.0)
    member = room.peer("member", groups=["g"])
    sender = room.peer("sender", liveness=1000.0)
    sender.send("@g", 1)
    room.core.died("member", member.pid, room.now)
    room.pass_time(29.0)
    assert sender.settled() == (0, [])
    room.pass_time(2.0)
    assert sender.settled() == (1, [(1, "gone", "member")])


def test_rule_25_a_declared_member_and_one_that_comes_back_keep_their_mailbox() -> None:
    room = BrokerRoom(declared={"declared": ["g"]})
    visitor = room.peer("visitor", groups=["g"])
    sender = room.peer("sender", liveness=1000.0)
    visitor.put(emp.BYE, emp.Bye(False))
    sender.send("@g", 1)
    room.pass_time(20.0)
    assert [header.first for header in room.peer("visitor", groups=["g"]).ack_all()] == [1]
    room.pass_time(500.0)
    assert sender.settled() == (0, [])
    assert [header.first for header in room.peer("declared", groups=["g"]).ack_all()] == [1]
    assert sender.settled() == (1, [])


def test_rule_26_a_group_message_is_delivered_only_if_all_members_delivered() -> None:
    room = BrokerRoom()
    good, bad, worse = (room.peer(name, groups=["g"]) for name in ("good", "bad", "worse"))
    sender = room.peer("sender")
    sender.send("@g", 1, 2)
    for member, why in ((good, None), (bad, "failed"), (worse, "denied")):
        (delivered,) = member.take(emp.DELIVER)
        assert sender.settled() == (0, [])
        member.ack(delivered.lane, 2, [(2, why)] if why else [])
    assert sender.settled() == (2, [(2, "failed", "bad"), (2, "denied", "worse")])


def test_rule_26_a_group_request_brings_the_list_of_members() -> None:
    pair = Pair()
    sender = pair.join("sender")
    pair.join("one", groups=["g"])
    pair.join("two", groups=["g"])
    sender.send("@g", priority=REQUEST, flags=emp.EXPECTS_REPLY)
    pair.settle()
    (told,) = [event for event in sender.events if isinstance(event, Members)]
    assert (told.first, sorted(told.members)) == (1, ["one", "two"])


def test_rule_26_the_list_of_members_is_told_again_after_a_lost_connection() -> None:
    room = BrokerRoom()
    room.peer("one", groups=["g"])
    sender = room.peer("sender")
    sender.send("@g", 1, priority=REQUEST, flags=emp.EXPECTS_REPLY)
    sender.move()
    sender.hello()
    assert [settled.members for settled in sender.take(emp.SETTLED)] == [[(1, 1, ["one"])]]


def test_rule_26_a_parked_batch_blocks_its_lane_and_no_other() -> None:
    room = BrokerRoom(grace=0.5, declared={"there": ["g"]})
    there = room.peer("there", groups=["g"])
    sender = room.peer("sender")
    sender.send("@g", 1)
    sender.send("@g", 2)
    sender.send("there", 1)
    assert [header.destination for header in there.take(emp.DELIVER)] == ["there"]
    room.pass_time(0.6)
    assert [(header.destination, header.first) for header in there.take(emp.DELIVER)] == [("@g", 1), ("@g", 2)]


# --- requests, windows, prefetch ------------------------------------------------------------------


def test_rule_27_replies_pass_a_full_prefetch_a_drain_and_the_handlers() -> None:
    pair = Pair()
    asker = pair.join("asker", prefetch_messages=1)
    answerer = pair.join("answerer")
    asker.core.expect("q1", "waiter")
    asker.send("answerer", priority=REQUEST, message=Message(id="q1"), flags=emp.EXPECTS_REPLY)
    for priority in (REQUEST, SIGNAL, DATA):
        for _ in range(2):
            answerer.send("asker", priority=priority)
            pair.settle()
    asker.core.drain(5.0)
    (request,) = [arrival for arrival in answerer.arrivals if arrival.header.flags & emp.EXPECTS_REPLY]
    reply = Message(id="r1", parent_id="q1")
    answerer.send("asker", priority=REPLY, message=reply, flags=emp.REPLY, requester=request.header.incarnation)
    pair.settle()
    assert [(event.waiter, event.reply.id) for event in asker.events if isinstance(event, Replied)] == [
        ("waiter", "r1")
    ]
    assert len(asker.waiting) == 3  # one of each priority is all that its prefetch admits


def test_rule_27_open_replies_hold_up_no_further_ones() -> None:
    room = BrokerRoom()
    asker = room.peer("asker", prefetch=1, prefetch_bytes=1)
    responder = room.peer("responder")
    for number in range(1, 4):
        responder.send("asker", number, priority=REPLY, flags=emp.REPLY, requester=asker.incarnation)
    assert [header.first for header in asker.take(emp.DELIVER)] == [1, 2, 3]  # none of them is acknowledged


def test_rule_27_replies_need_no_room_in_a_window() -> None:
    broker = RawBroker(window=1)
    broker.welcome()
    lane = broker.core.lane("asker", REPLY)
    for _ in range(5):
        assert broker.core.has_room(lane, 1 << 30)
        broker.core.put_with(lane, b"\x90", emp.REPLY, None, b"a" * 16)


def test_rule_28_a_reply_to_a_dead_incarnation_is_gone() -> None:
    room = BrokerRoom(declared={"asker": ()})
    dead = room.peer("asker")
    responder = room.peer("responder")
    responder.send("asker", 1, priority=REPLY, flags=emp.REPLY, requester=dead.incarnation)
    room.core.died("asker", dead.pid, room.now)
    responder.send("asker", 2, priority=REPLY, flags=emp.REPLY, requester=dead.incarnation)
    fresh = room.peer("asker")
    assert responder.settled() == (2, [(1, "gone", None), (2, "gone", None)])
    assert not fresh.take(emp.DELIVER)
    responder.send("asker", 3, priority=REPLY, flags=emp.REPLY, requester=dead.incarnation)
    assert responder.settled() == (3, [(3, "gone", None)])
    assert not fresh.take(emp.DELIVER)
    responder.send("nobody", 1, priority=REPLY, flags=emp.REPLY, requester=dead.incarnation)
    assert responder.settled() == (1, [(1, "gone", None)])


def test_rule_28_a_late_or_second_reply_is_acknowledged_and_counted() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.core.expect("q", "waiter")
    for first in (1, 2):
        body = b"\x91" + encode_message(Message(id=f"r{first}", parent_id="q"))
        broker.deliver(
            first, priority=REPLY, flags=emp.REPLY, requester=broker.core.incarnation, body=body, sender="responder"
        )
        broker.core.forget("q") if first == 1 else None
    assert len(broker.events(Replied)) == 1
    assert broker.core.late_replies == 1
    assert broker.acks() == [(1, 2, [])]


def test_rule_28_a_reply_goes_out_before_the_ack_of_its_request() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1, priority=REQUEST, flags=emp.EXPECTS_REPLY)
    (arrival,) = [event for event in broker.core.events if hasattr(event, "messages")]
    broker.core.finish(arrival.lane, 1)
    broker.core.put_with(broker.core.lane("sender", REPLY), b"\x90", emp.REPLY, None, b"S" * 16)
    broker.core.flush_lazy()
    broker.core.flush(broker.now)
    assert [frames[0] for frames in broker.take()] == [emp.SEND, emp.ACK]


def test_rule_29_deferred_data_does_not_hold_up_a_signal() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver", prefetch=2)
    sender = room.peer("sender")
    for number in range(1, 6):
        sender.send("receiver", number)
    sender.send("receiver", 1, priority=SIGNAL)
    delivered = receiver.take(emp.DELIVER)
    assert [header.priority for header in delivered] == [DATA, DATA, SIGNAL]


def test_rule_29_a_batch_larger_than_the_prefetch_goes_when_nothing_else_is_in_flight() -> None:
    room = BrokerRoom(batch_bytes=1 << 16)
    receiver = room.peer("receiver", prefetch=3, prefetch_bytes=1000)
    sender = room.peer("sender")
    sender.send("receiver", 1)
    sender.send("receiver", 2, 50)
    sender.send("receiver", 52, size=5000)
    sender.send("receiver", 53)
    seen = []
    while delivered := receiver.take(emp.DELIVER):
        assert len(delivered) == 1
        seen.append((delivered[0].first, delivered[0].count))
        receiver.ack(delivered[0].lane, delivered[0].first + delivered[0].count - 1)
    assert seen == [(1, 1), (2, 50), (52, 1), (53, 1)]


def test_rule_29_an_empty_lane_admits_one_large_message() -> None:
    broker = RawBroker()
    broker.welcome()
    lane = broker.core.lane("x", DATA)
    assert broker.core.has_room(lane, 1 << 30)
    broker.core.put(lane, b"x" * (1 << 20))
    assert not broker.core.has_room(lane, 1)


def test_rule_30_the_window_holds_for_a_name_over_all_its_incarnations() -> None:
    room = BrokerRoom(declared={"receiver": ()}, window=10)
    refused = 0
    for _ in range(5):
        sender = room.peer("sender")
        sender.send("receiver", 1, 10)
        refused += len(sender.settled()[1])
        room.core.died("sender", sender.pid, room.now)
    assert refused == 30
    assert room.status("receiver")["queued"] == 20
    receiver = room.peer("receiver")
    assert sum(header.count for header in receiver.ack_all()) == 20
    assert room.core.statistics(room.now)["broker"]["messages_held"] == 0


def test_rule_30_what_overflows_is_refused_as_such() -> None:
    room = BrokerRoom(declared={"receiver": ()}, window=10)
    sender = room.peer("sender")
    sender.send("receiver", 1, 10)
    sender.send("receiver", 11, 10)
    sender.send("receiver", 21, 1)
    receiver = room.peer("receiver")
    receiver.ack_all()
    assert sender.settled() == (21, [(21, "overflow", None)])


def test_rule_31_a_send_in_a_handler_waits_only_so_long_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "HANDLER_WAIT_SECONDS", 0.02)

    async def scenario() -> None:
        bus = client.Bus("a", endpoint="ipc://nowhere")
        while True:
            try:
                bus.send_nowait("b", Message.build())
            except Congested:
                break
        token = current_handling.set(object())  # type: ignore[arg-type]
        try:
            with pytest.raises(Congested):
                await bus.send("b", Message.build())
        finally:
            current_handling.reset(token)
        waiting = asyncio.ensure_future(bus.send("b", Message.build()))
        await asyncio.sleep(0.06)  # longer than a handler would wait
        assert not waiting.done()
        waiting.cancel()

    run(scenario())


def test_rule_32_a_message_that_kills_its_receiver_is_delivered_alone_then_refused() -> None:
    room = BrokerRoom(declared={"receiver": ()}, solo_after_deaths=2, poison_after_deaths=4)
    sender = room.peer("sender", liveness=1000.0)
    sender.send("receiver", 1, 3)
    counts = []
    for _ in range(4):
        receiver = room.peer("receiver")
        (delivered,) = receiver.take(emp.DELIVER)
        if delivered.from_ == 1 and delivered.count == 3 and not counts:
            receiver.ack(delivered.lane, 1)  # the second one kills
        counts.append(delivered.count)
        room.core.died("receiver", receiver.pid, room.now)
    assert counts == [3, 3, 1, 1]
    last = room.peer("receiver")
    assert [(header.from_, header.first + header.count - 1) for header in last.ack_all()] == [(3, 3)]
    assert sender.settled() == (3, [(2, "failed", None)])


def test_rule_32_a_killer_in_the_middle_of_a_batch_is_found_after_few_deaths() -> None:
    """What was handled before it is not acknowledged: the ACK would have come after the batch."""
    room = BrokerRoom(declared={"receiver": ()}, solo_after_deaths=2, poison_after_deaths=3)
    sender = room.peer("sender", liveness=1000.0)
    sender.send("receiver", 1, 100)
    deaths = 0
    while room.status("receiver")["queued"]:
        receiver = room.peer("receiver")
        while delivered := receiver.take(emp.DELIVER):
            if any(header.from_ <= 60 < header.first + header.count for header in delivered):
                deaths += 1
                room.core.died("receiver", receiver.pid, room.now)
                break
            for header in delivered:
                receiver.ack(header.lane, header.first + header.count - 1)
        assert deaths < 10
    assert deaths == 2 + 3
    assert sender.settled() == (100, [(60, "failed", None)])


def test_rule_32_a_suspect_that_is_handled_clears_the_way() -> None:
    room = BrokerRoom(declared={"receiver": ()}, solo_after_deaths=1)
    sender, other = room.peer("sender", liveness=1000.0), room.peer("other", liveness=1000.0)
    sender.send("receiver", 1, 2)
    other.send("receiver", 1)
    receiver = room.peer("receiver")
    assert len(receiver.take(emp.DELIVER)) == 2
    room.core.died("receiver", receiver.pid, room.now)
    receiver = room.peer("receiver")
    seen = []
    while delivered := receiver.take(emp.DELIVER):
        assert len(delivered) == 1
        seen.append((delivered[0].sender, delivered[0].from_))
        receiver.ack(delivered[0].lane, delivered[0].first + delivered[0].count - 1)
    assert sorted(seen) == [("other", 1), ("sender", 1), ("sender", 2)]
    assert (sender.settled(), other.settled()) == ((2, []), (1, []))


# --- expiry, drain, retained ----------------------------------------------------------------------


def test_rule_33_only_what_waits_in_a_mailbox_expires() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver", prefetch=1, liveness=1000.0)
    sender = room.peer("sender", liveness=1000.0)
    sender.send("receiver", 1, ttl_ms=1000)
    sender.send("receiver", 2, ttl_ms=1000)
    room.pass_time(2.0)
    assert sender.settled() == (0, [])
    (delivered,) = receiver.take(emp.DELIVER)
    assert delivered.ttl_ms == 1000
    receiver.ack(delivered.lane, 1)
    assert sender.settled() == (2, [(2, "expired", None)])


def test_rule_33_a_redelivered_message_may_expire() -> None:
    room = BrokerRoom(declared={"receiver": ()})
    receiver = room.peer("receiver")
    sender = room.peer("sender", liveness=1000.0)
    sender.send("receiver", 1, ttl_ms=1000)
    room.core.died("receiver", receiver.pid, room.now)
    room.pass_time(2.0)
    assert sender.settled() == (1, [(1, "expired", None)])
    assert not room.peer("receiver").take(emp.DELIVER)


def test_rule_33_the_milliseconds_left_are_counted_from_send_to_delivery() -> None:
    pair = Pair(declared={"receiver": ()})
    sender = pair.join("sender")
    sender.send("receiver", deadline=pair.room.now + 10.0)
    pair.room.now += 2.0
    pair.settle()
    pair.room.now += 3.0
    receiver = pair.join("receiver")
    assert receiver.arrivals[0].header.ttl_ms == 5000


def test_rule_33_an_expired_message_between_two_delivered_ones_is_refused_once() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver", prefetch=1, liveness=1000.0)
    sender = room.peer("sender", liveness=1000.0)
    sender.send("receiver", 1)
    sender.send("receiver", 2, ttl_ms=500)
    sender.send("receiver", 3)
    room.pass_time(1.0)
    receiver.ack_all()
    assert sender.settled() == (3, [(2, "expired", None)])


def test_rule_33_what_the_receiver_repeats_from_void_is_not_told_twice() -> None:
    pair = Pair()
    sender, receiver = pair.join("sender"), pair.join("receiver")
    first = sender.send("receiver")
    expired = sender.send("receiver", deadline=pair.room.now)
    third = sender.send("receiver")
    pair.settle()
    assert receiver.finish() == ["sender-1", "sender-3"]
    pair.settle()
    assert (first.outcome, expired.outcome, third.outcome) == ([], [("expired", None)], [])
    assert pair.room.status("receiver")["refused"] == {"expired": 1}
    assert pair.room.status("receiver")["delivered"] == 2


def test_rule_34_a_draining_module_gets_replies_only_and_its_mailbox_is_kept() -> None:
    room = BrokerRoom(declared={"module": ()})
    module = room.peer("module", prefetch=1)
    sender = room.peer("sender")
    sender.send("module", 1)
    module.put(emp.DRAIN, emp.Drain(8000))
    (delivered,) = module.take(emp.DELIVER)
    sender.send("module", 2)
    sender.send("module", 1, priority=SIGNAL)
    sender.send("module", 1, priority=REPLY, flags=emp.REPLY, requester=module.incarnation)
    module.ack(delivered.lane, 1)
    assert [header.priority for header in module.take(emp.DELIVER)] == [REPLY]
    module.put(emp.BYE, emp.Bye(False))
    successor = room.peer("module")
    assert {(header.priority, header.first) for header in successor.take(emp.DELIVER)} == {(DATA, 2), (SIGNAL, 1)}


def test_rule_34_what_was_delivered_and_not_begun_goes_back_and_does_not_count_as_a_death() -> None:
    room = BrokerRoom(declared={"module": ()}, solo_after_deaths=1)
    sender = room.peer("sender")
    module = room.peer("module")
    sender.send("module", 1, 3)
    assert module.take(emp.DELIVER)
    module.put(emp.DRAIN, emp.Drain(0))
    module.put(emp.BYE, emp.Bye(False))
    successor = room.peer("module")
    assert [(header.from_, header.count) for header in successor.take(emp.DELIVER)] == [(1, 3)]


def test_rule_35_a_retained_message_that_is_not_newer_is_dropped_and_acknowledged() -> None:
    broker = RawBroker()
    broker.welcome()
    key = "node/connection"
    options = {"destination": "@g", "priority": SIGNAL}
    broker.deliver(1, retain=(key, (3, 2)), **options)
    assert len(broker.arrived()) == 1
    store = {"incarnation": b"store".ljust(16), "generation": 0, "lane": 2, "flags": emp.FROM_STORE}
    broker.deliver(1, retain=(key, (3, 2)), **options, **store)
    broker.deliver(2, retain=(key, (3, 1)), **options, **store)
    assert broker.arrived() == []
    assert broker.acks() == [(2, 2, [])]
    broker.deliver(1, lane=3, incarnation=b"new".ljust(16), generation=6, retain=(key, (6, 1)), **options)
    assert len(broker.arrived()) == 1
    broker.deliver(2, lane=3, incarnation=b"new".ljust(16), generation=6, retain=("other", (1, 1)), **options)
    assert len(broker.arrived()) == 1


def test_rule_35_a_restarted_source_wins_though_its_counter_begins_at_one() -> None:
    pair = Pair(declared={"source": ()})
    source = pair.join("source")
    for text in (b'"old"', b'"older than new"'):
        source.core.put_retained("@g", SIGNAL, "k", encode_message(Message(id="x", content=text)))
    pair.settle()
    pair.kill(source)
    source = pair.join("source")
    source.core.put_retained("@g", SIGNAL, "k", encode_message(Message(id="y", content=b'"new"')))
    pair.settle()
    member = pair.join("member", groups=["g"])
    assert [message.content for arrival in member.arrivals for message in arrival.messages] == [b'"new"']


def test_rule_35_a_restarted_member_gets_its_mailbox_and_the_store_but_handles_one() -> None:
    pair = Pair(declared={"member": ["g"]})
    source = pair.join("source")
    source.core.put_retained("@g", SIGNAL, "k", encode_message(Message(id="x")))
    pair.settle()
    member = pair.join("member", groups=["g"])
    assert member.waiting == ["x"]
    member.finish()
    pair.settle()
    assert pair.room.status("member")["queued"] == 0
    assert pair.room.status("member")["in_flight"] == 0


def test_rule_36_after_a_brokers_restart_the_announcement_reaches_who_came_first() -> None:
    pair = Pair(grace=0.2, declared={"source": ()})
    source = pair.join("source")
    source.core.put_retained("@g", SIGNAL, "k", encode_message(Message(id="x")))
    pair.settle()
    pair.pass_time(0.3)
    assert source.core.lanes[("@g", SIGNAL)].messages == 0
    pair.restart_broker()
    late = pair.join("late", groups=["g"])  # a new process, there before the source
    assert late.waiting == []
    source.connect()
    pair.settle()
    pair.pass_time(0.3)
    assert late.waiting == ["x"]


def test_rule_37_permission_and_retained_keys_need_no_look_into_the_body() -> None:
    access = Denying()
    access.denied.add(("sender", "@secret"))
    room = BrokerRoom(access=access)
    member = room.peer("member", groups=["g", "secret"])
    sender = room.peer("sender")
    sender.send("@secret", 1, body=b"\xc1 no msgpack at all")
    assert sender.settled() == (1, [(1, "denied", None)])
    sender.send("@g", 1, body=b"\xc1 nor this", retain=("k", 1))
    assert [header.retain_key for header in member.ack_all()] == ["k"]
    assert [header.retain_key for header in room.peer("later", groups=["g"]).take(emp.DELIVER)] == ["k"]


def test_rule_38_a_tap_gets_no_more_than_its_credit_and_the_drops_are_counted() -> None:
    room = BrokerRoom()
    reader, sender = room.peer("reader"), room.peer("sender")
    reader.put(emp.ADMIN, emp.Admin(1, "tap"), b"\x81\xa6credit\x03")
    for number in range(1, 11):
        sender.send("nobody", number)
    assert len(reader.take(emp.ADMIN)) == 1 + 3
    reader.put(emp.ADMIN, emp.Admin(1, "tap"), b"\x81\xa6credit\x03")
    sender.send("nobody", 11)
    (frames,) = [frames for frames in reader.inbox if frames[0] == emp.ADMIN]
    assert b"\xa7dropped\x07" in frames[2]


def test_rule_38_settlements_of_one_turn_are_one_frame() -> None:
    room = BrokerRoom()
    sender = room.peer("sender")
    for number in range(1, 51):
        header = emp.Send("nobody", DATA, number, 1, 1)
        room.core.receive(sender.address, emp.encode(emp.SEND, header, make_body(number)), room.now)
    room.settle()
    (settled,) = sender.take(emp.SETTLED)
    assert settled.cumulative == 50
    assert len(settled.exceptions) == 50


def test_every_rule_has_a_test() -> None:
    rules = {int(name.split("_")[2]) for name in globals() if name.startswith("test_rule_")}
    assert rules == set(range(1, 39))


def test_no_rule_breaks_on_a_frame_that_no_broker_would_send() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(3, from_=2)
    broker.deliver(3, from_=4)
    broker.deliver(3, floor=4)
    assert len(broker.events(Complaint)) == 3
    assert broker.acks() == []
