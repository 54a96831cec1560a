"""HTTP answers out of bytes, cut at every place, and hostile ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.http_answer import Answer, AnswerReader, MalformedAnswer, printable

PLAIN = b"HTTP/1.1 200 OK\r\nDate: now\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 401 No\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN


@pytest.mark.parametrize("data", [PLAIN, CHUNKED, CONTINUED], ids=["plain", "chunked", "continued"])
def test_an_answer_is_the_same_wherever_it_is_cut(data: bytes) -> None:
    for cut in range(len(data)):
        reader = AnswerReader()
        answer = reader.feed(data[:cut])
        if answer is None:
            answer = reader.feed(data[cut:])
        assert answer is not None
        assert answer.body == b"hello"
    assert answer.status == (401 if data is CHUNKED else 200)


def test_an_answer_without_length_ends_with_the_connection() -> None:
    reader = AnswerReader()
    assert reader.feed(b"HTTP/1.0 200 OK\r\n\r\nall of") is None
    assert reader.feed(b" it") is None
    assert reader.end() == Answer(200, "OK", {}, b"all of it")


@pytest.mark.parametrize(
    "data",
    [b"", b"HTTP/1.1 200 OK\r\n", PLAIN[:-1], CHUNKED[:-8], b"HTTP/1.1 100 Continue\r\n\r\n"],
)
def test_an_answer_that_ends_early_is_told(data: bytes) -> None:
    reader = AnswerReader()
    assert reader.feed(data) is None
    with pytest.raises(MalformedAnswer, match="ends early"):
        reader.end()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP: SSH"),
        (b"HTTP/2 200\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 20 OK\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "header line"),
        (b"HTTP/1.1 200 OK\r\nSpaced : x\r\n\r\n", "header line"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "Content-Length -5"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 65537\r\n\r\n", "more than 65536"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n", "more than 65536"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "Transfer-Encoding gzip"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n", "more than 65536"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "size xyz"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 300, "without a size"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd", "longer than its size"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"1;" + b"x" * 200 + b"\r\na\r\n") * 2000,
            "still no end",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(65537), "more than 65536"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 17000, "header of more than"),
    ],
)
def test_what_is_no_answer_is_refused_before_more_is_read(data: bytes, why: str) -> None:
    with pytest.raises(MalformedAnswer, match=why):
        AnswerReader().feed(data)


@given(
    st.lists(st.sampled_from([b"HTTP/1.1 ", b"200 OK\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n", b"5", b"\x00"]))
)
def test_any_bytes_are_an_answer_or_refused(parts: list[bytes]) -> None:
    reader = AnswerReader()
    try:
        for part in parts:
            if reader.feed(part) is not None:
                return
        reader.end()
    except MalformedAnswer:
        pass


@given(st.binary(max_size=400))
def test_any_bytes_at_all_are_an_answer_or_refused(data: bytes) -> None:
    reader = AnswerReader()
    try:
        if reader.feed(data) is None:
            reader.end()
    except MalformedAnswer:
        pass


def test_foreign_bytes_are_shown_as_one_line() -> None:
    assert printable(b"a\r\nb\x1b\xff") == "a..b.."
    assert printable(b"x" * 300) == "x" * 200 + "..."
