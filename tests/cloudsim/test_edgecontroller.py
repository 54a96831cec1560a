from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloudsim.edgecontroller import EdgeController
from cloudsim.wire import CloudMessage, Header, Route
from tests.cloudsim.controlclient import ask
from tests.cloudsim.rawnode import cloud, frame, message, served, vectors
from tests.support.aio import run

RECORDED = {vector["name"]: vector["decoded"] for vector in vectors("ws_session")}


def asked(operation: str, resource: str, content: Any = None) -> CloudMessage:
    return CloudMessage(Header("q"), Route("edged", "", "meta", operation, f"node/edge-a/{resource}"), content)


def test_an_object_is_inserted_then_updated_under_one_uid() -> None:
    controller = EdgeController()
    first = controller.put("default", "configmap", "c", {"data": {"a": "1"}})
    second = controller.put("default", "configmap", "c", {"data": {"a": "2"}})
    assert (first.route.operation, second.route.operation) == ("insert", "update")
    assert first.content["metadata"]["uid"] == second.content["metadata"]["uid"]
    assert (first.header.resourceversion, second.header.resourceversion) == ("1", "2")
    assert first.route.resource == "default/configmap/c"


def test_a_removed_object_is_sent_as_a_delete_once() -> None:
    controller = EdgeController()
    controller.put("default", "configmap", "c", {"data": {}})
    removed = controller.remove("default", "configmap", "c")
    assert removed is not None
    assert (removed.route.operation, removed.content["data"]) == ("delete", {})
    assert controller.remove("default", "configmap", "c") is None


def test_a_query_gets_the_object_as_recorded() -> None:
    recorded = RECORDED["query_configmap.down.1"]
    controller = EdgeController()
    controller.put("default", "configmap", "cm-one", recorded["content"])
    (answer,) = controller.receive("edge-a", asked("query", "default/configmap/cm-one"))
    assert answer.header.parent_msg_id == "q"
    assert answer.header.resourceversion == "1"
    assert recorded["route"] == {"source": "edgecontroller", "group": "resource", "operation": "response"} | {
        "resource": "default/configmap/cm-one"
    }
    assert answer.content["data"] == recorded["content"]["data"]
    assert answer.content["metadata"]["uid"] == recorded["content"]["metadata"]["uid"]


def test_a_query_of_what_is_missing_gets_the_recorded_error() -> None:
    (answer,) = EdgeController().receive("edge-a", asked("query", "default/configmap/no-such"))
    assert answer.content == RECORDED["query_configmap_missing.down.1"]["content"]
    assert answer.header.resourceversion == ""


def test_a_status_update_is_answered_and_makes_the_node() -> None:
    controller = EdgeController()
    status = asked("update", "default/nodestatus/edge-a", {"Status": {"phase": "x"}})
    answer, update = controller.receive("edge-a", status)
    recorded = RECORDED["nodestatus_update.down.1"]
    assert (answer.content, answer.route.resource) == (recorded["content"], recorded["route"]["resource"])
    assert update.route.resource == RECORDED["nodestatus_update.down.2"]["route"]["resource"]
    assert update.content["status"] == {"phase": "x"}
    assert len(controller.receive("edge-a", status)) == 1


@pytest.mark.parametrize("resource", ["", "a", "a/b", "a/b/c/d", "default/configmap/c"])
def test_what_it_does_not_know_stays_unanswered(resource: str) -> None:
    assert EdgeController().receive("edge-a", asked("insert", resource)) == []


def test_objects_travel_over_the_wire_and_the_control_api(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0, edgecontroller=True) as sim, served(sim) as node:
            path = "/objects/default/configmap/c"
            assert await ask(sim, "PUT", path, {"data": {"a": "1"}}) == (200, {})
            insert = await node.message()
            assert insert["route"]["operation"] == "insert"
            await node.send(frame(1, message("response", parent=insert["header"]["msg_id"])))
            await node.send(frame(1, message("query", "default/configmap/c", source="edged", group="meta", id="q1")))
            response = await node.message()
            assert (response["header"]["parent_msg_id"], response["content"]["data"]) == ("q1", {"a": "1"})
            await node.send(frame(1, message("response", parent=response["header"]["msg_id"])))
            assert await ask(sim, "DELETE", f"{path}?node=edge-a") == (200, {})
            assert (await node.message())["route"]["operation"] == "delete"
            assert (await ask(sim, "DELETE", path))[0] == 404
            assert (await ask(sim, "PUT", path, b"[]"))[0] == 400

    run(scenario())


def test_without_an_edgecontroller_objects_are_refused_with_the_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cloud(tmp_path, control_port=0) as sim:
            status, found = await ask(sim, "PUT", "/objects/default/configmap/c", {})
            assert status == 400
            assert "--edgecontroller" in json.dumps(found)

    run(scenario())
