"""runtime.watching: what the watchdog does about deaths, hangs, programs given up, and storms."""

from random import Random

import pytest

from runtime.watching import (
    FAST_POKE_SECONDS,
    FAST_POKES,
    SLOW_POKE_SECONDS,
    TRACEBACK_SECONDS,
    Abort,
    Action,
    AskBroker,
    Counts,
    KeepTraceback,
    Kill,
    Note,
    Poke,
    Seen,
    Start,
    Watching,
    WatchSettings,
)

SETTINGS = WatchSettings(
    poll_seconds=5.0,
    hang_grace_seconds=2.0,
    broker_silence_seconds=9.0,
    broker_question_seconds=3.0,
    revive_first_seconds=4.0,
    revive_cap_seconds=20.0,
    storm_restarts=3,
    storm_seconds=60.0,
)


def watching(*programs: Seen, now: float = 0.0) -> Watching:
    """A core that has seen `programs` and asked the broker, which answered."""
    core = Watching(SETTINGS, Random(1), now=now)
    core.expire(now=now)
    core.programs(programs, now=now)
    core.broker_answered(now=now)
    return core


def deeds(actions: list[Action]) -> list[Action]:
    """Without what is only said."""
    return [action for action in actions if not isinstance(action, Note)]


def silent(core: Watching, name: str, pid: int, *, now: float) -> list[Action]:
    """The module is silent, and supervisord, asked once more, says that it runs."""
    if core.silent(name, pid, now=now) != [Poke()]:
        return []
    return deeds(core.programs([Seen(name, "RUNNING", pid)], now=now))


def run_until(core: Watching, end: float) -> list[tuple[float, Action]]:
    """Every action up to `end`, with its time; the broker answers whatever it is asked."""
    done: list[tuple[float, Action]] = []
    while (now := core.next_deadline()) <= end:
        for action in deeds(core.expire(now=now)):
            done.append((now, action))
            if isinstance(action, AskBroker):
                core.broker_answered(now=now)
    return done


# --- deaths ---------------------------------------------------------------------------------------


def test_a_death_makes_supervisord_look_at_once_and_soon_again() -> None:
    core = watching(Seen("edgehub", "RUNNING", 10))
    assert core.died(10, now=1.0) == [Poke()]
    assert core.next_deadline() == 1.0 + FAST_POKE_SECONDS


def test_supervisord_is_poked_until_the_new_process_runs_and_not_longer() -> None:
    core = watching(Seen("edgehub", "RUNNING", 10))
    core.died(10, now=1.0)
    core.programs([Seen("edgehub", "RUNNING", 10)], now=1.0)  # it has not reaped the old one yet
    assert core.next_deadline() == 1.0 + FAST_POKE_SECONDS
    core.programs([Seen("edgehub", "STARTING", 11)], now=1.02)
    assert core.next_deadline() <= 1.02 + FAST_POKE_SECONDS
    core.programs([Seen("edgehub", "RUNNING", 11)], now=2.1)
    assert core.next_deadline() == 3.0  # the broker's question, then the poll
    assert [action for _, action in run_until(core, 7.2)].count(Poke()) == 1


def test_a_process_seen_between_its_end_and_its_new_start_is_awaited_and_counted() -> None:
    core = watching(Seen("edgehub", "RUNNING", 10))
    core.died(10, now=1.0)
    core.programs([Seen("edgehub", "EXITED", 0)], now=1.01)
    assert core.next_deadline() == 1.0 + FAST_POKE_SECONDS
    core.programs([Seen("edgehub", "STARTING", 11)], now=1.02)
    assert core.statistics()["edgehub"].restarts == 1


def test_a_module_that_ended_by_itself_is_not_awaited_for_ever() -> None:
    core = watching(Seen("disabled", "RUNNING", 10))
    core.died(10, now=1.0)
    core.programs([Seen("disabled", "EXITED", 0)], now=1.0)
    while (now := core.next_deadline()) < 5.0:
        if Poke() in core.expire(now=now):
            core.programs([Seen("disabled", "EXITED", 0)], now=now)
    assert core.next_deadline() >= 5.0
    core.programs([Seen("disabled", "STARTING", 12)], now=6.0)  # an operator tries it
    assert core.statistics()["disabled"].restarts == 0


