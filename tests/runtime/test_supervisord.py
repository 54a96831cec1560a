"""runtime.supervisord: our reading of supervisord's XML-RPC, against Python's own writing of it."""

import socket
import threading
import xmlrpc.client
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.supervisord import Program, Supervisor, SupervisorError, SupervisorFault, decode_answer

_text = st.text(st.characters(exclude_categories=["C"]), max_size=20)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31 - 1) | _text | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=10,
)


def answer(value: Any) -> bytes:
    return xmlrpc.client.dumps((value,), methodresponse=True, allow_none=True).encode()


@settings(deadline=None)
@given(_values)
def test_what_xml_rpc_writes_is_read_as_the_same_value(value: Any) -> None:
    assert decode_answer(answer(value)) == value


def test_a_value_without_a_type_is_a_string() -> None:
    body = b"<methodResponse><params><param><value>plain</value></param></params></methodResponse>"
    assert decode_answer(body) == "plain"


def test_a_fault_carries_code_and_text() -> None:
    body = xmlrpc.client.dumps(xmlrpc.client.Fault(10, "BAD_NAME: x"), methodresponse=True).encode()
    with pytest.raises(SupervisorFault) as fault:
        decode_answer(body)
    assert (fault.value.code, fault.value.text) == (10, "BAD_NAME: x")


@pytest.mark.parametrize("body", [b"", b"<html>", b"<a/>", b"<i4>x</i4>", b"<struct><name>a</name></struct>"])
def test_anything_else_is_one_error(body: bytes) -> None:
    with pytest.raises(SupervisorError):
        decode_answer(body)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_the_decoder_is_total(body: bytes) -> None:
    with pytest.raises(SupervisorError):
        decode_answer(body)


class FakeServer:
    """Answers one connection with given bytes and keeps the request."""

    def __init__(self, path: Path, reply: bytes) -> None:
        self.request = b""
        self._reply = reply
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            while b"</methodCall>" not in self.request:
                self.request += connection.recv(65_536)
            connection.sendall(self._reply)

    def close(self) -> None:
        self._thread.join()
        self._listener.close()


def call(path: Path, reply: bytes, method: str, *parameters: str | bool) -> tuple[Any, bytes]:
    server = FakeServer(path, reply)
    try:
        return Supervisor(path).call(method, *parameters), server.request
    finally:
        server.close()


def http(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.0 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def test_a_call_is_xml_rpc_that_python_reads_too(tmp_path: Path) -> None:
    value, request = call(tmp_path / "s", http(answer(True)), "supervisor.startProcess", "a<&>b", False)
    assert value is True
    body = request.partition(b"\r\n\r\n")[2]
    assert xmlrpc.client.loads(body) == (("a<&>b", False), "supervisor.startProcess")


def test_an_http_error_is_told(tmp_path: Path) -> None:
    with pytest.raises(SupervisorError, match="401 Unauthorized"):
        call(tmp_path / "s", http(b"", b"401 Unauthorized"), "supervisor.getPID")


def test_a_supervisord_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(SupervisorError, match="No such file"):
        Supervisor(tmp_path / "none").programs()


def test_programs_are_named_by_group_only_where_it_differs(tmp_path: Path) -> None:
    info = {
        "name": "edgehub",
        "group": "edgehub",
        "statename": "RUNNING",
        "pid": 7,
        "exitstatus": 0,
        "now": 110,
        "start": 100,
        "spawnerr": "",
        "description": "pid 7, uptime 0:00:10",
    }
    other = {**info, "name": "a", "group": "g", "pid": 0, "statename": "FATAL", "spawnerr": "no such file"}
    server = FakeServer(tmp_path / "s", http(answer([info, other])))
    try:
        programs = Supervisor(tmp_path / "s").programs()
    finally:
        server.close()
    assert programs == [
        Program("edgehub", "RUNNING", 7, 0, 10, "pid 7, uptime 0:00:10"),
        Program("g:a", "FATAL", 0, 0, 0, "no such file"),
    ]
