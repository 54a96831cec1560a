"""Who may be whom, who may send to whom, and at what pace; the rules alone, and in the broker's core."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import emp
from runtime.access import ANY, Credentials, Pace, Policy, Rule
from tests.support.bus_pair import DATA, REPLY, REQUEST, BrokerRoom

OWN = 100
KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"


def policy(own_uid: int = OWN, **rules: Rule) -> Policy:
    return Policy(rules, own_uid=own_uid)


# --- who may be whom --------------------------------------------------------------------------------


def test_a_name_with_a_rule_belongs_to_its_users_and_keys() -> None:
    access = policy(pump=Rule(uids=frozenset({1001}), keys=frozenset({KEY})))
    assert access.refuse_hello("pump", (), Credentials(uid=1001)) is None
    assert access.refuse_hello("pump", (), Credentials(key=KEY)) is None
    assert access.refuse_hello("pump", (), Credentials(uid=1002)) == "uid 1002 may not be 'pump'"
    assert access.refuse_hello("pump", (), Credentials(key="x" * 40)) == "the owner of this CURVE key may not be 'pump'"
    assert access.refuse_hello("pump", (), Credentials()) == "a peer that nothing is known of may not be 'pump'"
    assert access.refuse_hello("pump", (), Credentials(uid=OWN)) == f"uid {OWN} may not be 'pump'"


def test_a_name_without_a_rule_belongs_to_the_brokers_own_user() -> None:
    access = policy(pump=Rule(uids=frozenset({1001})))
    assert access.refuse_hello("edgehub", ("hub",), Credentials(uid=OWN)) is None
    why = access.refuse_hello("edgehub", ("hub",), Credentials(uid=1001))
    assert why == "no rule of runtime.policy says who may be 'edgehub'; uid 1001 may not"
    assert access.refuse_hello("edgehub", ("hub",), Credentials(key=KEY)) is not None


def test_an_empty_key_is_never_a_key() -> None:
    access = policy(pump=Rule(keys=frozenset({""})))
    assert access.refuse_hello("pump", (), Credentials()) is not None


def test_a_module_joins_only_its_own_groups() -> None:
    access = policy(pump=Rule(uids=frozenset({1001}), groups=frozenset({"twin"})))
    assert access.refuse_hello("pump", ("twin",), Credentials(uid=1001)) is None
    why = access.refuse_hello("pump", ("twin", "hub"), Credentials(uid=1001))
    assert why == "'pump' may not be in hub: runtime.modules.pump.groups has twin"


def test_an_own_socket_is_for_its_name_and_its_name_for_it() -> None:
    mine = frozenset({1001, 1002})
    access = policy(pump=Rule(uids=mine, has_own_socket=True), fan=Rule(uids=mine))
    assert access.refuse_hello("pump", (), Credentials(uid=1001, socket="pump")) is None
    assert access.refuse_hello("pump", (), Credentials(uid=1001)) == "'pump' is reached through its own socket only"
    why = access.refuse_hello("fan", (), Credentials(uid=1001, socket="pump"))
    assert why == "this socket is 'pump''s alone, not 'fan''s"
    assert access.refuse_hello("edgehub", (), Credentials(uid=OWN, socket="pump")) is not None


# --- who may send where -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sender", "destination", "may"),
    [
        ("pump", "@hub", True),
        ("pump", "fan", True),
        ("pump", "edgehub", False),
        ("pump", "@twin", False),
        ("boss", "anything", True),
        ("mute", "@hub", False),
        ("edgehub", "pump", True),  # no rule: the node's own
    ],
)
def test_destinations_that_no_rule_grants_are_denied(sender: str, destination: str, may: bool) -> None:
    access = policy(
        pump=Rule(destinations=frozenset({"@hub", "fan"})), boss=Rule(destinations=frozenset({ANY})), mute=Rule()
    )
    assert access.may_send(sender, destination, int(emp.Priority.DATA)) is may


def test_a_reply_may_go_to_whoever_may_ask() -> None:
    access = policy(
        pump=Rule(groups=frozenset({"twin"})),
        asks_pump=Rule(destinations=frozenset({"pump"})),
        asks_twin=Rule(destinations=frozenset({"@twin"})),
        asks_any=Rule(destinations=frozenset({ANY})),
        asks_fan=Rule(destinations=frozenset({"fan"})),
    )
    reply, data = int(emp.Priority.REPLY), int(emp.Priority.DATA)
    allowed = {
        name for name in ("asks_pump", "asks_twin", "asks_any", "asks_fan") if access.may_send("pump", name, reply)
    }
    assert allowed == {"asks_pump", "asks_twin", "asks_any"}
    assert access.may_send("pump", "edgehub", reply)  # has no rule, so it may ask
    assert not access.may_send("pump", "asks_pump", data)
    assert not access.may_send("pump", "@asks_pump", reply)


def test_admin_is_for_the_brokers_own_user() -> None:
    access = policy(pump=Rule(uids=frozenset({1001})))
    assert access.may_ask(Credentials(uid=OWN))
    assert not access.may_ask(Credentials(uid=1001))
    assert not access.may_ask(Credentials(key=KEY))
    assert not access.may_ask(Credentials(uid=OWN, socket="pump"))


# --- pace -------------------------------------------------------------------------------------------


@given(
    messages=st.sampled_from([0, 1, 7, 1000]),
    size=st.sampled_from([0, 100, 5000]),
    batches=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 2000), st.floats(0, 3)), min_size=1, max_size=80),
)
def test_a_pace_is_kept_on_average_and_never_stops_for_ever(
    messages: int, size: int, batches: list[tuple[int, int, float]]
) -> None:
    pace = Pace(messages, size)
    now, sent, sent_bytes = 0.0, 0, 0
    for count, weight, pause in batches:
        now += pause
        due = pace.due_at(now)
        assert due >= now
        assert due == now or messages or size
        now = due
        assert pace.due_at(now) <= now + 1e-6
        # One second's worth at first and one batch's debt at the most, beyond what the time allows.
        assert not messages or sent <= messages * (now + 1) + 50 + 1e-3
        assert not size or sent_bytes <= size * (now + 1) + 2000 + 1e-3
        pace.take(count, weight)
        sent += count
        sent_bytes += weight


def test_a_module_beyond_its_pace_is_delayed_and_nothing_of_it_is_lost_or_reordered() -> None:
    room = BrokerRoom(
        access=policy(0, sender=Rule(uids=frozenset({0}), destinations=frozenset({ANY}), messages_per_second=10))
    )
    receiver, sender = room.peer("receiver"), room.peer("sender")
    for number in range(1, 41):
        sender.send("receiver", number)
    at_once = [header.first for header in receiver.ack_all()]
    assert at_once == list(range(1, 12))  # one second's worth, and the one that overdraws it
    assert room.status("sender")["paced"] == 29
    came = at_once
    for _ in range(200):
        room.pass_time(0.05)
        came += [header.first for header in receiver.ack_all()]
    assert came == list(range(1, 41))
    assert room.status("sender")["paced"] == 0
    assert sender.settled()[0] == 40


def test_a_paced_module_does_not_delay_another() -> None:
    rule = Rule(uids=frozenset({0}), destinations=frozenset({ANY}), bytes_per_second=10)
    room = BrokerRoom(access=policy(0, slow=rule, quick=Rule(uids=frozenset({0}), destinations=frozenset({ANY}))))
    receiver, slow, quick = room.peer("receiver"), room.peer("slow"), room.peer("quick")
    for number in range(1, 11):
        slow.send("receiver", number, size=100)
        quick.send("receiver", number, size=100)
    assert [header.sender for header in receiver.take(emp.DELIVER)].count("quick") == 10


def test_a_denied_module_is_told_each_time_and_counted() -> None:
    room = BrokerRoom(access=policy(0, guest=Rule(uids=frozenset({0}), destinations=frozenset({"hub"}))))
    room.peer("hub"), room.peer("secret")
    guest = room.peer("guest")
    guest.send("hub", 1)
    guest.send("secret", 1, 3)
    assert {header.destination: header.exceptions for header in guest.take(emp.SETTLED)} == {
        "secret": [(1, "denied", None), (2, "denied", None), (3, "denied", None)]
    }
    assert room.status("guest")["refused"] == {"denied": 3}


def test_admin_of_a_stranger_is_refused() -> None:
    room = BrokerRoom(access=policy(7, guest=Rule(uids=frozenset({0}))))
    guest = room.peer("guest")
    guest.put(emp.ADMIN, emp.Admin(1, "status"))
    assert [refused.code for refused in guest.take(emp.REFUSED)] == [emp.DENIED]


def test_a_requests_answer_passes_the_policy_and_nothing_else_does() -> None:
    room = BrokerRoom(
        access=policy(
            0, asker=Rule(uids=frozenset({0}), destinations=frozenset({"answerer"})), answerer=Rule(uids=frozenset({0}))
        )
    )
    asker, answerer = room.peer("asker"), room.peer("answerer")
    asker.send("answerer", 1, priority=REQUEST, flags=emp.EXPECTS_REPLY)
    (delivered,) = answerer.take(emp.DELIVER)
    answerer.send("asker", 1, priority=REPLY, flags=emp.REPLY, requester=delivered.incarnation)
    answerer.send("asker", 1, priority=DATA)
    assert [header.priority for header in asker.take(emp.DELIVER)] == [REPLY]
    assert [header.exceptions for header in answerer.take(emp.SETTLED)] == [[(1, "denied", None)]]


# --- a policy that changes ------------------------------------------------------------------------------


def granted(**grants: object) -> Rule:
    return Rule(uids=frozenset({0}), destinations=frozenset({ANY}), **grants)  # type: ignore[arg-type]


def test_who_may_no_longer_be_a_name_is_told_and_what_waits_for_it_stays() -> None:
    declared = {"pump": (), "sink": ()}
    room = BrokerRoom(declared=declared, access=policy(0, pump=granted()))
    pump, sink = room.peer("pump"), room.peer("sink")
    sink.send("pump", 1, 2)
    assert len(pump.take(emp.DELIVER)) == 1
    pump.send("sink", 1)
    room.core.adopt(policy(0, pump=Rule(uids=frozenset({1001}))), declared, room.now)
    room.settle()
    assert [(refused.code, refused.text) for refused in pump.take(emp.REFUSED)] == [
        (emp.HELLO_DENIED, "uid 0 may not be 'pump'")
    ]
    assert len(pump.take(emp.WHO)) == 1
    pump.hello()
    assert [refused.code for refused in pump.take(emp.REFUSED)] == [emp.HELLO_DENIED]
    assert room.status("pump")["queued"] == 2  # given back to the mailbox
    assert [header.sender for header in sink.ack_all()] == ["pump"]  # what it had handed over goes on
    room.core.adopt(policy(0, pump=granted()), declared, room.now)
    heir = room.peer("pump")  # at once: the name is free
    assert [header.count for header in heir.take(emp.DELIVER)] == [2]


def test_a_group_that_is_no_longer_granted_ends_the_membership() -> None:
    declared = {"pump": ("twin",), "sink": ()}
    room = BrokerRoom(declared=declared, access=policy(0, pump=granted(groups=frozenset({"twin"}))))
    pump, sink = room.peer("pump", groups=["twin"]), room.peer("sink")
    room.core.adopt(policy(0, pump=granted()), {"pump": (), "sink": ()}, room.now)
    room.settle()
    assert "may not be in twin" in pump.take(emp.REFUSED)[0].text
    sink.send("@twin", 1)
    assert [header.exceptions for header in sink.take(emp.SETTLED)] == [[(1, emp.UNROUTABLE, None)]]


def test_a_destination_that_is_taken_away_is_denied_from_the_next_batch_on() -> None:
    room = BrokerRoom(access=policy(0, pump=granted()))
    pump, sink = room.peer("pump"), room.peer("sink")
    pump.send("sink", 1)
    room.core.adopt(policy(0, pump=Rule(uids=frozenset({0}))), {}, room.now)
    pump.send("sink", 2)
    assert [header.first for header in sink.ack_all()] == [1]
    assert room.status("pump")["refused"] == {"denied": 1}
    assert not pump.take(emp.REFUSED)
    assert not pump.take(emp.WHO)  # it stays attached


def test_a_quota_changes_in_place_and_what_is_owed_stays_owed() -> None:
    room = BrokerRoom(access=policy(0, pump=granted(messages_per_second=10)))
    pump, sink = room.peer("pump"), room.peer("sink")
    for number in range(1, 41):
        pump.send("sink", number)
    assert len(sink.ack_all()) == 11
    room.core.adopt(policy(0, pump=granted(messages_per_second=100)), {}, room.now)
    room.pass_time(0.1)
    assert 9 <= len(sink.ack_all()) <= 11
    room.core.adopt(policy(0, pump=granted()), {}, room.now)
    room.settle()
    assert len(sink.ack_all()) == 40 - 11 - 10
    assert room.status("pump")["paced"] == 0


def test_a_module_that_is_newly_declared_has_its_messages_wait_and_one_that_is_no_more_is_let_go_in_time() -> None:
    room = BrokerRoom(access=policy(0), absent_limit_seconds=10.0)
    sink = room.peer("sink")
    room.core.adopt(policy(0), {"pump": ("twin",)}, room.now)
    sink.send("@twin", 1)
    room.pass_time(60)
    assert room.status("pump")["queued"] == 1
    sink.hello()
    sink.take(emp.SETTLED)
    room.core.adopt(policy(0), {}, room.now)
    room.pass_time(9)
    assert room.status("pump")["queued"] == 1
    room.pass_time(2)
    assert [header.exceptions for header in sink.take(emp.SETTLED)] == [[(1, emp.GONE, "pump")]]


def test_a_tap_ends_with_the_policy_that_admitted_it() -> None:
    room = BrokerRoom(access=policy(0))
    spy, sink, other = room.peer("spy"), room.peer("sink"), room.peer("other")
    spy.put(emp.ADMIN, emp.Admin(1, "tap"))
    assert len(spy.take(emp.ADMIN)) == 1
    room.core.adopt(policy(7, spy=granted(), other=granted()), {}, room.now)
    other.send("sink", 1)
    spy.put(emp.ADMIN, emp.Admin(1, "tap"))
    assert not spy.take(emp.ADMIN)
    assert spy.take(emp.REFUSED)[-1].code == emp.DENIED
    assert sink.take(emp.REFUSED)[0].code == emp.HELLO_DENIED  # it has no rule, and is not the broker's own user


def test_an_endpoint_that_is_given_up_tells_whom_it_held() -> None:
    room = BrokerRoom(access=policy(0, pump=granted()))
    pump = room.peer("pump")
    room.core.adopt(policy(0, pump=granted()), {}, room.now, closed=[0])
    room.settle()
    assert "no longer" in pump.take(emp.REFUSED)[0].text
    pump.hello()
    assert pump.take(emp.REFUSED)[0].code == emp.HELLO_DENIED


def test_what_a_name_has_sent_whose_rule_is_withdrawn_is_denied_wherever_it_waits() -> None:
    """Without a rule the name is the node's own: edgehub would let it do anything."""
    declared = {"hub": ("hub",), "pump": ()}
    room = BrokerRoom(declared=declared, access=policy(0, pump=granted(messages_per_second=6)))
    hub = room.peer("hub", prefetch=2)
    pump = room.peer("pump")
    pump.send("@hub", 1, retain=("key", 1))
    for number in range(2, 10):
        pump.send("@hub", number)
    delivered = hub.take(emp.DELIVER)
    assert len(delivered) == 2
    assert room.status("pump")["paced"] == 2
    room.core.adopt(policy(0), declared, room.now)
    room.settle()
    pump.send("@hub", 10)  # it is still somebody of the node's own user
    for header in delivered:
        hub.ack(header.lane, header.first)
    hub.hello()  # nothing of it comes again
    assert {header.first for header in hub.ack_all()} == {10}
    assert room.status("pump")["refused"] == {"denied": 2}
    assert room.status("hub")["refused"] == {"denied": 7}
    assert {number for number, _, _ in pump.settled()[1]} == set(range(1, 10))
    assert room.status("hub")["in_flight"] == 0
    assert all(account["balanced"] for account in room.core.statistics(room.now)["accounts"])
    assert room.core.statistics(room.now)["broker"]["messages_held"] == 0
    late = room.peer("late", groups=["hub"])
    assert not late.take(emp.DELIVER)  # nor is anything retained


