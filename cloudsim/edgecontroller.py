"""A small edgecontroller: objects of a cluster that nodes are sent and may ask for. No I/O.

It answers what the recorded one answers (docs/cloudlink.md; tests/vectors/cloudlink/ws_session.json):
queries of objects, and status updates of nodes. It exists so that modules can be tried offline; what
it does not know stays unanswered, as with an edgecontroller that has a bad day.
"""

from __future__ import annotations

import uuid
from typing import Any, Final

from cloudsim.wire import CloudMessage, Header, Route, json_content

_NAMESPACE: Final = uuid.UUID("6f2d3a55-3d0c-4e53-9d4a-2f1f2f1e7c10")
"Of the uids given to objects that come without: the same object has the same uid in each run."


class EdgeController:
    """Holds objects by (namespace, type, name), each with uid and resourceVersion as Kubernetes gives them."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._version = 0

    def __len__(self) -> int:
        return len(self._objects)

    def put(self, namespace: str, kind: str, name: str, content: dict[str, Any]) -> CloudMessage:
        """Create or change an object; returns the message that nodes get. `kind` is the wire's type, as `configmap`."""
        key = (namespace, kind, name)
        old = self._objects.get(key)
        self._version += 1
        given = content.get("metadata")
        metadata = dict(given) if isinstance(given, dict) else {}
        metadata |= {"name": name, "namespace": namespace, "resourceVersion": str(self._version)}
        uid = old["metadata"]["uid"] if old else metadata.get("uid") or str(uuid.uuid5(_NAMESPACE, "/".join(key)))
        metadata["uid"] = uid
        self._objects[key] = content | {"metadata": metadata}
        return self._message("update" if old else "insert", key, self._objects[key])

    def remove(self, namespace: str, kind: str, name: str) -> CloudMessage | None:
        """Delete an object; returns the message that nodes get, or None: there is none."""
        key = (namespace, kind, name)
        old = self._objects.pop(key, None)
        return self._message("delete", key, old) if old is not None else None

    def connected(self, node: str) -> list[CloudMessage]:
        """What a node gets as soon as it is there: the cloud notes on its Node object that it is, if there is one."""
        key = ("default", "node", node)
        if key not in self._objects:
            return []
        return [self._node_update(self.put(*key, self._objects[key]), node)]

    def receive(self, node: str, message: CloudMessage) -> list[CloudMessage]:
        """What a node gets for a message of its own (its resource is prefixed)."""
        parts = message.route.resource.removeprefix(f"node/{node}/").split("/")
        if len(parts) != 3:
            return []
        namespace, kind, name = parts
        if message.route.operation == "query":
            return [self._answer(message, namespace, kind, name)]
        if message.route.operation == "update" and kind == "nodestatus" and name == node:
            return self._node_status(node, namespace, message)
        return []

    def _answer(self, request: CloudMessage, namespace: str, kind: str, name: str) -> CloudMessage:
        found = self._objects.get((namespace, kind, name))
        if found is not None:
            return self._message("response", (namespace, kind, name), found, request)
        content = {
            "ErrStatus": {
                "metadata": {},
                "status": "Failure",
                "message": f'{kind} "{name}" not found',
                "reason": "NotFound",
                "details": {"name": name, "kind": kind},
                "code": 404,
            }
        }
        answer = self._message("response", (namespace, kind, name), content, request)
        answer.header.resourceversion = ""
        return answer

    def _node_status(self, node: str, namespace: str, request: CloudMessage) -> list[CloudMessage]:
        """Status goes into the Node object. The first time the node is told of the object the cloud made."""
        key = (namespace, "node", node)
        is_new = key not in self._objects
        content = json_content(request.content)
        status = content.get("Status") if isinstance(content, dict) else None
        made = self.put(*key, {"kind": "Node", "apiVersion": "v1", "spec": {}, "status": status or {}})
        answer = self._message("response", key, self._objects[key], request)
        answer.content = "OK"
        if not is_new:
            return [answer]
        return [answer, self._node_update(made, node)]

    @staticmethod
    def _node_update(message: CloudMessage, node: str) -> CloudMessage:
        # For what is born in the cloud the namespace of a cluster's own object is the word null.
        message.route.operation, message.route.resource = "update", f"null/node/{node}"
        return message

    @staticmethod
    def _message(
        operation: str, key: tuple[str, str, str], content: dict[str, Any], request: CloudMessage | None = None
    ) -> CloudMessage:
        version = content.get("metadata", {}).get("resourceVersion", "")
        return CloudMessage(
            Header(parent_msg_id=request.header.msg_id if request else "", resourceversion=version),
            Route(source="edgecontroller", group="resource", operation=operation, resource="/".join(key)),
            content,
        )
