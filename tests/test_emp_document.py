"""docs/emp.md against the code: its examples, its tables, its rules, and the module that it contains."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from runtime import client_core, emp
from runtime.broker import Broker, Listener
from runtime.client import Bus
from runtime.errors import MalformedFrame, Refused
from runtime.message import Message, decode_batch, encode_message
from runtime.routing import BrokerLimits, RoutingCore
from tests.support.aio import run, until
from tests.support.deadline import DEADLINE

DOCUMENT = Path(__file__).parent.parent / "docs" / "emp.md"
TEXT = DOCUMENT.read_text()
HEADERS: dict[str, type[msgspec.Struct]] = {verb.decode().removesuffix("/1"): kind for verb, kind in emp._TYPES.items()}
WITH_BODY = {"SEND", "DELIVER", "ADMIN"}


# --- reading the page ------------------------------------------------------------------------------


def section(title: str) -> str:
    """The text under the heading that begins with `title`, up to the next heading of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}.*?$(.*?)(?=^#{{1,3}} |\Z)", TEXT, re.M | re.S)
    assert found is not None, f"no section {title!r}"
    return found[2]


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column is called `first`."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("|") and (rows or cells[0] == first):
            rows.append(cells)
        elif rows:
            break
    assert len(rows) > 2, f"no table of {first!r}"
    return rows[2:]


def plain(value: Any) -> Any:
    """A header as the lists that MessagePack makes of it."""
    if isinstance(value, msgspec.Struct):
        return [plain(getattr(value, field)) for field in value.__struct_fields__]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


class Example:
    """One block of hex: its frames, and per frame what is written beside it."""

    def __init__(self, block: str) -> None:
        self.frames: list[bytes] = []
        self.notes: list[list[tuple[str, Any]]] = []
        for part in re.split(r"^--- .*\n", block, flags=re.M)[1:]:
            data = b""
            notes: list[tuple[str, Any]] = []
            for line in part.splitlines():
                digits, _, note = line.partition(";")
                data += bytes.fromhex(digits)
                name, colon, value = note.strip().partition(": ")
                if colon:
                    notes.append((name, parse(value)))
            self.frames.append(data)
            self.notes.append(notes)
        self.verb = self.frames[0].decode().removesuffix("/1")

    def messages(self) -> list[list[Any]]:
        """The messages written beside the body."""
        messages: list[list[Any]] = []
        for name, value in self.notes[2]:
            if name == "id":
                messages.append([])
            assert name == Message.__struct_fields__[len(messages[-1])], "fields are written in their order"
            messages[-1].append(value)
        return messages


def parse(value: str) -> Any:
    """JSON with byte strings as h'00ff'."""

    def revive(item: Any) -> Any:
        if isinstance(item, str) and item.startswith("\0"):
            return bytes.fromhex(item[1:])
        if isinstance(item, list):
            return [revive(each) for each in item]
        if isinstance(item, dict):
            return {key: revive(each) for key, each in item.items()}
        return item

    return revive(json.loads(re.sub(r"h'([0-9a-f]*)'", r'"\\u0000\1"', value)))


EXAMPLES = [Example(block) for block in re.findall(r"^```emp\n(.*?)^```", TEXT, re.M | re.S)]


@pytest.fixture(params=EXAMPLES, ids=[f"{number}-{example.verb}" for number, example in enumerate(EXAMPLES)])
def example(request: pytest.FixtureRequest) -> Example:
    found: Example = request.param
    return found


# --- examples ---------------------------------------------------------------------------------------


def test_every_verb_has_an_example() -> None:
    assert {example.verb for example in EXAMPLES} == set(HEADERS)


def test_the_hex_is_what_our_decoder_takes_and_our_encoder_writes(example: Example) -> None:
    verb, header, body = emp.decode(example.frames)
    assert emp.encode(verb, header, body) == example.frames
    assert plain(header) == [value for _, value in example.notes[1]]


def test_an_independent_library_reads_and_writes_the_same_header(example: Example) -> None:
    values = [value for _, value in example.notes[1]]
    assert msgpack.unpackb(example.frames[1]) == values
    assert msgpack.packb(values) == example.frames[1]


def test_the_names_beside_the_hex_are_those_of_the_fields(example: Example) -> None:
    fields = [field.rstrip("_") for field in HEADERS[example.verb].__struct_fields__]
    assert [name for name, _ in example.notes[1]] == fields


def test_the_messages_in_a_body_are_read_and_written_alike_by_both_libraries(example: Example) -> None:
    if example.verb not in ("SEND", "DELIVER"):
        return
    written = example.messages()
    body = example.frames[2]
    assert msgpack.unpackb(body) == written
    assert msgpack.packb(written) == body
    decoded = decode_batch(body)
    assert len(decoded) == emp.decode(example.frames)[1].count
    for message, values in zip(decoded, written, strict=True):
        ours = msgpack.unpackb(encode_message(message))
        assert ours[: len(values)] == values
        assert ours[len(values) :] == [""] * (len(ours) - len(values)), "what is left out is empty"


def test_an_admin_body_is_the_map_written_beside_it(example: Example) -> None:
    if example.verb == "ADMIN":
        assert msgpack.unpackb(example.frames[2]) == {json.loads(name): value for name, value in example.notes[2]}


def test_further_fields_at_the_end_of_any_header_are_ignored(example: Example) -> None:
    longer = msgpack.packb([*msgpack.unpackb(example.frames[1]), "later", {"more": 1}])
    assert emp.decode([example.frames[0], longer, *example.frames[2:]])[1] == emp.decode(example.frames)[1]


def test_a_truncated_header_is_malformed_or_has_its_documented_defaults(example: Example) -> None:
    fields = HEADERS[example.verb].__struct_fields__
    required = len(fields) - len(HEADERS[example.verb].__struct_defaults__)
    values = msgpack.unpackb(example.frames[1])
    for kept in range(len(values)):
        frames = [example.frames[0], msgpack.packb(values[:kept]), *example.frames[2:]]
        if kept >= required:
            emp.decode(frames)
        else:
            with pytest.raises(MalformedFrame) as fault:
                emp.decode(frames)
            assert fault.value.code == emp.BAD_HEADER


def test_integers_of_any_width_are_taken() -> None:
    wide = bytes.fromhex("91 cf 0000000000000008")
    assert emp.decode([emp.PING, wide])[1].nonce == emp.decode([emp.PING, b"\x91\x08"])[1].nonce == 8


# --- tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", sorted(HEADERS))
def test_the_fields_of_a_header_are_those_of_the_code(verb: str) -> None:
    kind = HEADERS[verb]
    rows = table(section(verb), "field")
    assert [row[0] for row in rows] == [field.rstrip("_") for field in kind.__struct_fields__]
    required = len(rows) - len(kind.__struct_defaults__)
    assert ["opt" not in re.split(r"[ ,]+", row[1]) for row in rows] == [place < required for place in range(len(rows))]
    for (_, described, *_), default in zip(rows[required:], kind.__struct_defaults__, strict=True):
        found = re.search(r"opt(?: (\S+))?$", described)
        assert found is not None, described
        if isinstance(default, msgspec.Struct):
            assert default == type(default)(), "the limits' own defaults"
            continue
        value = default.factory() if hasattr(default, "factory") else default
        expected = {"nil": None, "empty": b"", "[]": [], "{}": {}, "false": False}
        told = expected[found[1]] if found[1] in expected else int(found[1])
        assert told == value


def test_the_list_of_verbs_is_complete() -> None:
    rows = table(section("5. Headers, verb by verb"), "verb")
    assert {row[0].encode() for row in rows} == emp.VERBS
    assert {row[0].removesuffix("/1") for row in rows if row[2] != "no"} == WITH_BODY
    for name, way, body, *_ in rows:
        verb = name.encode()
        assert (verb in emp._FRAMES_WITH_BODY) == (body != "no")
        assert way in ("M → B", "B → M", "both")


def test_the_flags_and_priorities_are_those_of_the_code() -> None:
    flags = table(section("Flags"), "bit")
    assert {row[2]: int(row[1]) for row in flags} == {
        name: getattr(emp, name) for name in ("EXPECTS_REPLY", "REPLY", "RESENT", "RETAIN", "REDELIVERED", "FROM_STORE")
    }
    assert all(1 << int(row[0]) == int(row[1]) for row in flags)
    classes = table(section("3. Words"), "number")
    assert {row[1].upper(): int(row[0]) for row in classes} == {each.name: each.value for each in emp.Priority}


def test_the_limits_and_their_defaults_are_those_of_the_code() -> None:
    text = section("7. Limits and times")
    told = {row[0]: int(row[1]) for row in table(text, "name")}
    assert told == {name: getattr(emp.Limits(), name) for name in emp.Limits.__struct_fields__}
    second = text[text.index("What this broker keeps") :]
    kept = {row[0]: float(row[1]) for row in table(second, "name")}
    limits = BrokerLimits()
    assert kept == {name: getattr(limits, name) for name in limits.__struct_fields__ if name != "limits"}
    assert emp.MAX_BATCH_MESSAGES == 1024
    assert emp.MAX_EXCEPTIONS == 1000
    assert f"more than {emp.MAX_HEADER_BYTES} bytes" in section("4. Frames")
    assert client_core.HELLO_AGAIN_SECONDS == 0.5
    assert client_core.MAX_IN_LANES == 4096


def test_the_reasons_and_codes_are_those_of_the_code() -> None:
    reasons = {row[0].strip("`") for row in table(section("Of messages"), "reason")}
    assert reasons == emp.REASONS
    codes = {row[0].strip("`") for row in table(section("Of frames"), "code")}
    assert codes == {
        emp.NAME_TAKEN,
        emp.HELLO_DENIED,
        emp.BAD_VERSION,
        emp.BAD_HEADER,
        emp.UNKNOWN_VERB,
        emp.TOO_MANY,
    }


def test_the_fields_of_a_message_are_those_of_the_code() -> None:
    rows = table(section("6. The message"), "field")
    assert tuple(row[0] for row in rows) == Message.__struct_fields__


def test_the_status_document_has_the_keys_that_are_told() -> None:
    core = RoutingCore(epoch=b"e" * 8, session_base=0, clock_ms=1, now=0.0, declared={"probe": {"twin"}})
    status = core.statistics(1.0)
    text = section("16. ADMIN")
    told = re.search(r"`broker`: map with (.*?)\n- ", text, re.S)
    assert told is not None
    assert set(re.findall(r"`(\w+)`", told[1])) == set(status["broker"])
    keys = {key for row in table(text, "key") for key in row[0].split(", ")}
    [module] = status["modules"]
    assert keys == set(module)


def test_all_38_rules_are_there_once_and_each_says_why() -> None:
    rules = re.findall(r"^\*\*Rule (\d+)\.\*\*(.*?)(?=\n\n)", TEXT, re.M | re.S)
    assert [int(number) for number, _ in rules] == list(range(1, 39))
    assert all("*Why:*" in text for _, text in rules)


def test_links_within_the_page_and_to_others_lead_somewhere() -> None:
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S), re.M):
        anchors.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        page, _, anchor = target.partition("#")
        assert not page or (DOCUMENT.parent / page).exists(), target
        assert page or anchor in anchors, target


