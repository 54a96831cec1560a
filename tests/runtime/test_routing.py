"""The broker's core beside the numbered rules (test_rules.py): limits, budgets, who may, and that nothing piles up."""

from __future__ import annotations

import pytest

from runtime import emp
from runtime.access import Credentials, Open
from runtime.message import decode_batch
from runtime.routing import Life
from tests.support.bus_pair import DATA, REPLY, REQUEST, SIGNAL, BrokerRoom, Pair, make_body


class OnlyRoot(Open):
    """uid 0 may be `hub`; `guest` may send to `hub` alone."""

    def refuse_hello(self, name: str, groups: tuple[str, ...], credentials: Credentials) -> str | None:
        return "hub is uid 7's" if name == "hub" and credentials.uid != 7 else None

    def may_send(self, sender: str, destination: str, priority: int) -> bool:
        return sender != "guest" or destination == "hub"


def held(room: BrokerRoom) -> tuple[int, int]:
    broker = room.core.statistics(room.now)["broker"]
    return broker["messages_held"], broker["bytes_held"]


# --- refusals -------------------------------------------------------------------------------------


def test_unroutable_denied_and_too_large_are_told_with_their_reason() -> None:
    room = BrokerRoom(access=OnlyRoot(), message_bytes=1000, batch_bytes=500)
    room.peer("receiver")
    guest, sender = room.peer("guest"), room.peer("sender")
    sender.send("nobody", 1)
    sender.send("@empty", 1)
    guest.send("receiver", 1)
    sender.send("receiver", 1, size=1100)
    reasons = {header.destination: header.exceptions for header in sender.take(emp.SETTLED)}
    assert reasons == {
        "nobody": [(1, "unroutable", None)],
        "@empty": [(1, "unroutable", None)],
        "receiver": [(1, "too-large", None)],
    }
    assert guest.settled() == (1, [(1, "denied", None)])
    assert held(room) == (0, 0)
    assert room.status("sender")["refused"] == {"unroutable": 2, "too-large": 1}


def test_a_hello_that_may_not_have_the_name_is_refused_with_the_reason() -> None:
    room = BrokerRoom(access=OnlyRoot())
    (refused,) = room.peer("hub").take(emp.REFUSED)
    assert (refused.code, refused.text) == (emp.HELLO_DENIED, "hub is uid 7's")


def test_more_names_than_the_limit_are_refused() -> None:
    room = BrokerRoom(max_modules=3)
    for number in range(3):
        assert room.peer(f"m{number}").take(emp.WELCOME)
    assert [refused.code for refused in room.peer("m3").take(emp.REFUSED)] == [emp.TOO_MANY]


def test_a_generation_that_leaves_no_room_above_it_is_refused() -> None:
    room = BrokerRoom()
    assert [r.code for r in room.peer("s", generation=2**62 + 1).take(emp.REFUSED)] == [emp.BAD_HEADER]
    assert room.peer("s").take(emp.WELCOME)


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b"SHOUT/1", b"\x90"], emp.UNKNOWN_VERB),
        ([b"SEND/9", b"\x90", b""], emp.BAD_VERSION),
        ([emp.SEND, b"\xc1", b""], emp.BAD_HEADER),
        ([emp.WELCOME, emp.encode(emp.WELCOME, emp.Welcome(b"e" * 8, 1, 1, 1, False))[1]], emp.UNKNOWN_VERB),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_frame_is_refused_and_the_peer_served_on(frames: list[bytes], code: str) -> None:
    room = BrokerRoom()
    peer = room.peer("peer")
    peer.raw(frames)
    assert [refused.code for refused in peer.take(emp.REFUSED)] == [code]
    peer.put(emp.PING, emp.Ping(3))
    assert [pong.nonce for pong in peer.take(emp.PONG)] == [3]
    assert room.core.statistics(room.now)["broker"]["refused_frames"] == {code: 1}


def test_a_stranger_is_asked_who_it_is() -> None:
    room = BrokerRoom()
    peer = room.peer("peer")
    peer.move()
    peer.send("nobody", 1)
    peer.put(emp.PING, emp.Ping(1))
    assert peer.verbs() == [emp.WHO]


# --- the byte budget ------------------------------------------------------------------------------


