"""The SDK's core beside the numbered rules (test_rules.py): batches, windows, settlement, connection, limits."""

from __future__ import annotations

import pytest

from runtime import emp
from runtime.client_core import (
    HELLO_AGAIN_SECONDS,
    AdminAnswer,
    Arrival,
    Attached,
    ClientCore,
    Complaint,
    Detached,
    Ended,
    Replied,
    Room,
    State,
    Woken,
)
from runtime.errors import HelloRefused
from runtime.message import Message, decode_batch, encode_message
from tests.support.bus_pair import DATA, REPLY, REQUEST, SIGNAL, Pair, RawBroker, make_body


def put(broker: RawBroker, count: int = 1, *, to: str = "x", priority: int = DATA, size: int = 0) -> list[object]:
    lane = broker.core.lane(to, priority)
    data = encode_message(Message(id="m", kind="bytes", content=b"x" * size))
    return [broker.core.put(lane, data) for _ in range(count)]


def sends(broker: RawBroker) -> list[tuple[str, int, int]]:
    return [(send.destination, send.first, send.count) for send in broker.flush(emp.SEND)]


# --- batches --------------------------------------------------------------------------------------


def test_what_is_put_between_two_flushes_goes_out_as_one_batch_per_lane() -> None:
    broker = RawBroker()
    broker.welcome()
    put(broker, 3)
    put(broker, 2, to="y")
    put(broker, 1)
    assert sends(broker) == [("x", 1, 4), ("y", 1, 2)]
    put(broker)
    assert sends(broker) == [("x", 5, 1)]
    assert sends(broker) == []


def test_a_batch_is_closed_when_it_is_full_by_count_or_by_bytes() -> None:
    broker = RawBroker(window=1000)
    broker.welcome()
    put(broker, 300)
    assert [count for _, _, count in sends(broker)] == [128, 128, 44]
    put(broker, 3, size=5000)
    assert [count for _, _, count in sends(broker)] == [1, 1, 1]


def test_a_batch_is_cut_where_its_header_would_differ() -> None:
    broker = RawBroker()
    broker.welcome()
    lane = broker.core.lane("x", DATA)
    put(broker, 2)
    broker.core.put_with(lane, b"\x90", emp.EXPECTS_REPLY, None, None)
    broker.core.put_with(lane, b"\x90", 0, 105.0, None)
    broker.core.put_with(lane, b"\x90", 0, 105.0, None)
    put(broker)
    headers = broker.flush(emp.SEND)
    assert [(send.first, send.count, send.flags, send.ttl_ms) for send in headers] == [
        (1, 2, 0, None),
        (3, 1, emp.EXPECTS_REPLY, None),
        (4, 2, 0, 5000),
        (6, 1, 0, None),
    ]


def test_a_full_batch_can_leave_before_the_flush() -> None:
    broker = RawBroker(window=1000)
    broker.welcome()
    put(broker, 130)
    broker.core.flush_lane(broker.core.lane("x", DATA), broker.now)
    assert [emp.decode(frames)[1].count for frames in broker.take()] == [128]
    assert sends(broker) == [("x", 129, 2)]


def test_a_retained_message_stands_alone_in_its_batch() -> None:
    broker = RawBroker()
    broker.welcome()
    put(broker, 2, to="@g", priority=SIGNAL)
    broker.core.put_retained("@g", SIGNAL, "k", b"\x90")
    put(broker, 2, to="@g", priority=SIGNAL)
    headers = broker.flush(emp.SEND)
    assert [(send.first, send.count, send.retain_key) for send in headers] == [(1, 2, None), (3, 1, "k"), (4, 2, None)]


# --- windows --------------------------------------------------------------------------------------


def test_the_window_is_small_until_the_broker_has_said_what_it_allows() -> None:
    broker = RawBroker(window=1000)
    lane = broker.core.lane("x", DATA)
    admitted = 0
    while broker.core.has_room(lane, 10) and admitted < 2000:
        put(broker)
        admitted += 1
    assert admitted == 64
    broker.welcome()
    assert broker.core.has_room(lane, 10)


def test_settlement_makes_room_and_says_so_to_who_waits() -> None:
    broker = RawBroker(window=2)
    broker.welcome()
    put(broker, 2)
    broker.flush()
    lane = broker.core.lane("x", DATA)
    assert not broker.core.has_room(lane, 1)
    broker.give(emp.SETTLED, emp.Settled("x", DATA, 1))
    assert broker.events(Room) == []  # nobody waits
    lane.waiters.append("somebody")
    broker.give(emp.SETTLED, emp.Settled("x", DATA, 2))
    assert broker.events(Room) == [Room(lane)]
    assert (lane.messages, lane.size, lane.floor) == (0, 0, 3)


