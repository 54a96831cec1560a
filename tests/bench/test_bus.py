from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from bench import bus


class Noise:
    """Stands in for OthersCpu: says in turn how much others used."""

    percents: Iterator[float]

    def __init__(self, living: Iterable[int]) -> None:
        pass

    def __enter__(self) -> Noise:
        return self

    def __exit__(self, *_: object) -> None:
        self.percent = next(self.percents)


@pytest.mark.parametrize(
    ("noise", "quick", "chosen"),
    [
        ([3.0], False, ("first", 3.0)),
        ([40.0, 2.0], False, ("second", 2.0)),
        ([40.0, 20.0, 30.0], False, ("second", 20.0)),
        ([40.0], True, ("first", 40.0)),
    ],
)
def test_the_quietest_of_at_most_three_runs_counts(
    monkeypatch: pytest.MonkeyPatch, noise: list[float], quick: bool, chosen: tuple[str, float]
) -> None:
    monkeypatch.setattr(Noise, "percents", iter(noise), raising=False)
    monkeypatch.setattr(bus, "OthersCpu", Noise)
    results = iter(["first", "second", "third"])
    assert bus.quietest(lambda: next(results), quick) == chosen