# --- what a hostile module tries -------------------------------------------------------------------------


def test_leaving_and_coming_back_gives_no_fresh_quota() -> None:
    room = BrokerRoom(access=policy(0, pump=granted(messages_per_second=10)))
    sink = room.peer("sink")
    came = 0
    for _ in range(20):
        pump = room.peer("pump")
        for number in range(1, 31):
            pump.send("sink", number)
        pump.put(emp.BYE, emp.Bye(True))
        came += len(sink.ack_all())
    assert came <= 11


def test_leaving_and_coming_back_gives_no_fresh_window_and_leaves_its_denials_in_the_account() -> None:
    rule = Rule(uids=frozenset({0}), destinations=frozenset({"sink"}))
    room = BrokerRoom(access=policy(0, pump=rule), declared={"sink": ()}, window=10)
    for _ in range(10):
        pump = room.peer("pump")
        for number in range(1, 11):
            pump.send("sink", number)
        pump.send("secret", 1)
        pump.put(emp.BYE, emp.Bye(True))
    assert room.status("sink")["queued"] <= 20
    past = room.core.statistics(room.now)["broker"]["refused_of_past"]
    assert past["pump"]["denied"] == 10
    sink = room.peer("sink")
    assert len(sink.ack_all()) <= 20
    assert room.peer("pump").session > 0
    assert room.status("pump")["refused"]["denied"] == 10