# --- settlement -----------------------------------------------------------------------------------


def test_waiters_wake_when_their_own_number_is_settled() -> None:
    broker = RawBroker()
    broker.welcome()
    (batch, *_) = put(broker, 4)
    batch.waiters = [(2, "second"), (4, "fourth")]  # type: ignore[attr-defined]
    broker.flush()
    broker.give(emp.SETTLED, emp.Settled("x", DATA, 1))
    assert broker.events(Woken) == []
    broker.give(emp.SETTLED, emp.Settled("x", DATA, 3))
    assert broker.events(Woken) == [Woken(["second"])]
    broker.give(emp.SETTLED, emp.Settled("x", DATA, 4, [(4, "denied", None)]))
    assert broker.events(Woken) == [Woken(["fourth"])]
    assert batch.refusals == {4: [("denied", None)]}  # type: ignore[attr-defined]


def test_an_exception_that_is_told_again_counts_once() -> None:
    broker = RawBroker()
    broker.welcome()
    (batch, *_) = put(broker, 3)
    broker.flush()
    told = emp.Settled("x", DATA, 2, [(1, "gone", "a"), (1, "failed", "b"), (2, "denied", None)])
    broker.give(emp.SETTLED, told)
    broker.welcome()
    broker.give(emp.SETTLED, told)
    broker.give(emp.SETTLED, emp.Settled("x", DATA, 3, told.exceptions))
    assert batch.refusals == {1: [("gone", "a"), ("failed", "b")], 2: [("denied", None)]}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "settled",
    [
        emp.Settled("never sent to", DATA, 1),
        emp.Settled("x", DATA, 0),
        emp.Settled("x", DATA, 9),
        emp.Settled("x", DATA, 2**62, [(5, "denied", None)]),
    ],
    ids=str,
)
def test_a_settlement_of_what_was_not_sent_changes_nothing(settled: emp.Settled) -> None:
    broker = RawBroker()
    broker.welcome()
    put(broker, 2)
    broker.flush()
    broker.give(emp.SETTLED, settled)
    assert broker.core.lane("x", DATA).messages == 2


def test_what_was_not_yet_sent_is_not_settled() -> None:
    broker = RawBroker()
    broker.welcome()
    put(broker)
    broker.flush()
    put(broker)
    broker.give(emp.SETTLED, emp.Settled("x", DATA, 2))
    assert broker.core.lane("x", DATA).messages == 1
    assert sends(broker) == [("x", 2, 1)]


# --- the connection -------------------------------------------------------------------------------


def test_the_life_of_a_connection() -> None:
    broker = RawBroker()
    core = broker.core
    assert core.state is State.DETACHED
    core.connected(broker.now)
    assert core.state is State.GREETING
    assert core.next_deadline(broker.now) == broker.now + HELLO_AGAIN_SECONDS
    broker.welcome(late=True)
    assert core.state is State.ATTACHED
    core.disconnected(broker.now, "cut")
    assert core.state is State.DETACHED
    core.disconnected(broker.now)  # idempotent
    assert [type(event) for event in core.events] == [Attached, Detached]
    assert core.next_deadline(broker.now) > broker.now + 1000
    broker.welcome(epoch=2)
    assert [event.anew for event in broker.events(Attached)] == [True, True]


def test_an_old_welcome_of_the_same_broker_is_ignored() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.welcome()
    old = emp.Welcome((1).to_bytes(8, "big"), 1, 3, 5000, False)
    broker.give(emp.WELCOME, old)
    assert (broker.core.session, broker.core.generation) == (2, 7)


def test_a_broker_that_answers_no_ping_is_greeted_anew() -> None:
    broker = RawBroker(liveness_seconds=2.0)
    broker.welcome()
    broker.core.ping(broker.now)
    broker.take()
    begin = broker.now
    while broker.core.state is State.ATTACHED:
        broker.now = broker.core.next_deadline(broker.now)
        broker.core.expire(broker.now)
        assert broker.now < begin + 2.1
    assert [frames[0] for frames in broker.take()] == [emp.HELLO]
    assert broker.events(Detached)