def test_a_program_that_stays_down_is_poked_fast_for_half_a_second_then_slowly() -> None:
    core = watching(Seen("edgehub", "RUNNING", 10))
    core.died(10, now=0.0)
    core.programs([Seen("edgehub", "BACKOFF", 0)], now=0.0)
    pokes = [now for now, action in run_until(core, 10.0) if action == Poke()]
    assert sum(now < 1.0 for now in pokes) in range(FAST_POKES, FAST_POKES + 4)
    assert pokes[-1] - pokes[-2] == pytest.approx(SLOW_POKE_SECONDS)


def test_the_death_of_a_stranger_means_nothing() -> None:
    core = watching(Seen("edgehub", "RUNNING", 10))
    assert core.died(99, now=1.0) == []


def test_the_processes_to_watch_are_the_living_ones() -> None:
    core = watching(Seen("broker", "RUNNING", 9), Seen("edgehub", "RUNNING", 10), Seen("mqtt-broker", "EXITED", 0))
    assert core.pids() == {9, 10}
    core.died(10, now=1.0)
    assert core.pids() == {9}
    core.programs([Seen("broker", "RUNNING", 9), Seen("edgehub", "STARTING", 11)], now=1.1)
    assert core.pids() == {9, 11}


def test_a_program_that_supervisord_forgot_is_forgotten() -> None:
    core = watching(Seen("cam", "RUNNING", 5))
    core.programs([], now=1.0)
    assert core.pids() == frozenset()
    assert core.statistics() == {}


def test_a_supervisord_that_does_not_answer_is_asked_again_soon() -> None:
    core = watching(Seen("edgehub", "RUNNING", 10))
    core.supervisor_silent(now=1.0)
    assert core.next_deadline() == 1.0 + SLOW_POKE_SECONDS


# --- hangs ----------------------------------------------------------------------------------------


def test_a_hung_module_is_aborted_and_killed_when_that_does_not_end_it() -> None:
    core = watching(Seen("cam", "RUNNING", 5))
    assert silent(core, "cam", 5, now=10.0) == [Abort("cam", 5)]
    assert (12.0, Kill("cam", 5)) in run_until(core, 20.0)
    assert core.statistics()["cam"] == Counts(restarts=0, hangs=1, revivals=0, in_storm=False, kills=1)


def test_a_hung_module_is_aborted_once_however_often_its_silence_is_told() -> None:
    core = watching(Seen("cam", "RUNNING", 5))
    assert silent(core, "cam", 5, now=10.0)
    assert core.silent("cam", 5, now=10.5) == []


def test_a_module_that_ends_after_the_abort_is_not_killed_and_its_traceback_is_kept_once() -> None:
    core = watching(Seen("cam", "RUNNING", 5))
    assert silent(core, "cam", 5, now=10.0)
    core.died(5, now=10.1)
    core.programs([Seen("cam", "RUNNING", 6)], now=10.2)
    done = run_until(core, 30.0)
    assert all(not isinstance(action, Kill) for _, action in done)
    assert [(now, action) for now, action in done if isinstance(action, KeepTraceback)] == [
        (10.1 + TRACEBACK_SECONDS, KeepTraceback("cam"))
    ]


def test_a_traceback_is_kept_where_the_kernel_tells_of_no_deaths() -> None:
    core = watching(Seen("cam", "RUNNING", 5))
    assert silent(core, "cam", 5, now=10.0)
    core.programs([Seen("cam", "RUNNING", 6)], now=11.0)
    assert KeepTraceback("cam") in core.expire(now=11.0)


def test_a_death_without_an_abort_has_no_traceback_to_keep() -> None:
    core = watching(Seen("cam", "RUNNING", 5))
    core.died(5, now=10.1)
    core.programs([Seen("cam", "RUNNING", 6)], now=10.2)
    assert all(not isinstance(action, KeepTraceback) for _, action in run_until(core, 30.0))


@pytest.mark.parametrize("state", ["STOPPING", "STOPPED", "EXITED"])
def test_a_hung_module_that_an_operator_is_stopping_is_not_aborted(state: str) -> None:
    core = watching(Seen("cam", "RUNNING", 5))  # as it was at the last look, seconds ago
    assert core.silent("cam", 5, now=10.0) == [Poke()]
    assert deeds(core.programs([Seen("cam", state, 5 if state == "STOPPING" else 0)], now=10.0)) == []
    assert all(not isinstance(action, Abort | Kill) for _, action in run_until(core, 60.0))


