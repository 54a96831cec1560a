"""runtime.admin: questions to a broker, here one that a test plays."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from runtime import admin, emp
from runtime.admin import AdminClient, AdminRefused, BrokerSilent
from tests.support.deadline import DEADLINE

Answerer = Callable[[list[bytes]], list[list[bytes]]]


class PlayedBroker:
    """A ROUTER that answers each question with what `answer` makes of it."""

    def __init__(self, endpoint: str, answer: Answerer) -> None:
        self.endpoint = endpoint
        self.asked: list[Any] = []
        self._answer = answer
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(endpoint)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ended.is_set():
            if self._router.poll(20):
                peer, *frames = self._router.recv_multipart()
                self.asked.append(emp.decode(frames))
                for reply in self._answer(frames):
                    self._router.send_multipart([peer, *reply])

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._router.close(linger=0)
        self._context.term()


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[[Answerer], PlayedBroker]]:
    brokers: list[PlayedBroker] = []

    def start(answer: Answerer) -> PlayedBroker:
        brokers.append(PlayedBroker(f"ipc://{tmp_path}/bus", answer))
        return brokers[-1]

    yield start
    for broker in brokers:
        broker.close()


def reply(frames: list[bytes], body: Any, *, more: bool = False) -> list[bytes]:
    header = emp.decode(frames)[1]
    return emp.encode(emp.ADMIN, emp.Admin(header.request, header.op, more), msgpack.packb(body))


def test_the_frames_written_by_hand_are_those_of_emp(play: Callable[[Answerer], PlayedBroker]) -> None:
    assert admin._ADMIN == emp.ADMIN
    assert admin._REFUSED == emp.REFUSED
    broker = play(lambda frames: [reply(frames, {"modules": []})])
    with AdminClient(broker.endpoint) as client:
        assert client.ask("status", {"a": 1}, timeout_seconds=DEADLINE) == {"modules": []}
    [(verb, header, body)] = broker.asked
    assert (verb, header, msgpack.unpackb(body)) == (emp.ADMIN, emp.Admin(1, "status"), {"a": 1})


def test_a_broker_that_is_not_there_is_silent(tmp_path: Path) -> None:
    with AdminClient(f"ipc://{tmp_path}/none") as client:
        with pytest.raises(BrokerSilent, match=r"within 0\.05 s"):
            client.ask("status", timeout_seconds=0.05)
        with pytest.raises(BrokerSilent):
            next(event for event in client.stream("tap", {}, timeout_seconds=0.05) if event is not None)


def test_strange_frames_and_answers_to_other_questions_are_skipped(play: Callable[[Answerer], PlayedBroker]) -> None:
    strange = [[b"x"], [b"ADMIN/1", b"\xc1"], [b"ADMIN/1", b"\x93", b""], [b"WHO/1", b"\x91\xc4\x00"]]
    other = emp.encode(emp.ADMIN, emp.Admin(99, "status"), msgpack.packb({"wrong": 1}))
    broker = play(lambda frames: [*strange, other, reply(frames, {"right": 1})])
    with AdminClient(broker.endpoint) as client:
        assert client.ask("status", timeout_seconds=DEADLINE) == {"right": 1}


@pytest.mark.parametrize(
    "answer",
    [
        lambda frames: [reply(frames, {"error": "unknown op"})],
        lambda frames: [emp.encode(emp.REFUSED, emp.Refused("denied", "unknown op"))],
    ],
)
def test_a_refusal_is_told_in_words(play: Callable[[Answerer], PlayedBroker], answer: Answerer) -> None:
    broker = play(answer)
    with AdminClient(broker.endpoint) as client, pytest.raises(AdminRefused, match="unknown op"):
        client.ask("nonsense", timeout_seconds=DEADLINE)


def test_a_stream_yields_every_answer_in_order(play: Callable[[Answerer], PlayedBroker]) -> None:
    broker = play(lambda frames: [reply(frames, {"n": n}, more=True) for n in range(3)])
    with AdminClient(broker.endpoint) as client:
        events = (event for event in client.stream("tap", {"credit": 9}, timeout_seconds=DEADLINE) if event)
        assert [next(events)["n"] for _ in range(3)] == [0, 1, 2]
