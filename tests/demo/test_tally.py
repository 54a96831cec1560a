"""What the demo counts, and what its last line says."""

from demo.tally import Kill, Tally, Traffic


def sent(count: int, *, at: float = 1.0) -> Traffic:
    traffic = Traffic()
    for number in range(count):
        traffic.send(number, at)
    return traffic


def test_what_was_sent_and_did_not_come_is_lost() -> None:
    traffic = sent(5)
    for number in (0, 2, 4):
        traffic.arrive(number)
    assert (traffic.sent, traffic.arrived, traffic.lost, traffic.duplicated) == (5, 3, 2, 0)
    assert traffic.missing() == [1, 3]


def test_a_second_arrival_is_a_duplicate_and_makes_up_for_no_loss() -> None:
    traffic = sent(3)
    for number in (1, 1, 1, 2):
        traffic.arrive(number)
    assert (traffic.arrived, traffic.lost, traffic.duplicated) == (2, 1, 2)


def test_a_repeated_send_is_the_same_message() -> None:
    traffic = sent(2, at=1.0)
    traffic.send(1, 9.0)
    assert traffic.sent == 2
    assert not traffic.arrived_since(5.0, [1])


def test_what_was_never_sent_is_not_counted() -> None:
    traffic = sent(1)
    traffic.arrive(7)
    assert (traffic.arrived, traffic.duplicated) == (0, 0)


def test_only_a_message_sent_after_the_kill_shows_that_service_is_back() -> None:
    traffic = sent(2, at=1.0)
    traffic.send(2, 3.0)
    assert not traffic.arrived_since(2.0, [0, 1])
    assert traffic.arrived_since(2.0, [1, 2])
    assert not traffic.arrived_since(2.0, [99])


def test_a_kill_is_over_when_there_is_a_new_process_and_service_is_back() -> None:
    tally = Tally(uploads=sent(1))
    kill = Kill("broker", old_pid=7, at=1.0)
    tally.kills.append(kill)
    assert tally.current_kill is kill
    kill.served_at = 2.0
    assert not kill.is_over
    kill.new_pid = 8
    assert (tally.current_kill, tally.recovered) == (None, 1)


def test_nothing_is_complete_while_a_message_or_a_kill_is_open() -> None:
    tally = Tally(uploads=sent(1), commands=sent(1), at_device=sent(1))
    assert not tally.is_complete(kills=0)
    tally.uploads.arrive(0)
    tally.commands.arrive(0)
    assert tally.is_complete(kills=0)
    assert not tally.is_complete(kills=1)
    tally.kills.append(Kill("broker", 7, at=1.0, new_pid=8, back_at=1.5, served_at=2.0))
    assert tally.is_complete(kills=1)


def test_the_last_line_has_its_fixed_form() -> None:
    tally = Tally(uploads=sent(3), commands=sent(2), at_device=sent(2))
    for number in (0, 1, 1):
        tally.uploads.arrive(number)
    for number in (0, 1):
        tally.commands.arrive(number)
    for number in (0, 0, 1):
        tally.at_device.arrive(number)
    tally.kills += [Kill("edgehub", 1, 1.0, new_pid=2, served_at=2.0), Kill("broker", 3, 3.0)]
    assert tally.line() == (
        "uploads sent=3 arrived=2 lost=1 duplicated=1 commands sent=2 answered=2 lost=0 duplicated=1 kills=1"
    )
