"""Random schedules over the broker's core and several SDK cores; see tests/support/world.py.

`make soak` plays millions; here are fixed seeds, and those that once broke a rule.
"""

import pytest

from tests.support.world import play

ONCE_BROKEN = (
    2,  # an older process works on after the newer one has died, at a new broker
    35,  # the late answer `name-taken` to a HELLO that was repeated
    354,  # an old WELCOME, unread since before a stop, taken for the broker's word that we are alive
    4679,  # an undeclared module let go and back: its lane became two with one number
    5202,
    6872,  # a batch settled in part, sent again to a new broker that asked for the lane's start for ever
    455_952_402,  # an expired message that the receiver's ACK passed over, counted as delivered as well
)


@pytest.mark.parametrize("seed", ONCE_BROKEN)
def test_a_schedule_that_once_broke_a_rule_keeps_it(seed: int) -> None:
    play(seed)


@pytest.mark.parametrize("hundred", range(6))
def test_no_schedule_loses_repeats_or_reorders(hundred: int) -> None:
    for seed in range(20_000 + hundred * 100, 20_100 + hundred * 100):
        play(seed)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1, "prefetch": 1, "batch": 1},
        {"window": 40, "prefetch": 40, "batch": 16},
        {"window": 3, "prefetch": 9, "batch": 8},
        {"window": 3, "prefetch": 9, "batch": 8, "paced": True},
    ],
    ids=str,
)
def test_windows_of_any_size_keep_the_rules(options: dict[str, int]) -> None:
    for seed in range(30_000, 30_060):
        play(seed, **options)
