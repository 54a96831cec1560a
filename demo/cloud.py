"""The cloud application: sends commands to the node and reads what comes up, over cloudsim's control API."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from queue import SimpleQueue
from typing import Any

_SECONDS = 5.0
"For one answer of cloudsim; it is on this machine."


class CloudApplication:
    """What a program behind CloudCore's router would do. Used from one thread.

    `inbox` gets every message that the node sends up as (seconds of the monotonic clock, content), in order, and
    None once cloudsim has ended.
    """

    def __init__(self, control_port: int, node: str, *, is_content_bytes: bool = False) -> None:
        """`is_content_bytes`: the node's link is QUIC, over which all content is bytes."""
        self._port = control_port
        self._is_content_bytes = is_content_bytes
        self._node = node
        self.inbox: SimpleQueue[tuple[float, Any] | None] = SimpleQueue()

    def listen(self) -> None:
        """Begin to fill `inbox`."""
        threading.Thread(target=self._read_events, name="cloud events", daemon=True).start()

    def command(self, topic: str, content: Any) -> bool:
        """Send a command to an MQTT topic on the node. False: the cloud says that the node is not there now.

        This is what KubeEdge's router sends for a rule rest → eventbus. Group `user` has no acknowledgement: only
        the device's answer tells that a command has arrived.
        """
        message = {
            "route": {"source": "router_eventbus", "group": "user", "operation": "publish", "resource": topic},
            "content": content,
        }
        status, _ = self._call("POST", f"/nodes/{self._node}/messages", message)
        return status == http.client.ACCEPTED

    def is_served(self) -> bool:
        """Whether the cloud has a session with the node."""
        _, answer = self._call("GET", "/sessions")
        return any(
            session["node"] == self._node and session["state"] == "served" for session in answer.get("sessions", ())
        )

    def _call(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_SECONDS)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            value = json.loads(answer.read() or b"{}")
            return answer.status, value if isinstance(value, dict) else {}
        finally:
            connection.close()

    def _read_events(self) -> None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port)
            connection.request("GET", "/events")
            for line in connection.getresponse():
                event = json.loads(line)
                if event.get("event") == "message":
                    content = event["message"].get("content")
                    if self._is_content_bytes and content is not None:
                        content = base64.b64decode(content).decode("utf-8", "replace")
                    self.inbox.put((time.monotonic(), content))
        except (OSError, ValueError, http.client.HTTPException):
            pass  # cloudsim has ended, which `inbox` tells below
        finally:
            self.inbox.put(None)