def test_a_module_that_is_heard_before_supervisord_answers_is_not_aborted() -> None:
    core = watching(Seen("cam", "RUNNING", 5))
    core.silent("cam", 5, now=10.0)
    core.supervisor_silent(now=12.0)
    core.heard(5, now=12.1)
    assert deeds(core.programs([Seen("cam", "RUNNING", 5)], now=12.2)) == []


def test_a_module_that_is_heard_again_is_not_killed() -> None:
    core = watching(Seen("cam", "RUNNING", 5))
    assert silent(core, "cam", 5, now=10.0)
    assert core.heard(5, now=11.0) == [Note("alive again program=cam pid=5")]
    assert all(not isinstance(action, Kill) for _, action in run_until(core, 30.0))


@pytest.mark.parametrize("state", ["STOPPING", "STOPPED", "EXITED", "STARTING"])
def test_what_an_operator_stops_is_left_to_supervisord(state: str) -> None:
    core = watching(Seen("cam", state, 5 if state in ("STOPPING", "STARTING") else 0))
    assert deeds(core.silent("cam", 5, now=10.0)) == []


def test_an_operators_stop_between_abort_and_kill_wins() -> None:
    core = watching(Seen("cam", "RUNNING", 5))
    assert silent(core, "cam", 5, now=10.0)
    core.programs([Seen("cam", "STOPPING", 5)], now=11.0)
    assert all(not isinstance(action, Kill) for _, action in run_until(core, 30.0))


def test_a_silent_module_that_is_not_supervised_is_left_alone() -> None:
    core = watching(Seen("cam", "RUNNING", 5))
    [note] = core.silent("mine", 77, now=1.0)
    assert note == Note("silent module=mine pid=77 supervised=no: left alone", is_warning=True)


# --- the broker -----------------------------------------------------------------------------------


def test_a_broker_that_answers_is_never_touched() -> None:
    core = watching(Seen("broker", "RUNNING", 9))
    assert {type(action) for _, action in run_until(core, 600.0)} == {Poke, AskBroker}


def test_a_broker_that_answers_nothing_is_aborted_then_killed() -> None:
    core = watching(Seen("broker", "RUNNING", 9))
    done: list[tuple[float, Action]] = []
    while (now := core.next_deadline()) < 20.0:
        actions = core.expire(now=now)
        if Poke() in actions:
            actions += core.programs([Seen("broker", "RUNNING", 9)], now=now)
        done += [(now, action) for action in actions if isinstance(action, Abort | Kill)]
    assert done == [(12.0, Abort("broker", 9)), (14.0, Kill("broker", 9))]


def test_a_new_broker_gets_its_time_to_answer() -> None:
    core = watching(Seen("broker", "RUNNING", 9))
    while core.next_deadline() < 11.0:
        core.expire(now=core.next_deadline())
    core.programs([Seen("broker", "RUNNING", 19)], now=11.0)
    assert all(not isinstance(action, Abort) for action in core.expire(now=12.0))


def test_a_watchdog_that_stood_still_itself_blames_nobody() -> None:
    core = watching(Seen("broker", "RUNNING", 9))
    core.expire(now=3.0)  # asked
    actions = core.expire(now=500.0)  # stopped, or swapped out, in between
    assert all(not isinstance(action, Abort) for action in actions)
    assert Abort("broker", 9) not in core.expire(now=503.0)


# --- programs that supervisord gave up ------------------------------------------------------------


def revivals(core: Watching, end: float) -> list[float]:
    """When `core` starts the program `x` again, which fails each time."""
    times: list[float] = []
    while (now := core.next_deadline()) <= end:
        for action in deeds(core.expire(now=now)):
            if isinstance(action, AskBroker):
                core.broker_answered(now=now)
            if action == Poke() and Start("x") in core.programs([Seen("x", "FATAL", 0)], now=now):
                times.append(now)
                core.programs([Seen("x", "STARTING", 0)], now=now)
                core.programs([Seen("x", "FATAL", 0)], now=now)
    return times