def test_pings_carry_the_modules_counters_and_come_often_enough() -> None:
    broker = RawBroker(liveness_seconds=3.0)
    broker.welcome()
    broker.core.counters = {"uploads": 4}
    assert broker.core.next_deadline(broker.now) <= broker.now + 1.0  # a third of the liveness time
    broker.now = broker.core.next_deadline(broker.now)
    broker.core.expire(broker.now)
    assert broker.flush(emp.PING)[0].counters == {"uploads": 4}


def test_floors_are_told_again_after_a_lost_connection_and_in_bounded_pieces() -> None:
    broker = RawBroker()
    broker.welcome()
    for number in range(1500):
        put(broker, to=f"to-{number}")
    broker.flush()
    for number in range(1500):
        broker.give(emp.SETTLED, emp.Settled(f"to-{number}", DATA, 1))
    told = []
    for _ in range(3):
        broker.core.ping(broker.now)
        (ping,) = broker.flush(emp.PING)
        told.append(len(ping.floors))
        assert len(emp.encode(emp.PING, ping)[1]) < emp.MAX_HEADER_BYTES
    assert sum(told) == 1500
    assert told[-1] == 0
    (ping,) = [emp.decode(frames)[1] for frames in broker.welcome() if frames[0] == emp.PING]
    assert len(ping.floors) > 1000


def test_a_refused_hello_ends_it_and_a_refused_frame_is_a_complaint() -> None:
    broker = RawBroker()
    broker.core.connected(broker.now)
    broker.give(emp.REFUSED, emp.Refused(emp.BAD_HEADER, "of an earlier frame"))
    assert broker.events(Complaint) == [Complaint(emp.BAD_HEADER, "of an earlier frame")]
    broker.give(emp.REFUSED, emp.Refused(emp.BAD_VERSION, "speaks EMP/2"))
    (ended,) = broker.events(Ended)
    assert isinstance(ended.error, HelloRefused)
    assert broker.core.state is State.ENDED
    broker.core.connected(broker.now)
    assert broker.take()[1:] == []  # the HELLO of before; nothing more is said
    broker = RawBroker()
    broker.welcome()
    broker.give(emp.REFUSED, emp.Refused(emp.TOO_MANY, "destinations"))
    assert broker.core.state is State.ATTACHED
    assert broker.events(Complaint) == [Complaint(emp.TOO_MANY, "destinations")]


def test_a_draining_module_says_so_again_after_a_reconnect_and_bye_is_its_last_word() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.core.drain(8.0)
    assert broker.flush(emp.DRAIN)[0].deadline_ms == 8000
    assert emp.DRAIN in [frames[0] for frames in broker.welcome()]
    put(broker)
    broker.deliver(1, priority=REQUEST, flags=emp.EXPECTS_REPLY)
    (arrival,) = [event for event in broker.core.events if isinstance(event, Arrival)]
    broker.core.finish(arrival.lane, 1)
    broker.core.bye(leaving=False, now=broker.now)
    assert [frames[0] for frames in broker.take()] == [emp.SEND, emp.ACK, emp.BYE]
    broker.core.flush(broker.now)
    broker.core.connected(broker.now)
    assert broker.take() == []


# --- receiving ------------------------------------------------------------------------------------


def test_messages_of_a_batch_arrive_together_with_their_numbers() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(4, 3, from_=5, floor=2)
    (arrival,) = broker.events(Arrival)
    assert (arrival.first, [message.id for message in arrival.messages]) == (5, ["m5", "m6"])
    broker.core.finish(arrival.lane, 6)
    assert broker.acks() == []
    broker.core.finish(arrival.lane, 5)
    broker.core.finish(arrival.lane, 5, emp.FAILED)  # the first word counts
    assert broker.acks() == [(1, 6, [])]


@pytest.mark.parametrize("body", [b"\xc1", b"\x90", b"\x92\x90\x90", b"\x91\x91\xc0", b""], ids=repr)
def test_a_body_that_is_no_batch_is_refused_as_invalid(body: bytes) -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1, 1, body=body)
    assert [complaint.code for complaint in broker.events(Complaint)] == [emp.INVALID]
    assert broker.acks() == [(1, 1, [(1, "invalid")])]
    broker.deliver(2)
    assert broker.arrived() == [2]


def test_one_ack_covers_all_lanes() -> None:
    broker = RawBroker()
    broker.welcome()
    for lane, sender in enumerate(("a", "b", "c"), 1):
        broker.deliver(1, sender=sender, incarnation=sender.encode() * 16, lane=lane)
    for arrival in broker.events(Arrival):
        broker.core.finish(arrival.lane, 1)
    assert broker.core.has_acks
    (ack,) = broker.flush(emp.ACK)
    assert ack.lanes == [(1, 1, []), (2, 1, []), (3, 1, [])]
    assert not broker.core.has_acks