def test_names_that_were_let_go_are_forgotten_in_time_and_their_refusals_still_counted() -> None:
    room = BrokerRoom(access=policy(0))
    for number in range(1000):
        drifter = room.peer(f"drifter-{number}")
        drifter.send("nobody", 1)
        drifter.put(emp.BYE, emp.Bye(True))
    past = room.core.statistics(room.now)["broker"]["refused_of_past"]
    assert len(past) <= 257
    assert sum(counts["unroutable"] for counts in past.values()) == 1000


def test_what_waits_for_the_quota_comes_in_its_order_over_a_return() -> None:
    room = BrokerRoom(access=policy(0, pump=granted(messages_per_second=10)))
    sink = room.peer("sink")
    came = []
    for _ in range(3):
        pump = room.peer("pump")
        for number in range(1, 9):
            pump.send("sink", number)
        pump.put(emp.BYE, emp.Bye(True))
    for _ in range(100):
        room.pass_time(0.05)
        came += [(header.generation, header.first) for header in sink.ack_all()]
    assert came == sorted(came)
    assert len(came) == 24


def test_an_incarnation_is_its_own_names_alone() -> None:
    """Whoever gets a message learns its sender's incarnation, and may say it is its own."""
    room = BrokerRoom(access=policy(0, pump=granted(), thief=granted(), sink=granted()))
    pump, sink = room.peer("pump"), room.peer("sink", prefetch=1)
    thief = room.peer("thief", incarnation=pump.incarnation)
    pump.send("sink", 1)
    thief.send("sink", 1)
    thief.send("sink", 2)
    pump.send("sink", 2)
    sink.move()
    sink.hello()  # what was in flight is delivered again
    came = [(header.sender, header.first) for header in sink.ack_all()]
    assert sorted(came) == [("pump", 1), ("pump", 2), ("thief", 1), ("thief", 2)]
    assert pump.settled() == (2, [])
    assert thief.settled() == (2, [])