# --- what the page says is refused --------------------------------------------------------------------

HELLO = ["probe", [], b"i" * 16, 0, 15000, "page/1"]
SEND = ["echo", 3, 1, 1, 1]


def changed(header: list[Any], place: int, value: Any) -> list[Any]:
    return [*header[:place], value, *header[place + 1 :]]


@pytest.mark.parametrize(
    ("verb", "header"),
    [
        pytest.param(emp.HELLO, changed(HELLO, 0, "-probe"), id="a name that begins with a mark"),
        pytest.param(emp.HELLO, changed(HELLO, 0, "p" * 65), id="a name of 65"),
        pytest.param(emp.HELLO, changed(HELLO, 0, "probe\n"), id="a name that ends in a newline"),
        pytest.param(emp.HELLO, changed(HELLO, 1, ["g"] * 65), id="65 groups"),
        pytest.param(emp.HELLO, changed(HELLO, 2, "i" * 16), id="an incarnation as str"),
        pytest.param(emp.HELLO, changed(HELLO, 2, b"i" * 15), id="an incarnation of 15 bytes"),
        pytest.param(emp.HELLO, changed(HELLO, 3, -1), id="a negative generation"),
        pytest.param(emp.HELLO, changed(HELLO, 4, 99), id="a liveness of 99 ms"),
        pytest.param(emp.HELLO, changed(HELLO, 4, 3_600_001), id="a liveness above an hour"),
        pytest.param(emp.HELLO, changed(HELLO, 4, 15000.0), id="a float"),
        pytest.param(emp.SEND, changed(SEND, 0, "@"), id="a group without name"),
        pytest.param(emp.SEND, changed(SEND, 1, 4), id="priority 4"),
        pytest.param(emp.SEND, changed(SEND, 2, 0), id="number 0"),
        pytest.param(emp.SEND, changed(SEND, 3, 0), id="no message"),
        pytest.param(emp.SEND, changed(SEND, 3, 1025), id="1025 messages"),
        pytest.param(emp.SEND, changed(SEND, 2, 2**62 + 1), id="a number above 2^62"),
        pytest.param(emp.SEND, changed(SEND, 4, 2**63), id="a floor of 2^63"),
        pytest.param(emp.SEND, [*SEND, 2, None, b"r" * 8], id="a requester of 8 bytes"),
        pytest.param(emp.SEND, [*SEND, 8, None, None, "", 1], id="an empty retain key"),
        pytest.param(emp.ACK, [1, [[1, 1, [[1, "r" * 65]]]]], id="a reason of 65"),
        pytest.param(emp.BYE, [1], id="an integer for a bool"),
        pytest.param(emp.PING, {"nonce": 1}, id="a map for an array"),
    ],
)
def test_a_header_outside_the_told_ranges_is_bad(verb: bytes, header: Any) -> None:
    with pytest.raises(MalformedFrame) as fault:
        emp.decode([verb, msgpack.packb(header), *([b"\x90"] if verb == emp.SEND else [])])
    assert fault.value.code == emp.BAD_HEADER


