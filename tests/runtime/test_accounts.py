"""The broker's accounts: of each lane, accepted = delivered + refused + held, at any time."""

from __future__ import annotations

from typing import Any

from runtime import emp
from tests.support.bus_pair import DATA, REPLY, BrokerRoom


def account(room: BrokerRoom, sender: str, destination: str, priority: int = DATA) -> dict[str, Any]:
    """Without its names."""
    for each in room.core.statistics(room.now)["accounts"]:
        if (each["sender"], each["destination"], each["priority"]) == (sender, destination, priority):
            return {key: each[key] for key in ("accepted", "delivered", "refused", "held", "balanced")}
    return {}


def balance(accepted: int, delivered: int, refused: int, held: int) -> dict[str, Any]:
    return {"accepted": accepted, "delivered": delivered, "refused": refused, "held": held, "balanced": True}


def test_what_is_accepted_is_held_and_then_delivered_or_refused() -> None:
    room = BrokerRoom()
    receiver, sender = room.peer("receiver"), room.peer("sender")
    sender.send("receiver", 1, 3)
    sender.send("nobody", 1, 2)
    assert account(room, "sender", "receiver") == balance(3, 0, 0, 3)
    assert account(room, "sender", "nobody") == balance(2, 0, 2, 0)
    (delivery,) = receiver.take(emp.DELIVER)
    receiver.ack(delivery.lane, 2, [(2, "denied")])
    assert account(room, "sender", "receiver") == balance(3, 1, 1, 1)
    receiver.ack(delivery.lane, 3, [])
    assert account(room, "sender", "receiver") == balance(3, 2, 1, 0)


def test_a_message_that_one_member_refused_counts_once() -> None:
    room = BrokerRoom()
    members = [room.peer(name, groups=["g"]) for name in ("a", "b")]
    sender = room.peer("sender")
    sender.send("@g", 1, 2)
    for member, refusals in zip(members, ([(1, "denied")], []), strict=True):
        (delivery,) = member.take(emp.DELIVER)
        member.ack(delivery.lane, 2, refusals)
    assert account(room, "sender", "@g") == balance(2, 1, 1, 0)


def test_a_repeated_send_is_accepted_once() -> None:
    room = BrokerRoom()
    room.peer("receiver")
    sender = room.peer("sender")
    sender.send("receiver", 1, 4)
    sender.send("receiver", 1, 4)
    assert account(room, "sender", "receiver") == balance(4, 0, 0, 4)


def test_the_account_of_a_declared_module_outlives_its_processes_but_not_that_of_others() -> None:
    room = BrokerRoom(declared={"owner": []})
    receiver = room.peer("receiver")
    for name in ("owner", "guest"):
        sender = room.peer(name)
        sender.send("receiver", 1)
        sender.send("receiver", 1, priority=REPLY, requester=receiver.incarnation)
        receiver.ack_all()
        room.core.died(name, sender.pid, room.now)
    assert account(room, "owner", "receiver") == balance(1, 1, 0, 0)
    assert account(room, "owner", "receiver", REPLY) == {}
    again = room.peer("owner")
    again.send("receiver", 1)
    assert account(room, "owner", "receiver") == balance(2, 1, 0, 1)
    assert account(room, "guest", "receiver") == {}
