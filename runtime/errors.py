"""Every error that edgezmq raises on purpose.

Two branches matter. A *peer's* fault (bad frame, bad JSON) becomes an answer to that peer and the
process serves on; *our caller's* fault (a wrong argument, a setting) is raised to the caller.

    EdgezmqError
    +-- ConfigError               an operator's setting: names key, value, rule
    +-- ProtocolError             the peer broke EMP/1
    |   +-- MalformedFrame        code (an EMP refusal code) and text
    +-- MalformedMessage          bytes from the cloud or a module that are no message
    +-- UsageError                the SDK was called wrongly
    |   +-- InvalidName
    |   +-- InvalidMessage        content that its kind does not allow
    |   +-- MessageTooLarge       size_bytes, limit_bytes
    +-- NotHandled                a message is not known to have been handled
    |   +-- Refused               reason (an EMP refusal reason), member
    |   +-- RequestTimeout        the reply did not come in time
    |   +-- Congested             no room in the window within the time a handler may wait
    +-- Fenced                    a newer incarnation of this module has taken over
    +-- NameTaken                 a living module has this name
    +-- HelloRefused              the broker does not let this module in: code, text
    +-- AlreadyRunning            another process holds this name's lock: path, pid
    +-- NotEnrolled               no certificate came of it: code (runtime/enrolment.py), text
"""

from __future__ import annotations

import reprlib

# A value out of a file may be as large as the file, and in YAML, where parts refer to parts, larger than any memory.
_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxstring = _repr.maxother = 200
_repr.maxlist = _repr.maxdict = _repr.maxset = 10


class EdgezmqError(Exception):
    """Base of all errors of this project."""


class ConfigError(EdgezmqError):
    """A setting is wrong. `key` is its dotted path, `value` what came, `rule` what was expected."""

    def __init__(self, key: str, value: object, rule: str) -> None:
        super().__init__(f"{key}: got {_repr.repr(value)}, expected {rule}")
        self.key = key
        self.value = value
        self.rule = rule


class ProtocolError(EdgezmqError):
    """The peer broke the bus protocol."""


class MalformedFrame(ProtocolError):
    """Frames that are not EMP/1. `code` is the refusal code to answer with."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class MalformedMessage(EdgezmqError):
    """Bytes that do not hold a message of the KubeEdge model."""


class UsageError(EdgezmqError):
    """The SDK was called in a way that its contract forbids."""


class InvalidName(UsageError):
    """Not a module or group name."""


class InvalidMessage(UsageError):
    """Content that its kind does not allow."""


class MessageTooLarge(UsageError):
    """The message is larger than the broker's limit; nothing was sent."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"message has {size_bytes} bytes, the limit is {limit_bytes}")
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class NotHandled(EdgezmqError):
    """The message is not known to have been handled (it may have been)."""


class Refused(NotHandled):
    """Settled with a refusal. `reason` is one of `runtime.emp.REASONS`.

    `member` names the group member that refused, where a group was addressed.
    """

    def __init__(self, reason: str, member: str | None = None) -> None:
        super().__init__(f"refused: {reason}" + (f" by {member}" if member else ""))
        self.reason = reason
        self.member = member


class RequestTimeout(NotHandled):
    """No reply within the time limit. A late reply is acknowledged, counted and dropped."""


class Congested(NotHandled):
    """The window stayed full for as long as a handler may wait; the message was not sent."""


class Fenced(EdgezmqError):
    """A newer incarnation of this module has taken over: this process has to exit."""


class NameTaken(EdgezmqError):
    """A living module holds this name."""


class HelloRefused(EdgezmqError):
    """The broker refused this module. `code` as in docs/emp.md, section Refusals."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


class AlreadyRunning(EdgezmqError):
    """Another process holds the lock of this name."""

    def __init__(self, path: str, pid: int | None) -> None:
        holder = f"pid {pid}" if pid else "another process"
        super().__init__(f"{path} is held by {holder}: it is already running")
        self.path = path
        self.pid = pid


class NotEnrolled(EdgezmqError):
    """The cloud gave no certificate, or it could not be kept. `code` is one of runtime/enrolment.py.

    The text names what came, what was expected and what to do. It never holds the token.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
