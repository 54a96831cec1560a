"""What a module may send to the cloud."""

from __future__ import annotations

import pytest

from modules.edgehub.config import EdgeHubConfig
from modules.edgehub.permission import Grant, Permission
from runtime.config import NodeConfig
from runtime.edgecore import from_edgecore
from runtime.errors import ConfigError
from runtime.message import Message


def message(group: str = "user", operation: str = "upload", resource: str = "default/pump/1") -> Message:
    return Message.build(source="anybody", group=group, operation=operation, resource=resource)


@pytest.mark.parametrize(
    ("said", "allowed"),
    [
        (message(), True),
        (message(resource="default/pump/1/more"), True),
        (message(resource="default/pumps"), False),
        (message(resource="x/default/pump/1"), False),
        (message(operation="response"), False),
        (message(group="resource"), False),
        (message(group="twin", operation="update", resource="anything"), True),
    ],
)
def test_a_message_must_match_one_grant_in_all_three(said: Message, allowed: bool) -> None:
    permission = Permission(
        {"pump": [Grant(("user",), ("upload",), ("default/pump/*",)), Grant(("twin",), ("update", "get"))]}
    )
    assert permission.allows("pump", said) is allowed


def test_no_grant_allows_nothing_and_no_entry_everything() -> None:
    permission = Permission({"mute": [], "odd": [Grant(groups=())]})
    assert not permission.allows("mute", message())
    assert not permission.allows("odd", message())
    assert permission.allows("eventbus", message())
    assert not Permission({})


@pytest.mark.parametrize(
    "resource",
    [
        "default/pump/../fan/1",
        "default/pump/..",
        "default/pump/./1",
        "../default/pump/1",
        "/default/pump/1",
        "default//pump/1",
        "DEFAULT/pump/1",
        "default/pump\n/1",
        "default/pump",
        "",
        "*",
        "default/*",
        "default\\pump\\1",
        "default/\uff50ump/1",
        "x" * 1_000_000,
        "default/" * 100_000,
    ],
)
def test_a_resource_that_only_looks_like_a_granted_one_is_denied(resource: str) -> None:
    permission = Permission({"pump": [Grant(resources=("default/pump/*", "default/p*m*p*/x*y*z/*"))]})
    assert not permission.allows("pump", message(resource=resource))


def test_a_grant_of_all_resources_takes_odd_ones_too() -> None:
    permission = Permission({"pump": [Grant()]})
    assert permission.allows("pump", message(resource="a/../b"))
    assert permission.allows("pump", message(resource="a..b/..c"))
    assert Permission({"pump": [Grant(resources=("a*",))]}).allows("pump", message(resource="a..b/..c"))


def test_a_sender_whose_rule_is_withdrawn_does_not_pass_for_the_nodes_own() -> None:
    permission = Permission({"pump": [Grant(("user",))], "fan": []})
    permission.adopt({"fan": [Grant(("twin",))]})
    assert not permission.allows("pump", message(group="resource"))
    assert permission.allows("pump", message())  # as it was granted when it was sent
    assert permission.allows("fan", message(group="twin"))
    assert not permission.allows("fan", message())
    permission.adopt({})
    assert permission
    assert not permission.allows("pump", message(group="resource"))
    permission.adopt(None)
    assert not permission
    assert permission.allows("pump", message(group="resource"))


POLICY = {
    "enable": True,
    "modules": {
        "pump": {"users": [1001], "to": ["@hub"], "cloud": [{"groups": ["user"], "resources": ["default/pump/*"]}]},
        "mute": {"users": ["root"]},
    },
}


def node(policy: object) -> NodeConfig:
    return from_edgecore({"runtime": {"policy": policy}})[0]


def test_the_policy_of_the_node_reaches_edgehub() -> None:
    grants = dict(EdgeHubConfig.from_node(node(POLICY)).grants)
    assert grants == {"pump": (Grant(("user",), ("*",), ("default/pump/*",)),), "mute": ()}
    assert EdgeHubConfig.from_node(node({**POLICY, "enable": False})).grants == ()


@pytest.mark.parametrize(
    ("policy", "key"),
    [
        ({"modules": {"pump": {}}}, "runtime.policy.modules.pump"),
        ({"modules": {"a/b": {"users": [1]}}}, "runtime.policy.modules.a/b"),
        ({"modules": {"pump": {"users": [1], "to": ["@a b"]}}}, "runtime.policy.modules.pump.to"),
        ({"modules": {"pump": {"users": [1], "cloud": [{}]}}}, "runtime.policy.modules.pump.cloud"),
        ({"modules": {"pump": {"keys": ["x" * 40], "ownSocket": True}}}, "runtime.policy.modules.pump.ownSocket"),
        ({"modules": {"pump": {"keys": ["short"]}}}, "runtime.policy.modules"),
        ({"modules": {"pump": {"users": [1], "too": ["x"]}}}, "runtime.policy.modules"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_named(policy: object, key: str) -> None:
    with pytest.raises(ConfigError) as fault:
        node(policy)
    assert fault.value.key.startswith(key)


def test_the_network_is_open_only_with_a_policy() -> None:
    document = {"runtime": {"bus": {"listen": ["tcp://0.0.0.0:5577"]}}}
    with pytest.raises(ConfigError, match=r"runtime\.policy\.enable"):
        from_edgecore(document)
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        from_edgecore({"runtime": {"bus": {"listen": ["ipc:///x"]}, "policy": {"enable": True}}})
    config, _ = from_edgecore({"runtime": {"bus": {"listen": ["tcp://[::]:5577"]}, "policy": {"enable": True}}})
    assert config.runtime.bus.listen == ["tcp://[::]:5577"]
