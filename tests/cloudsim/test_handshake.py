from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsim.handshake import BadRequest, answer, parse_request
from tests.cloudsim.rawnode import upgrade_text, vectors

DATE = "Mon, 23 Nov 2026 17:04:42 GMT"
BEHAVIOUR: dict[str, Any] = next(
    vector["decoded"] for vector in vectors("measured_behaviour") if vector["name"] == "session_and_ordering"
)


def answered(text: str) -> str:
    return answer(parse_request(text.encode("latin-1").removesuffix(b"\r\n\r\n")), DATE).data.decode()


def test_the_recorded_upgrade_gets_the_recorded_response() -> None:
    request, response = vectors("ws_handshake")
    assert answered(request["raw_text"]) == response["raw_text"]


def test_a_plain_get_gets_the_measured_answer() -> None:
    assert answered("GET / HTTP/1.1\r\nHost: h\r\n\r\n") == BEHAVIOUR["plain_get"]


def test_a_path_with_two_slashes_is_redirected() -> None:
    text = answered(upgrade_text({}, "//n/events"))
    assert text.startswith(BEHAVIOUR["hs_path_double_slash"][0] + "\r\n")
    assert "\r\nLocation: /n/events\r\n" in text


@pytest.mark.parametrize("path", ["/", "/x", "/p/n/events", "/p/n/events/", "/a?b=c//d"])
def test_every_other_path_is_upgraded(path: str) -> None:
    assert answered(upgrade_text({}, path)).startswith("HTTP/1.1 101 ")


def test_a_foreign_origin_is_refused_and_the_own_one_is_not() -> None:
    assert answered(upgrade_text({"Origin": "https://evil.example"})).startswith("HTTP/1.1 403 Forbidden\r\n")
    assert answered(upgrade_text({"Origin": "https://127.0.0.1:10000"})).startswith("HTTP/1.1 101 ")


def test_extensions_and_subprotocols_are_never_chosen() -> None:
    offered = {"Sec-WebSocket-Extensions": "permessage-deflate", "Sec-WebSocket-Protocol": "chat"}
    assert answered(upgrade_text(offered)) == answered(upgrade_text({}))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Connection": "keep-alive, Upgrade"}, 101),
        ({"Connection": "close"}, 400),
        ({"Upgrade": "h2c"}, 400),
        ({"Sec-WebSocket-Version": "8"}, 400),
        ({"Sec-WebSocket-Key": ""}, 400),
    ],
)
def test_the_headers_of_the_upgrade_are_checked(headers: dict[str, str], status: int) -> None:
    assert answered(upgrade_text(headers)).startswith(f"HTTP/1.1 {status} ")


def test_another_method_is_not_allowed() -> None:
    assert answered(upgrade_text({}).replace("GET", "POST", 1)).startswith("HTTP/1.1 405 ")


def test_the_first_of_repeated_headers_counts_in_any_case() -> None:
    request = parse_request(b"GET / HTTP/1.1\r\nHost: h\r\nCONNECTIONUSE: msg\r\nconnectionuse: str")
    assert request.header("connectionuse") == "msg"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"GET /",
        b"GET / HTTP/2.0",
        b"GET / HTTP/1.1\r\nno colon",
        b"GET / HTTP/1.1\r\n: x",
        b"GET / HTTP/1.1\r\nx: y",
    ],
)
def test_what_is_no_request_is_named(head: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_request(head)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_bad_one(head: bytes) -> None:
    try:
        answer(parse_request(head), DATE)
    except BadRequest:
        pass


@given(st.text(st.characters(codec="latin-1", exclude_characters=" \r\n"), min_size=1, max_size=30))
def test_any_target_is_answered(target: str) -> None:
    assert answer(parse_request(f"GET {target} HTTP/1.1\r\nHost: h".encode("latin-1")), DATE).data
