from __future__ import annotations

from typing import Any

import pytest

from cloudsim.rules import Effect, HubVersion, ack_fault, is_admitted, needs_ack, route_upstream, strip_node_prefix
from cloudsim.wire import CloudMessage, Header, Route


def up(
    operation: str = "update", resource: str = "default/x/y", source: str = "edged", group: str = "meta"
) -> CloudMessage:
    return CloudMessage(Header("m"), Route(source=source, group=group, operation=operation, resource=resource))


def down(
    operation: str,
    resource: str,
    content: Any = None,
    *,
    source: str = "edgecontroller",
    group: str = "resource",
    version: str = "1",
) -> CloudMessage:
    if content is None:
        content = {"metadata": {"uid": "u"}}
    return CloudMessage(Header("m", resourceversion=version), Route(source, "", group, operation, resource), content)


@pytest.mark.parametrize(
    ("message", "effect", "module"),
    [
        (up("keepalive", "node", "websocket", "resource"), Effect.KEEPALIVE, ""),
        (up("ping"), Effect.CONTROL, ""),
        (up("pong"), Effect.CONTROL, ""),
        (up("config", "k8s/ca.crt"), Effect.CONTROL, ""),
        (up("response", "default/volume/v1"), Effect.DROP, ""),
        (up("response"), Effect.ACK, ""),
        (up("response", "", "", ""), Effect.ACK, ""),
        (up("error"), Effect.DROP, ""),
        (up("upload", "a/b", "eventbus", "user"), Effect.FORWARD, "router"),
        (up("upload", "a/b", "twin", "user"), Effect.FORWARD, "router"),
        (up("upload", "a/b", "eventbus", "resource"), Effect.FORWARD, "edgecontroller"),
        (up("prepull", "r", "edgehub", "hub"), Effect.FORWARD, "taskmanager"),
        (up("upgrade", "r", "edgehub", "hub"), Effect.FORWARD, "taskmanager"),
        (up("query", "k8s/ca.crt"), Effect.CLUSTER_CA, ""),
        (up("update", source="edgecontroller"), Effect.DROP, ""),
        (up("update", source="synccontroller"), Effect.DROP, ""),
        (up("x", "r", "metaserver"), Effect.FORWARD, "dynamiccontroller"),
        (up("update", "device/d/twin/edge_updated", "twin"), Effect.FORWARD, "devicecontroller"),
        (up("insert", "default/volumes/v1"), Effect.FORWARD, "edgecontroller"),
        (up("", "", "", ""), Effect.FORWARD, "edgecontroller"),
    ],
)
def test_the_first_rule_that_matches_routes_a_message(message: CloudMessage, effect: Effect, module: str) -> None:
    assert route_upstream(message, HubVersion.CURRENT) == (effect, module)


def test_a_hub_before_1_17_forwards_the_query_of_the_cluster_ca() -> None:
    assert route_upstream(up("query", "k8s/ca.crt"), HubVersion.BEFORE_1_17) == (Effect.FORWARD, "edgecontroller")


def test_the_hub_of_2019_forwards_responses_and_uploads_alike() -> None:
    for operation in ("response", "upload", "error", "prepull"):
        assert route_upstream(up(operation), HubVersion.TREE_2019) == (Effect.FORWARD, "edgecontroller")
    assert route_upstream(up("response", source="twin"), HubVersion.TREE_2019) == (Effect.FORWARD, "devicecontroller")


@pytest.mark.parametrize(
    ("resource", "stripped"),
    [
        ("node/edge-a/default/configmap/c", "default/configmap/c"),
        ("node/edge-a/membership", "membership"),
        ("node/edge-a", "node/edge-a"),
        ("default/node/edge-a", "default/node/edge-a"),
        ("", ""),
    ],
)
def test_the_node_prefix_is_stripped(resource: str, stripped: str) -> None:
    assert strip_node_prefix(resource) == stripped


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (down("insert", "default/configmap/c"), True),
        (down("delete", "default/pod/p"), True),
        (down("response", "default/configmap/c"), True),
        (down("update", "null/node/n"), True),
        (down("response", "default/node/n"), False),
        (down("response", "default/node/n", "OK"), False),
        (down("response", "default/configmap/c", {"ErrStatus": {"code": 404}}), False),
        (down("response", "default/pod/p"), False),
        (down("response", "kube-node-lease/lease/n"), False),
        (down("response", "default/podpatch/p"), False),
        (down("query", "default/podlist"), False),
        (down("response", "default/serviceaccounttoken/t"), False),
        (down("update", "membership", source="devicecontroller", group="twin"), False),
        (down("update", "device/d/twin/cloud_updated", source="devicecontroller", group="twin"), False),
        (down("update", "device/d/updated", source="devicecontroller", group="twin"), True),
        (down("publish", "a/b", source="router_eventbus", group="user"), False),
        (down("createvolume", "default/volume/v"), False),
        (down("applicationResponse", "x", source="dynamiccontroller"), False),
        (down("prepull", "x", source="taskmanager", group="taskmanager"), False),
    ],
)
def test_which_messages_need_an_acknowledgement(message: CloudMessage, expected: bool) -> None:
    assert needs_ack(message) is expected


def test_what_needs_an_acknowledgement_must_be_a_versioned_object_of_group_resource() -> None:
    assert ack_fault(down("insert", "default/configmap/c")) is None
    assert ack_fault(down("delete", "default/configmap/c", version="")) is None
    assert "group" in str(ack_fault(down("insert", "default/configmap/c", group="meta")))
    assert "resourceversion" in str(ack_fault(down("insert", "default/configmap/c", version="")))
    assert "object" in str(ack_fault(down("insert", "default/configmap/c", "text")))


# As measured with authorization enforced (measured_behaviour.json, message_admission…).
@pytest.mark.parametrize(
    ("message", "admitted"),
    [
        (up("update", "default/nodestatus/edge-c"), True),
        (up("update", "default/nodestatus/edge-b"), True),
        (up("query", "default/configmap/unrelated"), False),
        (up("query", "default/secret/unrelated"), False),
        (up("query", "default/configmap/delivered"), True),
        (up("query", "default/node/edge-c"), True),
        (up("query", "default/node/edge-b"), False),
        (up("insert", "kube-node-lease/lease/edge-c"), True),
        (up("insert", "kube-node-lease/lease/edge-b"), True),
        (up("insert", "default/event/e"), False),
        (up("update", "default/podstatus"), True),
        (up("query", "default/pod/p"), False),
        (up("query", "default/unknowntype/x"), False),
        (up("unknown", "default/configmap/delivered"), False),
        (up("upload", "a/b", "eventbus", "user"), True),
        (up("update", "device/d/twin/edge_updated", "twin"), True),
        (up("x", "x", "metaserver"), True),
        (up("query", "k8s/ca.crt"), True),
        (up("response", "default/configmap/unrelated"), True),
    ],
)
def test_admission_with_authorization_enforced(message: CloudMessage, admitted: bool) -> None:
    assert is_admitted(message, "edge-c", {"default/configmap/delivered"}) is admitted
