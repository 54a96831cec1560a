"""What the relay of datagrams does to them."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from chaos.udp_relay import Line, Relay
from tests.support.aio import run, until


def test_a_whole_line_delays_and_loses_nothing() -> None:
    assert [Line(Random(1)).delay(1200, now) for now in (0.0, 1.0)] == [0.0, 0.0]


def test_a_lossy_line_loses_its_share_and_lets_others_be_overtaken() -> None:
    line = Line(Random(1))
    line.loss, line.reorder = 0.1, 0.2
    delays = [line.delay(1200, 0.0) for _ in range(10_000)]
    assert 800 < delays.count(None) < 1200
    late = [delay for delay in delays if delay]
    assert 1500 < len(late) < 2100
    assert max(late) < 0.05


def test_a_throttled_line_queues_half_a_second_and_drops_what_is_more() -> None:
    line = Line(Random(1))
    line.bytes_per_second = 10_000.0
    delays = [line.delay(1000, 0.0) for _ in range(20)]
    assert [round(delay, 3) for delay in delays[:3] if delay is not None] == [0.1, 0.2, 0.3]
    assert delays[-1] is None
    assert len([delay for delay in delays if delay is not None]) == 6
    assert line.delay(1000, 10.0) == pytest.approx(0.1), "the buffer has run empty"


class Peer(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.addresses: list[tuple[str, int]] = []

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self.got.append(data)
        self.addresses.append(address)


def test_flows_are_carried_both_ways_moved_and_silenced() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        cloud_side, cloud = await loop.create_datagram_endpoint(Peer, local_addr=("127.0.0.1", 0))
        target = cloud_side.get_extra_info("sockname")[1]
        near, relay = await loop.create_datagram_endpoint(lambda: Relay(target), local_addr=("127.0.0.1", 0))
        address = near.get_extra_info("sockname")
        node_side, node = await loop.create_datagram_endpoint(Peer, remote_addr=address)
        node_side.sendto(b"1")
        await until(lambda: cloud.got == [b"1"], "the first datagram")
        cloud_side.sendto(b"2", cloud.addresses[0])
        await until(lambda: node.got == [b"2"], "the answer")

        relay.command({"do": "drop"})
        await until(lambda: relay.is_at_rest, "the flow's new port")
        node_side.sendto(b"3")
        await until(lambda: cloud.got[1:] == [b"3"], "a datagram from the new port")
        assert cloud.addresses[1] != cloud.addresses[0]

        relay.command({"do": "half-open"})
        other_side, _ = await loop.create_datagram_endpoint(Peer, remote_addr=address)
        node_side.sendto(b"never")
        other_side.sendto(b"4")
        await until(lambda: cloud.got[2:] == [b"4"], "a datagram of another flow")

        relay.command({"do": "stall"})
        other_side.sendto(b"gone")
        await asyncio.sleep(0.05)  # time for it to come, if it could
        relay.command({"do": "pass"})
        other_side.sendto(b"5")
        await until(lambda: cloud.got[3:] == [b"5"], "a datagram after the line was down")
        for transport in (cloud_side, near, node_side, other_side):
            transport.close()
        relay.close()
        await asyncio.sleep(0)  # closed sockets are let go in the next turn

    run(scenario())
