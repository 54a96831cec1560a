"""Two hundred nodes whose cloud restarts: when they come back, as their sessions decide it."""

import heapq
import random
from collections import Counter

import pytest

from modules.edgehub.config import Endpoint
from modules.edgehub.session import Dial, Failed, LinkSession, LinkState, Lost, Opened, Proven
from runtime.backoff import Backoff

NODES = 200
HUB = Endpoint("cloud", 10000)


def session(seed: int) -> LinkSession:
    link = LinkSession(
        (HUB,),
        Backoff(random.Random(seed), cap_seconds=60.0),
        heartbeat_seconds=15.0,
        greeting_seconds=5.0,
        stable_seconds=10.0,
        unproven_redial_seconds=600.0,
        now=0.0,
    )
    link.expire(now=0.0)
    link.receive(Opened(), now=0.0)
    link.receive(Proven(), now=0.0)
    return link


def reconnects(down_seconds: float, *, seed: int = 1) -> tuple[list[float], list[float]]:
    """The hub ends all links at 100 s and takes dials again after `down_seconds`. When each node was back, in seconds
    after that; and when it was dialled, in seconds after the cut."""
    begun = 100.0
    links = [session(seed * 1000 + number) for number in range(NODES)]
    dials: list[float] = []
    back: list[float] = []
    due: list[tuple[float, int]] = []
    for number, link in enumerate(links):
        link.receive(Lost("restart"), now=begun)
        at = link.next_deadline()
        assert at is not None
        heapq.heappush(due, (at, number))
    while due:
        now, number = heapq.heappop(due)
        link = links[number]
        assert any(isinstance(action, Dial) for action in link.expire(now=now))
        dials.append(now - begun)
        if now - begun >= down_seconds:
            link.receive(Opened(), now=now)
            link.receive(Proven(), now=now)
            assert link.state is LinkState.SERVED
            back.append(now - begun - down_seconds)
        else:
            link.receive(Failed("refused"), now=now)
            again = link.next_deadline()
            assert again is not None
            heapq.heappush(due, (again, number))
    return back, dials


@pytest.mark.parametrize(
    ("down_seconds", "most_in_100_ms", "all_within"),
    [(0.0, 40, 1.0), (2.0, 40, 8.0), (10.0, 20, 61.0), (60.0, 15, 61.0), (600.0, 10, 61.0)],
)
def test_two_hundred_nodes_spread_their_reconnects(down_seconds: float, most_in_100_ms: int, all_within: float) -> None:
    for seed in range(5):
        back, _ = reconnects(down_seconds, seed=seed)
        busiest = max(Counter(int(at * 10) for at in back).values())
        assert len(back) == NODES
        assert busiest <= most_in_100_ms, "no rush"
        assert max(back) <= all_within, "nobody waits longer than its pause"


def test_while_the_cloud_is_away_dials_become_rare() -> None:
    _, dials = reconnects(600.0)
    per_second = Counter(int(at) for at in dials)
    assert max(per_second.values()) <= 2 * NODES
    late = [count for second, count in per_second.items() if 300 <= second < 600]
    assert sum(late) / 300 < NODES / 20, "one dial in about 30 seconds and node"


def table() -> str:
    """The distribution as docs/edgehub.md shows it: `python -m tests.modules.edgehub.test_reconnects`."""
    lines = [
        "| cloud away for | first back | half of them | 95 % | last | most in 100 ms |",
        "|---|---|---|---|---|---|",
    ]
    for down in (0.0, 2.0, 10.0, 60.0, 600.0):
        back = sorted(reconnects(down)[0])
        busiest = max(Counter(int(at * 10) for at in back).values())
        facts = [back[0], back[NODES // 2], back[NODES * 95 // 100], back[-1]]
        lines.append(f"| {down:g} s | " + " | ".join(f"{at:.2f} s" for at in facts) + f" | {busiest} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    sys.stdout.write(table() + "\n")
