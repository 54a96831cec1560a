"""What a fuzz target is, and the table of all of them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

Run = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder. `run` takes any bytes; whatever it raises but `raises` is a fault of ours."""

    name: str
    what: str
    "One line, for the list."
    run: Run
    raises: tuple[type[Exception], ...]
    "How the decoder says no."
    seeds: Callable[[], Iterable[bytes]]
    "Inputs to begin with."
    tokens: tuple[bytes, ...]
    "Words that a mutation may put in."

    def check(self, data: bytes) -> None:
        """Decode `data`. Raises only what the decoder must not."""
        try:
            self.run(data)
        except self.raises:
            pass


TARGETS: Final[dict[str, Target]] = {}


def target(
    seeds: Callable[[], Iterable[bytes]], *raises: type[Exception], tokens: tuple[bytes, ...] = ()
) -> Callable[[Run], Run]:
    """Register a function as a target, under its name and with the first line of its docstring."""

    def register(run: Run) -> Run:
        what = (run.__doc__ or "").partition("\n")[0]
        TARGETS[run.__name__] = Target(run.__name__, what, run, raises, seeds, tokens)
        return run

    return register


def pieces(data: bytes) -> Iterator[bytes]:
    """`data` cut somewhere, as a network may cut it; always alike for the same data."""
    chance = random.Random(zlib.crc32(data))
    at = 0
    while at < len(data):
        size = chance.choice((1, 2, 7, 64, len(data)))
        yield data[at : at + size]
        at += size
