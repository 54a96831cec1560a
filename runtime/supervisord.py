"""A small client of supervisord: XML-RPC over its unix socket.

Written out because `xmlrpc.client` and `http.client` cost 6 MiB in a process, and the watchdog is to be
small. Only what supervisord's API uses is understood (supervisord.org, XML-RPC API).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.parsers import expat

from runtime.errors import EdgezmqError

ALREADY_STARTED: Final = 60
NOT_RUNNING: Final = 70
BAD_NAME: Final = 10
SHUTDOWN_STATE: Final = 6
"Codes of supervisor.xmlrpc.Faults."

_TIMEOUT_SECONDS: Final = 5.0
"supervisord answers from its main loop, within milliseconds; it blocks only while the machine does."

_MAX_ANSWER_BYTES: Final = 4 * 2**20


class SupervisorError(EdgezmqError):
    """supervisord did not answer, or not in its protocol."""


class SupervisorFault(SupervisorError):
    """supervisord refused a call: `code` (supervisor.xmlrpc.Faults) and `text`."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code
        self.text = text


@dataclass(frozen=True, slots=True)
class Program:
    """One supervised program, as supervisord sees it."""

    name: str
    """`group:name`, or the name alone where both are the same."""
    state: str
    """STOPPED, STARTING, RUNNING, BACKOFF, STOPPING, EXITED, FATAL or UNKNOWN."""
    pid: int
    """0 when there is no process."""
    exit_status: int
    """Of the last process that ended; -1 after a signal."""
    seconds_up: int
    """Since the process was started, by supervisord's clock; 0 when there is none."""
    detail: str
    """In words: since when, or what went wrong."""


class Supervisor:
    """Calls to the supervisord that listens on `path`. One connection per call; blocking, at most 5 s.

    Every call also wakes supervisord's loop, which by itself looks once a second (runtime.supervise sees to more).
    Calls raise SupervisorError, and SupervisorFault when refused.
    """

    def __init__(self, path: Path, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._path = str(path)
        self._timeout_seconds = timeout_seconds

    def programs(self) -> list[Program]:
        """All programs, in the order of the configuration."""
        return [_program(info) for info in self.call("supervisor.getAllProcessInfo")]

    def start(self, name: str) -> None:
        """Start a program; does not wait until it runs. Does nothing to one that is started already."""
        try:
            self.call("supervisor.startProcess", name, False)
        except SupervisorFault as fault:
            if fault.code != ALREADY_STARTED:
                raise

    def stop(self, name: str, *, wait: bool = True) -> None:
        """Stop a program; does nothing to one that does not run."""
        try:
            self.call("supervisor.stopProcess", name, wait)
        except SupervisorFault as fault:
            if fault.code != NOT_RUNNING:
                raise

    def signal(self, name: str, signal: str) -> None:
        """Send a signal, such as ABRT, to the process of a program; does nothing when there is none."""
        try:
            self.call("supervisor.signalProcess", name, signal)
        except SupervisorFault as fault:
            if fault.code != NOT_RUNNING:
                raise

    def reread(self) -> tuple[list[str], list[str], list[str]]:
        """Read the configuration again: groups added, changed and removed. Acts on none of them."""
        [[added, changed, removed]] = self.call("supervisor.reloadConfig")
        return added, changed, removed

    def add(self, group: str) -> None:
        self.call("supervisor.addProcessGroup", group)

    def remove(self, group: str) -> None:
        """Forget a stopped group."""
        self.call("supervisor.removeProcessGroup", group)

    def pid(self) -> int:
        return int(self.call("supervisor.getPID"))

    def state(self) -> str:
        """RUNNING, RESTARTING, SHUTDOWN or FATAL."""
        return str(self.call("supervisor.getState")["statename"])

    def shutdown(self) -> None:
        """Ask for a clean end of supervisord and everything under it; returns before it is done."""
        self.call("supervisor.shutdown")

    def call(self, method: str, *parameters: str | bool) -> Any:
        body = _encode_call(method, parameters)
        request = (b"POST /RPC2 HTTP/1.0\r\nContent-Type: text/xml\r\nContent-Length: %d\r\n\r\n" % len(body)) + body
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._timeout_seconds)
                connection.connect(self._path)
                connection.sendall(request)
                answer = _read_all(connection)
        except OSError as fault:
            raise SupervisorError(f"supervisord at {self._path}: {fault.strerror or fault}") from fault
        return decode_answer(_http_body(answer))


