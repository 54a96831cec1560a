"""The link's life as lists of facts: events in, actions out, time as an argument."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.edgehub.config import Endpoint
from modules.edgehub.session import (
    UNANSWERED_DIALS,
    Action,
    Announce,
    AwaitQuiet,
    Dial,
    DialDue,
    Drain,
    Drained,
    Event,
    Failed,
    Finished,
    Greet,
    Hangup,
    IllegalMove,
    Keepalive,
    LinkSession,
    LinkState,
    Lost,
    MoveWanted,
    Opened,
    Probe,
    Probed,
    Proven,
    Quiet,
    StopWanted,
)
from runtime.backoff import Backoff

ONE, TWO = Endpoint("one", 10000), Endpoint("two", 10000)


def session(
    *endpoints: Endpoint,
    redial: float = 600.0,
    failback: float = 0.0,
    is_answered: bool = True,
    keeps_unproven: bool = True,
) -> LinkSession:
    return LinkSession(
        endpoints or (ONE,),
        Backoff(random.Random(3), cap_seconds=60.0),
        heartbeat_seconds=15.0,
        greeting_seconds=5.0,
        stable_seconds=10.0,
        unproven_redial_seconds=redial,
        failback_seconds=failback,
        is_answered=is_answered,
        keeps_unproven=keeps_unproven,
        now=0.0,
    )


def dial(link: LinkSession) -> tuple[list[Action], float]:
    """Let the pause pass; the actions then, and when it was."""
    now = link.next_deadline()
    assert now is not None
    return link.expire(now=now), now


def open_(link: LinkSession) -> float:
    """Dial and open; when."""
    actions, now = dial(link)
    assert isinstance(actions[0], Dial)
    assert link.receive(Opened(), now=now) == [Greet()]
    return now


def serve(link: LinkSession) -> float:
    now = open_(link)
    link.receive(Proven(), now=now)
    return now


def go_unproven(link: LinkSession) -> float:
    now = 0.0
    for _ in range(UNANSWERED_DIALS - 1):
        now = open_(link) + 5.0
        assert link.expire(now=now) == [Hangup("greeting unanswered")]
        link.receive(Lost("greeting unanswered"), now=now)
    now = open_(link) + 5.0
    assert link.expire(now=now) == [Announce(True)]
    return now


def test_at_the_start_everybody_hears_that_the_cloud_is_not_there() -> None:
    assert session().start() == [Announce(False)]


def test_the_way_to_a_served_link() -> None:
    link = session()
    link.start()
    assert link.expire(now=0.0) == [Dial(ONE)]
    assert link.state is LinkState.DIALLING
    assert link.receive(Opened(), now=0.1) == [Greet()]
    assert not link.is_open, "uploads wait for the greeting"
    assert link.receive(Proven(), now=0.2) == [Announce(True)]
    assert link.state is LinkState.SERVED
    assert link.is_open
    assert link.receive(Proven(), now=0.3) == [], "said once"
    assert link.since == 0.2


def test_a_keepalive_each_heartbeat_from_the_opening_on() -> None:
    link = session()
    now = serve(link)
    assert link.next_deadline() == now + 15.0
    assert link.expire(now=now + 14.9) == []
    assert link.expire(now=now + 15.0) == [Keepalive()]
    assert link.expire(now=now + 29.9) == []
    assert link.expire(now=now + 30.0) == [Keepalive()]


def test_a_failed_dial_is_tried_again_within_a_second() -> None:
    link = session()
    link.start()
    dial(link)
    assert link.receive(Failed("connection refused"), now=1.0) == []
    assert link.state is LinkState.CLOSED
    assert link.why == "connection refused"
    assert link.dial_at is not None
    assert 1.0 < link.dial_at <= 2.0


def test_pauses_grow_while_dials_fail_and_never_beyond_the_cap() -> None:
    link = session()
    pauses = []
    for _ in range(30):
        _, now = dial(link)
        link.receive(Failed("no"), now=now)
        assert link.dial_at is not None
        pauses.append(link.dial_at - now)
    assert max(pauses[:2]) <= 2.0
    assert max(pauses) <= 60.0
    assert max(pauses) > 30.0


def test_the_next_endpoint_comes_after_a_failure_and_the_pause_grows_per_round() -> None:
    link = session(ONE, TWO)
    dialled = []
    for _ in range(4):
        (action,), now = dial(link)
        assert isinstance(action, Dial)
        dialled.append(action.endpoint)
        link.receive(Failed("no"), now=now)
        assert link.dial_at is not None
        assert link.dial_at - now <= 2.0
    assert dialled == [ONE, TWO, ONE, TWO]


def test_after_a_stable_link_the_first_endpoint_is_first_again() -> None:
    link = session(ONE, TWO)
    _, now = dial(link)
    link.receive(Failed("no"), now=now)
    now = serve(link)
    assert link.endpoint == TWO
    link.receive(Lost("gone"), now=now + 10.0)
    assert dial(link)[0] == [Dial(ONE)]


def test_a_stable_link_resets_the_pauses() -> None:
    link = session()
    for _ in range(20):
        _, now = dial(link)
        link.receive(Failed("no"), now=now)
    now = serve(link) + 10.0
    link.receive(Lost("gone"), now=now)
    assert link.dial_at is not None
    assert link.dial_at - now <= 1.0


def test_a_link_that_is_lost_at_once_does_not_reset_them() -> None:
    link = session()
    pauses = []
    for _ in range(30):
        now = serve(link) + 0.1
        link.receive(Lost("replaced"), now=now)
        assert link.dial_at is not None
        pauses.append(link.dial_at - now)
    assert max(pauses) > 30.0


def test_a_loss_is_announced_once() -> None:
    link = session()
    now = serve(link)
    assert link.receive(Lost("EOF"), now=now + 1) == [Announce(False)]
    _, now = dial(link)
    assert link.receive(Failed("no"), now=now) == []


def test_an_unanswered_greeting_closes_and_tries_the_next_endpoint() -> None:
    link = session(ONE, TWO)
    now = open_(link) + 5.0
    assert link.expire(now=now) == [Hangup("greeting unanswered")]
    assert link.receive(Lost("greeting unanswered"), now=now) == [Announce(False)]
    assert "did not answer the greeting" in link.why
    assert dial(link)[0] == [Dial(TWO)]


def test_after_three_unanswered_greetings_the_link_stays_unproven() -> None:
    link = session()
    now = go_unproven(link)
    assert link.state is LinkState.UNPROVEN
    assert link.is_open, "uploads go to an old CloudHub all the same"
    assert "answered none of 3 greetings" in link.why
    assert link.expire(now=now + 10.0) == [Keepalive()]


def test_where_unproven_links_are_of_no_use_each_unanswered_one_is_closed() -> None:
    link = session(keeps_unproven=False)
    for _ in range(3 * UNANSWERED_DIALS):
        now = open_(link) + 5.0
        assert link.expire(now=now) == [Hangup("greeting unanswered")]
        link.receive(Lost("greeting unanswered"), now=now)
        assert "did not answer the greeting" in link.why


def test_anything_from_the_cloud_proves_an_unproven_link() -> None:
    link = session()
    now = go_unproven(link)
    assert link.receive(Proven(), now=now + 1) == [], "it was announced as connected already"
    assert link.state is LinkState.SERVED


def test_a_served_link_begins_the_count_of_greetings_anew() -> None:
    link = session()
    now = open_(link) + 5.0
    link.expire(now=now)
    link.receive(Lost("greeting unanswered"), now=now)
    now = serve(link)
    link.receive(Lost("EOF"), now=now)
    now = open_(link) + 5.0
    assert link.expire(now=now) == [Hangup("greeting unanswered")]


def test_an_unproven_link_is_dialled_anew_after_a_while_unless_told_not_to() -> None:
    link = session()
    now = go_unproven(link)
    assert AwaitQuiet() in link.expire(now=now + 600.0)
    assert link.receive(Quiet(), now=now + 601.0) == [Hangup("unproven link, trying a new one")]
    patient = session(redial=0.0)
    now = go_unproven(patient)
    assert patient.expire(now=now + 1e6) == [Keepalive()]


def test_with_many_endpoints_each_is_greeted_before_one_is_kept_unproven() -> None:
    endpoints = [Endpoint(f"hub-{number}", 10000) for number in range(5)]
    link = session(*endpoints)
    for endpoint in endpoints[:4]:
        now = open_(link) + 5.0
        assert link.endpoint == endpoint
        assert link.expire(now=now) == [Hangup("greeting unanswered")]
        link.receive(Lost("greeting unanswered"), now=now)
    now = open_(link) + 5.0
    assert link.expire(now=now) == [Announce(True)]
    # And when it is dialled anew, each of them once more.
    link.expire(now=now + 600.0)
    link.receive(Quiet(), now=now + 600.0)
    link.receive(Lost("moved"), now=now + 600.0)
    tried = set()
    for _ in range(4):
        now = open_(link) + 5.0
        tried.add(link.endpoint)
        assert link.expire(now=now) == [Hangup("greeting unanswered")]
        link.receive(Lost("greeting unanswered"), now=now)
    open_(link)
    assert {*tried, link.endpoint} == set(endpoints)


def test_a_hub_that_does_not_know_the_greeting_is_not_asked_and_the_link_is_unproven_at_once() -> None:
    link = session(is_answered=False)
    (action,), now = dial(link)
    assert isinstance(action, Dial)
    assert link.receive(Opened(), now=now) == [Greet(is_asking=False), Announce(True)]
    assert link.state is LinkState.UNPROVEN
    assert link.is_open
    assert link.receive(Proven(), now=now) == []
    assert link.state is LinkState.SERVED


# --- moves on purpose -----------------------------------------------------------------------------------


def serve_second(link: LinkSession) -> float:
    """The first endpoint does not answer, the second serves."""
    _, now = dial(link)
    link.receive(Failed("no"), now=now)
    now = serve(link)
    assert link.endpoint == TWO
    return now


def until_probe(link: LinkSession) -> float:
    """Let time pass, with nothing but keepalives, until the first endpoint is looked for; when."""
    while True:
        actions, now = dial(link)
        if Probe(ONE) in actions:
            return now
        assert actions == [Keepalive()]


def test_while_another_endpoint_serves_the_first_is_looked_for_now_and_then() -> None:
    link = session(ONE, TWO, failback=300.0)
    last = serve_second(link)
    for _ in range(5):
        now = until_probe(link)
        assert 225.0 <= now - last <= 375.0
        assert link.receive(Probed(False), now=now) == []
        last = now


def test_when_the_first_endpoint_is_back_the_link_moves_in_a_quiet_moment() -> None:
    link = session(ONE, TWO, failback=300.0)
    serve_second(link)
    now = until_probe(link)
    assert link.receive(Probed(True), now=now) == [AwaitQuiet()]
    assert link.state is LinkState.SERVED, "until then all goes on"
    assert link.receive(Quiet(), now=now + 3) == [Hangup("back to one:10000")]
    assert link.receive(Quiet(), now=now + 3) == [], "once is enough"
    assert link.receive(Lost("back to one:10000"), now=now + 3) == [Announce(False)]
    assert link.dial_at == now + 3, "at once: it was no failure"
    assert dial(link)[0] == [Dial(ONE)]


def test_the_first_endpoint_is_never_looked_for_while_it_serves_or_when_told_not_to() -> None:
    for link in (session(ONE, TWO, failback=300.0), session(ONE, failback=300.0)):
        now = serve(link)
        assert link.expire(now=now + 1e6) == [Keepalive()]
    link = session(ONE, TWO, failback=0.0)
    now = serve_second(link)
    assert link.expire(now=now + 1e6) == [Keepalive()]


def test_after_a_loss_the_first_endpoint_is_not_tried_first_when_the_last_look_found_it_away() -> None:
    """It may be a black hole, and cost the whole handshake time."""
    link = session(ONE, TWO, failback=300.0)
    serve_second(link)
    now = until_probe(link)
    link.receive(Probed(False), now=now)
    link.receive(Lost("gone"), now=now)
    (action,), now = dial(link)
    assert action == Dial(TWO)
    link.receive(Failed("no"), now=now)
    now = serve(link)
    assert link.endpoint == ONE, "it is back after all"
    link.receive(Lost("gone"), now=now + 20.0)
    assert dial(link)[0] == [Dial(ONE)]


def test_a_first_endpoint_that_can_be_reached_but_does_not_serve_is_tried_less_and_less() -> None:
    link = session(ONE, TWO, failback=300.0)
    served = serve_second(link)
    pauses = []
    while served < 7 * 86_400:
        now = until_probe(link)
        pauses.append(now - served)
        link.receive(Probed(True), now=now)
        link.receive(Quiet(), now=now)
        link.receive(Lost("back to one:10000"), now=now)
        now = open_(link) + 5.0
        assert link.endpoint == ONE
        assert link.expire(now=now) == [Hangup("greeting unanswered")]
        link.receive(Lost("greeting unanswered"), now=now)
        served = serve(link)
        assert link.endpoint == TWO
    assert pauses[0] <= 375.0
    assert min(pauses[4:]) >= 0.75 * 4800.0, "16 times the setting"
    assert max(pauses) <= 1.25 * 4800.0


def test_a_return_that_lasted_makes_the_next_one_as_quick_as_the_first() -> None:
    link = session(ONE, TWO, failback=300.0)
    served = serve_second(link)
    for _ in range(6):
        now = until_probe(link)
        assert now - served <= 375.0
        link.receive(Probed(True), now=now)
        link.receive(Quiet(), now=now)
        link.receive(Lost("back to one:10000"), now=now)
        now = serve(link) + 3600.0
        assert link.endpoint == ONE
        link.receive(Lost("gone"), now=now)
        served = serve_second(link)


def test_a_link_that_is_lost_before_the_quiet_moment_forgets_the_move() -> None:
    link = session(ONE, TWO, failback=300.0)
    serve_second(link)
    now = until_probe(link)
    link.receive(Probed(True), now=now)
    link.receive(Lost("gone"), now=now)
    assert link.receive(Quiet(), now=now) == []
    assert link.receive(Probed(True), now=now) == []
    now = serve(link)
    assert link.endpoint == ONE
    assert link.receive(Probed(True), now=now) == []
    assert link.receive(Quiet(), now=now) == []


def test_a_move_that_is_wanted_keeps_the_endpoint_and_is_no_failure() -> None:
    link = session(ONE, TWO)
    now = serve(link) + 1.0
    assert link.receive(MoveWanted("new certificate"), now=now) == [AwaitQuiet()]
    assert link.receive(MoveWanted("again"), now=now) == []
    assert link.receive(Quiet(), now=now) == [Hangup("new certificate")]
    assert link.receive(Lost("new certificate"), now=now) == [Announce(False)]
    assert dial(link) == ([Dial(ONE)], now)


def test_a_move_wanted_while_the_link_comes_about_waits_for_it_and_needs_none_before_a_dial() -> None:
    link = session()
    assert link.receive(MoveWanted("new certificate"), now=0.0) == []
    now = open_(link)
    assert link.receive(MoveWanted("another"), now=now) == []
    assert link.receive(Quiet(), now=now) == [], "not before it serves"
    assert link.receive(Proven(), now=now) == [Announce(True), AwaitQuiet()]
    assert link.receive(Quiet(), now=now) == [Hangup("another")]


def test_a_dial_that_fails_makes_a_move_needless() -> None:
    link = session()
    _, now = dial(link)
    link.receive(MoveWanted("new certificate"), now=now)
    link.receive(Failed("no"), now=now)
    now = open_(link)
    assert link.receive(Proven(), now=now) == [Announce(True)]


def test_a_stop_goes_before_a_move() -> None:
    link = session()
    now = serve(link)
    link.receive(MoveWanted("new certificate"), now=now)
    link.receive(StopWanted(), now=now)
    assert link.receive(Quiet(), now=now) == []
    assert link.receive(MoveWanted("new certificate"), now=now) == []


def test_a_proof_that_comes_after_the_hangup_does_no_harm() -> None:
    link = session()
    now = open_(link) + 5.0
    link.expire(now=now)
    assert link.receive(Proven(), now=now) == [Announce(True)]
    assert link.receive(Lost("greeting unanswered"), now=now) == [Announce(False)]


def test_stopping_an_open_link_drains_it_first_and_keeps_it_alive() -> None:
    link = session()
    now = serve(link)
    assert link.receive(StopWanted(), now=now) == [Drain()]
    assert link.state is LinkState.DRAINING
    assert link.is_open
    assert link.expire(now=now + 15.0) == [Keepalive()]
    assert link.receive(Drained(), now=now + 16) == [Announce(False), Hangup("stopped"), Finished()]
    assert link.receive(Lost("closed"), now=now + 17) == []


def test_a_link_lost_while_draining_ends_it() -> None:
    link = session()
    now = serve(link)
    link.receive(StopWanted(), now=now)
    assert link.receive(Lost("EOF"), now=now) == [Announce(False), Finished()]
    assert link.next_deadline() is None


@given(st.data(), st.integers(1, 3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_whatever_happens_in_whatever_order_the_session_goes_on(
    data: st.DataObject, endpoints: int, is_answered: bool
) -> None:
    """A shell that obeys the actions, and a world that does anything at any time."""
    link = session(*(Endpoint(f"hub-{n}", 1) for n in range(endpoints)), failback=60.0, is_answered=is_answered)
    now, is_announced, is_hung_up = 0.0, False, False
    pending = list(link.start())
    for _ in range(60):
        for action in pending:
            if isinstance(action, Announce):
                is_announced = action.is_connected
            elif isinstance(action, Hangup):
                is_hung_up = True
        assert is_announced == (link.state in (LinkState.SERVED, LinkState.UNPROVEN))
        moves: list[Event] = [MoveWanted("m"), Quiet(), Probed(True), Probed(False)]
        if link.state is LinkState.CLOSED:
            assert link.next_deadline() is not None, "it dials again by itself"
        elif link.state is LinkState.DIALLING:
            moves += [Opened(), Failed("f")]
        else:
            moves += [Lost("l")] * (3 if is_hung_up else 1)
            moves += [] if is_hung_up else [Proven()]
        event = data.draw(st.none() | st.sampled_from(moves))
        if event is None:
            now = max(now, link.next_deadline() or now)
            pending = link.expire(now=now)
        else:
            now += data.draw(st.sampled_from([0.0, 0.5, 20.0]))
            pending = link.receive(event, now=now)
        if isinstance(event, Lost | Opened):
            is_hung_up = False


@pytest.mark.parametrize("begun", [False, True])
def test_stopping_without_a_link_is_done_at_once(begun: bool) -> None:
    link = session()
    link.start()
    if begun:
        link.expire(now=0.0)
    actions = link.receive(StopWanted(), now=1.0)
    assert actions[-1] == Finished()
    assert (Hangup("stopped") in actions) == begun
    assert link.state is LinkState.STOPPED
    assert link.next_deadline() is None
    assert link.receive(Opened(), now=2.0) == [], "what was under way ends quietly"


def test_the_pause_can_be_cut_short() -> None:
    link = session()
    _, now = dial(link)
    link.receive(Failed("no"), now=now)
    assert link.receive(DialDue(), now=now) == [Dial(ONE)]


@pytest.mark.parametrize("event", [Opened(), Lost("x"), Proven(), Failed("x"), Drained()])
def test_what_cannot_happen_in_a_state_is_an_error(event: Opened) -> None:
    with pytest.raises(IllegalMove, match=r"in state closed"):
        session().receive(event, now=0.0)