def test_acks_of_requests_may_wait_but_a_refusal_does_not() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1, 2, priority=REQUEST, flags=emp.EXPECTS_REPLY)
    (arrival,) = broker.events(Arrival)
    broker.core.finish(arrival.lane, 1)
    broker.core.flush(broker.now)
    assert broker.take() == []
    assert broker.core.has_lazy_acks
    assert broker.acks() == [(1, 1, [])]
    broker.core.finish(arrival.lane, 2, "denied")
    broker.core.flush(broker.now)
    assert [frames[0] for frames in broker.take()] == [emp.ACK]


def test_a_long_reason_is_cut_to_what_frames_carry() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1)
    (arrival,) = broker.events(Arrival)
    broker.core.finish(arrival.lane, 1, "r" * 1000)
    assert broker.acks() == [(1, 1, [(1, "r" * emp.MAX_REASON_CHARS)])]


@pytest.mark.parametrize(
    "frames",
    [[], [b"x"], [emp.DELIVER, b"\xc1", b""], [b"WELCOME/2", b"\x90"], [emp.PONG, b"\x91\x01", b"body"]],
    ids=repr,
)
def test_malformed_frames_of_the_broker_are_complaints(frames: list[bytes]) -> None:
    broker = RawBroker()
    broker.welcome()
    broker.core.receive(frames, broker.now)
    assert len(broker.events(Complaint)) == 1
    assert broker.core.state is State.ATTACHED


def test_frames_that_only_modules_send_are_ignored() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.core.events.clear()
    for verb, header in ((emp.PING, emp.Ping(1)), (emp.BYE, emp.Bye(True)), (emp.DRAIN, emp.Drain(1))):
        broker.give(verb, header)
    assert broker.core.events == []
    assert broker.take() == []


def test_answers_of_admin_are_handed_on() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.give(emp.ADMIN, emp.Admin(3, "status"), b"\x80")
    assert broker.events(AdminAnswer) == [AdminAnswer(emp.Admin(3, "status"), b"\x80")]


def test_two_cores_in_a_room_carry_a_thousand_messages_in_order() -> None:
    pair = Pair(window=50)
    sender, receiver = pair.join("sender"), pair.join("receiver")
    handled: list[str] = []
    sent = []
    for _ in range(40):
        sent += [sender.send("receiver") for _ in range(25)]
        pair.settle()
        handled += receiver.finish()
    pair.settle()
    assert handled == [f"sender-{number}" for number in range(1, 1001)]
    assert all(each.outcome == [] for each in sent)


def test_an_encoded_batch_holds_what_was_put() -> None:
    broker = RawBroker()
    broker.welcome()
    put(broker, 2)
    broker.core.flush(broker.now)
    (frames,) = broker.take()
    assert [message.id for message in decode_batch(frames[2])] == ["m", "m"]


def test_a_core_without_connection_keeps_what_it_is_given() -> None:
    core = ClientCore("a", incarnation=b"i" * 16)
    core.put(core.lane("x", DATA), b"\x90")
    core.flush(1.0)
    core.drain(1.0)
    core.ask_fresh(1.0)
    assert core.out == []
    core.bye(leaving=True, now=1.0)
    assert core.out == []


def test_only_who_was_asked_can_answer() -> None:
    """Ids are a prefix and a counter: who has one message of ours can guess the next."""
    broker = RawBroker()
    broker.welcome()
    broker.core.expect("question", "waiter", "oracle")
    body = make_body(1, parent="question")
    broker.deliver(
        1, sender="liar", incarnation=b"L" * 16, priority=REPLY, flags=emp.REPLY, requester=b"R" * 16, body=body
    )
    assert not [event for event in broker.core.events if isinstance(event, Replied)]
    assert broker.core.late_replies == 1
    broker.deliver(1, lane=2, sender="oracle", priority=REPLY, flags=emp.REPLY, requester=b"R" * 16, body=body)
    assert [event.sender for event in broker.core.events if isinstance(event, Replied)] == ["oracle"]


def test_another_sender_with_the_same_incarnation_does_not_pass_for_it() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1, 5, sender="thief", incarnation=b"S" * 16)
    broker.deliver(1, 2, lane=2, sender="sender", incarnation=b"S" * 16)
    arrived = [(event.header.sender, event.first) for event in broker.core.events if isinstance(event, Arrival)]
    assert arrived == [("thief", 1), ("sender", 1)]
