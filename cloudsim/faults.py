"""Faults on request: what they are called and what they take."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal[
    "drop",
    "half-open",
    "stall",
    "throttle",
    "delay",
    "loss",
    "slow-pong",
    "close-mid-frame",
    "drop-at",
    "reject",
    "race",
    "tls",
    "refuse",
    "restart",
    "clear",
]

Wrong = Literal["expired", "not-yet-valid", "wrong-ca", "wrong-host", "old-version"]
"What a `tls` fault makes wrong."

LASTING: frozenset[Kind] = frozenset({"throttle", "delay", "loss", "slow-pong", "reject", "tls"})
"These also meet connections made later, until they are cleared."


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One fault. Fields that a kind does not name are ignored by it.

    drop             TCP and TLS end, without a websocket close frame
    half-open        nothing is read or written any more, the socket stays (`seconds`, or for good)
    stall            nothing is read any more; writing goes on (`seconds`, or until cleared)
    throttle         `bytes_per_second` in each direction
    delay            `seconds` of round trip time, half of it in each direction
    loss             QUIC: `rate` (0 to 1) of the datagrams are lost, in each direction
    slow-pong        each pong goes out `seconds` late; over QUIC, what the hub answers itself
    close-mid-frame  the next message to the node ends half-way, with the connection
    drop-at          the `count`-th message from now on ends the connection, handed on first if `dispatched`
    race             the next connection that replaces one is dropped with it (`count` of them)
    tls              connections made from now on meet a server that is `wrong`: expired, not-yet-valid, wrong-ca,
                     wrong-host (its certificate), old-version (TLS 1.1 at most; not over QUIC)
    reject           connections made from now on get no session (`count` of them, or all until cleared)
    refuse           no connection is accepted (`seconds`, or until cleared); the present ones stay
    restart          the hub ends all connections and is away for `seconds`
    clear            ends every lasting fault, stall and half-open state
    """

    fault: Kind
    node: str = ""
    "Empty: all nodes."
    seconds: float | None = None
    bytes_per_second: float | None = None
    rate: float | None = None
    wrong: Wrong | None = None
    count: int | None = None
    dispatched: bool = False

    def __post_init__(self) -> None:
        needs_seconds = self.fault in ("delay", "slow-pong")
        if needs_seconds and self.seconds is None:
            raise ValueError(f"{self.fault} needs `seconds`")
        if self.seconds is not None and not 0 <= self.seconds <= 86400:
            raise ValueError(f"`seconds` is {self.seconds}, expected 0 to 86400")
        if self.fault == "throttle" and not (self.bytes_per_second and self.bytes_per_second >= 1):
            raise ValueError("throttle needs `bytes_per_second` of at least 1")
        if self.fault == "tls" and (self.wrong is None or self.node):
            raise ValueError("tls needs `wrong`, and no `node`: nobody has a name yet when TLS begins")
        if self.fault == "loss" and self.rate is None:
            raise ValueError("loss needs `rate`")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"`rate` is {self.rate}, expected 0 to 1")
        if self.count is not None and self.count < 1:
            raise ValueError(f"`count` is {self.count}, expected at least 1")
        if self.fault == "drop-at" and self.count is None:
            raise ValueError("drop-at needs `count`")

    def concerns(self, node: str) -> bool:
        return not self.node or self.node == node