def test_the_smallest_headers_are_good() -> None:
    emp.decode([emp.HELLO, msgpack.packb(HELLO)])
    emp.decode([emp.SEND, msgpack.packb(SEND), b"\x90"])


def test_verbs_of_other_versions_and_unknown_ones_have_their_codes() -> None:
    for verb, code in ((b"SEND/2", emp.BAD_VERSION), (b"PUSH/1", emp.UNKNOWN_VERB), (b"", emp.UNKNOWN_VERB)):
        with pytest.raises(MalformedFrame) as fault:
            emp.decode([verb, b"\x90"])
        assert fault.value.code == code


# --- the module in the page, against a real broker ----------------------------------------------------


@contextmanager
def broker_at(endpoint: str) -> Iterator[None]:
    core = RoutingCore(
        epoch=time.monotonic_ns().to_bytes(16, "big")[-8:],
        session_base=time.monotonic_ns() & 0xFFFFFF << 24,
        clock_ms=int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000),
        now=time.monotonic(),
        limits=BrokerLimits(grace_seconds=0.1, heartbeat_seconds=0.2),
        declared={"minimal": (), "asker": ()},
    )
    broker = Broker(core, [Listener(endpoint)], max_frame_bytes=2**25)
    thread = threading.Thread(target=broker.run)
    thread.start()
    try:
        yield
    finally:
        broker.stop()
        thread.join(DEADLINE)
        broker.close()