def test_one_connection_holds_one_name() -> None:
    room = BrokerRoom(access=policy(0, pump=granted(), fan=granted()))
    pump = room.peer("pump")
    pump.name = "fan"
    pump.generation = 0
    pump.hello()
    assert room.status("pump")["state"] == "absent"
    assert room.status("fan")["state"] == "attached"
    room.pass_time(1)
    pump.send("nobody", 1)
    assert room.status("fan")["refused"] == {"unroutable": 1}


def test_a_name_that_left_open_messages_gets_them_back_whoever_else_says_its_incarnation() -> None:
    room = BrokerRoom(access=policy(0, pump=granted(), thief=granted(), sink=granted()), declared={"sink": ()})
    pump = room.peer("pump")
    pump.send("sink", 1)
    room.core.lost(pump.address, room.now)
    room.pass_time(60)  # let go
    room.peer("thief", incarnation=pump.incarnation)
    pump.move()
    pump.hello()
    pump.send("sink", 1)  # it sends again what is not settled
    pump.send("sink", 2)
    sink = room.peer("sink")
    assert [(header.sender, header.first) for header in sink.ack_all()] == [("pump", 1), ("pump", 2)]


def test_flags_that_are_the_brokers_to_set_say_nothing_in_a_send() -> None:
    room = BrokerRoom(access=policy(0, pump=granted()))
    sink, pump = room.peer("sink"), room.peer("pump")
    pump.send("sink", 1, flags=emp.FROM_STORE | emp.REDELIVERED)
    assert [header.flags for header in sink.take(emp.DELIVER)] == [0]