def test_the_byte_budget_pushes_back_and_nothing_is_lost() -> None:
    pair = Pair(declared={"away": ()}, byte_budget=20_000, reserve_bytes=2_000, window=1000)
    sender = pair.join("sender")
    sent = []
    for _ in range(200):
        sent.append(sender.send("away"))
        if len(sent) % 5 == 0:
            pair.settle()
    messages, size = held(pair.room)
    assert size <= 20_000
    assert 0 < messages < 200 or size < 20_000
    assert all(each.outcome is None for each in sent)
    away = pair.join("away")
    handled: list[str] = []
    for _ in range(100):
        pair.settle()
        handled += away.finish()
        pair.pass_time(0.1)
    assert handled == [f"sender-{number}" for number in range(1, 201)]
    assert all(each.outcome == [] for each in sent)


def test_a_mailbox_that_uses_up_the_budget_does_not_stop_the_lanes_to_others() -> None:
    pair = Pair(declared={"away": ()}, byte_budget=10_000, reserve_bytes=1_000, window=1000, batch_bytes=400)
    sender, busy = pair.join("sender"), pair.join("busy", prefetch_messages=5)
    for _ in range(300):
        sender.send("away")
        sender.core.flush(pair.room.now)
    pair.settle()
    assert held(pair.room)[1] > 7_500  # and it will stay so: `away` does not come
    sent = [sender.send("busy") for _ in range(200)]
    handled: list[str] = []
    for _ in range(300):
        pair.settle()
        handled += busy.finish()
        pair.pass_time(0.01)
    assert len(handled) == 200
    assert all(each.outcome == [] for each in sent)


# --- the accounts close ---------------------------------------------------------------------------


def test_short_lived_senders_leave_nothing_behind() -> None:
    room = BrokerRoom(declared={"receiver": ["g"]})
    receiver = room.peer("receiver", groups=["g"])
    for number in range(50):
        visitor = room.peer(f"cli-{number}")
        visitor.send("receiver", 1)
        visitor.send("@g", 1)
        visitor.send("nobody", 1)
        receiver.ack_all()
        receiver.inbox.clear()
        visitor.put(emp.BYE, emp.Bye(True))
    module = room.core._modules["receiver"]
    assert len(room.core._modules) == 1
    assert len(module.outlets) == 0
    assert len(module.feeds) == 0
    assert len(room.core._departed) == 0


def test_a_responder_to_short_lived_requesters_never_runs_out_of_lanes() -> None:
    pair = Pair(max_lanes=8)
    responder = pair.join("responder")
    for number in range(40):
        visitor = pair.join(f"cli-{number}")
        visitor.core.expect("q", "w")
        visitor.send("responder", priority=REQUEST, flags=emp.EXPECTS_REPLY)
        pair.settle()
        responder.finish()
        reply = responder.send(f"cli-{number}", priority=REPLY, flags=emp.REPLY, requester=visitor.core.incarnation)
        pair.settle()
        visitor.core.bye(leaving=True, now=pair.room.now)
        pair.settle()
        assert reply.outcome == []
        pair.parties.remove(visitor)
        pair.pass_time(6.0)


def test_a_sender_that_walks_over_many_names_does_not_grow_the_broker() -> None:
    room = BrokerRoom(max_lanes=10)
    sender = room.peer("sender")
    for number in range(200):
        sender.send(f"nobody-{number}", 1)
        sender.put(emp.PING, emp.Ping(number, {}, [(f"nobody-{number}", DATA, 2)]))
    module = room.core._modules["sender"]
    assert len(module.holder.lanes) <= 10 if module.holder else False
    assert len(module.usages) <= 10


def test_accounts_close_after_every_kind_of_end() -> None:
    room = BrokerRoom(declared={"receiver": ["g"]}, absent_limit_seconds=5.0)
    receiver, other = room.peer("receiver", groups=["g"]), room.peer("other", groups=["g"], liveness=100.0)
    sender = room.peer("sender", liveness=1000.0)
    sender.send("@g", 1, 5)
    sender.send("receiver", 1, 5, ttl_ms=100)
    sender.send("receiver", 1, 5, priority=SIGNAL)
    sender.send("other", 1, 5)
    room.core.died("other", other.pid, room.now)
    receiver.move()
    receiver.hello()
    room.pass_time(1.0)
    receiver.ack_all()
    room.pass_time(6.0)
    assert held(room) == (0, 0)
    status = room.status("receiver")
    assert (status["queued"], status["in_flight"], status["queued_bytes"]) == (0, 0, 0)
    told = {(header.destination, header.priority): header.cumulative for header in sender.take(emp.SETTLED)}
    assert told == {("@g", DATA): 5, ("receiver", DATA): 5, ("receiver", SIGNAL): 5, ("other", DATA): 5}