def _program(info: dict[str, Any]) -> Program:
    name, group = info["name"], info["group"]
    pid = info["pid"]
    return Program(
        name=name if name == group else f"{group}:{name}",
        state=info["statename"],
        pid=pid,
        exit_status=info["exitstatus"],
        seconds_up=max(0, info["now"] - info["start"]) if pid else 0,
        detail=info.get("spawnerr") or info.get("description") or "",
    )


def _encode_call(method: str, parameters: tuple[str | bool, ...]) -> bytes:
    values = "".join(
        f"<param><value><boolean>{value:d}</boolean></value></param>"
        if isinstance(value, bool)
        else f"<param><value><string>{_escape(value)}</string></value></param>"
        for value in parameters
    )
    call = f"<methodCall><methodName>{method}</methodName><params>{values}</params></methodCall>"
    return f"<?xml version='1.0'?>{call}".encode()


def _escape(text: str) -> str:
    # xml.sax.saxutils does the same, and brings urllib along.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _read_all(connection: socket.socket) -> bytes:
    answer = bytearray()
    while piece := connection.recv(65_536):
        answer += piece
        if len(answer) > _MAX_ANSWER_BYTES:
            raise SupervisorError(f"supervisord's answer has more than {_MAX_ANSWER_BYTES} bytes")
        # supervisord keeps some connections open after the answer, whatever the request says.
        head, found, body = bytes(answer).partition(b"\r\n\r\n")
        if found and (length := _content_length(head)) is not None and len(body) >= length:
            break
    return bytes(answer)


def _content_length(head: bytes) -> int | None:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return int(value)
    return None


def _http_body(answer: bytes) -> bytes:
    head, found, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].split(b" ")
    if not found or len(status) < 2 or status[1] != b"200":
        raise SupervisorError(f"supervisord answered {head[:80].decode('ascii', 'replace')!r}, expected 200 OK")
    return body


class _Decoder:
    """XML-RPC values out of expat's events: a stack of what is open."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.is_fault = False
        self._marks: list[int] = []
        self._text: list[str] = []
        self._bare = False

    def start(self, tag: str, _: dict[str, str]) -> None:
        self._text.clear()
        if tag in ("struct", "array"):
            self._marks.append(len(self.values))
        elif tag == "fault":
            self.is_fault = True
        # A <value> without a type inside is a string (XML-RPC specification, scalars).
        self._bare = tag == "value"

    def data(self, text: str) -> None:
        self._text.append(text)

    def end(self, tag: str) -> None:
        text = "".join(self._text)
        if tag in ("int", "i4"):
            self.values.append(int(text))
        elif tag == "boolean":
            self.values.append(text.strip() == "1")
        elif tag in ("string", "name") or (tag == "value" and self._bare):
            self.values.append(text)
        elif tag == "double":
            self.values.append(float(text))
        elif tag == "nil":
            self.values.append(None)
        elif tag == "struct":
            items = self._close()
            self.values.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif tag == "array":
            self.values.append(self._close())
        if tag != "value":
            self._text.clear()
        self._bare = False

    def _close(self) -> list[Any]:
        mark = self._marks.pop()
        items = self.values[mark:]
        del self.values[mark:]
        return items


def decode_answer(body: bytes) -> Any:
    """The value in an XML-RPC answer; raises SupervisorFault for a fault, SupervisorError for anything else."""
    decoder = _Decoder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = decoder.start
    parser.EndElementHandler = decoder.end
    parser.CharacterDataHandler = decoder.data
    try:
        parser.Parse(body, True)
        [value] = decoder.values
    except (expat.ExpatError, ValueError, IndexError) as fault:
        raise SupervisorError(f"supervisord's answer is no XML-RPC: {fault}") from fault
    if decoder.is_fault:
        raise SupervisorFault(int(value["faultCode"]), str(value["faultString"]))
    return value
