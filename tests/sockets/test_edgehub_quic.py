"""The QUIC adapter on loopback, against a server of our own that says what no CloudHub would."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from aioquic.quic import events

from cloudsim.certificates import Authority
from modules.edgehub.config import EdgeHubConfig, Endpoint
from modules.edgehub.link import Decoded, LinkEvent, LinkLost, LinkRefused, Passed, Received, SkippedMessage
from modules.edgehub.outbox import Class
from modules.edgehub.quic import CREDIT_BYTES, QuicLink
from runtime import viaduct
from runtime.message import BYTES, Message
from tests.support.aio import run, until
from tests.support.lossy import LossyLine
from tests.support.quic_hub import Node, QuicHub, polite, serving

SIGNAL, DATA = Class.SIGNAL, Class.DATA


def config(hub: QuicHub, **changes: Any) -> EdgeHubConfig:
    pair = hub.authority.node("edge-1")
    values: dict[str, Any] = {
        "node_name": "edge-1",
        "endpoints": (Endpoint("127.0.0.1", hub.port),),
        "ca_file": str(hub.authority.ca.certificate),
        "cert_file": str(pair.certificate),
        "key_file": str(pair.key),
        "handshake_seconds": 5.0,
        "max_frame_bytes": 2**20,
    }
    return EdgeHubConfig(**values | changes)


async def opened(hub: QuicHub, **changes: Any) -> QuicLink:
    made = config(hub, **changes)
    link = QuicLink(made)
    await link.open(made.endpoints[0])
    return link


async def receive(link: QuicLink, count: int) -> list[LinkEvent]:
    found: list[LinkEvent] = []
    while len(found) < count:
        found += await link.receive()
    return found


def message(number: int, content: bytes = b"x") -> Message:
    return Message(id=f"m{number}", group="user", operation="upload", resource="r", kind=BYTES, content=content)


def payloads(*messages: Message) -> list[bytes]:
    return [viaduct.encode_message(each) for each in messages]


def ids(messages: list[Message]) -> list[str]:
    return [each.id for each in messages if each.resource != "k8s/ca.crt"]


# --- opening ---------------------------------------------------------------------------------------


def test_the_control_stream_carries_the_headers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            (headers,) = hub.node.messages[0]
            assert (headers.operation, headers.resource) == ("header", "header")
            assert json.loads(headers.content) == {
                "Node_id": ["edge-1"],
                "Project_id": ["e632aba927ea4ac2b575ec1603d56f10"],
            }
            await link.close(is_polite=True)

    run(scenario())


def test_headers_that_are_refused_refuse_the_link(tmp_path: Path) -> None:
    def talk(node: Node, stream: int, said: Message) -> None:
        node.say(0, said.response(viaduct.NACK))

    async def scenario() -> None:
        async with serving(tmp_path, talk) as hub:
            with pytest.raises(LinkRefused, match="does not take our headers: b'nack'"):
                await opened(hub)

    run(scenario())


def test_headers_that_nobody_answers_end_in_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, lambda *_: None) as hub:
            with pytest.raises(LinkLost, match=r"no link within 0.5 s"):
                await opened(hub, handshake_seconds=0.5)

    run(scenario())


def test_the_servers_certificate_must_be_of_the_ca(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "one") as hub:
            other = Authority(tmp_path / "other")
            with pytest.raises(LinkRefused, match="CloudHub's certificate does not verify"):
                await opened(hub, ca_file=str(other.ca.certificate))

    run(scenario())


def test_the_servers_certificate_must_have_its_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, names=["cloud.example"]) as hub:
            with pytest.raises(LinkRefused, match=r"does not verify: .*127.0.0.1"):
                await opened(hub)
            link = await opened(hub, server_name="cloud.example")
            await link.close(is_polite=True)

    run(scenario())


def test_alpn_is_offered_where_it_is_configured(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, alpn_protocols=["viaduct"]) as hub:
            link = await opened(hub, quic_alpn=("other", "viaduct"))
            await link.close(is_polite=True)
            with pytest.raises(LinkRefused, match="no application protocol in common"):
                await opened(hub, quic_alpn=("other",))
        async with serving(tmp_path) as hub:
            with pytest.raises(LinkRefused, match="no application protocol in common"):
                await opened(hub, quic_alpn=("viaduct",))

    run(scenario())


def test_a_port_where_nobody_is_is_told_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        hub = QuicHub(Authority(tmp_path), polite)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
            unused.bind(("127.0.0.1", 0))
            hub.port = unused.getsockname()[1]
        with pytest.raises(LinkLost, match="Connection refused"):
            await opened(hub)

    run(scenario())


def test_a_port_that_is_silent_is_given_up_in_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        hub = QuicHub(Authority(tmp_path), polite)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            hub.port = silent.getsockname()[1]
            with pytest.raises(LinkLost, match="released CloudHub does not speak QUIC version 1"):
                await opened(hub, handshake_seconds=0.3)

    run(scenario())


def test_a_dial_that_nothing_answers_is_given_up_before_its_repetitions_become_rare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modules.edgehub.quic._SILENCE_SECONDS", 0.3)

    async def scenario() -> None:
        hub = QuicHub(Authority(tmp_path), polite)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            hub.port = silent.getsockname()[1]
            with pytest.raises(LinkLost, match=r"no answer within 0.3 s .*does not speak QUIC version 1"):
                await opened(hub, handshake_seconds=3600.0)

    run(scenario())


@pytest.mark.parametrize(
    ("setting", "content", "words"),
    [
        ("ca_file", None, "tlsCaFile .*No such file"),
        ("ca_file", b"nonsense", "tlsCaFile .*expected PEM certificates"),
        ("cert_file", None, "tlsCertFile .*No such file"),
        ("key_file", None, "tlsPrivateKeyFile .*No such file"),
        ("key_file", b"nonsense", "tlsPrivateKeyFile .*expected a PEM key"),
    ],
)
def test_a_file_that_is_wrong_is_named_before_anything_is_sent(
    tmp_path: Path, setting: str, content: bytes | None, words: str
) -> None:
    async def scenario() -> None:
        hub = QuicHub(Authority(tmp_path), polite)
        hub.port = 9
        path = tmp_path / "wrong"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(LinkRefused, match=words):
            await opened(hub, **{setting: str(path)})

    run(scenario())


def test_the_key_of_another_certificate_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        hub = QuicHub(Authority(tmp_path), polite)
        hub.port = 9
        with pytest.raises(LinkRefused, match="it is not the key of the certificate"):
            await opened(hub, key_file=str(hub.authority.node("edge-2").key))

    run(scenario())


# --- streams and barriers --------------------------------------------------------------------------


def test_signals_and_data_go_on_streams_of_their_own_and_keep_their_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            for number in range(0, 100, 4):
                link.write(payloads(message(number), message(number + 1)), kind=SIGNAL)
                link.write(payloads(message(number + 2), message(number + 3)), kind=DATA)
            link.write([], 1, kind=SIGNAL)
            link.write([], 2, kind=DATA)
            assert sorted(await receive(link, 2), key=str) == [Passed(1), Passed(2)]
            streams = {number: ids(said) for number, said in hub.node.messages.items() if number}
            assert sorted(streams) == [4, 8]
            assert streams[4] == [f"m{n}" for n in range(100) if n % 4 < 2]
            assert streams[8] == [f"m{n}" for n in range(100) if n % 4 >= 2]
            await link.close(is_polite=True)

    run(scenario())


def test_a_barrier_is_a_query_behind_what_it_covers_on_the_same_stream(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            link.write(payloads(message(1), message(2)), 7)
            assert await link.receive() == [Passed(7)]
            assert [(m.operation, m.resource) for m in hub.node.messages[4]] == [
                ("upload", "r"),
                ("upload", "r"),
                ("query", "k8s/ca.crt"),
            ]
            await link.close(is_polite=True)

    run(scenario())


def test_an_answer_on_another_stream_passes_the_barrier_too(tmp_path: Path) -> None:
    def talk(node: Node, stream: int, said: Message) -> None:
        if stream == 0:
            polite(node, stream, said)
        else:
            node.say(node.open_stream(), said.response("CA"))

    async def scenario() -> None:
        async with serving(tmp_path, talk) as hub:
            link = await opened(hub)
            link.write([], 1)
            assert await link.receive() == [Passed(1)]
            await link.close(is_polite=True)

    run(scenario())


def test_an_idle_stream_of_the_cloud_is_used_before_a_new_one_is_opened(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            theirs = hub.node.open_stream()
            hub.node.say(theirs, message(1))
            (got,) = await link.receive()
            assert isinstance(got, Decoded)
            link.write(payloads(message(2)), 1)
            assert await link.receive() == [Passed(1)]
            assert ids(hub.node.messages[theirs]) == ["m2"], "without a use type of ours"
            await link.close(is_polite=True)

    run(scenario())


def test_a_stream_for_raw_bytes_is_stopped_and_harms_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            raw = hub.node.open_stream(viaduct.RAW)
            hub.node.write(raw, b"\xff" * 5000)
            link.write(payloads(message(1)), 1)
            assert await link.receive() == [Passed(1)]
            assert ids(hub.node.messages[4]) == ["m1"], "on a stream of our own"
            await until(
                lambda: [e.stream_id for e in hub.node.ends if isinstance(e, events.StopSendingReceived)] == [raw],
                "the stop",
            )
            await link.close(is_polite=True)

    run(scenario())


# --- what the cloud says ---------------------------------------------------------------------------


def test_content_keeps_its_bytes_and_gets_a_kind(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            stream = hub.node.open_stream()
            contents = [b'{"a":1}', b"[1]", b"text", b'{"broken', b"\x00\xff", b"", "grün".encode()]
            hub.node.say(stream, *(message(n, content) for n, content in enumerate(contents)))
            found = [event.message for event in await receive(link, 7) if isinstance(event, Decoded)]
            assert [each.content for each in found] == [*contents[:5], b"null", contents[6]]
            assert [each.kind for each in found] == ["json", "json", "text", "text", "bytes", "json", "text"]
            await link.close(is_polite=True)

    run(scenario())


def test_a_payload_that_is_no_message_is_handed_on_to_be_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            stream = hub.node.open_stream()
            hub.node.write(stream, viaduct.packages([b"\xff\xff", viaduct.encode_message(message(1))]))
            first, second = await receive(link, 2)
            assert first == Received(b"\xff\xff")
            assert isinstance(second, Decoded)
            await link.close(is_polite=True)

    run(scenario())


def test_a_message_over_the_limit_is_skipped_while_it_streams(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub, max_frame_bytes=65_536)
            stream = hub.node.open_stream()
            hub.node.say(stream, message(1, b"x" * 5_000_000), message(2))
            skipped, second = await receive(link, 2)
            assert isinstance(skipped, SkippedMessage)
            assert skipped.size_bytes > 5_000_000
            assert isinstance(second, Decoded)
            await link.close(is_polite=True)

    run(scenario())


def test_broken_framing_ends_the_link_after_what_came_before_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            stream = hub.node.open_stream()
            hub.node.write(stream, viaduct.packages(payloads(message(1))) + b"\xff" * 10)
            (first,) = await link.receive()
            assert isinstance(first, Decoded)
            with pytest.raises(LinkLost, match="broke viaduct's framing") as lost:
                await link.receive()
            assert lost.value.is_cut_by_cloud
            await link.close(is_polite=False)
            ended = events.ConnectionTerminated
            await until(lambda: any(isinstance(e, ended) for e in hub.node.ends), "the cloud to hear of it")

    run(scenario())


def test_unread_messages_push_back_on_the_sender(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            stream = hub.node.open_stream()
            hub.node.say(stream, *(message(number, b"x" * 100_000) for number in range(100)))

            def sent() -> int:
                return hub.node.quic._streams[stream].sender.highest_offset

            before = -1
            while sent() != before:
                before = sent()
                await asyncio.sleep(0.2)
            assert before <= CREDIT_BYTES, "10 MB did not go into memory"
            assert len(await receive(link, 100)) == 100, "and none is lost"
            await link.close(is_polite=False)

    run(scenario())


def test_a_flood_of_empty_packages_is_bounded_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            stream = hub.node.open_stream()
            hub.node.write(stream, viaduct.packages([b""]) * 400_000)

            def sent() -> int:
                return hub.node.quic._streams[stream].sender.highest_offset

            before = -1
            while sent() != before:
                before = sent()
                await asyncio.sleep(0.2)
            assert before <= CREDIT_BYTES
            seen = 0
            while seen < 400_000:
                seen += len(await link.receive())
            await link.close(is_polite=False)

    run(scenario())


def test_datagrams_that_the_path_does_not_carry_end_the_link_in_words(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            link._on_socket_fault(OSError(90, "Message too long"))
            with pytest.raises(LinkLost, match="maxDatagram"):
                await link.receive()
            await link.close(is_polite=True)

    run(scenario())


def test_what_is_read_gives_credit_on_many_streams_for_ever(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            streams = [hub.node.open_stream() for _ in range(5)]
            for stream in streams:
                hub.node.say(stream, *(message(number, b"x" * 10_000) for number in range(200)))
            assert len(await receive(link, 1000)) == 1000, "10 MB, five times the credit"
            await link.close(is_polite=False)

    run(scenario())


def test_many_large_messages_half_sent_at_once_end_the_link(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub, max_frame_bytes=100_000)
            for _ in range(3):
                hub.node.write(hub.node.open_stream(), viaduct.package_header(90_000) + b"x" * 80_000)
            with pytest.raises(LinkLost, match="too many large messages at once"):
                await link.receive()
            await link.close(is_polite=False)

    run(scenario())


# --- writing ---------------------------------------------------------------------------------------


def test_the_write_buffer_of_one_kind_fills_and_drains_apart_from_the_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            link.write(payloads(message(1, b"x" * 5_000_000)), kind=DATA)
            assert not link.is_writable(DATA)
            assert link.is_writable(SIGNAL)
            await link.wait_writable(SIGNAL)
            await link.wait_writable(DATA)
            assert link.is_writable(DATA)
            await until(lambda: link.acknowledged_bytes() > 5_000_000, "the acknowledgements")
            await link.close(is_polite=True)

    run(scenario())


def test_a_peer_that_gives_no_credit_is_not_overrun(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, max_stream_data=10_000, max_data=20_000) as hub:
            link = await opened(hub)
            link.write(payloads(message(1, b"x" * 500_000)), 1)
            assert await link.receive() == [Passed(1)], "as the peer gives credit"
            await link.close(is_polite=True)

    run(scenario())


# --- the end ---------------------------------------------------------------------------------------


def test_a_close_of_the_cloud_is_noticed_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            hub.node.close(error_code=5, reason_phrase="kicked")
            with pytest.raises(LinkLost, match="CloudHub closed the link: code 5 kicked") as lost:
                await link.receive()
            assert lost.value.is_cut_by_cloud
            with pytest.raises(LinkLost):
                await link.wait_writable(DATA)
            link.write(payloads(message(1)), 1)
            await link.close(is_polite=True)

    run(scenario())


def test_a_polite_close_is_told_to_the_cloud(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            await link.close(is_polite=True)
            await link.close(is_polite=True)
            await until(lambda: any(isinstance(e, events.ConnectionTerminated) for e in hub.node.ends), "the end")
            with pytest.raises(LinkLost):
                await link.receive()

    run(scenario())


@pytest.mark.parametrize("end", ["reset", "stop", "finish"])
def test_a_stream_of_ours_that_the_cloud_gives_up_ends_the_link(tmp_path: Path, end: str) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            link.write(payloads(message(1)), 1)
            assert await link.receive() == [Passed(1)]
            if end == "reset":
                hub.node.quic.reset_stream(4, 1)
            elif end == "stop":
                hub.node.quic.stop_stream(4, 1)
            else:
                hub.node.quic.send_stream_data(4, b"", end_stream=True)
            hub.node.transmit()
            with pytest.raises(LinkLost, match="CloudHub ended stream 4"):
                await link.receive()
            await link.close(is_polite=False)

    run(scenario())


def test_a_stream_of_the_cloud_that_ends_is_not_written_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            stream = hub.node.open_stream()
            hub.node.say(stream, message(1))
            hub.node.quic.send_stream_data(stream, b"", end_stream=True)
            hub.node.transmit()
            assert len(await receive(link, 1)) == 1
            await until(lambda: not link._readers, "the end of the stream")
            link.write(payloads(message(2)), 1)
            assert await link.receive() == [Passed(1)]
            assert ids(hub.node.messages[4]) == ["m2"]
            await link.close(is_polite=True)

    run(scenario())


def test_a_stream_that_ends_within_a_package_ends_the_link(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            stream = hub.node.open_stream()
            hub.node.quic.send_stream_data(stream, viaduct.package_header(100), end_stream=True)
            hub.node.transmit()
            with pytest.raises(LinkLost, match="within a package"):
                await link.receive()
            await link.close(is_polite=False)

    run(scenario())


def test_a_fault_of_the_library_ends_the_link_rather_than_hang_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)

            def fail(*_: object, **__: object) -> None:
                raise AssertionError("a state that cannot be")

            monkeypatch.setattr(link._quic, "receive_datagram", fail)
            hub.node.say(hub.node.open_stream(), message(1))
            with pytest.raises(LinkLost, match="QUIC: AssertionError"):
                await link.receive()
            await link.close(is_polite=False)

    run(scenario())


def test_a_cloud_that_dies_without_a_word_is_noticed_by_its_closed_port(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub, LossyLine(hub.port) as line:
            link = await opened(hub, endpoints=(Endpoint("127.0.0.1", line.port),))
            line.close_port()
            link.write(payloads(message(1)), 1)
            with pytest.raises(LinkLost, match="CloudHub's port is closed") as lost:
                await link.receive()
            assert lost.value.is_cut_by_cloud
            await link.close(is_polite=False)

    run(scenario())


def test_a_refusal_or_two_do_not_end_a_link_that_works(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            for number in range(1, 6):
                for _ in range(2):
                    link._on_socket_fault(ConnectionRefusedError(111, "Connection refused"))
                link.write(payloads(message(number)), number)
                assert await link.receive() == [Passed(number)]
            await link.close(is_polite=True)

    run(scenario())


# --- paths -----------------------------------------------------------------------------------------


def test_a_send_that_fails_moves_the_link_to_a_new_socket(tmp_path: Path) -> None:
    class Unplugged:
        """The socket of an address that is gone."""

        def __init__(self, inner: socket.socket) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def send(self, data: bytes) -> int:
            raise OSError(101, "Network is unreachable")

    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            assert link._socket is not None
            before = link._socket.getsockname()
            link._socket = Unplugged(link._socket)  # type: ignore[assignment]
            link.write(payloads(message(1)), 1)
            assert await link.receive() == [Passed(1)]
            assert link._socket.getsockname() != before
            assert len(hub.nodes) == 1, "the same connection"
            await link.close(is_polite=True)

    run(scenario())


def test_a_change_of_addresses_moves_the_link_only_if_another_one_is_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as hub:
            link = await opened(hub)
            assert link._socket is not None
            before = link._socket
            link._check_address()
            assert link._socket is before, "127.0.0.1 is still the way"
            open_socket = link._open_socket

            def from_another(family: int) -> socket.socket:
                made = socket.socket(family, socket.SOCK_DGRAM)
                made.bind(("127.0.0.2", 0))
                made.setblocking(False)
                made.connect(link._peer)
                return made

            monkeypatch.setattr(link, "_open_socket", from_another)
            link._check_address()
            assert link._socket.getsockname()[0] == "127.0.0.2"
            link.write(payloads(message(1)), 1)
            assert await link.receive() == [Passed(1)]
            assert len(hub.nodes) == 1
            assert open_socket is not None
            await link.close(is_polite=True)

    run(scenario())