def test_retained_messages_are_bounded_and_the_one_too_many_is_refused() -> None:
    room = BrokerRoom(max_retained=2, max_retained_bytes=1000)
    room.peer("member", groups=["g"])
    sender = room.peer("sender")
    sender.send("@g", 1, retain=("a", 1))
    sender.send("@g", 2, retain=("b", 2))
    sender.send("@g", 3, retain=("c", 3))
    sender.send("@g", 4, retain=("a", 4), size=990)
    later = room.peer("later", groups=["g"])
    assert {header.retain_key for header in later.take(emp.DELIVER)} == {"a", "b"}
    room.status("member")
    assert room.core.statistics(room.now)["broker"]["retained"] == 2
    member_status = room.status("sender")
    assert member_status["refused"] == {"overflow": 2}


def test_a_retained_message_without_members_is_kept_and_settled() -> None:
    room = BrokerRoom()
    sender = room.peer("sender")
    sender.send("@g", 1, retain=("k", 1))
    assert sender.settled() == (1, [])
    (delivered,) = room.peer("later", groups=["g"]).take(emp.DELIVER)
    assert delivered.flags & emp.FROM_STORE
    assert (delivered.sender, delivered.destination, delivered.retain_key) == ("sender", "@g", "k")


def test_every_returning_process_gets_the_last_retained_version_once() -> None:
    room = BrokerRoom(declared={"member": ["g"]}, solo_after_deaths=1000)
    sender = room.peer("sender")
    for counter in (1, 2, 3):
        sender.send("@g", counter, retain=("k", counter))
    for _ in range(3):
        member = room.peer("member", groups=["g"])
        versions = [header.retain_version for header in member.take(emp.DELIVER) if header.flags & emp.FROM_STORE]
        assert versions == [(sender.generation, 3)]
        room.core.died("member", member.pid, room.now)


# --- order and fairness ---------------------------------------------------------------------------


def test_replies_go_before_requests_signals_and_data() -> None:
    room = BrokerRoom(declared={"receiver": ()})
    away = room.peer("receiver")
    away.put(emp.BYE, emp.Bye(False))
    sender = room.peer("sender")
    for priority in (DATA, SIGNAL, REQUEST):
        sender.send("receiver", 1, priority=priority)
    receiver = room.peer("receiver")
    assert [header.priority for header in receiver.take(emp.DELIVER)] == [REQUEST, SIGNAL, DATA]


def test_senders_take_turns_at_a_full_receiver() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver", prefetch=1)
    greedy, modest = room.peer("greedy"), room.peer("modest")
    for number in range(1, 21):
        greedy.send("receiver", number)
    modest.send("receiver", 1)
    order = [header.sender for header in receiver.ack_all()]
    assert order.index("modest") <= 3


def test_a_partial_ack_settles_a_part_and_a_reconnect_brings_the_rest_only() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver")
    sender = room.peer("sender")
    sender.send("receiver", 1, 10)
    (delivered,) = receiver.take(emp.DELIVER)
    receiver.ack(delivered.lane, 4)
    assert sender.settled() == (4, [])
    receiver.move()
    receiver.hello()
    ((again, messages),) = receiver.take_bodies()
    assert again.from_ == 5
    assert again.flags & emp.REDELIVERED
    assert [message.id for message in messages] == [f"m{number}" for number in range(5, 11)]
    receiver.ack(again.lane, 10)
    assert sender.settled() == (10, [])


def test_a_body_that_is_no_batch_is_passed_on_and_poison_in_it_is_refused_as_invalid() -> None:
    room = BrokerRoom(declared={"receiver": ()}, solo_after_deaths=1)
    sender = room.peer("sender", liveness=1000.0)
    sender.send("receiver", 1, 2, body=b"\xc1 garbage")
    receiver = room.peer("receiver")
    assert len(receiver.take(emp.DELIVER)) == 1
    room.core.died("receiver", receiver.pid, room.now)
    receiver = room.peer("receiver")
    receiver.ack_all()
    assert sender.settled()[1][0] == (1, "invalid", None)


