"""What CloudHub does with a message: tables and pure functions over the message model.

Sources: docs/cloudlink.md, sections Upstream and Which messages need an acknowledgement.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection
from typing import Any, Final

from cloudsim.wire import CloudMessage


class HubVersion(enum.Enum):
    """How old a hub the double plays."""

    CURRENT = "1.17"
    "Everything in docs/cloudlink.md."
    BEFORE_1_17 = "1.16"
    "The same, but a query of k8s/ca.crt is not answered by the hub."
    TREE_2019 = "2019"
    "No acknowledgements and no retries; the first connection of a node wins."


class Effect(enum.Enum):
    """What becomes of an upstream message."""

    KEEPALIVE = "keepalive"
    ACK = "ack"
    CONTROL = "control"
    "Answered by the connection layer with content `ack`."
    CLUSTER_CA = "cluster-ca"
    "Answered by the hub itself."
    DROP = "drop"
    "Consumed or dropped without a word."
    FORWARD = "forward"


Routing = tuple[Effect, str]
"The effect, and for FORWARD the cloud module that gets the message."

UNPREFIXED_MODULE: Final = "taskmanager"
"The hub puts node/<id>/ before the resource of what any other module gets."

_CONTROL_OPERATIONS: Final = frozenset({"ping", "pong", "config"})
_TASK_OPERATIONS: Final = frozenset({"prepull", "upgrade"})
_CLOUD_SOURCES: Final = frozenset({"edgecontroller", "cloudhub", "cloudStream", "devicecontroller", "synccontroller"})
_VOLUME: Final = re.compile(r"^\w[-\w.+]*/volume/\w", re.ASCII)
CLUSTER_CA_RESOURCE: Final = "k8s/ca.crt"

_TO_ROUTER: Final[Routing] = (Effect.FORWARD, "router")
_TO_EDGECONTROLLER: Final[Routing] = (Effect.FORWARD, "edgecontroller")
_TO_DEVICECONTROLLER: Final[Routing] = (Effect.FORWARD, "devicecontroller")
_TO_TASKMANAGER: Final[Routing] = (Effect.FORWARD, "taskmanager")
_TO_DYNAMICCONTROLLER: Final[Routing] = (Effect.FORWARD, "dynamiccontroller")
_DROPPED: Final[Routing] = (Effect.DROP, "")


def route_upstream(message: CloudMessage, version: HubVersion, *, has_control: bool = True) -> Routing:
    """Where CloudHub sends a message of a node; the first rule that matches counts.

    `has_control`: the connection layer answers operations ping, pong and config (see Codec).
    """
    route = message.route
    operation = route.operation
    if has_control and operation in _CONTROL_OPERATIONS:
        return Effect.CONTROL, ""
    if operation == "keepalive":
        return Effect.KEEPALIVE, ""
    if version is HubVersion.TREE_2019:
        return _TO_DEVICECONTROLLER if route.source == "twin" else _TO_EDGECONTROLLER
    if "/volume/" in route.resource and _VOLUME.match(route.resource):
        return _DROPPED  # an answer to a waiting CSI call; the double makes none
    if operation == "response":
        return Effect.ACK, ""
    if operation == "error":
        return _DROPPED
    if operation == "upload" and route.group == "user":
        return _TO_ROUTER
    if operation in _TASK_OPERATIONS:
        return _TO_TASKMANAGER
    if route.resource == CLUSTER_CA_RESOURCE and version is HubVersion.CURRENT:
        return Effect.CLUSTER_CA, ""
    if route.source in _CLOUD_SOURCES:
        return _DROPPED
    if route.source == "metaserver":
        return _TO_DYNAMICCONTROLLER
    if route.source == "twin":
        return _TO_DEVICECONTROLLER
    return _TO_EDGECONTROLLER


def strip_node_prefix(resource: str) -> str:
    """A resource as the node sees it: `node/<id>/` goes where at least three parts are there."""
    if resource.startswith("node"):
        parts = resource.split("/", 2)
        if len(parts) == 3:
            return parts[2]
    return resource


_NO_ACK_RESOURCES: Final = ("podlist", "membership", "twin/cloud_updated", "serviceaccounttoken", CLUSTER_CA_RESOURCE)
_NO_ACK_OPERATIONS: Final = frozenset(
    {"createvolume", "deletevolume", "controllerpublishvolume", "controllerunpublishvolume", "applicationResponse"}
)
_NO_ACK_SOURCES: Final = frozenset({"taskmanager", "nodeupgradejobcontroller"})
_NO_ACK_TYPES: Final = frozenset({"lease", "nodepatch", "podpatch", "podstatus", "certificatesigningrequest"})


def resource_type(resource: str) -> str:
    """The type in `<namespace>/<type>[/<name>]`, or empty."""
    parts = resource.split("/")
    return parts[1] if len(parts) > 1 else ""


def needs_ack(message: CloudMessage) -> bool:
    """Whether the hub waits for an acknowledgement of this downstream message (resource without prefix)."""
    route = message.route
    if any(part in route.resource for part in _NO_ACK_RESOURCES):
        return False
    if route.operation in _NO_ACK_OPERATIONS or route.group == "user" or route.source in _NO_ACK_SOURCES:
        return False
    if route.operation == "response" and (message.content == "OK" or is_api_error(message.content)):
        return False
    if route.source == "edgecontroller":
        kind = resource_type(route.resource)
        if kind in _NO_ACK_TYPES:
            return False
        if kind == "node" and route.operation != "update":
            return False
        if kind == "pod" and route.operation == "response":
            return False
    return True


def is_api_error(content: Any) -> bool:
    """A Kubernetes API error as the wire carries it."""
    return isinstance(content, dict) and "ErrStatus" in content


def is_delete(message: CloudMessage) -> bool:
    """Whether a message for a node deletes an object, or tells of one that is being deleted."""
    if message.route.operation == "delete":
        return True
    metadata = message.content.get("metadata") if isinstance(message.content, dict) else None
    return isinstance(metadata, dict) and metadata.get("deletionTimestamp") is not None


def ack_fault(message: CloudMessage) -> str | None:
    """Why the hub drops a message that needs an acknowledgement without a word, or None."""
    if message.route.group != "resource":
        return f"needs an acknowledgement but has group {message.route.group!r}, not 'resource'"
    if not is_delete(message) and not message.header.resourceversion:
        return "needs an acknowledgement but has no resourceversion"
    content = message.content
    if not isinstance(content, dict) or not isinstance(content.get("metadata"), dict):
        return "needs an acknowledgement but its content is no Kubernetes object (no metadata)"
    return None


def object_key(message: CloudMessage) -> str:
    """What tells one object from another: metadata.uid, or the resource where that is missing."""
    uid = message.content["metadata"].get("uid")
    return uid if isinstance(uid, str) and uid else message.route.resource


def version_number(resource_version: str) -> int:
    """Versions compare as integers; what is none counts as 0."""
    try:
        return int(resource_version)
    except ValueError:
        return 0


_ADMITTED_OPERATIONS: Final = frozenset({"response", "error", "upload", "keepalive", "prepull", "upgrade"})
_ADMITTED_SOURCES: Final = frozenset({"twin", "metaserver"})
_ADMITTED_TYPES: Final = frozenset({"podstatus", "rulestatus", "nodestatus", "volume"})
_REFERENCED_TYPES: Final = frozenset({"configmap", "secret", "pod", "persistentvolumeclaim", "persistentvolume"})
_VERBS: Final = frozenset({"insert", "update", "delete", "patch", "query"})


def is_admitted(message: CloudMessage, node: str, delivered: Collection[str]) -> bool:
    """Whether a hub with authorization enforced lets an upstream message of `node` pass.

    The real hub asks Kubernetes' node authorizer; here an object counts as referenced by the node's
    pods once it has been `delivered` to the node (docs/cloudsim.md, Authorization).
    """
    route = message.route
    if route.operation in _ADMITTED_OPERATIONS or route.source in _ADMITTED_SOURCES:
        return True
    if route.resource == CLUSTER_CA_RESOURCE or _VOLUME.match(route.resource):
        return True
    parts = route.resource.split("/")
    kind, name = (parts[1] if len(parts) > 1 else ""), (parts[2] if len(parts) > 2 else "")
    if route.operation not in _VERBS:
        return False
    if kind in _ADMITTED_TYPES:
        return True
    if kind in ("node", "nodepatch"):
        return name == node
    if kind == "lease":
        return route.operation == "insert" or name == node
    if kind in ("podpatch", "serviceaccounttoken", "certificatesigningrequest"):
        return True
    return kind in _REFERENCED_TYPES and route.resource in delivered