def test_names_and_groups_are_compared_to_the_letter() -> None:
    room = BrokerRoom(
        declared={"hub": ("hub",)}, access=policy(0, pump=Rule(uids=frozenset({0}), destinations=frozenset({"@hub"})))
    )
    room.peer("hub", groups=["hub"])
    pump = room.peer("pump")
    for destination in ("@Hub", "@HUB", "hub", "Hub"):
        pump.send(destination, 1)
    assert [header.exceptions for header in pump.take(emp.SETTLED)] == [[(1, "denied", None)]] * 4
    for destination in (
        "@hub\n",
        "@hub ",
        "@@hub",
        "@",
        "",
        "*",
        "@*",
        "@h\u00fcb",
        "@\uff48ub",
        "@hub/..",
        "@" + "h" * 65,
    ):
        pump.put(emp.SEND, emp.Send(destination, DATA, 1, 1, 1), b"\x90")
        assert [refused.code for refused in pump.take(emp.REFUSED)] == [emp.BAD_HEADER], destination
    for name in ("pump\n", "pump ", "pump\0", "PUMP", "p\u00fcmp", "../pump", "x" * 65):
        stranger = room.peer(name)
        if name == "PUMP":  # another name, without a rule: for the node's own user
            assert stranger.session > 0
        else:
            assert [refused.code for refused in stranger.take(emp.REFUSED)] == [emp.BAD_HEADER], name
