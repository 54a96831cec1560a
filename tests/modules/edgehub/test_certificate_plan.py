"""When the certificate is asked for, renewed and complained about: a core, two clocks, no file (join and rotation)."""

from __future__ import annotations

import random

import pytest

from modules.edgehub.certificate_plan import CertificatePlan, Seen, Standing, Step, show_span

DAY = 86_400.0
BORN = 1_000_000.0
YEAR = 365 * DAY


def plan(*, has_token: bool = False, may_renew: bool = True, seed: int = 1) -> CertificatePlan:
    return CertificatePlan(random.Random(seed), has_token=has_token, may_renew=may_renew)


def valid(lifetime: float = YEAR) -> Seen:
    return Seen(Standing.VALID, "", BORN, BORN + lifetime)


def expired(lifetime: float = YEAR) -> Seen:
    return Seen(Standing.EXPIRED, "tlsCertFile x: expired", BORN, BORN + lifetime)


MISSING = Seen(Standing.MISSING, "tlsCertFile x: no such file")


# --- join ---------------------------------------------------------------------------------------------


def test_a_node_without_files_joins_at_once_if_it_has_a_token() -> None:
    made = plan(has_token=True)
    made.saw(MISSING)
    assert made.step(now=0.0, wall=BORN) is Step.JOIN
    assert made.joining() == "joining: asking the cloud for a certificate"
    without = plan()
    without.saw(MISSING)
    assert without.step(now=0.0, wall=BORN) is None
    assert without.joining() is None
    assert "join with a token (edgezmq join)" in (without.warning(wall=BORN) or "")


def test_a_refused_join_is_tried_again_with_growing_pauses_and_its_reason_is_shown() -> None:
    made = plan(has_token=True)
    made.saw(MISSING)
    now, pauses = 0.0, []
    for _ in range(40):
        assert made.step(now=now, wall=BORN) is Step.JOIN
        made.refused("unreachable", "nothing listens there", now=now, wall=BORN)
        assert made.step(now=now, wall=BORN) is None
        pause = made.next_look(now=now, wall=BORN)
        assert pause <= 5.0, "somebody may lay files by hand meanwhile"
        start = now
        while made.step(now=now, wall=BORN) is None:
            now += made.next_look(now=now, wall=BORN)
        pauses.append(now - start)
    assert pauses[0] <= 1.0
    assert 20 < max(pauses) <= 61
    assert made.joining() == "joining: nothing listens there"
    assert made.warning(wall=BORN) == "joining: nothing listens there"


def test_a_join_that_waits_for_a_person_or_a_clock_is_tried_less_often() -> None:
    made = plan(has_token=True)
    made.saw(MISSING)
    now = 0.0
    for _ in range(12):
        made.refused("token-expired", "get a new one", now=now, wall=BORN)
        while made.step(now=now, wall=BORN) is None:
            now += made.next_look(now=now, wall=BORN)
    assert now > 300


def test_a_join_that_succeeded_is_forgotten() -> None:
    made = plan(has_token=True)
    made.saw(MISSING)
    made.refused("unreachable", "no", now=0.0, wall=BORN)
    made.saw(valid())
    assert (made.refusal, made.joining(), made.warning(wall=BORN)) == (None, None, None)
    assert made.step(now=0.0, wall=BORN) is None


@pytest.mark.parametrize("standing", [Standing.BROKEN, Standing.OTHER_NODE, Standing.NOT_YET_VALID])
def test_no_join_replaces_files_that_are_there_and_wrong(standing: Standing) -> None:
    made = plan(has_token=True)
    made.saw(Seen(standing, "tlsCertFile x: is wrong"))
    assert made.step(now=0.0, wall=BORN) is None
    assert (made.warning(wall=BORN) or "").startswith("tlsCertFile x: is wrong. ")


def test_a_token_lets_a_node_whose_certificate_expired_join_again() -> None:
    made = plan(has_token=True)
    made.saw(valid())
    made.saw(expired())
    assert made.step(now=0.0, wall=BORN + YEAR + 1) is Step.JOIN


def test_a_join_that_brings_nothing_of_use_is_not_repeated_without_pause() -> None:
    made = plan(has_token=True)
    made.saw(MISSING)
    made.issued(now=0.0, wall=BORN)
    assert made.step(now=0.0, wall=BORN) is None
    assert made.joining() == f"joining: a certificate was issued and is of no use: {MISSING.why}"
    made.saw(expired(0.0))
    made.saw(valid(1.0))
    made.issued(now=5.0, wall=BORN + 1.0)
    assert made.step(now=5.0, wall=BORN + 1.0) is None
    assert made.step(now=6.0, wall=BORN + 1.0) is Step.RENEW


