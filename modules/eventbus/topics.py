"""Which MQTT topic is which message on the bus: tables, and pure functions over them.

The tables are KubeEdge's: `HEAD` those of today, `Y2019` those of commit da92692b, which older
clouds and mappers use (docs/eventbus.md, Topics). Filters and topics follow MQTT 5, section 4.7.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

from runtime.names import Group


class Semantics(StrEnum):
    """Whose topics and operations are spoken."""

    HEAD = "head"
    Y2019 = "2019"


HUB: Final = Group("hub")
TWIN: Final = Group("twin")

UPLOAD_TREE: Final = "$hw/events/upload/#"
MEMBERSHIP_GET: Final = "$hw/events/node/+/membership/get"
UPLOAD_RECORDS: Final = "SYS/dis/upload_records"

FIXED_FILTERS: Final[Mapping[Semantics, tuple[str, ...]]] = {
    Semantics.HEAD: (
        UPLOAD_TREE,
        "$hw/events/device/+/+/state/update",
        "$hw/events/device/+/+/twin/+",
        MEMBERSHIP_GET,
        UPLOAD_RECORDS,
        "+/user/#",
    ),
    Semantics.Y2019: (
        UPLOAD_TREE,
        "$hw/events/device/+/state/update",
        "$hw/events/device/+/twin/+",
        MEMBERSHIP_GET,
        UPLOAD_RECORDS,
    ),
}
"""Subscribed always. Results such as `.../twin/update/result` have one level more than the twin filter,
which keeps devicetwin from hearing itself."""

CONNECTION_STATE: Final = "node/connection"
"Resource of edgehub's messages on the state of the cloud link; a topic only where the 2019 option asks for it."

MAX_TOPIC_BYTES: Final = 65535
"MQTT writes a topic's length in two bytes."


@dataclass(frozen=True, slots=True)
class Route:
    """Where an MQTT message goes on the bus, and as what."""

    destination: Group
    resource: str
    operation: str


def membership_topic(node: str) -> str:
    """Where edge-group memberships are published: KubeEdge's name format."""
    return f"$hw/events/edgeGroup/{node}/membership/get"


def connected_topic(node: str) -> str:
    return f"$hw/events/connected/{node}"


def disconnected_topic(node: str) -> str:
    return f"$hw/events/disconnected/{node}"


def auth_info_topic(node: str) -> str:
    """Where the answer of operation `get_result` is published."""
    return f"$hw/events/node/{node}/authInfo/get/result"


@lru_cache(maxsize=8192)
def route(topic: str, semantics: Semantics = Semantics.HEAD) -> Route:
    """The route of a message that came on `topic`. Every topic has one."""
    if semantics is Semantics.HEAD:
        if _is_under(topic, "$hw/events/device") or _is_under(topic, "$hw/events/node"):
            return Route(TWIN, encode_topic(topic), "response")
        return Route(HUB, topic, "upload")
    if topic.startswith(("$hw/events/device", "$hw/events/node")):
        return Route(TWIN, encode_topic(topic), "response")
    if topic == UPLOAD_RECORDS:
        return Route(HUB, topic, "response")
    return Route(HUB, encode_topic(topic), "response")


def _is_under(topic: str, root: str) -> bool:
    """Whether `topic` is `root` or lies below it, level by level."""
    return topic.startswith(root) and topic[len(root) : len(root) + 1] in ("", "/")


def encode_topic(topic: str) -> str:
    """URL-safe base64 with padding, as devicetwin and the cloud of 2019 expect in a resource."""
    return base64.urlsafe_b64encode(topic.encode()).decode("ascii")


def decode_topic(resource: str) -> str:
    """The topic in a resource that `encode_topic` made; raises ValueError for anything else."""
    return base64.b64decode(resource.encode("ascii"), altchars=b"-_", validate=True).decode()


def is_topic(topic: str) -> bool:
    """Whether a message can be published to `topic`: no wildcards, no NUL, 1 to 65535 bytes of UTF-8."""
    return "+" not in topic and "#" not in topic and _is_utf8_string(topic)


def is_filter(topic_filter: str) -> bool:
    """Whether `topic_filter` can be subscribed: `+` and `#` alone in their levels, `#` only at the end."""
    if not _is_utf8_string(topic_filter):
        return False
    levels = topic_filter.split("/")
    if levels[0] == "$share" and (len(levels) < 3 or not levels[1] or "+" in levels[1] or "#" in levels[1]):
        return False
    if any(len(level) > 1 and ("+" in level or "#" in level) for level in levels):
        return False
    return "#" not in levels[:-1]


def _is_utf8_string(text: str) -> bool:
    try:
        return 0 < len(text.encode()) <= MAX_TOPIC_BYTES and "\0" not in text
    except UnicodeEncodeError:
        return False


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a message on `topic` reaches a subscriber of `topic_filter`, both valid."""
    wanted = topic_filter.split("/")
    if wanted[0] == "$share":
        wanted = wanted[2:]
    levels = topic.split("/")
    # MQTT-4.7.2-1: a wildcard in the first level does not reach the server's own topics.
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index == len(levels) or level not in ("+", levels[index]):
            return False
    return len(levels) == len(wanted)
