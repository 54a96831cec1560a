"""Both directions of the bridge, without a socket."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.eventbus.bridge import (
    BARREN_LIMIT,
    MAX_FAILED_TRIES,
    UNROUTABLE_GRACE_SECONDS,
    ConnectionState,
    Downlink,
    EchoFilter,
    Held,
    Outgoing,
    Publish,
    Reject,
    Subscribe,
    Unsubscribe,
    Uplink,
    json_of,
    read_command,
    refusal_of,
)
from modules.eventbus.topics import HUB, TWIN, Semantics
from runtime.emp import REASONS
from runtime.message import BYTES, JSON, TEXT, Message, encode_content, payload_of

HEAD, Y2019 = Semantics.HEAD, Semantics.Y2019


def uplink(*, window: int = 100, window_bytes: int = 1 << 20, semantics: Semantics = HEAD) -> Uplink:
    made = Uplink(window=window, window_bytes=window_bytes, semantics=semantics, random=Random(1))
    made.connected(session_present=False)
    return made


def receive(
    core: Uplink, mid: int, payload: bytes = b"x", *, topic: str = "a/user/b", qos: int = 1, dup: bool = False
) -> Held:
    held = core.received_message(mid, qos, dup, topic, payload, timestamp_ms=1000)
    assert held is not None
    return held


# --- MQTT to bus: what the message is --------------------------------------------------------------


@pytest.mark.parametrize(
    ("topic", "semantics", "destination", "operation", "clear"),
    [
        ("$hw/events/device/test-device/twin/update", HEAD, TWIN, "response", False),
        ("SYS/dis/upload_records", HEAD, HUB, "upload", True),
        ("default/user/x", HEAD, HUB, "upload", True),
        ("SYS/dis/upload_records", Y2019, HUB, "response", True),
        ("default/user/x", Y2019, HUB, "response", False),
    ],
)
def test_the_message_that_goes_to_the_bus(
    topic: str, semantics: Semantics, destination: str, operation: str, clear: bool
) -> None:
    held = receive(uplink(semantics=semantics), 1, b"payload", topic=topic)
    message = held.message
    assert held.destination == destination
    assert (message.source, message.group, message.parent_id) == ("bus", "user", "")
    assert message.operation == operation
    assert (message.resource == topic) is clear
    assert (message.kind, message.content, message.timestamp) == (TEXT, b"payload", 1000)
    assert message.id


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"", TEXT),
        (b"21.5", TEXT),
        (b'{"a": 1}', TEXT),  # KubeEdge sends every payload as a string, JSON too
        ("grüße".encode(), TEXT),
        (b"\x00\x01", TEXT),
        (b"\xff\xfe", BYTES),
        (b"\xed\xa0\x80", BYTES),  # a surrogate, which is no UTF-8
    ],
)
def test_a_payload_is_text_when_it_is_utf8_and_bytes_otherwise(payload: bytes, kind: str) -> None:
    message = receive(uplink(), 1, payload).message
    assert (message.kind, message.content) == (kind, payload)


@given(st.binary(max_size=400))
def test_every_payload_reaches_the_bus_unharmed(payload: bytes) -> None:
    message = receive(uplink(), 1, payload).message
    assert message.content == payload
    assert payload_of(message) == payload


# --- MQTT to bus: acknowledging --------------------------------------------------------------------


def test_nothing_is_acknowledged_before_it_is_settled() -> None:
    core = uplink()
    held = receive(core, 1)
    assert core.take_acknowledgements() == []
    assert core.settled(held) == [1]


def test_acknowledgements_go_in_the_order_of_arrival_whatever_settles_first() -> None:
    core = uplink()
    first, second, third = (receive(core, mid) for mid in (5, 3, 9))
    assert core.settled(third) == []
    assert core.settled(second) == []
    assert core.settled(first) == [5, 3, 9]


@given(st.permutations(range(1, 9)))
def test_every_order_of_settlement_gives_one_order_of_acknowledgement(order: list[int]) -> None:
    core = uplink()
    held = {mid: receive(core, mid) for mid in range(1, 9)}
    acknowledged = [mid for number in order for mid in core.settled(held[number])]
    assert acknowledged == list(range(1, 9))
    assert core.in_hand == core.in_hand_bytes == 0


def test_qos_0_is_never_acknowledged_and_holds_nothing_back() -> None:
    core = uplink()
    zero = receive(core, 0, qos=0)
    one = receive(core, 4)
    assert core.settled(one) == [4]
    assert core.settled(zero) == []
    assert core.in_hand == 0


def test_what_is_skipped_is_acknowledged_in_its_turn() -> None:
    core = uplink()
    first = receive(core, 1)
    assert core.skip(2, 1) == []
    assert core.settled(first) == [1, 2]
    assert core.skip(0, 0) == []


def test_full_beyond_the_window_and_again_open_at_half() -> None:
    core = uplink(window=4)
    held = [receive(core, mid) for mid in (1, 2, 3, 4)]
    assert not core.is_full  # a broker that keeps to the window is read on: that shows when it goes
    held.append(receive(core, 0, qos=0))
    assert core.is_full
    core.settled(held.pop())
    assert not core.has_drained
    core.settled(held[0])
    assert not core.is_full
    assert not core.has_drained
    core.settled(held[1])
    assert core.has_drained


def test_full_at_the_bytes_but_an_empty_one_takes_any_size() -> None:
    core = uplink(window_bytes=10)
    assert not core.is_full
    held = receive(core, 1, b"x" * 100)
    assert core.is_full
    core.settled(held)
    assert not core.is_full


# --- MQTT to bus: reconnecting ---------------------------------------------------------------------


def test_what_is_in_hand_is_not_sent_twice_when_the_broker_sends_it_again() -> None:
    core = uplink()
    held = receive(core, 7, b"reading")
    core.disconnected()
    core.connected(session_present=True)
    assert core.received_message(7, 1, True, "a/user/b", b"reading", timestamp_ms=2) is None
    assert core.take_acknowledgements() == []
    assert core.settled(held) == [7]
    assert core.redelivered == 1


def test_what_was_settled_while_the_broker_was_away_is_acknowledged_when_it_comes_again() -> None:
    core = uplink()
    held = receive(core, 7)
    core.disconnected()
    assert core.settled(held) == []
    core.connected(session_present=True)
    assert core.received_message(7, 1, True, "a/user/b", b"x", timestamp_ms=2) is None
    assert core.take_acknowledgements() == [7]


def test_after_a_reconnect_the_new_order_of_arrival_counts() -> None:
    core = uplink()
    first, second = receive(core, 1), receive(core, 2)
    core.disconnected()
    core.connected(session_present=True)
    new = receive(core, 9, b"new")
    assert core.received_message(2, 1, True, "a/user/b", b"x", timestamp_ms=2) is None
    assert core.received_message(1, 1, True, "a/user/b", b"x", timestamp_ms=2) is None
    assert core.settled(first) == []
    assert core.settled(new) == [9]
    assert core.settled(second) == [2, 1]


def test_no_acknowledgement_goes_to_a_connection_that_did_not_bring_the_message() -> None:
    core = uplink()
    held = receive(core, 7)
    core.disconnected()
    core.connected(session_present=True)
    assert core.settled(held) == []


@pytest.mark.parametrize(
    ("dup", "topic", "payload"),
    [(False, "a/user/b", b"x"), (True, "a/user/c", b"x"), (True, "a/user/b", b"y")],
)
def test_a_packet_id_alone_does_not_make_it_the_same_message(dup: bool, topic: str, payload: bytes) -> None:
    core = uplink()
    receive(core, 7)
    core.disconnected()
    core.connected(session_present=True)
    assert receive(core, 7, payload, topic=topic, dup=dup)
    assert core.redelivered == 0


def test_a_lost_session_makes_the_old_packet_ids_meaningless() -> None:
    core = uplink()
    held = receive(core, 7)
    core.disconnected()
    core.connected(session_present=False)
    again = receive(core, 7, dup=True)
    assert again is not held
    assert core.settled(held) == []
    assert core.settled(again) == [7]


# --- MQTT to bus: refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["invalid", "too-large", "denied", "too-large-for-link", "some-receivers-own"])
def test_a_permanent_refusal_is_counted_and_acknowledged_so_that_the_queue_goes_on(reason: str) -> None:
    core = uplink()
    held = receive(core, 1)
    assert core.refused(held, reason, now=0.0).retry_in is None
    assert core.take_acknowledgements() == [1]
    assert core.given_up == {reason: 1}
    assert core.in_hand == 0


@pytest.mark.parametrize("reason", sorted(REASONS - {"invalid", "too-large", "denied"}))
def test_any_other_refusal_is_tried_again_later_and_holds_its_acknowledgement(reason: str) -> None:
    core = uplink()
    held = receive(core, 1)
    refusal = core.refused(held, reason, now=100.0)
    assert refusal.retry_in is not None
    assert 0.25 <= refusal.retry_in <= 0.5
    assert core.take_acknowledgements() == []
    due = core.next_retry()
    assert due == 100.0 + refusal.retry_in
    assert core.take_retries(now=due - 0.01) == []
    assert core.take_retries(now=due) == [held]
    assert core.next_retry() is None
    assert core.settled(held) == [1]


def test_retries_become_rarer_up_to_a_cap() -> None:
    core = uplink()
    held = receive(core, 1)
    delays = [core.refused(held, "gone", now=0.0).retry_in or 0.0 for _ in range(15)]
    assert delays[1] > delays[0]
    assert 15.0 <= delays[-1] <= 30.0


def test_a_message_that_fails_every_time_is_given_up_in_the_end() -> None:
    core = uplink()
    held = receive(core, 1)
    outcomes = [core.refused(held, "failed", now=float(n)).retry_in for n in range(MAX_FAILED_TRIES)]
    assert None not in outcomes[:-1]
    assert outcomes[-1] is None
    assert core.given_up == {"failed": 1}


def test_messages_for_a_group_that_nobody_serves_do_not_hold_up_the_others_for_ever() -> None:
    core = uplink()
    first = receive(core, 1, topic="$hw/events/device/ns/d/twin/update")
    other = receive(core, 2)
    assert core.refused(first, "unroutable", now=0.0).retry_in is not None
    assert core.settled(other) == []
    assert core.refused(first, "unroutable", now=UNROUTABLE_GRACE_SECONDS).retry_in is None
    assert core.take_acknowledgements() == [1, 2]
    # The next one to the same group does not wait again ...
    late = receive(core, 3, topic="$hw/events/device/ns/d/twin/update")
    assert core.refused(late, "unroutable", now=60.0).retry_in is None
    # ... until one has been delivered.
    core.settled(receive(core, 4, topic="$hw/events/device/ns/d/twin/update"))
    again = receive(core, 5, topic="$hw/events/device/ns/d/twin/update")
    assert core.refused(again, "unroutable", now=61.0).retry_in is not None


@given(
    st.lists(
        st.sampled_from(["receive", "settle first", "settle last", "refuse", "retry", "reconnect", "lose session"]),
        max_size=60,
    )
)
def test_whatever_happens_each_message_is_acknowledged_once_settled_and_never_before(script: list[str]) -> None:
    core = uplink(window=1000)
    now = 0.0
    queue: dict[int, Held] = {}  # the broker's view of this session: unacknowledged, in order
    at_bus: list[Held] = []
    settled: set[int] = set()  # ids of Held objects
    number = 0

    def acknowledge(mids: list[int]) -> None:
        for mid in mids:
            assert next(iter(queue)) == mid, "PUBACK out of order"
            assert id(queue.pop(mid)) in settled

    for step in script:
        now += 0.1
        if step == "receive":
            number += 1
            held = receive(core, number, b"%d" % number)
            queue[number] = held
            at_bus.append(held)
        elif step.startswith("settle") and at_bus:
            held = at_bus.pop(0 if step.endswith("first") else -1)
            settled.add(id(held))
            acknowledge(core.settled(held))
        elif step == "refuse" and at_bus:
            core.refused(at_bus.pop(0), "gone", now=now)
        elif step == "retry":
            now += 60.0
            at_bus += core.take_retries(now=now)
        elif step == "reconnect":
            core.disconnected()
            core.connected(session_present=True)
            for mid, known in list(queue.items()):
                assert core.received_message(mid, 1, True, "a/user/b", known.message.content, timestamp_ms=0) is None
                acknowledge(core.take_acknowledgements())
        elif step == "lose session":
            core.disconnected()
            core.connected(session_present=False)
            queue.clear()
    at_bus += core.take_retries(now=now + 100.0)
    for held in at_bus:
        settled.add(id(held))
        acknowledge(core.settled(held))
    assert queue == {}
    assert core.in_hand == core.in_hand_bytes == 0
    assert core.delivered == core.received


# --- bus to MQTT: what is asked --------------------------------------------------------------------


def message(operation: str, resource: str = "a/b", content: object = "x", **more: str) -> Message:
    return Message.build(
        source="router_eventbus", group="user", resource=resource, operation=operation, content=content
    )


def command(asked: Message, semantics: Semantics = HEAD, **more: bool) -> object:
    return read_command(asked, node="n1", semantics=semantics, **more)


@pytest.mark.parametrize("semantics", Semantics)
@pytest.mark.parametrize(("content", "payload"), [("text", b"text"), (b"\xff\x00", b"\xff\x00"), ("", b"")])
def test_publish(semantics: Semantics, content: object, payload: bytes) -> None:
    assert command(message("publish", "a/b", content), semantics) == Publish("a/b", payload)


def test_D_V_8_publish_of_json_publishes_its_text_as_it_stands() -> None:
    raw = b'{"b": 1.0, "a": 12345678901234567890}'
    asked = Message(resource="a/b", operation="publish", kind=JSON, content=raw)
    assert command(asked) == Publish("a/b", raw)


def test_D_V_8_message_works_whatever_kind_the_content_came_as() -> None:
    inner = b'{"topic": "t/1", "n": 1.50}'
    for kind in (JSON, TEXT, BYTES):
        asked = Message(operation="message", kind=kind, content=b'{"message": ' + inner + b"}")
        assert command(asked) == Publish("t/1", inner)


@pytest.mark.parametrize(
    ("kind", "content", "payload"),
    [
        (JSON, b'{"a":1}', b'{"a":1}'),
        (TEXT, b'{"a":1}', b'{"a":1}'),
        (BYTES, b'{"a":1}', b'{"a":1}'),
        (TEXT, b"plain", b'"plain"'),
        (BYTES, b"\xff", b'"/w=="'),
        (TEXT, b"\xff", b'"/w=="'),
        (JSON, b"null", b"null"),
    ],
)
def test_D_V_8_get_result_publishes_json_whatever_kind_the_content_came_as(
    kind: str, content: bytes, payload: bytes
) -> None:
    asked = Message(resource="auth_info", operation="get_result", kind=kind, content=content)  # type: ignore[arg-type]
    assert command(asked) == Publish("$hw/events/node/n1/authInfo/get/result", payload)
    assert json.loads(payload) is not ...


@pytest.mark.parametrize(
    ("content", "payload"),
    [(None, b""), ("a", b"a"), (["x"], b'["x"]'), (1, b"1"), (True, b"true"), ({"a": None}, b'{"a":null}')],
)
def test_payloads_of_json_values(content: object, payload: bytes) -> None:
    kind, data = encode_content(content)
    assert payload_of(Message(kind=kind, content=data)) == payload


def test_a_json_string_is_the_text_it_holds() -> None:
    assert payload_of(Message(kind=JSON, content=b'"gr\\u00fc\\u00dfe"')) == "grüße".encode()
    assert payload_of(Message(kind=JSON, content=b'"\\ud800"')) == b'"\\ud800"'  # no UTF-8 form: its JSON text
    assert payload_of(Message(kind=JSON, content=b'"broken')) == b'"broken'


@pytest.mark.parametrize("semantics", Semantics)
def test_subscribe(semantics: Semantics) -> None:
    assert command(message("subscribe", "default/x/#", None), semantics) == Subscribe("default/x/#")


def test_unsubscribe_exists_only_at_head() -> None:
    assert command(message("unsubscribe", "default/x", None), HEAD) == Unsubscribe("default/x")
    assert isinstance(command(message("unsubscribe", "default/x", None), Y2019), Reject)


@pytest.mark.parametrize("semantics", Semantics)
@pytest.mark.parametrize(
    "odd",
    [
        message("publish", ""),
        message("publish", "a/+"),
        message("publish", "a/#"),
        message("publish", "a\0b"),
        message("publish", "x" * 70000),
        message("message", content=None),
        message("message", content="no json"),
        message("message", content=[1]),
        message("message", content={"message": "text"}),
        message("message", content={"message": {"topic": 1}}),
        message("message", content={"message": {"topic": "a/#"}}),
        message("message", content={"message": {}}),
        message("message", content=b"\xff"),
        Message(operation="message", content=b'{"message": ' + b"[" * 100_000),
        message("subscribe", "a/#/b"),
        message("subscribe", ""),
        message("get_result", "something else"),
        message("connect", "x"),
        message("", "x"),
        message("delete", "x"),
        Message(source="edgehub", resource="node/connection", operation="connect", kind=TEXT, content=b"what?"),
    ],
    ids=lambda asked: f"{asked.operation}-{asked.resource[:10]!r}-{asked.content[:14]!r}",
)
def test_D_V_3_an_odd_message_is_rejected_with_a_text_and_ends_nothing(odd: Message, semantics: Semantics) -> None:
    rejected = command(odd, semantics)
    assert isinstance(rejected, Reject)
    assert 0 < len(rejected.text) < 400


@given(
    st.sampled_from(["publish", "message", "subscribe", "unsubscribe", "get_result", "connect", "x"]),
    st.text(max_size=30),
    st.sampled_from([JSON, TEXT, BYTES]),
    st.binary(max_size=60),
    st.sampled_from(list(Semantics)),
)
def test_D_V_3_any_message_is_a_command_or_rejected(
    operation: str, resource: str, kind: str, content: bytes, semantics: Semantics
) -> None:
    asked = Message(resource=resource, operation=operation, kind=kind, content=content)  # type: ignore[arg-type]
    assert isinstance(command(asked, semantics), Publish | Subscribe | Unsubscribe | Reject)


def connection(state: str, operation: str) -> Message:
    return Message.build(source="edgehub", group="bus", resource="node/connection", operation=operation, content=state)


@pytest.mark.parametrize("operation", ["connect", "publish"])
def test_the_cloud_links_state_is_recorded_and_not_published(operation: str) -> None:
    assert command(connection("cloud_connected", operation)) == ConnectionState(True, None)
    assert command(connection("cloud_disconnected", operation)) == ConnectionState(False, None)


def test_the_option_of_2019_publishes_the_cloud_links_state() -> None:
    asked = connection("cloud_connected", "connect")
    assert command(asked, Y2019, publish_connection_state=True) == ConnectionState(
        True, Publish("node/connection", b"cloud_connected")
    )


def test_another_modules_publish_to_that_topic_is_an_ordinary_one() -> None:
    assert command(message("publish", "node/connection", "hello")) == Publish("node/connection", b"hello")


def test_json_of_text_that_is_json_is_itself() -> None:
    assert json_of(Message(kind=TEXT, content=b"[1, 2]")) == b"[1, 2]"


# --- bus to MQTT: the window -----------------------------------------------------------------------


class Library:
    """Does what the MQTT library does with publishes."""

    def __init__(self, core: Downlink) -> None:
        self.core = core
        self.mid = 0
        self.sent: list[object] = []

    def pump(self) -> None:
        while (outgoing := self.core.take()) is not None:
            self.mid += 1
            self.sent.append(outgoing.ticket)
            self.core.sent(self.mid, outgoing)

    def submit(self, *tickets: object) -> None:
        for ticket in tickets:
            self.core.submit(Outgoing("t", b"x", ticket))
        self.pump()

    def connect(self, *, receive_maximum: int = 65535, repeats: bool = True) -> bool:
        forget = self.core.connected(receive_maximum=receive_maximum, max_packet_bytes=None, repeats=repeats)
        self.pump()
        return forget


def test_at_most_a_window_is_under_way_and_the_rest_follows_in_order() -> None:
    core = Downlink(window=3)
    library = Library(core)
    library.connect()
    library.submit(*range(6))
    assert library.sent == [0, 1, 2]
    acknowledged = core.acknowledged(2)
    assert acknowledged is not None
    assert acknowledged.ticket == 1
    library.pump()
    assert library.sent == [0, 1, 2, 3]
    assert (core.in_flight, core.waiting) == (3, 2)


def test_the_brokers_receive_maximum_wins_when_it_is_smaller() -> None:
    core = Downlink(window=100)
    library = Library(core)
    library.connect(receive_maximum=2)
    library.submit(*range(5))
    assert library.sent == [0, 1]


def test_nothing_goes_out_while_no_broker_is_there() -> None:
    library = Library(Downlink(window=3))
    library.submit(1, 2)
    assert library.sent == []
    assert library.connect() is True or library.sent == [1, 2]
    assert library.sent == [1, 2]


def test_after_a_reconnect_the_library_repeats_and_new_ones_wait_behind() -> None:
    core = Downlink(window=3)
    library = Library(core)
    library.connect(repeats=False)
    library.submit(1, 2, 3, 4)
    assert core.disconnected() is None
    assert library.connect() is False
    assert library.sent == [1, 2, 3]
    assert core.in_flight == 3


def test_a_library_that_knows_nothing_of_them_gets_all_again_in_order() -> None:
    core = Downlink(window=3)
    library = Library(core)
    library.connect(repeats=False)
    library.submit(1, 2, 3, 4)
    core.disconnected()
    assert library.connect(repeats=False) is True
    assert library.sent == [1, 2, 3, 1, 2, 3]
    assert core.waiting == 1


def test_a_broker_that_came_back_with_a_smaller_window_gets_no_more_than_it_allows() -> None:
    core = Downlink(window=5)
    library = Library(core)
    library.connect()
    library.submit(1, 2, 3, 4)
    core.disconnected()
    assert library.connect(receive_maximum=2) is True
    assert library.sent == [1, 2, 3, 4, 1, 2]


def test_a_publish_that_ends_every_connection_goes_alone_and_is_then_given_up() -> None:
    core = Downlink(window=5)
    library = Library(core)
    library.connect()
    library.submit("poison", "good", "fine")
    given_up = None
    connections = 0
    while given_up is None:
        connections += 1
        given_up = core.disconnected()
        if connections == BARREN_LIMIT:
            library.sent.clear()
        library.connect()
        if BARREN_LIMIT <= connections < 2 * BARREN_LIMIT and given_up is None:
            assert core.in_flight == 1
    assert given_up.ticket == "poison"
    assert connections == 2 * BARREN_LIMIT
    assert core.in_flight == 1  # the next is tried alone
    assert core.acknowledged(library.mid) is not None
    core.disconnected()
    library.connect()
    library.pump()
    assert library.sent[-1] == "fine"


def test_lost_connections_between_which_something_is_acknowledged_accuse_nobody() -> None:
    core = Downlink(window=2)
    library = Library(core)
    library.connect()
    for number in range(20):
        library.submit(number, -number)
        assert core.acknowledged(next(iter(core._in_flight))) is not None
        assert core.disconnected() is None
        library.connect()


def test_connections_lost_with_nothing_under_way_accuse_nobody() -> None:
    core = Downlink(window=2)
    library = Library(core)
    for _ in range(20):
        library.connect()
        assert core.disconnected() is None


def test_an_unknown_packet_id_is_ignored() -> None:
    assert Downlink(window=1).acknowledged(5) is None


def test_what_exceeds_the_brokers_packet_size_does_not_fit() -> None:
    core = Downlink(window=1)
    core.connected(receive_maximum=10, max_packet_bytes=1000, repeats=True)
    assert core.fits(Outgoing("t", b"x" * 900, None))
    assert not core.fits(Outgoing("t", b"x" * 1000, None))
    core.connected(receive_maximum=10, max_packet_bytes=None, repeats=True)
    assert core.fits(Outgoing("t", b"x" * 10_000_000, None))


def test_what_could_not_be_handed_over_keeps_its_place() -> None:
    core = Downlink(window=5)
    library = Library(core)
    library.connect()
    core.submit(Outgoing("t", b"", 1))
    core.submit(Outgoing("t", b"", 2))
    taken = core.take()
    assert taken is not None
    core.put_back(taken)
    library.pump()
    assert library.sent == [1, 2]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (0x00, None),
        (0x10, None),  # no matching subscribers: the broker has it all the same
        (0x80, "failed"),
        (0x83, "failed"),
        (0x87, "denied"),
        (0x90, "invalid"),
        (0x97, "overflow"),
        (0x99, "invalid"),
    ],
)
def test_D_V_2_a_puback_tells_the_truth(code: int, reason: str | None) -> None:
    assert refusal_of(code) == reason


# --- echoes ----------------------------------------------------------------------------------------


def test_D_V_7_an_own_publish_is_known_again_once() -> None:
    echoes = EchoFilter()
    echoes.published("t", b"x", now=0.0)
    assert echoes.is_echo("t", b"x", now=1.0)
    assert not echoes.is_echo("t", b"x", now=1.0)
    assert echoes.skipped == 1


def test_D_V_7_equal_messages_of_a_device_pass_as_often_as_they_were_sent() -> None:
    echoes = EchoFilter()
    echoes.published("t", b"x", now=0.0)
    echoes.published("t", b"x", now=0.1)
    passed = [echoes.is_echo("t", b"x", now=1.0) for _ in range(5)].count(False)
    assert passed == 3


@pytest.mark.parametrize(("topic", "payload"), [("t2", b"x"), ("t", b"y"), ("t", b"")])
def test_D_V_7_other_messages_pass(topic: str, payload: bytes) -> None:
    echoes = EchoFilter()
    echoes.published("t", b"x", now=0.0)
    assert not echoes.is_echo(topic, payload, now=0.0)


def test_the_memory_of_own_publishes_is_bounded_in_time_and_number() -> None:
    echoes = EchoFilter(limit=3, seconds=10.0)
    echoes.published("t", b"0", now=0.0)
    assert not echoes.is_echo("t", b"0", now=11.0)
    for number in range(5):
        echoes.published("t", b"%d" % number, now=20.0)
    assert not echoes.is_echo("t", b"0", now=20.0)
    assert not echoes.is_echo("t", b"1", now=20.0)
    assert echoes.is_echo("t", b"4", now=20.0)
    assert echoes._held == 2