def test_a_lone_message_of_a_suspected_batch_is_cut_out_as_it_stands() -> None:
    room = BrokerRoom(declared={"receiver": ()}, solo_after_deaths=1)
    sender = room.peer("sender", liveness=1000.0)
    sender.send("receiver", 1, 3)
    room.core.died("receiver", room.peer("receiver").pid, room.now)
    receiver = room.peer("receiver")
    (frames,) = [frames for frames in receiver.inbox if frames[0] == emp.DELIVER]
    assert decode_batch(frames[2]) == decode_batch(make_body(1))


# --- life -----------------------------------------------------------------------------------------


def test_the_life_of_a_module_is_told_to_the_shell() -> None:
    room = BrokerRoom(declared={"m": ()})
    first = room.peer("m", liveness=2.0)
    first.move()
    first.hello()
    room.pass_time(3.0)
    second = room.peer("m")
    room.core.died("m", second.pid, room.now)
    assert [(life.name, life.event) for life in room.core.life] == [
        ("m", "attached"),
        ("m", "back"),
        ("m", "silent"),
        ("m", "attached"),
        ("m", "gone"),
    ]
    assert isinstance(room.core.life[0], Life)


def test_a_death_of_an_older_process_is_no_death_of_the_holder() -> None:
    room = BrokerRoom()
    old = room.peer("m")
    old.put(emp.BYE, emp.Bye(False))
    room.peer("m")
    room.core.died("m", old.pid, room.now)
    room.core.died("never heard of", 1, room.now)
    assert room.status("m")["state"] == "attached"


def test_a_hung_module_that_speaks_again_is_asked_and_goes_on() -> None:
    room = BrokerRoom(declared={"m": ()})
    module, sender = room.peer("m", liveness=2.0), room.peer("sender", liveness=1000.0)
    sender.send("m", 1)
    room.pass_time(3.0)
    assert room.status("m")["state"] == "silent"
    module.inbox.clear()
    module.put(emp.PING, emp.Ping(1))
    assert module.verbs() == [emp.WHO]
    module.hello()
    assert [header.first for header in module.ack_all()] == [1]
    assert sender.settled() == (1, [])


def test_statistics_count_what_happened() -> None:
    room = BrokerRoom()
    receiver, sender = room.peer("receiver"), room.peer("sender")
    sender.send("receiver", 1, 3)
    (delivered,) = receiver.take(emp.DELIVER)
    room.now += 0.25
    status = room.status("receiver")
    assert (status["queued"], status["in_flight"], status["oldest_age_ms"]) == (0, 3, 250)
    assert status["lanes"] == [
        {"sender": "sender", "destination": "receiver", "priority": DATA, "unsettled": 3, "waiting": 0, "in_flight": 1}
    ]
    receiver.ack(delivered.lane, 3, [(2, "failed")])
    receiver.put(emp.PING, emp.Ping(1, {"seen": 7}))
    status = room.status("receiver")
    assert (status["delivered"], status["refused"], status["in_flight"]) == (2, {"failed": 1}, 0)
    assert status["latency"]["0.5"] == 3
    assert status["counters"] == {"seen": 7}


def test_next_deadline_is_the_end_of_the_grace_then_regular() -> None:
    room = BrokerRoom(grace=0.5)
    assert room.core.next_deadline(room.now) == room.now + 0.5
    room.pass_time(0.5)
    assert room.core.next_deadline(room.now) > room.now


def test_a_receiver_that_does_not_repeat_what_expired_leaves_the_account_balanced() -> None:
    room = BrokerRoom()
    receiver = room.peer("receiver", prefetch=2)
    sender = room.peer("sender")
    sender.send("receiver", 1)
    sender.send("receiver", 2)
    sender.send("receiver", 3, ttl_ms=100)
    sender.send("receiver", 4)
    lane = receiver.take(emp.DELIVER)[0].lane
    room.pass_time(1)
    receiver.ack(lane, 1)
    assert [header.void for header in receiver.take(emp.DELIVER)] == [[(3, emp.EXPIRED)]]
    receiver.ack(lane, 4)
    (account,) = room.core.statistics(room.now)["accounts"]
    assert (account["accepted"], account["delivered"], account["refused"], account["balanced"]) == (4, 3, 1, True)
