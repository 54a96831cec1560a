"""Corners of the bus that a review found: each test is the schedule that went wrong."""

from __future__ import annotations

import itertools

from runtime import emp
from runtime.client_core import LIMITS_BEFORE_WELCOME, ClientCore
from runtime.message import Message, encode_message
from tests.support.bus_pair import REPLY, BrokerRoom, RawBroker

ABSENT = 30.0


def test_a_module_that_was_let_go_and_comes_back_hears_of_what_was_retained_meanwhile() -> None:
    room = BrokerRoom(absent_limit_seconds=ABSENT)
    source = room.peer("source")
    member = room.peer("member", groups=["g"])
    source.send("@g", 1, retain=("state", 1))
    member.ack_all()
    late = room.peer("late", groups=["g"])
    first = late.take(emp.DELIVER)
    assert [header.flags & emp.FROM_STORE for header in first] == [emp.FROM_STORE]
    late.ack(first[0].lane, first[0].first)
    for _ in range(6):
        room.pass_time(10.0)
        source.put(emp.PING, emp.Ping(1))
        member.put(emp.PING, emp.Ping(1))
    assert "late" not in [module["name"] for module in room.core.statistics(room.now)["modules"]]
    source.send("@g", 2, retain=("state", 2), floor=2)
    member.ack_all()
    late.hello()
    again = late.take(emp.DELIVER)
    assert [header.retain_version[1] for header in again] == [2]
    assert again[0].first > first[0].first, "its book knows the old number: a new message needs a new one"


def test_more_refusals_than_one_header_holds_are_told_in_pieces() -> None:
    room = BrokerRoom(window=3000)
    sender = room.peer("sender")
    for first in range(1, 2501, 100):
        sender.send("nobody", first, 100)
    told = sender.take(emp.SETTLED)
    assert max(len(settled.exceptions) for settled in told) <= emp.MAX_EXCEPTIONS
    assert [number for settled in told for number, _, _ in settled.exceptions] == list(range(1, 2501))
    assert told[-1].cumulative == 2500
    # After a reconnect all that the floor has not passed is told again: in pieces too (rule 11).
    sender.hello()
    told = sender.take(emp.SETTLED)
    assert len(told) == 3
    assert [number for settled in told for number, _, _ in settled.exceptions] == list(range(1, 2501))
    for settled, following in itertools.pairwise(told):
        assert settled.cumulative < following.exceptions[0][0] <= settled.cumulative + 1


def test_more_refusals_than_one_ack_holds_are_acknowledged_in_pieces() -> None:
    broker = RawBroker()
    broker.welcome()
    broker.deliver(1, 1024)
    broker.deliver(1025, 1024)
    broker.deliver(2049, 452)
    lane = broker.core._in[("sender", b"S" * 16, "receiver", 3)]
    for number in range(1, 2501):
        broker.core.finish(lane, number, emp.FAILED if number % 5 else None)
    acks = broker.flush(emp.ACK)
    entries = [entry for ack in acks for entry in ack.lanes]
    assert entries[-1][1] == 2500
    assert max(len(exceptions) for _, _, exceptions in entries) <= emp.MAX_EXCEPTIONS
    assert [number for _, _, exceptions in entries for number, _ in exceptions] == [
        number for number in range(1, 2501) if number % 5
    ]
    for _, cumulative, exceptions in entries:
        assert all(number <= cumulative for number, _ in exceptions)


def test_a_large_reply_does_not_share_a_batch_that_would_be_too_large() -> None:
    core = ClientCore("responder", incarnation=b"R" * 16)
    lane = core.lane("asker", REPLY)
    small = encode_message(Message(id="a", kind="bytes", content=b"x" * 60_000))
    large = encode_message(Message(id="b", kind="bytes", content=b"x" * (LIMITS_BEFORE_WELCOME.message_bytes - 200)))
    first = core.put_with(lane, small, emp.REPLY, None, b"A" * 16)
    second = core.put_with(lane, large, emp.REPLY, None, b"A" * 16)
    assert first is not second
    plain = core.lane("asker", 3)
    assert core.put(plain, small) is not core.put(plain, large)


def test_a_death_counts_although_the_connection_was_lost_before_it() -> None:
    room = BrokerRoom(declared={"victim": ()}, solo_after_deaths=1, poison_after_deaths=2)
    sender = room.peer("sender")
    sender.send("victim", 1, 2)
    for _ in range(2):
        victim = room.peer("victim", pid=4000 + room.serial)
        assert victim.take(emp.DELIVER)
        room.core.lost(victim.address, room.now)
        room.core.died("victim", victim.pid, room.now)
    victim = room.peer("victim")
    victim.ack_all()
    assert sender.settled() == (2, [(1, emp.FAILED, None)])


def test_a_lost_connection_alone_counts_against_nobody() -> None:
    room = BrokerRoom(declared={"victim": ()}, solo_after_deaths=1, poison_after_deaths=2)
    sender = room.peer("sender")
    sender.send("victim", 1, 2)
    victim = room.peer("victim")
    for _ in range(5):
        room.core.lost(victim.address, room.now)
        victim.move()
        victim.hello()
    assert room.status("victim")["suspects"] == 0
    victim.ack_all()
    assert sender.settled() == (2, [])


def test_an_idle_module_pings_at_the_heartbeat_and_not_only_before_it_would_be_called_silent() -> None:
    broker = RawBroker(liveness_seconds=15.0)
    broker.answer_ping(broker.welcome())
    pinged = []
    end = broker.now + 40.0
    due = broker.core.next_deadline(broker.now)
    while due < end:
        broker.now = due
        broker.core.expire(due)
        # As the shell does it: the timer is armed after PING went out, before its PONG is here.
        due = broker.core.next_deadline(broker.now)
        for frames in broker.take():
            if frames[0] == emp.PING:
                pinged.append(broker.now)
                broker.answer_ping([frames])
    assert len(pinged) >= 7
    assert max(later - before for before, later in itertools.pairwise(pinged)) <= 5.01