# --- rotation -------------------------------------------------------------------------------------------


def test_a_rotation_is_due_in_the_last_third_of_the_lifetime_and_not_before() -> None:
    made = plan()
    made.saw(valid())
    due = made.rotation_due
    assert due is not None
    assert 0.7 * YEAR <= due - BORN <= 0.9 * YEAR
    assert made.step(now=0.0, wall=due - 1) is None
    assert made.step(now=0.0, wall=due) is Step.RENEW


def test_looking_at_the_same_certificate_again_does_not_move_its_rotation() -> None:
    made = plan()
    made.saw(valid())
    due = made.rotation_due
    made.saw(valid())
    assert made.rotation_due == due
    made.saw(valid(2 * YEAR))
    assert made.rotation_due != due


def test_a_failed_rotation_is_tried_again_and_again_until_it_is_too_late() -> None:
    made = plan()
    made.saw(valid())
    wall = made.rotation_due or 0.0
    now, tries = 0.0, 0
    while now < 7200:
        if made.step(now=now, wall=wall + now) is Step.RENEW:
            tries += 1
            made.refused("unreachable", "no", now=now, wall=wall + now)
        now += made.next_look(now=now, wall=wall + now)
    assert 24 < tries < 80, "about every five minutes in the end"
    made.saw(expired())
    assert made.step(now=now, wall=BORN + YEAR + 1) is None


def test_a_rotation_that_is_off_is_never_due() -> None:
    made = plan(may_renew=False)
    made.saw(valid())
    assert made.rotation_due is None
    assert made.step(now=0.0, wall=BORN + 0.95 * YEAR) is None


def test_a_clock_that_is_set_back_holds_up_no_rotation() -> None:
    """Pauses are monotonic: an hour back must not mean an hour more."""
    made = plan()
    made.saw(valid())
    wall = (made.rotation_due or 0.0) + 7200
    made.refused("unreachable", "no", now=100.0, wall=wall)
    assert made.step(now=103.0, wall=wall - 3600) is Step.RENEW


def test_an_idle_node_looks_once_a_minute_and_exactly_when_something_is_due() -> None:
    made = plan()
    made.saw(valid())
    due = made.rotation_due or 0.0
    assert made.next_look(now=0.0, wall=BORN) == 60.0
    assert made.next_look(now=0.0, wall=due - 7.0) == pytest.approx(7.0)
    assert made.next_look(now=0.0, wall=due) == pytest.approx(0.05)
    made.saw(Seen(Standing.NOT_YET_VALID, "not yet", BORN, BORN + YEAR))
    assert made.next_look(now=0.0, wall=BORN - 2.0) == pytest.approx(2.05)


# --- alarms ------------------------------------------------------------------------------------------------


def test_the_alarm_begins_thirty_days_before_the_end_of_a_year() -> None:
    made = plan()
    made.saw(valid())
    end = BORN + YEAR
    assert made.warning(wall=end - 31 * DAY) is None
    assert "expires in 29 days (1971-" in (made.warning(wall=end - 29.5 * DAY) or "")


def test_a_short_rotation_period_raises_no_alarm_that_stays() -> None:
    made = plan()
    made.saw(valid(7 * DAY))
    assert made.warning(wall=BORN + 6.2 * DAY) is None
    assert made.warning(wall=BORN + 6.4 * DAY) is not None


def test_the_alarm_says_why_the_rotation_does_not_help() -> None:
    wall = BORN + YEAR - 10 * DAY
    off = plan(may_renew=False)
    off.saw(valid())
    assert "rotateCertificates is off" in (off.warning(wall=wall) or "")
    refused = plan()
    refused.saw(valid())
    refused.refused("unreachable", "https://cloud:10002: no answer", now=0.0, wall=wall)
    assert (refused.warning(wall=wall) or "").endswith("and is not renewed: https://cloud:10002: no answer")


def test_spans_are_for_people() -> None:
    assert [show_span(s) for s in (-5, 59, 119, 120, 7200, 3 * DAY)] == [
        "0 s",
        "59 s",
        "119 s",
        "2 minutes",
        "2 hours",
        "3 days",
    ]
