from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsim.wire import CloudMessage, Header, Route, Undecodable, decode, decode_as_go, encode, seen_in_cloud
from tests.cloudsim.rawnode import vectors

GOLDEN = [vector for vector in vectors("message_json") if isinstance(vector["decoded"], dict)]


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda vector: vector["name"])
def test_golden_messages_decode_both_ways(vector: dict[str, Any]) -> None:
    raw = vector["raw_text"].encode()
    expected = msgspec.convert(vector["decoded"]["message"], CloudMessage)
    assert decode(raw) == expected
    assert decode_as_go(raw) == expected


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda vector: vector["name"])
def test_golden_messages_encode_to_the_same_bytes(vector: dict[str, Any]) -> None:
    message = msgspec.convert(vector["decoded"]["message"], CloudMessage)
    expected = vector["raw_text"].encode()
    # Go writes 1e21 with its plus sign; the number is the same.
    assert encode(message).replace(b"1e21", b"1e+21") == expected


def test_bytes_become_base64() -> None:
    raw = encode(CloudMessage(content=b"\x00\x01\xfe\xff"))
    assert json.loads(raw)["content"] == base64.b64encode(b"\x00\x01\xfe\xff").decode()


def test_html_and_line_separators_are_escaped_and_other_unicode_is_not() -> None:
    raw = encode(CloudMessage(content="<b>&\u2028\u2029é你😀"))
    assert '"content":"\\u003cb\\u003e\\u0026\\u2028\\u2029é你😀"}\n'.encode() in raw


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"   ",
        b"{",
        b"hello",
        b"[1]",
        b"1",
        b'"x"',
        b"true",
        b'{"header":"x"}',
        b'{"header":[]}',
        b'{"route":1}',
        b'{"header":{"timestamp":"1"}}',
        b'{"header":{"timestamp":1.0}}',
        b'{"header":{"timestamp":1e3}}',
        b'{"header":{"timestamp":true}}',
        b'{"header":{"timestamp":9223372036854775808}}',
        b'{"header":{"msg_id":1}}',
        b'{"header":{"sync":"true"}}',
        b'{"route":{"source":{}}}',
        b'{"content":NaN}',
        b'{"content":Infinity}',
        b'{"content":-Infinity}',
        b'{"content":1e400}',
        b'{"content":{"deep":[-1e400]}}',
        b'{"content":01}',
        b'{"content":"a\nb"}',
        b'{"content":"\\x"}',
        b'{"content":[1,]}',
        b"{'content':1}",
        b"\xef\xbb\xbf{}",
        b'{"content":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_what_go_cannot_decode_is_undecodable(text: bytes) -> None:
    with pytest.raises(Undecodable):
        decode(text)
    with pytest.raises(Undecodable):
        decode_as_go(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"null", CloudMessage()),
        (b"{}", CloudMessage()),
        (b' \r\n\t{"content":1} trailing !!', CloudMessage(content=1)),
        (b'{"content":1}{"content":2}', CloudMessage(content=1)),
        (b'{"header":null,"route":null}', CloudMessage()),
        (b'{"header":{"msg_id":null,"timestamp":null}}', CloudMessage()),
        (
            b'{"HEADER":{"Msg_ID":"a"},"rOUTE":{"GROUP":"g"},"Content":[1]}',
            CloudMessage(Header("a"), Route("", "", "g"), [1]),
        ),
        (b'{"header":{"msg_id":"a","extra":{}},"more":[1]}', CloudMessage(Header("a"))),
        (b'{"header":{"msg_id":"a"},"header":{"type":"t"}}', None),
        (b'{"content":"a\xff\xfeb"}', CloudMessage(content="a\ufffd\ufffdb")),
        (b'{"content":"\xe4\xbd"}', CloudMessage(content="\ufffd\ufffd")),
        (b'{"content":"a\\ud800b"}', CloudMessage(content="a\ufffdb")),
        (b'{"content":{"\\udc00":"\\ud83d\\ude00"}}', CloudMessage(content={"\ufffd": "😀"})),
        (b'{"header":{"msg_id":"\\ud800"}}', CloudMessage(Header("\ufffd"))),
        (b'{"header":{"timestamp":-9223372036854775808}}', CloudMessage(Header(timestamp=-(2**63)))),
    ],
)
def test_what_go_tolerates_is_tolerated(text: bytes, expected: CloudMessage | None) -> None:
    if expected is not None:
        assert decode(text) == expected
    assert decode_as_go(text) == (expected or CloudMessage(Header("a", type="t")))


def test_content_numbers_are_float64_inside_the_cloud() -> None:
    assert seen_in_cloud({"i": [9007199254740993, 7, 1.5, True]}) == {"i": [9007199254740992, 7, 1.5, True]}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
MESSAGES = st.builds(
    CloudMessage,
    st.builds(Header, st.text(), st.text(), st.integers(-(2**63), 2**63 - 1), st.text(), st.booleans(), st.text()),
    st.builds(Route, st.text(), st.text(), st.text(), st.text(), st.text()),
    JSON,
)


@given(MESSAGES)
def test_what_is_encoded_decodes_to_the_same_in_both_ways(message: CloudMessage) -> None:
    raw = encode(message)
    assert decode(raw) == message
    assert decode_as_go(raw) == message


@given(MESSAGES, st.data())
def test_a_damaged_message_is_decoded_or_undecodable_and_both_ways_agree(
    message: CloudMessage, data: st.DataObject
) -> None:
    raw = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        expected = decode_as_go(bytes(raw))
    except Undecodable:
        with pytest.raises(Undecodable):
            decode(bytes(raw))
    else:
        found = decode(bytes(raw))
        # A repeated header or route: Go merges them, the fast way takes the last. Nobody sends that.
        if bytes(raw).lower().count(b'"header"') == 1 and bytes(raw).lower().count(b'"route"') == 1:
            assert found == expected


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_undecodable(raw: bytes) -> None:
    try:
        decode(raw)
    except Undecodable:
        pass


@pytest.mark.parametrize("before", [b"", b'"unknown":1,'])
def test_content_nested_nearly_as_deeply_as_python_allows_is_read(before: bytes) -> None:
    nested = b'[{"a":' * 425 + b"9007199254740993" + b"}]" * 425
    seen = seen_in_cloud(decode(b"{" + before + b'"content":' + nested + b"}").content)
    for _ in range(425):
        seen = seen[0]["a"]
    assert seen == 9007199254740992


def test_content_nested_too_deeply_is_refused() -> None:
    with pytest.raises(Undecodable):
        decode(b'{"unknown":1,"content":' + b"[" * 950 + b"]" * 950 + b"}")
