from __future__ import annotations

from bench.payload import Sequence, filler, stamp_of, stamped


def test_a_payload_has_the_size_asked_for() -> None:
    assert len((7).to_bytes(8, "big") + filler(256)) == 256


def test_a_stamped_payload_has_the_size_asked_for_and_tells_when_it_was_sent() -> None:
    payload = (7).to_bytes(8, "big") + stamped(256, 123_456_789_012)
    assert (len(payload), stamp_of(payload)) == (256, 123_456_789_012)


def test_payloads_in_order_leave_nothing_to_report() -> None:
    sequence = Sequence()
    for number in range(5):
        assert sequence.take(number.to_bytes(8, "big") + filler(16)) == number + 1
    assert (sequence.received, sequence.skips) == (5, 0)


def test_a_gap_and_a_repetition_are_noticed() -> None:
    sequence = Sequence()
    for number in (0, 2, 2):
        sequence.take(number.to_bytes(8, "big"))
    assert (sequence.received, sequence.skips) == (3, 2)