class Running:
    """The page's module in a thread."""

    def __init__(self, endpoint: str) -> None:
        [code] = re.findall(r"^```python\n(.*?)^```", section("18. A minimal module"), re.M | re.S)
        space: dict[str, Any] = {"__name__": "page"}
        exec(compile(code, str(DOCUMENT), "exec"), space)
        self.handled: list[str] = []
        self.settled: list[tuple[int, str | None]] = []
        refuse = space["Refuse"]

        def handle(message: list[Any]) -> bytes | None:
            self.handled.append(message[7])
            if message[7] == "refuse":
                raise refuse("not-today")
            if message[7] == "fail":
                raise ValueError("a bug in the handler")
            content = message[10]
            assert isinstance(content, bytes)
            return content

        self.module = space["MinimalModule"](endpoint, "minimal", handle)
        self.module.settled = lambda to, priority, number, reason: self.settled.append((number, reason))
        self._to_send: list[tuple[str, list[Any]]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set() and not self.module.ended:
            while self._to_send:
                self.module.send(*self._to_send.pop(0))
            self.module.turn(time.monotonic(), wait=0.01)
        self.module.close()

    def send(self, destination: str, message: list[Any]) -> None:
        self._to_send.append((destination, message))

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(DEADLINE)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    running = Running(f"ipc://{tmp_path}/bus")
    yield running
    running.stop()


def test_the_minimal_module_answers_refuses_and_fails_as_the_page_says(running: Running, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Bus.connect("asker", endpoint=f"ipc://{tmp_path}/bus") as bus:
            reply = await bus.request("minimal", Message.build(resource="ask", content="hello"), timeout=DEADLINE)
            assert (reply.content, reply.resource, reply.operation) == (b"hello", "ask", "response")
            for resource, reason in (("refuse", "not-today"), ("fail", "failed")):
                receipt = await bus.send("minimal", Message.build(resource=resource))
                with pytest.raises(Refused) as refused:
                    await receipt
                assert refused.value.reason == reason
            receipts = [await bus.send("minimal", Message.build(resource=str(number))) for number in range(1000)]
            for receipt in receipts:
                await receipt
            assert running.handled == ["ask", "refuse", "fail", *map(str, range(1000))]

    with broker_at(f"ipc://{tmp_path}/bus"):
        run(scenario())


def test_the_minimal_module_sends_and_hears_what_became_of_it(running: Running, tmp_path: Path) -> None:
    got: list[str] = []

    async def handle(message: Message) -> None:
        got.append(message.resource)
        if message.resource == "3":
            raise Refused("denied")

    async def scenario() -> None:
        async with Bus.connect("asker", handler=handle, endpoint=f"ipc://{tmp_path}/bus"):
            for number in range(1, 6):
                running.send(
                    "asker", [f"id-{number}", "", 0, False, "", "minimal", "", str(number), "note", "bytes", b""]
                )
            await until(lambda: len(running.settled) == 5, "settlement")
            assert running.settled == [(1, None), (2, None), (3, "denied"), (4, None), (5, None)]
            assert got == ["1", "2", "3", "4", "5"]

    with broker_at(f"ipc://{tmp_path}/bus"):
        run(scenario())


def test_the_minimal_module_loses_nothing_when_the_broker_is_replaced(running: Running, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/bus"
    got: list[str] = []

    async def handle(message: Message) -> None:
        got.append(message.resource)

    async def scenario() -> None:
        first = broker_at(endpoint)
        first.__enter__()
        async with Bus.connect("asker", handler=handle, endpoint=endpoint) as bus:
            await (await bus.send("minimal", Message.build(resource="before")))
            first.__exit__(None, None, None)
            receipts = [await bus.send("minimal", Message.build(resource=f"during {n}")) for n in range(20)]
            for number in range(20):
                running.send("asker", [f"id-{number}", "", 0, False, "", "", "", str(number), "note", "bytes", b""])
            with broker_at(endpoint):
                for receipt in receipts:
                    await receipt
                await until(lambda: len(running.settled) == 20, "settlement of what the page's module sent")
        assert running.handled == ["before", *(f"during {n}" for n in range(20))]
        assert got == [str(number) for number in range(20)]
        assert running.settled == [(number, None) for number in range(1, 21)]

    run(scenario())
