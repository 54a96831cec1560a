"""The proxy's address, the request for a tunnel, and every answer there can be, as bytes."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from runtime.proxy import MAX_HEAD_BYTES, ConnectAnswer, Proxy, ProxyRefused

KEY = "runtime.edgehub.proxy"
PLAIN = Proxy("proxy.example", 3128)
KNOWN = Proxy("proxy.example", 3128, user="node", password="s3cret")


@pytest.mark.parametrize(
    ("text", "proxy"),
    [
        ("http://proxy.example:3128", PLAIN),
        ("http://proxy.example:3128/", PLAIN),
        ("http://node:s3cret@proxy.example:3128", KNOWN),
        ("http://node@proxy.example:3128", Proxy("proxy.example", 3128, user="node")),
        ("http://a%40b:p%3A%2Fw@proxy.example:1", Proxy("proxy.example", 1, user="a@b", password="p:/w")),
        ("https://[2001:db8::1]:8443", Proxy("2001:db8::1", 8443, is_tls=True)),
    ],
)
def test_a_url_is_read(text: str, proxy: Proxy) -> None:
    assert Proxy.parse(text, KEY) == proxy


@pytest.mark.parametrize(
    "text",
    [
        "",
        "proxy.example:3128",
        "http://proxy.example",
        "http://:3128",
        "http://proxy.example:0",
        "http://proxy.example:99999",
        "http://proxy.example:many",
        "http://[::1:3128",
        "socks5://proxy.example:1080",
        "http://proxy.example:3128/path",
        "http://proxy.example:3128?query",
        "http://:pw@proxy.example:3128",
        "http://a%3Ab:pw@proxy.example:3128",
        "http://%ff:pw@proxy.example:3128",
        "http://bad host:3128",
    ],
)
def test_a_wrong_url_names_its_key_and_the_rule(text: str) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.edgehub\.proxy: .*HOST:PORT"):
        Proxy.parse(text, KEY)


@pytest.mark.parametrize(
    "text", ["http://node:s3cret@proxy.example", "node:s3cret@proxy.example:1", "ftp://a:s3cret@b@c:1"]
)
def test_no_message_holds_the_password(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Proxy.parse(text, KEY)
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(KNOWN)
    assert "s3cret" not in str(KNOWN)
    assert "node" not in str(KNOWN)


def test_the_request_names_host_and_port_and_who_we_are() -> None:
    assert PLAIN.request("cloud.example", 10000) == (
        b"CONNECT cloud.example:10000 HTTP/1.1\r\nHost: cloud.example:10000\r\n\r\n"
    )
    assert PLAIN.request("2001:db8::2", 10000).startswith(b"CONNECT [2001:db8::2]:10000 HTTP/1.1\r\n")
    secret = base64.b64encode(b"node:s3cret")
    assert KNOWN.request("c", 1).endswith(b"\r\nProxy-Authorization: Basic " + secret + b"\r\n\r\n")
    assert Proxy("p", 1, user="node").with_password("s3cret").authorization() == KNOWN.authorization()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 Connection established\r\n\r\n",
        b"HTTP/1.0 200\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nVia: squid\r\nX: y\r\n\r\n",
        b"HTTP/1.1 200 OK\n\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 103\r\nLink: x\r\n\r\n" * 500 + b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_a_tunnel_opens_however_the_answer_is_cut(answer: bytes) -> None:
    assert ConnectAnswer(PLAIN).receive(answer)
    piecewise = ConnectAnswer(PLAIN)
    assert [piecewise.receive(answer[at : at + 1]) for at in range(len(answer))] == [False] * (len(answer) - 1) + [True]


@pytest.mark.parametrize(
    ("answer", "proxy", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", PLAIN, r"407 .*wants a user and a password"),
        (b"HTTP/1.1 407 Nope\r\n\r\n", KNOWN, r"407 Nope: it does not know user 'node', or the password is wrong"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\ngo away!!", PLAIN, r"403 Forbidden: .*not allow tunnels"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", PLAIN, r"502 Bad Gateway: it cannot reach CloudHub"),
        (b"HTTP/1.1 301 Moved\r\nLocation: /\r\n\r\n", PLAIN, r"301 Moved: is that an HTTP proxy"),
        (b"HTTP/1.1 400 \x1b[31mred\r\n\r\n", PLAIN, r"400 \[31mred: "),
        (b"HTTP/1.1 200 OK\r\n\r\n\x16\x03", PLAIN, r"something of its own into the tunnel"),
        (b"HTTP/1.1 666 Odd\r\n\r\n", PLAIN, r"no HTTP proxy"),
        (b"HTTP/2 200\r\n\r\n", PLAIN, r"no HTTP proxy"),
        (b"SSH-2.0-OpenSSH_9\r\n", PLAIN, r"no HTTP proxy: b'SSH-2\.0"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * MAX_HEAD_BYTES, PLAIN, r"headers without end"),
        (b"HTTP/1.1 200 OK" + b" " * MAX_HEAD_BYTES, PLAIN, r"headers without end"),
    ],
)
def test_any_other_answer_is_told_in_words(answer: bytes, proxy: Proxy, words: str) -> None:
    with pytest.raises(ProxyRefused, match=words) as caught:
        ConnectAnswer(proxy).receive(answer)
    assert str(caught.value).isprintable()
    assert "s3cret" not in str(caught.value)


def test_a_proxy_that_hangs_up_is_told() -> None:
    answer = ConnectAnswer(PLAIN)
    answer.receive(b"HTTP/1.1 2")
    assert "ended the connection after b'HTTP/1.1 2'" in str(answer.end())
    assert "instead of opening a tunnel" in str(ConnectAnswer(PLAIN).end())


@given(st.lists(st.binary(max_size=200)), st.sampled_from([b"", b"HTTP/1.1 200 ", b"HTTP/1.1 100 \r\n\r\n"]))
def test_any_bytes_open_a_tunnel_are_refused_or_wait_for_more(pieces: list[bytes], begin: bytes) -> None:
    answer = ConnectAnswer(KNOWN)
    try:
        for piece in [begin, *pieces]:
            if answer.receive(piece):
                return
    except ProxyRefused:
        pass


@given(st.text())
def test_any_text_is_a_proxy_or_a_config_error(text: str) -> None:
    try:
        proxy = Proxy.parse(text, KEY)
    except ConfigError:
        return
    assert b"\r" not in proxy.request("c", 1).removesuffix(b"\r\n\r\n").replace(b"\r\nHost: ", b"").replace(
        b"\r\nProxy-Authorization: ", b""
    )