def test_a_fatal_program_is_started_again_with_growing_capped_pauses() -> None:
    core = watching()
    core.programs([Seen("x", "FATAL", 0)], now=0.0)
    times = revivals(core, 200.0)
    pauses = [later - sooner for sooner, later in zip([0.0, *times], times, strict=False)]
    for pause, ceiling in zip(pauses, [4.0, 8.0, 16.0, 20.0, 20.0, 20.0], strict=False):
        assert ceiling / 2 <= pause <= ceiling
    assert core.statistics()["x"].revivals == len(times)


def test_two_nodes_do_not_revive_in_step() -> None:
    first, second = (Watching(SETTINGS, Random(seed), now=0.0) for seed in (1, 2))
    for core in (first, second):
        core.programs([Seen("x", "FATAL", 0)], now=0.0)
    assert revivals(first, 60.0)[0] != revivals(second, 60.0)[0]


def test_seeing_fatal_again_does_not_put_the_revival_off() -> None:
    core = watching()
    core.programs([Seen("x", "FATAL", 0)], now=0.0)
    for second in range(1, 4):
        core.programs([Seen("x", "FATAL", 0)], now=float(second))
    assert revivals(core, 4.0)


def test_a_program_that_an_operator_started_or_removed_meanwhile_is_not_revived() -> None:
    core = watching()
    core.programs([Seen("x", "FATAL", 0)], now=0.0)
    core.programs([Seen("x", "STOPPED", 0)], now=1.0)
    assert all(not isinstance(action, Start) for _, action in run_until(core, 60.0))


def test_a_program_that_was_stopped_when_its_revival_was_due_is_not_revived() -> None:
    core = watching()
    core.programs([Seen("x", "FATAL", 0)], now=0.0)
    while (now := core.next_deadline()) <= 30.0:
        if Poke() in core.expire(now=now):
            state = "FATAL" if now < 2.0 else "STOPPED"  # between two looks: started and stopped by an operator
            assert deeds(core.programs([Seen("x", state, 0)], now=now)) == []
        core.broker_answered(now=now)
    assert core.statistics()["x"].revivals == 0


def test_a_stopped_program_is_never_started() -> None:
    core = watching(Seen("x", "STOPPED", 0), Seen("disabled", "EXITED", 0))
    assert all(not isinstance(action, Start) for _, action in run_until(core, 1000.0))


def test_the_pauses_begin_small_again_after_the_program_has_run_for_a_while() -> None:
    core = watching()
    core.programs([Seen("x", "FATAL", 0)], now=0.0)
    revivals(core, 100.0)
    core.programs([Seen("x", "RUNNING", 5)], now=100.0)
    core.programs([Seen("x", "RUNNING", 5)], now=100.0 + SETTINGS.storm_seconds + 1)
    core.programs([Seen("x", "FATAL", 0)], now=200.0)
    times = revivals(core, 204.0)
    assert times
    assert times[0] <= 204.0


# --- storms ---------------------------------------------------------------------------------------


def test_a_restart_storm_is_told_once_and_again_only_after_quiet() -> None:
    core = watching(Seen("x", "RUNNING", 1))
    storms: list[str] = []

    def restart(pid: int, now: float) -> None:
        for action in core.programs([Seen("x", "RUNNING", pid)], now=now):
            if isinstance(action, Note) and "storm" in action.text:
                storms.append(action.text)

    for pid in range(2, 8):
        restart(pid, float(pid))
    assert storms == ["restart storm program=x restarts=3 within_seconds=60: see its log"]
    assert core.statistics()["x"] == Counts(restarts=6, hangs=0, revivals=0, in_storm=True, storms=1)
    core.programs([Seen("x", "RUNNING", 7)], now=200.0)
    assert not core.statistics()["x"].in_storm
    for pid in range(8, 11):
        restart(pid, 200.0 + pid)
    assert len(storms) == 2


def test_restarts_far_apart_are_no_storm() -> None:
    core = watching(Seen("x", "RUNNING", 1))
    for pid in range(2, 20):
        core.programs([Seen("x", "RUNNING", pid)], now=pid * 40.0)
    assert core.statistics()["x"] == Counts(restarts=18, hangs=0, revivals=0, in_storm=False)
