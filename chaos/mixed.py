"""The Go and the C module of a chaos node: what they are called and what they send. A core.

They are each other's fellows: both send to the other and to the cloud, and the Go module asks the C module. The
messages they count carry tokens (chaos.places.TOKEN) that begin with the flow: `k.go`, `m.c`, ….
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from chaos.account import Flow

GO: Final = "go-module"
C: Final = "c-module"
MODULES: Final = (GO, C)
FELLOWS: Final[Mapping[str, str]] = {GO: C, C: GO}
WORDS: Final[Mapping[str, str]] = {GO: "go", C: "c"}
"The second word of the tokens of a module."

FLOWS: Final[Mapping[str, str]] = {
    "m.go": "go_uploads",
    "m.c": "c_uploads",
    "k.go": "go_to_c",
    "k.c": "c_to_go",
    "q.go": "go_asks_c",
}
"The beginning of a token, and what the flow is called in the results."


def flow_of(token: str) -> str:
    """The beginning of a token, which names the flow."""
    return ".".join(token.split(".", 2)[:2])


def sender_of(token: str) -> str:
    return next(name for name, word in WORDS.items() if token.split(".", 2)[1] == word)


def way_in(name: str) -> str:
    """The place of Load.first where a message to the module has arrived."""
    return name


def way_out(name: str) -> str:
    """The place of Load.first where a message from the module to the cloud has arrived."""
    return f"{name} to cloud"


@dataclass(slots=True)
class Exchange:
    """What became of the messages of both in one cell, by the lines of their records."""

    flows: dict[str, Flow] = field(default_factory=lambda: {beginning: Flow() for beginning in FLOWS})
    asking: set[str] = field(default_factory=set)
    "Questions of a living process that have no answer yet."

    def sent(self, words: list[str]) -> str | None:
        """A line of a sender's record; the reason where it tells of a refusal.

        `G word number` a process begins; `S token seconds` it is about to send; `R` or `X:reason` is the receipt;
        `A` the answer to a question has come, `T` none in its time.
        """
        if words[0] == "G":  # what the process before had asked, nobody waits for any more
            self.asking = {token for token in self.asking if token.split(".", 2)[1] != words[1]}
            return None
        token, at = words[1], float(words[2])
        flow = self.flows[flow_of(token)]
        if words[0] == "S":
            flow.send(token, at)
            if token.startswith("q."):
                self.asking.add(token)
            return None
        self.asking.discard(token)
        if words[0].startswith("X:"):
            return words[0].removeprefix("X:")
        if token in flow.sent_at:  # else of an earlier cell
            # A question counts as accepted when its asker lived to see what became of it: without an answer it is lost.
            flow.accept(token, at)
            if words[0] == "A":
                flow.arrive(token, at)
        return None

    def has_arrived(self, token: str, at: float, *, message_id: str = "", is_marked: bool = False) -> bool:
        """Enter the arrival; False for a message of an earlier cell."""
        flow = self.flows.get(flow_of(token))
        if flow is None or token not in flow.sent_at:
            return False
        flow.arrive(token, at, message_id=message_id, is_marked=is_marked)
        return True

    def sent_at(self, token: str) -> float:
        return self.flows[flow_of(token)].sent_at[token]

    def is_settled(self) -> bool:
        """Nothing that was accepted is on its way, and every question of a living process has its answer."""
        return not self.asking and not any(flow.missing() for flow in self.flows.values())
