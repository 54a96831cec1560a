"""What differs between CloudHubs of several ages, as far as an edge is concerned (docs/cloudlink.md, Other versions).

The frames, the headers and the JSON are the same in all of them, and what one of them does not look at (ACKs, resource
versions) does no harm there. So one table is all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from runtime.names import Group

EVENTBUS: Final = "eventbus"
SERVICEBUS: Final = "servicebus"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One age of CloudHub."""

    version: str
    "As `runtime.edgehub.hubVersion` has it."
    answers_greeting: bool
    "Whether the hub itself answers a query of `k8s/ca.crt`, which shows that a link has a session."
    names_nodes: bool = True
    "Whether a node's certificate is made out to `system:node:NAME`. Those of 2019 were all made out to `kubeedge.io`."
    issues_certificates: bool = True
    "Whether there is a certificate API, to join and to renew."
    owners: Mapping[str, str]
    "Message group to the module or group that owns it, on the way down."
    owners_of_user: Mapping[str, str] | None
    "Of group `user` the source decides; None: `owners` does."
    connection_operation: str = "connect"
    "Of the connection events."
    connection_groups: tuple[str, ...] = ("twin", "meta", "bus", "taskmanager")
    "Who hears of the connection state, in KubeEdge's order."
    errors_name_the_question: bool = True
    "Whether an error reply's parent is the question. In 2019 it was the question's own parent: mostly none."


_OWNERS: Final[Mapping[str, str]] = {
    "resource": Group("meta"),
    "func": Group("meta"),
    "twin": Group("twin"),
    "taskmanager": Group("taskmanager"),
}
_OWNERS_OF_USER: Final[Mapping[str, str]] = {
    "router_eventbus": EVENTBUS,
    "router_servicebus": SERVICEBUS,
    "router_rest": SERVICEBUS,  # the name of 2019
}

CURRENT: Final = Dialect(version="1.17", answers_greeting=True, owners=_OWNERS, owners_of_user=_OWNERS_OF_USER)
BEFORE_1_17: Final = Dialect(version="1.16", answers_greeting=False, owners=_OWNERS, owners_of_user=_OWNERS_OF_USER)
TREE_2019: Final = Dialect(
    version="2019",
    answers_greeting=False,
    names_nodes=False,
    issues_certificates=False,
    owners={
        "resource": Group("meta"),
        "func": Group("meta"),
        "twin": Group("twin"),
        "user": Group("bus"),
    },
    owners_of_user=None,
    connection_operation="publish",
    connection_groups=("meta", "twin", "bus"),
    errors_name_the_question=False,
)

DIALECTS: Final[Mapping[str, Dialect]] = {each.version: each for each in (CURRENT, BEFORE_1_17, TREE_2019)}
