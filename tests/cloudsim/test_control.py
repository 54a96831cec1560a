from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from cloudsim.control import MAX_BODY_BYTES
from tests.cloudsim.controlclient import ask
from tests.cloudsim.rawnode import cloud, frame, message, served
from tests.support.aio import run


def command(topic: str, content: Any, id: str = "") -> dict[str, Any]:
    route = {"source": "router_eventbus", "group": "user", "operation": "publish", "resource": topic}
    return {"header": {"msg_id": id}, "route": route, "content": content}


def test_health_tells_where_everything_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim:
            status, found = await ask(sim, "GET", "/health")
            assert status == 200
            assert (found["ok"], found["url"], found["port"], found["served"]) == (True, sim.url, sim.port, 0)
            assert json.loads((tmp_path / "ports.json").read_text()) == {
                "port": sim.port,
                "control_port": sim.control_port,
            }

    run(scenario())


def test_messages_go_to_a_node_one_by_one_and_in_batches(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim, served(sim) as node:
            status, found = await ask(sim, "POST", "/nodes/edge-a/messages", command("t", "<x>", "c1"))
            assert (status, found) == (202, {"id": "c1", "queue": "no-ack", "dropped": None})
            assert (await node.message())["content"] == "<x>"
            status, found = await ask(sim, "POST", "/nodes/edge-a/messages/batch", [command("t", n) for n in range(50)])
            assert status == 202
            assert len(found["results"]) == 50
            assert [(await node.message())["content"] for _ in range(50)] == list(range(50))

    run(scenario())


def test_a_dropped_message_is_a_conflict_with_the_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim:
            status, found = await ask(sim, "POST", "/nodes/edge-a/messages", command("t", "x"))
            assert (status, found["dropped"]) == (409, "node 'edge-a' has no session")

    run(scenario())


def test_sessions_are_listed_and_kicked_and_nodes_deleted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim:
            for method, path in (("POST", "/sessions/edge-a/kick"), ("DELETE", "/nodes/edge-a")):
                async with served(sim) as node:
                    _, found = await ask(sim, "GET", "/sessions")
                    assert [view["node"] for view in found["sessions"]] == ["edge-a"]
                    assert await ask(sim, method, path) == (200, {})
                    assert await node.ends()

    run(scenario())


def test_a_certificate_is_made_for_a_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim:
            status, found = await ask(sim, "POST", "/nodes/edge-x/certificate")
            assert status == 200
            assert found["key"] == str(tmp_path / "edge-x.key")
            assert (tmp_path / "edge-x.key").read_text().startswith("-----BEGIN")
            for name in ("..%2Fx", "ca"):
                assert (await ask(sim, "POST", f"/nodes/{name}/certificate"))[0] == 400

    run(scenario())


def test_faults_are_injected_listed_and_cleared(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim, served(sim) as node:
            fault = {"fault": "delay", "node": "edge-a", "seconds": 0.05}
            assert (await ask(sim, "POST", "/faults", fault))[0] == 200
            _, found = await ask(sim, "GET", "/faults")
            assert [(item["fault"], item["seconds"]) for item in found["lasting"]] == [("delay", 0.05)]
            assert (await ask(sim, "POST", "/faults", {"fault": "clear"}))[0] == 200
            assert (await ask(sim, "GET", "/faults"))[1] == {"lasting": []}
            assert (await ask(sim, "POST", "/faults", {"fault": "drop"}))[0] == 200
            assert await node.ends()

    run(scenario())


def test_events_are_streamed_from_a_number_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim, served(sim) as node:
            await node.send(*(frame(1, message(id=f"m{n}")) for n in range(5)))
            await node.barrier()
            _, events = await ask(sim, "GET", "/events?follow=0")
            assert [event["event"] for event in events] == ["connected"] + ["message"] * 6
            seq = events[-2]["seq"]
            _, events = await ask(sim, "GET", f"/events?since={seq}&follow=0")
            assert [event["message"]["header"]["msg_id"] for event in events] == ["m4"]
            following = asyncio.create_task(ask(sim, "GET", f"/events?since={seq + 1}&limit=1"))
            await asyncio.sleep(0.05)  # for the question to be waiting there; either order passes
            await node.send(frame(1, message(id="later")))
            _, events = await following
            assert events[0]["message"]["header"]["msg_id"] == "later"

    run(scenario())


def test_a_reader_who_is_too_late_is_told_how_many_events_are_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0, max_events=3) as sim, served(sim) as node:
            await node.send(*(frame(1, message(id=f"m{n}")) for n in range(5)))
            await node.barrier()
            _, events = await ask(sim, "GET", "/events?follow=0")
            assert events[0] == {"event": "missed", "count": 4}
            assert len(events) == 4

    run(scenario())


def test_received_counts_and_can_be_forgotten(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim, served(sim) as node:
            await node.send(frame(1, message(id="a")), frame(1, message(id="a")))
            await node.barrier()
            _, found = await ask(sim, "GET", "/received?ids=1")
            assert (found["by_module"]["router"], found["repeated"], found["ids"]) == (2, 1, {"a": 2})
            assert await ask(sim, "DELETE", "/received") == (200, {})
            assert (await ask(sim, "GET", "/received"))[1]["messages"] == 0

    run(scenario())


def test_several_requests_use_one_connection(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim:
            assert sim.control_port is not None
            reader, writer = await asyncio.open_connection("127.0.0.1", sim.control_port)
            for _ in range(3):
                writer.write(b"GET /received HTTP/1.1\r\nHost: localhost\r\n\r\n")
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                assert head.startswith("http/1.1 200")
                await reader.readexactly(int(head.partition("content-length: ")[2].split("\r\n")[0]))
            writer.close()
            await writer.wait_closed()

    run(scenario())


def test_wrong_requests_get_a_clear_error_and_the_server_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim:
            for method, path, body, status, text in (
                ("GET", "/nothing", None, 404, "nothing at /nothing"),
                ("GET", "/faults/x", None, 404, "nothing at"),
                ("PUT", "/faults", None, 405, "takes GET, POST"),
                ("POST", "/faults", b"{", 400, "not a fault"),
                ("POST", "/faults", {"fault": "no-such"}, 400, "not a fault"),
                ("POST", "/faults", {"fault": "drop", "nods": "x"}, 400, "nods"),
                ("POST", "/nodes/edge-a/messages", b"[1]", 400, "not a message"),
                ("POST", "/nodes/edge-a/messages", {"header": {"timestamp": "1"}}, 400, "timestamp"),
                ("POST", "/nodes/edge-a/messages/batch", {}, 400, "array"),
                ("POST", "/nodes/edge-a/messages/batch", [1] * 10_001, 413, "at most 10000"),
                ("GET", "/events?since=x", None, 400, "whole number"),
                ("GET", "/events?follow=2", None, 400, "expected 0 or 1"),
            ):
                found = await ask(sim, method, path, body)
                assert found[0] == status, (path, found)
                assert text in found[1]["error"]
            for head, status in (
                ("hello", 400),
                ("GET / HTTP/1.1\r\nContent-Length: x", 400),
                (f"POST /faults HTTP/1.1\r\nContent-Length: {MAX_BODY_BYTES + 1}", 413),
                ("POST /faults HTTP/1.1\r\nTransfer-Encoding: chunked", 411),
                ("GET / HTTP/1.1\r\nX: " + "x" * 40_000, 431),
            ):
                assert (await ask(sim, "", "", head=head))[0] == status, head[:40]
            assert (await ask(sim, "GET", "/health"))[0] == 200

    run(scenario())


def test_rules_are_changed_over_http(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim:
            assert (await ask(sim, "POST", "/rules", {"node_limit": 0, "authorization": "debug"}))[0] == 200
            assert (sim.hub.rules.node_limit, sim.hub.rules.authorization.value) == (0, "debug")
            for wrong in ({"node_limit": -1}, {"authorization": "maybe"}, {"other": 1}):
                status, answer = await ask(sim, "POST", "/rules", wrong)
                assert status == 400
                assert "not rules" in answer["error"]

    run(scenario())
